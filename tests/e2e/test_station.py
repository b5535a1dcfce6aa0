"""The tests' own origin does what its options say; without this the other tests prove nothing."""
import gzip
import socket
import threading
import time

import pytest
from world import MB, ask, wait_for


def get(origin, name, method="GET", **headers):
    return ask(("127.0.0.1", origin.port), method, "/" + name, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_it_serves_whole_files_and_ranges(origin, blob):
    data = blob(100000)
    origin.put("f", data)
    whole = get(origin, "f")
    assert whole.status == 200 and whole.body == data and whole.headers["accept-ranges"] == "bytes"
    part = get(origin, "f", Range="bytes=10-19")
    assert part.status == 206 and part.body == data[10:20] and part.headers["content-range"] == "bytes 10-19/100000"
    assert get(origin, "f", Range="bytes=-5").body == data[-5:]
    assert get(origin, "f", Range="bytes=99990-").body == data[99990:]
    assert get(origin, "f", Range="bytes=100000-").status == 416
    assert get(origin, "nothing").status == 404
    assert origin.gets("f") == 5 and origin.bytes_sent("f") == 100025


def test_it_answers_conditional_requests(origin, blob):
    origin.put("f", blob(10))
    tag = get(origin, "f", "HEAD").headers["etag"]
    assert get(origin, "f", If_None_Match=tag).status == 304
    assert get(origin, "f", Range="bytes=0-4", If_Range='"other"').status == 200
    assert get(origin, "f", Range="bytes=0-4", If_Range=tag).status == 206
    assert origin.gets("f") == 2


@pytest.mark.parametrize("how", [dict(length=False), dict(gzip=True)])
def test_it_sends_chunked_answers(origin, blob, how):
    data = blob(70000)
    origin.put("f", data, **how)
    answer = get(origin, "f", Accept_Encoding="gzip", Range="bytes=0-4")
    assert answer.status == 200 and answer.headers["transfer-encoding"] == "chunked" and "content-length" not in answer.headers
    body, rest = b"", answer.body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[:int(size, 16)], rest[int(size, 16) + 2:]
    assert (gzip.decompress(body) if "gzip" in how else body) == data


def test_it_redirects_and_asks_for_credentials(origin, blob):
    there = origin.put("there", blob(10), auth="Basic eDp5")
    origin.put("here", redirect_to=there)
    answer = get(origin, "here")
    assert answer.status == 302 and answer.headers["location"] == there
    assert get(origin, "there").status == 401
    assert get(origin, "there", Authorization="Basic eDp5").body == blob(10)


def test_it_fails_on_demand_and_only_once(origin, blob):
    data = blob(100000)
    origin.put("f", data, cut_after=5000, once=True)
    assert get(origin, "f").body == data[:5000]
    assert get(origin, "f").body == data
    origin.put("g", data, status=503, once=True)
    assert [get(origin, "g").status for _ in range(2)] == [503, 200]
    origin.put("h", data, wrong=7, once=True)
    assert get(origin, "h").body == data[:7] + bytes([data[7] ^ 255]) + data[8:]
    assert get(origin, "h").body == data


def test_it_redirects_to_what_is_good_for_one_request(origin, blob):
    there = origin.put("there", blob(10), tickets=True)
    origin.put("here", redirect_to=there, redirect_status=307)
    answer = get(origin, "here")
    name = answer.headers["location"].rpartition("/")[2]
    assert answer.status == 307 and [get(origin, n).status for n in ("there", name, name)] == [403, 200, 403]


def test_it_breaks_every_rule_on_demand(origin, blob):
    data = blob(100000)
    origin.put("f", data, status=429, retry_after="7", once=True)
    assert get(origin, "f").headers["retry-after"] == "7" and get(origin, "f").status == 200
    origin.put("f", data, middle=416)
    assert get(origin, "f").status == 200 and get(origin, "f", Range="bytes=5-").status == 416
    origin.put("f", data, declared=5)
    assert get(origin, "f").body == data[:5]
    origin.put("f", data, tag='"mine"', conditional=False)
    assert get(origin, "f").headers["etag"] == '"mine"'
    assert get(origin, "f", If_None_Match='"mine"').status == 200 and get(origin, "f", Range="bytes=5-", If_Range='"other"').status == 206
    origin.put("f", data, cut_after=5000, reset=True)
    with socket.create_connection(("127.0.0.1", origin.port), 10) as s:
        s.sendall(b"GET /f HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            while s.recv(65536):
                pass


def test_it_stalls_until_released_and_keeps_a_rate(origin, blob):
    data = blob(MB)
    origin.put("f", data, stall_after=123456)
    answers = []
    reader = threading.Thread(target=lambda: answers.append(get(origin, "f")))
    reader.start()
    wait_for(lambda: origin.bytes_sent("f") == 123456, 5)
    assert not answers
    origin.release("f")
    reader.join(10)
    assert answers[0].body == data
    origin.put("slow", data[:200000], rate=400000)
    began = time.monotonic()
    assert get(origin, "slow").body == data[:200000]
    assert 0.45 <= time.monotonic() - began < 1.0
