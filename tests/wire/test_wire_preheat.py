"""POST /preheats and its kin, as supernode 1.0.6 has them.  Wire: 12"""
import json
import os
import sys
import urllib.error
import urllib.request

import pytest
from world import DFLY, MB, bad, wait_for

sys.path.insert(0, os.path.dirname(DFLY))
import dfly  # noqa: E402


def ask(node, method, path, data=None):
    """Return (status, JSON) of a request."""
    body = None if data is None else data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request("http://%s%s" % (node.node, path), body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read().decode())


def end(node, number, prefix=""):
    """Return what a preheat says once it has ended."""
    wait_for(lambda: ask(node, "GET", prefix + "/preheats/" + number)[1]["status"] in ("SUCCESS", "FAILED"), 20)
    return ask(node, "GET", prefix + "/preheats/" + number)[1]


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_a_file_is_there_when_it_is_asked_for(origin, supernode, host, blob, prefix):
    node, data = supernode(), blob(3 * MB)
    url = origin.put("f", data)
    status, found = ask(node, "POST", prefix + "/preheats", {"type": "file", "url": url + "?a=1&Expires=5", "filter": "Expires", "identifier": "v1"})
    assert status == 201 and found == {"ID": dfly.task_id_of(url + "?a=1", "", "v1")}
    said = end(node, found["ID"], prefix)
    assert sorted(said) == ["ID", "finishTime", "startTime", "status"] and said["status"] == "SUCCESS" and said["startTime"].endswith("Z")
    assert origin.gets("f") == 1
    host().get(url + "?a=1&Expires=7", "-f", "Expires", "-i", "v1", "--notbs", check=data)
    assert origin.gets("f") == 1
    whole = ask(node, "GET", prefix + "/preheats")[1]
    assert [sorted(one) for one in whole] == [sorted(["ID", "URL", "Type", "Filter", "Identifier", "Headers", "ParentID", "Children", "Status", "StartTime",
                                                      "FinishTime", "ErrorMsg"])]
    assert ask(node, "DELETE", prefix + "/preheats/" + found["ID"]) == (200, True)
    assert ask(node, "GET", prefix + "/preheats") == (200, [])


def test_what_fails_says_why_and_may_be_tried_again(origin, supernode, host, blob):
    node = supernode("--fail-access-interval", "0s")
    url = origin.put("f", blob(MB), auth="Bearer good")
    order = {"type": "file", "url": url}
    number = ask(node, "POST", "/preheats", order)[1]["ID"]
    assert "401" in end(node, number)["errorMsg"]
    order["headers"] = {"Authorization": "Bearer good"}
    assert ask(node, "POST", "/preheats", order) == (201, {"ID": number})
    assert end(node, number)["status"] == "SUCCESS"
    whole = ask(node, "GET", "/preheats")[1][0]
    assert whole["Headers"] == {"Authorization": ""}
    bad(host().get(url, "--notbs"))  # what it was fetched with opens it to nobody else


def test_a_file_that_has_changed_is_brought_anew(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f", blob(MB, 1), headers=(("Cache-Control", "no-cache"),))
    number = ask(node, "POST", "/preheats", {"type": "file", "url": url})[1]["ID"]
    end(node, number)
    origin.change("f", data=blob(MB, 2))
    wait_for(lambda: ask(node, "POST", "/preheats", {"type": "file", "url": url})[0] == 201 and end(node, number) and origin.gets("f") == 2, 20)
    host().get(url, "--notbs", check=blob(MB, 2))


@pytest.mark.parametrize("data", [b"", b"[]", b"{", {"type": "file"}, {"type": "dir", "url": "http://x/y"}, {"type": "file", "url": "ftp://x/y"}, {"type": "file", "url": 5},
                                  {"type": "image", "url": "http://x/y"}, {"type": "file", "url": "http://x/y", "headers": ["a"]},
                                  {"type": "file", "url": "http://x/y", "headers": {"a": "b\r\nc: d"}}, {"type": "file", "url": "http://x/y", "headers": {"Range": "x"}}])
def test_what_can_t_be_preheated(supernode, data):
    status, found = ask(supernode(), "POST", "/preheats", data)
    assert status == 400 and found["code"] == 400 and found["message"]


def test_what_is_not_there(supernode):
    node = supernode()
    for method in ("GET", "DELETE"):
        status, found = ask(node, method, "/preheats/" + "0" * 64)
        assert status == 404 and found["code"] == 404 and "doesn't exist" in found["message"]


def test_a_registry_s_notification(origin, supernode, blob):
    node = supernode()
    url = origin.put("f", blob(MB))
    events = [{"action": "pull", "target": {"url": url}}, {"action": "push", "target": {}}, {"action": "push"}, 5, {"action": "push", "target": {"url": url}},
              {"action": "push", "target": {"url": "http://127.0.0.1:1/v2/a/blobs/sha256:" + "0" * 64}}]
    status, found = ask(node, "POST", "/preheats/registry", {"events": events})
    assert status == 200 and len(found["preheats"]) == 1
    assert end(node, found["preheats"][0])["status"] == "FAILED"
    assert ask(node, "POST", "/preheats/registry", {"events": {}})[0] == 400


@pytest.mark.parametrize("reference, url", [
    ("ubuntu", "https://registry-1.docker.io/v2/library/ubuntu/manifests/latest"),
    ("ubuntu:22.04", "https://registry-1.docker.io/v2/library/ubuntu/manifests/22.04"),
    ("team/app", "https://registry-1.docker.io/v2/team/app/manifests/latest"),
    ("docker.io/team/app:1", "https://registry-1.docker.io/v2/team/app/manifests/1"),
    ("localhost/app", "https://localhost/v2/app/manifests/latest"),
    ("reg:5000/a/b/c:1", "https://reg:5000/v2/a/b/c/manifests/1"),
    ("reg.example.com/a@sha256:" + "a" * 64, "https://reg.example.com/v2/a/manifests/sha256:" + "a" * 64),
    ("reg.example.com/a:1@sha256:" + "a" * 64, "https://reg.example.com/v2/a/manifests/sha256:" + "a" * 64),
    ("[::1]:5000/a", "https://[::1]:5000/v2/a/manifests/latest"),
])
def test_where_an_image_is(reference, url):
    assert dfly.image_url(reference) == url


@pytest.mark.parametrize("reference", ["", "A", "a b", "/x", "x:", "a@sha256:12", "reg:5000/", "a//../b"])
def test_what_is_no_image(reference):
    with pytest.raises(dfly.BadUsage):
        dfly.image_url(reference)
