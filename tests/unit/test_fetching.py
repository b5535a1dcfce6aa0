"""Pieces from peers that are late, wrong or gone: who may write a piece, and what becomes of it."""
import hashlib
import random
import socket
import threading
import time

import dfly
import pytest

MIB = 1 << 20
SIZE = MIB
DATA = random.Random(3).getrandbits(8 * (SIZE - 5)).to_bytes(SIZE - 5, "big")
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
FRAMED = dfly.piece_head(len(DATA), SIZE) + DATA + dfly.TAIL
HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % len(FRAMED)


class Peer:
    """A peer that answers one request with `first`, and with `second` when it is told to go on; then it hangs up.  One that drips
    sends `first` 100 bytes at a time instead, two times a second."""

    def __init__(self, first, second=b"", drips=False):
        self._drips = drips
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(5)
        self.port = self._listener.getsockname()[1]
        self.asked, self.go_on, self.hung_up = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first, second), daemon=True)
        self._thread.start()

    def _run(self, first, second):
        line = self._listener.accept()[0]
        with line:
            line.recv(4096)
            line.sendall(HEAD + (b"" if self._drips else first))
            self.asked.set()
            if self._drips:
                self._drip(line, first)
            if second:
                watcher = threading.Thread(target=self._watch, args=(line,), daemon=True)
                watcher.start()
                self.go_on.wait(20)
                try:
                    line.sendall(second)
                except OSError:
                    pass
                self.hung_up.wait(20)

    def _drip(self, line, data):
        try:
            for at in range(0, len(data), 100):
                line.sendall(data[at:at + 100])
                if self.hung_up.wait(0.5):
                    break
        except OSError:
            pass

    def _watch(self, line):
        try:
            line.recv(1)
        except OSError:
            pass
        self.hung_up.set()

    def order(self, digest=DIGEST):
        return dfly.Order(0, str(self.port), "127.0.0.1", self.port, "/peer/file/x", digest, "0-%d" % (SIZE - 1))

    def close(self):
        self.go_on.set()
        self.hung_up.set()
        self._listener.close()


@pytest.fixture
def fetchers(tmp_path):
    store = dfly.TaskFile.create(str(tmp_path / "data"), str(tmp_path / "journal"), {"task": "t", "version": "v"}, len(DATA), SIZE)
    log = dfly.Log(str(tmp_path / "log"), "test")
    fetchers = dfly.Fetchers(store, dfly.TokenBucket(), [], 2, log)
    fetchers.store = store
    yield fetchers
    fetchers.stop()
    store.close()
    log.close()


def outcome(fetchers, limit_s=10.0):
    """The next outcome."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if fetchers.outcomes:
            return fetchers.outcomes.popleft()
        fetchers.wait(0.1)
    raise AssertionError("no outcome")


def wait_until_newest(fetchers, order, limit_s=5.0):
    """Wait until the fetch of `order` is the newest of its piece."""
    end = time.monotonic() + limit_s
    while getattr(fetchers._claims.get(order.num), "_order", None) is not order and time.monotonic() < end:
        time.sleep(0.01)


def content(fetchers):
    with open(fetchers.store.data, "rb") as file:
        return file.read()


def test_a_late_piece_comes_from_another_peer_while_the_first_still_holds_it_back(fetchers):
    late, prompt = Peer(FRAMED[:MIB // 2], b"\xff" * (MIB // 2 + 100)), Peer(FRAMED)
    fetchers.put(late.order())
    assert late.asked.wait(5)
    began = time.monotonic()
    fetchers.put(prompt.order())
    found = {one.order.port: one for one in (outcome(fetchers), outcome(fetchers))}
    assert time.monotonic() - began < dfly.PEER_SILENCE_S, "it waited for the first one's silence to end"
    assert found[prompt.port].error is None and isinstance(found[late.port].error, dfly._Superseded)
    assert late.hung_up.wait(5)
    late.go_on.set()
    assert content(fetchers) == DATA and fetchers.store.complete
    late.close()
    prompt.close()


def test_who_is_asked_second_and_is_wrong_spoils_nothing_for_good(fetchers):
    first, wrong, right = Peer(FRAMED[:1000], FRAMED[1000:]), Peer(FRAMED[:-7] + b"x" * 7), Peer(FRAMED)
    order = first.order()
    fetchers.put(order)
    wait_until_newest(fetchers, order)
    fetchers.put(wrong.order())
    errors = {one.order.port: one.error for one in (outcome(fetchers), outcome(fetchers))}
    assert isinstance(errors[wrong.port], dfly.WrongBytes) and isinstance(errors[first.port], dfly._Superseded)
    assert not fetchers.store.have
    fetchers.put(right.order())
    assert outcome(fetchers).error is None and content(fetchers) == DATA
    for peer in (first, wrong, right):
        peer.close()


def test_who_drips_does_not_keep_a_thread_for_long(fetchers):
    drip, began = Peer(FRAMED, drips=True), time.monotonic()
    fetchers.put(drip.order())
    found = outcome(fetchers, 15)
    assert isinstance(found.error, dfly.TimedOut) and time.monotonic() - began < 2 * dfly.PEER_SILENCE_S
    drip.close()


def held_up(function, before):
    """Return what says that a function was called for the first time, what lets that call go on, and the function, held up so before or
    behind what it does."""
    called, go_on = threading.Event(), threading.Event()

    def slow(*args, **how):
        first = not called.is_set()
        found = None if before else function(*args, **how)
        called.set()
        if first:
            go_on.wait(10)
        return function(*args, **how) if before else found
    return called, go_on, slow


class Door:
    """A lock that says when somebody comes to it."""

    def __init__(self, lock):
        self._lock, self.knocked = lock, threading.Event()

    def __enter__(self):
        self.knocked.set()
        self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()


def overtaken(fetchers, held, door=lambda lock: lock):
    """Fetch a piece from a peer, wait until that is held up, have another one with wrong bytes take it over; return both peers."""
    right, wrong = Peer(FRAMED), Peer(b"\xff" * len(FRAMED))
    fetchers.put(right.order())
    assert held.wait(5)
    fetchers._claims[0].writing = door(fetchers._claims[0].writing)
    order = wrong.order()
    fetchers.put(order)
    wait_until_newest(fetchers, order)
    return right, wrong


def test_a_piece_that_another_takes_over_before_it_is_declared_right_is_not_said_to_be_here(fetchers):
    store = fetchers.store
    digesting, go_on, store.digest = held_up(store.digest, before=False)
    right, wrong = overtaken(fetchers, digesting)
    go_on.set()
    found = {one.order.port: one.error for one in (outcome(fetchers), outcome(fetchers))}
    assert isinstance(found[wrong.port], dfly.WrongBytes) and not store.have
    assert isinstance(found[right.port], dfly._Superseded), "the supernode would never hand it out again"
    right.close()
    wrong.close()


def test_nobody_writes_over_a_piece_that_is_declared_right_just_now(fetchers):
    store = fetchers.store
    sealing, go_on, store.seal_piece = held_up(store.seal_piece, before=True)
    right, wrong = overtaken(fetchers, sealing, Door)
    assert fetchers._claims[0].writing.knocked.wait(5), "it would write now"
    go_on.set()
    found = {one.order.port: one.error for one in (outcome(fetchers), outcome(fetchers))}
    assert found[right.port] is None and isinstance(found[wrong.port], dfly._Superseded)
    assert store.complete and content(fetchers) == DATA
    right.close()
    wrong.close()


@pytest.mark.parametrize("cut", [0, 3, 4, 5, 70000, len(FRAMED) - 1])
def test_a_piece_that_ends_too_early_is_a_failure_of_its_peer(fetchers, cut):
    short = Peer(FRAMED[:cut])
    fetchers.put(short.order())
    found = outcome(fetchers)
    assert isinstance(found.error, dfly.NetworkError) and not fetchers.store.have
    short.close()


def test_an_old_piece_is_checked_with_its_wrapper(fetchers):
    md5 = "%s:%d" % (hashlib.md5(FRAMED).hexdigest(), len(FRAMED))
    for framed, kind in ((b"\0" + FRAMED[1:], dfly.WrongBytes), (FRAMED[:-1] + b"\0", dfly.WrongBytes), (FRAMED, type(None))):
        peer = Peer(framed)
        fetchers.put(peer.order(md5))
        assert isinstance(outcome(fetchers).error, kind)
        peer.close()
    assert content(fetchers) == DATA and fetchers.store.seal(0) == dfly.Seal(DIGEST[7:], len(DATA))
