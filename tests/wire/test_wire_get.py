"""Our get against old supernodes, honest and otherwise.  Wire: 15, 1.6, 3.5"""
import hashlib
import json

import hand as hands
import pytest
from old_supernode import GOOD
from world import bad, good, wait_for

MIB = 1 << 20


# -- honest ones -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sn1", "jsn"])
def test_get_downloads_through_an_old_supernode(old, host, origin, blob, kind):
    data = blob(9 * MIB)
    node = old.node(kind)
    result = host("a").get(origin.put("f.bin", data), node=node.node, check=data)
    assert result.reason == 0, result.out
    assert node.count("/peer/piece/suc") >= 3, "every piece frees a slot of 1.0.6"
    assert node.count("/peer/sync") <= 1


def test_every_request_is_one_that_1_0_6_takes(old, host, origin, blob):
    """Checklist 15 (1), (3): nothing is refused."""
    data = blob(9 * MIB)
    node = old.node("sn1")
    host("a").get(origin.put("f.bin", data), "--header", "X-A: 1", "--callsystem", "t", node=node.node, check=data)
    register = next(r for r in node.log if r.path == "/peer/registry")
    fields = json.loads(register.body.decode("utf-8"))
    assert register.headers["content-type"].startswith("application/json")
    assert fields["superNodeIp"] == "127.0.0.1" and fields["path"].startswith("/peer/file/") and fields["headers"] == ["X-A: 1"]
    assert fields["port"] == 0 or 15000 <= fields["port"] <= 65000
    assert isinstance(fields["port"], int) and fields["ip"] == "127.0.0.1" and fields["cid"] and fields["hostName"]
    first = next(r for r in node.log if r.path == "/peer/task")
    assert (first.query["status"], first.query["result"], first.query["dstCid"], first.query["range"]) == ("700", "502", "", "")
    for request in node.log:
        if request.path != "/peer/sync":
            assert request.code in (None, 200, 600, 601, 602, 611, 612), request
        if request.path == "/peer/task" and request is not first and request.query["status"] == "701":
            assert request.query["result"] in ("503", "500") and request.query["dstCid"]
    for request in node.cdn_log:
        assert request.code == 206 and request.headers["piecesize"] == str(4 * MIB) and "piecenum" in request.headers


def test_more_than_four_pieces_through_1_0_6(old, host, origin, blob):
    """Checklist 15 (6): four super-load slots, freed by suc only."""
    data = blob(26 * MIB)
    node = old.node("sn1")
    result = host("a").get(origin.put("f.bin", data), node=node.node, check=data, timeout=25)
    assert result.reason == 0


def test_a_failed_cdn_piece_costs_a_slot_but_not_the_download(old, host, blob):
    """Checklist 15 (7), fault 17"""
    data = blob(9 * MIB)
    node = old.node("fake", data, script={"cdn": [404, GOOD]}, load_reset_s=1.0)
    result = host("a").get("http://127.0.0.1:9/f.bin", node=node.node, check=data)
    assert result.reason == 0


@pytest.mark.parametrize("kind", ["sn1", "jsn"])
def test_an_unknown_length_through_an_old_supernode(old, host, origin, blob, kind):
    data = blob(5 * MIB + 3)
    result = host("a").get(origin.put("f.bin", data, length=False), node=old.node(kind, slow_s=0.05).node, check=data)
    assert result.reason == 0


def test_an_empty_file_through_1_0_6(old, host, origin):
    url = origin.put("empty", b"")
    node = old.node("sn1")
    assert host("a").get(url, node=node.node, check=b"").reason == 0


def test_a_second_get_of_an_empty_file_does_not_stall_on_1_0_6(old, host, origin):
    """Fault 14: the old supernode never says 600 again; ours must come to an end all the same."""
    url = origin.put("empty", b"")
    node = old.node("sn1")
    host("a").get(url, node=node.node, check=b"")
    host("b").get(url, "-e", "3s", node=node.node, check=b"", timeout=40)


def test_the_source_pattern(old, host, origin, blob):
    """Checklist 15 (5): unwrapped ranges of the origin."""
    data = blob(9 * MIB)
    url = origin.put("f.bin", data)
    node = old.node("sn1", cdn_pattern="source")
    result = host("a").get(url, node=node.node, check=data)
    assert result.reason == 0
    assert {r.headers.get("range") for r in origin.requests("f.bin")} >= {"bytes=0-4194303", "bytes=4194304-8388607", "bytes=8388608-9437183"}


@pytest.mark.parametrize("kind", ["sn1", "jsn"])
def test_get_and_old_clients_share_an_old_supernode(old, host, origin, blob, kind):
    data = blob(13 * MIB)
    url = origin.put("f.bin", data)
    node = old.node(kind, slow_s=0.1)
    ours = [host("new%d" % i).start(url, node=node.node, ip="127.0.0.%d" % (101 + i)) for i in range(2)]
    running = [old.start(k, node, url) for k in ("go", "py")]
    for command in ours:
        assert good(command.wait(60), data).reason == 0
    for one in running:
        old.good(one.result(), data)


def test_we_serve_others_through_1_0_6(old, host, origin, blob):
    """Checklist 15 (9): pieces are served from the first suc on, the last range clipped."""
    data = blob(9 * MIB + 25)
    node = old.node("sn1")
    for kind in ("go", "py"):  # a file each: the second old client could else take all of it from the first
        url = origin.put(kind + ".bin", data)
        host(kind).get(url, node=node.node, ip="127.0.0.101", check=data)
        result = old.get(kind, node, url, check=data)
        assert any(piece.ip == "127.0.0.101" for piece in result.pieces)
        assert result.client.failures == {} or kind == "go", result.client.failures


def test_service_down_is_said_to_1_0_6(old, host, origin, blob):
    """Checklist 15 (9)"""
    data = blob(MIB)
    node = old.node("sn1")
    peer = host("a")
    peer.get(origin.put("f.bin", data), "--alivetime", "1s", "--expiretime", "1s", node=node.node, check=data)
    wait_for(lambda: node.count("/peer/service/down"), 40, "/peer/service/down")
    assert next(r for r in node.log if r.path == "/peer/service/down").code == 612


def test_a_port_0_peer_of_1_0_6_is_passed_over(old, host, origin, blob):
    """Fault 15, from the client's side."""
    data = blob(9 * MIB)
    url = origin.put("f.bin", data)
    node = old.node("sn1")
    old.get("go", node, url, check=data, uploader=False)
    assert host("a").get(url, node=node.node, check=data).reason == 0


# -- a 1.0.6 supernode's HTTP 500s -----------------------------------------------------------------
def test_a_404_behind_1_0_6(old, host, origin):
    """Checklist 15 (2)"""
    node = old.node("sn1")
    bad(host("a").get(origin.base + "none.bin", node=node.node, timeout=30))


def test_a_login_behind_1_0_6(old, host, origin, blob):
    node = old.node("sn1")
    bad(host("a").get(origin.put("f", blob(1000), auth="Basic x"), node=node.node, timeout=30))
    data = blob(1000)
    assert host("b").get(origin.put("g", data, auth="Basic x"), "--header", "Authorization: Basic x", node=node.node, check=data).reason == 0


def each(old, data, kind, answers, **how):
    """Return scripted supernodes, one an answer, which stands in `label`."""
    nodes = []
    for answer in answers:
        node = old.node("fake", data, script={kind: answer if isinstance(answer, list) else [answer]}, **how)
        node.label = getattr(answer, "__name__", repr(answer))
        nodes.append(node)
    return nodes


def right(label, result, data, *reasons):
    """Assert that a download succeeded, and why it came from where."""
    try:
        good(result, data)
        assert not reasons or result.reason in reasons, result.out
    except AssertionError as error:
        raise AssertionError("after %s: %s" % (label, error))


# -- scripted answers to register ------------------------------------------------------------------
def fetched(origin, name="f.bin"):
    """Tell whether somebody asked the origin; the scripted supernode never does."""
    return bool(origin.requests(name)) or bool(origin.requests(name, "HEAD"))


NO_REGISTER = [500, 501, 502, 603, 604, 605, 606, 610, 611, 612, 999, {"code": 200}, {"code": 200, "data": None},
               {"code": 200, "data": {}}, {"code": 200, "data": []}, {"code": 200, "data": {"taskId": "x", "fileLength": "7", "pieceSize": None}},
               {"code": 200, "data": {"taskId": 5, "fileLength": 7, "pieceSize": -1}}, {"code": "200"}, {}, (500, {"code": 500, "message": "boom"}),
               (404, b"nope"), (200, b""), (200, b"{"), (200, b"[]"), (200, b"null"), (302, b""), b"garbage\r\n\r\n", "close",
               b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"code\":200}"]


def test_a_register_that_fails_goes_to_the_source_with_reason_1(old, dfget, origin, blob):
    """Wire: 1.6"""
    data = blob(300000)
    url = origin.put("f.bin", data)
    for node, result in dfget.many(url, each(old, data, "register", NO_REGISTER)):
        right(node.label, result, data, 1)


def test_a_failing_register_moves_to_the_next_node(old, dfget, origin, blob):
    data = blob(300000)
    url = origin.put("f.bin", data)
    for answer in (500, 502, 606, {"code": 200}, (500, {"code": 500, "message": "x"}), "close"):
        sick, well = old.node("fake", data, script={"register": [answer]}), old.node("fake", data)
        for order in ((sick, well), (well, sick)):
            result = good(dfget(url, node=",".join(n.node for n in order)), data)
            assert result.reason == 0, result.out
    assert not fetched(origin)


def test_notbs_waits_for_a_supernode_that_died_while_it_took_the_download_in(old, dfget, origin, blob):
    """It was there a moment ago, as one that has answered."""
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data, script={"register": ["close"] * 7 + [GOOD]})
    assert good(dfget(url, "--notbs", node=node.node, timeout=40), data).reason == 0
    assert node.count("/peer/registry") == 8 and not fetched(origin)


def test_607_stops_trying_nodes(old, dfget, origin, blob):
    """Wire: 1.6: reason 1, source."""
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data, script={"register": [607]})
    assert good(dfget(url, node=node.node), data).reason == 1


def test_608_is_exit_79_and_no_source_download(old, dfget, origin, blob):
    """Wire: 1.6, 8.5"""
    url = origin.put("f.bin", blob(300000))
    node = old.node("fake", b"", script={"register": [608]})
    result = bad(dfget(url, node=node.node), 79)
    assert "1103" in result.out and not fetched(origin)


def test_609_is_tried_again_for_a_short_time(old, dfget, origin, blob):
    """Wire: 1.6"""
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data, script={"register": [609, 609, GOOD]})
    assert good(dfget(url, node=node.node), data).reason == 0
    assert not fetched(origin)
    node = old.node("fake", data, script={"register": [609]})
    assert good(dfget(url, node=node.node, timeout=40), data).reason == 1
    assert 2 <= node.count("/peer/registry") <= 20


def test_a_register_that_hangs_is_given_up(old, dfget, origin, blob):
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data, script={"register": ["hang"]})
    result = good(dfget(url, node=node.node, timeout=40), data)
    assert result.reason == 1 and result.seconds < 20


@pytest.mark.parametrize("answer", [500, 607])
def test_notbs_ends_with_exit_80_and_reason_1001(old, dfget, origin, blob, answer):
    """Wire: 1.6, 8.3"""
    url = origin.put("f.bin", blob(1000))
    node = old.node("fake", b"", script={"register": [answer]})
    result = bad(dfget(url, "--notbs", node=node.node), 80)
    assert "download FAIL(1104)" in result.out and "reason:1001" in result.out
    assert not fetched(origin)


def test_missing_cdn_source_means_supernode(old, dfget, origin, blob):
    """Wire: 1.3"""
    data = blob(300000)
    url = origin.put("f.bin", data)

    def without(request, honest):
        _status, answer = honest()
        for key in ("cdnSource", "asSeed", "seedTaskID"):
            del answer["data"][key]
        del answer["msg"]
        return answer

    def empty(request, honest):
        _status, answer = honest()
        answer["data"]["cdnSource"] = ""
        return answer
    for script in (without, empty):
        assert good(dfget(url, node=old.node("fake", data, script={"register": [script]}).node), data).reason == 0
    assert not fetched(origin)


# -- scripted answers to pull ----------------------------------------------------------------------
NO_PULL = [500, 501, 502, 604, 605, 606, 607, 608, 609, 610, 611, 612, 999, (500, {"code": 500, "message": "x"}), (200, b"{"), (200, b""),
           (404, b""), "close", b"garbage\r\n\r\n", {}, {"code": "601"}, {"code": None}, (200, b"[]"), (200, b"null")]


def test_a_pull_that_fails_goes_to_the_source_with_reason_3(old, dfget, origin, blob):
    """Wire: 3.5, one node: nothing is left to migrate to."""
    data = blob(300000)
    url = origin.put("f.bin", data)
    for node, result in dfget.many(url, each(old, data, "pull", NO_PULL)):
        right(node.label, result, data, 3)


def test_a_failing_pull_migrates_and_keeps_its_pieces(old, dfget, origin, blob):
    """Wire: 3.5; a new register, status 700, the verified pieces stay."""
    data = blob(9 * MIB)
    url = origin.put("f.bin", data)
    for answer in (500, 502, "close", (200, b"junk")):
        sick, well = old.node("fake", data, script={"pull": [GOOD, answer]}), old.node("fake", data)
        result = good(dfget(url, node="%s,%s" % (sick.node, well.node), timeout=40), data)
        assert result.reason == 0, result.out
        if sick.count("/peer/registry"):
            assert "migrated to node:" in result.out, result.out
            assert len(sick.cdn_log) + len(well.cdn_log) <= 5, "pieces were fetched again"
    assert not fetched(origin)


def losing(old, data):
    """Return a supernode that fails its clients after every piece, of which there are more than the client has rounds without any."""
    node = old.node("fake", data, down_limit=1)
    served = []

    def pull(request, honest):
        if len(node.cdn_log) > len(served):
            served[:] = node.cdn_log
            return 500
        return honest()
    node.script["pull"] = [pull]
    return node


def test_notbs_outlives_any_number_of_failures_as_long_as_pieces_come(old, dfget, origin, blob):
    data = blob(27 * MIB)
    url = origin.put("f.bin", data)
    node = losing(old, data)
    assert good(dfget(url, "--notbs", node=node.node), data).reason == 0
    assert node.count("/peer/registry") > 6 and len(node.cdn_log) == 7
    assert not fetched(origin)


def test_an_answer_with_nothing_in_it_does_not_stall_the_download(old, dfget, origin, blob):
    """Wire: 3.5: both old clients idle until their timeout; ours goes on (once) or elsewhere (for good)."""
    data = blob(300000)
    url = origin.put("f.bin", data)
    answers = [603, 200, {"code": 601}, {"code": 601, "data": None}, {"code": 601, "data": []}]
    for node, result in dfget.many(url, each(old, data, "pull", [[answer, GOOD] for answer in answers])):
        right(node.label, result, data)
    for node, result in dfget.many(url, each(old, data, "pull", answers), "-e", "3s"):
        right(node.label, result, data)
        assert result.seconds < 30


def test_602_is_waited_for(old, dfget, origin, blob):
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data, script={"pull": [602, 602, 602, GOOD]})
    assert good(dfget(url, node=node.node), data).reason == 0
    assert not fetched(origin)


def test_602_for_ever_ends(old, dfget, origin, blob):
    """Wire: 3.5: dfget 1.0.6 goes to the source after its timeout."""
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data, script={"pull": [602]})
    result = good(dfget(url, "-e", "4s", node=node.node, timeout=40), data)
    assert node.count("/peer/task") < 60, "polls too often"
    assert result.seconds < 30


def test_a_600_that_comes_too_early_is_not_believed(old, dfget, origin, blob):
    """Fault 19; wire: 3.5"""
    data = blob(9 * MIB)
    url = origin.put("f.bin", data)
    scripts = [[GOOD, {"code": 600}]]
    for finish in ({"md5": "", "fileLength": 0}, {"md5": hashlib.md5(b"").hexdigest(), "fileLength": 5}, None, {}, [], "x"):
        scripts += [[{"code": 600, "data": finish}], [GOOD, {"code": 600, "data": finish}]]
    for node, result in dfget.many(url, each(old, data, "pull", scripts)):
        right(node.label, result, data)


def test_a_600_without_a_digest_is_taken_when_all_is_here(old, dfget, origin, blob):
    """Fault 20: no crash."""
    data = blob(300000)
    url = origin.put("f.bin", data)

    def last(finish):
        def answer(request, honest):
            _status, truth = honest()
            return finish if truth["code"] == 600 else truth
        return answer
    finishes = [{"code": 600}, {"code": 600, "data": None}, {"code": 600, "data": {"md5": "", "fileLength": 1}}, {"code": 600, "data": {}}]
    for _node, result in dfget.many(url, each(old, data, "pull", [last(f) for f in finishes])):
        right("an odd 600", result, data, 0, 3)


def test_a_600_with_another_md5_never_makes_a_file_from_the_swarm(old, dfget, origin, blob):
    """Fault 11, checklist 15 (8): fail loudly, or go to the source with reason 2; never SUCCESS without a file."""
    data = blob(300000)
    url = origin.put("f.bin", data)

    def last(request, honest):
        status, answer = honest()
        return {"code": 600, "data": {"md5": "0" * 32, "fileLength": 300005}} if answer["code"] == 600 else answer
    node = old.node("fake", data, script={"pull": [last]})
    result = dfget(url, node=node.node)
    if result.code == 0:
        assert good(result, data).reason == 2, result.out
    else:
        bad(result)
    result = bad(dfget(url, "--notbs", node=node.node), 80)
    assert "SUCCESS" not in result.out and "reason:1002" in result.out


def test_the_users_md5_is_checked_in_the_swarm(old, dfget, origin, blob):
    """Fault 12"""
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data)
    good(dfget(url, "-m", hashlib.md5(data).hexdigest(), node=node.node), data)
    result = bad(dfget(url, "-m", hashlib.md5(b"x").hexdigest(), node=node.node))
    assert "SUCCESS" not in result.out


# -- scripted pieces -------------------------------------------------------------------------------
def spoiled(request, honest):
    """One wrong byte in the middle."""
    status, body, headers = honest()
    return status, body[:-20] + bytes([body[-20] ^ 1]) + body[-19:], headers


def headless(request, honest):
    """A wrong head under a right content: the digest is over the wrapped bytes."""
    status, body, headers = honest()
    return status, b"\0\0\0\0" + body[4:], headers


def shortened(request, honest):
    """All but the last byte."""
    status, body, headers = honest()
    return status, body[:-1], headers


def lengthened(request, honest):
    """One byte more."""
    status, body, headers = honest()
    return status, body + b"x", headers


def test_a_bad_piece_is_reported_and_fetched_again(old, dfget, origin, blob):
    """Wire: 5.3"""
    data = blob(5 * MIB)
    url = origin.put("f.bin", data)
    answers = [404, 416, 500, 403, 503, 301, "close", spoiled, headless, shortened, lengthened]
    for node, result in dfget.many(url, each(old, data, "cdn", [[answer, GOOD] for answer in answers], load_reset_s=0.5)):
        answer = node.script["cdn"][0]
        right(answer, result, data, 0)
        if answer not in (headless, lengthened):  # harmless: the content is right
            assert any(r.path == "/peer/task" and r.query.get("result") == "500" for r in node.log), "%s was not reported" % answer
        errors = {r.query["errorType"] for r in node.log if r.path == "/peer/piece/error"}
        assert errors <= {"FILE_NOT_EXIST", "FILE_MD5_NOT_MATCH"}, errors
    assert not fetched(origin)


def test_a_source_that_fails_for_ever_is_given_up_without_a_storm(old, dfget, origin, blob):
    """Fault 18: 17 requests a second, for ever."""
    data = blob(300000)
    url = origin.put("f.bin", data)
    for node, result in dfget.many(url, each(old, data, "cdn", [404, 500, spoiled, shortened], load_reset_s=0.1), "-e", "6s"):
        right(node.label, result, data, 0, 3)
        assert len(node.cdn_log) <= 40, "%s: %d requests in %.1f s" % (node.label, len(node.cdn_log), result.seconds)


def test_200_instead_of_206_and_no_content_range_are_fine(old, dfget, origin, blob):
    """Checklist 15 (5)"""
    data = blob(5 * MIB)
    url = origin.put("f.bin", data)
    node = old.node("fake", data, script={"cdn": [lambda request, honest: (200, honest()[1], [])]})
    assert good(dfget(url, node=node.node), data).reason == 0


ODD_TASKS = [dict(downLink="20480"), dict(pieceMd5="0" * 32 + ":9"), dict(pieceMd5="junk"), dict(pieceMd5=""), dict(pieceNum=-1), dict(pieceNum=7),
             dict(range="junk"), dict(range="9-1"), dict(pieceSize=0), dict(pieceSize=1), dict(path=""), dict(path="x"), dict(peerIp=""),
             dict(peerIp="not an ip"), dict(peerPort=0), dict(peerPort=-1), dict(peerPort=99999), dict(peerPort="x"), dict(cid=None), dict(pieceNum="x"),
             dict(path="http://127.0.0.1:9/x"), dict(path="/x\r\nX: y"), dict(peerIp="::1")]


def test_piece_tasks_that_make_no_sense_never_make_a_wrong_file(old, dfget, origin, blob):
    """Security: whatever a supernode hands out, the file is right or there is none."""
    data = blob(300000)
    url = origin.put("f.bin", data)

    def odd(change):
        def answer(request, honest):
            _status, truth = honest()
            for task in truth["data"] if isinstance(truth.get("data"), list) else ():
                task.update(change)
            return truth
        answer.__name__ = repr(change)
        return answer
    for node, result in dfget.many(url, each(old, data, "pull", [odd(change) for change in ODD_TASKS], load_reset_s=0.1), "-e", "3s"):
        right(node.label, result, data)


def test_a_task_that_is_not_a_list_of_objects(old, dfget, origin, blob):
    data = blob(300000)
    url = origin.put("f.bin", data)
    answers = [{"code": 601, "data": junk} for junk in ([1, 2], {"a": 1}, "x", [[]], [None], [{}], 5)]
    for node, result in dfget.many(url, each(old, data, "pull", answers), "-e", "3s"):
        right(node.label, result, data)


def test_running_pieces_listed_again_are_fetched_once(old, dfget, origin, blob):
    """Wire: 3.2: 0.2 re-lists what runs."""
    data = blob(21 * MIB)
    url = origin.put("f.bin", data)
    node = old.node("jsn")
    assert good(dfget(url, node=node.node), data).reason == 0
    ranges = [r.headers["range"] for r in node.cdn_log]
    assert len(ranges) == len(set(ranges)) == 6


def test_suc_and_metrics_that_fail_do_not_matter(old, dfget, origin, blob):
    """Wire: 4.1, 4.4"""
    data = blob(5 * MIB)
    url = origin.put("f.bin", data)
    for answer in ((500, {"code": 500, "message": "x"}), (404, b""), "close", {"code": 200, "msg": "success"}):
        node = old.node("fake", data, script={"suc": [answer], "metrics": [answer], "error": [answer], "down": [answer]}, load_reset_s=0.5)
        assert good(dfget(url, node=node.node, timeout=40), data).reason == 0


def test_the_taskurl_is_filtered_as_1_0_6_does(old, dfget, origin, blob):
    """Wire: 2.2"""
    data = blob(1000)
    base = origin.put("f.bin", data)
    for query, filters, rest in (("?a=1&b=2&c=3", "b", "?a=1&c=3"), ("?a=1", "a", ""), ("?b=2&&c=3", "b", "?&c=3")):
        node = old.node("fake", data)
        good(dfget(base + query, "-f", filters, node=node.node), data)
        fields = json.loads(next(r for r in node.log if r.path == "/peer/registry").body.decode("utf-8"))
        assert (fields["rawUrl"], fields["taskUrl"]) == (base + query, base + rest)


def test_md5_goes_before_the_identifier(old, dfget, origin, blob):
    """Wire: 1.2"""
    data = blob(1000)
    url = origin.put("f.bin", data)
    md5 = hashlib.md5(data).hexdigest()
    for flags, want in ((["-m", md5, "-i", "x"], (md5, None)), (["-i", "x"], (None, "x"))):
        node = old.node("fake", data)
        good(dfget(url, *flags, node=node.node), data)
        fields = json.loads(next(r for r in node.log if r.path == "/peer/registry").body.decode("utf-8"))
        assert (fields.get("md5") or None, fields.get("identifier") or None) == want


# -- several nodes ---------------------------------------------------------------------------------
def test_a_dead_node_is_passed_over(old, dfget, origin, blob):
    from world import dead_port
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data)
    result = good(dfget(url, node="127.0.0.1:%d,%s" % (dead_port(), node.node)), data)
    assert result.reason == 0 and not fetched(origin)


def test_no_node_at_all_is_reason_1(dfget, origin, blob):
    from world import dead_port
    data = blob(300000)
    url = origin.put("f.bin", data)
    assert good(dfget(url, node="127.0.0.1:%d" % dead_port()), data).reason == 1
    assert "reason:1001" in bad(dfget(url, "--notbs", node="127.0.0.1:%d" % dead_port()), 80).out


# -- 8.3: the lines of 1.0.6 -----------------------------------------------------------------------
def test_the_lines_of_1_0_6(old, dfget, origin, blob):
    import re
    data = blob(300000)
    url = origin.put("f.bin", data)
    node = old.node("fake", data)
    out = good(dfget(url, node=node.node), data).stdout
    for line in (r"^--\d{4}-\d\d-\d\d \d\d:\d\d:\d\d--  %s$" % re.escape(url), r"^dfget version:\S+$", r"^workspace:/\S+$", r"^sign:\d+-\d+\.\d{3}$",
                 r"^client:127\.0\.0\.1 connected to node:%s$" % re.escape(node.node), r"^start download by dragonfly\.\.\.$",
                 r"^download SUCCESS cost:\d+\.\d{3}s length:300000 reason:0$"):
        assert re.search(line, out, re.M), "%s\n%s" % (line, out)


def test_the_envelope_helper_is_strict():
    """The yardstick itself."""
    class Reply:
        status, version, body = 200, "HTTP/1.1", b'{"code":200,"data":{},"dfly":1}'
        headers = {"content-length": str(len(body)), "content-type": "application/json"}

        def json(self):
            return json.loads(self.body.decode())
    with pytest.raises(AssertionError, match="something new"):
        hands.envelope(Reply())
