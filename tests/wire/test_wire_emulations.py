"""The emulations against each other: what they are worth as yardsticks, and their faults reproduced."""
import hashlib

import old_dfget
import pytest
from rawhttp import talk

MIB = 1 << 20


@pytest.mark.parametrize("client", ["py", "go"])
@pytest.mark.parametrize("node", ["sn1", "jsn"])
def test_an_old_client_downloads_through_an_old_supernode(old, origin, blob, client, node):
    data = blob(9 * MIB)
    url = origin.put("f.bin", data)
    result = old.get(client, old.node(node), url, check=data)
    assert len(result.pieces) == 3


@pytest.mark.parametrize("node", ["sn1", "jsn"])
def test_old_clients_of_both_generations_serve_each_other(old, origin, blob, node):
    data = blob(13 * MIB)
    url = origin.put("f.bin", data)
    supernode = old.node(node, slow_s=0.1)
    running = [old.start(kind, supernode, url) for kind in ("py", "go", "py", "go")]
    results = [old.good(r.result(), data) for r in running]
    assert any("cdnnode" not in piece.cid for r in results for piece in r.pieces)


def test_the_source_pattern_of_supernode_1_0_6(old, origin, blob):
    data = blob(5 * MIB)
    old.get("go", old.node("sn1", cdn_pattern="source"), origin.put("f.bin", data), check=data)


def test_a_go_client_fails_the_last_piece_of_a_py_peer(old, origin, blob):
    """Fault 21, as the emulations have it."""
    data = blob(5 * MIB)
    url = origin.put("f.bin", data)
    supernode = old.node("sn1")
    old.get("py", supernode, url, check=data)
    result = old.get("go", supernode, url, check=data)
    assert any("unexpected EOF" in text for text in result.client.failures)


@pytest.mark.parametrize("client, answer, why", [
    ("go", {"code": 200}, "nil dereference"), ("go", {"code": 200, "data": None}, "nil dereference")])
def test_a_register_without_data_crashes_dfget_1_0_6(old, client, answer, why):
    with pytest.raises(old_dfget.OldClientBroke, match=why):
        old.get(client, old.node("fake", b"x", script={"register": [answer]}), "http://127.0.0.1:9/x")


@pytest.mark.parametrize("client, answer, why", [
    ("go", {"code": 600}, "panic"), ("py", {"code": 600}, "without data"), ("go", {"code": 601}, "idles"),
    ("go", {"code": 601, "data": []}, "idles"), ("py", {"code": 601, "data": []}, "idles"), ("go", {"code": 603}, "idles"),
    ("go", {"code": 600, "data": {"md5": "", "fileLength": 6}}, "too early")])
def test_pull_answers_that_break_an_old_client(old, client, answer, why):
    with pytest.raises(old_dfget.OldClientBroke, match=why):
        old.get(client, old.node("fake", b"x", script={"pull": [answer]}), "http://127.0.0.1:9/x")


def test_a_downlink_in_quotes_makes_dfget_1_0_6_drop_the_list(old):
    def quoted(request, honest):
        status, answer = honest()
        for task in answer.get("data") or ():
            task["downLink"] = "20480"
        return answer
    with pytest.raises(old_dfget.OldClientBroke, match="downLink"):
        old.get("go", old.node("fake", b"x", script={"pull": [quoted]}), "http://127.0.0.1:9/x")


def test_an_empty_file_stalls_the_second_client_of_supernode_1_0_6(old, origin):
    """Fault 14."""
    url = origin.put("empty", b"")
    supernode = old.node("sn1")
    old.get("go", supernode, url, check=b"")
    with pytest.raises(old_dfget.OldClientBroke, match="hung"):
        old.get("go", supernode, url, patience_s=2)


TABLE = [("bytes=0-4194303", "0", 206, 4194304, "043ffffb"), ("bytes=8388608-12582911", "2", 206, 1611407, "0418968a"),
         ("bytes=8388608-10000014", "2", 206, 1611407, "0418968a"), ("bytes=0-4", "0", 206, 5, "04000000"),
         ("bytes=0-3", "0", 416, None, None), ("bytes=0-4194303", "1", 416, None, None),
         ("bytes=12582912-16777215", "3", 206, 5, "ffd8968f"), ("bytes=0-4", "", 400, None, None),
         ("bytes=0-0", "0", 400, None, None), ("bytes=0-", "0", 400, None, None), ("bytes=5-1", "0", 400, None, None),
         ("0-4", "0", 400, None, None)]


def test_the_emulated_go_uploader_answers_as_the_table_says(old, blob):
    """Wire: 7.6, the captured answers for a 10,000,000-byte file."""
    uploader = old_dfget.GoUploader("127.0.0.9")
    old.uploaders.append(uploader)
    with open(uploader.service_path("f"), "wb") as out:
        out.write(blob(10000000))
    uploader.tasks["f"] = {}
    for range_, num, status, length, head in TABLE:
        request = "GET /peer/file/f HTTP/1.1\r\nHost: x\r\nPiecenum: %s\r\nPiecesize: 4194304\r\nRange: %s\r\n\r\n" % (num, range_)
        reply = talk((uploader.ip, uploader.port), request.encode("ascii"))
        assert reply.status == status, range_
        if length:
            assert (len(reply.body), reply.body[:4].hex(), reply.body[-1:]) == (length, head, b"\x7f"), range_
    request = b"GET /peer/file/none HTTP/1.1\r\nHost: x\r\nPiecenum: 0\r\nPiecesize: 4194304\r\nRange: bytes=0-4\r\n\r\n"
    assert talk((uploader.ip, uploader.port), request).status == 500


def test_the_captured_piece_of_an_empty_file():
    """Wire: 5.1"""
    assert hashlib.md5(old_dfget.wrap(b"", 4 * MIB)).hexdigest() == "d6991051769098273e82477afd2bb93e"
    assert old_dfget.wrap(b"x" * 25, 4 * MIB)[:4].hex() == "04000019"
