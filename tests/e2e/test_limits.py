"""Rates that hold within 5 %, disks that are full, and time that runs out."""
import contextlib
import os

import pytest
from world import MB, bad, good, wait_for


def close_to(rate, result, size, *others):
    """Did `size` bytes, from the first begin to the last end, take as long as `rate` says, within 5 % (and 0.3 s to start)?"""
    ideal, all_of_them = size / rate, (result,) + others
    cost = max(r.began + r.cost for r in all_of_them) - min(r.began for r in all_of_them)
    assert ideal * 0.95 <= cost <= ideal * 1.05 + 0.3, "%.2f s for %.2f s, %s" % (cost, ideal, result.last)


@pytest.mark.parametrize("pattern, size", [("p2p", 20 * MB), ("source", 10 * MB)])
def test_locallimit_holds(origin, supernode, host, blob, pattern, size):
    supernode()
    result = host().get(origin.put("f", blob(size)), "-s", "2M", "-p", pattern, check=blob(size))
    close_to(2 * MB, result, size)


def test_totallimit_is_shared_by_the_downloads_of_a_host(origin, supernode, host, blob):
    supernode()
    here = host()
    data = blob(10 * MB)
    commands = [here.start(origin.put(name, data), "--totallimit", "2M", out=name) for name in ("a", "b")]
    results = [good(command.wait(), data) for command in commands]
    close_to(2 * MB, results[0], 2 * len(data), results[1])


@pytest.mark.parametrize("pattern, size", [("cdn", 20 * MB), ("source", 10 * MB)])
def test_totallimit_holds_without_an_uploader(origin, supernode, host, blob, pattern, size):
    supernode()
    result = host().get(origin.put("f", blob(size)), "--totallimit", "2M", "-p", pattern, check=blob(size))
    close_to(2 * MB, result, size)


def test_the_supernode_keeps_to_its_bandwidth(origin, supernode, host, blob):
    supernode("--max-bandwidth", "4M")
    data = blob(20 * MB)
    result = host().get(origin.put("f", data), check=data)
    close_to(4 * MB, result, len(data))


def test_without_a_limit_nothing_is_slowed(origin, supernode, host, blob):
    supernode()
    data = blob(64 * MB)
    result = host().get(origin.put("f", data), check=data)
    assert result.cost < 3.0, result.last  # the original's silent 20 MB/s would need 3.2 s


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_a_disk_that_is_too_small_is_seen_before_the_download_starts(origin, supernode, host, blob, small_disk, pattern):
    supernode()
    here = host()
    disk = small_disk(here, 3 * MB)
    url = origin.put("f", blob(32 * MB), rate=2 * MB)
    result = bad(here.get(url, "-p", pattern, out="disk/out"), 10)
    assert result.reason in (4, 1004), result.out
    assert "space" in result.out and result.seconds < 8, result.out
    assert "out" not in os.listdir(disk) and on_disk(disk) < MB // 4, "it started all the same"


def on_disk(folder):
    return sum(os.stat(os.path.join(folder, name)).st_blocks * 512 for name in os.listdir(folder))


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_a_disk_that_fills_up_during_the_download_is_a_clear_error(origin, supernode, host, blob, small_disk, pattern):
    supernode()
    here = host()
    disk = small_disk(here, 3 * MB)
    result = bad(here.get(origin.put("f", blob(8 * MB), length=False), "-p", pattern, out="disk/out"), 10)
    assert result.reason in (4, 1004) and "space" in result.out, result.out
    assert "out" not in os.listdir(disk)


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_on_a_disk_that_is_full_to_the_last_byte_nothing_is_left(origin, supernode, host, blob, small_disk, pattern):
    supernode()
    here = host()
    disk = small_disk(here, MB)
    with open(os.path.join(disk, "others"), "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    result = bad(here.get(origin.put("f", blob(8 * MB), length=False), "-p", pattern, out="disk/out"), 10)
    assert result.reason in (4, 1004) and "space" in result.out, result.out
    assert os.listdir(disk) == ["others"]


def test_a_supernode_with_a_full_disk_sends_hosts_to_the_origin(origin, supernode, host, blob, small_disk):
    here = host("nodehost")
    supernode(home=os.path.join(small_disk(here, 3 * MB), "home"))
    data = blob(8 * MB)
    result = host().get(origin.put("f", data), check=data)
    assert result.reason in (1, 3) and result.seconds < 30, result.out


def test_a_slow_origin_holds_up_nobody_else_s(world, supernode, host, blob):
    node = supernode("--fetches", "4", "--origin-fetches", "2")
    slow, other = world.origin("127.0.0.1"), world.origin("127.0.0.1")
    waiting = [host().start(slow.put("s%d" % number, blob(MB, number), stall_after=1000), "-p", "cdn") for number in range(4)]
    wait_for(lambda: node.metrics()["dfly_fetches_waiting"] == 2, 20)
    assert node.metrics()["dfly_fetches"] == 2 and len(slow.log) == 2
    assert host().get(other.put("f", blob(MB)), "--notbs", check=blob(MB)).seconds < 5
    for number in range(4):
        slow.release("s%d" % number)
    for number, command in enumerate(waiting):
        assert command.wait().data == blob(MB, number)


def test_time_that_runs_out_ends_in_a_named_stall(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(4 * MB), stall_after=2 * MB)
    result = bad(host().get(url, "-e", "3", "--notbs"), 11)
    assert result.seconds < 15, result.out


def test_a_stalled_origin_ends_a_direct_download_in_time(origin, host, blob):
    url = origin.put("f", blob(4 * MB), stall_after=2 * MB)
    result = bad(host().get(url, "-e", "3", "-p", "source"), 11)
    assert result.seconds < 15, result.out


def test_a_stall_names_its_cause(origin, supernode, host, blob):
    supernode()
    data = blob(4 * MB)
    url = origin.put("f", data, stall_after=2 * MB)
    command = host().start(url, "-b")
    wait_for(lambda: "waiting:" in command.output(), 30, "a line that says what is waited for")
    origin.release("f")
    good(command.wait(), data)


def test_an_origin_that_stalls_is_named_on_the_way_back_to_source(origin, host, blob):
    data = blob(4 * MB)
    command = host().start(origin.put("f", data, stall_after=2 * MB), "-p", "source")
    wait_for(lambda: "waiting: the origin sends nothing" in command.stdout, 20)
    origin.release("f")
    good(command.wait(), data)
