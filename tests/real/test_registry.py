"""A real registry in front, a real engine's client behind: images pushed and pulled through daemons on several hosts."""
import os
import subprocess
import sys

from real.registries import Image, Registry
from station import make_certificate
from world import DFLY, MB


def test_each_blob_leaves_the_registry_once_for_three_hosts(world, supernode, host, blob):
    registry, image = Registry(world), Image(world, blob(24 * MB, 1), blob(3 * MB, 2), blob(700, 3))
    image.push(registry.port)
    node = supernode()
    hosts = [host() for _ in range(3)]
    daemons = [here.daemon(registry.url, "--small", "0") for here in hosts]
    for number, daemon in enumerate(daemons):
        image.pull(daemon.address[1], "out%d" % number)
        assert daemon.metric("blobs_total") == len(image.blobs) and daemon.metric("fallbacks_total") == 0
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}
    assert node.bytes_sent() < 2 * 27 * MB  # the hosts gave one another the rest
    image.pull(daemons[0].address[1], "again")
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}


def test_an_image_is_pushed_through_a_daemon(world, host, blob):
    registry, image = Registry(world), Image(world, blob(6 * MB, 1), blob(500, 2))
    daemon = host().daemon(registry.url)
    image.push(daemon.address[1])
    image.pull(registry.port, "straight")
    image.pull(daemon.address[1], "out")  # without a supernode


def test_a_registry_that_wants_a_password_gets_it_from_every_host(world, supernode, host, blob):
    registry, image, me = Registry(world, protected=True), Image(world, blob(5 * MB, 1)), "me:secret"
    image.push(registry.port, "--dest-creds", me)
    supernode()
    ports = [host().daemon(registry.url, "--small", "0").address[1] for _ in range(2)]
    for number, port in enumerate(ports):
        assert "unauthorized" in image.pull(port, "no%d" % number, code=1).out
        image.pull(port, "out%d" % number, "--src-creds", me)
        assert "unauthorized" in image.pull(port, "wrong%d" % number, "--src-creds", "me:other", code=1).out
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}


def test_https_pulls_go_through_a_tunnel_that_the_daemon_opens(world, supernode, host, blob):
    """As a dockerd with HTTPS_PROXY set: skopeo, which trusts the daemon's CA and not the registry's certificate."""
    certificate = make_certificate(world.root)
    registry, image = Registry(world, tls=certificate), Image(world, blob(12 * MB, 1), blob(MB, 2))
    image.push(registry.port)
    supernode()
    for number in range(2):
        here = host()
        subprocess.run([sys.executable, DFLY, "daemon", "gen-ca", "--home", here.home], check=True, stdout=subprocess.DEVNULL)
        daemon = here.daemon("http://127.0.0.1:1", "--open", r"^(registry\.test|127\.0\.0\.1): cacerts=" + certificate[0], "--small", "0",
                             "--proxy", r"^https://registry\.test/.*/blobs/ redirect=127.0.0.1:%d" % registry.port,
                             "--proxy", r"^https://registry\.test/ direct redirect=127.0.0.1:%d" % registry.port)  # Go has no proxy for loopback
        folder = os.path.join(world.root, "out%d" % number)
        image.copy("docker://registry.test/team/app:1", "dir:" + folder, env={
            "HTTPS_PROXY": "http://127.0.0.1:%d" % daemon.address[1], "NO_PROXY": "", "SSL_CERT_FILE": os.path.join(here.home, "dfdaemon", "ca.crt")})
        image.verify(folder)
        assert daemon.metric("blobs_total") == len(image.blobs) and daemon.metric("tunnels_total") == 0
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}
