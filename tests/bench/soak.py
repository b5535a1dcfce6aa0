#!/usr/bin/env python3
"""Drive many tasks through a small cache: `python3 tests/bench/soak.py [--tasks 1000] [--size 10M] [--room 1G] [--tmpfs]`.

One supernode, its home kept to `--room` by --capacity, or (--tmpfs, as root) by a file system of that size.  Every task is preheated, every
twentieth downloaded and compared.  Prints what was the most on disk, and descriptors, threads and memory of the supernode after the first
hundred tasks and at the end.
"""
import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from world import World, wait_for  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402


def on_disk(folder):
    """Return the bytes that files below a folder take."""
    found = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                pass
    return found


def state(pid):
    """Return (descriptors, threads, MB of memory) of a process."""
    with open("/proc/%d/status" % pid) as file:
        said = dict(line.split(":", 1) for line in file)
    return len(os.listdir("/proc/%d/fd" % pid)), int(said["Threads"]), int(said["VmRSS"].split()[0]) // 1024


def preheat(node, url):
    """Have a task on the supernode; return the seconds it took."""
    began = time.monotonic()
    body = json.dumps({"type": "file", "url": url}).encode()
    with urllib.request.urlopen(urllib.request.Request("http://%s/preheats" % node.node, body), timeout=30) as answer:
        number = json.loads(answer.read().decode())["ID"]
    while True:
        with urllib.request.urlopen("http://%s/preheats/%s" % (node.node, number), timeout=30) as answer:
            said = json.loads(answer.read().decode())
        if said["status"] in ("SUCCESS", "FAILED"):
            assert said["status"] == "SUCCESS", said
            return time.monotonic() - began
        time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--size", type=dfly.parse_size, default=10 << 20)
    parser.add_argument("--room", type=dfly.parse_size, default=1 << 30)
    parser.add_argument("--tmpfs", action="store_true")
    options = parser.parse_args()
    world = World()
    home = os.path.join(world.root, "small")
    os.makedirs(home)
    if options.tmpfs:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=%d" % options.room, "tmpfs", home], check=True)
    try:
        origin, here, most = world.origin(), world.host(), 0
        node = world.supernode("--task-expire-time", "1s", *(() if options.tmpfs else ("--capacity", str(options.room))), home=home)
        data = os.urandom(options.size)
        early, began = None, time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for at in range(0, options.tasks, 20):
                names = ["f%d" % number for number in range(at, min(at + 20, options.tasks))]
                list(pool.map(lambda name: preheat(node, origin.put(name, data)), names))
                here.get(origin.base + names[-1], "--notbs", "-p", "cdn", check=data)
                most = max(most, on_disk(home))
                early = early or (state(node.pid) if at >= 100 else None)
        seconds = time.monotonic() - began
        wait_for(lambda: node.metrics()["dfly_tasks"] == 0, 60)
        found = node.metrics()
        print("%d tasks of %s in %.0f s; most on disk %s of %s; %d files removed; descriptors, threads, MB early %s, at the end %s" % (
            options.tasks, dfly.show_size(options.size), seconds, dfly.show_size(most), dfly.show_size(options.room),
            sum(count for name, count in found.items() if name.startswith("dfly_gc_files_total{")), early, state(node.pid)))
    finally:
        world.close()
        if options.tmpfs:
            subprocess.run(["umount", "-l", home], check=False)


if __name__ == "__main__":
    main()
