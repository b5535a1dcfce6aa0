"""The piece port of our supernode: a static file server as far as old clients can see.  Wire: 5"""
import hashlib
import mmap
import os
import socket

import dfly
import hand as hands
import pytest
from rawhttp import Pool
from world import descriptors, wait_for

MIB = 1 << 20


@pytest.fixture
def ready(supernode, hand, origin, blob):
    """A task of 2 MiB + 25 bytes that is complete on the supernode: (client, wrapped file, address, path)."""
    data = blob(2 * MIB + 25)
    client = hand(supernode())
    client.join(origin.put("f.bin", data))
    got, _finish, seen = client.finish()
    task = seen[0]
    return client, b"".join(got[n] for n in sorted(got)), (task["peerIp"], task["peerPort"]), task["path"]


def test_ranges_in_wrapped_coordinates(ready):
    client, whole, address, path = ready
    size, total = client.data["pieceSize"], len(whole)
    for start, end in ((0, size - 1), (0, 0), (0, 3), (size - 1, size), (5, 3 * size), (size, 2 * size - 1), (total - 1, total - 1), (total - 30, total - 1),
                       (0, total - 1), (3, total - 3)):
        reply = hands.fetch(address, path, "bytes=%d-%d" % (start, end))
        assert reply.status == 206, (start, end)
        assert reply.body == whole[start:end + 1], (start, end)
        assert reply.headers["content-range"] == "bytes %d-%d/%d" % (start, end, total)
        assert "content-encoding" not in reply.headers


def test_a_reader_of_a_whole_file_costs_few_descriptors(supernode, hand, origin, blob):
    """Not one a piece: a hundred slow readers would have them all."""
    node = supernode()
    client = hand(node)
    client.join(origin.put("f.bin", blob(24 * MIB)))
    got, _finish, seen = client.finish()
    before = descriptors(node.pid)
    with socket.create_connection((seen[0]["peerIp"], seen[0]["peerPort"]), 20) as reader:
        reader.sendall(("GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % seen[0]["path"]).encode())
        assert reader.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        assert len(got) > 90 and descriptors(node.pid) <= before + 4


def test_the_last_range_is_clipped(ready):
    """dfget 1.0.6 asks for the full piece."""
    client, whole, address, path = ready
    size, total = client.data["pieceSize"], len(whole)
    last = (total - 1) // size * size
    for end in (last + size - 1, total, total + 5, last + 100 * size):
        reply = hands.fetch(address, path, "bytes=%d-%d" % (last, end))
        assert (reply.status, reply.body) == (206, whole[last:])
        assert reply.headers["content-range"] == "bytes %d-%d/%d" % (last, total - 1, total)


def test_a_range_past_the_end_gets_416(ready):
    client, whole, address, path = ready
    for start in (len(whole), len(whole) + 1, len(whole) * 5, 10 ** 15):
        reply = hands.fetch(address, path, "bytes=%d-%d" % (start, start + client.data["pieceSize"] - 1))
        assert reply.status == 416
        assert reply.headers["content-range"] == "bytes */%d" % len(whole)


def test_the_whole_file_without_a_range(ready):
    _client, whole, address, path = ready
    reply = hands.fetch(address, path)
    assert (reply.status, reply.body) == (200, whole)
    assert hashlib.md5(reply.body).digest() == hashlib.md5(whole).digest()


def test_head_says_the_length_and_sends_nothing(ready):
    _client, whole, address, path = ready
    pool = Pool()
    reply = pool.send(address, ("HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n" % path).encode("ascii"), "HEAD")
    if reply.status == 200:
        assert int(reply.headers["content-length"]) == len(whole)
    else:
        assert reply.status in (404, 405, 501)
    assert pool.send(address, ("GET %s HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\n\r\n" % path).encode("ascii")).body == whole[:10]
    pool.close()


@pytest.mark.parametrize("range_", ["bytes=5-1", "bytes=", "bytes=-", "bytes=a-b", "items=0-5", "0-5", "bytes=--5", "bytes=0-5,7-9", "bytes=1e3-2e3"])
def test_odd_ranges_get_the_whole_file_or_an_error(ready, range_):
    """As RFC 9110 lets a server choose; never wrong bytes under 206."""
    _client, whole, address, path = ready
    reply = hands.fetch(address, path, range_)
    assert reply.status in (200, 400, 416) or (reply.status == 206 and "multipart" in reply.headers.get("content-type", "")), reply.status
    if reply.status == 200:
        assert reply.body == whole


def test_an_open_range(ready):
    _client, whole, address, path = ready
    reply = hands.fetch(address, path, "bytes=10-")
    assert (reply.status, reply.body) == (206, whole[10:])


@pytest.mark.parametrize("path", ["/download/abc/" + "0" * 64, "/download/", "/", "/download/../../../etc/passwd", "/download/%2e%2e/%2e%2e/etc/passwd",
                                  "/etc/passwd", "//etc/passwd", "/download/abc/..%2f..%2fmeta"])
def test_unknown_files_get_404(ready, path):
    _client, _whole, address, _path = ready
    reply = hands.fetch(address, path, "bytes=0-9")
    assert 400 <= reply.status < 500 and b"root:" not in reply.body
    if path.startswith("/download/abc/0"):
        assert reply.status == 404


def test_header_names_in_any_case(ready):
    _client, whole, address, path = ready
    from rawhttp import talk
    for name in ("range", "RANGE", "rAnGe"):
        reply = talk(address, ("GET %s HTTP/1.1\r\nhost: x\r\n%s: bytes=0-99\r\n\r\n" % (path, name)).encode("ascii"))
        assert (reply.status, reply.body) == (206, whole[:100])


def test_a_piece_that_is_not_there_yet_never_arrives_wrong(supernode, hand, origin, blob):
    """A static server would serve what is on disk; ours must not serve holes."""
    data = blob(3 * MIB)
    url = origin.put("f.bin", data, stall_after=MIB)
    client = hand(supernode())
    size = client.join(url)["pieceSize"]
    task = client.start()["data"][0]
    last = len(data) // (size - 5) * size
    reply = hands.fetch((task["peerIp"], task["peerPort"]), task["path"], "bytes=%d-%d" % (last, last + size - 1))
    assert reply.status in (404, 416, 503), reply.status
    origin.release("f.bin")
    got, _finish, _seen = client.finish()
    assert hands.unwrapped(got) == data


def test_pieces_are_handed_out_long_before_the_file_is_complete(supernode, hand, origin, blob):
    """Wire: 10.2"""
    data = blob(3 * MIB)
    client = hand(supernode())
    client.join(origin.put("f.bin", data, stall_after=2 * MIB))
    answer = client.start()
    assert answer["code"] == 601
    assert hands.piece_body(client.fetch(answer["data"][0]), answer["data"][0])
    assert wait_for(lambda: client.pull()["code"], 5) in (601, 602)
    origin.release("f.bin")


@pytest.mark.parametrize("more", [b"", b"x"])
@pytest.mark.parametrize("stride", [1, 2])
def test_files_that_end_on_the_edge_of_a_piece(supernode, hand, origin, blob, stride, more):
    """Wire: 5.1"""
    node = supernode()
    probe = hand(node)
    size = probe.join(origin.put("probe.bin", blob(700000)))["pieceSize"]
    data = blob(stride * (size - 5)) + more
    client = hand(node)
    assert client.join(origin.put("f.bin", data))["pieceSize"] == size
    got, finish, _seen = client.finish()
    assert len(got) == stride + len(more)
    assert hands.unwrapped(got) == data
    assert finish["fileLength"] == len(data) + 5 * len(got)


def test_an_empty_file_for_two_clients_in_a_row(supernode, hand, origin):
    """Wire: 5.1; fault 14"""
    url = origin.put("empty", b"")
    node = supernode()
    for _ in range(2):
        client = hand(node)
        data = client.join(url)
        assert data["fileLength"] == 0
        got, finish, seen = client.finish()
        assert list(got) == [0] and len(got[0]) == 5 and got[0][-1:] == b"\x7f" and got[0][1:4] == bytes([data["pieceSize"] >> 12 & 255, data["pieceSize"] >> 4 & 255, 0])
        assert seen[0]["range"] == "0-4" or seen[0]["range"] == "0-%d" % (data["pieceSize"] - 1)
        assert finish["md5"] in ("", hands.EMPTY_MD5) and finish["fileLength"] == 5


def test_a_file_of_unknown_length(supernode, hand, origin, blob):
    """Wire: 6"""
    data = blob(3 * MIB)
    client = hand(supernode())
    assert client.join(origin.put("f.bin", data, length=False))["fileLength"] in (-1, len(data))
    got, finish, _seen = client.finish()
    assert hands.unwrapped(got) == data
    assert finish["fileLength"] == len(data) + 5 * len(got)


def test_the_piece_size_stays_the_same_for_a_task(supernode, hand, origin, blob):
    """Checklist 14 (4), also when the length turns out later."""
    url = origin.put("f.bin", blob(6 * MIB), length=False, rate=2 * MIB)
    node = supernode()
    first = hand(node)
    size = first.join(url)["pieceSize"]
    first.finish(limit_s=60)
    assert hand(node).join(url)["pieceSize"] == size


def test_a_piece_beyond_4_gib_is_where_its_numbers_say(world, supernode, hand, origin):
    """Checklist 14 (15): what an old client is told of it, and gets.  The supernode has it from an earlier run."""
    length = (5 << 30) + 25
    last = os.urandom(25)
    with open(os.path.join(world.root, "sparse"), "w+b") as file:
        file.truncate(length)
        file.seek(length - len(last))
        file.write(last)
        file.flush()
        url = origin.put("f.bin", mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), tag='"big"', last_modified=False, rate=MIB)
    task, home = dfly.task_id_of(url), os.path.join(world.root, "home")
    path = os.path.join(home, "repo", "download", task[:3], task)
    os.makedirs(os.path.dirname(path))
    store = dfly.TaskFile.create(path, path + ".journal", {"task": task, "url": url, "version": '"big"||%d' % length}, length, dfly.choose_piece_size(length))
    num = store.layout.count - 1
    offset, size = store.layout.content_range(num)
    with open(os.path.join(world.root, "sparse"), "rb") as file:
        file.seek(offset)
        content = file.read(size)
    store.write(offset, content)
    store.seal_piece(num, store.digest(num, size))
    store.close()
    client = hand(supernode(home=home))
    assert client.join(url)["fileLength"] == length
    piece = client.start()["data"][0]
    assert piece["pieceNum"] == num and int(piece["range"].split("-")[0]) == num * piece["pieceSize"] > 1 << 32
    assert hands.piece_body(client.fetch(piece), piece)[4:-1] == content and content.endswith(last)
