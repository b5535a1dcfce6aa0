"""Our uploader as old clients see it.  Wire: 7"""
import json
import os
import struct

import hand as hands
import pytest
from rawhttp import Pool, talk
from world import wait_for

MIB = 1 << 20
SIZE = 10000000
PIECE = 4194304


@pytest.fixture
def served(old, host, origin, blob):
    """A finished download through a 1.0.6 supernode: (data, address, path) of what our uploader serves."""
    data = blob(SIZE)
    node = old.node("sn1")
    host("a").get(origin.put("f.bin", data), node=node.node, ip="127.0.0.101", check=data)
    fields = json.loads(next(r for r in node.log if r.path == "/peer/registry").body.decode("utf-8"))
    assert 15000 <= fields["port"] <= 65000 and fields["path"].startswith("/peer/file/")
    return data, (fields["ip"], fields["port"]), fields["path"]


def ask(address, path, range_, num, size=PIECE, more=""):
    """One request as 1.0.6 sends it; return the Reply."""
    lines = "".join("%s: %s\r\n" % pair for pair in (("Piecenum", num), ("Piecesize", size), ("Range", range_)) if pair[1] is not None)
    request = "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: dfget/1.0.6\r\n%s%s\r\n" % (path, address[0], address[1], more, lines)
    return talk(address, request.encode("latin-1"))


def test_the_table_of_7_6(served):
    data, address, path = served
    for range_, num, start, length, head in (("bytes=0-4194303", 0, 0, 4194304, "043ffffb"), ("bytes=4194304-8388607", 1, 4194299, 4194304, "043ffffb"),
                                             ("bytes=8388608-12582911", 2, 8388598, 1611407, "0418968a"),
                                             ("bytes=8388608-10000014", 2, 8388598, 1611407, "0418968a"), ("bytes=0-4", 0, 0, 5, "04000000")):
        reply = ask(address, path, range_, num)
        assert reply.status == 206, (range_, reply.body[:100])
        assert len(reply.body) == length == int(reply.headers["content-length"]), range_
        assert reply.body[:4].hex() == head and reply.body[-1:] == b"\x7f", range_
        assert reply.body[4:-1] == data[start:start + length - 5], range_
        assert reply.headers["content-type"] == "application/octet-stream"
        assert "content-range" not in reply.headers


def test_what_can_not_be_satisfied(served):
    _data, address, path = served
    for range_, num in (("bytes=0-3", 0), ("bytes=0-4194303", 1)):
        assert ask(address, path, range_, num).status == 416, range_
    reply = ask(address, path, "bytes=12582912-16777215", 3)
    assert reply.status == 416, "1.0.6 answers 206 with garbage past the end; ours must not"


BAD = [("bytes=0-4194303", None, PIECE), ("bytes=0-4194303", "x", PIECE), ("bytes=0-4194303", "", PIECE), ("bytes=0-4194303", 0, None),
       ("bytes=0-4194303", 0, "x"), ("bytes=0-0", 0, PIECE), ("bytes=0-", 0, PIECE), ("bytes=5-1", 0, PIECE), ("0-4194303", 0, PIECE), (None, 0, PIECE),
       ("bytes=a-b", 0, PIECE), ("bytes=-5", 0, PIECE), ("bytes=0-9-9", 0, PIECE)]


def test_bad_requests_get_400(served):
    _data, address, path = served
    for range_, num, size in BAD:
        assert ask(address, path, range_, num, size).status == 400, (range_, num, size)


HUGE = [("bytes=0-4194303", -1, PIECE), ("bytes=0-4194303", 0, -1), ("bytes=0-4194303", 0, 2 ** 31), ("bytes=0-4194303", 0, 2 ** 70),
        ("bytes=0-%d" % 2 ** 70, 0, PIECE), ("bytes=%d-%d" % (2 ** 69, 2 ** 70), 0, PIECE), ("bytes=0-4194303", 2 ** 70, PIECE),
        ("bytes=0-99999999999", 0, PIECE), ("bytes=0-4194303", 0, 0)]


def test_numbers_that_are_too_large_or_negative(served):
    data, address, path = served
    for range_, num, size in HUGE:
        reply = ask(address, path, range_, num, size)
        assert reply.status in (206, 400, 416), (range_, num, size, reply.status)
        if reply.status == 206:
            assert len(reply.body) == int(reply.headers["content-length"]) <= len(data) + 5
    assert ask(address, path, "bytes=0-4194303", 0).status == 206


def test_unknown_names_and_path_tricks(served):
    _data, address, _path = served
    for name in ("none", "", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "f.bin", "a/b", "x" * 5000):
        reply = ask(address, "/peer/file/" + name, "bytes=0-99", 0)
        assert 400 <= reply.status <= 500 and b"root:" not in reply.body and b"Traceback" not in reply.body, name


def test_the_source_pattern_serves_plain_bytes(served):
    """Wire: 5.4, 7.6"""
    data, address, path = served
    reply = ask(address, path, "bytes=4194304-8388607", 1, more="Cdnsource: source\r\n")
    assert (reply.status, reply.body) == (206, data[4194304:8388608])
    reply = ask(address, path, "bytes=8388608-12582911", 2, more="cdnSource: source\r\n")
    assert (reply.status, reply.body) == (206, data[8388608:])
    assert ask(address, path, "bytes=%d-%d" % (SIZE, SIZE + 9), 2, more="cdnSource: source\r\n").status == 416


def test_dfget_0_2_0_asks_with_its_own_headers(served):
    data, address, path = served
    request = ("GET %s HTTP/1.1\r\nHost: %s:%d\r\nConnection: keep-alive\r\nAccept-Encoding: gzip, deflate\r\nAccept: */*\r\nUser-Agent: python-requests/2.18.4\r\n"
               "pieceSize: 4194304\r\nRange: bytes=8388608-10000014\r\npieceNum: 2\r\n\r\n" % (path, address[0], address[1]))
    reply = talk(address, request.encode("ascii"))
    assert reply.status == 206 and "content-encoding" not in reply.headers
    assert reply.body == struct.pack(">I", 1611402 | PIECE << 4) + data[8388598:] + b"\x7f"


def test_other_piece_sizes_than_the_registered_one(served):
    """A peer of another supernode may cut the same file otherwise: head and bytes follow the request."""
    data, address, path = served
    size = 5 * MIB
    reply = ask(address, path, "bytes=%d-%d" % (size, 2 * size - 1), 1, size)
    assert reply.status == 206
    content = data[size - 5:2 * (size - 5)]
    assert reply.body == struct.pack(">I", len(content) | size << 4) + content + b"\x7f"


def test_one_connection_serves_many_pieces(served):
    data, address, path = served
    pool = Pool()
    for num in (0, 1, 2, 0, 2):
        request = "GET %s HTTP/1.1\r\nHost: x\r\nPiecenum: %d\r\nPiecesize: %d\r\nRange: bytes=%d-%d\r\n\r\n" % (path, num, PIECE, num * PIECE, (num + 1) * PIECE - 1)
        assert pool.send(address, request.encode("ascii")).status == 206
    assert pool.connections == 1
    pool.close()


def test_ping(served):
    """Wire: 7.5"""
    _data, address, _path = served
    reply = hands.fetch(address, "/server/ping")
    assert (reply.status, reply.body) == (200, b"success")


def test_control_calls_give_nobody_power(served, tmp_path):
    """Fault 5: anyone could read any *.service file.  (All callers are of this host here, so they may set its limit.)"""
    data, address, path = served
    (tmp_path / "secret.service").write_bytes(b"secret" * 100)
    for more in ("dataDir: %s\r\n" % tmp_path, 'param: {"dataDir": "%s/", "totalLimit": 0}\r\n' % tmp_path):
        hands.fetch(address, "/check/secret", more=more)
        hands.fetch(address, "/check/" + os.path.basename(path), more=more)
    reply = ask(address, "/peer/file/secret", "bytes=0-99", 0)
    assert reply.status >= 400 and b"secretsecret" not in reply.body
    reply = ask(address, path, "bytes=0-4194303", 0)
    assert reply.status == 206 and reply.body[4:-1] == data[:4194299]


def test_finish_calls_nobody(served, old):
    """Fault 3: superNode of /client/finish made the server call any host."""
    _data, address, path = served
    trap = old.node("fake", b"")
    name = os.path.basename(path)
    hands.fetch(address, "/client/finish?taskFileName=%s&taskID=x&cid=y&superNode=%s" % (name, trap.node))
    hands.fetch(address, "/client/finish?taskFileName=evil&taskID=x&cid=y&superNode=%s" % trap.node)
    assert not trap.log


def test_nonsense_leaves_the_server_well(served):
    _data, address, path = served
    for request in (b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200000 + b"\r\n\r\n",
                    b"POST /peer/file/x HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"):
        try:
            reply = talk(address, request)
            assert 400 <= reply.status < 600
        except (EOFError, OSError):
            continue
    assert ask(address, path, "bytes=0-4194303", 0).status == 206


def test_an_edited_output_is_not_served(served, world):
    """Fault 23: output and served file are one inode; whoever edits the output must not poison the swarm."""
    data, address, path = served
    out = world.hosts[0].path("out")
    with open(out, "r+b") as f:
        f.write(b"edited!")
    reply = ask(address, path, "bytes=0-4194303", 0)
    assert reply.status >= 400 or reply.body[4:-1] == data[:4194299]


def test_pieces_are_served_while_the_download_still_runs(old, host, origin, blob):
    """Checklist 15 (9)"""
    data = blob(9 * MIB)
    node = old.node("sn1", slow_s=1.5)
    command = host("a").start(origin.put("f.bin", data), node=node.node, ip="127.0.0.101")
    wait_for(lambda: node.count("/peer/piece/suc"), 20)
    fields = json.loads(next(r for r in node.log if r.path == "/peer/registry").body.decode("utf-8"))
    first = next(r for r in node.log if r.path == "/peer/piece/suc").query["pieceRange"]
    start = int(first.split("-")[0])
    reply = ask((fields["ip"], fields["port"]), fields["path"], "bytes=" + first, start // PIECE)
    assert command.running(), "too late to tell"
    assert reply.status == 206 and reply.body[4:-1] == data[start // PIECE * (PIECE - 5):][:PIECE - 5]
    missing = ask((fields["ip"], fields["port"]), fields["path"], "bytes=8388608-12582911", 2)
    assert missing.status >= 400 or missing.body[4:-1] == data[2 * (PIECE - 5):], "a hole was served as data"
    assert command.wait().data == data
