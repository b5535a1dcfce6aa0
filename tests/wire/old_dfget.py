"""The two old clients, emulated at the socket level: dfget 0.2.0 (Python 2.7) and dfget 1.0.6 (Go).

PyDfget and GoDfget send the bytes that those programs send, in their order, with their timeouts, their merging of
reports and their faults (protocol.md 1, 3, 4, 5.3, 7, 17).  Where the real program would crash, hang or tell its user
something untrue they raise OldClientBroke instead.  They download through any supernode and check the bytes.

    python old_dfget.py py|go NODE URL OUTPUT [SHA256]
"""
import collections
import hashlib
import json
import os
import queue
import random
import re
import socket
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

from rawhttp import BadReply, Pool, ThreadedServer, read_reply

START, RUNNING = 700, 701
FAIL, INVALID, SEMISUC = 500, 502, 503
FINISH, CONTINUE, WAIT, LIMITED, SUCCESS = 600, 601, 602, 603, 200
NOT_READY_S = (0.6, 2.0)
_serial = [0]
_serial_lock = threading.Lock()


class OldClientBroke(AssertionError):
    """The real old program would have crashed, hung, or ended with a lie."""


class AuthExit(Exception):
    """608: the old client stops without going to the source."""


class Result(NamedTuple):
    """How an emulated download ended.

    exit_code   of the process (protocol.md 8.5)
    reason      0, or why it went back to source (8.4)
    pieces      [Fetched], every piece fetched from the swarm, in order of arrival
    calls       [Call], every request to a supernode, in order
    """

    exit_code: int
    reason: int
    pieces: list
    calls: list
    client: object

    @property
    def from_source(self):
        """True when the bytes came straight from the origin."""
        return self.reason != 0

    def count(self, kind):
        """Return how many requests of `kind` went to supernodes."""
        return sum(1 for call in self.calls if call.kind == kind)


class Fetched(NamedTuple):
    """One piece that arrived whole."""

    num: int
    cid: str
    ip: str
    port: int


class Call(NamedTuple):
    """One request to a supernode and the code of its answer (None: no usable answer)."""

    kind: str
    target: str
    code: object
    reply: object


class NoAnswer(Exception):
    """HTTP error, timeout or garbage instead of a protocol answer."""


class Exhausted(Exception):
    """No node is left to register with."""


def new_sign():
    """Return an execute sign `pid-seconds.millis`, unique within the tests.  Wire: 2.3"""
    with _serial_lock:
        _serial[0] += 1
        return "%d-%.3f" % (os.getpid(), time.time() + _serial[0] / 1000.0)


def wrap(content, piece_size):
    """Return a piece as it travels.  Wire: 5.1"""
    return struct.pack(">I", len(content) | (piece_size << 4)) + content + b"\x7f"


# ==============================================================================
# The part both generations share: queue, merging, writer, migration
# ==============================================================================
class OldDfget:
    """One run of an old dfget.  Subclasses give the words on the wire.

    nodes      ["ip:port"]: the 0.2 client itself knows only port 8002 and names only the host
    origin     not needed: back to source asks `url`
    uploader   an uploader of the same generation, or None for the cdn pattern (port 0)
    patience_s how long a download may take before it counts as hung (the real limit is 10 s + length/64 KiB)
    """

    VERSION = ""
    PIECE_ERROR_PAUSE_S = 0.0

    def __init__(self, nodes, url, output, ip="127.0.0.1", uploader=None, headers=(), md5="", identifier="",
                 filters="", call_system="", dfdaemon=False, notbs=False, patience_s=30.0, sequential=False):
        self.all_nodes = [nodes] if isinstance(nodes, str) else list(nodes)
        self.url, self.output, self.ip, self.uploader = url, output, ip, uploader
        self.headers, self.md5, self.identifier = list(headers), md5, identifier
        self.call_system, self.dfdaemon, self.notbs = call_system, dfdaemon, notbs
        self.patience_s, self.sequential = patience_s, sequential
        self.task_url = self.filtered(url, filters)
        self.sign = new_sign()
        self.cid = "%s-%s" % (ip, self.sign)
        self.task_file_name = "%s-%s" % (os.path.basename(output), self.sign)
        self.path = "/peer/file/" + self.task_file_name
        self.port = uploader.port if uploader else 0
        self.pool = Pool(ip if ip.startswith("127.") else None)
        self.lines, self.calls, self.pieces = [], [], []
        self.nodes = self.expand(self.all_nodes)
        self.node = self.task_id = None
        self.file_length, self.piece_sizes = -1, [0, 0]
        self.cdn_source = "supernode"
        self._items = queue.Queue()
        self._running, self._done, self._unreported = set(), set(), set()
        self._one_by_one = threading.Lock()
        self._broke = None
        self._threads = []
        self._finish_md5 = ""
        self.failures = collections.Counter()
        self._rate_asked = -9.0

    # -- what the generations do differently ------------------------------------------------------
    def expand(self, nodes):
        """Return the list of register attempts."""
        raise NotImplementedError

    def filtered(self, url, filters):
        """Return the taskUrl.  Wire: 2.2"""
        raise NotImplementedError

    def register(self):
        """Register with the next nodes; set node, task_id, …  Exhausted when none is left."""
        raise NotImplementedError

    def pull_once(self, item):
        """Send one /peer/task; return the parsed answer or raise NoAnswer."""
        raise NotImplementedError

    def wait_after_602(self, tries):
        """Sleep as the client does; return False to stop repeating this request."""
        raise NotImplementedError

    def report_suc(self, item):
        """Send /peer/piece/suc."""
        raise NotImplementedError

    def fetch(self, task):
        """Fetch one piece: return its wrapped bytes, or raise."""
        raise NotImplementedError

    def continue_list(self, answer):
        """Return the piece tasks of a 601."""
        raise NotImplementedError

    # -- the run -----------------------------------------------------------------------------------
    def run(self):
        """Download; return a Result.  OldClientBroke where the real one would crash or hang."""
        try:
            return self._run()
        finally:
            for thread in self._threads:
                thread.join(10)
            self.pool.close()

    def _run(self):
        self.began = time.monotonic()
        if self.uploader:
            self.uploader_check()
        reason = 0
        try:
            self.register()
            self.lines.append("client:%s connected to node:%s" % (self.ip, self.node))
        except AuthExit:
            return self._result(self.AUTH_EXIT, 0)
        except Exhausted:
            reason = 1
        if not reason:
            reason = self._swarm()
        if reason:
            return self._source(reason)
        self.after()
        return self._result(0, 0)

    def _result(self, code, reason):
        return Result(code, reason, self.pieces, self.calls, self)

    def _swarm(self):
        self._open_files()
        self._writes = queue.Queue()
        writer = threading.Thread(target=self._writer, name="old-writer")
        writer.start()
        try:
            self._items.put(self._item("", "", INVALID, START))
            return self._main_loop(writer)
        except AuthExit:
            raise OldClientBroke("608 in the middle of a download")
        finally:
            self._writes.put(None)
            writer.join()
            self._file.close()

    def _open_files(self):
        if self.uploader:
            self.service = self.uploader.service_path(self.task_file_name)
        else:
            self.service = self.output + ".part"
        self._file = open(self.service, "w+b")

    def _item(self, dst_cid, range_, result, status, **more):
        item = dict(taskId=self.task_id, superNode=self.node, dstCid=dst_cid, range=range_, result=result, status=status)
        item.update(more)
        return item

    def _main_loop(self, writer):
        latest = None
        while True:
            self._check_patience()
            go, latest = self._get_item(latest)
            if not go:
                continue
            item, latest = dict(latest), None
            item.pop("content", None)
            try:
                answer = self._pull(item)
            except Exhausted:
                return 3
            code = answer["code"]
            if code == CONTINUE:
                try:
                    self._process(answer, item)
                except KeyError:
                    return 3
            elif code == FINISH:
                return self._finish(answer, writer)
            else:
                reason = self.odd_answer(answer)
                if reason:
                    return reason

    def _check_patience(self):
        if self._broke:
            raise self._broke
        if time.monotonic() - self.began > self.patience_s:
            raise OldClientBroke("hung for %.0f s: done %d, running %s, last answers %s" % (
                self.patience_s, len(self._done), sorted(self._running),
                [(c.kind, c.code) for c in self.calls[-6:]]))

    def _get_item(self, latest):
        """Take a finished item and decide whether to ask now.  Wire: 3.5 (request merging)"""
        merge = True
        try:
            item = self._items.get(True, 2)
        except queue.Empty:
            merge = False
        else:
            if item.get("pieceSize") not in (None, self.piece_sizes[1]):
                return False, latest
            if item["superNode"] != self.node:
                item.update(dstCid="", superNode=self.node, taskId=self.task_id)
            if item["range"]:
                if item["range"] not in self._running and item["range"] not in self._done:
                    return False, latest
                self._running.discard(item["range"])
                if item["result"] == SEMISUC:
                    self._done.add(item["range"])
            latest = item
        if latest is None:
            return False, None
        if latest["result"] in (FAIL, INVALID):
            merge = False
        if merge and (self._items.qsize() or len(self._running) > 2):
            return False, latest
        return True, latest

    def _pull(self, item):
        answer, tries = None, 0
        while True:
            self._check_patience()
            self._unreported.discard(item["range"])
            try:
                answer = self.pull_once(item)
            except NoAnswer:
                answer = None
                break
            if answer["code"] != WAIT or not self.wait_after_602(tries):
                break
            tries += 1
        if answer and answer["code"] in (CONTINUE, FINISH, LIMITED, SUCCESS, WAIT):
            return answer
        self.register_again(item)
        item["status"] = START
        self.lines.append("migrated to node:" + item["superNode"])
        return self._pull(item)

    def register_again(self, item):
        """Migrate: register at one of the remaining nodes and point `item` there."""
        keep = self.node, self.task_id
        self.register()
        item["superNode"], item["taskId"] = self.node, self.task_id
        self.node, self.task_id = keep

    def _process(self, answer, item):
        self._refresh(item)
        started = 0
        for task in self.continue_list(answer):
            range_ = task["range"]
            if range_ in self._done:
                self._items.put(self._item(task["cid"], range_, SEMISUC, RUNNING))
                started += 1
            elif range_ not in self._running:
                self._running.add(range_)
                self._unreported.add(range_)
                if self.uploader:
                    self.uploader_rate(task)
                started += 1
                thread = threading.Thread(target=self._piece, args=(task, self.node, self.task_id), name="old-piece")
                self._threads.append(thread)
                thread.start()
        unreported = sorted(self._unreported)
        if len(unreported) > 4:
            raise OldClientBroke("more than 4 pieces outstanding: %s" % unreported)
        if not started and not self._running and self._items.empty():
            raise OldClientBroke("601 with nothing to do while nothing runs: idles until its timeout (%r)" % (answer,))

    def _refresh(self, item):
        if self.piece_sizes[0] != self.piece_sizes[1]:
            self.piece_sizes[0] = self.piece_sizes[1]
            self._writes.put("reset")
            for names in (self._done, self._running, self._unreported):
                names.clear()
        self.node, self.task_id = item["superNode"], item["taskId"]

    def _piece(self, task, node, task_id):
        try:
            if self.sequential:
                with self._one_by_one:
                    body = self.fetch(task)
            else:
                body = self.fetch(task)
        except OldClientBroke as broke:
            self._broke = broke
            return
        except (OSError, EOFError, BadReply, ValueError) as error:
            self.failures["%s from %s:%s: %s" % (task["range"], task["peerIp"], task["peerPort"], error)] += 1
            time.sleep(self.PIECE_ERROR_PAUSE_S)
            self._items.put(self._item(task["cid"], task["range"], FAIL, RUNNING, superNode=node, taskId=task_id))
            return
        item = self._item(task["cid"], task["range"], SEMISUC, RUNNING, superNode=node, taskId=task_id,
                          pieceSize=task["pieceSize"], pieceNum=task["pieceNum"], content=body)
        self.pieces.append(Fetched(task["pieceNum"], task["cid"], task["peerIp"], task["peerPort"]))
        self._writes.put(item)
        self._items.put(item)

    def _writer(self):
        while True:
            item = self._writes.get()
            if item is None:
                return
            if item == "reset":
                self._file.truncate(0)
                continue
            if self.cdn_source == "source":
                self._file.seek(item["pieceNum"] * item["pieceSize"])
                self._file.write(item["content"])
            else:
                self._file.seek(item["pieceNum"] * (item["pieceSize"] - 5))
                self._file.write(item["content"][4:-1])
            self._file.flush()
            self._unreported.discard(item["range"])
            self.report_suc(item)

    def _finish(self, answer, writer):
        data = self.finish_data(answer)
        self._writes.put(None)
        writer.join()
        self._file.flush()
        self._file.seek(0)
        digest, length = hashlib.md5(), 0
        for block in iter(lambda: self._file.read(1 << 20), b""):
            digest.update(block)
            length += len(block)
        if 0 <= self.file_length != length:
            raise OldClientBroke("600 too early: SUCCESS with %d of %d bytes" % (length, self.file_length))
        md5 = data.get("md5") or ""
        if md5 and md5 != digest.hexdigest():
            return self.wrong_md5(md5, digest.hexdigest())
        with open(self.output, "wb") as out:
            self._file.seek(0)
            for block in iter(lambda: self._file.read(1 << 20), b""):
                out.write(block)
        self.file_length = length
        return 0

    def _source(self, reason):
        if self.notbs:
            return self._result(self.FAIL_EXIT, reason + 1000)
        request = urllib.request.Request(self.url, headers=dict(h.split(":", 1) for h in self.headers))
        try:
            with urllib.request.urlopen(request, timeout=10) as body, open(self.output, "wb") as out:
                for block in iter(lambda: body.read(1 << 20), b""):
                    out.write(block)
        except urllib.error.HTTPError as error:
            with error:
                return self.source_refused(error, reason)
        except OSError:
            return self._result(self.FAIL_EXIT, reason)
        return self._result(0, reason)

    def source_refused(self, error, reason):
        """The origin answered 400 or more."""
        return self._result(self.FAIL_EXIT, reason)

    # -- small common words ------------------------------------------------------------------------
    def _address(self, node):
        host, _, port = node.partition(":")
        return host, int(port or 8002)

    def _note(self, kind, target, code, reply=None):
        self.calls.append(Call(kind, target, code, reply))


def check_connect(ip, port, timeout_s=0.5):
    """The bare TCP connection that both clients open before they trust a peer.  OSError when it fails."""
    socket.create_connection((ip, port), timeout=timeout_s).close()


def get_on_new_connection(ip, port, request, connect_s, between_reads_s, budget_s):
    """GET with a limit between reads and one over all; return the Reply."""
    end = time.monotonic() + budget_s
    with socket.create_connection((ip, port), timeout=connect_s) as sock:
        sock.settimeout(min(between_reads_s, budget_s))
        sock.sendall(request)
        with sock.makefile("rb") as stream:
            reply = read_reply(stream)
    if time.monotonic() > end:
        raise socket.timeout("needed more than %.2f s" % budget_s)
    return reply


# ==============================================================================
# dfget 0.2.0
# ==============================================================================
PY_HEADERS = ("Connection: keep-alive\r\nAccept-Encoding: gzip, deflate\r\nAccept: */*\r\n"
              "User-Agent: python-requests/2.18.4\r\n")


class PyDfget(OldDfget):
    """dfget 0.2.0: form-encoded register, percent-encoded queries, exact last range, fixed speed floor for peers."""

    VERSION = "0.2.0"
    AUTH_EXIT, FAIL_EXIT = 22, 1

    def expand(self, nodes):
        """Shuffled and doubled.  Wire: 1.6"""
        nodes = list(nodes)
        random.shuffle(nodes)
        return nodes * 2

    def filtered(self, url, filters):
        """Drop the parameters named by `filters`; a `?` stays.  Wire: 2.2"""
        base, mark, query = url.partition("?")
        if not filters or not mark:
            return url
        drop = filters.split("&")
        return base + "?" + "&".join(p for p in query.split("&") if p and p.split("=")[0] not in drop)

    def form(self, node):
        """Return the register body in the order in which Python 2.7's dict gives it.  Wire: 1.3"""
        host = node.partition(":")[0]
        value = dict(cid=self.cid, ip=self.ip, hostName="localhost", superNodeIp=host, port=self.port, version="0.2.0",
                     callSystem=self.call_system or "UNKNOWN", dfdaemon="true" if self.dfdaemon else "false",
                     path=self.path, rawUrl=self.url, taskUrl=self.task_url, headers=self.headers,
                     md5=self.md5, identifier=self.identifier)
        order = "cid ip hostName superNodeIp port callSystem version dfdaemon path rawUrl taskUrl headers"
        if self.md5:
            order = "cid ip hostName superNodeIp taskUrl headers callSystem version dfdaemon path rawUrl port md5"
        elif self.identifier:
            order = "identifier " + order
        pairs = [(k, value[k]) for k in order.split() if k != "headers" or self.headers]
        return urllib.parse.urlencode(pairs, doseq=True).replace("~", "%7E").encode("ascii")

    def register(self):
        """POST the form to node after node; 609 is repeated for ever.  Wire: 1.6"""
        answer = None
        while self.nodes:
            node = self.nodes.pop(0)
            try:
                answer = self._register_at(node)
            except (OSError, EOFError, BadReply, ValueError, KeyError) as error:
                self._note("register", node, None, error)
                continue
            if answer["code"] in (SUCCESS, 608):
                break
        if answer and answer["code"] == 608:
            raise AuthExit()
        if not answer or answer["code"] != SUCCESS or not isinstance(answer.get("data"), dict):
            raise Exhausted()
        data = answer["data"]
        self.node, self.task_id, self.file_length = node, data["taskId"], data["fileLength"]
        self.piece_sizes[1] = data["pieceSize"]
        self.piece_sizes[0] = self.piece_sizes[0] or data["pieceSize"]

    def _register_at(self, node):
        body = self.form(node)
        request = ("POST /peer/registry HTTP/1.1\r\nHost: %s\r\n%sContent-Length: %d\r\n"
                   "Content-Type: application/x-www-form-urlencoded\r\n\r\n" % (node, PY_HEADERS, len(body)))
        began = time.monotonic()
        while True:
            reply = self.pool.send(self._address(node), request.encode("ascii") + body, "POST", 2.0, 5.0)
            if reply.status >= 400:
                raise BadReply("HTTP %d" % reply.status)
            answer = reply.json()
            self._note("register", node, answer["code"], answer)
            if answer["code"] != 609:
                return answer
            if time.monotonic() - began > self.patience_s:
                raise OldClientBroke("609 for ever: this client never stops asking")
            time.sleep(2.5)

    def pull_once(self, item):
        """Wire: 3.1; connect 2 s, read 3 s, two transparent retries."""
        order = ("superNode dstCid pieceSize srcCid range status result taskId pieceNum" if "pieceNum" in item
                 else "superNode dstCid range status result taskId srcCid")
        values = dict(item, srcCid=self.cid, superNode=item["superNode"].partition(":")[0])
        answer = self._get(item["superNode"], "/peer/task", [(k, values[k]) for k in order.split()], "pull")
        if answer is None:
            raise NoAnswer()
        return answer

    def _get(self, node, path, pairs, kind):
        query = urllib.parse.urlencode(pairs).replace("~", "%7E")
        target = path + "?" + query
        request = ("GET %s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (target, node, PY_HEADERS)).encode("ascii")
        for _ in range(3):
            try:
                reply = self.pool.send(self._address(node), request, "GET", 2.0, 3.0)
                if reply.status >= 400:
                    raise ValueError("HTTP %d" % reply.status)
                answer = reply.json()
                self._note(kind, target, answer["code"], answer)
                return answer
            except (ValueError, KeyError, TypeError) as error:
                self._note(kind, target, None, error)
                return None
            except (OSError, EOFError, BadReply) as error:
                self._note(kind, target, None, error)
        return None

    def wait_after_602(self, tries):
        """Uniform 0.6 to 2 s, then the very same request.  Wire: 3.4"""
        time.sleep(random.uniform(*NOT_READY_S))
        return True

    def odd_answer(self, answer):
        """603 and 200 are an AttributeError inside the client: reason 3.  Wire: 3.5"""
        return 3

    def continue_list(self, answer):
        """KeyError (reason 3) without a list; every element is needed as PY reads it."""
        tasks = answer.get("data")
        if not isinstance(tasks, list):
            raise KeyError("data")
        for task in tasks:
            for key in ("range", "cid", "peerIp", "peerPort", "path", "pieceNum", "pieceSize", "pieceMd5", "downLink"):
                task[key]
            if not re.match(r"^[0-9a-f]{32}:\d+$", task["pieceMd5"]):
                raise OldClientBroke("pieceMd5 %r: the piece thread dies silently and the download hangs" % task["pieceMd5"])
            if not all(isinstance(task[k], int) for k in ("pieceNum", "pieceSize", "peerPort")):
                raise OldClientBroke("a number that is not a JSON number: %r" % task)
        return tasks

    def source_refused(self, error, reason):
        """Fault 12: the page that says 404 is saved as the file, exit 0."""
        with open(self.output, "wb") as out:
            out.write(error.read())
        return self._result(0, reason)

    def finish_data(self, answer):
        """reason 3 without the data object: counted as broken, for no supernode may do that."""
        if not isinstance(answer.get("data"), dict) or "md5" not in answer["data"]:
            raise OldClientBroke("600 without data: exception in the client, reason 3")
        return answer["data"]

    def wrong_md5(self, expected, got):
        """reason 2: back to source."""
        return 2

    def fetch(self, task):
        """Exact range of every piece, 1.5 s between reads, `len/1.5 MiB + 1 s` over all from a peer.  Wire: 5.3"""
        md5, length = task["pieceMd5"].split(":")
        start = task["pieceNum"] * task["pieceSize"]
        length = int(length)
        own_node = task["peerIp"] == self.node.partition(":")[0]
        budget = length / (128.0 * 1024 if own_node else 1.5 * 1024 * 1024) + 1.0
        if not own_node:
            check_connect(task["peerIp"], task["peerPort"])
        request = "GET %s HTTP/1.1\r\nHost: %s:%d\r\n%spieceSize: %d\r\nRange: bytes=%d-%d\r\npieceNum: %d\r\n\r\n" % (
            task["path"], task["peerIp"], task["peerPort"], PY_HEADERS, task["pieceSize"], start, start + length - 1,
            task["pieceNum"])
        reply = get_on_new_connection(task["peerIp"], task["peerPort"], request.encode("ascii"), 1.5, 1.5, budget)
        if hashlib.md5(reply.body).hexdigest() != md5:
            raise ValueError("HTTP %d, %d bytes, md5 differs" % (reply.status, len(reply.body)))
        return reply.body

    def report_suc(self, item):
        """The answer is ignored.  Wire: 4.1"""
        pairs = [("dstCid", item["dstCid"]), ("pieceRange", item["range"]), ("taskId", item["taskId"]), ("cid", self.cid)]
        self._get(item["superNode"], "/peer/piece/suc", pairs, "suc")

    def uploader_check(self):
        """Wire: 7.2, 17"""
        reply = self._uploader("/check/" + self.task_file_name, {"totalLimit": 0, "dataDir": self.uploader.data + "/"})
        if reply != self.task_file_name + "@0.2.0":
            self.port = 0

    def uploader_rate(self, task):
        """Wire: 7.3, at most every 3 s"""
        if time.monotonic() - self._rate_asked > 3:
            self._rate_asked = time.monotonic()
            self._uploader("/rate/" + self.task_file_name, {"rateLimit": int(task["downLink"]) * 1024})

    def _uploader(self, path, param):
        request = "GET %s HTTP/1.1\r\nHost: %s:%d\r\n%sparam: %s\r\n\r\n" % (
            path, self.ip, self.port, PY_HEADERS, json.dumps(param))
        return get_on_new_connection(self.ip, self.port, request.encode("utf-8"), 2, 2, 5).body.decode("utf-8")

    def after(self):
        """Wire: 7.4.  A download without an uploader kept its data in the user's folder: service down."""
        if self.uploader:
            self._uploader("/client/finish", dict(taskId=self.task_id, cid=self.cid, superNode=self.node,
                                                  taskFileName=self.task_file_name))

    def service_down(self):
        """Tell the supernode that this client's data is gone.  Wire: 4.3"""
        return self._get(self.node, "/peer/service/down", [("taskId", self.task_id), ("cid", self.cid)], "down")


# ==============================================================================
# dfget 1.0.6
# ==============================================================================
GO_PIECE_FIELDS = dict(range=str, pieceNum=int, pieceSize=int, pieceMd5=str, cid=str, peerIp=str, peerPort=int,
                       path=str, downLink=int)
GO_REGISTER_FIELDS = dict(taskId=str, fileLength=int, pieceSize=int, cdnSource=str, asSeed=bool, seedTaskID=str)


def go_struct(value, fields, what):
    """Decode a JSON object as encoding/json decodes it into a struct: ValueError for one wrong type."""
    if not isinstance(value, dict):
        raise ValueError("%s is not an object: %r" % (what, value))
    known = {name.lower(): name for name in fields}
    out = {name: kind() for name, kind in fields.items()}
    for key, item in value.items():
        name = known.get(key.lower())
        if name is None or item is None:
            continue
        kind = fields[name]
        if kind is int and (isinstance(item, bool) or not isinstance(item, int)) or not isinstance(item, kind):
            raise ValueError("json: cannot unmarshal %r into %s.%s of type %s" % (item, what, name, kind.__name__))
        if name == "pieceSize" and not -2 ** 31 <= item < 2 ** 31:
            raise ValueError("json: %s.%s overflows int32" % (what, name))
        out[name] = item
    return out


class GoDfget(OldDfget):
    """dfget 1.0.6: JSON register, literal query values, full last range, strict JSON, adaptive waiting."""

    VERSION = "1.0.6"
    AUTH_EXIT, FAIL_EXIT = 79, 80
    PIECE_ERROR_PAUSE_S = 0.02

    def __init__(self, *args, **kwargs):
        self.insecure = kwargs.pop("insecure", False)
        self.weighted = kwargs.pop("weighted", False)
        self._acked = threading.Event()
        self._last_node = None
        super().__init__(*args, **kwargs)

    def expand(self, nodes):
        """Each entry once.  Wire: 1.6"""
        return list(nodes)

    def filtered(self, url, filters):
        """Drop the parameters named by `filters`, and a lone `?`.  Wire: 2.2"""
        base, mark, query = url.partition("?")
        if not filters or not mark:
            return url
        drop = filters.split("&")
        kept = [p for p in query.split("&") if p.split("=")[0] not in drop]
        return base + "?" + "&".join(kept) if kept else base

    def body(self, node):
        """Return the register JSON as encoding/json writes it, with `&`, `<`, `>` escaped.  Wire: 1.3"""
        pairs = [("superNodeIp", node.partition(":")[0]), ("rawUrl", self.url), ("taskUrl", self.task_url),
                 ("cid", self.cid), ("ip", self.ip), ("hostName", "vm"), ("port", self.port), ("path", self.path),
                 ("version", self.VERSION), ("md5", self.md5), ("identifier", "" if self.md5 else self.identifier),
                 ("callSystem", self.call_system), ("headers", self.headers), ("dfdaemon", self.dfdaemon),
                 ("insecure", self.insecure)]
        always = ("superNodeIp", "rawUrl", "taskUrl", "cid", "ip", "hostName", "port", "path")
        text = json.dumps(collections.OrderedDict((k, v) for k, v in pairs if k in always or v),
                          separators=(",", ":"), ensure_ascii=False)
        for char in "&<>":
            text = text.replace(char, "\\u%04x" % ord(char))
        return text.encode("utf-8")

    def register(self):
        """Wire: 1.6; 609 three times at one node, 607 and 608 stop the round."""
        answer, error, node, retries, i = None, None, None, 0, 0
        while i < len(self.nodes):
            node = self.nodes[i]
            i += 1
            if node == self._last_node:
                continue
            error = None
            try:
                answer = self._register_at(node)
            except (OSError, EOFError, BadReply, ValueError) as failed:
                self._note("register", node, None, failed)
                error = failed
                continue
            if answer["code"] in (SUCCESS, 608, 607):
                break
            if answer["code"] == 609 and retries < 3:
                retries += 1
                i -= 1
                time.sleep(1.0)
        self.nodes = self.nodes[i:]
        if answer and not error and answer["code"] == 608:
            raise AuthExit()
        if error or not answer or answer["code"] != SUCCESS:
            raise Exhausted()
        self._last_node = node
        data = answer["data"]
        self.node, self.task_id, self.file_length = node, data["taskId"], data["fileLength"]
        self.cdn_source = data["cdnSource"] or "supernode"
        self.piece_sizes[1] = data["pieceSize"]
        self.piece_sizes[0] = self.piece_sizes[0] or data["pieceSize"]

    def _register_at(self, node):
        body = self.body(node)
        request = ("POST /peer/registry HTTP/1.1\r\nUser-Agent: fasthttp\r\nHost: %s\r\n"
                   "Content-Type: application/json;charset=utf-8\r\nContent-Length: %d\r\n\r\n" % (node, len(body)))
        reply = self.pool.send(self._address(node), request.encode("utf-8") + body, "POST", 3.0, 5.0)
        if reply.status >= 300:
            raise ValueError("%d:%s" % (reply.status, reply.body))
        answer = reply.json()
        out = go_struct(answer, dict(code=int, msg=str), "RegisterResponse")
        data = answer.get("data")
        out["data"] = go_struct(data, GO_REGISTER_FIELDS, "RegisterResponseData") if data is not None else None
        self._note("register", node, out["code"], answer)
        if out["code"] == SUCCESS and out["data"] is None:
            raise OldClientBroke("register 200 without data: nil dereference, exit 2")
        return out

    def pull_once(self, item):
        """Wire: 3.1; nothing is percent-encoded."""
        target = "/peer/task?srcCid=%s&dstCid=%s&range=%s&result=%d&status=%d&taskId=%s" % (
            self.cid, item["dstCid"], item["range"], item["result"], item["status"], item["taskId"])
        try:
            answer = self._get(item["superNode"], target)
            out = go_struct(answer, dict(code=int, msg=str), "PullPieceTaskResponse")
        except (OSError, EOFError, BadReply, ValueError) as error:
            self._note("pull", target, None, error)
            raise NoAnswer()
        self._note("pull", target, out["code"], answer)
        if "data" in answer:
            out["data"] = answer["data"]
        return out

    def _get(self, node, target):
        request = "GET %s HTTP/1.1\r\nUser-Agent: fasthttp\r\nHost: %s\r\n\r\n" % (target, node)
        reply = self.pool.send(self._address(node), request.encode("utf-8"), "GET", 3.0, 5.0)
        if reply.status >= 300:
            raise ValueError("%d:%s" % (reply.status, reply.body))
        return json.loads(reply.body.decode("utf-8"))

    def wait_after_602(self, tries):
        """Random in [50,100) ms, doubling to [800,1600); woken by an acknowledged suc.  Wire: 3.4"""
        low = min(0.05 * 2 ** tries, 0.8)
        self._acked.clear()
        self._acked.wait(random.uniform(low, 2 * low))
        return self._items.empty()

    def odd_answer(self, answer):
        """603, 200 are ignored; with nothing running the client idles until its timeout.  Wire: 3.5"""
        if answer["code"] != WAIT and not self._running and self._items.empty():
            raise OldClientBroke("pull answered %d: ignored, idles until its timeout" % answer["code"])
        if answer["code"] == WAIT and not self._running and self._items.empty():
            self._items.put(self._item("", "", INVALID, START))
        return 0

    def continue_list(self, answer):
        """One wrong type and the whole list counts as empty.  Wire: 3.2"""
        data = answer.get("data")
        if data is None:
            return []
        try:
            if not isinstance(data, list):
                raise ValueError("data is not a list")
            return [go_struct(task, GO_PIECE_FIELDS, "PieceTask") for task in data]
        except ValueError as error:
            raise OldClientBroke("the whole list is dropped: %s" % error)

    def finish_data(self, answer):
        """600 without data is a nil dereference; null is taken as no check."""
        if "data" not in answer:
            raise OldClientBroke("600 without data: panic, exit 2")
        if answer["data"] is None:
            return {}
        try:
            return go_struct(answer["data"], dict(md5=str, fileLength=int), "FinishData")
        except ValueError as error:
            raise OldClientBroke("600 with odd data, nil dereference: %s" % error)

    def wrong_md5(self, expected, got):
        """Fault 11."""
        raise OldClientBroke("md5 %s, expected %s: prints SUCCESS, exit 0, leaves no output file" % (got, expected))

    def fetch(self, task):
        """A pre-check connection for every source, then the full range.  Wire: 5.3"""
        if len(task["cid"]) < 25:
            raise OldClientBroke("cid %r is shorter than 25: dstCid[:25] panics after a slow write" % task["cid"])
        check_connect(task["peerIp"], task["peerPort"])
        expected = task["pieceMd5"].split(":")[0]
        path, range_, more, host, port = task["path"], task["range"], "", task["peerIp"], task["peerPort"]
        if self.cdn_source == "source":
            path, range_, more, host, port = self._source_target(task)
        request = "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: dfget/%s\r\n%sPiecenum: %d\r\nPiecesize: %d\r\nRange: bytes=%s\r\n\r\n" % (
            path, host, port, self.VERSION, more, task["pieceNum"], task["pieceSize"], range_)
        reply = get_on_new_connection(host, port, request.encode("utf-8"), 5.0, 74.0, 74.0)
        if reply.status == 404:
            self._piece_error(task, "FILE_NOT_EXIST", "", "", "")
        if reply.status == 416:
            raise ValueError("range not satisfiable")
        if reply.status >= 300:
            raise ValueError("HTTP %d" % reply.status)
        real = hashlib.md5(reply.body).hexdigest()
        if expected and real != expected:
            self._piece_error(task, "FILE_MD5_NOT_MATCH", task["peerIp"], real, expected)
            raise ValueError("piece range:%s md5 not match, expected:%s real:%s" % (task["range"], expected, real))
        return reply.body

    def _source_target(self, task):
        start = task["pieceNum"] * task["pieceSize"]
        end = min(start + task["pieceSize"], self.file_length) - 1
        parts = urllib.parse.urlsplit(task["path"])
        return parts.path, "%d-%d" % (start, end), "Cdnsource: source\r\n", parts.hostname, parts.port or 80

    def _piece_error(self, task, kind, dst_ip, real, expected):
        """Wire: 4.2; the answer is not looked at."""
        target = "/peer/piece/error?range=%s&realMd5=%s&taskId=%s&srcCid=%s&dstCid=%s&dstIp=%s&errorType=%s&expectedMd5=%s" % (
            task["range"] if real else "", real, self.task_id, self.cid, task["cid"], dst_ip, kind, expected)
        code = None
        try:
            code = self._get(self.node, target).get("code")
        except (OSError, EOFError, BadReply, ValueError, AttributeError) as error:
            code = str(error) and None
        self._note("error", target, code)

    def report_suc(self, item):
        """HTTP 200 is success; else three tries with 50 to 549 ms between.  Wire: 4.1"""
        target = "/peer/piece/suc?taskId=%s&cid=%s&dstCid=%s&pieceRange=%s" % (
            item["taskId"], self.cid, item["dstCid"], item["range"])
        for _ in range(3):
            try:
                answer = self._get(item["superNode"], target)
                code = go_struct(answer, dict(code=int, msg=str), "BaseResponse")["code"]
                self._note("suc", target, code, answer)
                self._acked.set()
                return
            except (OSError, EOFError, BadReply, ValueError) as error:
                self._note("suc", target, None, error)
                time.sleep(random.uniform(0.05, 0.549))

    def uploader_check(self):
        """Wire: 7.1, 7.2, 17"""
        self._uploader("/server/ping", "")
        reply = self._uploader("/check/" + self.task_file_name, "Datadir: %s\r\nTotallimit: 0\r\n" % self.uploader.data)
        if reply != "%s@%s" % (self.task_file_name, self.VERSION):
            self.port = 0

    def uploader_rate(self, task):
        """Wire: 7.3, at most every 3 s"""
        if time.monotonic() - self._rate_asked > 3:
            self._rate_asked = time.monotonic()
            self._uploader("/rate/" + self.task_file_name, "Ratelimit: %d\r\n" % (20 << 20))

    def _uploader(self, path, headers):
        request = "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: Go-http-client/1.1\r\n%s\r\n" % (
            path, self.ip, self.port, headers)
        return get_on_new_connection(self.ip, self.port, request.encode("utf-8"), 2, 2, 5).body.decode("utf-8")

    def after(self):
        """`/client/finish` to the uploader, then the metrics, twice unless the first answer's code is 1.  Wire: 4.4"""
        if self.uploader:
            self._uploader("/client/finish?taskFileName=%s&taskID=%s&cid=%s&superNode=%s" % (
                self.task_file_name, self.task_id, self.cid, self.node), "")
        for _ in range(2):
            if self._metrics() == 1:
                return

    def _metrics(self):
        report = collections.OrderedDict([
            ("IP", self.ip), ("backsourceReason", "0"), ("cID", self.cid), ("callSystem", self.call_system),
            ("duration", round(time.monotonic() - self.began, 9)), ("fileLength", self.file_length),
            ("port", self.port), ("success", True), ("taskId", self.task_id)])
        body = json.dumps(report, separators=(",", ":")).encode("utf-8")
        request = ("POST /task/metrics HTTP/1.1\r\nUser-Agent: fasthttp\r\nHost: %s\r\n"
                   "Content-Type: application/json;charset=utf-8\r\nContent-Length: %d\r\n\r\n" % (self.node, len(body)))
        code = None
        try:
            reply = self.pool.send(self._address(self.node), request.encode("utf-8") + body, "POST", 3.0, 5.0)
            answer = reply.json() if reply.status < 300 else None
            code = answer.get("code") if answer else None
        except (OSError, EOFError, BadReply, ValueError):
            code = None
        self._note("metrics", "/task/metrics", code)
        return code

    def service_down(self):
        """Tell the supernode that this client's data is gone.  Wire: 4.3"""
        return self._get(self.node, "/peer/service/down?taskId=%s&cid=%s" % (self.task_id, self.cid))


# ==============================================================================
# Their uploaders
# ==============================================================================
class _Uploader:
    """A host's piece server, shared by its downloads.  Files stand in `data` as <taskFileName>.service."""

    def __init__(self, ip="127.0.0.1", data=None):
        self.ip = ip
        self.data = data or tempfile.mkdtemp(prefix="old-uploader-")
        self.tasks, self.log, self.total_limit = {}, [], 0
        owner = self
        handler = type("Handler", (self.HANDLER,), {"owner": owner})
        while True:
            self.port = random.randint(15000, 60000)
            try:
                self._server = ThreadedServer((ip, self.port), handler)
                break
            except OSError:
                continue
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="old-uploader")
        self._thread.start()

    def service_path(self, task_file_name):
        """Return where the bytes of a task stand."""
        return os.path.join(self.data, task_file_name + ".service")

    def rate(self, name, asked):
        """Return this task's share of the total limit.  Wire: 7.3"""
        self.tasks.setdefault(name, {})["rate"] = asked
        total = sum(t.get("rate", 0) for t in self.tasks.values() if not t.get("finished"))
        if not self.total_limit or total <= self.total_limit:
            return asked
        return -(-asked * self.total_limit // total)

    def stop(self):
        """Go away at once, as after a crash or, for the 0.2 server, always."""
        if self._thread:
            self._server.hang_up()
            self._thread.join()
            self._thread = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()


class _PyHandler(BaseHTTPRequestHandler):
    """The 0.2.0 peer server with its faults: always 200, Content-Length as asked, head of the unclipped length."""

    protocol_version = "HTTP/1.0"
    server_version = "SimpleHttp/0.2.0"
    sys_version = "Python/2.7.18"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.owner.log.append((self.path, dict((k.lower(), v) for k, v in self.headers.items())))
        prefix, _, name = self.path.rpartition("/")
        try:
            if prefix == "/peer/file":
                return self._upload(name)
            param = json.loads(self.headers["param"])
            if prefix == "/check":
                self.owner.tasks[name] = {"dataDir": param["dataDir"], "finished": False}
                self.owner.total_limit = param.get("totalLimit") or self.owner.total_limit
                return self._text("%s@0.2.0" % name)
            if prefix == "/rate":
                rate = self.owner.rate(name, param["rateLimit"])
                return self._text(str(rate) if rate else "")
            if self.path == "/client/finish":
                self.owner.tasks.setdefault(param["taskFileName"], {}).update(param, finished=True)
                return self._text("success")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            pass
        self.send_error(500, "param:None")

    def _text(self, text):
        self.send_response(200)
        self.send_header("Content-type", "application/octet-stream")
        self.end_headers()
        self.wfile.write(text.encode("utf-8"))

    def _upload(self, name):
        num, size = int(self.headers["pieceNum"]), int(self.headers["pieceSize"])
        start, end = [int(x) for x in self.headers["Range"].split("=")[1].split("-")]
        length = end - start + 1
        if not os.path.isfile(self.owner.service_path(name)):
            return self.send_error(404, "File Not Found")
        with open(self.owner.service_path(name), "rb") as body:
            self.send_response(200)
            self.send_header("Content-type", "application/octet-stream")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(struct.pack("!i", (length - 5) | (size << 4)))
            body.seek(start - 5 * num)
            self.wfile.write(body.read(length - 5))
            self.wfile.write(b"\x7f")


class PyUploader(_Uploader):
    """0.2.0's peer server.  Wire: 7.  On exit it says nothing to the supernode."""

    HANDLER = _PyHandler


class _GoHandler(BaseHTTPRequestHandler):
    """The 1.0.6 peer server.  Wire: 7.6"""

    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.owner.log.append((self.path, dict((k.lower(), v) for k, v in self.headers.items())))
        path, _, query = self.path.partition("?")
        prefix, _, name = path.rpartition("/")
        if prefix == "/peer/file":
            return self._upload(name)
        if path == "/server/ping":
            return self._answer(200, b"success")
        if prefix == "/check":
            limit = self.headers.get("totalLimit", "")
            if limit.isdigit() and int(limit):
                self.owner.total_limit = int(limit)
            self.owner.tasks[name] = {"dataDir": self.headers.get("dataDir", "")}
            return self._answer(200, ("%s@1.0.6" % name).encode("utf-8"))
        if prefix == "/rate":
            asked = self.headers.get("rateLimit", "")
            if not asked.isdigit():
                return self._answer(400, b'strconv.Atoi: parsing "": invalid syntax')
            return self._answer(200, str(self.owner.rate(name, int(asked))).encode("ascii"))
        if path == "/client/finish":
            return self._finish(dict(urllib.parse.parse_qsl(query)))
        self._answer(404, b"404 page not found\n", "text/plain; charset=utf-8")

    def _finish(self, query):
        if not all(query.get(k) for k in ("taskFileName", "taskID", "cid")):
            return self._answer(400, b"invalid params")
        self.owner.tasks.setdefault(query["taskFileName"], {}).update(query, finished=True)
        self._answer(200, b"success")

    def _answer(self, status, body, kind="application/octet-stream"):
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status, text):
        self._answer(status, text.encode("utf-8") + b"\n", "text/plain; charset=utf-8")

    def _upload(self, name):
        try:
            num, size = int(self.headers.get("pieceNum", "")), int(self.headers.get("pieceSize", ""))
            unit, range_ = self.headers.get("Range", "").split("=")
            start, end = [int(x) for x in range_.split("-")]
            if end <= start:
                raise ValueError(range_)
        except ValueError as error:
            return self._error(400, str(error))
        if name not in self.owner.tasks:
            return self._error(500, "failed to get taskPath: %s" % name)
        try:
            body = open(self.owner.service_path(name), "rb")
        except PermissionError as error:
            return self._error(403, str(error))
        except OSError as error:
            return self._error(404, str(error))
        with body:
            pad = 0 if self.headers.get("cdnSource") == "source" else 5
            self._piece(body, start - num * pad, end - start + 1, pad, size)

    def _piece(self, body, start, length, pad, size):
        total = os.fstat(body.fileno()).st_size
        if length < pad or start < 0 or (start >= total and not pad):
            return self._error(416, "range not satisfiable")
        if start + length - pad > total:
            length = total - start + pad if total else pad
        content = b""
        if length > pad:
            body.seek(start)
            content = body.read(length - pad)
        if pad:
            content = struct.pack(">I", ((length - pad) | (size << 4)) & 0xFFFFFFFF) + content + b"\x7f"
        self.send_response_only(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        self.wfile.write(content)


class GoUploader(_Uploader):
    """1.0.6's peer server.  Wire: 7.  `stop()` tells the supernodes, `crash()` does not."""

    HANDLER = _GoHandler

    def crash(self):
        """Vanish without a word."""
        super().stop()

    def stop(self):
        """SIGTERM: service down for every task, then away.  Wire: 7.7"""
        for task in self.tasks.values():
            if task.get("superNode"):
                host, _, port = task["superNode"].partition(":")
                target = "/peer/service/down?taskId=%s&cid=%s" % (task["taskID"], task["cid"])
                request = "GET %s HTTP/1.1\r\nUser-Agent: fasthttp\r\nHost: %s\r\n\r\n" % (target, task["superNode"])
                try:
                    get_on_new_connection(host, int(port or 8002), request.encode("ascii"), 1, 1, 2)
                except (OSError, EOFError, BadReply):
                    continue
        super().stop()


def main(argv):
    """Download once and say how it went."""
    kind, node, url, output = argv[:4]
    with (PyUploader if kind == "py" else GoUploader)() as uploader:
        result = (PyDfget if kind == "py" else GoDfget)([node], url, output, uploader=uploader).run()
        digest = None
        if os.path.exists(output):
            with open(output, "rb") as done:
                digest = hashlib.sha256(done.read()).hexdigest()
        print(result.exit_code, "reason:%d" % result.reason, digest)
        for call in result.calls:
            print(" ", call.kind, call.target, call.code)
        if len(argv) > 4 and digest != argv[4]:
            return 1
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
