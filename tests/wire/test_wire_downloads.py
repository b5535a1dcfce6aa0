"""Whole downloads of dfget 0.2.0 and 1.0.6 through our supernode, alone and in mixed swarms.  Wire: 14"""
import hashlib

import hand as hands
import old_dfget
import pytest
from world import good, wait_for

MIB = 1 << 20
BOTH = pytest.mark.parametrize("kind", ["py", "go"])


@BOTH
@pytest.mark.parametrize("size", [1, 262139, 262140, 5 * MIB + 25])
def test_an_old_client_downloads(supernode, old, origin, blob, kind, size):
    data = blob(size)
    result = old.get(kind, supernode(), origin.put("f.bin", data), check=data)
    assert result.client.failures == {}
    assert result.count("register") == 1
    assert result.count("suc") == len(result.pieces)
    assert all(call.code in (200, 600, 601, 602, 611, 1) for call in result.calls), result.calls


@BOTH
def test_an_old_client_without_an_uploader_downloads(supernode, old, origin, blob, kind):
    data = blob(2 * MIB)
    old.get(kind, supernode(), origin.put("f.bin", data), check=data, uploader=False)


@BOTH
def test_one_piece_at_a_time(supernode, old, origin, blob, kind):
    data = blob(2 * MIB)
    old.get(kind, supernode(), origin.put("f.bin", data), check=data, sequential=True)


@BOTH
def test_an_empty_file_for_client_after_client(supernode, old, origin, kind):
    """Fault 14; checklist 14 (15)"""
    url = origin.put("empty", b"")
    node = supernode()
    for _ in range(3):
        old.get(kind, node, url, check=b"")


@BOTH
@pytest.mark.parametrize("how", [dict(length=False), dict(ranges=False), dict(gzip=True), dict(delay=3.2), dict(etag=False, last_modified=False)])
def test_origins_of_every_kind(supernode, old, origin, blob, kind, how):
    """Wire: 6, 10.1"""
    data = blob(MIB + 7)
    old.get(kind, supernode(), origin.put("f.bin", data, **how), check=data)


@BOTH
def test_a_redirect(supernode, old, origin, blob, kind):
    data = blob(MIB)
    target = origin.put("real.bin", data)
    old.get(kind, supernode(), origin.put("f.bin", redirect_to=target), check=data)


@BOTH
def test_a_download_that_follows_a_slow_origin(supernode, old, origin, blob, kind):
    """602s on the way."""
    data = blob(2 * MIB)
    result = old.get(kind, supernode(), origin.put("f.bin", data, rate=MIB), check=data)
    assert sum(1 for call in result.calls if call.code == 602) < 20


@BOTH
def test_the_users_md5(supernode, old, origin, blob, kind):
    """Wire: 1.2"""
    data = blob(MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    old.get(kind, node, url, check=data, md5=hashlib.md5(data).hexdigest())
    result = old.get(kind, node, url, md5=hashlib.md5(b"other").hexdigest())
    assert result.reason in (1, 3), "back to source, never a SUCCESS without a file (fault 11)"


@BOTH
def test_an_identifier_makes_a_task_of_its_own(supernode, old, origin, blob, kind):
    data = blob(MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    first = old.get(kind, node, url, check=data, identifier="v1")
    second = old.get(kind, node, url, check=data, identifier="v2")
    assert first.client.task_id != second.client.task_id


def test_metrics_come_once(supernode, old, origin, blob):
    """Checklist 14 (13); 1.0.6's supernode gets them twice."""
    data = blob(1000)
    assert old.get("go", supernode(), origin.put("f.bin", data), check=data).count("metrics") == 1


def test_a_small_download_costs_few_calls(supernode, old, origin, blob):
    """Fault 31, as far as an old client can have it better."""
    data = blob(1000)
    result = old.get("go", supernode(), origin.put("f.bin", data), check=data)
    assert len(result.calls) <= 7, result.calls


def test_the_file_travels_once_from_the_origin(supernode, old, origin, blob):
    """Faults 29, 40"""
    data = blob(3 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    running = [old.start(kind, node, url) for kind in ("py", "go", "py", "go")]
    for one in running:
        old.good(one.result(), data)
    assert origin.bytes_sent("f.bin") <= len(data) + 65536


def test_a_second_client_fetches_from_the_first(supernode, old, origin, blob):
    for first, second in (("go", "go"), ("go", "py"), ("py", "go"), ("py", "py")):
        data = blob(3 * MIB, first + second)
        url = origin.put(first + second, data)
        node = supernode()
        one = old.get(first, node, url, check=data)
        two = old.get(second, node, url, check=data)
        assert any(piece.cid == one.client.cid for piece in two.pieces), "nothing came from the peer"
        assert two.client.failures == {}, two.client.failures


def test_a_py_peer_never_fails_a_go_clients_last_piece(supernode, old, origin, blob):
    """Fault 21; checklist 14 (11): the exact end of the last range goes to everybody."""
    data = blob(MIB + 25)
    url = origin.put("f.bin", data)
    node = supernode()
    old.get("py", node, url, check=data)
    for _ in range(5):
        result = old.get("go", node, url, check=data)
        assert result.client.failures == {}


@BOTH
def test_a_crashed_peer_costs_little(supernode, old, origin, blob, kind):
    """Fault 16: the crash of a peer is only learned by failures, but then it is learned, and nobody waits for the dead."""
    data = blob(3 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    old.get("go", node, url, check=data)
    old.uploaders[-1].crash()
    old.get(kind, node, url, check=data, uploader=False)
    last = old.get(kind, node, url, check=data, uploader=False, patience_s=8)
    assert sum(last.client.failures.values()) <= 4, last.client.failures


def test_a_peer_that_serves_wrong_bytes_is_avoided(supernode, old, origin, blob):
    data = blob(2 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    bad = old.get("go", node, url, check=data).client
    with open(bad.service, "r+b") as service:
        service.write(b"\0" * len(data))
    for _ in range(4):
        old.get("go", node, url, check=data, uploader=False)
    last = old.get("go", node, url, check=data, uploader=False, patience_s=5)
    assert last.client.failures == {}, "still sent to the peer with wrong bytes: %s" % last.client.failures
    assert origin.bytes_sent("f.bin") <= len(data) + 65536, "a good task was purged"


def test_the_supernode_serves_what_only_a_port_0_client_has(supernode, old, origin, blob):
    """Fault 15 turned round: a holder that serves nobody must not keep the supernode from sending the piece again."""
    data = blob(6 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    old.get("go", node, url, check=data, uploader=False)
    old.get("go", node, url, check=data, uploader=False, patience_s=8)


def test_a_peer_whose_uploader_ended_well_is_not_offered(supernode, old, origin, blob):
    """Wire: 4.3, 7.7"""
    data = blob(2 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    one = old.get("go", node, url, check=data)
    old.uploaders[-1].stop()
    two = old.get("go", node, url, check=data)
    assert two.client.failures == {} and not any(piece.cid == one.client.cid for piece in two.pieces)


def test_a_cdn_pattern_client_is_never_a_source(supernode, old, origin, blob):
    """Fault 15"""
    data = blob(2 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    one = old.get("go", node, url, check=data, uploader=False)
    two = old.get("go", node, url, check=data)
    assert two.client.failures == {} and not any(piece.cid == one.client.cid for piece in two.pieces)


@pytest.fixture
def underway(supernode, old, origin, blob):
    """`underway(kind)`: an old client that knows two supernodes and has its first pieces from one; (running, that one, the other, data)."""
    def begin(kind):
        data = blob(4 * MIB)
        url = origin.put("f.bin", data, rate=MIB)
        nodes = [supernode(), supernode()]
        running = old.start(kind, nodes, url, patience_s=40)
        wait_for(lambda: len(running.client.pieces) >= 2, 20)
        nodes.sort(key=lambda node: node.node != running.client.node)  # 0.2 shuffles them
        return (running,) + tuple(nodes) + (data,)
    return begin


@BOTH
def test_a_restarted_supernode_sends_its_clients_on(supernode, old, underway, kind):
    """Checklist 14 (17), fault 27"""
    running, first, other, data = underway(kind)
    home, ports = first.home, (first.port, first.cdn_port)
    first.kill()
    supernode(home=home, ports=ports)
    result = old.good(running.result(), data)
    assert any(call.code == 502 for call in result.calls if call.kind == "pull") or result.client.node == other.node


@BOTH
def test_a_dead_supernode_is_left_for_the_next(old, underway, kind):
    running, first, other, data = underway(kind)
    first.kill()
    assert old.good(running.result(), data).client.node == other.node


def test_a_supernode_whose_origin_fails_sends_clients_to_the_source(supernode, old, origin, blob):
    """Wire: 10.2: a failure code, then reason 3 or 1; never a hang (fault 39)."""
    for kind in ("py", "go"):
        url = origin.put(kind, blob(MIB), status=500)
        result = old.get(kind, supernode(), url, patience_s=30, notbs=True)
        assert result.reason in (1001, 1003)


# -- mixed swarms ----------------------------------------------------------------------------------
def test_old_and_new_clients_in_one_swarm(supernode, old, host, origin, blob):
    """Everybody downloads at once, everybody gets the bytes, nobody harms anybody."""
    data = blob(8 * MIB)
    url = origin.put("f.bin", data, rate=6 * MIB)
    node = supernode()
    ours = [host("new%d" % i).start(url, node=node.node, ip="127.0.0.%d" % (101 + i)) for i in range(2)]
    running = [old.start(kind, node, url) for kind in ("py", "go", "py", "go")]
    for command in ours:
        good(command.wait(60), data)
    for one in running:
        result = old.good(one.result(), data)
        assert sum(result.client.failures.values()) <= 2, result.client.failures
    assert origin.bytes_sent("f.bin") <= len(data) + 65536


@BOTH
def test_an_old_client_fetches_from_our_peer(supernode, old, host, origin, blob, kind):
    """Through our uploader's /peer/file/, the last piece included."""
    data = blob(3 * MIB + 25)
    url = origin.put("f.bin", data)
    node = supernode()
    host("a").get(url, node=node.node, ip="127.0.0.101", check=data)
    result = old.get(kind, node, url, check=data)
    assert any(piece.ip == "127.0.0.101" for piece in result.pieces), "nothing came from our peer"
    assert result.client.failures == {}


@BOTH
def test_our_get_fetches_from_an_old_peer(supernode, old, host, origin, blob, kind):
    data = blob(3 * MIB + 25)
    url = origin.put("f.bin", data)
    node = supernode()
    old.get(kind, node, url, check=data)
    uploader = old.uploaders[-1]
    result = host("a").get(url, node=node.node, ip="127.0.0.101", check=data)
    served = [path for path, _headers in uploader.log if path.startswith("/peer/file/")]
    assert served, "nothing came from the old peer\n" + result.out
    assert result.reason == 0


@BOTH
def test_our_get_survives_an_old_peer_that_dies(supernode, old, host, origin, blob, kind):
    data = blob(3 * MIB + 25)
    url = origin.put("f.bin", data)
    node = supernode()
    old.get(kind, node, url, check=data)
    old_dfget._Uploader.stop(old.uploaders[-1])
    assert host("a").get(url, node=node.node, ip="127.0.0.101", check=data).reason == 0


def test_a_killed_uploader_of_ours_costs_old_clients_little(supernode, old, host, origin, blob):
    data = blob(3 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    peer = host("a")
    peer.get(url, node=node.node, ip="127.0.0.101", check=data)
    peer.kill_uploader()
    for kind in ("go", "py"):
        old.get(kind, node, url, check=data)


def test_an_old_client_sees_nothing_new(supernode, old, host, hand, origin, blob):
    """Our additions travel only to those who ask with X-Dfly."""
    data = blob(MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    host("a").get(url, node=node.node, ip="127.0.0.101", check=data)
    client = hand(node)
    reply = client.json(url)
    hands.registered(reply)
    assert not [name for name, _value in reply.raw_headers if "dfly" in name.lower()]
    answer = client.start()
    for task in answer["data"]:
        for name, _value in client.fetch(task).raw_headers:
            assert "dfly" not in name.lower()
