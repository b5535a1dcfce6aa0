"""Section 9: what a Filler asks an origin for, and when it waits."""
import os
import sys

import pytest

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
import dfly  # noqa: E402
from station import Origin  # noqa: E402
from world import blob  # noqa: E402

SIZE = 1 << 12
COUNT = 9
DATA = blob(COUNT * (SIZE - 5) - 100)


@pytest.fixture
def station():
    with Origin() as station:
        yield station


def half_full(folder, version):
    """A store that has every second piece, as a swarm leaves it."""
    store = dfly.TaskFile.create(folder + "/data", folder + "/journal", {"task": "t", "version": version}, len(DATA), SIZE)
    for num in range(1, COUNT, 2):
        at, length = store.layout.content_range(num)
        digest = dfly.PieceDigest()
        digest.update(DATA[at:at + length])
        store.write(at, DATA[at:at + length])
        store.seal_piece(num, digest.seal())
    return store


def test_an_origin_that_falls_silent_fails_the_fetch(station, tmp_path):
    """Wire: 16.39"""
    origin = dfly.Origin(station.put("f", DATA, stall_after=SIZE // 2), timeout_s=0.2)
    reply = origin.open()
    store = dfly.TaskFile.create(str(tmp_path / "data"), str(tmp_path / "journal"), {"task": "t", "version": reply.version}, len(DATA), SIZE)
    with pytest.raises(dfly.SourceError, match="silent"):
        dfly.Filler(origin, store, dfly.TokenBucket(), lambda num: None, sleep=lambda seconds: None).fill(reply)
    store.close()
    station.change("f", delay=5.0)
    with pytest.raises(dfly.SourceError, match="does not answer"):
        origin.open()


def test_a_name_that_leads_elsewhere_when_it_comes_to_it_is_not_asked(station):
    """Wire: 16.3"""
    class Late(dfly.Fence):
        checks = 0

        def check(self, name, addresses):
            self.checks += 1
            if self.checks == 2:
                raise dfly.SourceError("%s is at %s now: not fetched" % (name, addresses), 403)
    with pytest.raises(dfly.SourceError, match="at .'127.0.0.1'. now"):
        dfly.Origin(station.put("f", DATA), fence=Late()).open()
    assert not station.log


def test_gaps_are_filled_one_by_one_without_a_pause(station, tmp_path):
    origin = dfly.Origin(station.put("f", DATA))
    reply = origin.open(method="HEAD")
    reply.close()
    store, pauses = half_full(str(tmp_path), reply.version), []
    dfly.Filler(origin, store, dfly.TokenBucket(), lambda num: None, sleep=pauses.append).fill()
    assert store.complete and not pauses
    with open(store.data, "rb") as file:
        assert file.read() == DATA
    assert [r.range for r in station.requests("f")][0] == "bytes=0-%d" % (SIZE - 6) and len(station.requests("f")) == 5
    store.close()
