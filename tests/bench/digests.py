#!/usr/bin/env python3
"""Time the accelerator's digests beside hashlib's, one thread, in turns: `python3 tests/bench/digests.py [--pieces 16] [--size 4M]`.

Prints for each kind and width the median rate in GB/s and how many times hashlib's that is.
"""
import argparse
import hashlib
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import _fastpiece  # noqa: E402
import dfly  # noqa: E402

WIDTHS = ("plain", "sse2", "avx2", "avx512", "sha")  # the last one: the processor's own instructions, two messages at a time


def timed(act):
    began = time.perf_counter()
    found = act()
    return time.perf_counter() - began, found


def one_by_one(kind, messages):
    """Return the digests as hashlib makes them, without a copy of any message."""
    found = []
    for message in messages:
        digest = hashlib.new(kind)
        for part in message:
            digest.update(part)
        found.append(digest.digest())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pieces", type=int, default=16)
    parser.add_argument("--size", type=dfly.parse_size, default=4 << 20)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    messages = [(b"\0\0\0\1", os.urandom(options.size), b"\x7f") for _ in range(options.pieces)]
    total = sum(len(message[1]) for message in messages)
    print("%d pieces of %d bytes, %s" % (options.pieces, options.size, sys.version.split()[0]))
    for kind in ("md5", "sha256"):
        acts = {"hashlib": lambda: one_by_one(kind, messages)}
        for width in WIDTHS:
            acts[width] = lambda width=width: _fastpiece.digest_many(kind, messages, width)
        times = {name: [] for name in acts}
        for _ in range(options.rounds):
            for name, act in acts.items():
                try:
                    times[name].append(timed(act)[0])
                except ValueError:
                    continue  # this processor has no such lanes
        rates = {name: total / statistics.median(seconds) / 1e9 for name, seconds in times.items() if seconds}
        for name, rate in rates.items():
            print("%-7s %-8s %6.2f GB/s  %5.2f x hashlib" % (kind, name, rate, rate / rates["hashlib"]))


if __name__ == "__main__":
    main()
