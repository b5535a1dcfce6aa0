"""Section 11: what a Filler asks an origin for, and when it waits."""
import os
import random
import socket
import sys
import threading
import time

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


def half_full(folder, version, data=DATA, size=SIZE):
    """A store that has every second piece, as a swarm leaves it."""
    store = dfly.TaskFile.create(folder + "/data", folder + "/journal", {"task": "t", "version": version}, len(data), size)
    for num in range(1, store.layout.count, 2):
        at, length = store.layout.content_range(num)
        store.write(at, data[at:at + length])
        store.seal_piece(num, store.digest(num, length))
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


class Crumbs:
    """An origin that knows no ranges, sends its file in small parts, `pause_s` between them, and leaves the connection open."""

    def __init__(self, data, sizes, pause_s=0.0005):
        self._data, self._sizes, self._pause_s = data, sizes, pause_s
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(5)
        self.url = "http://127.0.0.1:%d/f" % self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        line, at, rng = self._listener.accept()[0], 0, random.Random(4)
        with line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.recv(1 << 16)
            line.sendall(b"HTTP/1.1 200 OK\r\nETag: \"x\"\r\nContent-Length: %d\r\n\r\n" % len(self._data))
            try:
                while at < len(self._data):
                    size = rng.choice(self._sizes)
                    line.sendall(self._data[at:at + size])
                    at += size
                    time.sleep(self._pause_s)
                line.recv(1)  # it is the other end that hangs up
            except OSError:
                pass

    def close(self):
        self._thread.join()
        self._listener.close()


def test_what_is_here_is_read_over_and_what_is_behind_it_is_whole(tmp_path):
    size = 1 << 18
    data = blob(12 * (size - 5) - 100)
    crumbs = Crumbs(data, [1448, 3000, 20000, 5000])
    origin = dfly.Origin(crumbs.url, timeout_s=5.0)
    reply = origin.open()
    store, began = half_full(str(tmp_path), reply.version, data, size), time.monotonic()
    dfly.Filler(origin, store, dfly.TokenBucket(), lambda num: None).fill(reply)
    assert store.complete and time.monotonic() - began < 5.0, "it waited for bytes that do not come"
    with open(store.data, "rb") as file:
        assert file.read() == data
    store.close()
    crumbs.close()


def test_a_slow_origin_is_seen_to_send(tmp_path):
    """Not only when a quarter of a MiB has come."""
    data = blob(40000)
    crumbs = Crumbs(data, [500], pause_s=0.05)  # 10 KB/s
    origin = dfly.Origin(crumbs.url)
    reply = origin.open()
    store = dfly.TaskFile.create(str(tmp_path / "data"), str(tmp_path / "journal"), {"task": "t", "version": reply.version}, len(data), 1 << 18)
    filler = dfly.Filler(origin, store, dfly.TokenBucket(), lambda num: None)
    thread = threading.Thread(target=filler.fill, args=(reply,))
    thread.start()
    came, changed, longest = 0, time.monotonic(), 0.0
    while thread.is_alive():
        thread.join(0.05)
        longest = max(longest, time.monotonic() - changed)
        if filler.read_bytes != came:
            came, changed = filler.read_bytes, time.monotonic()
    assert store.complete and longest < 2.5
    store.close()
    crumbs.close()


def test_where_no_more_threads_may_be_none_is_left_behind(station, tmp_path, monkeypatch):
    start, before = threading.Thread.start, threading.active_count()

    def limited(thread):
        if thread.name == "dfly-fill-2":
            raise RuntimeError("can't start new thread")
        start(thread)
    store = dfly.TaskFile.create(str(tmp_path / "data"), str(tmp_path / "journal"), {"task": "t", "version": ""}, len(DATA), SIZE)
    filler = dfly.Filler(dfly.Origin(station.put("f", DATA)), store, dfly.TokenBucket(), lambda num: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.raises(RuntimeError):
            filler.fill()
    assert threading.active_count() == before and filler._funnel._pipe is None
    store.close()


def slept(answers, stopped=lambda: False):
    """Let a Patience meet these (status, Retry-After); return the pauses that it made, and the error that was too much or None."""
    pauses = []
    patience = dfly.Patience(stopped, sleep=lambda seconds: pauses.__setitem__(-1, pauses[-1] + seconds))
    for status, retry_s in answers:
        pauses.append(0.0)
        try:
            patience.wait(dfly.SourceError("no", status, retry_s))
        except dfly.DflyError as error:
            return [round(pause, 1) for pause in pauses], error
    return [round(pause, 1) for pause in pauses], None


def test_an_origin_that_does_not_say_when_is_asked_three_times():
    pauses, error = slept([(500, None)] * 9)
    assert pauses == [0.5, 1.0, 0.0] and error.status == 500


def test_an_origin_that_says_when_is_asked_then_for_a_minute_in_all():
    assert slept([(429, 5.0)] * 3) == ([5.0] * 3, None)
    pauses, error = slept([(429, 25.0)] * 9)
    assert pauses == [25.0, 25.0, 0.0] and error.status == 429
    pauses, error = slept([(503, 0.0)] * 20)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 0.0], "an origin that says 0 is not hammered either"
    assert slept([(503, 61.0)])[0] == [0.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_refusal_for_good_is_not_asked_again(status):
    assert slept([(status, 1.0)])[0] == [0.0]


def test_who_is_told_to_stop_waits_no_longer():
    calls = []
    pauses, error = slept([(429, 30.0)], stopped=lambda: calls.append(1) or len(calls) > 3)
    assert pauses == [0.6] and isinstance(error, dfly.Stalled)


@pytest.mark.parametrize("text, least, most", [("7", 7, 7), ("0", 0, 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
                                               ("Wed, 21 Oct 2099 07:28:00 GMT", 1e9, 1e10)])
def test_a_wish_to_be_left_alone_is_understood(text, least, most):
    assert least <= dfly.seconds_until(text) <= most


@pytest.mark.parametrize("text", ["", "-5", "soon", "1.5", "9" * 40, "Wed, 99 Oct 2015", "\xe4"])
def test_a_wish_that_makes_no_sense_is_none(text):
    assert dfly.seconds_until(text) is None
