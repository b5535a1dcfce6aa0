"""Fixtures: an origin, supernodes and hosts as real processes.  See world.py and station.py for what they can do."""
import os
import subprocess
import sys

import pytest

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import world as worlds  # noqa: E402


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    here = item.funcargs.get("world") if hasattr(item, "funcargs") else None
    if here is not None and report.failed and report.when == "call":
        report.sections.append(("processes", here.report()))


@pytest.fixture
def world():
    """The folder, the processes and the clean-up of one test."""
    here = worlds.World()
    complaints = None
    try:
        yield here
    finally:
        complaints = here.close()
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def origin(world):
    """An HTTP origin; `origin.put(name, data, **how)` returns the URL."""
    return world.origin()


@pytest.fixture
def origin_tls(world):
    """An HTTPS origin with a self-signed certificate; `origin_tls.certificate` is its path."""
    station = world.origin(tls=True)
    station.certificate = os.path.join(world.root, "station.pem")
    return station


@pytest.fixture
def supernode(world):
    """Factory: `supernode(*flags, home=None)` starts one and waits until it listens."""
    return world.supernode


@pytest.fixture
def host(world):
    """Factory: `host(name=None)` makes a machine with a home of its own."""
    return world.host


@pytest.fixture
def blob():
    """`blob(size, seed)`: the same random-looking bytes every time."""
    return worlds.blob


@pytest.fixture
def small_disk(world):
    """`small_disk(host, size)` puts a tmpfs of `size` bytes under the host's folder `disk`."""
    mounted = []

    def mount(host, size):
        if os.geteuid():
            pytest.skip("only root can mount a small disk")
        path = host.path("disk")
        os.mkdir(path)
        if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=%d" % size, "tmpfs", path], stderr=subprocess.DEVNULL):
            pytest.skip("this machine lets nobody mount")
        mounted.append(path)
        return path
    yield mount
    for command in world.commands:
        command.kill()
    for path in mounted:
        subprocess.check_call(["umount", "-l", path])
