"""Many hosts: one fetch from the origin, pieces before the file is whole, peers that serve, fail or lie."""
import hashlib
import http.server
import os
import re
import socketserver
import threading

import pytest
from world import CONTENT, MB, PIECE, ask, descriptors, good, wait_for


def half_written(host, name="out"):
    """The bytes of the unfinished output that are on disk."""
    for file in os.listdir(host.dir):
        if file.endswith(".dfly") and name in file:
            return os.stat(host.path(file)).st_blocks * 512
    return 0


def test_pieces_reach_peers_long_before_the_origin_is_done(origin, supernode, host, blob):
    supernode()
    data = blob(8 * MB)
    url = origin.put("f", data, stall_after=4 * MB)
    hosts = [host(), host()]
    commands = [h.start(url) for h in hosts]
    for h in hosts:
        wait_for(lambda: half_written(h) >= 3 * MB, 20, "three of the first four megabytes on the host")
    assert all(c.running() for c in commands)
    origin.release("f")
    for command in commands:
        good(command.wait(), data)
    assert origin.gets("f") == 1


def test_pieces_of_a_file_of_unknown_length_stream_too(origin, supernode, host, blob):
    supernode()
    data = blob(8 * MB)
    url = origin.put("f", data, stall_after=4 * MB, length=False)
    here = host()
    command = here.start(url)
    wait_for(lambda: half_written(here) >= 2 * MB, 20, "two of the first four megabytes on the host")
    origin.release("f")
    good(command.wait(), data)


def test_five_hosts_at_once_cost_the_origin_one_get(origin, supernode, host, blob):
    node = supernode()
    data = blob(10 * MB)
    url = origin.put("f", data, rate=8 * MB)
    commands = [host().start(url) for _ in range(5)]
    results = [good(command.wait(), data) for command in commands]
    assert origin.gets("f") == 1 and origin.bytes_sent("f") == len(data)
    assert all(r.reason == 0 for r in results)
    assert node.bytes_sent() <= 3.5 * len(data), "the supernode sent %.1f copies" % (node.bytes_sent() / len(data))


def test_a_host_that_comes_later_is_served_by_peers(origin, supernode, host, blob):
    node = supernode()
    data = blob(6 * MB)
    url = origin.put("f", data)
    for _ in range(3):
        host().get(url, check=data)
    before = node.bytes_sent()
    result = host().get(url, check=data)
    assert node.bytes_sent() - before <= len(data) // 2, "the supernode sent %d bytes" % (node.bytes_sent() - before)
    assert result.shares["peers"] >= 50, result.last


def test_a_second_run_on_the_same_host_works_too(origin, supernode, host, blob):
    supernode()
    data = blob(3 * MB)
    url = origin.put("f", data)
    here = host()
    here.get(url, out="a", check=data)
    here.get(url, out="b", check=data)
    assert origin.gets("f") == 1


def test_a_peer_serves_while_it_downloads(origin, supernode, host, blob):
    """The origin hangs, so nobody is done; a newcomer still gets most pieces from the first host."""
    node = supernode()
    data = blob(8 * MB)
    url = origin.put("f", data, stall_after=6 * MB)
    first = host()
    command = first.start(url)
    wait_for(lambda: half_written(first) >= 5 * MB, 20)
    before = node.bytes_sent()
    second = host()
    other = second.start(url)
    wait_for(lambda: half_written(second) >= 5 * MB, 20)
    assert node.bytes_sent() - before < 4 * MB
    origin.release("f")
    good(command.wait(), data)
    good(other.wait(), data)


def test_an_edited_output_does_not_poison_others(origin, supernode, host, blob):
    supernode()
    data = blob(4 * MB)
    url = origin.put("f", data)
    here = host()
    here.get(url, check=data)
    with open(here.path("out"), "r+b") as f:
        f.write(b"edited" * 1000)
    host().get(url, check=data)


def test_a_deleted_output_does_not_stop_others(origin, supernode, host, blob):
    supernode()
    data = blob(4 * MB)
    url = origin.put("f", data)
    here = host()
    here.get(url, check=data)
    os.remove(here.path("out"))
    assert host().get(url, check=data).seconds < 15


def test_hosts_whose_uploader_was_killed_are_passed_over(origin, supernode, host, blob):
    supernode()
    data = blob(4 * MB)
    url = origin.put("f", data)
    for _ in range(2):
        here = host()
        here.get(url, check=data)
        here.kill_uploader()
    assert host().get(url, check=data).seconds < 20
    assert origin.gets("f") == 1


def test_an_uploader_killed_in_the_middle_of_a_download_costs_nothing(origin, supernode, host, blob):
    supernode()
    data = blob(8 * MB)
    url = origin.put("f", data, rate=4 * MB)
    here = host()
    command = here.start(url)
    wait_for(lambda: half_written(here) > MB, 20)
    here.kill_uploader()
    good(command.wait(), data)


class FalsePeer:
    """A host that registers like dfget 1.0.6, claims to have every piece, and serves garbage, or when `silent` nothing at all;
    when `dripping`, a byte now and then; when `early`, it registers as ours do, claims `early` (a mask) before the supernode has it, and swears to its garbage."""

    def __init__(self, node, url, silent=False, early=0, dripping=False):
        self.asked = 0                          # pieces that others wanted from it
        self.closing = threading.Event()
        peer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                peer.asked += 1
                if silent:
                    peer.closing.wait(120)
                    return
                start, _, end = self.headers["Range"].partition("=")[2].partition("-")
                length = min(int(end) - int(start) + 1, PIECE)
                self.send_response(206)
                self.send_header("Content-Length", str(length))
                size = int(self.headers["pieceSize"])
                plain = b"\xee" * (length - 5)
                if early:
                    self.send_header("X-Dfly", "sha256:" + hashlib.sha256(plain).hexdigest())
                self.end_headers()
                while dripping and not peer.closing.wait(0.5):
                    self.wfile.write(b"x")
                self.wfile.write((len(plain) | size << 4).to_bytes(4, "big") + plain + b"\x7f" if early else b"\xee" * length)

            def log_message(self, *args):
                pass

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            allow_reuse_address = True
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        for self.port in range(20000 + os.getpid() % 20000, 64000):
            try:
                self.server = Server(("127.0.0.1", self.port), Handler)
                break
            except OSError:
                continue
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        if early:
            self.claim(node, url, early)
        else:
            self.claimed = len(list(node.old_client(url, "127.0.0.1-%d-1795408506.429" % self.port, self.port)))

    def claim(self, node, url, mask):
        self.cid = "127.0.0.1-%d-1795408506.429" % self.port
        answer = node.ask("POST", "/peer/registry", {
            "superNodeIp": node.ip, "rawUrl": url, "taskUrl": url, "cid": self.cid, "ip": "127.0.0.1",
            "port": self.port, "path": "/peer/file/liar"}, {"X-Dfly": "1 "}).json
        self.told = node.ask("POST", "/peer/sync", {"task": answer["data"]["taskId"], "cid": self.cid,
                                                    "have": "%x" % mask, "wait": 0})

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_a_peer_that_serves_wrong_bytes_is_isolated(origin, supernode, host, blob):
    node = supernode()
    data = blob(8 * MB)
    url = origin.put("f", data)
    host().get(url, check=data)
    liar = FalsePeer(node, url)
    try:
        assert liar.claimed == -(-len(data) // CONTENT)
        for _ in range(3):
            assert host().get(url, check=data).reason == 0
        asked = liar.asked
        assert 1 <= asked <= 24, "a liar was asked %d times" % asked
        host().get(url, check=data)
        assert liar.asked <= asked + 1, "a known liar is still asked"
    finally:
        liar.close()


def test_a_peer_that_swears_to_a_piece_before_the_supernode_has_it_is_not_believed(origin, supernode, host, blob):
    node = supernode()
    data = blob(8 * MB)
    url = origin.put("f", data, stall_after=3 * MB)
    liar = FalsePeer(node, url, early=(1 << 33) - 2)  # all but the first
    try:
        hosts = [host(), host()]
        commands = [h.start(url) for h in hosts]
        for h in hosts:
            wait_for(lambda: half_written(h) >= 2 * MB, 20)
        origin.release("f")
        for command in commands:
            assert good(command.wait(), data).reason == 0
    finally:
        liar.close()


def test_peers_that_only_drip_do_not_hold_a_download_up(origin, supernode, host, blob):
    """As many as a download has threads."""
    node = supernode()
    data = blob(8 * MB)
    url = origin.put("f", data)
    host().get(url, "-p", "cdn", check=data)
    drippers = [FalsePeer(node, url, dripping=True) for _ in range(6)]
    try:
        result = host().get(url, "--notbs", timeout=90, check=data)
        assert sum(d.asked for d in drippers) and result.seconds < 60, result.last
    finally:
        for dripper in drippers:
            dripper.close()


def test_a_peer_that_claims_pieces_behind_the_end_holds_nobody_up(origin, supernode, host, blob):
    """Nobody knows yet where the end is."""
    node = supernode()
    data = blob(8 * MB)
    url = origin.put("f", data, length=False, stall_after=3 * MB)
    liar = FalsePeer(node, url, early=1 << 5000)
    try:
        commands = [host().start(url, "--notbs"), host().start(url, "--notbs")]
        wait_for(lambda: node.bytes_sent() >= 2 * MB, 20)
        origin.release("f")
        for command in commands:
            good(command.wait(), data)
    finally:
        liar.close()


def test_a_peer_that_never_answers_is_given_up(origin, supernode, host, blob):
    node = supernode()
    data = blob(8 * MB)
    url = origin.put("f", data)
    host().get(url, check=data)
    sleeper = FalsePeer(node, url, silent=True)
    try:
        results = [host().get(url, check=data) for _ in range(3)]
        assert all(r.reason == 0 for r in results)
        assert sleeper.asked and max(r.seconds for r in results) < 20, [r.last for r in results]
        asked = sleeper.asked
        assert host().get(url, check=data).seconds < 10 and sleeper.asked <= asked + 1, "it is still asked"
    finally:
        sleeper.close()


def test_the_supernode_holds_no_descriptor_for_peers_that_are_gone(origin, supernode, host, blob):
    node = supernode()
    data = blob(2 * MB)
    url = origin.put("f", data)
    host().get(url, check=data)
    before = descriptors(node.pid)
    for _ in range(3):
        host().get(url, check=data)
    wait_for(lambda: descriptors(node.pid) <= before + 2, 30, "descriptors back to %d" % before)


def test_the_supernode_forgets_clients_that_serve_nobody_while_the_task_lives_on(origin, supernode, host, blob):
    node = supernode("--task-expire-time", "2s")
    data = blob(MB)
    url = origin.put("f", data)
    here = host()
    here.get(url, "-p", "cdn", check=data)
    with open(os.path.join(node.home, "logs", "app.log")) as f:
        task = re.search(r"register (\S+)", f.read()).group(1)
    assert node.metrics()["dfly_peers"] == 1

    def forgotten():
        assert ask((node.ip, node.cdn_port), "GET", "/download/%s/%s" % (task[:3], task), headers={"Range": "bytes=0-9"}).status == 206
        return node.metrics()["dfly_peers"] == 0
    wait_for(forgotten, 20)
    assert node.metrics()["dfly_tasks"] == 1


def test_what_the_supernode_keeps_survives_its_restart(origin, supernode, host, blob, world):
    node = supernode()
    data = blob(5 * MB)
    url = origin.put("f", data)
    host().get(url, check=data)
    node.kill()
    again = supernode(home=node.home)
    host().get(url, node=again.node, check=data)
    assert origin.bytes_sent("f") <= len(data) + CONTENT, origin.requests("f")


def test_a_file_that_changed_at_the_origin_is_fetched_again_after_a_restart(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f", blob(3 * MB, 1))
    host().get(url, check=blob(3 * MB, 1))
    node.kill()
    origin.put("f", blob(3 * MB, 2))
    again = supernode(home=node.home)
    host().get(url, node=again.node, check=blob(3 * MB, 2))


@pytest.mark.parametrize("damage", ["two pieces", "the end is missing"])
def test_what_is_damaged_in_the_cache_while_it_is_in_use_is_fetched_anew(origin, supernode, host, blob, damage):
    node, data = supernode(), blob(8 * MB)
    url = origin.put("f", data)
    host().get(url, "-p", "cdn", check=data)
    path, = [os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(node.home, "repo")) for name in names if len(name) == 64]
    with open(path, "r+b") as file:
        if damage == "two pieces":
            for at in (MB, 5 * MB):
                file.seek(at)
                file.write(bytes([data[at] ^ 1]))
        else:
            file.truncate(7 * MB)
    result = host().get(url, "-p", "cdn", check=data)
    assert result.reason == 0 and result.seconds < 30, result.out
    assert origin.bytes_sent("f") < 8 * MB + 2 * MB, origin.log
