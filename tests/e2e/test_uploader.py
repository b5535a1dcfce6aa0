"""The host's uploader: started by get, shared, limited, and gone when it has nothing left to do."""
import os
import re
import signal

from world import MB, Command, alive, ask, good, marked, send, wait_for


def test_get_starts_one_uploader_and_the_next_get_shares_it(origin, supernode, host, blob):
    supernode()
    here = host()
    url = origin.put("f", blob(MB))
    here.get(url, out="a", check=blob(MB))
    pid = here.uploader_pid()
    assert pid and alive(pid)
    here.get(url, out="b", check=blob(MB))
    assert here.uploader_pid() == pid


def test_two_downloads_at_once_start_one_uploader(origin, supernode, host, blob, world):
    supernode()
    here = host()
    urls = [origin.put("f%d" % i, blob(2 * MB, i)) for i in range(4)]
    commands = [here.start(url, out="o%d" % i) for i, url in enumerate(urls)]
    for i, command in enumerate(commands):
        good(command.wait(), blob(2 * MB, i))
    assert len([c for c in marked(world.mark).values() if here.home in c]) == 1


def test_a_killed_uploader_is_started_anew(origin, supernode, host, blob):
    supernode()
    here = host()
    url = origin.put("f", blob(MB))
    here.get(url, check=blob(MB))
    old = here.uploader_pid()
    here.kill_uploader()
    here.get(url, out="b", check=blob(MB))
    assert here.uploader_pid() not in (None, old)


def test_the_uploader_ends_after_its_alive_time(origin, supernode, host, blob):
    supernode()
    here = host()
    here.get(origin.put("f", blob(MB)), "--alivetime", "2s", "--expiretime", "1s", check=blob(MB))
    pid = here.uploader_pid()
    wait_for(lambda: not alive(pid), 25, "the uploader's end")
    assert not os.path.exists(os.path.join(here.home, "peer.pid"))


def test_a_range_without_end_of_a_file_without_length_holds_nobody_up(origin, supernode, host, blob):
    supernode()
    here = host()
    data = blob(4 * MB)
    command = here.start(origin.put("f", data, length=False, stall_after=3 * MB))
    name = "out-" + wait_for(lambda: re.search(r"^sign:(\S+)", command.stdout, re.M), 10).group(1)
    where = here.uploader_address()
    wait_for(lambda: ask(where, "GET", "/peer/file/" + name).status == 400, 20, "the file at the uploader")
    for range_ in ("0-99999999999999", "99999999999999-100000000262138"):
        for more in ({"cdnSource": "source"}, {"pieceNum": "0", "pieceSize": "1048576"}):
            assert ask(where, "GET", "/peer/file/" + name, None, dict(more, Range="bytes=" + range_, pieceNum="0", pieceSize="1048576")).status == 416
    assert ask(where, "GET", "/server/ping").body == b"success"
    origin.release("f")
    good(command.wait(), data)


def test_an_uploader_at_work_outlives_its_alive_time(origin, supernode, host, blob):
    supernode()
    here = host()
    data = blob(4 * MB)
    command = here.start(origin.put("f", data, rate=MB), "--alivetime", "1s")
    pid = wait_for(here.uploader_pid, 10)
    good(command.wait(), data)
    assert command.stdout and (here.uploader_pid() == pid or not alive(pid))


def test_a_file_is_served_until_it_expires_and_then_dropped(origin, supernode, host, blob):
    node = supernode()
    data = blob(2 * MB)
    url = origin.put("f", data)
    here = host()
    here.get(url, "--expiretime", "2s", check=data)
    wait_for(lambda: down_calls(node) >= 1, 30, "the uploader's word to the supernode that it dropped the file")
    before = node.bytes_sent()
    result = host().get(url, check=data)
    assert result.shares["peers"] == 0 and node.bytes_sent() - before >= len(data)
    assert here.uploader_pid(), "the uploader has not reached its alive time yet"


def down_calls(node):
    """How many times uploaders told the supernode that they serve a task no more."""
    return sum(int(v) for k, v in node.metrics().items() if "down" in k and k.startswith("dfly_requests_total{"))


def test_an_uploader_that_is_told_to_end_tells_the_supernode(origin, supernode, host, blob):
    node = supernode()
    here = host()
    url = origin.put("f", blob(2 * MB))
    here.get(url, check=blob(2 * MB))
    pid = here.uploader_pid()
    send(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid), 10, "the uploader's end")
    assert down_calls(node) >= 1
    result = host().get(url, check=blob(2 * MB))
    assert result.shares["peers"] == 0 and result.seconds < 10


def test_the_uploaders_port_is_in_the_old_range(origin, supernode, host, blob):
    supernode()
    here = host()
    here.get(origin.put("f", blob(MB)), check=blob(MB))
    assert 15000 <= here.uploader_address()[1] <= 65000


def test_an_uploader_can_be_run_by_hand(world, origin, supernode, host, blob):
    supernode()
    here = host()
    server = Command(world, "peer", world.dfly("peer", "--home", here.home, "--ip", "127.0.0.1"))
    pid = wait_for(here.uploader_pid, 10, "a pid file")
    assert pid == server.pid
    here.get(origin.put("f", blob(MB)), check=blob(MB))
    assert here.uploader_pid() == pid
    second = world.run("peer", "--home", here.home, "--ip", "127.0.0.1")
    assert second.code not in (0, 1) and "Traceback" not in second.out, second.out
    assert server.stop() == 0


def test_an_uploader_answers_ping_and_serves_wrapped_pieces(origin, supernode, host, blob):
    """The piece as dfget 1.0.6 asks for it: head, content, tail.  Wire: 7.6"""
    node = supernode()
    data = blob(MB)
    url = origin.put("f", data)
    here = host()
    here.get(url, check=data)
    pieces = list(node.old_client(url, "127.0.0.1-4711-1795408506.429"))
    piece = next(p for p in pieces if p["peerPort"] == here.uploader_address()[1])
    size, num = piece["pieceSize"], piece["pieceNum"]
    answer = ask((piece["peerIp"], piece["peerPort"]), "GET", piece["path"],
                 headers={"Range": "bytes=" + piece["range"], "pieceNum": str(num), "pieceSize": str(size)})
    content = data[num * (size - 5):(num + 1) * (size - 5)]
    assert answer.status == 206
    assert answer.body == (len(content) | size << 4).to_bytes(4, "big") + content + b"\x7f"


def test_nothing_is_left_in_the_home_after_expiry(origin, supernode, host, blob):
    supernode()
    here = host()
    here.get(origin.put("f", blob(3 * MB)), "--expiretime", "1s", "--alivetime", "2s", check=blob(3 * MB))
    pid = here.uploader_pid()
    wait_for(lambda: not alive(pid), 25, "the uploader's end")
    large = [name for folder, _, names in os.walk(here.home) for name in names
             if os.path.getsize(os.path.join(folder, name)) > MB // 2]
    assert not large, large
    assert os.path.getsize(here.path("out")) == 3 * MB
