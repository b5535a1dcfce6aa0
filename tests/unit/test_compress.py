"""Sections 5 to 7: what a link does, which pieces it pays to compress, and how they are sent and read."""
import hashlib
import os
import random
import sys
import threading
import zlib

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402

SIZE = 256 << 10
TEXT = b"".join(b"line %d of a log: status=%d\n" % (i, i % 7) for i in range(SIZE // 20))[:SIZE]
NOISE = random.Random(1).getrandbits(8 * SIZE).to_bytes(SIZE, "little")


@pytest.mark.parametrize("ratio, pace, rate, size, expected", [
    (0.3, 60e6, 2.5e6, SIZE, True),       # 20 Mbit/s
    (0.3, 60e6, 12.5e6, SIZE, True),      # 100 Mbit/s
    (0.3, 60e6, 22.5e6, SIZE, False),     # 180 Mbit/s: it would take more than half of what it saves
    (0.3, 60e6, 125e6, SIZE, False),
    (0.0, 60e6, 1250e6, SIZE, False),
    (0.79, 60e6, 2.5e6, SIZE, True),
    (0.8, 60e6, 1.0, SIZE, False),        # it hardly shrinks, however slow the link
    (1.0003, 60e6, 1.0, SIZE, False),
    (0.3, 2e6, 2.5e6, SIZE, False),       # a slow processor
    (0.3, 2e6, 0.5e6, SIZE, True),
    (0.3, 8e6, 1e5, 15 << 20, False),     # two seconds of silence
    (0.3, 60e6, 2.5e6, 15 << 20, True),
    (0.3, 60e6, 2.5e6, 1000, False),      # one packet is one packet
    (0.3, 60e6, 2.5e6, 0, False),
])
def test_compression_pays_where_it_takes_half_the_time_that_it_saves(ratio, pace, rate, size, expected):
    assert dfly.pays(ratio, pace, rate, size) is expected


class Clock:
    """A clock that goes on by `step` seconds whenever it is looked at."""

    def __init__(self, step=0.0):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def test_a_meter_counts_the_time_in_which_bytes_are_awaited():
    clock = Clock()
    meter = dfly.Meter(clock)
    with meter:
        clock.now += 0.2
        meter.add(1000)
        assert meter.rate == 0, "too early to tell"
        with meter:
            clock.now += 0.8
            meter.add(1000)
        clock.now += 1.0
        meter.add(2000)
    assert meter.rate == 2000
    clock.now += 100.0  # nobody waits for anything
    assert meter.rate == 2000
    with meter:
        for _ in range(20):
            clock.now += 1.0
            meter.add(500)
    assert 500 <= meter.rate < 520, "what was is forgotten"


class Piece:
    """A piece in a file, and the squeezer's view of it."""

    def __init__(self, folder, data):
        self.path = str(folder / hashlib.sha256(data).hexdigest())
        with open(self.path, "wb") as file:
            file.write(data)
        self.fd = os.open(self.path, os.O_RDONLY)
        self.seal = dfly.Seal(hashlib.sha256(data).hexdigest(), len(data))
        self.parts = [b"head", (self.fd, 0, len(data)), b"\x7f"]
        self.wrapped = b"head" + data + b"\x7f"


@pytest.fixture
def piece(tmp_path):
    """`piece(data)`: a Piece."""
    pieces = []

    def make(data):
        pieces.append(Piece(tmp_path, data))
        return pieces[-1]
    yield make
    for each in pieces:
        os.close(each.fd)


def squeezer(most_bytes=1 << 20, processors=2):
    """A Squeezer for which this machine is always equally fast."""
    made = dfly.Squeezer(most_bytes, Clock(0.001))
    made._most = processors
    return made


def test_a_piece_that_shrinks_is_compressed_once(piece):
    text, squeeze = piece(TEXT), squeezer()
    assert squeeze.kept(b"head", text.seal) is None and squeeze.promising("t", text.seal, 10 ** 6)
    packed = squeeze.pack("t", text.seal, text.parts, 10 ** 6)
    assert zlib.decompress(packed) == text.wrapped and len(packed) < 0.5 * SIZE
    assert squeeze.kept(b"head", text.seal) is packed and squeeze.pack("t", text.seal, text.parts, 10 ** 6) is packed
    assert squeeze.samples == 1 and squeeze.saved_bytes == 3 * (SIZE - len(packed))


def test_what_does_not_shrink_costs_one_sample_in_sixteen_pieces(piece):
    noise, squeeze = piece(NOISE), squeezer()
    for _ in range(64):
        if squeeze.promising("t", noise.seal, 10 ** 6):
            assert squeeze.pack("t", noise.seal, noise.parts, 10 ** 6) is None
    assert squeeze.samples == 4
    text = piece(TEXT)
    assert squeeze.promising("other", text.seal, 10 ** 6), "each task has its own"


def test_a_head_that_shrinks_says_nothing_about_the_rest(piece):
    squeeze, mixed = squeezer(), piece(TEXT[:SIZE // 8] + NOISE[SIZE // 8:])
    assert squeeze.pack("t", mixed.seal, mixed.parts, 10 ** 6) is None


def test_nothing_is_read_for_a_link_that_is_too_fast(piece):
    text, squeeze = piece(TEXT), squeezer()
    assert not squeeze.promising("t", text.seal, 10 ** 9) and squeeze.samples == 0


def test_a_machine_that_was_slow_for_a_while_is_tried_again(piece):
    text, squeeze = piece(TEXT), squeezer()
    squeeze._clock.step = 1.0  # seconds for a piece
    for _ in range(30):
        squeeze.pack("t", piece(TEXT + os.urandom(4)).seal, text.parts, 10 ** 6)
    assert not squeeze.promising("t", text.seal, 10 ** 6)
    assert any(squeeze.promising("t", text.seal, 10 ** 6) for _ in range(200))


def test_all_processors_busy_means_plain_but_for_who_waits_for_the_same_piece(piece, monkeypatch):
    text, other, squeeze = piece(TEXT), piece(TEXT[::-1]), squeezer(processors=1)
    begun, go, found = threading.Event(), threading.Event(), []
    pack = squeeze._pack

    def slow(*how):
        begun.set()
        assert go.wait(20)
        return pack(*how)
    monkeypatch.setattr(squeeze, "_pack", slow)
    threads = [threading.Thread(target=lambda: found.append(squeeze.pack("t", text.seal, text.parts, 10 ** 6))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    assert squeeze.pack("t", other.seal, other.parts, 10 ** 6) is None
    monkeypatch.setattr(squeeze._making[b"head", text.seal.sha256], "wait", lambda _limit_s: go.set() or threads[0].join(20))
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2 and found[0] is found[1] is not None


def test_compressed_pieces_take_no_more_memory_than_they_may(piece):
    squeeze, pieces = squeezer(most_bytes=200 << 10), [piece(TEXT[i:] + TEXT[:i]) for i in range(0, 20000, 2000)]
    for each in pieces:
        assert squeeze.pack("t", each.seal, each.parts, 10 ** 6)
    kept = [squeeze.kept(b"head", each.seal) for each in pieces]
    assert sum(len(packed) for packed in kept if packed) <= 200 << 10
    assert kept[-1] is not None and kept[0] is None


def test_a_piece_that_is_damaged_on_the_disk_is_never_kept(piece):
    text, squeeze = piece(TEXT), squeezer()
    with open(text.path, "r+b") as file:
        file.write(b"X")
    assert squeeze.pack("t", text.seal, text.parts, 10 ** 6) is None and squeeze.kept(b"head", text.seal) is None


# -- on the wire ---------------------------------------------------------------------------------------

@pytest.fixture
def answer():
    """`answer(body)`: the Reply to a request that is answered with these deflated bytes."""
    servers, links = [], []

    def ask(body):
        class Application:
            @staticmethod
            def body(_request):
                return dfly.Response(206, dfly.ByteSpan(body))
        servers.append(dfly.Server(dfly.listen("127.0.0.1", 0), [dfly.Route("GET", "/", "body")], Application(), dfly.Log(), "test"))
        servers[-1].start()
        links.append(dfly.HttpLink(*servers[-1].address))
        links[-1].send("GET", "/")
        return links[-1].reply()
    yield ask
    for link in links:
        link.close()
    for server in servers:
        server.stop()


def read(reply, length, most):
    """Read an inflated body of `length` bytes, `most` at a time."""
    reply.inflate(length)
    data, view = b"", memoryview(bytearray(most))
    while len(data) < length:
        before, count = reply.taken, reply.read_into(view[:length - len(data)])
        assert count or reply.taken > before, "cut short"
        data += bytes(view[:count])
    reply.end_inflated()
    return data


@pytest.mark.parametrize("data", [TEXT, TEXT + NOISE, b"\0" * (4 << 20)], ids=["text", "mixed", "zeros"])
@pytest.mark.parametrize("most", [997, 1 << 18])
def test_a_deflated_body_is_read_as_what_it_was(answer, data, most):
    packed = zlib.compress(data, 1)
    reply = answer(packed)
    assert read(reply, len(data), most) == data
    assert reply.reusable and reply.taken == len(packed)


BAD = {"garbage": NOISE[:5000], "a bomb": zlib.compress(TEXT + b"\0" * (64 << 20)), "one byte more": zlib.compress(TEXT + b"x"),
       "one byte less": zlib.compress(TEXT[:-1]), "junk behind it": zlib.compress(TEXT) + b"junk", "much junk behind it": zlib.compress(TEXT) + NOISE[:9999],
       "no end": zlib.compress(TEXT)[:-4], "a wrong check": zlib.compress(TEXT)[:-4] + b"abcd", "longer than plain": zlib.compress(NOISE * 2, 0)}


@pytest.mark.parametrize("what", sorted(BAD))
def test_a_deflated_body_that_is_not_what_it_must_be_is_an_error(answer, what):
    reply = answer(BAD[what])
    with pytest.raises(zlib.error):
        read(reply, SIZE, 1 << 18)
