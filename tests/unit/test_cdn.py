"""Which cached files go, and who may fetch when."""
import os
import sys
import threading
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import dfly  # noqa: E402

GB = 1 << 30


@pytest.mark.parametrize("rules, unused, used, free, why", [
    (dict(), 1e9, 1e15, 0, ""),
    (dict(capacity=GB), 0, GB, GB, ""),
    (dict(capacity=GB), 0, GB + 1, GB, "capacity"),
    (dict(expire_s=60), 60, GB, GB, ""),
    (dict(expire_s=60), 61, GB, GB, "expired"),
    (dict(full=GB), 0, GB, GB - 1, "full"),
    (dict(full=GB), 0, GB, GB, ""),
    (dict(young=2 * GB, full=GB), 7300, GB, GB, "young"),
    (dict(young=2 * GB, full=GB), 7100, GB, GB, ""),
])
def test_rules(rules, unused, used, free, why):
    assert dfly.DiskRules(**rules).why(unused, used, free) == why


def cache(folder, rules, files):
    """Return a Cdn over cached files of (hours since the last use, bytes)."""
    cdn = dfly.Cdn(str(folder), dfly.Log(), dfly.TokenBucket(), 5.0, rules, dfly.Turns(1, 1))
    for number, (hours, size) in enumerate(files):
        name = "%064x" % number
        os.makedirs(os.path.join(cdn.folder, name[:3]), exist_ok=True)
        path = os.path.join(cdn.folder, name[:3], name)
        for tail in ("", ".journal"):
            with open(path + tail, "wb") as file:
                file.write(b"x" * size)
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    return cdn


def left(cdn):
    """Return the numbers of the cached files."""
    names = [name for _, _, names in os.walk(cdn.folder) for name in names]
    assert sorted(name + ".journal" for name in names if "." not in name) == sorted(name for name in names if "." in name)
    return sorted(int(name, 16) for name in names if "." not in name)


def test_the_longest_unused_go_until_all_fits(tmp_path):
    cdn = cache(tmp_path, dfly.DiskRules(capacity=100 << 10), [(1, 40 << 10), (3, 40 << 10), (2, 40 << 10), (5, 40 << 10)])
    cdn.collect()
    assert left(cdn) == [0, 2]


def test_what_is_in_use_stays(tmp_path):
    cdn = cache(tmp_path, dfly.DiskRules(expire_s=5400), [(1, 10), (3, 10), (2, 10)])
    cdn.task("%064x" % 1, "http://x/y", dfly.CdnEvents())
    cdn.collect()
    assert left(cdn) == [0, 1]


def test_room_is_made_for_the_next_and_what_can_t_fit_is_refused(tmp_path):
    cdn = cache(tmp_path, dfly.DiskRules(capacity=1000 << 10), [(1, 400 << 10), (2, 400 << 10)])
    cdn.make_room(500 << 10, "f" * 64)
    assert left(cdn) == [0]
    with pytest.raises(dfly.NoSpace):
        cdn.make_room(1001 << 10, "f" * 64)


def test_what_other_fetches_will_still_write_is_not_free(tmp_path):
    cdn = cache(tmp_path, dfly.DiskRules(capacity=1000 << 10), [])
    for name in ("a", "b"):
        cdn.task(name * 64, "http://x/y", dfly.CdnEvents())
    cdn.make_room(600 << 10, "a" * 64)
    with pytest.raises(dfly.NoSpace):
        cdn.make_room(600 << 10, "b" * 64)
    cdn.ended("a" * 64)
    cdn.make_room(600 << 10, "b" * 64)


def test_turns_are_kept_for_all_and_for_each_origin():
    turns, order, ended = dfly.Turns(3, 2), [], []
    gates = [threading.Event() for _ in range(6)]
    lock = threading.Lock()

    def fetch(number, origin):
        turns.take(origin, lambda: False)
        with lock:
            order.append(number)
        gates[number].wait(20)
        turns.give(origin)
        with lock:
            ended.append(number)

    threads = []
    for number, origin in enumerate("aaabab"):
        threads.append(threading.Thread(target=fetch, args=(number, origin)))
        threads[-1].start()
        wait_until(lambda: sum(turns.counts()) == number + 1)
    wait_until(lambda: turns.counts() == (3, 3))
    assert sorted(order) == [0, 1, 3]  # the third of a waits, that of b does not
    gates[3].set()
    wait_until(lambda: len(order) == 4)
    assert order[3] == 5 and turns.counts() == (3, 2)
    gates[0].set()
    wait_until(lambda: len(order) == 5)
    assert order[4] == 2  # the longest waiting one of a
    for gate in gates:
        gate.set()
    for thread in threads:
        thread.join(20)
    assert turns.counts() == (0, 0) and len(ended) == 6


def wait_until(true):
    """Wait for something, at most 20 s."""
    limit = time.monotonic() + 20
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_who_is_stopped_gives_up_his_place():
    turns = dfly.Turns(1, 1)
    turns.take("a", lambda: False)
    with pytest.raises(dfly.Stalled):
        turns.take("a", lambda: True)
    assert turns.counts() == (1, 0)


def test_metrics_are_as_prometheus_reads_them():
    metrics = dfly.Metrics()
    metrics.add("dfly_gc_bytes_total", 5, why='a"b\\c\n')
    metrics.add("dfly_gc_bytes_total", 5, why='a"b\\c\n')
    metrics.observe("dfly_scheduler_seconds", 0.25)
    text = metrics.text(("dfly_tasks", 3), calls={"sync": 7})
    assert text.splitlines() == [
        "# HELP dfly_requests_total Requests by call.", "# TYPE dfly_requests_total counter", 'dfly_requests_total{call="sync"} 7',
        "# HELP dfly_tasks Tasks in memory.", "# TYPE dfly_tasks gauge", "dfly_tasks 3",
        "# HELP dfly_scheduler_seconds Time to take in a client's reports and choose its next pieces.", "# TYPE dfly_scheduler_seconds summary",
        "dfly_scheduler_seconds_count 1", "dfly_scheduler_seconds_sum 0.250000",
        "# HELP dfly_gc_bytes_total Bytes removed from the cache, by why.", "# TYPE dfly_gc_bytes_total counter",
        'dfly_gc_bytes_total{why="a\\"b\\\\c\\n"} 10']


def test_memory_takes_what_fits_and_counts_each_file_once(tmp_path):
    shelf = dfly.MemoryShelf(str(tmp_path / "shelf"), 1000 << 10)
    assert shelf.take(600 << 10, "a" * 64)
    assert not shelf.take(600 << 10, "b" * 64)
    path = dfly.path_of_task(shelf.folder, "a" * 64)
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(b"x" * (600 << 10))
    assert shelf.take(300 << 10, "b" * 64) and not shelf.take(100 << 10, "c" * 64)
    shelf.ended("b" * 64)
    assert shelf.take(900 << 10, "a" * 64), "what it has itself counts"
    shelf.ended("a" * 64)
    assert shelf.excess() < 0
    with open(path, "ab") as file:
        file.write(b"x" * (200 << 10))
    assert 0 < shelf.excess() <= 64 << 10


def test_room_is_kept_without_a_change_of_the_file(tmp_path):
    store = dfly.TaskFile.create(str(tmp_path / "f"), str(tmp_path / "f.journal"), {}, 5 << 20, 1 << 20)
    if store.reserve():
        stat = os.stat(str(tmp_path / "f"))
        assert stat.st_size == 0 and stat.st_blocks * 512 >= 5 << 20
    store.close()
