"""HTTPS through the daemon: tunnels, and tunnels that it opens with a CA of the operator's."""
import http.client
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading

import pytest
from e2e.test_daemon import layer
from world import DFLY, MB, dead_port, descriptors, sha256, threads, wait_for


def gen_ca(*flags, code=0):
    done = subprocess.run([sys.executable, DFLY, "daemon", "gen-ca"] + list(flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == code, done
    return (done.stdout + done.stderr).decode()


class Through:
    """A client that reaches an origin by a CONNECT through a daemon, and trusts what `ca` has signed."""

    def __init__(self, daemon, origin, ca):
        context = ssl.create_default_context(cafile=ca)
        self.connection = http.client.HTTPSConnection("127.0.0.1", daemon.address[1], context=context, timeout=30)
        self.connection.set_tunnel("127.0.0.1", origin.port)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.connection.close()

    def ask(self, path, method="GET", body=None, headers=None):
        self.connection.request(method, path, body, headers or {})
        answer = self.connection.getresponse()
        return answer.status, answer.read(), answer


@pytest.fixture
def opened(origin_tls, host):
    """Factory: a host's daemon that opens the tunnels to the TLS origin, and its CA."""
    def make(here=None, *flags, open="^127"):
        here = here or host()
        ca = os.path.join(here.home, "dfdaemon", "ca.crt")
        if not os.path.exists(ca):
            gen_ca("--home", here.home)
        return here.daemon("http://127.0.0.1:%d" % dead_port(), "--open", "%s cacerts=%s" % (open, origin_tls.certificate), *flags), ca
    return make


def test_a_ca_is_made_and_kept(world, host):
    here = host()
    said = gen_ca("--home", here.home)
    cert, key = (os.path.join(here.home, "dfdaemon", name) for name in ("ca.crt", "ca.key"))
    assert cert in said and "update-ca-certificates" in said
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    before = open(cert).read()
    assert len(gen_ca("--home", here.home, code=2).splitlines()) == 1 and open(cert).read() == before
    gen_ca("--home", here.home, "--force")
    assert open(cert).read() != before
    shown = subprocess.run(["openssl", "x509", "-in", cert, "-noout", "-text"], stdout=subprocess.PIPE, check=True).stdout.decode()
    assert "CA:TRUE, pathlen:0" in shown and "Certificate Sign" in shown
    bare = subprocess.run([sys.executable, DFLY, "daemon", "gen-ca", "--home", os.path.join(world.root, "other")], env={"PATH": "/nowhere"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert bare.returncode == 2 and b"openssl" in bare.stderr and len(bare.stderr.splitlines()) == 1


def test_blobs_inside_a_tunnel_come_by_the_swarm(origin_tls, supernode, host, blob, opened):
    supernode()
    data = blob(3 * MB)
    path = layer(origin_tls, data)
    origin_tls.put("v2/app/manifests/1", b"{}", headers=(("Content-Type", "x/y"),))
    for _ in range(2):
        daemon, ca = opened()
        with Through(daemon, origin_tls, ca) as client:
            assert client.ask("/v2/app/manifests/1")[:2] == (200, b"{}")
            status, body, answer = client.ask(path)
            assert status == 200 and body == data and answer.getheader("docker-content-digest") == "sha256:" + sha256(data)
            assert client.ask(path, "HEAD")[2].getheader("content-length") == str(len(data))
            status, body, _ = client.ask(path, headers={"Range": "bytes=%d-" % MB})
            assert status == 206 and body == data[MB:]
            assert client.ask("/metrics")[0] == 404, "the site's, not ours"
        assert daemon.metric("opened_total") == 1 and daemon.metric("blobs_total") == 2 and daemon.metric("tunnels_total") == 0
    assert origin_tls.gets(path[1:]) == 1


def test_bodies_pass_both_ways(origin_tls, host, blob, opened):
    daemon, ca = opened()
    data = blob(5 * MB)
    origin_tls.put("v2/up", data, length=False)
    with Through(daemon, origin_tls, ca) as client:
        assert client.ask("/v2/up")[:2] == (200, data)
        assert client.ask("/v2/up", "PUT", b"a little")[0] == 501, "what the origin says"


def test_other_tunnels_stay_closed(origin_tls, host, opened):
    daemon, ca = opened(open="^registry\\.example")
    origin_tls.put("f", b"x")
    with Through(daemon, origin_tls, origin_tls.certificate) as client:
        assert client.ask("/f")[:2] == (200, b"x")
    with Through(daemon, origin_tls, ca) as client, pytest.raises(ssl.SSLError):
        client.ask("/f")
    assert daemon.metric("tunnels_total") == 2 and daemon.metric("opened_total") == 0


def test_many_at_once_make_one_certificate(origin_tls, host, opened):
    here = host()
    daemon, ca = opened(here)
    origin_tls.put("f", b"x")
    found = []

    def ask():
        with Through(daemon, origin_tls, ca) as client:
            found.append(client.ask("/f")[:2])

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert found == [(200, b"x")] * 8
    certs = os.path.join(here.home, "dfdaemon", "certs")
    assert sorted(name.rpartition(".")[2] for name in os.listdir(certs)) == ["key", "pem"]
    assert stat.S_IMODE(os.stat(os.path.join(certs, "leaf.key")).st_mode) == 0o600
    before = {name: os.stat(os.path.join(certs, name)).st_mtime_ns for name in os.listdir(certs)}
    daemon.stop()
    daemon, _ = opened(here)
    ask()
    assert {name: os.stat(os.path.join(certs, name)).st_mtime_ns for name in os.listdir(certs)} == before, "they are kept"


def test_clients_that_trust_nobody_or_speak_no_tls_cost_nothing(origin_tls, host, opened):
    daemon, ca = opened()
    origin_tls.put("f", b"x")
    with Through(daemon, origin_tls, ca) as client:
        assert client.ask("/f")[0] == 200
    wait_for(lambda: threads(daemon.pid) < 12)
    before = descriptors(daemon.pid)
    for say in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x00" * 100):
        with socket.create_connection(daemon.address, 20) as s:
            s.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % origin_tls.port)
            assert s.recv(1000).startswith(b"HTTP/1.1 200")
            try:
                s.sendall(say)
                s.shutdown(socket.SHUT_WR)
                while s.recv(1000):
                    pass
            except OSError:  # it has hung up
                pass
    with Through(daemon, origin_tls, origin_tls.certificate) as client, pytest.raises(ssl.SSLError):
        client.ask("/f")
    wait_for(lambda: descriptors(daemon.pid) <= before)
    with Through(daemon, origin_tls, ca) as client:
        assert client.ask("/f")[0] == 200


def test_a_daemon_ends_with_a_tunnel_open(origin_tls, host, opened):
    daemon, ca = opened()
    origin_tls.put("f", b"x" * MB, stall_after=1000)
    client = Through(daemon, origin_tls, ca)
    client.connection.request("GET", "/f")
    assert client.connection.getresponse().read(10)
    assert daemon.stop(5) == 0
    client.connection.close()


def test_what_can_t_work_is_one_line(world, host):
    here = host()
    gen_ca("--home", here.home)
    cert, key = (os.path.join(here.home, "dfdaemon", name) for name in ("ca.crt", "ca.key"))
    other = os.path.join(world.root, "other")
    gen_ca("--home", other)
    for flags in (("--open", "["), ("--open", "x nonsense"), ("--open", "x", "--ca-cert", cert + ".none"),
                  ("--open", "x", "--ca-cert", cert, "--ca-key", os.path.join(other, "dfdaemon", "ca.key")),
                  ("--open", "x", "--ca-cert", key, "--ca-key", key), ("--open", "x", "--home", os.path.join(world.root, "none"))):
        done = subprocess.run([sys.executable, DFLY, "daemon", "--port", "0", "--home", here.home] + list(flags), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=20)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout, done
