#!/usr/bin/env python3
"""How long `docker pull` takes through a daemon, against straight from the registry:  tests/bench/pull.py [rounds] [MB]

One layer; whole commands, paired in turns; needs Debian's docker.io, docker-registry and skopeo, and root.  Each round begins
with an empty supernode and empty daemons.  first: a host's first pull; host: the next host's; again: the same host once more;
byte: from asking for the layer to its first byte, by a plain GET, against the same straight from the registry.
"""
import os
import random
import statistics
import sys
import time

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
import world as worlds  # noqa: E402
from real.engines import Docker  # noqa: E402
from real.registries import Image, Registry  # noqa: E402

NAME = "library/app:1"


class Straight(Docker):
    """An engine whose mirror is the registry itself."""

    def settle(self, url):
        os.makedirs(os.path.join(self.etc, "docker"), exist_ok=True)
        with open(os.path.join(self.etc, "docker", "daemon.json"), "w") as file:
            file.write('{"registry-mirrors": ["%s"]}' % url)
        self.start()


def timed_pull(engine, image):
    """Seconds of one docker pull of what the engine does not have."""
    began = time.monotonic()
    engine.run(engine.command("pull", "-q", NAME))
    seconds = time.monotonic() - began
    assert engine.run(engine.command("image", "inspect", "-f", "{{.Id}}", NAME)).out.strip() == image.id
    engine.forget(NAME)
    return seconds


def first_byte(address, digest):
    """Seconds from a GET to the first byte of a blob; reads it to its end."""
    import http.client
    connection = http.client.HTTPConnection(*address)
    connection.connect()
    began = time.monotonic()
    connection.request("GET", "/v2/library/app/blobs/sha256:" + digest)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read(1)
    seconds = time.monotonic() - began
    answer.read()
    connection.close()
    return seconds


def one_round(world, registry, image, large, number):
    """{row: seconds} of one round."""
    node = world.supernode()
    hosts = [world.host("round%d-%d" % (number, i)) for i in range(3)]
    daemons = [host.daemon(registry.url, node=node.node) for host in hosts]
    for host in hosts:
        worlds.wait_for(host.uploader_pid)
    engines = []
    for host, url in [(world.host("straight%d" % number), registry.url)] + [(host, "http://127.0.0.1:%d" % daemon.address[1])
                                                                              for host, daemon in zip(hosts, daemons)]:
        engines.append(Straight(world, host))
        engines[-1].settle(url)
    rows = {}
    for name, engine in (("straight", 0), ("first", 1), ("straight again", 0), ("host", 2), ("straight third", 0), ("again", 1)):
        rows[name] = timed_pull(engines[engine], image)
    for engine in engines:
        engine.close()
    rows["byte straight"] = first_byte(("127.0.0.1", registry.port), large)
    node2 = world.supernode()
    cold = world.host("cold%d" % number).daemon(registry.url, node=node2.node)
    worlds.wait_for(lambda: cold.status())
    time.sleep(0.5)
    rows["byte"] = first_byte(cold.address, large)
    rows["byte again"] = first_byte(cold.address, large)
    for command in [node, node2, cold] + daemons:
        command.stop()
    return rows


def main():
    rounds, size = (int(text) for text in (sys.argv[1:] + ["5", "60"][len(sys.argv) - 1:])[:2])
    world, rows = worlds.World(warnings=False), []  # Python's development mode is for tests
    try:
        registry, image = Registry(world), Image(world, random.Random(1).getrandbits(8 * size << 20).to_bytes(size << 20, "little"))
        image.push(registry.port, name=NAME)
        large = max(image.blobs, key=lambda digest: len(image.blobs[digest]))
        for number in range(rounds):
            rows.append(one_round(world, registry, image, large, number))
            print("  ".join("%s %.3f" % pair for pair in rows[-1].items()), flush=True)
    finally:
        print("\n".join(world.close() or []), end="")
    for name, other, target in (("first", "straight", 1.2), ("host", "straight again", 1.1), ("again", "straight third", 1.1), ("byte", "byte straight", 1.2)):
        ratios = [row[name] / row[other] for row in rows]
        print("%-6s %.2f times straight (%.2f to %.2f), target %.1f; %.3f s against %.3f s" % (
            name, statistics.median(ratios), min(ratios), max(ratios), target, statistics.median(row[name] for row in rows),
            statistics.median(row[other] for row in rows)))


if __name__ == "__main__":
    main()
