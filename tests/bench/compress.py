#!/usr/bin/env python3
"""What compression is worth: one file reaching N hosts over slow links, with `--compress auto` and `off` in turns.

    compress.py [--peers N] [--size MB] [--rate MBIT] [--kind text|random] [--rounds R] [--whole]

The lab of swarm.py, but that the origin's link and the supernode's way to it are not shaped: a site behind a slow line, its
supernode in front of it (--whole: as in swarm.py).  `text` is a log as services write them: times, levels, modules, trace ids in hex, numbers.  Needs
what swarm.py needs.  A JSON row each: seconds to the last host, copies of the file (all bytes of the interface) that left the
supernode and the hosts, and CPU seconds of the whole machine.
"""
import argparse
import json
import os
import random
import shutil
import tempfile
import time

import swarm
from swarm import ORIGIN, SUPER, Lab, busy, digest, nginx, race, sh, start_dfly, tx_bytes, wait_port

LEVELS = ("INFO",) * 12 + ("DEBUG",) * 5 + ("WARN",) * 2 + ("ERROR",)
MODULES = ("http.server", "db.pool", "auth.session", "cache.redis", "queue.worker", "billing.invoice", "search.index", "mail.out")
MESSAGES = ("GET /api/v2/orders/%d HTTP/1.1 status=%d bytes=%d took=%.3fms", "connection acquired id=%d wait=%d size=%d t=%.3f",
            "session refreshed user=%d ttl=%d hits=%d age=%.2f", "retrying job %d attempt=%d backlog=%d delay=%.1fs",
            "slow query rows=%d table=orders_%d scanned=%d cost=%.2f")


def log_lines(size, seed=1):
    """Yield about `size` bytes of a log, a line at a time."""
    rng, now, sent, trace = random.Random(seed), 1795408506.0, 0, 0
    while sent < size:
        now += rng.expovariate(400)
        if rng.random() < 0.3:  # a request leaves three lines or so
            trace = rng.getrandbits(128)
        text = rng.choice(MESSAGES) % (rng.randrange(10 ** 6), rng.choice((200, 200, 304, 404, 500)), rng.randrange(10 ** 5), rng.random() * 100)
        line = "%s.%06dZ %-5s [%s] trace=%032x %s\n" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)), now % 1 * 1e6,
                                                        rng.choice(LEVELS), rng.choice(MODULES), trace, text)
        sent += len(line)
        yield line.encode()


def make(path, kind, size):
    """Write the file; of a long log each 16 MB are alike but for their order, which a window of 32 KB does not see."""
    with open(path, "wb") as f:
        if kind == "random":
            for _ in range(size):
                f.write(os.urandom(1 << 20))
            return
        lines, rng = list(log_lines(min(size, 16) << 20)), random.Random(2)
        while f.tell() < size << 20:
            at = rng.randrange(len(lines))
            f.write(b"".join(lines[at:] + lines[:at])[:(size << 20) - f.tell()])


class Site(Lab):
    """A lab whose origin and whose way from it to the supernode are not shaped."""

    whole = False

    def __enter__(self):
        super().__enter__()
        if self.rate and not self.whole:
            for where, device in (("origin", "eth0"), ("sw", "vorigin"), ("sw", "vsuper")):
                sh("tc -n %s%s qdisc del dev %s root" % (swarm.PREFIX, where, device))
        return self


def measure(a, compress, source):
    """One download of all hosts; return its row."""
    work = tempfile.mkdtemp(prefix="compress-", dir=os.path.dirname(source))
    a.system, a.stagger, a.limit = "dfly", 0, 900
    a.extra = a.super_extra = "--compress " + compress
    try:
        with Site(a.peers, a.rate) as lab:
            nginx(lab, "origin", os.path.dirname(source), 80, work)
            wait_port("p0", ORIGIN, 80)
            start_dfly(lab, a, work)
            names, worked = ["p%d" % i for i in range(a.peers)], busy()
            before = [tx_bytes(name) for name in ["super"] + names]
            times, failed, unfinished, _ = race(lab, a, work, "http://%s:80/%s" % (ORIGIN, os.path.basename(source)))
            sent = [tx_bytes(name) - was for name, was in zip(["super"] + names, before)]
            worked, want = busy() - worked, digest(source)
            wrong = [name for name in names if digest("%s/%s/out" % (work, name)) != want]
            saved = sh("ip netns exec %sp0 curl -s http://%s:8002/metrics | grep saved" % (swarm.PREFIX, SUPER)).split()[-1]
        return {"kind": a.kind, "peers": a.peers, "size_mb": a.size, "rate_mbit": a.rate, "compress": compress,
                "seconds": round(times[-1], 2), "super_copies": round(sent[0] / (a.size << 20), 3),
                "all_copies": round(sum(sent) / (a.size << 20), 3), "super_saved_mb": round(int(saved) / 1e6, 1), "cpu_s": round(worked, 1),
                "bad": [failed, unfinished, wrong]}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", type=int, default=1)
    p.add_argument("--size", type=int, default=200, help="MB")
    p.add_argument("--rate", type=int, default=20, help="Mbit/s; 0 leaves the links unshaped")
    p.add_argument("--kind", choices=("text", "random"), default="text")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--whole", action="store_true", help="shape the origin's link and the supernode's way to it, too")
    a = p.parse_args()
    Site.whole = a.whole
    swarm.PREFIX = "dfz"  # beside other labs
    folder = tempfile.mkdtemp(prefix="compress-", dir=os.environ.get("SWARM_TMP", "/dev/shm"))
    os.chmod(folder, 0o755)
    try:
        source = os.path.join(folder, "file")
        make(source, a.kind, a.size)
        for turn in range(a.rounds):
            for compress in (("auto", "off"), ("off", "auto"))[turn % 2]:  # what else the machine does comes and goes
                print(json.dumps(measure(a, compress, source)), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
