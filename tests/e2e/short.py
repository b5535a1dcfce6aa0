"""The short end-to-end pass, for every Python 3.6 to 3.13: `PYTHON tests/e2e/short.py`.  Needs nothing but the standard library.

One origin, one supernode, two hosts; a resume after SIGKILL; a log over a slow link, compressed; a download back to source.  Prints one line.
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from world import MB, World, blob, good, md5, wait_for  # noqa: E402


def two_hosts(world, origin, data):
    """Two hosts, one fetch from the origin."""
    url = origin.put("f", data)
    for _ in range(2):
        good(world.host().get(url, "-m", md5(data)), data)
    assert origin.gets("f") == 1, origin.log


def resume(world, origin, node, data):
    """A killed download goes on where it was."""
    url = origin.put("r", data, stall_after=len(data) // 2, once=True)
    here = world.host()
    before = node.bytes_sent()
    command = here.start(url)
    wait_for(lambda: node.bytes_sent() - before >= len(data) // 4, 20, "a quarter of the file")
    command.kill()
    origin.release("r")
    good(here.get(url), data)
    assert origin.bytes_sent("r") == len(data), origin.log


def compressed(world, origin, node):
    """What shrinks takes fewer bytes where a limit makes the link slow; the first two MB are under way before anybody knows that it is."""
    data, before = b"".join(b"%08d a line of a log\n" % i for i in range(8 * MB // 27)), node.bytes_sent()
    good(world.host().get(origin.put("log", data), "-s", "1M"), data)
    assert node.bytes_sent() - before < 0.7 * len(data), node.metrics()


def back_to_source(world, origin, node, data):
    """No supernode, so the origin itself serves."""
    node.stop()
    result = good(world.host().get(origin.put("s", data)), data)
    assert result.reason == 1, result.out


def main():
    began = time.monotonic()
    data = blob(6 * MB)
    world = World()
    failure = None
    try:
        origin, node = world.origin(), world.supernode()
        two_hosts(world, origin, data)
        resume(world, origin, node, data)
        compressed(world, origin, node)
        back_to_source(world, origin, node, data)
    except Exception as error:
        failure = "%s: %s\n%s" % (type(error).__name__, error, world.report())
    complaints = world.close()
    if failure or complaints:
        print("FAILED: " + "\n".join([failure or ""] + complaints))
        return 1
    print("%d.%d.%d: two hosts, resume, compression and back to source in %.1f s" % (sys.version_info[:3] + (time.monotonic() - began,)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
