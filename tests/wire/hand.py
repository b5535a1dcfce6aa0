"""A client driven by hand: single requests written as the old programs write them, answers checked to the byte."""
import hashlib
import json
import re
import struct
import time
import urllib.parse

import old_dfget
from rawhttp import talk

REGISTER_KEYS = {"taskId", "fileLength", "pieceSize", "cdnSource", "asSeed", "seedTaskID"}
PIECE_KEYS = {"range", "pieceNum", "pieceSize", "pieceMd5", "cid", "peerIp", "peerPort", "path", "downLink"}
EMPTY_MD5 = "d41d8cd98f00b204e9800998ecf8427e"


def envelope(reply, status=200):
    """Return the JSON object of a protocol answer whose form is right: status, length, type, code.  Wire: 0"""
    assert reply.status == status, (reply.status, reply.body[:300])
    assert reply.version == "HTTP/1.1"
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert reply.headers["content-type"].split(";")[0] == "application/json"
    answer = reply.json()
    assert isinstance(answer, dict) and isinstance(answer.get("code"), int), answer
    assert set(answer) <= {"code", "msg", "data"}, "an old party sees something new: %s" % sorted(answer)
    assert isinstance(answer.get("msg", ""), str)
    return answer


def refused(reply):
    """Return the JSON of a failure: never code 200, words for a person, no traceback, in one of the two envelopes."""
    assert reply.status == 200 or 400 <= reply.status < 600, reply.status
    assert int(reply.headers["content-length"]) == len(reply.body)
    answer = reply.json()
    assert isinstance(answer["code"], int) and answer["code"] not in (200, 600, 601, 603), answer
    assert answer.get("msg") or answer.get("message"), answer
    assert "Traceback" not in reply.body.decode("utf-8")
    return answer


def registered(reply):
    """Return `data` of a successful register, its types as Go wants them.  Wire: 1.3"""
    answer = envelope(reply)
    assert answer["code"] == 200, answer
    data = answer["data"]
    assert set(data) <= REGISTER_KEYS, sorted(data)
    old_dfget.go_struct(data, old_dfget.GO_REGISTER_FIELDS, "RegisterResponseData")
    assert re.match("^[0-9a-f]{64}$", data["taskId"])
    assert data["fileLength"] >= -1 and 0 < data["pieceSize"] < 2 ** 27
    return data


class Hand:
    """One client of one supernode.  `node` is a World's Supernode; `source` the address it calls from, if not the system's choice."""

    def __init__(self, node, ip="127.0.0.1", port=0, source=None):
        self.node, self.ip, self.port, self.source = node, ip, port, source
        self.address = ("127.0.0.1", node.port)
        self.sign = old_dfget.new_sign()
        self.cid = "%s-%s" % (ip, self.sign)
        self.path = "/peer/file/hand-" + self.sign
        self.task = self.data = None

    # -- register ----------------------------------------------------------------------------------
    def fields(self, url, **over):
        """Return the register fields, `over` replaced; None leaves one out."""
        fields = dict(superNodeIp="127.0.0.1", rawUrl=url, taskUrl=url, cid=self.cid, ip=self.ip, hostName="vm",
                      port=self.port, path=self.path, version="1.0.6")
        fields.update(over)
        return {k: v for k, v in fields.items() if v is not None}

    def post(self, body, content_type, path="/peer/registry"):
        """POST bytes."""
        head = "POST %s HTTP/1.1\r\nUser-Agent: fasthttp\r\nHost: %s:%d\r\n%sContent-Length: %d\r\n\r\n" % (
            (path,) + self.address + ("Content-Type: %s\r\n" % content_type if content_type else "", len(body)))
        return talk(self.address, head.encode("latin-1") + body, "POST", 2, 10, self.source)

    def json(self, url, content_type="application/json;charset=utf-8", **over):
        """Register as 1.0.6 does; return the Reply."""
        body = json.dumps(self.fields(url, **over), separators=(",", ":")).replace("&", "\\u0026").encode("utf-8")
        return self._joined(self.post(body, content_type))

    def form(self, url, content_type="application/x-www-form-urlencoded", **over):
        """Register as 0.2.0 does; return the Reply."""
        fields = self.fields(url, **dict(dict(callSystem="UNKNOWN", dfdaemon="false", version="0.2.0"), **over))
        return self._joined(self.post(urllib.parse.urlencode(fields, doseq=True).encode("ascii"), content_type))

    def _joined(self, reply):
        if reply.status == 200 and isinstance(reply.json().get("data"), dict):
            self.data = reply.json()["data"]
            self.task = self.data["taskId"]
        return reply

    def join(self, url, **over):
        """Register and expect success; return `data`."""
        return registered(self.json(url, **over))

    # -- the other calls ---------------------------------------------------------------------------
    def get(self, target, headers="", method="GET"):
        """GET a target exactly as given from the API port."""
        request = "%s %s HTTP/1.1\r\nUser-Agent: fasthttp\r\nHost: %s:%d\r\n%s\r\n" % ((method, target) + self.address + (headers,))
        return talk(self.address, request.encode("latin-1"), method, 2, 10, self.source)

    def pull(self, status=700, result=502, dst="", range_="", **over):
        """Return the checked answer of /peer/task."""
        query = dict(srcCid=self.cid, dstCid=dst, range=range_, result=result, status=status, taskId=self.task)
        query.update(over)
        answer = envelope(self.get("/peer/task?" + "&".join("%s=%s" % kv for kv in query.items() if kv[1] is not None)))
        check_pull(answer)
        return answer

    def start(self, limit_s=20):
        """Pull with status 700 until something other than 602 comes."""
        end = time.monotonic() + limit_s
        while True:
            answer = self.pull()
            if answer["code"] != 602 or time.monotonic() > end:
                return answer

    def done(self, task, result=503):
        """Report a piece in a pull; return the answer."""
        return self.pull(701, result, task["cid"], task["range"])

    def suc(self, task, **over):
        """Report a piece by /peer/piece/suc; return the Reply."""
        query = dict(taskId=self.task, cid=self.cid, dstCid=task["cid"], pieceRange=task["range"])
        query.update(over)
        return self.get("/peer/piece/suc?" + "&".join("%s=%s" % kv for kv in query.items() if kv[1] is not None))

    def down(self):
        """Say good-bye; return the Reply."""
        return self.get("/peer/service/down?taskId=%s&cid=%s" % (self.task, self.cid))

    def fetch(self, task, range_=None):
        """GET one piece as 1.0.6 does; return the Reply."""
        return fetch((task["peerIp"], task["peerPort"]), task["path"], range_ or "bytes=" + task["range"],
                     "Piecenum: %d\r\nPiecesize: %d\r\n" % (task["pieceNum"], task["pieceSize"]))

    def offers(self, limit=40):
        """Return every cid that is offered while it downloads; whatever would come from a peer fails at once."""
        answer, cids, queue, done = self.start(), set(), [], set()
        while answer["code"] != 600 and limit:
            limit -= 1
            if answer["code"] == 601:
                queue += [t for t in answer["data"] if t["pieceNum"] not in done and t not in queue]
            if not queue:
                answer = self.pull()
                continue
            task = queue.pop(0)
            cids.add(task["cid"])
            if task["cid"].startswith("cdnnode:"):
                self.suc(task)
                done.add(task["pieceNum"])
                answer = self.done(task)
            else:
                answer = self.pull(701, 500, task["cid"], task["range"])
        assert answer["code"] == 600, answer
        return cids

    def finish(self, answer=None, report="both", limit_s=40):
        """Fetch and report until 600; return ({num: wrapped bytes}, data of the 600, [every 601 element])."""
        answer = answer or self.start()
        got, seen, queue, end = {}, [], [], time.monotonic() + limit_s
        while answer["code"] != 600:
            assert time.monotonic() < end, (answer, sorted(got), len(queue))
            if answer["code"] == 601:
                known = {t["range"] for t in queue}
                fresh = [t for t in answer["data"] if t["range"] not in known and t["pieceNum"] not in got]
                queue += fresh
                seen += fresh
                assert len(queue) <= 4, "more than 4 outstanding"
            else:
                assert answer["code"] == 602, answer
            if not queue:
                answer = self.pull()
                continue
            task = queue.pop(0)
            got[task["pieceNum"]] = piece_body(self.fetch(task), task)
            if report in ("suc", "both"):
                assert envelope(self.suc(task))["code"] in (611, 200)
            answer = self.pull() if report == "suc" else self.done(task)
        return got, answer["data"], seen


def check_pull(answer):
    """Checklist 14 (7), (8): never an answer that an old client can't digest."""
    code = answer["code"]
    assert code not in (200, 603, 611, 612), answer
    if code == 601:
        assert isinstance(answer["data"], list) and 1 <= len(answer["data"]) <= 4, answer
        for task in answer["data"]:
            assert set(task) == PIECE_KEYS, sorted(task)
            old_dfget.go_struct(task, old_dfget.GO_PIECE_FIELDS, "PieceTask")
            assert re.match(r"^\d+-\d+$", task["range"]) and re.match(r"^[0-9a-f]{32}:\d+$", task["pieceMd5"]), task
            assert int(task["range"].split("-")[0]) == task["pieceNum"] * task["pieceSize"], task
            assert len(task["cid"]) >= 25, task["cid"]
            assert task["path"].startswith("/") and "://" not in task["path"]
            assert task["peerPort"] > 0, "port 0 handed out"
        assert len({t["range"] for t in answer["data"]}) == len(answer["data"])
    if code == 600:
        assert set(answer["data"]) == {"md5", "fileLength"}, answer
        assert isinstance(answer["data"]["fileLength"], int) and re.match("^([0-9a-f]{32})?$", answer["data"]["md5"])


def fetch(address, path, range_=None, more="", method="GET"):
    """One request for a piece file, written as 1.0.6 writes it; return the Reply."""
    request = "%s %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: dfget/1.0.6\r\n%s%s\r\n" % (
        (method, path) + tuple(address) + (more, "Range: %s\r\n" % range_ if range_ else ""))
    return talk(tuple(address), request.encode("latin-1"), method, 2, 10)


def piece_body(reply, task):
    """Return the wrapped bytes of an answer, checked against its assignment.  Wire: 5.1"""
    assert reply.status in (200, 206), (reply.status, reply.body[:200])
    md5, length = task["pieceMd5"].split(":")
    assert len(reply.body) == int(length)
    assert hashlib.md5(reply.body).hexdigest() == md5
    head = struct.unpack(">I", reply.body[:4])[0]
    assert head & 0xFFFFFF | task["pieceSize"] << 4 == head | task["pieceSize"] << 4
    assert head == (len(reply.body) - 5) | task["pieceSize"] << 4
    assert reply.body[-1:] == b"\x7f"
    return reply.body


def unwrapped(got):
    """Return the file of {num: wrapped bytes}."""
    return b"".join(got[num][4:-1] for num in sorted(got))
