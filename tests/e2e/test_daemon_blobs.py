"""A daemon's blobs beyond the plain case: of several registries, small, kept over a restart, finished straight from the registry; and its status."""
import gzip
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from e2e.test_daemon import base, layer, whole
from world import DFLY, MB, sha256, wait_for

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def name_of(origin):
    return base(origin).partition("//")[2]


# ---- one task for one blob --------------------------------------------------------------------------------------------

def test_a_blob_of_two_registries_is_one_task(world, supernode, host, blob):
    node, data = supernode(), blob(3 * MB)
    one, two = world.origin(), world.origin()
    first, second = layer(one, data, "a"), layer(two, data, "b/c")
    whole(host().daemon(base(one)).ask(first), data)
    whole(host().daemon(base(two)).ask(second), data)
    assert one.gets(first[1:]) == 1
    assert two.bytes_sent(second[1:]) <= 2 << 14, "it had to show that it has the blob, to the host and to the supernode"
    assert node.bytes_sent() < 4 * MB


def test_a_registry_that_only_says_so_opens_nothing(world, supernode, host, blob):
    supernode()
    data, other = blob(3 * MB, 1), blob(3 * MB, 2)
    honest, liar = world.origin(), world.origin()
    path = layer(honest, data, auth="Basic x")
    liar.put(path[1:], other)
    whole(host().daemon(base(honest)).ask(path, headers={"Authorization": "Basic x"}), data)
    body = host().daemon(base(liar)).ask(path).body
    assert body == other[:len(body)], "what it has itself, and nothing of the other's"


def test_nor_does_it_on_the_host_that_has_the_blob(world, supernode, host, blob):
    supernode()
    data, other = blob(2 * MB, 1), blob(2 * MB, 2)
    honest, liar, friend = world.origin(), world.origin(), world.origin()
    path = layer(honest, data)
    liar.put(path[1:], other)
    layer(friend, data)
    daemon = host().daemon(base(honest), "--mirror", "bad=" + base(liar), "--mirror", "good.example=" + base(friend))
    whole(daemon.ask(path), data)
    body = daemon.ask(path + "?ns=bad").body
    assert body == other[:len(body)]
    whole(daemon.ask(path + "?ns=good.example"), data)
    assert friend.bytes_sent(path[1:]) <= 1 << 14 and honest.gets(path[1:]) == 1


def test_a_registry_that_fails_does_not_keep_another_from_bringing_the_blob(world, supernode, host, blob):
    supernode()
    data = blob(2 * MB)
    broken, good = world.origin(), world.origin()
    path = layer(good, data)
    broken.put(path[1:], data, status=500)
    assert host().daemon(base(broken)).ask(path).status == 500
    whole(host().daemon(base(good)).ask(path), data)
    assert good.gets(path[1:]) == 1


def test_a_task_of_a_digest_takes_blobs_of_that_digest_only(origin, supernode, blob):
    node = supernode()
    url = origin.put("f.bin", blob(1000))
    answer = node.ask("POST", "/peer/registry", {"superNodeIp": node.ip, "rawUrl": url, "taskUrl": "sha256:" + "a" * 64, "cid": "c", "ip": "127.0.0.1",
                                                 "port": 1, "path": "/p"})
    assert answer.json["code"] == 605 or answer.status == 400, answer
    assert not origin.log


# ---- registries -------------------------------------------------------------------------------------------------------

def test_ns_chooses_the_registry(world, host):
    one, two = world.origin(), world.origin()
    one.put("v2/app/manifests/1", b"one")
    two.put("v2/app/manifests/1", b"two")
    daemon = host().daemon(base(one), "--mirror", "docker.io=" + base(two))
    assert daemon.ask("/v2/app/manifests/1").body == b"one"
    assert daemon.ask("/v2/app/manifests/1?ns=docker.io").body == b"two"
    assert daemon.ask("/v2/app/manifests/1?x=1&ns=" + name_of(one)).body == b"one"
    assert one.log[-1].path.endswith("?x=1")
    assert daemon.ask("/v2/app/manifests/1?ns=not%20a%20host").status == 400


def test_what_leads_back_to_a_named_registry_keeps_its_name(world, host):
    one, two = world.origin(), world.origin()
    two.put("v2/app/blobs/uploads/", redirect_to=two.base + "v2/app/blobs/uploads/1")
    daemon = host().daemon(base(one), "--mirror", "reg=" + base(two))
    answer = daemon.ask("/v2/app/blobs/uploads/?ns=reg", "POST", body=b"x")
    if 300 <= answer.status < 400:
        assert answer.headers["location"] == "/v2/app/blobs/uploads/1?ns=reg"


# ---- small ones, tokens -------------------------------------------------------------------------------------------------

def test_a_blob_that_its_manifest_calls_small_comes_straight(origin, supernode, host, blob):
    node, small, large = supernode(), blob(900, 1), blob(MB, 2)
    paths = layer(origin, small), layer(origin, large)
    parts = [{"digest": "sha256:" + sha256(data), "size": len(data)} for data in (small, large)]
    manifest = json.dumps({"schemaVersion": 2, "config": parts[0], "layers": parts[1:]}).encode()
    origin.put("v2/app/manifests/1", manifest, headers=(("Content-Type", MANIFEST),))
    daemon = host().daemon(base(origin))
    assert daemon.ask("/v2/app/manifests/1").body == manifest
    whole(daemon.ask(paths[0]), small)
    assert daemon.metric("blobs_total") == 0 and node.bytes_sent() == 0
    whole(daemon.ask(paths[1]), large)
    assert daemon.metric("blobs_total") == 1


@pytest.mark.parametrize("how", [{}, {"length": False}, {"gzip": True}], ids=["plain", "chunked", "gzip"])
def test_an_engine_that_acts_on_a_manifest_s_last_byte_is_not_too_fast(origin, supernode, host, how):
    """podman asks for the config, which is small, on another connection as soon as it has the manifest."""
    supernode()
    daemon = host().daemon(base(origin))
    for number in range(25):
        config = b"config %d" % number
        path, part = layer(origin, config), {"digest": "sha256:" + sha256(config), "size": len(config)}
        manifest = json.dumps({"schemaVersion": 2, "config": part, "layers": []}).encode()
        origin.put("v2/app/manifests/1", manifest, headers=(("Content-Type", MANIFEST),), **how)
        asking = http.client.HTTPConnection(*daemon.address, timeout=20)
        asking.request("GET", "/v2/app/manifests/1", headers={"Accept-Encoding": "gzip"})
        body = asking.getresponse().read()
        whole(daemon.ask(path), config)
        asking.close()
        assert (gzip.decompress(body) if "gzip" in how else body) == manifest
    assert daemon.metric("blobs_total") == 0


def test_manifests_that_are_none_do_no_harm(origin, host):
    daemon = host().daemon(base(origin))
    for text in (b"", b"[]", b"{", b"\xff", b'{"config": 1, "layers": []}', b'{"config": {"digest": "sha256:a", "size": "x"}, "layers": []}',
                 b'{"config": {"digest": "sha256:a", "size": 1e999}, "layers": []}', b"[" * 100000):
        origin.put("v2/app/manifests/1", text, headers=(("Content-Type", MANIFEST),))
        assert daemon.ask("/v2/app/manifests/1").body == text
    origin.put("v2/app/manifests/1", b"no gzip", headers=(("Content-Type", MANIFEST), ("Content-Encoding", "gzip")))
    assert daemon.ask("/v2/app/manifests/1").body == b"no gzip"


def test_the_same_token_is_asked_for_once_by_many(origin, host):
    origin.put("token", b'{"token": "t"}', stall_after=5)
    daemon, answers = host().daemon(base(origin)), []

    def ask(user):
        answers.append(daemon.ask(origin.base + "token?service=r&scope=pull", headers={"Authorization": user}))

    asking = [threading.Thread(target=ask, args=("Basic one",)) for _ in range(4)]
    for thread in asking:
        thread.start()
    wait_for(lambda: daemon.metric("relayed_total") == 4)
    another = threading.Thread(target=ask, args=("Basic two",))
    another.start()
    wait_for(lambda: len([line for line in origin.log if "token" in line.path]) == 2)
    origin.release("token")
    for thread in asking + [another]:
        thread.join()
    assert [answer.body for answer in answers] == [b'{"token": "t"}'] * 5
    assert sorted(record.headers["authorization"] for record in origin.requests("token")) == ["Basic one", "Basic two"]
    assert daemon.ask(origin.base + "token?service=r&scope=pull", headers={"Authorization": "Basic one"}).status == 200
    assert origin.gets("token") == 3, "an answer is not kept"


# ---- when the swarm fails in the middle -----------------------------------------------------------------------------------

@pytest.mark.parametrize("then", [{}, {"cut_after": 700000}], ids=["well", "cut"])
def test_the_rest_of_a_blob_comes_from_its_registry(origin, supernode, host, blob, then):
    """However often that hangs up."""
    node, data = supernode(), blob(8 * MB)
    path = layer(origin, data, stall_after=5 * MB, once=True)
    daemon, answers = host().daemon(base(origin), "--notbs"), []
    asking = threading.Thread(target=lambda: answers.append(daemon.ask(path, timeout=60)))
    asking.start()
    wait_for(lambda: node.bytes_sent() > 3 * MB)
    wait_for(lambda: daemon.metric("blob_bytes_total") > MB)
    origin.change(path[1:], **then)
    node.kill()
    asking.join()
    whole(answers[0], data)
    assert any(record.headers.get("range", "").startswith("bytes=") for record in origin.requests(path[1:]))
    assert daemon.metric("fallbacks_total") >= 1


# ---- restarts -----------------------------------------------------------------------------------------------------------

def test_blobs_outlive_their_daemon(origin, supernode, host, blob):
    supernode()
    data, here = blob(3 * MB), host()
    path = layer(origin, data)
    daemon = here.daemon(base(origin))
    whole(daemon.ask(path), data)
    assert daemon.stop() == 0
    daemon = here.daemon(base(origin))
    whole(daemon.ask(path), data)
    assert origin.gets(path[1:]) == 1
    assert len(origin.requests(path[1:], "HEAD")) == 1 and origin.openings(path[1:]) == 1, "but not without the registry's consent"
    daemon.stop()
    kept = os.path.join(here.home, "dfdaemon", "data", "sha256-" + sha256(data))
    with open(kept, "r+b") as file:
        file.seek(100)
        file.write(b"damaged")
    daemon = here.daemon(base(origin))
    assert len(daemon.ask(path).body) < len(data)
    whole(daemon.ask(path), data)


def test_a_daemon_goes_on_with_half_a_blob(origin, supernode, host, blob):
    node, data, here = supernode(), blob(8 * MB), host()
    path = layer(origin, data, stall_after=5 * MB, once=True)
    daemon = here.daemon(base(origin))
    asking = threading.Thread(target=lambda: daemon.ask(path))
    asking.start()
    wait_for(lambda: node.bytes_sent() > 3 * MB)
    wait_for(lambda: daemon.metric("blob_bytes_total") > MB)
    daemon.kill()
    asking.join()
    origin.release(path[1:])
    before = node.bytes_sent()
    daemon = here.daemon(base(origin))
    whole(daemon.ask(path, timeout=60), data)
    assert node.bytes_sent() - before < 7 * MB and wait_for(lambda: daemon.status()["recent"])[0]["kept"] > 0


# ---- what it says -------------------------------------------------------------------------------------------------------

def test_a_daemon_says_what_it_has_done(origin, supernode, host, blob):
    supernode()
    data, here = blob(2 * MB), host()
    path = layer(origin, data, auth="Bearer secret-token")
    daemon = here.daemon(base(origin))
    whole(daemon.ask(path, headers={"Authorization": "Bearer secret-token"}), data)
    found = wait_for(lambda: daemon.status()["recent"] and daemon.status())
    assert found["recent"][0]["blob"] == "sha256:" + sha256(data) and found["recent"][0]["bytes"] == 2 * MB
    assert found["sources"] == {"supernode": 2 * MB} and found["counts"]["blobs"] == 1 and not found["running"] and found["kept"] == 1
    command = [sys.executable, DFLY, "status", "127.0.0.1:%d" % daemon.address[1]]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    assert "1 blobs, 2.0 MB served" in shown and "sha256:" + sha256(data) in shown and "supernode 100 %" in shown
    assert json.loads(subprocess.run(command + ["--json"], stdout=subprocess.PIPE, check=True).stdout.decode())["sources"] == found["sources"]
    for folder, _, names in os.walk(here.home):
        for name in [name for name in names if not name.endswith(".sock")]:
            with open(os.path.join(folder, name), "rb") as file:
                assert b"secret-token" not in file.read(), name
    with open(os.path.join(here.home, "logs", "dfdaemon.log")) as log:
        assert "blob sha256:%s 2.0 MB in " % sha256(data) in log.read()


def test_status_says_in_one_line_when_there_is_no_daemon(origin):
    for address, status in (("127.0.0.1:1", 1), (name_of(origin), 1), ("nonsense:port", 2)):
        done = subprocess.run([sys.executable, DFLY, "status", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode and not done.stdout and len(done.stderr.decode().splitlines()) == 1, done


@pytest.mark.parametrize("flags", [(), ("--notbs",)])
def test_a_swarm_that_is_too_slow_is_left(origin, supernode, host, blob, flags):
    node, data = supernode("--max-bandwidth", "300K"), blob(6 * MB)
    path = layer(origin, data)
    daemon = host().daemon(base(origin), "--minrate", "1M", "--patience", "2s", *flags)
    whole(daemon.ask(path, timeout=30), data)
    assert node.bytes_sent() < 3 * MB


# ---- the first bytes, straight from the registry ------------------------------------------------------------------------------

def first_bytes(daemon, path, count):
    """Ask for a blob, return the connection once so many bytes of it have come, and those."""
    s = socket.create_connection(daemon.address, 20)
    s.sendall(("GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path).encode())
    got = b""
    while len(got.partition(b"\r\n\r\n")[2]) < count:
        got += s.recv(65536)
    return s, got.partition(b"\r\n\r\n")[2]


def test_the_first_bytes_wait_for_no_supernode(world, origin, host, blob):
    """One that takes connections and says nothing."""
    data = blob(6 * MB)
    path = layer(origin, data)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        daemon = host().daemon(base(origin), node="127.0.0.1:%d" % silent.getsockname()[1])
        began = time.monotonic()
        s, got = first_bytes(daemon, path, 16384)
        assert time.monotonic() - began < 2.0
    with s:
        for rest in iter(lambda: s.recv(65536), b""):
            got += rest
    assert got == data


def test_a_registry_without_ranges_is_asked_for_first_bytes_once(origin, supernode, host, blob):
    """It sends all that it has, and is hung up on; then it is asked whether, as before."""
    supernode()
    daemon = host().daemon(base(origin))
    for number in (1, 2):
        data = blob(3 * MB, number)
        path = layer(origin, data, ranges=False)
        whole(daemon.ask(path), data)
        assert len([r for r in origin.requests(path[1:]) if r.opening]) == 2 - number
        assert len([r for r in origin.requests(path[1:]) if not r.opening]) == 1


def test_first_bytes_that_are_cut_off_are_no_end(origin, supernode, host, blob):
    supernode()
    data = blob(3 * MB)
    path = layer(origin, data, cut_after=9000)
    daemon = host().daemon(base(origin))
    s, got = first_bytes(daemon, path, 9000)
    layer(origin, data)
    with s:
        for rest in iter(lambda: s.recv(65536), b""):
            got += rest
    assert got == data


def test_after_the_first_bytes_all_may_come_straight(origin, host, blob, world):
    """No supernode, and no folder to download into: the first bytes are on their way before anybody knows."""
    data, here = blob(3 * MB), host()
    path = layer(origin, data)
    daemon = here.daemon(base(origin))
    repo = os.path.join(here.home, "dfdaemon", "data")
    os.rename(repo, repo + ".gone")
    with open(repo, "w"):
        pass
    whole(daemon.ask(path), data)
    assert daemon.metric("fallbacks_total") == 1 and [r.range for r in origin.requests(path[1:])] == ["bytes=0-16383", "bytes=16384-"]
    os.unlink(repo)
    os.rename(repo + ".gone", repo)
