"""A real registry in front, a real engine's client behind: images pushed and pulled through daemons on several hosts."""
import gzip
import hashlib
import json
import os
import re
import shutil
import socket

import pytest
from world import MB, Command, dead_port, sha256, wait_for

PASSWORD = "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"  # "secret", by bcrypt

CONFIG = """
version: 0.1
log: {level: warn, accesslog: {disabled: false}}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: "127.0.0.1:%d"}
"""
AUTH = "auth: {htpasswd: {realm: here, path: %s}}\n"


def program(name):
    """Return a program's path; where it could be installed and is not, fail."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path:
        return path
    return pytest.skip("%s is not here (apt-get install %s; .ci/run does it)" % (name, name))


class Registry(Command):
    """Debian's docker-registry."""

    def __init__(self, world, protected=False):
        self.port = dead_port()
        folder = os.path.join(world.root, "registry")
        os.makedirs(folder)
        with open(os.path.join(folder, "passwords"), "w") as file:
            file.write(PASSWORD + "\n")
        with open(os.path.join(folder, "config.yml"), "w") as file:
            file.write(CONFIG % (os.path.join(folder, "data"), self.port) + (AUTH % os.path.join(folder, "passwords") if protected else ""))
        super().__init__(world, "registry", [program("docker-registry"), "serve", os.path.join(folder, "config.yml")])
        self.url = "http://127.0.0.1:%d" % self.port
        wait_for(self._listens, 20, "the registry on port %d\n%s" % (self.port, self.output()))

    def _listens(self):
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def blobs_sent(self):
        """Return {digest: how many times it was sent} from the access log."""
        sent = {}
        for digest in re.findall(r'"GET /v2/\S+/blobs/sha256:([0-9a-f]{64}) HTTP/1.1" 20[06]', self.stdout):
            sent[digest] = sent.get(digest, 0) + 1
        return sent


class Image:
    """An image of layers of random bytes, as a folder of skopeo's."""

    def __init__(self, world, *layers):
        self.world = world
        self.folder = os.path.join(world.root, "image")
        os.makedirs(self.folder)
        self.blobs = {}
        described = [self._blob(gzip.compress(data, 1), "application/vnd.docker.image.rootfs.diff.tar.gzip") for data in layers]
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {},
                             "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in described]}}).encode()
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                    "config": self._blob(config, "application/vnd.docker.container.image.v1+json"), "layers": described}
        for name, data in (("version", b"Directory Transport Version: 1.1\n"), ("manifest.json", json.dumps(manifest).encode())):
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(data)

    def _blob(self, data, kind):
        self.blobs[sha256(data)] = data
        with open(os.path.join(self.folder, sha256(data)), "wb") as file:
            file.write(data)
        return {"mediaType": kind, "size": len(data), "digest": "sha256:" + sha256(data)}

    def copy(self, *arguments, code=0):
        """Run skopeo copy; return its outcome."""
        result = Command(self.world, "skopeo", [program("skopeo"), "--insecure-policy", "copy"] + list(arguments)).wait(60)
        assert (result.code == 0) == (code == 0), result.out
        return result

    def push(self, port, *flags):
        self.copy("--dest-tls-verify=false", *flags, "dir:" + self.folder, "docker://127.0.0.1:%d/team/app:1" % port)

    def pull(self, port, out, *flags, code=0):
        """Pull through whatever listens there; every blob must be what it was."""
        folder = os.path.join(self.world.root, out)
        result = self.copy("--src-tls-verify=false", *flags, "docker://127.0.0.1:%d/team/app:1" % port, "dir:" + folder, code=code)
        for digest in self.blobs if not code else ():
            with open(os.path.join(folder, digest), "rb") as file:
                assert hashlib.sha256(file.read()).hexdigest() == digest
        return result


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
