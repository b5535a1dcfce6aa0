"""The registry mirror and proxy: what a container engine sees, and what the registry behind it does."""
import base64
import hashlib
import http.server
import os
import re
import socket
import subprocess
import threading
import time

import pytest
from world import DFLY, MB, Command, Daemon, alive, ask, dead_port, descriptors, raw, read_answer, sha256, threads, wait_for

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def layer(origin, data, repo="app", **how):
    """Offer a blob as a registry does; return its path."""
    name = "v2/%s/blobs/sha256:%s" % (repo, sha256(data))
    origin.put(name, data, headers=(("Docker-Content-Digest", "sha256:" + sha256(data)),), **how)
    return "/" + name


def base(origin):
    return origin.base.rstrip("/")


def whole(answer, data):
    """Assert that these very bytes have come, under the right head."""
    assert answer.status == 200, answer
    assert answer.body == data, "%d bytes for %d" % (len(answer.body), len(data))
    assert answer.headers["content-length"] == str(len(data))
    return answer


# ---- blobs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [0, 5, 300000, 5 * MB])
def test_a_blob_leaves_the_registry_once_for_all_hosts(origin, supernode, host, blob, size):
    node, data = supernode(), blob(size)
    path = layer(origin, data)
    for _ in range(3):
        here = host()
        answer = whole(here.daemon(base(origin)).ask(path), data)
        assert answer.headers["docker-content-digest"] == "sha256:" + sha256(data)
        assert answer.headers["accept-ranges"] == "bytes"
    assert origin.gets(path[1:]) in ((0, 1) if size == 5 else (1,)), "one of which the first bytes are all is no matter for the swarm"
    assert origin.openings(path[1:]) == 3, "each host asks once whether it may have it"
    if size > MB:
        assert node.bytes_sent() < 2.2 * size  # the other hosts gave the rest


def test_clients_that_ask_at_the_same_time_share_one_download(origin, supernode, host, blob):
    supernode()
    data = blob(4 * MB)
    path = layer(origin, data, rate=3 * MB)
    here = host()
    daemon, answers = here.daemon(base(origin)), []
    asking = [threading.Thread(target=lambda: answers.append(daemon.ask(path))) for _ in range(5)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(answers) == 5
    for answer in answers:
        whole(answer, data)
    assert origin.gets(path[1:]) == 1 and origin.openings(path[1:]) == 1
    wait_for(lambda: os.path.exists(os.path.join(here.home, "logs", "dfclient.log")))  # it is written behind the last byte
    with open(os.path.join(here.home, "logs", "dfclient.log")) as log:
        assert log.read().count("|" + origin.base) == 1


def test_a_second_pull_on_the_same_host_comes_from_its_disk(origin, supernode, host, blob):
    node, data = supernode(), blob(2 * MB)
    path, daemon = layer(origin, data), host().daemon(base(origin))
    whole(daemon.ask(path), data)
    sent = node.bytes_sent()
    whole(daemon.ask(path), data)
    assert node.bytes_sent() == sent and len(origin.requests(path[1:])) == 2, "the first bytes and the whole, once"
    assert not origin.requests(path[1:], "HEAD")


def test_a_blob_is_sent_on_while_it_still_comes(origin, supernode, host, blob):
    supernode()
    data = blob(6 * MB)
    path = layer(origin, data, stall_after=4 * MB)
    daemon = host().daemon(base(origin))
    with socket.create_connection(daemon.address, 20) as s:
        s.sendall(("GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path).encode())
        got = b""
        while len(got) < 3 * MB:
            got += s.recv(65536)
        origin.release(path[1:])
        while len(got) < 6 * MB:
            got += s.recv(65536)
        for rest in iter(lambda: s.recv(65536), b""):
            got += rest
    assert got.partition(b"\r\n\r\n")[2] == data


def test_without_a_supernode_blobs_come_all_the_same(origin, host, blob):
    data = blob(3 * MB)
    path = layer(origin, data)
    whole(host().daemon(base(origin)).ask(path), data)
    assert origin.gets(path[1:]) == 1


def test_a_supernode_that_dies_does_not_show(origin, supernode, host, blob):
    node, data = supernode(), blob(6 * MB)
    path = layer(origin, data, rate=4 * MB)
    daemon, answers = host().daemon(base(origin)), []
    thread = threading.Thread(target=lambda: answers.append(daemon.ask(path)))
    thread.start()
    wait_for(lambda: origin.bytes_sent(path[1:]) > 2 * MB, 20)
    node.kill()
    thread.join()
    whole(answers[0], data)


def test_wrong_bytes_never_make_a_whole_blob(origin, supernode, host, blob):
    supernode()
    daemon = host().daemon(base(origin))
    small, large = blob(MB // 2, 1), blob(4 * MB, 2)
    whole(daemon.ask(layer(origin, small, wrong=100000, once=True)), small)  # of the swarm's bytes nothing has been sent before they are right
    body = daemon.ask(layer(origin, large, wrong=100000, once=True)).body
    assert body == large or len(body) < len(large), "the supernode notices, in time or not"
    small, large, before = blob(MB // 2, 3), blob(4 * MB, 4), daemon.metric("fallbacks_total")
    path = layer(origin, large, wrong=100000)
    assert len(daemon.ask(path).body) < len(large)
    layer(origin, large)
    whole(daemon.ask(path), large)  # not by the swarm any more
    assert daemon.metric("fallbacks_total") == before + 1
    path = layer(origin, small, wrong=100000)
    assert len(daemon.ask(path).body) < len(small) and daemon.metric("fallbacks_total") == before + 2, "the registry's own first bytes, and wrong ones of it after them"


@pytest.mark.parametrize("size", [MB // 2, 4 * MB])
def test_wrong_first_bytes_never_make_a_whole_blob(origin, supernode, host, blob, size):
    """They go to the engine as the registry sends them, and are held against the blob before it can end."""
    supernode()
    daemon, data = host().daemon(base(origin)), blob(size)
    path = layer(origin, data, wrong=1000, once=True)
    assert len(daemon.ask(path).body) < size
    layer(origin, data)
    whole(daemon.ask(path), data)
    assert len(daemon.ask(layer(origin, blob(size, 2), wrong=1000)).body) < size, "nor when they are as wrong in the swarm"


def test_open_ranges_come_by_the_swarm_and_others_from_the_registry(origin, supernode, host, blob):
    supernode()
    data = blob(3 * MB)
    path, daemon = layer(origin, data), host().daemon(base(origin))
    answer = daemon.ask(path, headers={"Range": "bytes=%d-" % MB})
    assert (answer.status, answer.body) == (206, data[MB:])
    assert answer.headers["content-range"] == "bytes %d-%d/%d" % (MB, 3 * MB - 1, 3 * MB)
    assert [r.range for r in origin.requests(path[1:])] == [None]
    for text, part in (("bytes=10-19", data[10:20]), ("bytes=-7", data[-7:])):
        answer = daemon.ask(path, headers={"Range": text})
        assert (answer.status, answer.body) == (206, part)
        assert origin.requests(path[1:])[-1].range == text
    assert daemon.ask(path, headers={"Range": "bytes=%d-" % (9 * MB)}).status == 416


def test_a_blob_that_is_not_there_is_404_and_a_full_disk_does_not_matter(origin, supernode, host, blob, world):
    supernode()
    daemon = host().daemon(base(origin))
    assert daemon.ask("/v2/app/blobs/sha256:" + "0" * 64).status == 404
    data = blob(2 * MB)
    path = layer(origin, data)
    repo = os.path.join(world.hosts[0].home, "dfdaemon", "data")
    os.rename(repo, repo + ".gone")
    with open(repo, "w"):  # no folder any more
        pass
    whole(daemon.ask(path), data)
    os.unlink(repo)
    os.rename(repo + ".gone", repo)


# ---- who may ---------------------------------------------------------------------------------------------------------

def test_credentials_go_to_the_registry_and_everyone_needs_his_own(origin, supernode, host, blob):
    supernode()
    data = blob(2 * MB)
    path = layer(origin, data, auth="Bearer good")
    daemons = [host().daemon(base(origin)) for _ in range(2)]
    for daemon in daemons:
        answer = daemon.ask(path)
        assert answer.status == 401 and answer.headers["www-authenticate"] == 'Basic realm="station"'
        whole(daemon.ask(path, headers={"Authorization": "Bearer good"}), data)
        assert daemon.ask(path, headers={"Authorization": "Bearer bad"}).status == 401  # though it lies here
        assert daemon.ask(path).status == 401
    assert len([r for r in origin.requests(path[1:]) if r.status == 200]) == 1


def test_two_repositories_with_the_same_blob_are_two_questions(origin, supernode, host, blob):
    supernode()
    data, daemon = blob(MB), host().daemon(base(origin))
    one, two = layer(origin, data, "one"), layer(origin, data, "two", auth="Basic x")
    whole(daemon.ask(one), data)
    assert daemon.ask(two).status == 401


# ---- everything else -------------------------------------------------------------------------------------------------

def test_manifests_tags_and_heads_pass_straight(origin, host):
    body = b'{"schemaVersion": 2}'
    origin.put("v2/app/manifests/1", body, headers=(("Docker-Content-Digest", "sha256:" + sha256(body)), ("X-Odd", "a, b")), auth="Bearer t")
    origin.put("v2/app/tags/list", b"[]", length=False)
    daemon = host().daemon(base(origin))
    answer = daemon.ask("/v2/app/manifests/1?ns=%s" % base(origin).partition("//")[2], headers={"Authorization": "Bearer t", "Accept": MANIFEST, "X-Mine": "1", "Connection": "x-mine, close"})
    assert whole(answer, body).headers["docker-content-digest"] == "sha256:" + sha256(body) and answer.headers["x-odd"] == "a, b"
    seen = origin.requests("v2/app/manifests/1")[-1]
    assert seen.path == "/v2/app/manifests/1" and seen.headers["accept"] == MANIFEST and seen.headers["host"] == base(origin).partition("//")[2]
    assert "x-mine" not in seen.headers
    answer = daemon.ask("/v2/app/manifests/1", "HEAD", {"Authorization": "Bearer t"})
    assert answer.status == 200 and answer.headers["content-length"] == str(len(body))
    assert daemon.ask("/v2/app/manifests/1").status == 401
    assert daemon.ask("/v2/app/manifests/2").status == 404
    answer = daemon.ask("/v2/app/tags/list")
    assert answer.status == 200 and answer.body.endswith(b"2\r\n[]\r\n0\r\n\r\n")
    etag = daemon.ask("/v2/app/tags/list").headers["etag"]
    assert daemon.ask("/v2/app/tags/list", headers={"If-None-Match": etag}).status == 304


def test_a_connection_carries_many_requests(origin, supernode, host, blob):
    supernode()
    data = blob(MB)
    path = layer(origin, data)
    origin.put("v2/", b"{}")
    with socket.create_connection(host().daemon(base(origin)).address, 20) as s:
        for _ in range(3):
            s.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_answer(s).body == b"{}"
            s.sendall(("GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path).encode())
            assert read_answer(s).body == data
        s.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_answer(s).body == b"{}" and b"dfly_daemon_blobs_total 3" in read_answer(s).body


def test_redirects_are_followed_without_credentials_for_others(world, origin, supernode, host, blob):
    supernode()
    data, store = blob(2 * MB), world.origin("127.0.0.1")
    away = store.put("bucket/layer?Signature=1".partition("?")[0], data)
    path = "/v2/app/blobs/sha256:" + sha256(data)
    origin.put(path[1:], redirect_to=away, auth=None)
    origin.put("v2/app/manifests/1", redirect_to="/v2/app/manifests/2")
    origin.put("v2/app/manifests/2", b"{}")
    origin.put("v2/loop", redirect_to="/v2/loop")
    origin.put("v2/odd", redirect_to="ftp://x/y")
    origin.put("v2/odder", redirect_to="http://[::1/y")
    daemon, token = host().daemon(base(origin)), {"Authorization": "Bearer t"}
    whole(daemon.ask(path, headers=token), data)
    assert daemon.ask(path, "HEAD", token).headers["content-length"] == str(len(data))
    assert all("authorization" not in r.headers for r in store.log) and store.log
    assert daemon.ask("/v2/app/manifests/1", headers=token).body == b"{}"
    assert origin.requests("v2/app/manifests/2")[-1].headers["authorization"] == "Bearer t"
    for path in ("/v2/loop", "/v2/odd", "/v2/odder"):
        assert daemon.ask(path).status == 502


class Upload(http.server.BaseHTTPRequestHandler):
    """A registry that takes uploads."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_PATCH(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while True:
                size = int(self.rfile.readline(), 16)
                data += self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
        else:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(202)
        self.send_header("Location", "http://127.0.0.1:%d/v2/next?a=1" % self.server.server_address[1])
        self.send_header("X-Digest", hashlib.sha256(data).hexdigest())
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.send_response(200)
        self.end_headers()  # a body up to the end of the connection
        self.wfile.write(b"until the end")
        self.close_connection = True

    do_PUT = do_POST = do_PATCH


@pytest.fixture
def uploads():
    """The URL of a registry that takes uploads."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Upload)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield "http://127.0.0.1:%d" % server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_uploads_pass_through(uploads, host, blob):
    daemon, data = host().daemon(uploads), blob(5 * MB)
    for how in ({"Expect": "100-continue"}, {}):
        answer = daemon.ask("/v2/x", "PATCH", how, data)
        if answer.status == 100:  # the reader of the tests does not know it
            continue
        assert answer.status == 202 and answer.headers["x-digest"] == sha256(data)
        assert answer.headers["location"] == "/v2/next?a=1"
    with socket.create_connection(daemon.address, 20) as s:
        s.sendall(b"PUT /v2/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(data), 100000):
            s.sendall(b"%x;ext=1\r\n%s\r\n" % (len(data[at:at + 100000]), data[at:at + 100000]))
        s.sendall(b"0\r\nTrailer: x\r\n\r\n")
        assert read_answer(s).headers["x-digest"] == sha256(data)
        s.sendall(b"POST /v2/x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert read_answer(s).headers["x-digest"] == sha256(b"")
        s.sendall(b"GET /v2/x HTTP/1.0\r\nHost: x\r\n\r\n")
        assert read_answer(s).body == b"until the end"


def test_what_can_not_be_reached_is_said_in_a_registry_s_words(host):
    daemon = host().daemon("http://127.0.0.1:%d" % dead_port())
    answer = daemon.ask("/v2/")
    assert answer.status == 502 and "refused" in answer.json["errors"][0]["message"]
    assert daemon.ask("/v2/app/blobs/sha256:" + "1" * 64).status == 502


def test_a_registry_with_tls_needs_a_trusted_certificate(origin_tls, supernode, host, blob):
    supernode()
    data = blob(2 * MB)
    path = layer(origin_tls, data)
    origin_tls.put("v2/", b"{}")
    assert host().daemon(base(origin_tls)).ask("/v2/").status == 502
    for flags in (["--insecure"], ["--cacerts", origin_tls.certificate]):
        daemon = host().daemon(base(origin_tls), *flags)
        assert daemon.ask("/v2/").body == b"{}"
        whole(daemon.ask(path), data)


# ---- as a proxy --------------------------------------------------------------------------------------------------------

def test_as_a_proxy_rules_decide(origin, supernode, host, blob):
    supernode()
    data = blob(2 * MB)
    blob_path = layer(origin, data)
    plain, other = origin.put("file.rpm", data), origin.put("other/file.rpm", data)
    moved = origin.put("moved", redirect_to=plain)
    daemon = host().daemon("http://127.0.0.1:%d" % dead_port(), "--proxy", "other/.*rpm$ direct", "--proxy", r"\.rpm$",
                           "--proxy", "^http://registry.test/ redirect=%s" % base(origin).partition("//")[2])
    for count, url in enumerate([plain, "http://registry.test" + blob_path], 1):
        whole(daemon.ask(url), data)
        assert daemon.metric("blobs_total") == count
    assert daemon.ask(plain).headers["etag"]
    for url in (other, origin.base + blob_path[1:]):
        whole(daemon.ask(url), data)
    assert daemon.metric("blobs_total") == 3
    answer = daemon.ask(moved)
    assert answer.status == 302 and answer.headers["location"] == plain
    assert daemon.ask(plain, "HEAD").status == 200


def test_what_a_url_says_of_its_user_is_written_nowhere(origin, supernode, host, blob):
    supernode()
    here, good = host(), "Basic " + base64.b64encode(b"me:secret-word").decode()
    daemon = here.daemon(base(origin), "--proxy", "[.]bin$")
    with_user = origin.base.replace("://", "://me:secret-word@")
    for name, data in (("a.bin", blob(2 * MB)), ("b.txt", b"text")):
        origin.put(name, data, auth=good)
        assert daemon.ask(with_user + name).body == data
        assert daemon.ask(origin.base + name).status == 401
    origin.put("cut", b"x" * MB, cut_after=1000)
    for url in (with_user + "cut?Signature=secret-word", "http://me:secret-word@127.0.0.1:1/x?Signature=secret-word", "http://me:secret-word@127.0.0.1:99999/"):
        daemon.ask(url)
    daemon.stop()
    for folder, _, names in os.walk(here.home):
        for path in [os.path.join(folder, name) for name in names]:
            with open(path, "rb") as file:
                text = file.read()
            assert b"secret-word" not in text and good[6:].encode() not in text, path


def test_what_has_no_digest_is_asked_for_anew(origin, supernode, host, blob):
    supernode("--task-expire-time", "1s")
    url = origin.put("latest.rpm", blob(MB, 1))
    daemon = host().daemon(base(origin), "--proxy", "rpm$", "--rule", "rpm$")
    whole(daemon.ask(url), blob(MB, 1))
    whole(daemon.ask("/latest.rpm"), blob(MB, 1))
    requests = len(origin.log)
    wait_for(lambda: daemon.metric("kept_blobs") == 0, 10)
    whole(daemon.ask(url), blob(MB, 1))
    assert len(origin.log) >= requests


def test_a_tunnel_passes_everything(origin_tls, host, world):
    url = origin_tls.put("f", b"secret")
    daemon = host().daemon("http://127.0.0.1:%d" % dead_port())
    done = subprocess.run(["curl", "-sS", "--proxy", "http://127.0.0.1:%d" % daemon.address[1], "--cacert", origin_tls.certificate, url],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
    assert done.stdout == b"secret"
    assert daemon.metric("tunnels_total") == 1
    assert daemon.ask("127.0.0.1:%d" % dead_port(), "CONNECT").status == 502
    assert daemon.ask("127.0.0.1:99999", "CONNECT").status == 400


def test_a_proxy_asked_for_itself_is_the_mirror(origin, host):
    origin.put("v2/", b"{}")
    daemon = host().daemon(base(origin))
    assert daemon.ask("http://127.0.0.1:%d/v2/" % daemon.address[1]).body == b"{}"


# ---- coming to an end ----------------------------------------------------------------------------------------------------

def test_clients_that_hang_up_leave_nothing(origin, supernode, host, blob):
    supernode()
    stalled = layer(origin, blob(3 * MB, 1), stall_after=2 * MB)
    origin.put("v2/slow", blob(3 * MB), stall_after=MB)
    origin.put("v2/", b"{}")
    here = host()
    daemon = here.daemon(base(origin))
    whole(daemon.ask("/v2/"), b"{}")
    wait_for(here.uploader_pid, 10)
    fds, count = descriptors(daemon.pid), threads(daemon.pid)
    for path in (stalled, "/v2/slow"):
        for _ in range(5):
            with socket.create_connection(daemon.address, 20) as s:
                s.sendall(("GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path).encode())
                assert len(s.recv(100)) == 100
    origin.release(stalled[1:])
    origin.release("v2/slow")
    wait_for(lambda: descriptors(daemon.pid) <= fds + 8 and threads(daemon.pid) <= count + 1, 30,
             "descriptors back to %d and threads to %d" % (fds, count))
    whole(daemon.ask(stalled), blob(3 * MB, 1))
    assert origin.gets(stalled[1:]) == 1


def test_blobs_leave_the_disk_in_time(origin, supernode, host, blob):
    supernode()
    data, here = blob(2 * MB), host()
    path, daemon = layer(origin, data), here.daemon(base(origin), "--expiretime", "1s")
    whole(daemon.ask(path), data)
    repo = os.path.join(here.home, "dfdaemon", "data")
    wait_for(lambda: os.listdir(repo) == ["dfdaemon.lock"], 10, "an empty folder")
    wait_for(lambda: not [fd for fd in os.listdir("/proc/%d/fd" % daemon.pid) if "deleted" in _target(daemon.pid, fd)], 5, "no deleted file held open")
    whole(daemon.ask(path), data)


def _target(pid, fd):
    try:
        return os.readlink("/proc/%d/fd/%s" % (pid, fd))
    except OSError:
        return ""


def test_sigterm_in_the_middle_ends_everything_at_once_and_a_restart_goes_on(origin, supernode, host, blob):
    supernode()
    data, here = blob(6 * MB), host()
    path = layer(origin, data, stall_after=3 * MB)
    origin.put("v2/slow", b"x" * MB, stall_after=1000)
    daemon = here.daemon(base(origin))
    with socket.create_connection(daemon.address, 20) as s, socket.create_connection(daemon.address, 20) as other, \
            socket.create_connection(daemon.address, 20):
        s.sendall(("GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path).encode())
        other.sendall(b"GET /v2/slow HTTP/1.1\r\nHost: x\r\n\r\n")
        assert s.recv(100) and other.recv(100)
        companion = wait_for(here.uploader_pid, 10)
        began = time.monotonic()
        assert daemon.stop(5) == 0
        assert time.monotonic() - began < 2.0
    wait_for(lambda: not alive(companion), 10, "the uploader's end")
    origin.release(path[1:])
    whole(here.daemon(base(origin)).ask(path), data)


def test_sigterm_lets_what_moves_come_to_its_end_and_nobody_in(origin, supernode, host, blob):
    supernode()
    data, here = blob(6 * MB), host()
    path, slow = layer(origin, data, rate=4 * MB), b"x" * MB
    origin.put("v2/slow", slow, rate=MB)
    daemon, answers = here.daemon(base(origin)), {}
    asking = [threading.Thread(target=lambda path=path: answers.update({path: daemon.ask(path)})) for path in (path, "/v2/slow")]
    with socket.create_connection(daemon.address, 20) as idle:
        for thread in asking:
            thread.start()
        wait_for(lambda: daemon.metric("blob_bytes_total") > 0 and daemon.metric("relayed_total") > 0)
        daemon.proc.terminate()
        assert idle.recv(1) == b"", "an idle connection is closed"
        with pytest.raises(OSError):
            socket.create_connection(daemon.address, 20)
        assert daemon.running()
    for thread in asking:
        thread.join()
    whole(answers[path], data)
    whole(answers["/v2/slow"], slow)
    assert daemon.proc.wait(5) == 0


def test_a_killed_daemon_s_halves_are_used(origin, host, blob):
    data, here = blob(6 * MB), host()
    path = layer(origin, data, stall_after=4 * MB, once=True)
    daemon = here.daemon(base(origin))
    with socket.create_connection(daemon.address, 20) as s:
        s.sendall(("GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path).encode())
        got = 0
        while got < 2 * MB:
            got += len(s.recv(65536))
        daemon.kill()
    whole(here.daemon(base(origin)).ask(path), data)
    assert origin.requests(path[1:])[-1].range


def test_the_uploader_is_started_again(origin, supernode, host, blob):
    supernode()
    here = host()
    daemon = here.daemon(base(origin))
    first = wait_for(here.uploader_pid, 10)
    here.kill_uploader()
    data = blob(2 * MB)
    path = layer(origin, data)
    whole(daemon.ask(path), data)
    assert here.uploader_pid() not in (None, first)
    other = host().daemon(base(origin))
    whole(other.ask(path), data)
    assert wait_for(lambda: other.status()["sources"])["peers"] > 0


# ---- settings and input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, code, old", [
    (["--registry", "ftp://x"], 2, 10), (["--proxy", "("], 2, 10), (["--proxy", "a bogus"], 2, 10), (["--bogus"], 2, 10),
    (["--config", "/nonexistent"], 2, 10), (["--certpem", "/x"], 2, 10), (["--home", "/dev/null/x"], 2, 11), (["--localrepo", "here"], 2, 12),
    (["--ratelimit", "fast"], 2, 13), (["--port", "99999"], 2, 14), (["--port", "1111", "--registry", "http://127.0.0.1:1111"], 2, 10),
    (["--localrepo", "/dev/null/x"], 2, 16), (["--hostIp", "192.0.2.77"], 2, 14)])
def test_bad_settings_end_with_one_line_and_the_original_s_exit_code(world, arguments, code, old):
    link = os.path.join(world.root, "dfdaemon")
    os.symlink(DFLY, link)
    common = ["--home", os.path.join(world.root, "h"), "--port", "0"]
    for argv, expected in ((world.dfly("daemon"), code), ([world.python, link], old)):
        result = Command(world, "daemon", argv + common + arguments).wait(20)
        assert (result.code, len(result.stderr.splitlines())) == (expected, 1), (result.code, result.out)


def test_dfdaemon_takes_the_original_s_flags(world, origin, host):
    link, here = os.path.join(world.root, "dfdaemon"), host()
    os.symlink(DFLY, link)
    origin.put("v2/", b"{}")
    one = Daemon(world, "dfdaemon", [
        world.python, link, "--workHome", here.home, "--port", "0", "--hostIp", "127.0.0.1", "--registry", base(origin), "--localrepo", here.path("repo"),
        "--node", "127.0.0.1:1,127.0.0.1:1", "--ratelimit", "20MB", "--dfpath", "/usr/bin/dfget", "--maxprocs", "4", "--peerPort", "0",
        "--localIP", "127.0.0.1", "--streamMode=false", "--verbose=true"])
    assert one.ask("/v2/").body == b"{}" and one.ask("/env").json["ratelimit"] == 20 * MB
    assert one.ask("/env").json["verbose"] is True and one.ask("/args").status == 200 and one.ask("/debug/version").status == 200
    two = host()
    old = Daemon(world, "dfdaemon", [world.python, link, "-port", "0", "-registry", base(origin), "-notbs=true", "-callsystem", "com_ops_dragonfly",
                                     "-urlfilter", "Signature&Expires&OSSAccessKeyId", "--home", two.home, "-rule", "a,b", "-verbose"])
    assert old.ask("/v2/").body == b"{}"
    result = Command(world, "dfdaemon", [world.python, link, "--workHome", host().home, "--localrepo", here.path("repo"), "--port", "0"]).wait(20)
    assert result.code == 16
    for flag in ("-v", "version"):
        result = Command(world, "dfdaemon", [world.python, link, flag]).wait(20)
        assert result.code == 0 and result.stdout.startswith("dfdaemon version:")


def test_the_configuration_has_a_section_for_it(world, origin, host):
    origin.put("x.rpm", b"x")
    path = os.path.join(world.root, "dragonfly.conf")
    with open(path, "w") as file:
        file.write("[node]\naddress = 127.0.0.1:7\n[daemon]\nregistry = %s\nexpiretime = 5m\nhostip = 127.0.0.1\nproxy = rpm$ direct\n    deb$\n" % base(origin))
    here = host()
    daemon = Daemon(world, "daemon", world.dfly("daemon", "--config", path, "--port", "0", "--home", here.home))
    env = daemon.ask("/env").json
    assert (env["registry"], env["expiretime"], env["proxy"], env["nodes"]) == (base(origin), 300.0, ["rpm$ direct", "deb$"], ["127.0.0.1:7"])


YML = """
registry_mirror:
  remote: %s     # comment
  insecure: false
proxies:
- regx: no-swarm
  direct: true
- regx: rpm$
dfget_flags: ["--node","127.0.0.1:7","--expiretime","5m0s","-f",
              "a&b"]
hijack_https: {}
hostIp: 127.0.0.1
port: 0
workHome: %s
ratelimit: 20M
logConfig:
  maxSize: 40
"""


def test_the_original_s_configuration_file_is_read(world, origin, host):
    path, link = os.path.join(world.root, "dfdaemon.yml"), os.path.join(world.root, "dfdaemon")
    os.symlink(DFLY, link)
    here = host()
    cert, key = os.path.join(world.root, "ca.crt"), os.path.join(world.root, "ca.key")
    subprocess.run([world.python, DFLY, "daemon", "gen-ca", "--ca-cert", cert, "--ca-key", key], check=True, stdout=subprocess.DEVNULL)
    with open(path, "w") as file:
        file.write((YML % (base(origin), here.home)).replace("{}", "\n  cert: %s\n  key: %s\n  hosts:\n  - regx: ^registry\n    insecure: true" % (cert, key)))
    daemon = Daemon(world, "dfdaemon", [world.python, link, "--config", path, "--ratelimit=10M"])
    env = daemon.ask("/env").json
    assert (env["registry"], env["expiretime"], env["urlfilter"], env["nodes"]) == (base(origin), 300.0, "a&b", ["127.0.0.1:7"])
    assert env["proxy"] == ["no-swarm direct", "rpm$"] and env["ratelimit"] == 10 * MB
    assert not daemon.stderr and env["open"] == ["^registry insecure"] and env["ca_cert"] == cert
    for text in ("a: {", "bogus: 1", "hijack_https: x", "hijack_https:\n  hosts: x", "hijack_https:\n  hosts: [x]", "registry_mirror: x",
                 "proxies: [a]", "registry_mirror:\n  direct: true", "port: 99999"):
        with open(path, "w") as file:
            file.write(text)
        result = Command(world, "dfdaemon", [world.python, link, "--config", path, "--workHome", here.path("other")]).wait(20)
        assert result.code == (14 if "port" in text else 10) and len(result.stderr.splitlines()) == 1, (text, result.out)


BAD = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"GET x HTTP/1.1\r\n\r\n", b"GET ftp://x/ HTTP/1.1\r\n\r\n", b"GET http:/// HTTP/1.1\r\n\r\n",
       b"GET http://h:99999/ HTTP/1.1\r\n\r\n", b"GET http://[::1/ HTTP/1.1\r\n\r\n", b"PUT /v2/x HTTP/1.1\r\nContent-Length: x\r\n\r\n",
       b"PUT /v2/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"CONNECT / HTTP/1.1\r\n\r\n", b"PUT /v2/x HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", b"CONNECT :1 HTTP/1.1\r\n\r\n",
       b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\n\r\n", b"GET /v2/ HTTP/1.1\r\nX : y\r\n\r\n", b"GET http://127.0.0.1:1/\xff HTTP/1.1\r\n\r\n",
       b"GET /v2/a/blobs/sha256:%s HTTP/1.1\r\nX-A: \x01\r\n\r\n" % (b"0" * 64), b"* * *\r\n\r\n", b"OPTIONS * HTTP/1.1\r\n\r\n"]


def test_bad_input_gets_clear_answers(origin, host, world):
    origin.put("v2/", b"{}")
    here = host()
    daemon = here.daemon(base(origin))
    wait_for(here.uploader_pid, 10)
    fds = descriptors(daemon.pid)
    for data in BAD:
        answer = raw(daemon.address, data)
        assert 400 <= answer.status <= 504 and answer.status != 500, (data[:60], answer)
        assert b"Traceback" not in answer.body
    raw(daemon.address, b"PUT /v2/x HTTP/1.1\r\nContent-Length: 100\r\n\r\nshort", half_close=True)
    assert daemon.ask("/v2/").body == b"{}"
    wait_for(lambda: descriptors(daemon.pid) <= fds + 6, 10, "the descriptors back")
    assert daemon.running() and not re.search("ERRO", open_log(here))


def open_log(here):
    with open(os.path.join(here.home, "logs", "dfdaemon.log")) as log:
        return log.read()


def test_help_and_a_second_daemon(world, origin, host):
    assert "--registry" in world.run("daemon", "--help").stdout
    here = host()
    daemon = here.daemon(base(origin))
    result = world.run("daemon", "--home", host().home, "--port", str(daemon.address[1]), timeout=20)
    assert result.code == 2 and "can't listen" in result.stderr
    assert ask(daemon.address, "GET", "/metrics").status == 200
