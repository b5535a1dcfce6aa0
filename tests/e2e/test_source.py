"""Back to source: when there is no supernode, when it fails, and when the user wants it."""
import http.server
import json
import os
import socket
import socketserver
import threading
import time

import pytest
from world import MB, bad, dead_port, good, wait_for


def test_without_a_supernode_the_origin_serves_with_reason_1(origin, host, blob):
    data = blob(3 * MB)
    here = host()
    result = here.get(origin.put("f", data), check=data)
    assert result.reason == 1, result.out
    assert "source station" in result.stdout and not here.leftovers()


def test_notbs_fails_with_reason_1001_and_no_file(origin, host, blob):
    here = host()
    result = bad(here.get(origin.put("f", blob(MB)), "--notbs"), 4)
    assert result.reason == 1001, result.out
    assert not origin.log and "out" not in os.listdir(here.dir)


def test_pattern_source_has_reason_100_and_asks_nobody_else(origin, supernode, host, blob):
    node = supernode()
    data = blob(3 * MB)
    here = host()
    result = here.get(origin.put("f", data), "-p", "source", check=data)
    assert result.reason == 100, result.out
    assert node.bytes_sent() == 0 and here.uploader_pid() is None


def test_a_supernode_that_hangs_is_left_within_seconds(origin, host, blob):
    """It accepts connections and never answers."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(10)
        result = host().get(origin.put("f", blob(MB)), node="127.0.0.1:%d" % deaf.getsockname()[1], check=blob(MB))
    assert result.reason == 1 and result.seconds < 25, result.out


def test_a_server_that_is_no_supernode_is_left(origin, host, blob):
    result = host().get(origin.put("f", blob(MB)), node="127.0.0.1:%d" % origin.port, check=blob(MB))
    assert result.reason == 1, result.out


def test_a_supernode_that_dies_midway_is_replaced_by_the_origin(origin, supernode, host, blob):
    node = supernode()
    data = blob(8 * MB)
    url = origin.put("f", data, stall_after=5 * MB, once=True)
    here = host()
    command = here.start(url)
    wait_for(lambda: node.bytes_sent() >= 3 * MB, 20)
    node.kill()
    result = good(command.wait(), data)
    assert result.reason == 3, result.out
    assert origin.requests("f")[-1].bytes_sent <= 6 * MB, "verified pieces were thrown away: %s" % origin.log


def test_a_supernode_that_dies_midway_is_an_error_with_notbs(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f", blob(8 * MB), stall_after=5 * MB)
    here = host()
    command = here.start(url, "--notbs")
    wait_for(lambda: node.bytes_sent() >= 3 * MB, 20)
    node.kill()
    result = bad(command.wait(90))
    assert result.reason == 1003, result.out


def test_the_second_node_takes_over_and_pieces_are_kept(origin, supernode, host, blob):
    nodes = [supernode(), supernode()]
    data = blob(8 * MB)
    url = origin.put("f", data, stall_after=5 * MB, once=True)
    command = host().start(url, node=",".join(n.node for n in nodes))
    used = wait_for(lambda: next((n for n in nodes if n.bytes_sent() >= 3 * MB), None), 20)
    other = nodes[1 - nodes.index(used)]
    used.kill()
    result = good(command.wait(), data)
    assert result.reason == 0 and "migrated to node:" in result.stdout, result.out
    assert other.bytes_sent() <= 6 * MB, "verified pieces were thrown away"


def test_a_node_that_knows_the_length_takes_over_from_one_that_did_not(origin, supernode, host, blob):
    """The last piece is shorter than the rest: who goes on must have heard so."""
    first, second = supernode(), supernode()
    data = blob(8 * MB + 5)
    url = origin.put("f", data, length=False)
    host().get(url, node=second.node, check=data)
    origin.change("f", stall_after=5 * MB)
    command = host().start(url, "-e", "40", node="%s=9999,%s" % (first.node, second.node))
    wait_for(lambda: first.bytes_sent() >= 3 * MB, 20)
    first.kill()
    before = second.bytes_sent()
    result = good(command.wait(), data)
    assert result.reason == 0 and "migrated to node:" in result.stdout, result.out
    assert second.bytes_sent() - before <= 6 * MB, "verified pieces were thrown away"


def test_a_dead_node_in_front_is_passed_over(origin, supernode, host, blob):
    node = supernode()
    data = blob(2 * MB)
    url = origin.put("f", data)
    for nodes in ("127.0.0.1:%d,%s" % (dead_port(), node.node), "%s,127.0.0.1:%d" % (node.node, dead_port())):
        result = host().get(url, node=nodes, check=data)
        assert result.reason == 0 and result.seconds < 10, result.out


def test_the_same_url_goes_to_the_same_supernode(origin, supernode, host, blob):
    nodes = [supernode() for _ in range(3)]
    names = [n.node for n in nodes]
    for i in range(4):
        url = origin.put("f%d" % i, blob(MB, i))
        for order in (names, names[::-1]):
            host().get(url, node=",".join(order), check=blob(MB, i))
        assert origin.gets("f%d" % i) == 1, "two supernodes fetched one URL"


@pytest.fixture
def false_node():
    """Factory: `false_node(register, sync)` answers every register and, after `held_s`, every sync with these; returns its address."""
    servers = []

    def start(register, sync, held_s=0.0):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(held_s if self.path != "/peer/registry" else 0.0)
                body = json.dumps({"code": 200, "data": register} if self.path == "/peer/registry" else sync).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            daemon_threads = True

        server = Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return "127.0.0.1:%d" % server.server_address[1]
    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


GOOD = {"taskId": "a" * 64, "fileLength": MB, "pieceSize": 262144, "dfly": {"version": "v"}}
WAIT = {"code": 602}


def piece(num=0, digest=None, host="127.0.0.1", port=1, path="/x"):
    return {"code": 601, "pieces": [[num, "c", digest]], "holders": {"c": [host, port, path]}}


@pytest.mark.parametrize("register, sync", [
    (dict(GOOD, dfly=[1]), WAIT), (dict(GOOD, dfly={"content": 5}), WAIT), (dict(GOOD, dfly={"content": "!"}), WAIT),
    (dict(GOOD, fileLength=10 ** 18), WAIT), (GOOD, []), (GOOD, {}), (GOOD, {"code": 601}), (GOOD, {"code": 601, "pieces": [[0, "b", None]], "holders": {}}),
    (GOOD, piece("x")), (GOOD, piece(10 ** 9)), (GOOD, piece(digest=5)), (GOOD, piece(digest="md5")), (GOOD, piece(host=5)),
    (GOOD, piece(host="/etc/passwd")), (GOOD, piece(port="x")), (GOOD, piece(path=5)), (GOOD, {"code": 602, "length": "x"}),
    (GOOD, {"code": 602, "length": -5}), (dict(GOOD, fileLength=-1), {"code": 602, "length": 10 ** 18}), (GOOD, {"code": 600})])
def test_a_supernode_that_talks_nonsense_is_left(origin, host, blob, false_node, register, sync):
    result = host().get(origin.put("f", blob(MB)), "-p", "cdn", node=false_node(register, sync), check=blob(MB))
    assert result.reason in (1, 3), result.out


def test_pieces_that_come_wrong_again_and_again_are_named(origin, host, blob, false_node):
    """Bytes come all the time, and yet it stands still: why, is said while it lasts and at its end."""
    liar = origin.put("liar", blob(MB, 2), ranges=False)
    sync = piece(digest="0" * 64, host="127.0.0.1", port=int(liar.split(":")[2].split("/")[0]), path="/liar")
    result = host().get(origin.put("f", blob(MB)), "-p", "cdn", "-e", "8", node=false_node(GOOD, sync, held_s=0.1), check=blob(MB))
    assert result.reason == 3 and "\nwaiting: pieces keep failing, the last one: " in result.out, result.out
    assert "not finished within the 8.0 s allowed; waiting: pieces keep failing, the last one: " in result.out, result.out
