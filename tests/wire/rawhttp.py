"""HTTP at the socket level: what is sent is exactly the bytes given, what comes back is read strictly.

The old programs' requests are reproduced byte for byte, so nothing here adds a header or repairs an answer.
"""
import json
import select
import socket
import socketserver
import threading
import time
from typing import NamedTuple


class BadReply(Exception):
    """The peer's answer is not HTTP, or is shorter than its own Content-Length."""


class Reply(NamedTuple):
    """One HTTP answer: `headers` maps lower-case names to values, `raw_headers` keeps order and case."""

    version: str
    status: int
    headers: dict
    raw_headers: list
    body: bytes

    def json(self):
        """Return the body as JSON; ValueError when it is not."""
        return json.loads(self.body.decode("utf-8"))


def read_reply(stream, method="GET"):
    """Read one answer from a buffered binary `stream`.  EOFError when it closed before the first byte."""
    line = stream.readline(65537)
    if not line:
        raise EOFError("closed before the first byte of the answer")
    words = line.decode("latin-1").rstrip("\r\n").split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise BadReply("not a status line: %r" % line[:200])
    raw = []
    while True:
        line = stream.readline(65537)
        if not line:
            raise BadReply("closed inside the headers")
        line = line.decode("latin-1").rstrip("\r\n")
        if not line:
            break
        name, colon, value = line.partition(":")
        if not colon:
            raise BadReply("not a header line: %r" % line)
        raw.append((name, value.strip()))
    headers = {name.lower(): value for name, value in raw}
    status = int(words[1])
    return Reply(words[0], status, headers, raw, _read_body(stream, method, status, headers))


def _read_body(stream, method, status, headers):
    if method == "HEAD" or status in (204, 304) or 100 <= status < 200:
        return b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return _read_chunked(stream)
    if "content-length" not in headers:
        return stream.read()
    want = int(headers["content-length"])
    body = stream.read(want)
    if len(body) != want:
        raise BadReply("unexpected EOF: Content-Length %d, %d bytes came" % (want, len(body)))
    return body


def _read_chunked(stream):
    parts = []
    while True:
        size = int(stream.readline(1024).split(b";")[0], 16)
        part = stream.read(size)
        if len(part) != size:
            raise BadReply("unexpected EOF inside a chunk")
        stream.readline(1024)
        if not size:
            return b"".join(parts)
        parts.append(part)


def keeps_alive(reply):
    """Tell whether the connection may carry another request after `reply`."""
    connection = reply.headers.get("connection", "").lower()
    if reply.version == "HTTP/1.0":
        return connection == "keep-alive"
    if "content-length" not in reply.headers and "transfer-encoding" not in reply.headers:
        return False
    return connection != "close"


def talk(address, request, method="GET", connect_s=2.0, read_s=5.0, source_ip=None):
    """Send the bytes `request` on a new connection to `address`, from `source_ip` if given, and return the Reply."""
    with socket.create_connection(address, timeout=connect_s, source_address=(source_ip, 0) if source_ip else None) as sock:
        sock.settimeout(read_s)
        sock.sendall(request)
        with sock.makefile("rb") as stream:
            return read_reply(stream, method)


class Pool:
    """Kept-alive connections, as urllib3 and fasthttp keep them.  _lock guards _idle.

    `source_ip` binds the client's end, so that several emulated hosts can share a machine.
    """

    def __init__(self, source_ip=None):
        self._source = (source_ip, 0) if source_ip else None
        self._idle = {}
        self._lock = threading.Lock()
        self.connections = 0

    def send(self, address, request, method="GET", connect_s=2.0, read_s=3.0):
        """Send `request` to (ip, port) and return the Reply; a kept connection that died is replaced once."""
        sock = self._take(address)
        if sock:
            try:
                return self._exchange(address, sock, request, method, read_s)
            except (EOFError, ConnectionError):
                if method != "GET":
                    raise
        sock = socket.create_connection(address, timeout=connect_s, source_address=self._source)
        self.connections += 1
        return self._exchange(address, sock, request, method, read_s)

    def _take(self, address):
        with self._lock:
            idle = self._idle.get(address, [])
            while idle:
                sock = idle.pop()
                if not select.select([sock], [], [], 0)[0]:
                    return sock
                sock.close()
        return None

    def _exchange(self, address, sock, request, method, read_s):
        try:
            sock.settimeout(read_s)
            sock.sendall(request)
            with sock.makefile("rb") as stream:
                reply = read_reply(stream, method)
        except BaseException:
            sock.close()
            raise
        if keeps_alive(reply):
            with self._lock:
                self._idle.setdefault(address, []).append(sock)
        else:
            sock.close()
        return reply

    def close(self):
        """Close every idle connection."""
        with self._lock:
            for idle in self._idle.values():
                for sock in idle:
                    sock.close()
            self._idle.clear()


class ThreadedServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A server that leaves no thread: `hang_up` closes what is open and waits.  _lock guards accepted, _open and _busy."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address, handler):
        self._lock = threading.Lock()
        self._open, self._busy = set(), set()
        self.accepted = 0                                       # connections, in all
        super().__init__(address, handler)

    def process_request_thread(self, request, client_address):
        """Serve one connection, noted in _open while it lasts."""
        with self._lock:
            self.accepted += 1
            self._open.add(request)
            self._busy.add(threading.current_thread())
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.discard(request)
                self._busy.discard(threading.current_thread())

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    def hang_up(self):
        """Stop serving, close every connection and wait for its thread."""
        self.shutdown()
        self.server_close()
        with self._lock:
            open_, busy = list(self._open), list(self._busy)
        for sock in open_:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in busy:
            thread.join(10)


def wait_for(fact, limit_s=10.0, what="it"):
    """Return the first true value of `fact()`; AssertionError after `limit_s` seconds."""
    end = time.monotonic() + limit_s
    while True:
        value = fact()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("waited %.0f s for %s" % (limit_s, what))
        time.sleep(0.02)
