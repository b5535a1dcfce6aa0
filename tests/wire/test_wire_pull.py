"""Pulls and reports of our supernode, driven by hand.  Wire: 3, 4"""
import hashlib

import hand as hands
import pytest
from world import md5, wait_for

MIB = 1 << 20


def test_pieces_and_finish_are_right_to_the_byte(supernode, hand, origin, blob):
    data = blob(3 * MIB + 25)
    client = hand(supernode())
    registered = client.join(origin.put("f.bin", data))
    got, finish, seen = client.finish()
    size = registered["pieceSize"]
    count = -(-len(data) // (size - 5))
    assert sorted(got) == list(range(count))
    assert hands.unwrapped(got) == data
    assert finish["md5"] in ("", md5(data))
    assert finish["fileLength"] == len(data) + 5 * count
    for task in seen:
        start, end = map(int, task["range"].split("-"))
        last = task["pieceNum"] == count - 1
        assert start == task["pieceNum"] * size and task["pieceSize"] == size
        assert end == (len(data) + 5 * count - 1 if last else start + size - 1), task
        assert task["peerIp"] == "127.0.0.1" and task["downLink"] == 0 and task["cid"].startswith("cdnnode:")
        assert task["path"] == "/download/%s/%s" % (client.task[:3], client.task)


@pytest.mark.parametrize("report", ["suc", "503", "both"])
def test_either_report_marks_a_piece_done(supernode, hand, origin, blob, report):
    """Wire: 3.5"""
    data = blob(2 * MIB)
    client = hand(supernode())
    client.join(origin.put("f.bin", data))
    got, _finish, _seen = client.finish(report=report)
    assert hands.unwrapped(got) == data


def test_the_same_report_many_times_changes_nothing(supernode, hand, origin, blob):
    """Checklist 14 (6): dfget 0.2 repeats the same 503 as long as the answer is 602."""
    data = blob(2 * MIB)
    client = hand(supernode())
    client.join(origin.put("f.bin", data))
    first = client.start()["data"][0]
    client.fetch(first)
    for _ in range(4):
        answer = client.done(first)
        assert hands.envelope(client.suc(first))["code"] in (200, 611)
        assert answer["code"] != 600
    got, _finish, _seen = client.finish(answer)
    got[first["pieceNum"]] = client.fetch(first).body
    assert hands.unwrapped(got) == data


def test_never_more_than_four_pieces_are_out(supernode, hand, origin, blob):
    """Checklist 14 (9), (7)"""
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(4 * MIB)))
    out = {}
    for _ in range(12):
        answer = client.start()
        if answer["code"] == 601:
            out.update({t["range"]: t for t in answer["data"]})
        assert len(out) <= 4
    assert 1 <= len(out) <= 4
    one = out.pop(sorted(out)[0])
    answer = client.done(one)
    if answer["code"] == 601:
        out.update({t["range"]: t for t in answer["data"]})
    assert len(out) <= 4


def test_a_failed_piece_is_handed_out_again(supernode, hand, origin, blob):
    data = blob(2 * MIB)
    client = hand(supernode())
    client.join(origin.put("f.bin", data))
    first = client.start()["data"][0]
    answer = client.pull(701, 500, first["cid"], first["range"])
    seen = set()
    for _ in range(100):
        if answer["code"] == 601:
            seen.update(t["range"] for t in answer["data"])
        if first["range"] in seen:
            break
        left = [t for t in answer.get("data", ())]
        if left:
            client.fetch(left[0])
            answer = client.done(left[0])
        else:
            answer = client.pull()
    assert first["range"] in seen


def test_a_second_start_after_a_migration_is_answered(supernode, hand, origin, blob):
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(2 * MIB)))
    assert client.start()["code"] == 601
    assert client.start()["code"] == 601


@pytest.mark.parametrize("limit", [1, 2])
def test_an_old_client_gets_as_many_pieces_at_once_as_the_limit_says(supernode, hand, origin, blob, limit):
    client = hand(supernode("--down-limit", str(limit), "--seed-limit", "9"))
    client.join(origin.put("f.bin", blob(4 * MIB)))
    seen = {task["range"] for _ in range(3) for task in client.start().get("data") or []}
    assert len(seen) == limit


@pytest.mark.parametrize("over", [dict(taskId="nope"), dict(srcCid="nope"), dict(taskId=""), dict(srcCid=""), dict(taskId=None), dict(srcCid=None),
                                  dict(taskId="0" * 64), dict(taskId="../../etc/passwd")])
def test_unknown_task_or_client_gets_502(supernode, hand, origin, blob, over):
    """Checklist 14 (17): a restarted supernode sends its clients on."""
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(1000)))
    assert client.pull(**over)["code"] == 502


@pytest.mark.parametrize("over", [dict(range="junk"), dict(range=""), dict(range="5-"), dict(range="-5"), dict(range="-1--5"), dict(range="9-1"),
                                  dict(range="7-99"), dict(range="9" * 40 + "-" + "9" * 41), dict(range=None), dict(status="999"), dict(status=""),
                                  dict(status=None), dict(status="abc"), dict(status="-700"), dict(result="502"), dict(result="999"),
                                  dict(result=""), dict(result="abc"), dict(result=None), dict(status="7" * 400)])
def test_a_pull_that_makes_no_sense_gets_501(supernode, hand, origin, blob, over):
    """Wire: 3.1; whatever it is, no answer that breaks an old client and no report taken for true."""
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(1000)))
    task = client.start()["data"][0]
    query = dict(status=701, result=503, dst=task["cid"], range_=task["range"])
    answer = client.pull(**dict({k: v for k, v in query.items()}, **over))
    assert answer["code"] != 600, "a nonsense report was taken for true"
    if over.get("range") not in ("7-99",):
        assert answer["code"] in (500, 501), answer


def test_702_is_answered_without_breaking_anybody(supernode, hand, origin, blob):
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(1000)))
    client.start()
    for result in (501, 500):
        client.pull(702, result)


def test_what_dfget_0_2_0_adds_is_ignored(supernode, hand, origin, blob):
    data = blob(1000)
    client = hand(supernode())
    client.join(origin.put("f.bin", data))
    task = client.start()["data"][0]
    client.fetch(task)
    answer = client.pull(701, 503, task["cid"].replace(":", "%3A").replace("~", "%7E"), task["range"], superNode="127.0.0.1",
                         pieceSize=task["pieceSize"], pieceNum=task["pieceNum"], whatever="x%20y+z")
    for _ in range(50):
        if answer["code"] == 600:
            break
        answer = client.done(task)
    assert answer["code"] == 600


def test_a_report_from_an_unknown_source_is_taken_or_refused_cleanly(supernode, hand, origin, blob):
    """0.2 and 1.0.6 send an empty dstCid after a migration."""
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(2 * MIB)))
    task = client.start()["data"][0]
    for dst in ("", "nobody-1-2.3", "cdnnode:9.9.9.9~" + client.task):
        client.pull(701, 503, dst, task["range"])
        client.pull(701, 500, dst, task["range"])


# -- 4: reports ------------------------------------------------------------------------------------
@pytest.mark.parametrize("over", [dict(cid="nope"), dict(taskId="nope"), dict(dstCid=""), dict(dstCid="nope"), dict(dstCid=None), dict(pieceRange="junk"),
                                  dict(pieceRange=""), dict(pieceRange=None), dict(cid=None), dict(taskId=None), dict(pieceRange="99999999999-999999999999"),
                                  dict(pieceRange="-4--1")])
def test_a_suc_that_makes_no_sense_gets_a_clean_answer(supernode, hand, origin, blob, over):
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(2 * MIB)))
    task = client.start()["data"][0]
    reply = client.suc(task, **over)
    assert isinstance(reply.json()["code"], int)
    assert int(reply.headers["content-length"]) == len(reply.body) and b"Traceback" not in reply.body
    assert client.pull()["code"] in (601, 602)


def test_suc_without_any_pull_breaks_nothing(supernode, hand, origin, blob):
    client = hand(supernode())
    data = blob(2 * MIB)
    size = client.join(origin.put("f.bin", data))["pieceSize"]
    wait_for(lambda: client.pull()["code"] == 601, 10)
    fake = {"cid": "cdnnode:127.0.0.1~" + client.task, "range": "0-%d" % (size - 1)}
    hands.envelope(client.suc(fake))
    assert client.pull()["code"] in (601, 602)


def share(client, node, hand, url):
    """Download as `client` to the end and return a fresh client of the same task."""
    client.join(url)
    client.finish()
    other = hand(node)
    other.join(url)
    return other


def test_a_finished_client_is_offered_to_the_next(supernode, hand, origin, blob):
    node = supernode()
    first = hand(node, ip="127.0.0.7", port=15999)
    second = share(first, node, hand, origin.put("f.bin", blob(3 * MIB)))
    tasks = second.start()["data"]
    mine = [t for t in tasks if t["cid"] == first.cid]
    assert mine, "nothing comes from the first client"
    assert (mine[0]["peerIp"], mine[0]["peerPort"], mine[0]["path"]) == ("127.0.0.7", 15999, first.path)


def test_a_client_with_port_0_is_never_offered(supernode, hand, origin, blob):
    """Fault 15; checklist 14 (11)."""
    node = supernode()
    first = hand(node, port=0)
    assert first.cid not in share(first, node, hand, origin.put("f.bin", blob(MIB))).offers()


def test_service_down_takes_a_client_out_at_once(supernode, hand, origin, blob):
    """Wire: 4.3"""
    node = supernode()
    first = hand(node, ip="127.0.0.7", port=15999)
    second = share(first, node, hand, origin.put("f.bin", blob(3 * MIB)))
    assert hands.envelope(first.down())["code"] in (612, 200)
    assert first.cid not in second.offers()
    first.down()
    hands.envelope(hand(node).get("/peer/service/down?taskId=nope&cid=nope"))
    hands.envelope(hand(node).get("/peer/service/down"))


def test_a_provider_that_always_fails_is_left_alone_in_the_end(supernode, hand, origin, blob):
    """Fault 16: 1.0.6 offers a broken peer for ever."""
    node = supernode()
    first = hand(node, ip="127.0.0.7", port=15999)
    url = origin.put("f.bin", blob(MIB))
    share(first, node, hand, url)
    offered = False
    for _ in range(8):
        client = hand(node)
        client.join(url)
        offered = first.cid in client.offers()
    assert not offered, "still offered to the 8th client after 7 clients failed on it"


@pytest.mark.parametrize("kind", ["FILE_MD5_NOT_MATCH", "FILE_NOT_EXIST", "junk", ""])
def test_piece_error_with_junk_purges_nothing(supernode, hand, origin, blob, kind):
    """Fault 6; wire: 4.2"""
    data = blob(2 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    client = hand(node)
    client.join(url)
    task = client.start()["data"][0]
    for range_ in (task["range"], "", "junk", "999999999999-9999999999999"):
        reply = hand(node).get("/peer/piece/error?errorType=%s&srcCid=evil&dstCid=%s&dstIp=127.0.0.1&taskId=%s&range=%s&realMd5=junk&expectedMd5=junk" % (
            kind, task["cid"], client.task, range_))
        assert reply.status == 200
    got, _finish, _seen = client.finish()
    assert hands.unwrapped(got) == data
    assert sum(1 for r in origin.requests("f.bin") if r.bytes_sent == len(data)) == 1


def test_metrics_answer_1_so_that_they_come_once(supernode, hand):
    """Checklist 14 (13)"""
    body = (b'{"IP":"127.0.0.1","backsourceReason":"0","cID":"127.0.0.1-17814-1795408506.429","callSystem":"testA","duration":1.159179223,'
            b'"fileLength":20971520,"port":15101,"success":true,"taskId":"9dd5"}')
    node = supernode()
    reply = hand(node).post(body, "application/json;charset=utf-8", "/task/metrics")
    assert reply.status == 200 and reply.json()["code"] == 1
    for bad in (b"", b"{", b"[]", b"null"):
        assert hand(node).post(bad, "application/json;charset=utf-8", "/task/metrics").status < 600
    assert hand(node).get("/_ping").body == b"OK"


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_the_stubs_of_1_0_6(supernode, hand, prefix):
    """Wire: 4.5"""
    node = supernode()
    for path, body in (("/peer/heartbeat", b'{"IP":"127.0.0.1","cID":"x","port":15001}'), ("/peer/network?start=0&limit=5", b'{"urls":["http://x"]}')):
        assert hand(node).post(body, "application/json", prefix + path).status == 200


def test_version_and_unknown_paths(supernode, hand):
    node = supernode()
    assert isinstance(hand(node).get("/version").json(), dict)
    for path in ("/nope", "/", "/peer", "/peer/task/x", "/peer//task", "/peer/../peer/registry", "/%2e%2e/etc/passwd", "/api/v1/tasks/nope"):
        reply = hand(node).get(path)
        assert 400 <= reply.status < 500, path
        assert int(reply.headers["content-length"]) == len(reply.body)


def test_task_info_of_1_0_6(supernode, hand, origin, blob):
    """Wire: 4.6"""
    data = blob(2 * MIB)
    client = hand(supernode())
    registered = client.join(origin.put("f.bin", data))
    client.finish()
    info = client.get("/api/v1/tasks/" + client.task).json()
    count = -(-len(data) // (registered["pieceSize"] - 5))
    assert (info["ID"], info["httpFileLength"], info["pieceTotal"], info["fileLength"], info["pieceSize"]) == (
        client.task, len(data), count, len(data) + 5 * count, registered["pieceSize"])


def test_one_connection_carries_all_calls(supernode, hand, origin, blob):
    """Checklist 14 (1): keep-alive with correct Content-Length."""
    from rawhttp import Pool
    client = hand(supernode())
    client.join(origin.put("f.bin", blob(1000)))
    pool = Pool()
    for _ in range(20):
        for target in ("/peer/task?srcCid=%s&dstCid=&range=&result=502&status=700&taskId=%s" % (client.cid, client.task),
                       "/peer/piece/suc?taskId=x&cid=y&dstCid=z&pieceRange=0-1", "/peer/service/down?taskId=x&cid=y", "/peer/task?taskId=nope"):
            pool.send(client.address, ("GET %s HTTP/1.1\r\nUser-Agent: fasthttp\r\nHost: x\r\n\r\n" % target).encode("ascii")).json()
    assert pool.connections == 1
    pool.close()


def test_a_cold_task_asks_the_origin_for_each_byte_once(supernode, hand, origin, blob):
    """Fault 29: no aborted probe."""
    data = blob(3 * MIB)
    client = hand(supernode())
    client.join(origin.put("f.bin", data))
    client.finish()
    assert origin.bytes_sent("f.bin") <= len(data) + 65536


def test_an_origin_that_fails_midway_ends_in_a_code_that_sends_clients_on(supernode, hand, origin, blob):
    """Wire: 10.2; never a hang, never a 600."""
    url = origin.put("f.bin", blob(3 * MIB), cut_after=MIB, ranges=False)
    client = hand(supernode())
    client.join(url)
    answer = wait_for(lambda: next((a for a in [client.pull()] if a["code"] not in (601, 602)), None), 90, "a failure code")
    assert answer["code"] in (500, 502, 604, 607), answer


def test_a_wrong_md5_from_the_user_fails_the_task(supernode, hand, origin, blob):
    """Wire: 10.2; checklist 14 (14): a wrong md5 in a 600 makes 1.0.6 lie."""
    client = hand(supernode())
    reply = client.json(origin.put("f.bin", blob(100000)), md5=hashlib.md5(b"other").hexdigest())
    if reply.json()["code"] == 200:
        answer = client.start()
        for _ in range(40):
            if answer["code"] == 601:
                client.suc(answer["data"][0])
                answer = client.done(answer["data"][0])
            elif answer["code"] == 602:
                answer = client.pull()
        assert answer["code"] in (500, 502, 604), answer
