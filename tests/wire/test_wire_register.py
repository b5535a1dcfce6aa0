"""POST /peer/registry of our supernode, with requests written as the old programs write them.  Wire: 1, 2"""
import hashlib
import json
import socket
import time

import hand as hands
import pytest
from rawhttp import talk
from world import dead_port, wait_for

JSON = "application/json;charset=utf-8"
FORM = "application/x-www-form-urlencoded"


@pytest.fixture
def url(origin, blob):
    return origin.put("f.bin", blob(1000))


def test_a_form_as_dfget_0_2_0_writes_it(supernode, hand, origin, blob):
    url = origin.put("f20.bin", blob(1000))
    client = hand(supernode())
    body = ("cid=%s&ip=127.0.0.1&hostName=localhost&superNodeIp=127.0.0.1&port=49695&callSystem=pycall&version=0.2.0"
            "&dfdaemon=false&path=%%2Fpeer%%2Ffile%%2FP20.bin-18014-1795408580.604&rawUrl=%s&taskUrl=%s"
            "&headers=X-Test%%3A+hello&headers=Accept%%3A+%%2A" % (
                client.cid, url.replace(":", "%3A").replace("/", "%2F"), url.replace(":", "%3A").replace("/", "%2F")))
    data = hands.registered(client.post(body.encode("ascii"), FORM))
    assert data["fileLength"] == 1000
    asked = origin.log[-1]
    assert asked.headers["x-test"] == "hello" and asked.headers["accept"] == "*"


def test_json_as_dfget_1_0_6_writes_it(supernode, hand, origin, blob):
    url = origin.put("f20.bin", blob(1000)) + "?a=1&b=2"
    client = hand(supernode(), port=15101)
    body = ('{"superNodeIp":"127.0.0.1","rawUrl":"%s","taskUrl":"%s","cid":"%s","ip":"127.0.0.1","hostName":"vm","port":15101,'
            '"path":"/peer/file/A20.bin-17814-1795408506.429","callSystem":"testA","headers":["X-Test: hello","Accept: */*"]}' % (
                url.replace("&", "\\u0026"), url.replace("&", "\\u0026"), client.cid))
    data = hands.registered(client.post(body.encode("ascii"), JSON))
    assert data["fileLength"] == 1000
    assert origin.log[-1].path == "/f20.bin?a=1&b=2" and origin.log[-1].headers["x-test"] == "hello"


def test_both_encodings_name_the_same_task(supernode, hand, url):
    node = supernode()
    assert hands.registered(hand(node).form(url))["taskId"] == hands.registered(hand(node).json(url))["taskId"]


@pytest.mark.parametrize("kind, content_type", [
    ("form", FORM + "; charset=UTF-8"), ("form", FORM + ";charset=utf-8"), ("form", FORM.upper()), ("json", "application/json"),
    ("json", "application/json; charset=UTF-8"), ("json", "APPLICATION/JSON;charset=utf-8")])
def test_only_the_media_type_decides(supernode, hand, url, kind, content_type):
    client = hand(supernode())
    hands.registered(getattr(client, kind)(url, content_type=content_type))


@pytest.mark.parametrize("kind", ["form", "json"])
def test_keys_in_any_case_and_unknown_keys(supernode, hand, url, kind):
    client = hand(supernode())
    over = dict(rawUrl=None, cid=None, ip=None, superNodeIp=None, rawURL=url, cID=client.cid, IP="127.0.0.1",
                superNodeIP="127.0.0.1", bogus="1", future="x")
    hands.registered(getattr(client, kind)(url, **over))
    client.start()


@pytest.mark.parametrize("kind, headers, seen", [
    ("json", ["X-A: 1", "X-B:2"], {"x-a": "1", "x-b": "2"}), ("json", [], {}), ("json", None, {}), ("form", ["X-A: 1", "X-B:2"], {"x-a": "1", "x-b": "2"}),
    ("form", "X-A: 1", {"x-a": "1"}), ("form", None, {}), ("json", ["X-A: 1", "X-A: 2"], {"x-a": "1,2"}), ("json", ["X-A: a:b:c"], {"x-a": "a:b:c"})])
def test_the_headers_field_in_every_shape_reaches_the_origin(supernode, hand, origin, url, kind, headers, seen):
    hands.registered(getattr(hand(supernode()), kind)(url, headers=headers))
    got = wait_for(lambda: origin.log and origin.log[0], 5).headers
    for name, value in seen.items():
        assert got[name].replace(", ", ",") == value


def test_a_json_null_counts_as_missing(supernode, hand, url):
    client = hand(supernode())
    body = json.dumps(dict(client.fields(url), headers=None, md5=None, taskUrl=None, identifier=None, rootCAs=None, dfdaemon=None))
    hands.registered(client.post(body.encode("ascii"), JSON))


def test_missing_task_url_means_the_raw_url(supernode, hand, url):
    node = supernode()
    with_it = hands.registered(hand(node).json(url))["taskId"]
    assert hands.registered(hand(node).json(url, taskUrl=None))["taskId"] == with_it
    assert hands.registered(hand(node).form(url, taskUrl=""))["taskId"] == with_it


BAD = [dict(cid=""), dict(cid=None), dict(path=""), dict(path=None), dict(ip=""), dict(ip=None), dict(ip="localhost"), dict(ip="1.2.3"),
       dict(ip="999.1.1.1"), dict(rawUrl=None, taskUrl=None), dict(rawUrl=""), dict(rawUrl="ftp://host/f"), dict(rawUrl="/etc/passwd"),
       dict(rawUrl="file:///etc/passwd"), dict(rawUrl="http://"), dict(rawUrl="not a url"), dict(port=-1), dict(port=70000),
       dict(port="eighty"), dict(port="15.5")]


@pytest.mark.parametrize("kind", ["form", "json"])
def test_bad_fields_are_refused_in_words(supernode, hand, url, kind):
    """Checklist 14 (3): on failure a code other than 200, with msg.  All on one supernode, which must stay well."""
    node = supernode()
    for over in BAD:
        try:
            hands.refused(getattr(hand(node), kind)(url, **over))
        except AssertionError as error:
            raise AssertionError("%s: %s" % (over, error))
    hands.registered(hand(node).json(url))


@pytest.mark.parametrize("fields", [
    dict(rawUrl=5), dict(cid=["x"]), dict(headers="X-A: 1"), dict(headers=[1, 2]), dict(headers={"a": "b"}), dict(ip={"a": 1}), dict(port=None),
    dict(port="15101"), dict(port=15101.0), dict(dfdaemon="yes"), dict(dfdaemon=3), dict(md5=5), dict(path=True), dict(rawUrl=None),
    dict(headers=["no colon"]), dict(headers=["X: a\r\nEvil: 1"]), dict(rootCAs=["%%%"]), dict(rootCAs=[5]), dict(rootCAs=["L2V0Yy9ob3N0cw=="]), dict(cid="x" * 100000)])
def test_odd_json_types_get_a_clean_answer(supernode, hand, url, fields):
    node = supernode()
    client = hand(node)
    body = json.dumps(dict(client.fields(url), **fields)).encode("ascii")
    reply = client.post(body, JSON)
    if reply.json()["code"] == 200:
        hands.registered(reply)
    else:
        hands.refused(reply)
    assert hand(node).get("/_ping").status == 200


@pytest.mark.parametrize("body, content_type", [
    (b"", JSON), (b"{", JSON), (b"[]", JSON), (b"null", JSON), (b"5", JSON), (b'"x"', JSON), (b"\xff\xfe", JSON), (b"{}", JSON), (b"", FORM),
    (b"%zz=%", FORM), (b"a&b&c", FORM), (b"\xff\xfe=1", FORM), (b"{}", ""), (b"hello", "text/plain"), (b"[" * 100000, JSON)])
def test_bodies_that_are_no_register(supernode, hand, body, content_type):
    node = supernode()
    hands.refused(hand(node).post(body, content_type))
    assert hand(node).get("/_ping").status == 200


def test_a_wrong_method_is_refused(supernode, hand):
    reply = hand(supernode()).get("/peer/registry")
    assert reply.status in (404, 405)
    assert int(reply.headers["content-length"]) == len(reply.body)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(supernode, hand):
    client = hand(supernode())
    head = "POST /peer/registry HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (JSON, 1 << 40)
    reply = talk(client.address, head.encode("ascii"), "POST", 2, 5)
    assert reply.status in (400, 413)
    hands.refused(reply)


@pytest.mark.parametrize("head", [
    "POST /peer/registry HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", "POST /peer/registry HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    "GET /peer/task HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % ("y" * 200000), "GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % ("y" * 200000),
    "NONSENSE\r\n\r\n", "GET / HTTP/9.9\r\n\r\n"])
def test_broken_requests_get_an_http_error(supernode, hand, head):
    node = supernode()
    with socket.create_connection(("127.0.0.1", node.port), 5) as sock:
        sock.settimeout(10)
        try:
            sock.sendall(head.encode("ascii"))
            answer = sock.recv(65536)
        except ConnectionError:
            answer = b""
    assert not answer or answer.split(b" ")[1][:1] in (b"4", b"5"), answer[:100]
    assert b"Traceback" not in answer
    assert hand(node).get("/_ping").status == 200


def test_a_client_that_stops_mid_request_harms_nobody(supernode, hand, url):
    node = supernode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", node.port), 5) as sock:
            sock.sendall(b"POST /peer/registry HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{\"rawUrl\":")
    hands.registered(hand(node).json(url))


def test_a_slow_origin_does_not_hold_the_register(supernode, hand, origin, blob):
    """Checklist 14 (1): an answer within 5 s, or both old clients go elsewhere."""
    url = origin.put("slow.bin", blob(1000), delay=8)
    began = time.monotonic()
    data = hands.registered(hand(supernode()).json(url))
    assert time.monotonic() - began < 4.0
    assert data["fileLength"] == -1


def test_an_origin_that_nobody_reaches(supernode, hand):
    """1.0.6 answers 200 and fails later, 0.2 answers 607; ours may do either, but in time."""
    url = "http://127.0.0.1:%d/f" % dead_port()
    client = hand(supernode())
    reply = client.json(url)
    if reply.json()["code"] == 200:
        answer = client.start()
        assert answer["code"] in (500, 502, 604, 607), answer
    else:
        hands.refused(reply)


@pytest.mark.parametrize("kind", ["py", "go"])
def test_a_missing_file_sends_old_clients_to_the_source_or_away(supernode, old, origin, kind):
    result = old.get(kind, supernode(), origin.base + "none.bin", patience_s=15)
    assert result.reason in (1, 3) and result.exit_code == (0 if kind == "py" else 80)


@pytest.mark.parametrize("kind, code", [("py", 22), ("go", 79)])
def test_608_reaches_a_daemon_whose_origin_wants_a_login(supernode, old, origin, blob, kind, code):
    url = origin.put("secret", blob(1000), auth="Basic abc")
    result = old.get(kind, supernode(), url, dfdaemon=True)
    assert result.exit_code == code and result.calls[-1].code == 608
    assert not result.from_source


@pytest.mark.parametrize("kind", ["py", "go"])
def test_the_right_login_downloads(supernode, old, origin, blob, kind):
    data = blob(300000)
    url = origin.put("secret", data, auth="Basic abc")
    old.get(kind, supernode(), url, check=data, headers=["Authorization: Basic abc"])


def test_a_login_is_not_lent_to_others(supernode, old, hand, origin, blob):
    """Fault 2: after one client with credentials, one without gets nothing."""
    data = blob(300000)
    url = origin.put("secret", data, auth="Basic abc")
    node = supernode()
    old.get("go", node, url, check=data, headers=["Authorization: Basic abc"])
    thief = hand(node)
    reply = thief.json(url)
    if reply.json()["code"] == 200:
        assert thief.start()["code"] not in (600, 601)
    else:
        hands.refused(reply)


def test_609_is_never_sent_to_stay(supernode, old, origin, blob):
    """Checklist 14 (3): dfget 0.2 asks for ever on 609."""
    url = origin.put("secret", blob(1000), auth="Basic abc")
    node = supernode()
    for _ in range(7):
        result = old.get("py", node, url, patience_s=8)
        assert all(call.code != 609 for call in result.calls)


def test_the_same_client_may_register_again(supernode, hand, url):
    client = hand(supernode())
    first = client.join(url)
    assert client.join(url) == first
    assert client.start()["code"] == 601
    assert client.join(url) == first


# -- 2: identifiers --------------------------------------------------------------------------------
BASE = "http://127.0.0.1:9000/"
VECTORS = [("f20.bin", {}, "9dd50acb84f01de661c3f0be541263cd6d315109f1e01d08bb7920efa5ae5f3c"),
           ("small.bin", dict(headers=["Range: bytes=0-99"]), "1e9aae0b1ea2088b6877003a0b38787f82ce85a3266c088d4d939002e0c3c02c"),
           ("small.bin?a=1", dict(identifier="v1"), "be947e03c6c94322cfb365a80326a4d52a119cbdc848ffeaf099e54c66942a85"),
           ("f20.bin?c=2", dict(md5="13256635854f2472f9deebfd4f1fe1a4"), "32572f43fc2e8ce27bd11aa705e7673cdecf4575fbaf42c83ed76d47b019936f"),
           ("f20.bin?c=2", dict(identifier="id1"), "78f2e7d1599ae8c735a23902365d50278d4d4a84aba8d2519d38edbcc1170736"),
           ("f20.bin?c=2", dict(md5="13256635854f2472f9deebfd4f1fe1a4", identifier="id1"),
            "32572f43fc2e8ce27bd11aa705e7673cdecf4575fbaf42c83ed76d47b019936f")]


@pytest.mark.parametrize("kind", ["form", "json"])
def test_the_task_ids_of_section_17(supernode, hand, origin, blob, kind):
    url = origin.put("f.bin", blob(1000), stall_after=10)  # so that nobody compares the digests meanwhile
    node = supernode()
    for name, over, task_id in VECTORS:
        data = hands.registered(getattr(hand(node), kind)(url, **dict(over, taskUrl=BASE + name)))
        assert data["taskId"] == task_id, (name, over)


def test_only_md5_identifier_and_range_are_part_of_the_identity(supernode, hand, url):
    node = supernode()
    plain = hand(node).join(url)["taskId"]
    for over in (dict(headers=["X-A: 1"]), dict(callSystem="x"), dict(version="0.4.1"), dict(dfdaemon=True), dict(hostName="other")):
        assert hand(node).join(url, **over)["taskId"] == plain, over
    for over in (dict(headers=["Range: bytes=0-99"]), dict(identifier="x"), dict(md5=hashlib.md5(b"").hexdigest())):
        reply = hand(node).json(url, **over)
        assert reply.json()["code"] != 200 or reply.json()["data"]["taskId"] != plain, over


def test_a_range_of_the_user_is_a_task_of_its_own(supernode, old, origin, blob):
    """Wire: 2.1.  1.0.6 keeps ranged and full downloads apart; the swarm hands out the range's bytes."""
    data = blob(1000000)
    url = origin.put("f.bin", data)
    node = supernode()
    old.get("go", node, url, check=data)
    old.get("go", node, url, check=data[100:600100], headers=["Range: bytes=100-600099"])
    old.get("py", node, url, check=data)


@pytest.mark.parametrize("query, filters, py, go", [
    ("a=1&b=2&c=3", "b", "?a=1&c=3", "?a=1&c=3"), ("a=1", "a", "?", ""), ("b=2&&c=3", "b", "?c=3", "?&c=3"), ("a=1&b=2", "a&b", "?", "")])
def test_filtered_urls_name_tasks_as_each_generation_says(supernode, old, hand, origin, blob, query, filters, py, go):
    """Wire: 2.2"""
    data = blob(1000)
    base = origin.put("f.bin", data)
    node = supernode()
    for kind, rest in (("py", py), ("go", go)):
        client = old.client(kind, node, base + "?" + query, filters=filters)
        assert client.task_url == base + rest
        old.good(client.run(), data)
    assert origin.log[0].path == "/f.bin?" + query


def test_unicode_and_odd_characters_survive(supernode, old, origin, blob):
    data = blob(1000)
    url = origin.put("f.bin", data) + "?name=%C3%A9&x=a%20b&y=<>&z='"
    node = supernode()
    for kind in ("go", "py"):
        old.get(kind, node, url, check=data)
