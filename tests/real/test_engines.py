"""docker, containerd and podman themselves, with the settings that `dfly.py daemon --install` writes, pull through the swarm."""
import base64
import json
import os
import subprocess
import sys
import threading

import pytest
from real.engines import ENGINES
from real.registries import Image, Registry, Relay, TokenServer
from world import DFLY, MB, dead_port, wait_for

NAME = "library/app:1"


@pytest.fixture
def engines(world):
    """Factory: `engines(name, host, upstream, *flags)` returns an engine whose mirror is a daemon of that host, and the daemon."""
    made = []

    def make(name, host, upstream, *flags):
        port = dead_port()
        daemon = host.daemon(upstream, "--port", str(port), "--mirror", "docker.io=" + upstream, *flags)
        engine = ENGINES[name](world, host)
        made.append(engine)
        subprocess.run([sys.executable, DFLY, "daemon", "--install", name, "--etc", engine.etc, "--port", str(port)],
                       check=True, stdout=subprocess.DEVNULL)
        engine.start()
        return engine, daemon

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def closing():
    """A list of what the test's end closes."""
    things = []
    yield things
    for thing in things:
        thing.close()


@pytest.mark.parametrize("name", ENGINES)
def test_each_layer_leaves_the_registry_once_for_three_hosts(world, supernode, host, blob, engines, name):
    registry, image = Registry(world), Image(world, blob(1000, 1), blob(300000, 2), blob(30 * MB, 3))
    image.push(registry.port, name=NAME)
    supernode()
    for _ in range(3):
        engine, daemon = engines(name, host(), registry.url, "--small", "0")
        assert engine.pull(NAME) == image.id
        assert daemon.metric("blobs_total") == len(image.blobs) and daemon.metric("fallbacks_total") == 0
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}
    assert registry.openings() == {digest: 3 for digest, data in image.blobs.items() if len(data) > 32 << 10}, "each host asks once whether it may have it"
    engine.forget(NAME)
    assert engine.pull(NAME) == image.id, "from its own daemon's disk"
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}
    assert sum(registry.openings().values()) == 6, "which it knows by now"


def test_a_large_image_of_many_layers(world, supernode, host, blob, engines):
    registry, image = Registry(world), Image(world, blob(100 * MB, 1), *[blob(10 ** power, power) for power in range(3, 8)])
    image.push(registry.port, name=NAME)
    supernode()
    engine, daemon = engines("podman", host(), registry.url)
    assert engine.pull(NAME) == image.id
    small = sum(len(data) < 16 << 10 for data in image.blobs.values())
    assert daemon.metric("blobs_total") == len(image.blobs) - small, "what the manifest calls small comes straight"


@pytest.mark.parametrize("name", ENGINES)
def test_without_a_supernode_it_is_still_the_registry_s_image(world, host, blob, engines, name):
    registry, image = Registry(world), Image(world, blob(3 * MB, 1))
    image.push(registry.port, name=NAME)
    engine, _ = engines(name, host(), registry.url)
    assert engine.pull(NAME) == image.id


# ---- who may -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["podman", "containerd"])
def test_a_password_is_the_engine_s_own(world, supernode, host, blob, engines, name):
    registry, image = Registry(world, protected=True), Image(world, blob(3 * MB, 1))
    image.push(registry.port, "--dest-creds", "me:secret", name=NAME)
    supernode()
    for _ in range(2):
        engine, _ = engines(name, host(), registry.url, "--small", "0")
        engine.pull(NAME, code=1)
        engine.pull(NAME, *engine.login("me:other"), code=1)
        assert engine.pull(NAME, *engine.login("me:secret")) == image.id
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}


@pytest.mark.parametrize("name", ["podman", "containerd"])
def test_a_token_is_the_engine_s_own(world, supernode, host, blob, engines, closing, name):
    tokens = TokenServer(world)
    closing.append(tokens)
    registry, image = Registry(world, tokens=tokens), Image(world, blob(3 * MB, 1), blob(MB, 2))
    image.push(registry.port, "--dest-creds", "me:secret", name=NAME)
    supernode()
    hosts = [host(), host()]
    for here in hosts:
        engine, _ = engines(name, here, registry.url, "--small", "0")
        engine.pull(NAME, code=1)
        assert engine.pull(NAME, *engine.login("me:secret")) == image.id
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs} and tokens.asked
    token = tokens.token(["repository:library/app:pull"]).split(".")[0]
    for here in hosts:
        for folder, _, names in os.walk(here.home):
            for path in [os.path.join(folder, name) for name in names if not name.endswith(".sock")]:
                with open(path, "rb") as file:
                    assert token.encode() not in file.read(), path


@pytest.mark.parametrize("name", ["podman", "docker"])
def test_registries_beside_the_first_have_tokens_of_their_own(world, supernode, host, blob, engines, closing, name):
    """podman and docker ask for tokens before they say which registry they mean, and for a repository with the registry's name before it."""
    supernode()
    image, addresses, registries = Image(world, blob(3 * MB, 1)), {}, []
    for number, want in enumerate(("first", "open", "password", "plain")):
        tokens = TokenServer(world, open_to_all=want == "open") if want != "plain" and want != "password" else None
        closing.extend([tokens] if tokens else [])
        registries.append(Registry(world, tokens=tokens, protected=want == "password"))
        image.push(registries[-1].port, *(("--dest-creds", "me:secret") if want != "plain" else ()), name="team/app:1")
        addresses[want] = registries[-1].url
    engine, daemon = engines(name, host(), addresses["first"], "--small", "0", "--mirror", "open.example=" + addresses["open"],
                             "--mirror", "password.example=" + addresses["password"], "--mirror", "plain.example=" + addresses["plain"])
    for want in ("open", "plain"):
        assert engine.pull_by_name(daemon, want + ".example/team/app:1") == image.id
        engine.forget_by_name(daemon, want + ".example/team/app:1")
    engine.pull_by_name(daemon, "password.example/team/app:1", code=1)
    engine.pull_by_name(daemon, "team/app:1", code=1)
    for want in ("password.example/", ""):
        assert engine.pull_by_name(daemon, want + "team/app:1", user="me:secret") == image.id
        engine.forget_by_name(daemon, want + "team/app:1")
    assert sum(sum(registry.blobs_sent("200").values()) for registry in registries) == len(image.blobs), "one of them has sent them"
    for folder, _, names in os.walk(os.path.join(engine.folder, os.pardir, "home")):
        for path in [os.path.join(folder, name) for name in names if not name.endswith(".sock")]:
            with open(path, "rb") as file:
                assert base64.b64encode(b"me:secret") not in file.read(), path


# ---- what breaks midway ---------------------------------------------------------------------------------------------------

class Pull(threading.Thread):
    """A pull under way."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.id = engine, "it did not end"
        self.start()

    def run(self):
        self.id = self.engine.pull(NAME)


def under_way(daemon, count):
    """Wait until a daemon has `count` bytes of some blob."""
    wait_for(lambda: any(blob["bytes"] > count for blob in daemon.status()["running"]), 30, json.dumps(daemon.status()))


@pytest.fixture
def slow(world, blob, closing):
    """(registry, image, relay): an image of 24 MB, which the registry's only way sends at 12 MB/s."""
    registry, image = Registry(world), Image(world, blob(24 * MB, 1))
    image.push(registry.port, name=NAME)
    relay = Relay(registry.port, 12 * MB)
    closing.append(relay)
    return registry, image, relay


@pytest.mark.parametrize("name", ENGINES)
def test_a_supernode_that_dies_midway(slow, supernode, host, engines, name):
    _, image, relay = slow
    node = supernode()
    engine, daemon = engines(name, host(), relay.url)
    pull = Pull(engine)
    under_way(daemon, 5 * MB)
    node.kill()
    pull.join()
    assert pull.id == image.id


@pytest.mark.parametrize("name", ENGINES)
def test_a_registry_whose_connections_break_midway(slow, supernode, host, engines, name):
    _, image, relay = slow
    supernode()
    engine, daemon = engines(name, host(), relay.url)
    pull = Pull(engine)
    under_way(daemon, 5 * MB)
    relay.reset()
    pull.join()
    assert pull.id == image.id


@pytest.mark.parametrize("name", ENGINES)
def test_a_disk_that_fills_midway(slow, supernode, host, engines, small_disk, name):
    """All that the daemon has is on it: its logs and its sockets, too."""
    _, image, relay = slow
    supernode()
    here = host()
    disk = small_disk(here, 40 * MB)
    engine, daemon = engines(name, here, relay.url, "--home", os.path.join(disk, "home"))
    pull = Pull(engine)
    under_way(daemon, 5 * MB)
    with open(os.path.join(disk, "other"), "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(MB))
    pull.join()
    assert pull.id == image.id and daemon.metric("fallbacks_total") >= 1
    engine.forget(NAME)
    assert engine.pull(NAME) == image.id, "with no room from the beginning"
    assert daemon.stop() == 0, "and its uploader with it"


def test_a_peer_that_dies_midway(slow, supernode, host, engines):
    registry, image, relay = slow
    supernode()
    first, second = host(), host()
    one, _ = engines("podman", first, relay.url, "--small", "0")
    assert one.pull(NAME) == image.id
    two, daemon = engines("podman", second, relay.url, "--small", "0", "--ratelimit", "10M")
    pull = Pull(two)
    under_way(daemon, 5 * MB)
    first.kill_uploader()
    pull.join()
    assert pull.id == image.id
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}


def test_a_daemon_that_is_not_there_keeps_nobody_from_pulling(slow, supernode, host, engines):
    """The engine goes to the registry itself: here, to one of that name that can't be reached."""
    engine, daemon = engines("podman", host(), slow[2].url)
    daemon.stop()
    engine.pull(NAME, code=1)
