"""Fixtures of the wire tests: old clients and old supernodes beside the real processes of tests/conftest.py."""
import os
import sys
import threading

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import hand as hands  # noqa: E402
import old_dfget  # noqa: E402
import old_supernode  # noqa: E402
import world as worlds  # noqa: E402


class Running:
    """An emulated download in a thread of its own."""

    def __init__(self, client):
        self.client, self._result, self._error = client, None, None
        self._thread = threading.Thread(target=self._run, name="old-dfget")
        self._thread.start()

    def _run(self):
        try:
            self._result = self.client.run()
        except BaseException as error:
            self._error = error

    def result(self):
        """Return the Result, or raise what the client raised."""
        self._thread.join(90)
        assert not self._thread.is_alive()
        if self._error:
            raise self._error
        return self._result


class Old:
    """Makes old clients, each on an address and with an uploader of its own, and ends them with the test."""

    def __init__(self, root):
        self.root, self._count, self.uploaders, self.supernodes, self._running = root, 0, [], [], []

    def client(self, kind, nodes, url, uploader=True, **how):
        """Return a PyDfget ("py") or GoDfget ("go")."""
        self._count += 1
        ip = how.pop("ip", "127.0.0.%d" % (10 + self._count))
        home = os.path.join(self.root, "old%d" % self._count)
        os.makedirs(home)
        if uploader is True:
            uploader = (old_dfget.PyUploader if kind == "py" else old_dfget.GoUploader)(ip, home)
            self.uploaders.append(uploader)
        nodes = [getattr(n, "node", n) for n in (nodes if isinstance(nodes, list) else [nodes])]
        return (old_dfget.PyDfget if kind == "py" else old_dfget.GoDfget)(
            nodes, url, os.path.join(home, "out"), ip=ip, uploader=uploader or None, **how)

    def get(self, kind, nodes, url, check=None, **how):
        """Download; with `check` it must come from the swarm with exactly these bytes.  Return the Result."""
        result = self.client(kind, nodes, url, **how).run()
        return result if check is None else self.good(result, check)

    def start(self, kind, nodes, url, **how):
        """Begin to download; return a Running."""
        running = Running(self.client(kind, nodes, url, **how))
        self._running.append(running)
        return running

    @staticmethod
    def good(result, data):
        """Assert success through the swarm with these bytes."""
        assert (result.exit_code, result.reason) == (0, 0), (result.exit_code, result.reason, result.calls[-6:])
        with open(result.client.output, "rb") as out:
            assert out.read() == data
        return result

    def node(self, kind, *args, **how):
        """Start an emulated supernode: "sn1", "jsn" or "fake"."""
        make = {"sn1": old_supernode.SN1, "jsn": old_supernode.JSN, "fake": old_supernode.FakeSupernode}[kind]
        node = make(*args, **how)
        self.supernodes.append(node)
        return node

    def close(self):
        """End everything."""
        for running in self._running:
            running._thread.join(60)
        for uploader in self.uploaders:
            old_dfget._Uploader.stop(uploader)
        for node in self.supernodes:
            node.stop()


@pytest.fixture
def old(world):
    """Old clients and old supernodes."""
    here = Old(world.root)
    yield here
    here.close()


@pytest.fixture
def hand():
    """`hand(supernode)`: a client driven by hand."""
    return hands.Hand


class Dfget:
    """dfly.py through a link named dfget, always with the same home; `many` runs several downloads at a time."""

    AT_ONCE = 8

    def __init__(self, world):
        self._world, self._count = world, 0
        self._link = os.path.join(world.root, "dfget")
        os.symlink(worlds.DFLY, self._link)
        self._home = world.host("dfget-home").home

    def start(self, url, *flags, node=None):
        """Start a download to a new file."""
        self._count += 1
        out = os.path.join(self._world.root, "dfget-%d.out" % self._count)
        argv = [self._world.python, self._link, "-u", url, "-o", out, "--home", self._home, "--ip", "127.0.0.1"]
        argv += ["--node", node] if node else []
        return worlds.Command(self._world, "dfget", argv + list(flags), out)

    def __call__(self, url, *flags, node=None, timeout=60):
        """Download; return an Outcome."""
        return self.start(url, *flags, node=node).wait(timeout)

    def many(self, url, nodes, *flags, timeout=60):
        """Download once through each node; yield (node, Outcome)."""
        running = []
        for node in nodes:
            running.append((node, self.start(url, *flags, node=node.node)))
            if len(running) == self.AT_ONCE:
                first, command = running.pop(0)
                yield first, command.wait(timeout)
        for node, command in running:
            yield node, command.wait(timeout)


@pytest.fixture
def dfget(world):
    """`dfget(url, *flags, node=None)`: run dfly.py through a link named dfget."""
    return Dfget(world)
