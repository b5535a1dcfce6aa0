"""Section 13, where the simulator does not look: what becomes of single peers."""
import os
import random
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402

RACK = ("site", "rack")


class Swarm:
    """A file of four pieces, a finished holder of all of them, and receivers that have begun nothing."""

    def __init__(self, receivers):
        self.now, self.scheduler = 0.0, dfly.Scheduler(rng=random.Random(1))
        self.scheduler.add_task("t", 4)
        for num in range(4):
            self.scheduler.seeded("t", num, self.now)
        self.join("holder", have=0b1111)
        self.scheduler.leave("t", "holder", self.now)
        self.receivers = ["r%d" % i for i in range(receivers)]
        for cid in self.receivers:
            self.join(cid)

    def join(self, cid, have=0):
        self.scheduler.add_peer("t", cid, (cid, 1), RACK, self.now, have=have)

    def fail(self, times, why):
        """Have one receiver after the other fail with the holder, each when that is no longer suspended."""
        for i in range(times):
            self.now += 1000.0
            self.scheduler.tick(self.now)
            self.scheduler.failed("t", self.receivers[i % len(self.receivers)], 0, "holder", why, self.now)

    def offered(self):
        """Whether the holder is given to a receiver that comes when it is no longer suspended."""
        self.now += 1000.0
        self.scheduler.tick(self.now)
        self.join("new")
        self.scheduler.request("t", "new", 4, self.now)
        found = any(work.holder == "holder" for work in self.scheduler.take("t", "new"))
        self.scheduler.drop_peer("t", "new", self.now)
        return found


@pytest.mark.parametrize("why", [dfly.REFUSED, dfly.STALLED])
def test_a_holder_that_nobody_could_reach_is_given_up_in_the_end(why):
    swarm = Swarm(3)
    swarm.fail(5, why)
    assert swarm.scheduler.serves("t", "holder") and swarm.offered()
    swarm.fail(1, why)
    assert not swarm.scheduler.serves("t", "holder") and not swarm.offered()
    swarm.join("holder", have=0b1111)
    assert swarm.scheduler.serves("t", "holder") and swarm.offered(), "it may come back"


def test_a_holder_is_not_given_up_for_what_one_or_two_say():
    swarm = Swarm(2)
    swarm.fail(40, dfly.STALLED)
    assert swarm.scheduler.serves("t", "holder") and swarm.offered()


def test_a_holder_that_still_serves_somebody_is_not_given_up():
    swarm = Swarm(5)
    for num in range(4):
        swarm.fail(5, dfly.REFUSED)
        swarm.scheduler.done("t", "r0", num, swarm.now, holder="holder", seconds=1.0, nbytes=1000)
    swarm.fail(5, dfly.REFUSED)
    assert swarm.scheduler.serves("t", "holder") and swarm.offered()


def test_a_lone_receiver_tries_a_holder_that_has_failed_with_one_piece():
    swarm = Swarm(1)
    swarm.fail(1, dfly.STALLED)
    swarm.now += 1000.0
    swarm.scheduler.tick(swarm.now)
    got = []
    for slots, queue in (1, 1), (1, 1), (4, 4):
        swarm.scheduler.request("t", "r0", slots, swarm.now, queue=queue)
        got += swarm.scheduler.take("t", "r0")
    assert sorted(work.num for work in got) == [0, 1, 2, 3] and [work.holder for work in got].count("holder") == 1


def test_a_lone_receiver_leaves_a_holder_that_keeps_failing_for_the_seed():
    swarm = Swarm(1)
    for _ in range(2):
        swarm.fail(1, dfly.STALLED)
    swarm.now += 1000.0
    swarm.scheduler.tick(swarm.now)
    swarm.scheduler.request("t", "r0", 4, swarm.now, queue=4)
    assert [work.holder for work in swarm.scheduler.take("t", "r0")] == [dfly.SEED] * 4


def first_copies(feeders, others):
    """Return how many pieces the seed sends to each of some receivers that pass on what they get, and of some that don't."""
    scheduler = dfly.Scheduler(rng=random.Random(1), seed_slots=100)
    scheduler.add_task("t", 100)
    for i in range(feeders + others):
        scheduler.add_peer("t", "p%d" % i, ("p%d" % i, 1), (), 0.0, serves=i < feeders)
    for num in range(100):
        scheduler.seeded("t", num, 0.0)
    for i in reversed(range(feeders + others)):
        scheduler.request("t", "p%d" % i, 4, 0.0)
    return [len(scheduler.take("t", "p%d" % i)) for i in range(feeders + others)]


def test_first_copies_go_to_those_who_pass_them_on_where_most_do():
    assert first_copies(3, 2) == [4, 4, 4, 0, 0]
    assert first_copies(2, 2) == [4, 4, 4, 4], "else the seed's own link would wait for few"


def test_who_is_isolated_gets_no_more_first_copies():
    scheduler = dfly.Scheduler(rng=random.Random(1), seed_slots=100)
    scheduler.add_task("t", 100)
    for cid in ("a", "b", "c", "bad"):
        scheduler.add_peer("t", cid, (cid, 1), (), 0.0)
    for cid in ("a", "b"):
        scheduler.failed("t", cid, 0, "bad", dfly.WRONG_BYTES, 0.0)
    for num in range(100):
        scheduler.seeded("t", num, 0.0)
    scheduler.request("t", "bad", 4, 0.0)
    assert scheduler.isolated("t", 0.0) == {"bad"} and scheduler.take("t", "bad") == []
    scheduler.tick(1000.0)
    scheduler.request("t", "bad", 4, 1000.0)
    assert len(scheduler.take("t", "bad")) == 4, "forgiven"
