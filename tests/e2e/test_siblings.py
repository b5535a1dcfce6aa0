"""Supernodes that have been told of each other: one of them asks the origin, the others ask that one."""
import os
import random
import signal
import socket
import time

import pytest
from world import MB, bad, send, wait_for

SIZE = 6 * MB


def free_ports(count):
    """Ports on which nobody listens, below those that the system gives away itself."""
    found = []
    while len(found) < count:
        port = random.randrange(15000, 30000)
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


@pytest.fixture
def siblings(supernode):
    """`siblings(count, *flags)`: supernodes that all have the same list of peers, themselves among them."""
    def start(count, *flags):
        ports = free_ports(count)
        peers = ",".join("127.0.0.1:%d" % port for port in ports)
        nodes = [supernode("--peers", peers, *flags, ports=(port, 0)) for port in ports]
        for node in nodes:  # each has seen all others
            wait_for(lambda: log_of(node).count("is 127.0.0.1:") == count - 1, 20, "siblings that know each other: " + log_of(node))
        return nodes
    return start


def log_of(node):
    try:
        with open(os.path.join(node.home, "logs", "app.log")) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def from_siblings(node):
    return node.metrics().get("dfly_sibling_bytes_total", 0)


def by_rank(nodes, url):
    """The supernodes in the order in which they are responsible for a URL."""
    import dfly
    order = dfly.order_nodes([dfly.Node("127.0.0.1", node.port) for node in nodes], url)
    return sorted(nodes, key=lambda node: [one.port for one in order].index(node.port))


def test_a_cold_file_asked_for_at_both_ends_at_once_is_fetched_once(siblings, origin, host, blob):
    nodes = siblings(2)
    urls = [origin.put("f%d" % number, blob(SIZE, number)) for number in range(6)]
    commands = [(number, host().start(url, node=node.node)) for number, url in enumerate(urls) for node in nodes]
    for number, command in commands:
        assert command.wait().data == blob(SIZE, number)
    assert [origin.gets("f%d" % number) for number in range(6)] == [1] * 6
    assert sum(from_siblings(node) for node in nodes) == 6 * SIZE
    assert {by_rank(nodes, url)[0] for url in urls} == set(nodes), "all files had the same supernode"


def test_each_need_only_name_the_other(world, supernode, origin, host, blob):
    a, b = free_ports(2)
    nodes = [supernode("--peers", "localhost:%d" % b, ports=(a, 0)), supernode("--peers", "127.0.0.1:%d" % a, ports=(b, 0))]
    wait_for(lambda: all("is 127.0.0.1:" in log_of(node) for node in nodes), 20)
    for number in range(4):
        url = origin.put("f%d" % number, blob(SIZE, number))
        commands = [host().start(url, "--notbs", node=node.node) for node in nodes]
        assert [command.wait().data == blob(SIZE, number) for command in commands] == [True, True]
        assert origin.gets("f%d" % number) == 1


def test_of_four_one_asks_the_origin_and_they_share_out_the_rest(siblings, origin, host, blob):
    nodes = siblings(4)
    url = origin.put("f", blob(24 * MB), rate=12 * MB)
    commands = [host().start(url, "--notbs", node=node.node) for node in nodes for _ in range(2)]
    for command in commands:
        assert command.wait().data == blob(24 * MB)
    assert origin.gets("f") == 1
    first = by_rank(nodes, url)[0]
    assert [from_siblings(node) for node in nodes] == [0 if node is first else 24 * MB for node in nodes]
    sent = first.metrics()["dfly_sent_bytes_total"]
    assert sent < 4.5 * 24 * MB, "the others took all from the first: %d" % sent


def test_pieces_are_passed_on_as_they_come(siblings, origin, host, blob):
    nodes = siblings(2)
    url = origin.put("f", blob(SIZE), stall_after=SIZE // 2)
    first, second = by_rank(nodes, url)
    here = host()
    command = here.start(url, "--notbs", node=second.node)
    journal = lambda: [name for name in here.leftovers() if name.endswith(".journal")]  # noqa: E731
    wait_for(lambda: journal() and open(os.path.join(here.dir, journal()[0])).read().count("piece ") >= 8, 20, "pieces at the client")
    assert origin.gets("f") == 1 and command.running()
    origin.release("f")
    assert command.wait().data == blob(SIZE)


@pytest.mark.parametrize("how, size", [(dict(length=False), SIZE), (dict(), 0), (dict(), 1000), (dict(), 262139), (dict(length=False), 100),
                                       (dict(etag=False, last_modified=False), SIZE), (dict(delay=4.0), SIZE), (dict(ranges=False), SIZE)])
def test_every_kind_of_file_comes_by_a_sibling(siblings, origin, host, blob, how, size):
    nodes = siblings(2)
    url = origin.put("f", blob(size), **how)
    second = by_rank(nodes, url)[1]
    host().get(url, "--notbs", node=second.node, check=blob(size))
    assert origin.gets("f") == 1 and from_siblings(second) == size


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_sibling_costs_seconds(siblings, origin, host, blob, number):
    nodes = siblings(2)
    url = origin.put("f", blob(SIZE))
    first, second = by_rank(nodes, url)
    send(first.pid, number)
    try:
        result = host().get(url, "--notbs", node=second.node, check=blob(SIZE))
    finally:
        send(first.pid, signal.SIGCONT)
    assert result.seconds < (4 if number == signal.SIGKILL else 10), result.out
    assert origin.gets("f") == 1 and from_siblings(second) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sibling_that_dies_in_the_middle_is_replaced_by_the_origin(siblings, origin, host, blob, number):
    nodes = siblings(2)
    url = origin.put("f", blob(SIZE), stall_after=SIZE // 2, once=True)
    first, second = by_rank(nodes, url)
    command = host().start(url, "--notbs", node=second.node)
    wait_for(lambda: from_siblings(second) > 2 * MB, 20, "half of the file")
    send(first.pid, number)
    try:
        assert command.wait().data == blob(SIZE)
    finally:
        send(first.pid, signal.SIGCONT)
    ranges = [record.range for record in origin.requests("f")]
    assert len(ranges) == 2 and int(ranges[1][6:].partition("-")[0]) >= 2 * MB, ranges  # only what was missing


def test_one_that_asks_a_sibling_itself_is_not_waited_for(siblings, origin, host, blob):
    nodes = siblings(2)
    url = origin.put("f", blob(SIZE), stall_after=SIZE // 2)
    first, second = by_rank(nodes, url)
    command = host().start(url, "--notbs", node=second.node)
    wait_for(lambda: from_siblings(second) > 2 * MB, 20, "half of the file")
    began = time.monotonic()
    answer = second.ask("POST", "/peer/registry", {"rawUrl": url, "taskUrl": url, "cid": "127.0.0.1-a-supernode-123456", "ip": "127.0.0.1", "port": 0,
                                                   "path": "/x"}, {"X-Dfly": "1 ", "X-Dfly-Sibling": ""})
    assert answer.json["code"] == 604 and "sibling" in answer.json["msg"] and time.monotonic() < began + 1
    origin.release("f")
    assert command.wait().data == blob(SIZE)


def test_credentials_are_shown_to_the_origin_for_every_asker(siblings, origin, host, blob):
    nodes = siblings(2, "--fail-access-interval", "1s")
    url = origin.put("f", blob(SIZE), auth="Basic dTpw")
    first, second = by_rank(nodes, url)
    word = ("--header", "Authorization: Basic dTpw")
    host().get(url, "--notbs", *word, node=second.node, check=blob(SIZE))
    assert [record.status for record in origin.requests("f")] == [200] and from_siblings(second) == SIZE
    for node in nodes:
        bad(host().get(url, "--notbs", node=node.node), 6)
        bad(host().get(url, "--notbs", "--header", "Authorization: Basic other", node=node.node), 6)
        host().get(url, "--notbs", *word, node=node.node, check=blob(SIZE))
    assert origin.bytes_sent("f") < SIZE + MB
    for node in nodes:
        for folder, _, names in os.walk(node.home):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    assert b"dTpw" not in file.read(), name


def test_a_file_that_has_changed_crosses_once_and_the_old_one_goes_to_nobody(siblings, origin, host, blob):
    nodes = siblings(2)
    url = origin.put("f", blob(SIZE, 1), headers=(("Cache-Control", "max-age=1"),))
    first, second = by_rank(nodes, url)
    for node in nodes:
        host().get(url, "--notbs", node=node.node, check=blob(SIZE, 1))
    assert origin.gets("f") == 1
    origin.change("f", data=blob(SIZE, 2))
    time.sleep(1.2)
    for node in (second, first):
        host().get(url, "--notbs", node=node.node, check=blob(SIZE, 2))
    assert origin.bytes_sent("f") == 2 * SIZE, origin.log


def test_what_a_restarted_one_kept_of_a_changed_file_is_replaced_from_a_sibling_that_did_not_know(siblings, supernode, origin, host, blob):
    nodes = siblings(2)
    url = origin.put("f", blob(SIZE, 1), headers=(("Last-Modified", "Sat, 01 Jan 2000 00:00:00 GMT"),), last_modified=False)
    first, second = by_rank(nodes, url)
    for node in nodes:
        host().get(url, "--notbs", node=node.node, check=blob(SIZE, 1))
    second.kill()
    origin.change("f", data=blob(SIZE, 2))  # which the first takes for fresh for three minutes
    again = supernode("--peers", first.node, home=second.home, ports=(second.port, 0))
    wait_for(lambda: log_of(again).count("is 127.0.0.1:") == 2, 20)
    host().get(url, "--notbs", node=again.node, check=blob(SIZE, 2))
    assert from_siblings(again) == SIZE
    host().get(url, "--notbs", node=first.node, check=blob(SIZE, 2))


def test_what_the_origin_says_of_freshness_holds_behind_a_sibling(siblings, origin, host, blob):
    nodes = siblings(2)
    url = origin.put("f", blob(SIZE), headers=(("Cache-Control", "no-cache"),))
    second = by_rank(nodes, url)[1]
    host().get(url, "--notbs", node=second.node, check=blob(SIZE))
    before = len(origin.log)
    time.sleep(1.1)
    host().get(url, "--notbs", node=second.node, check=blob(SIZE))
    assert len(origin.log) == before + 1 and origin.log[-1].status == 304


def test_what_an_origin_refuses_a_sibling_is_refused_once_each(siblings, origin, host, blob):
    nodes = siblings(2, "--fail-access-interval", "60s")
    url = origin.put("f", blob(SIZE), status=404)
    for node in nodes * 2:
        bad(host().get(url, "--notbs", node=node.node))
    assert len(origin.log) == 2


def test_what_this_supernode_does_not_fetch_it_has_nobody_else_fetch(supernode, origin, host, blob):
    a, b = free_ports(2)
    fenced = supernode("--peers", "127.0.0.1:%d" % b, "--allow-origins", "files.example.com", ports=(a, 0))
    supernode("--peers", "127.0.0.1:%d" % a, ports=(b, 0))
    wait_for(lambda: "is 127.0.0.1:" in log_of(fenced), 20)
    for number in range(4):
        bad(host().get(origin.put("f%d" % number, blob(SIZE)), "--notbs", node=fenced.node))
    assert not origin.log


def test_a_preheat_given_to_all_crosses_once(siblings, world, origin, blob):
    nodes = siblings(3)
    url = origin.put("f", blob(SIZE))
    assert world.run("preheat", url, "--node", ",".join(node.node for node in nodes)).code == 0
    assert origin.gets("f") == 1 and sum(from_siblings(node) for node in nodes) == 2 * SIZE


