"""kill -9 of a supernode at random moments, over and over: never a wrong byte, and no download is lost."""
import os
import random
import socket
import time

from world import MB, blob, good

KILLS = 50
SIZE = 8 * MB
RATE = 2 * MB        # of the origin, bytes/s and request
SPOILT = (15, 30)    # after these kills some bytes on the disk are others, too
LIFE_S = (0.0, 1.0)  # of a supernode, from its first line to its end


def free_ports():
    """Two ports on which nobody listens, below those that connections and uploaders get by themselves: they are used again and again."""
    found = []
    for port in random.sample(range(9000, 14000), 200):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == 2:
            return tuple(found)
    raise AssertionError("no free ports")


class Client:
    """A host that downloads one file after the other, each to a new output, until it is told to stop."""

    def __init__(self, origin, host, node):
        self.origin, self.host, self.node = origin, host, node
        self.count = 0  # downloads ended
        self.command = None
        self.next()

    def next(self):
        """Start the next download."""
        name = "f%d" % self.count
        url = self.origin.base + name
        if name not in self.origin.contents:
            self.origin.put(name, blob(SIZE, self.count), rate=RATE)
        self.command = self.host.start(url, "--notbs", out="out%d" % self.count, node=self.node)

    def check(self, more):
        """When the download has ended, hold it against what it must be, and start another one if there shall be `more`."""
        if self.command and not self.command.running():
            self.finish(0.0)
            if more:
                self.next()

    def finish(self, limit):
        """Wait for the download; it must have succeeded, to the last byte."""
        if self.command:
            result = good(self.command.wait(limit), blob(SIZE, self.count))
            assert result.reason == 0, result.out
            os.remove(result.path)
            self.command, self.count = None, self.count + 1


def spoil(node, rng, count):
    """Flip bytes in the cached pieces of a supernode that is not running, in every file; return how many files."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(node.home, "repo")) for name in names if len(name) == 64]
    for path in filter(os.path.getsize, files):
        with open(path, "r+b") as f:
            for _ in range(count):
                at = rng.randrange(os.path.getsize(path))
                f.seek(at)
                byte = f.read(1)
                f.seek(at)
                f.write(bytes([byte[0] ^ 0x40]))
    return len(files)


def test_a_supernode_killed_fifty_times_loses_no_download_and_corrupts_none(world, origin):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng, ports = random.Random(seed), free_ports()
    node = world.supernode(ports=ports)
    clients = [Client(origin, world.host(), node.node)]
    for kill in range(KILLS):
        moment = time.monotonic() + rng.uniform(*LIFE_S)
        while time.monotonic() < moment:
            for client in clients:
                client.check(more=True)
            time.sleep(0.01)
        if kill in (2, 5):
            clients.append(Client(origin, world.host(), node.node))
        node.kill()
        if kill in SPOILT:
            spoil(node, rng, 1)
        node = world.supernode(home=node.home, ports=ports)
    for client in clients:
        client.finish(60)
    done = [client.count for client in clients]
    print("downloads", done, "of the origin", {name: "%.2f" % (origin.bytes_sent(name) / SIZE) for name in origin.contents})
    assert min(done) >= 1, done
    for name in origin.contents:
        assert origin.bytes_sent(name) <= 2.5 * SIZE, (name, done, origin.requests(name))

    node.kill()
    assert spoil(node, rng, 3) == len(origin.contents)
    node = world.supernode(home=node.home, ports=ports)
    for i in range(len(origin.contents)):
        before = origin.bytes_sent("f%d" % i)
        world.host().get(origin.base + "f%d" % i, "--notbs", node=node.node, check=blob(SIZE, i))
        assert 0 < origin.bytes_sent("f%d" % i) - before < SIZE, origin.requests("f%d" % i)
