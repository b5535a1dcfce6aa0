"""The two old supernodes, emulated: SN1 (Go, 1.0.6) and JSN (Java, 0.2), and a scripted one for every odd answer.

Each listens on an API port and a CDN port of loopback; the CDN port is the dumb static file server that operators put
beside a supernode.  Good enough that any dfget, old or ours, can download through them, faults included
(protocol.md 1, 3, 4, 5, 10).

    python old_supernode.py sn1|jsn [PORT [CDN_PORT]]
"""
import hashlib
import ipaddress
import json
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler

from rawhttp import ThreadedServer

GOOD = object()
MIB = 1 << 20
K = bytes.fromhex("3e492470672d7e41537e7350277271755f604f68266c7a23395d223d3b6e4525")


def task_id_of(task_url, sign="", range_=""):
    """Wire: 2.1"""
    return hashlib.sha256(K + (task_url + sign + range_).encode("utf-8") + K).hexdigest()


def piece_size_of(length):
    """Wire: 6"""
    if length < 0 or length <= 200 * MIB:
        return 4 * MIB
    return min(15 * MIB, 4 * MIB + (length // (100 * MIB) - 2) * MIB)


class Request:
    """One request to a supernode, kept in `log`."""

    def __init__(self, method, target, headers, body):
        self.method, self.target, self.body = method, target, body
        self.headers = {name.lower(): value for name, value in headers}
        self.path, _, query = target.partition("?")
        self.query = {k: v[-1] for k, v in urllib.parse.parse_qs(query, keep_blank_values=True).items()}
        self.code = None

    def __repr__(self):
        return "<%s %s -> %s>" % (self.method, self.target, self.code)


class HttpError(Exception):
    """SN1's other envelope: HTTP 500 and `message`.  Wire: 1.5"""

    def __init__(self, message, status=500):
        super().__init__(message)
        self.status = status


class _ApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self._do()

    do_POST = do_DELETE = do_PUT = do_GET

    def _do(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, self.headers.items(), body)
        self.owner.log.append(request)
        self._send(self.owner.answer(request), request)

    def _send(self, answer, request):
        if answer == "hang":
            self.owner.stopped.wait(30)
            answer = "close"
        if answer == "close" or isinstance(answer, bytes):
            if answer != "close":
                self.wfile.write(answer)
            self.close_connection = True
            return
        status, body = answer
        if not isinstance(body, bytes):
            request.code = body.get("code") if isinstance(body, dict) else None
            body = json.dumps(body, separators=(",", ":")).encode("utf-8")
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _CdnHandler(BaseHTTPRequestHandler):
    """A static file server as nginx is one: full, one range, clipped range, 416, 404."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        request = Request("GET", self.path, self.headers.items(), b"")
        self.owner.cdn_log.append(request)
        answer = self.owner.cdn_answer(request)
        if answer == "hang":
            self.owner.stopped.wait(30)
            answer = "close"
        if answer == "close":
            self.close_connection = True
            return
        status, body, more = answer
        request.code = status
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in more:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class _Task:
    """A file on the emulated supernode: pieces ready, who holds them, what each client has."""

    def __init__(self, task_id, raw_url, task_url, headers, length):
        self.id, self.raw_url, self.task_url, self.headers = task_id, raw_url, task_url, headers
        self.length = length
        self.piece_size = piece_size_of(length)
        self.status = "waiting"
        self.pieces, self.total, self.md5, self.wrapped = {}, None, "", 0
        self.holders, self.clients = {}, {}
        self.super_load, self.super_changed = 0, 0.0
        self.failed_at = 0.0


class _Client:
    """One registrant and what it has of its task."""

    def __init__(self, fields):
        self.fields, self.down = fields, False
        self.done, self.running, self.black, self.failures, self.load = set(), {}, set(), 0, 0


class OldSupernode:
    """What both have: sockets, the CDN download, the scheduler of 10.5.  _lock guards tasks and clients.

    slow_s   seconds before each piece becomes available
    """

    CDN_PREFIX = "download"
    DOWN_LINK = 0

    def __init__(self, ip="127.0.0.1", port=0, cdn_port=0, home=None, slow_s=0.0, down_limit=4, up_limit=5):
        self.ip, self.slow_s, self.down_limit, self.up_limit = ip, slow_s, down_limit, up_limit
        self.home = home or tempfile.mkdtemp(prefix="old-supernode-")
        self._own_home = home is None
        self.tasks, self.clients, self.log, self.cdn_log = {}, {}, [], []
        self.stopped = threading.Event()
        self._lock = threading.RLock()
        self._threads = []
        self._api = ThreadedServer((ip, port), type("Api", (_ApiHandler,), {"owner": self}))
        self._cdn = ThreadedServer((ip, cdn_port), type("Cdn", (_CdnHandler,), {"owner": self}))
        self.port, self.cdn_port = self._api.server_address[1], self._cdn.server_address[1]
        self.node = "%s:%d" % (ip, self.port)
        for server in (self._api, self._cdn):
            self._run(server.serve_forever, 0.05)

    def _run(self, function, *args):
        thread = threading.Thread(target=function, args=args, name="old-supernode", daemon=True)
        thread.start()
        self._threads.append(thread)

    def stop(self):
        """Close both ports and forget everything."""
        if self.stopped.is_set():
            return
        self.stopped.set()
        for server in (self._api, self._cdn):
            server.hang_up()
        for thread in self._threads:
            thread.join(10)
        if self._own_home:
            shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def count(self, path):
        """Return how many requests came for `path`."""
        return sum(1 for request in self.log if request.path == path)

    # -- dispatch ----------------------------------------------------------------------------------
    ROUTES = {}

    def answer(self, request):
        """Return (HTTP status, object or bytes) or "hang"/"close"/raw bytes."""
        method, name = self.ROUTES.get(request.path, ("GET", None))
        if name is None:
            return 404, b"404 page not found\n"
        if method != request.method:
            return self.wrong_method()
        try:
            with self._lock:
                return 200, getattr(self, name)(request)
        except HttpError as error:
            return error.status, {"code": error.status, "message": str(error)}

    def wrong_method(self):
        """Wire: 1.5"""
        return 405, b""

    # -- origin ------------------------------------------------------------------------------------
    def _open(self, task_headers, url, timeout_s):
        request = urllib.request.Request(url, headers=task_headers)
        return urllib.request.urlopen(request, timeout=timeout_s)

    def probe(self, url, headers, timeout_s=4.0):
        """GET and drop the body; return (HTTP status or 0, length or -1).  Wire: 10.1"""
        try:
            with self._open(headers, url, timeout_s) as reply:
                return reply.status, int(reply.headers.get("Content-Length", -1))
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, -1
        except OSError:
            return 0, -1

    def content_of(self, task):
        """Yield the origin's bytes in blocks of one piece's content.  OSError when it fails."""
        stride = task.piece_size - 5
        with self._open(task.headers, task.raw_url, 10) as body:
            got = 0
            while True:
                block = body.read(stride)
                got += len(block)
                if not block and got:
                    return
                yield block
                if len(block) < stride:
                    return

    def store_path(self, task_id):
        """Return where a task's wrapped bytes stand.  Wire: 5.2"""
        return os.path.join(self.home, "repo", self.CDN_PREFIX, task_id[:3], task_id)

    def start_cdn(self, task):
        """Begin the one asynchronous download of a task.  Wire: 10.2"""
        task.status = "running"
        self._run(self._download, task)

    def _download(self, task):
        path = self.store_path(task.id)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        whole, got, num = hashlib.md5(), 0, 0
        try:
            with open(path, "wb") as store:
                for content in self.content_of(task):
                    if self.slow_s and self.stopped.wait(self.slow_s):
                        return
                    whole.update(content)
                    got += len(content)
                    piece = struct.pack(">I", len(content) | task.piece_size << 4) + content + b"\x7f"
                    store.write(piece)
                    store.flush()
                    with self._lock:
                        task.pieces[num] = "%s:%d" % (hashlib.md5(piece).hexdigest(), len(piece))
                        task.wrapped += len(piece)
                    num += 1
            if 0 <= task.length != got:
                raise OSError("length differs")
        except OSError:
            with self._lock:
                task.status, task.failed_at = "failed", time.monotonic()
            return
        with self._lock:
            task.status, task.total, task.md5 = "success", num, whole.hexdigest()

    # -- scheduling --------------------------------------------------------------------------------
    def schedule(self, task, client, cid):
        """Return the new assignments of `client`, at most until 4 run.  Wire: 10.5"""
        nums = [n for n in task.pieces if n not in client.done and n not in client.running]
        near = sum(client.running) / len(client.running) if client.running else 0
        nums.sort(key=lambda n: (len(task.holders.get(n, ())), abs(n - near), random.random()))
        for num in nums:
            if len(client.running) >= self.down_limit:
                break
            provider = self.provider(task, client, cid, num)
            if provider:
                client.running[num] = provider
        return client.running

    def provider(self, task, client, cid, num):
        """Return the cid that shall serve `num` to `client`, or None."""
        for other in list(task.holders.get(num, ())):
            peer = task.clients.get(other)
            if client.failures > 5 or other == cid or not peer or peer.down or other in client.black:
                continue
            if peer.load < self.up_limit:
                peer.load += 1
                return other
        return self.take_super_slot(task)

    def take_super_slot(self, task):
        """Return the supernode's cid when it may send one more piece of this task."""
        raise NotImplementedError

    def super_cid(self, task):
        """Wire: 2.3"""
        return "cdnnode:%s~%s" % (self.ip, task.id)

    def assignment(self, task, client, num, provider):
        """Return one element of a 601.  Wire: 3.2"""
        item = {"range": "%d-%d" % (num * task.piece_size, (num + 1) * task.piece_size - 1), "pieceNum": num,
                "pieceSize": task.piece_size, "pieceMd5": task.pieces[num], "cid": provider}
        if provider == self.super_cid(task):
            item.update(peerIp=self.cdn_ip(client), peerPort=self.cdn_port,
                        path="/%s/%s/%s" % (self.CDN_PREFIX, task.id[:3], task.id))
        else:
            fields = task.clients[provider].fields
            item.update(peerIp=fields["ip"], peerPort=int(fields["port"]), path=fields["path"])
        item["downLink"] = self.DOWN_LINK
        return item

    def cdn_ip(self, client):
        """Return the address that `client` shall use for the CDN port."""
        return client.fields["superNodeIp"]

    def finished(self, task, client):
        """Tell whether the client has every piece."""
        return task.status == "success" and 0 < (task.total or 0) == len(client.done)

    def free(self, task, client, num):
        """Forget that `num` runs for `client`; return who was serving it."""
        provider = client.running.pop(num, None)
        if provider in task.clients:
            task.clients[provider].load = max(0, task.clients[provider].load - 1)
        return provider

    def num_of(self, range_, task):
        """Return the piece number of a range string, None for junk."""
        if not re.match(r"^\d+-\d+$", range_ or ""):
            return None
        return int(range_.split("-")[0]) // task.piece_size

    # -- the CDN port ------------------------------------------------------------------------------
    def cdn_answer(self, request):
        """Return (status, body, headers) for a file request.  Wire: 5.3"""
        path = os.path.join(self.home, "repo", urllib.parse.unquote(request.path).lstrip("/"))
        if ".." in request.path or not os.path.isfile(path):
            return 404, b"not found", []
        with open(path, "rb") as store:
            data = store.read()
        want = re.match(r"^bytes=(\d+)-(\d*)$", request.headers.get("range", ""))
        if not want:
            return 200, data, [("Accept-Ranges", "bytes")]
        start = int(want.group(1))
        end = min(int(want.group(2) or len(data)), len(data) - 1)
        if start >= len(data):
            return 416, b"", [("Content-Range", "bytes */%d" % len(data))]
        return 206, data[start:end + 1], [("Content-Range", "bytes %d-%d/%d" % (start, end, len(data)))]


# ==============================================================================
# SN1, the Go supernode 1.0.6
# ==============================================================================
SN1_FIELDS = dict(superNodeIp=str, rawUrl=str, taskUrl=str, cid=str, ip=str, hostName=str, port=int, path=str,
                  version=str, md5=str, identifier=str, callSystem=str, headers=list, dfdaemon=bool, insecure=bool,
                  rootCAs=list, taskId=str, fileLength=int, asSeed=bool)


class SN1(OldSupernode):
    """supernode 1.0.6.  `cdn_pattern="source"` stores nothing.  `load_reset_s` is the 30 s of fault 17."""

    ROUTES = {"/peer/registry": ("POST", "register"), "/peer/task": ("GET", "pull"), "/peer/piece/suc": ("GET", "suc"),
              "/peer/piece/error": ("GET", "piece_error"), "/peer/service/down": ("GET", "down"),
              "/task/metrics": ("POST", "metrics"), "/peer/heartbeat": ("POST", "heartbeat"), "/_ping": ("GET", "ping")}

    def __init__(self, *args, **kwargs):
        self.cdn_pattern = kwargs.pop("cdn_pattern", "local")
        self.load_reset_s = kwargs.pop("load_reset_s", 30.0)
        self._unreachable = {}
        super().__init__(*args, **kwargs)

    def fields(self, request):
        """Return the checked register fields; HttpError for what SN1 refuses.  Wire: 1.1, 1.2"""
        known = {name.lower(): name for name in SN1_FIELDS}
        form = request.headers.get("content-type") == "application/x-www-form-urlencoded"
        if form:
            pairs = urllib.parse.parse_qs(request.body.decode("utf-8"), keep_blank_values=True)
            values = {}
            for key, items in pairs.items():
                if key.lower() not in known:
                    raise HttpError('schema: invalid path "%s"' % key)
                name = known[key.lower()]
                kind = SN1_FIELDS[name]
                values[name] = items if kind is list else int(items[0]) if kind is int else (
                    items[0] == "true" if kind is bool else items[0])
        else:
            try:
                raw = json.loads(request.body.decode("utf-8"))
            except ValueError as error:
                raise HttpError("invalid character: %s" % error)
            values = {}
            for key, item in raw.items():
                name = known.get(key.lower())
                if name is None or item is None:
                    continue
                kind = SN1_FIELDS[name]
                if not isinstance(item, kind) or kind is int and isinstance(item, bool):
                    raise HttpError("json: cannot unmarshal into Go struct field TaskRegisterRequest.%s" % name)
                values[name] = item
        out = {name: kind() for name, kind in SN1_FIELDS.items()}
        out.update(values)
        self.check(out)
        return out

    def check(self, fields):
        """Wire: 1.2"""
        def invalid(what):
            raise HttpError('%s: {"Code":2,"Msg":"invalid value"}' % what)
        if not re.search(r"(http|https|HTTP|HTTPS)://.+", fields["rawUrl"]):
            invalid("raw url: %s" % fields["rawUrl"])
        if not fields["cid"]:
            invalid("cid is empty")
        if not fields["path"]:
            invalid("path is empty")
        try:
            ipaddress.IPv4Address(fields["ip"])
        except ValueError:
            invalid("ip: %s" % fields["ip"])
        if fields["port"] and not 15000 <= fields["port"] <= 65000:
            invalid("port: %d" % fields["port"])

    def register(self, request):
        """Wire: 1.3, 1.5"""
        fields = self.fields(request)
        headers = {}
        for entry in fields["headers"]:
            name, _, value = entry.partition(":")
            if value.strip():
                headers[name.strip()] = ",".join(filter(None, [headers.get(name.strip()), value.strip()]))
        task_url = fields["taskUrl"] or fields["rawUrl"]
        task_id = task_id_of(task_url, fields["md5"] or fields["identifier"], headers.get("Range", ""))
        task = self.tasks.get(task_id)
        if task is None or task.length == 0:
            task = self._new_task(task, task_id, fields, task_url, headers)
        task.clients[fields["cid"]] = _Client(fields)
        if task.status in ("waiting", "failed"):
            task.pieces.clear()
            self.start_cdn(task)
        source = "source" if self.cdn_pattern == "source" else "supernode"
        return {"code": 200, "data": {"taskId": task.id, "fileLength": task.length, "pieceSize": task.piece_size,
                                      "cdnSource": source, "asSeed": False, "seedTaskID": ""}, "msg": "success"}

    def _new_task(self, known, task_id, fields, task_url, headers):
        failed = self._unreachable.get(task_id, -999)
        if time.monotonic() - failed < 180:
            raise HttpError('url: %s: {"Code":12,"Msg":"url not reachable"}' % fields["rawUrl"])
        status, length = self.probe(fields["rawUrl"], headers)
        if status in (404, 410):
            self._unreachable[task_id] = time.monotonic()
            raise HttpError('url: %s: {"Code":12,"Msg":"url not reachable"}' % fields["rawUrl"])
        if status in (401, 407):
            raise HttpError('url: %s: {"Code":14,"Msg":"authentication required"}' % fields["rawUrl"])
        if known:                                       # fault 14: the empty file's total falls back to 0
            known.total = 0
            return known
        task = self.tasks[task_id] = _Task(task_id, fields["rawUrl"], task_url, headers, length)
        return task

    def start_cdn(self, task):
        """The source pattern stores nothing: every piece is there at once.  Wire: 5.4"""
        if self.cdn_pattern != "source":
            return super().start_cdn(task)
        task.total = max(1, -(-task.length // task.piece_size))
        task.pieces = {n: "" for n in range(task.total)}
        task.status, task.md5 = "success", ""

    def assignment(self, task, client, num, provider):
        """In the source pattern the path is the raw URL."""
        item = super().assignment(task, client, num, provider)
        if self.cdn_pattern == "source" and provider == self.super_cid(task):
            item["path"] = task.raw_url
        return item

    def pull(self, request):
        """Wire: 3, 10.5"""
        q = request.query
        task = self.tasks.get(q.get("taskId"))
        client = task and task.clients.get(q.get("srcCid"))
        if not client:
            return {"code": 502, "msg": 'failed to get dfgetTask with taskID (%s) clientID (%s): {"Code":0,"Msg":'
                                        '"data not found"}' % (q.get("taskId"), q.get("srcCid"))}
        status, result = q.get("status"), q.get("result")
        if status == "702":
            return {"code": 600}
        if status not in ("700", "701") or status == "701" and result not in ("500", "501", "503"):
            return {"code": 501, "msg": 'status %s result %s: {"Code":2,"Msg":"invalid value"}' % (status, result)}
        if status == "701":
            num = self.num_of(q.get("range"), task)
            if num is None:
                return {"code": 501, "msg": 'pieceRange: %s: {"Code":2,"Msg":"invalid value"}' % q.get("range")}
            if not self.known_cid(task, q.get("dstCid")):
                return {"code": 502, "msg": 'dstCid %s: {"Code":0,"Msg":"data not found"}' % q.get("dstCid")}
            self.record(task, client, q["srcCid"], q["dstCid"], num, result)
        return self.next_answer(task, client, q["srcCid"])

    def known_cid(self, task, cid):
        """Tell whether `cid` is the supernode's or a registered one."""
        return cid == self.super_cid(task) or cid in task.clients

    def record(self, task, client, cid, dst_cid, num, result):
        """Wire: 3.1, 10.6"""
        if result == "500":
            self.free(task, client, num)
            if dst_cid != self.super_cid(task):
                client.black.add(dst_cid)
                client.failures += 1
            return
        client.done.add(num)
        client.failures = 0
        self.free(task, client, num)
        if result == "501":
            task.holders.setdefault(num, set()).add(cid)

    def next_answer(self, task, client, cid):
        """Return 600, 601, 602 or 500."""
        if task.status == "failed":
            return {"code": 500, "msg": 'taskID: %s: {"Code":7,"Msg":"cdn status is fail"}' % task.id}
        if self.finished(task, client):
            wrapped = 0 if self.cdn_pattern == "source" else task.wrapped
            return {"code": 600, "data": {"md5": task.md5, "fileLength": wrapped}}
        left = [n for n in task.pieces if n not in client.done and n not in client.running]
        if not left:
            return {"code": 602, "msg": 'clientSucCount:%d,cdnSucCount:%d: {"Code":9,"Msg":"peer should wait"}' % (
                len(client.done), len(task.pieces))}
        if len(client.running) >= self.down_limit:
            return {"code": 601, "msg": 'taskID: %s,clientID: %s: {"Code":11,"Msg":"peer continue"}' % (task.id, cid)}
        before = set(client.running)
        running = self.schedule(task, client, cid)
        new = [n for n in running if n not in before]
        if not new:
            return {"code": 602, "msg": 'no available peer: {"Code":9,"Msg":"peer should wait"}'}
        return {"code": 601, "data": [self.assignment(task, client, n, running[n]) for n in new]}

    def take_super_slot(self, task):
        """Four per task, freed by suc only, forgotten after 30 s without change.  Wire: 10.5, fault 17"""
        now = time.monotonic()
        if task.super_load and now - task.super_changed > self.load_reset_s:
            task.super_load = 0
        if task.super_load >= self.down_limit:
            return None
        task.super_load += 1
        task.super_changed = now
        return self.super_cid(task)

    def suc(self, request):
        """Wire: 4.1"""
        q = request.query
        task = self.tasks.get(q.get("taskId"))
        client = task and task.clients.get(q.get("cid"))
        num = self.num_of(q.get("pieceRange"), task) if task else None
        if not client or num is None or not self.known_cid(task, q.get("dstCid")):
            raise HttpError('failed to report %s: {"Code":0,"Msg":"data not found"}' % q)
        if q["dstCid"] == self.super_cid(task):
            task.super_load = max(0, task.super_load - 1)
            task.super_changed = time.monotonic()
        client.done.add(num)
        self.free(task, client, num)
        task.holders.setdefault(num, set()).add(q["cid"])       # fault 15: port 0 as well
        return {"code": 611}

    def piece_error(self, request):
        """HTTP 200 with an empty body.  Wire: 4.2"""
        return b""

    def down(self, request):
        """Wire: 4.3"""
        q = request.query
        task = self.tasks.get(q.get("taskId"))
        client = task and task.clients.get(q.get("cid"))
        if not client or client.down:
            raise HttpError('%s: {"Code":0,"Msg":"data not found"}' % q.get("cid"))
        client.down = True
        return {"code": 612}

    def metrics(self, request):
        """Wire: 4.4"""
        port = json.loads(request.body.decode("utf-8")).get("port", 0)
        if port and not 15000 <= port <= 65000:
            raise HttpError("validation failure list: port")
        return None

    def heartbeat(self, request):
        """Wire: 4.5"""
        return {"seedTaskIDs": None}

    def ping(self, request):
        """Wire: 4.6"""
        return b"OK"


# ==============================================================================
# JSN, the Java supernode 0.2
# ==============================================================================
class JSN(OldSupernode):
    """supernode 0.2: HTTP 200 for everything, other codes, /qtdown, a rate suggestion, running pieces re-listed."""

    CDN_PREFIX = "qtdown"
    DOWN_LINK = 20480
    ROUTES = {"/peer/registry": ("POST", "register"), "/peer/task": ("GET", "pull"),
              "/peer/piece/suc": ("GET", "suc"), "/peer/service/down": ("GET", "down")}

    def __init__(self, *args, **kwargs):
        self.own_ip = None
        self._sticky, self._auth_tries = set(), {}
        super().__init__(*args, **kwargs)

    def wrong_method(self):
        """Wire: 1.4"""
        return 404, {"code": 404}

    def register(self, request):
        """Wire: 1.2, 1.5"""
        kind = request.headers.get("content-type", "").lower().replace(" ", "")
        if kind.split(";")[0] == "application/json":
            raw = json.loads(request.body.decode("utf-8"))
        else:
            pairs = urllib.parse.parse_qs(request.body.decode("utf-8"), keep_blank_values=True)
            raw = {k: v if k == "headers" else v[0] for k, v in pairs.items()}
        text = {k: "" if raw.get(k) is None else str(raw[k]) for k in ("rawUrl", "cid", "ip", "port", "path", "superNodeIp")}
        if (not re.match(r"^https?://.+$", text["rawUrl"]) or not text["cid"] or not text["path"]
                or not re.match(r"^\d+\.\d+\.\d+\.\d+$", text["ip"]) or not re.match(r"^\d+$", text["port"])):
            return {"code": 501, "msg": "param is illegal"}
        self.own_ip = self.own_ip or text["superNodeIp"]
        headers = {}
        for entry in raw.get("headers") or ():
            name, _, value = entry.partition(":")
            headers[name.strip()] = ",".join(filter(None, [headers.get(name.strip()), value.strip()]))
        task_url = raw.get("taskUrl") or "null"
        task_id = task_id_of(task_url, raw.get("md5") or raw.get("identifier") or "")
        return self._join(task_id, raw, text, task_url, headers)

    def _join(self, task_id, raw, text, task_url, headers):
        if task_id in self._sticky:
            return {"code": 607, "msg": "url is not reachable"}
        task = self.tasks.get(task_id)
        if task is None or task.status == "unauthorised":
            tried = self._auth_tries.setdefault(task_id, set())
            if len(tried) >= 5 and text["ip"] not in tried:
                return {"code": 609, "msg": "wait auth"}
            tried.add(text["ip"])
            status, length = self.probe(text["rawUrl"], headers, 2.0)
            if status == 0:
                self._sticky.add(task_id)
                return {"code": 607, "msg": "url is not reachable"}
            if status in (401, 407) and str(raw.get("dfdaemon", "")).lower() == "true":
                return {"code": 608, "msg": "need auth"}
            task = self.tasks[task_id] = _Task(task_id, text["rawUrl"], task_url, headers, length)
        task.clients[text["cid"]] = _Client(dict(text))
        if task.status == "waiting" or task.status == "failed" and time.monotonic() - task.failed_at > 120:
            task.pieces.clear()
            self.start_cdn(task)
        return {"code": 200, "msg": "success", "data": {"taskId": task.id, "fileLength": task.length,
                                                        "pieceSize": task.piece_size}}

    def super_cid(self, task):
        """The first registrant's superNodeIp is the supernode's own address for ever."""
        return "cdnnode:%s~%s" % (self.own_ip, task.id)

    def cdn_ip(self, client):
        """Wire: 1.2"""
        return self.own_ip

    def finished(self, task, client):
        """An empty file never finishes (fault 14)."""
        return super().finished(task, client) and task.length != 0

    def pull(self, request):
        """Wire: 3"""
        q = request.query
        if not all(q.get(k, "").isdigit() for k in ("status", "result")):
            return {"code": 500, "msg": "system error"}
        task = self.tasks.get(q.get("taskId"))
        client = task and task.clients.get(q.get("srcCid"))
        if not client:
            return {"code": 605, "msg": "peer state not found"}
        if q["status"] == "702":
            return {"code": 200, "msg": "success"}
        if q["status"] not in ("700", "701") or q["status"] == "701" and q["result"] not in ("500", "501", "503"):
            return {"code": 501, "msg": "param is illegal"}
        if q["status"] == "701":
            num = self.num_of(q.get("range"), task)
            if num is None:
                return {"code": 501, "msg": "range is illegal"}
            self.free(task, client, num)
            if q["result"] == "500":
                client.black.add(q.get("dstCid"))
            else:
                client.done.add(num)
        if task.status == "failed":
            return {"code": 604, "msg": "super fail"}
        if self.finished(task, client):
            return {"code": 600, "msg": "finish", "data": {"md5": task.md5, "fileLength": task.wrapped}}
        if not task.pieces:
            return {"code": 602, "msg": "wait"}
        running = self.schedule(task, client, q["srcCid"])
        if not running:
            return {"code": 602, "msg": "wait"}
        return {"code": 601, "msg": "continue",
                "data": [self.assignment(task, client, n, running[n]) for n in sorted(running)]}

    def take_super_slot(self, task):
        """A token bucket of 180 MB/s: never short here."""
        return self.super_cid(task)

    def suc(self, request):
        """Wire: 4.1"""
        q = request.query
        if not all(q.get(k) for k in ("taskId", "cid", "dstCid", "pieceRange")):
            return {"code": 501, "msg": "param is illegal"}
        task = self.tasks.get(q["taskId"])
        client = task and task.clients.get(q["cid"])
        num = self.num_of(q["pieceRange"], task) if task else None
        if not client or num is None:
            return {"code": 500, "msg": "system error"}
        client.done.add(num)
        self.free(task, client, num)
        if int(client.fields["port"]):
            task.holders.setdefault(num, set()).add(q["cid"])
        return {"code": 200, "msg": "success"}

    def down(self, request):
        """Wire: 4.3"""
        task = self.tasks.get(request.query.get("taskId"))
        client = task and task.clients.get(request.query.get("cid"))
        if client:
            client.down = True
        return {"code": 200, "msg": "success"}


# ==============================================================================
# A scripted one
# ==============================================================================
class FakeSupernode(SN1):
    """A 1.0.6 supernode that holds `content` without asking any origin and says what the script says.

    script   {"register"|"pull"|"suc"|"down"|"error"|"metrics"|"cdn": [answer, …]}; the last answer is repeated.
             An answer is GOOD (the honest one), a code, a dict (HTTP 200), (HTTP status, dict or bytes), "hang",
             "close", raw bytes instead of HTTP, or a function (request, honest) -> one of these.
             On "cdn" it is GOOD, an HTTP status, "hang", "close" or a function (request, honest) -> (status, body, headers).
    """

    NAMES = {"/peer/registry": "register", "/peer/task": "pull", "/peer/piece/suc": "suc", "/peer/service/down": "down",
             "/peer/piece/error": "error", "/task/metrics": "metrics"}

    def __init__(self, content=b"", script=None, length=None, **kwargs):
        self.content, self.script, self.told_length = content, script or {}, length
        self._next = {}
        super().__init__(**kwargs)

    def probe(self, url, headers, timeout_s=4.0):
        """Return the length without asking anybody."""
        return 200, len(self.content) if self.told_length is None else self.told_length

    def content_of(self, task):
        """Yield the pieces of `content`."""
        stride = task.piece_size - 5
        for start in range(0, max(1, len(self.content)), stride):
            yield self.content[start:start + stride]

    def _scripted(self, name):
        answers = self.script.get(name) or [GOOD]
        with self._lock:
            i = self._next.get(name, 0)
            self._next[name] = i + 1
        return answers[min(i, len(answers) - 1)]

    def answer(self, request):
        """Return the scripted or the honest answer."""
        scripted = self._scripted(self.NAMES.get(request.path, ""))
        if scripted is GOOD:
            return super().answer(request)
        if callable(scripted):
            scripted = scripted(request, lambda: super(FakeSupernode, self).answer(request))
        if isinstance(scripted, int):
            scripted = {"code": scripted, "msg": "scripted"}
        return (200, scripted) if isinstance(scripted, dict) else scripted

    def cdn_answer(self, request):
        """Return the scripted or the honest answer."""
        scripted = self._scripted("cdn")
        if scripted is GOOD:
            return super().cdn_answer(request)
        if callable(scripted):
            scripted = scripted(request, lambda: super(FakeSupernode, self).cdn_answer(request))
        return (scripted, b"scripted", []) if isinstance(scripted, int) else scripted


def main(argv):
    """Serve until interrupted."""
    kind, ports = argv[0], [int(a) for a in argv[1:3]]
    with (JSN if kind == "jsn" else SN1)(port=(ports + [0, 0])[0], cdn_port=(ports + [0, 0])[1]) as node:
        print("supernode listening on %s pieces on %s:%d" % (node.node, node.ip, node.cdn_port), flush=True)
        try:
            node.stopped.wait()
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
