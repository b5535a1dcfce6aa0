"""Many peers at one supernode, in short; tests/bench/load.py does the same at full size and measures it."""
import argparse
import os
import sys

from world import MB, wait_for

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bench"))
import load  # noqa: E402


def options(**changed):
    return argparse.Namespace(**dict(dict(peers=200, tasks=4, size=2, seconds=2.0, park=0), **changed))


def test_the_syncs_of_two_hundred_peers_are_all_answered(world, supernode):
    load.many_descriptors(1000)
    node = supernode()
    row = load.run_syncs(world, node, options())
    assert row["errors"] == 0, row
    assert row["codes"].get("601") and row["codes"].get("602"), row
    before, after = row["fds"]
    assert after <= before, row
    assert node.running()


def test_a_thousand_peers_wait_without_a_thread_or_much_memory_each(world, supernode):
    load.many_descriptors(2500)
    node = supernode()
    threads = len(os.listdir("/proc/%d/task" % node.pid))
    row = load.run_park(world, node, options(tasks=2, seconds=0.5, park=1000))
    assert row["errors"] == 0 and row["connections"] == 1000, row
    assert row["rss_mb"] < 150, row
    before, after = row["fds"]
    assert after <= before + 4, row  # two tasks, each with its file and its journal
    assert len(os.listdir("/proc/%d/task" % node.pid)) <= threads + 4


def test_peers_that_waited_are_told_when_there_is_work(world, supernode, origin):
    load.many_descriptors(1000)
    node, url = supernode(), origin.put("f", bytes(2 * MB), stall_after=0)
    peers = load.Load((node.ip, node.port))
    try:
        peers.register([url], 100)
        peers.begin()
        wait_for(lambda: load.syncs(node) >= 100, 20, "100 syncs")
        assert not peers.codes[601]
        origin.release("f")

        def all_done():
            peers.run(0.1)
            return peers.codes[600] >= 100
        wait_for(all_done, 60, "the end of 100 downloads")
        assert not peers.errors
    finally:
        peers.close()
