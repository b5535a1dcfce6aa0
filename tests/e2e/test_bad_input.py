"""Bad input on every port gets a clear answer and leaves nothing behind: no traceback, thread, descriptor or memory."""
import json
import socket

import pytest
from world import MB, alive, ask, descriptors, raw, read_answer, resident, threads, wait_for

CID = "127.0.0.1-12345-1795408506.429"
TASK = "0123456789abcdef" * 4


def register(**changes):
    body = {"superNodeIp": "127.0.0.1", "rawUrl": "http://127.0.0.1:9/x", "taskUrl": "http://127.0.0.1:9/x", "cid": CID, "ip": "127.0.0.1",
            "hostName": "h", "port": 0, "path": "/peer/file/x-12345-1795408506.429", "version": "1.0.6"}
    body.update(changes)
    return {k: v for k, v in body.items() if v is not None}


def said_clearly(answer, what=""):
    """An HTTP error, or 200 with an error code inside, with a JSON message and no traceback."""
    assert answer.status in (200, 400, 403, 404, 405, 408, 411, 413, 414, 416, 417, 431, 500, 501, 505), (what, answer)
    assert b"Traceback" not in answer.body and b"dfly.py" not in answer.body, answer.body
    said = answer.json
    assert said.get("code") != 200 or answer.status != 200, (what, said)
    assert said.get("msg") or said.get("message"), (what, said)


@pytest.fixture
def unharmed(origin, supernode, host, blob):
    """A supernode with a served file and an uploader; afterwards both must be as they were and still work."""
    node = supernode()
    here = host()
    url = origin.put("good", blob(MB))
    here.get(url, check=blob(MB))
    node.uploader = here.uploader_address()
    node.uploader_pid = here.uploader_pid()
    node.host = here
    pids = (node.pid, node.uploader_pid)
    before = [(descriptors(pid), threads(pid), resident(pid)) for pid in pids]
    yield node
    for pid, (fds, count, memory) in zip(pids, before):
        assert alive(pid), "a process died"
        wait_for(lambda: descriptors(pid) <= fds + 1 and threads(pid) <= count + 2, 45,
                 "descriptors %d and threads %d back, now %d and %d" % (fds, count, descriptors(pid), threads(pid)))
        assert resident(pid) < memory + 40 * MB, "%d MB of memory stayed" % ((resident(pid) - memory) // MB)
    result = host().get(url, check=blob(MB))
    assert result.reason == 0


REGISTER = {
    "no body": b"", "not JSON": b"{", "a list": b"[]", "a number": b"5", "null": b"null", "deep": b"[" * 20000,
    "not UTF-8": b"\xff\xfe{}", "no url": register(rawUrl=None, taskUrl=None), "no cid": register(cid=""), "no path": register(path=""),
    "ftp": register(rawUrl="ftp://x/y"), "file": register(rawUrl="file:///etc/passwd"), "no host": register(rawUrl="http://"),
    "line break in the url": register(rawUrl="http://127.0.0.1:9/x\r\nHost: evil"), "negative port": register(port=-1),
    "a port beyond all in the url": register(rawUrl="http://127.0.0.1:99999/x"),
    "huge port": register(port=10 ** 30), "odd port": register(port=[1]), "url is a number": register(rawUrl=5),
    "headers are text": register(headers="X: y", rawUrl="nonsense"), "header with a line break": register(headers=["X: a\r\nEvil: b"]),
    "header is a number": register(headers=[5]), "bad ip": register(ip="999.1.1.1"), "path tricks": register(path="http://127.0.0.1/evil"),
    "cid with a line break": register(cid=CID + "\n" + CID), "long cid": register(cid="x" * 100000), "NaN": b'{"port": NaN}',
    "huge number": b'{"port": 1e999}', "half a character in the url": register(rawUrl="http://127.0.0.1:9/\ud800"),
    "half a character in a header": register(headers=["X: \ud800"]), "the supernode's cid": register(cid="cdnnode:127.0.0.1~" + TASK),
    "bad md5": register(md5="../../x"),
}


def test_bad_registrations_are_refused(unharmed):
    for what, body in REGISTER.items():
        said_clearly(unharmed.ask("POST", "/peer/registry", body, {"Content-Type": "application/json;charset=utf-8"}), what)
    for form in (b"", b"cid=&ip=", b"%zz=%", b"cid=" + b"a" * 200000, b"&" * 5000, b"port=-1&cid=x&rawUrl=http://h/x&ip=1.2.3.4&path=/x"):
        said_clearly(unharmed.ask("POST", "/peer/registry", form, {"Content-Type": "application/x-www-form-urlencoded"}), form[:20])


CALLS = [
    "/peer/task", "/peer/task?srcCid=&taskId=", "/peer/task?srcCid=%s&taskId=%s&status=700" % (CID, TASK),
    "/peer/task?srcCid=x&taskId=../../etc/passwd&status=700&result=502", "/peer/task?srcCid=%s&taskId=%s&status=x&result=y" % (CID, TASK),
    "/peer/piece/suc", "/peer/piece/suc?taskId=%s&cid=%s&dstCid=x&pieceRange=5-1" % (TASK, CID),
    "/peer/piece/suc?taskId=%s&cid=%s&dstCid=x&pieceRange=0-99999999999999999999999" % (TASK, CID),
    "/peer/file/../../etc/passwd", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/nothing", "/peer", "/peer/registry",
    "/api/v1/tasks/../../x", "/peer/task?" + "a=b&" * 3000, "/%00", "/peer/\u00e9".encode("utf-8").decode("latin-1")]


def test_bad_calls_of_the_control_port_are_refused(unharmed):
    for path in CALLS:
        answer = unharmed.ask("GET", path)
        if path.startswith("/peer/piece/suc?") and answer.status == 200 and answer.json["code"] in (200, 611):
            continue  # a report about nothing may be thanked for
        said_clearly(answer, path)


SYNCS = [b"", b"{", b"[]", b"null", {"taskId": TASK, "cid": CID}, {"taskId": 5}, {"taskId": TASK, "cid": CID, "slots": -1},
         {"taskId": TASK, "cid": CID, "done": [[10 ** 30]], "slots": 10 ** 30}, {"task": {}, "cid": [], "done": "x"}]


def test_bad_syncs_are_refused(unharmed):
    for body in SYNCS:
        said_clearly(unharmed.ask("POST", "/peer/sync", body, {"Content-Type": "application/json", "X-Dfly": "1"}), body)


ODD_REPORTS = ['"done": [[1e999, "", 1, 1]]', '"done": [[0, "", 1, 1e999]]', '"done": [[0, "", NaN, 1]]', '"soon": [1e999]', '"soon": {}', '"soon": 5',
               '"failed": [[[], {}, null]]', '"have": "-1"', '"have": 5', '"have": "zz"', '"wait": NaN', '"slots": 1e999', '"done": [[-1, "", 1, 1]]']


def test_odd_reports_of_a_client_that_is_known_are_refused(unharmed):
    url = unharmed.host.world.origins[0].base + "good"
    task = unharmed.ask("POST", "/peer/registry", register(rawUrl=url, taskUrl=url)).json["data"]["taskId"]
    for report in ODD_REPORTS:
        body = '{"task": "%s", "cid": "%s", "wait": 0, %s}' % (task, CID, report) if "wait" not in report else (
            '{"task": "%s", "cid": "%s", %s}' % (task, CID, report))
        answer = unharmed.ask("POST", "/peer/sync", body, {"Content-Type": "application/json", "X-Dfly": "1"})
        if report in ('"done": [[0, "", NaN, 1]]', '"soon": {}'):
            continue  # nothing is said by it
        said_clearly(answer, report)
        assert answer.status == 400, (report, answer)


def test_wrong_methods_are_refused(unharmed):
    for method, path in (("GET", "/peer/registry"), ("POST", "/peer/task"), ("PUT", "/peer/sync"), ("BREW", "/"), ("DELETE", "/metrics")):
        said_clearly(unharmed.ask(method, path), method + path)


RANGES = ["bytes=5-1", "bytes=-5", "bytes=0-", "bytes=a-b", "0-4", "bytes=0-99999999999999999999999", "bytes=99999999999-",
          "bytes=0-1,3-4", "bytes=--1", "", "bytes=18446744073709551616-18446744073709551617"]


def test_odd_ranges_of_pieces_are_answered_soundly(unharmed):
    path = piece_path(unharmed)
    for range_ in RANGES:
        answer = ask(("127.0.0.1", unharmed.cdn_port), "GET", path, headers={"Range": range_, "pieceNum": "0", "pieceSize": "262144"})
        assert answer.status in (200, 206, 400, 416) and b"Traceback" not in answer.body, answer
        if answer.status >= 400:
            said_clearly(answer, range_)


def piece_path(node):
    """The pieces' path of the served file.  Wire: 2.3"""
    url = node.host.world.origins[0].base + "good"
    task = node.ask("POST", "/peer/registry", register(rawUrl=url, taskUrl=url)).json["data"]["taskId"]
    path = "/download/%s/%s" % (task[:3], task)
    assert ask(("127.0.0.1", node.cdn_port), "GET", path, headers={"Range": "bytes=0-262143"}).status == 206
    return path


TRICKS = ["/../../../../../../etc/passwd", "/peer/file/../../../../../../etc/passwd", "/download/../../../../etc/passwd", "/download/abc/" + TASK,
          "/peer/file/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/peer/file//etc/passwd", "/peer/file/", "/peer/file/" + "a" * 5000, "/peer/file/x%00y",
          "/peer/file/peer.pid", "/peer/file/../peer.pid", "//etc/passwd", "/download/abc/..%2f..%2f..%2fetc%2fpasswd", "*", "http://x/etc/passwd"]


def test_path_tricks_reach_no_file(unharmed):
    for address in every_port(unharmed)[1:]:
        for path in TRICKS:
            for headers in ({}, {"Range": "bytes=0-100", "pieceNum": "0", "pieceSize": "262144"}, {"Range": "bytes=0-100", "cdnSource": "source"}):
                answer = ask(address, "GET", path, headers=headers)
                assert b"root:" not in answer.body
                said_clearly(answer, path)


PIECE_HEADERS = [
    {}, {"Range": "bytes=0-99"}, {"Range": "bytes=0-99", "pieceNum": "x", "pieceSize": "y"}, {"Range": "bytes=0-99", "pieceNum": "-1", "pieceSize": "-1"},
    {"Range": "bytes=0-99", "pieceNum": "9" * 40, "pieceSize": "9" * 40}, {"Range": "bytes=5-1", "pieceNum": "0", "pieceSize": "262144"},
    {"Range": "bytes=0-3", "pieceNum": "0", "pieceSize": "262144"}, {"Range": "bytes=0-262143", "pieceNum": "1", "pieceSize": "262144"},
    {"Range": "bytes=999999999999-999999999999999", "pieceNum": "3814697", "pieceSize": "262144"}]


def test_bad_piece_requests_to_an_uploader_are_refused(unharmed):
    for headers in PIECE_HEADERS:
        said_clearly(ask(unharmed.uploader, "GET", "/peer/file/unknown-1-1.000", headers=headers))


CONTROLS = ["/check/x", "/rate/x", "/client/finish", "/client/finish?superNode=127.0.0.1:1&taskFileName=a&taskID=b&cid=c",
            "/server/ping", "/check/../../etc", "/rate/" + "x" * 4000]


def test_the_uploaders_control_is_not_open_to_everybody(unharmed):
    """Odd headers do no harm; whatever is answered holds no traceback."""
    for path in CONTROLS:
        for headers in ({}, {"dataDir": "/etc", "totalLimit": "-5"}, {"totalLimit": "1", "dataDir": "/etc"}, {"rateLimit": "x"}, {"param": "{"}):
            answer = ask(unharmed.uploader, "GET", path, headers=headers)
            assert answer.status and b"Traceback" not in answer.body
    assert b"root:" not in ask(unharmed.uploader, "GET", "/peer/file/passwd", headers={"Range": "bytes=0-99", "pieceNum": "0", "pieceSize": "262144"}).body


def every_port(node):
    return [("127.0.0.1", node.port), ("127.0.0.1", node.cdn_port), node.uploader]


BROKEN = [
    b"\r\n\r\n\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    b"\0" * 5000 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nNo colon here\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"POST /peer/registry HTTP/1.1\r\nContent-Length: 999999999999999999\r\n\r\n{}",
    b"POST /peer/registry HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
    b"POST /peer/registry HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"GET /" + b"a" * 200000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20000 + b"\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 200000 + b"\r\n\r\n"]


def test_broken_http_gets_an_error_or_the_door(unharmed):
    for request in BROKEN:
        for address in every_port(unharmed):
            answer = raw(address, request, half_close=True)
            assert answer.status == 0 or answer.status >= 400, answer
            assert b"Traceback" not in answer.body


def test_an_oversized_body_is_refused_before_it_is_read(unharmed):
    body = b'{"x": "' + b"a" * (3 << 20) + b'"}'
    for path in ("/peer/registry", "/peer/sync", "/task/metrics"):
        answer = unharmed.ask("POST", path, body, {"Content-Type": "application/json"})
        assert answer.status in (0, 413), answer


def test_clients_that_stop_in_the_middle_are_forgotten(unharmed):
    for address in every_port(unharmed):
        for request in (b"GE", b"GET / HTTP/1.1\r\nHo", b"POST /peer/registry HTTP/1.1\r\nContent-Length: 500\r\n\r\n{"):
            with socket.create_connection(address, 5) as s:
                s.sendall(request)


def test_a_hundred_slow_clients_do_not_stop_the_others(unharmed, host, origin, blob):
    slow = [socket.create_connection(address, 5) for address in every_port(unharmed) for _ in range(34)]
    try:
        for s in slow:
            s.sendall(b"GET /peer/task HTTP/1.1\r\nX-Slow: ")
        assert threads(unharmed.pid) < 60, "a thread for every connection"
        host().get(origin.base + "good", check=blob(MB))
    finally:
        for s in slow:
            s.close()


def test_a_client_that_never_finishes_its_request_is_hung_up_on(unharmed):
    with socket.create_connection(("127.0.0.1", unharmed.port), 90) as s:
        s.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        answer = read_answer(s)
        assert answer.status in (0, 408), answer


def test_a_reader_that_stops_reading_holds_no_thread(unharmed):
    path = piece_path(unharmed)
    request = ("GET %s HTTP/1.1\r\nHost: x\r\nRange: bytes=0-262143\r\npieceNum: 0\r\npieceSize: 262144\r\n\r\n" % path).encode() * 40
    stuck = [socket.create_connection(("127.0.0.1", unharmed.cdn_port), 5) for _ in range(20)]
    try:
        for s in stuck:
            s.sendall(request)
        assert threads(unharmed.pid) < 40
        assert unharmed.ask("GET", "/_ping").status == 200
    finally:
        for s in stuck:
            s.close()


def test_requests_in_one_packet_are_answered_in_order(unharmed):
    with socket.create_connection(("127.0.0.1", unharmed.port), 10) as s:
        s.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\nGET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = b""
        while True:
            more = s.recv(65536)
            if not more:
                break
            data += more
    statuses = [int(part.split()[0]) for part in data.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 404, 200], data


def test_error_messages_are_json_with_the_cause(unharmed):
    answer = unharmed.ask("POST", "/peer/registry", register(rawUrl="gopher://x"))
    said = json.loads(answer.body.decode())
    assert "gopher" in json.dumps(said) or "rawUrl" in json.dumps(said), said
