"""Pieces that travel compressed: between our own programs, where the link is slow and a sample says that it pays."""
import glob
import os
import zlib

import dfly
import pytest
from world import MB, PIECE, ask, wait_for

TEXT = b"".join(b"2026-11-23T04:35:%02d INFO [queue.worker] job=%06d status=%d\n" % (i % 60, i * 7919 % 10 ** 6, i % 9)
                for i in range(6 * MB // 56))
SLOW = {"X-Dfly": "1 rate=100000", "Accept-Encoding": "deflate"}  # any machine compresses faster than that
PLAIN = {"as dfget asks": {}, "as curl asks": {"Accept-Encoding": "gzip, deflate"}, "ours of old": {"X-Dfly": "1"},
         "ours on a link that is not measured": {"X-Dfly": "1", "Accept-Encoding": "deflate"},
         "ours that does not take it": {"X-Dfly": SLOW["X-Dfly"]}, "ours on a fast link": dict(SLOW, **{"X-Dfly": "1 rate=10000000000"}),
         "nonsense": dict(SLOW, **{"X-Dfly": "1 rate=-1"}), "more nonsense": dict(SLOW, **{"X-Dfly": "1 rate=" + "9" * 40})}


def held(node, url, port):
    """Return a piece, as old clients are told of it, whose holder listens on `port`."""
    return next(piece for piece in list(node.old_client(url, "127.0.0.1-%d-1795408506.429" % os.getpid())) if piece["peerPort"] == port)


def fetch(piece, headers):
    """Ask for a piece; return the Answer."""
    answer = ask((piece["peerIp"], piece["peerPort"]), "GET", piece["path"], headers=dict(headers, **{
        "Range": "bytes=" + piece["range"], "pieceNum": str(piece["pieceNum"]), "pieceSize": str(piece["pieceSize"])}))
    assert answer.status == 206 and int(answer.headers["content-length"]) == len(answer.body)
    return answer


def wrapped(data, piece):
    """Return a piece as it travels plain."""
    num, size = piece["pieceNum"], piece["pieceSize"]
    plain = data[num * (size - 5):(num + 1) * (size - 5)]
    return (len(plain) | size << 4).to_bytes(4, "big") + plain + b"\x7f"


def sees_only_what_is_for_it(piece, data):
    """Assert what each kind of client gets of a text from a holder that compresses."""
    for who, headers in sorted(PLAIN.items()):
        answer = fetch(piece, headers)
        assert "content-encoding" not in answer.headers and answer.body == wrapped(data, piece), who
    for _ in range(2):  # made, and kept
        answer = fetch(piece, SLOW)
        assert answer.headers["content-encoding"] == "deflate" and len(answer.body) < 0.4 * PIECE
        assert zlib.decompress(answer.body) == wrapped(data, piece)
    assert fetch(piece, {}).body == wrapped(data, piece)


def test_a_supernode_compresses_for_our_own_on_slow_links_only(origin, supernode):
    node = supernode()
    piece = held(node, origin.put("f", TEXT), node.cdn_port)
    sees_only_what_is_for_it(piece, TEXT)
    saved = node.metrics()["dfly_saved_bytes_total"]
    assert saved == 2 * (len(wrapped(TEXT, piece)) - 5 - len(fetch(piece, SLOW).body))


def test_an_uploader_compresses_for_our_own_on_slow_links_only(origin, supernode, host):
    node, here = supernode(), host()
    url = origin.put("f", TEXT)
    here.get(url, check=TEXT)
    sees_only_what_is_for_it(held(node, url, here.uploader_address()[1]), TEXT)


def test_what_does_not_shrink_is_sent_as_it_is(origin, supernode, blob):
    node, data = supernode(), blob(MB)
    piece = held(node, origin.put("f", data), node.cdn_port)
    for _ in range(3):
        answer = fetch(piece, SLOW)
        assert "content-encoding" not in answer.headers and answer.body == wrapped(data, piece)


def test_compression_can_be_turned_off_at_either_end(world, origin, supernode, host, tmp_path):
    node, here, url = supernode("--compress", "off"), host(), origin.put("f", TEXT)
    conf = tmp_path / "dragonfly.conf"
    conf.write_text("[node]\naddress = %s\ncompress = off\n" % node.node)
    here.get(url, "--config", str(conf), check=TEXT)
    for piece in (held(node, origin.put("g", TEXT), node.cdn_port), held(node, url, here.uploader_address()[1])):
        assert fetch(piece, SLOW).body == wrapped(TEXT, piece)
    node = supernode()
    host().get(origin.put("h", TEXT), "--config", str(conf), "-s", "2M", node=node.node, check=TEXT)
    assert node.bytes_sent() >= len(TEXT), "whoever has it off does not ask for it"
    conf.write_text("[node]\ncompress = perhaps\n")
    result = world.run("get", "-u", url, "--config", str(conf))
    assert result.code == 2 and "perhaps" in result.out


def test_a_log_over_a_slow_link_takes_half_the_bytes_or_less(origin, supernode, host):
    """The limit is of bytes on the wire, so that it makes a slow link of this host's loopback."""
    node, url = supernode(), origin.put("f", TEXT)
    result = host().get(url, "-s", "1M", check=TEXT)
    assert node.bytes_sent() < 0.7 * len(TEXT), "of %d bytes; the first quarter of a second goes plain" % len(TEXT)
    assert result.shares["supernode"] == 100


def test_random_bytes_over_a_slow_link_go_as_they_are(origin, supernode, host, blob):
    node, data = supernode(), blob(4 * MB)
    host().get(origin.put("f", data), "-s", "2M", check=data)
    assert node.bytes_sent() >= len(data)
    assert node.metrics()["dfly_saved_bytes_total"] == 0


# -- holders that lie --------------------------------------------------------------------------------------

NOISE = os.urandom(PIECE // 2)
BODIES = {"garbage": NOISE, "a bomb": zlib.compress(b"\0" * (256 * MB)), "other bytes": zlib.compress(b"\xee" * PIECE),
          "too few bytes": zlib.compress(b"\xee" * (PIECE - 1)), "a body cut short": zlib.compress(NOISE)[:-9],
          "longer than the piece": zlib.compress(os.urandom(PIECE), 0), "something behind it": zlib.compress(b"\xee" * PIECE) + NOISE}


class Liar:
    """A host that registers as ours do, claims to have every piece, and answers for each with the same compressed body."""

    ROUTES = (dfly.Route("GET", "/peer/file/", "piece"),)

    def __init__(self, node, url, count, body):
        self.asked, self._body = 0, body
        self._server = dfly.Server(dfly.listen("127.0.0.1", 15000 + os.getpid() % 40000, 200), self.ROUTES, self, dfly.Log(), "liar")
        self._server.start()
        port = self._server.address[1]
        cid = "127.0.0.1-%d-1795408506.429" % port
        task = node.ask("POST", "/peer/registry", {"superNodeIp": node.ip, "rawUrl": url, "taskUrl": url, "cid": cid, "ip": "127.0.0.1",
                                                   "port": port, "path": "/peer/file/liar"}, {"X-Dfly": "1 "}).json["data"]["taskId"]
        node.ask("POST", "/peer/sync", {"task": task, "cid": cid, "have": "%x" % ((1 << count) - 1), "wait": 0})

    def piece(self, _request):
        """Answer for any piece."""
        self.asked += 1
        return dfly.Response(206, self._body, "application/octet-stream", [("Content-Encoding", "deflate")])

    def close(self):
        """End it."""
        self._server.stop()


@pytest.mark.parametrize("what", sorted(BODIES))
def test_a_compressed_body_that_is_not_the_piece_is_its_holders_failure(origin, supernode, host, blob, what):
    node, data = supernode(), blob(4 * MB)
    url = origin.put("f", data)
    list(node.old_client(url, "127.0.0.1-1-1795408506.429"))
    liar = Liar(node, url, -(-len(data) // (PIECE - 5)), BODIES[what])
    try:
        hosts = [host() for _ in range(3)]
        for here in hosts:
            assert here.get(url, "--notbs", check=data).reason == 0
        wait_for(lambda: 1 <= liar.asked <= 24, 1, "a liar is asked, but not often: %d times" % liar.asked)
    finally:
        liar.close()
    logs = "".join(open(path).read() for here in hosts for path in glob.glob(os.path.join(here.home, "logs", "*.log")))
    assert "from 127.0.0.1:" in logs and ": digest is " in logs
