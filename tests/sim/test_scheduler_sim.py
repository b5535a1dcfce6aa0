"""A small fixed-seed set of simulations: the scheduler stays near the limit.  Bounds leave room for no regression of note."""
import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from simulate import simulate  # noqa: E402

QUICK = ("--latency", 5, "--ahead", 20)


def check(row, **limits):
    assert row["makespan_s"] < 1e6, row
    for name, limit in limits.items():
        assert row[name] <= limit, json.dumps(row)
    return row


@pytest.mark.parametrize("seed", [1, 2])
def test_eight_hosts_end_near_one_file_time(seed):
    check(simulate("--peers", 8, "--size", 100, "--seed", seed, *QUICK), over_bound=1.15, seed_copies=1.25)


@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_four_hosts_end_near_one_file_time(seed):
    check(simulate("--peers", 24, "--size", 100, "--seed", seed, *QUICK), over_bound=1.15, seed_copies=1.25)


def test_a_piece_crosses_into_a_rack_about_once():
    check(simulate("--peers", 16, "--size", 60, "--racks", 4, "--core", 50, *QUICK), over_bound=1.45, rack_copies=1.2)


def test_late_joiners_lose_nothing():
    check(simulate("--peers", 24, "--size", 100, "--stagger", 1, *QUICK), worst_own=1.2)


def test_killed_hosts_do_not_hold_up_the_others():
    check(simulate("--peers", 24, "--size", 100, "--kill", 3, *QUICK), over_bound=1.3)


def test_hosts_that_serve_wrong_bytes_are_isolated_and_do_not_hold_up_the_others():
    row = check(simulate("--peers", 24, "--size", 100, "--bad", 2, *QUICK), over_bound=1.3)
    assert len(row["isolated"]) == 2 and row["wrong"] < 40


def test_slow_hosts_do_not_hold_up_the_fast_ones():
    check(simulate("--peers", 16, "--size", 60, "--slow", 8, *QUICK), over_bound=1.3)


def test_two_hundred_hosts_on_fast_links_end_together():
    check(simulate("--peers", 200, "--size", 200, "--rate", 1000, "--latency", 2, "--ahead", 8, "--jitter", .02), over_bound=1.18, p99_9_over_median=1.03)
