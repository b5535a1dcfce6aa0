"""The source station of the tests: an HTTP/1.1 origin in this process that does what a test tells it and logs what it saw.

    with Origin() as origin:
        url = origin.put("big.bin", data, ranges=False, rate=1 << 20)
        ...
        assert origin.gets("big.bin") == 1 and origin.bytes_sent("big.bin") == len(data)

Standard library only, Python 3.6 to 3.13: the short end-to-end pass uses it too.
"""
import email.utils
import gzip
import hashlib
import http.server
import os
import re
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

Content = NamedTuple("Content", [
    ("data", bytes),
    ("etag", bool),                     # send an ETag and honour If-None-Match
    ("last_modified", bool),            # send Last-Modified and honour If-Modified-Since
    ("length", bool),                   # False: chunked, no Content-Length, no ranges
    ("ranges", bool),                   # answer Range with 206
    ("gzip", bool),                     # encode (chunked) for those who accept gzip
    ("redirect_to", Optional[str]),     # 302 to there
    ("redirect_status", int),           # or another status
    ("tickets", bool),                  # 403 but for a redirect's own "?ticket=N", which is good for one request
    ("head", bool),                     # False: 405 for HEAD
    ("bare_head", bool),                # HEAD says nothing of the file
    ("auth", Optional[str]),            # the Authorization value without which the answer is 401
    ("rate", Optional[float]),          # bytes per second
    ("delay", float),                   # seconds before the answer's first byte
    ("stall_after", Optional[int]),     # after this many bytes hang until `release`
    ("cut_after", Optional[int]),       # after this many bytes close the connection
    ("reset", bool),                    # cut_after resets the connection
    ("status", Optional[int]),          # this status instead of an answer
    ("retry_after", Optional[str]),     # with this header
    ("middle", Optional[int]),          # this status to whoever asks for a range
    ("declared", Optional[int]),        # the Content-Length, whatever there is to send
    ("tag", Optional[str]),             # the ETag, instead of one that the bytes have made
    ("conditional", bool),              # False: If-None-Match, If-Modified-Since and If-Range are not understood
    ("wrong", Optional[int]),           # the byte at this offset is sent flipped
    ("once", bool),                     # stall_after, cut_after, status and wrong concern only the first GET (and a daemon's look before it)
    ("headers", Tuple[Tuple[str, str], ...]),  # sent in addition
])

PLAIN = Content(data=b"", etag=True, last_modified=True, length=True, ranges=True, gzip=False, redirect_to=None,
                redirect_status=302, tickets=False, head=True, bare_head=False, auth=None, rate=None, delay=0.0, stall_after=None, cut_after=None,
                reset=False, status=None, retry_after=None, middle=None, declared=None, tag=None, conditional=True, wrong=None,
                once=False, headers=())

WELL = dict(stall_after=None, cut_after=None, status=None, wrong=None)  # what `once` takes away

MODIFIED = 1600000000  # every file's Last-Modified, Unix seconds


class Record:
    """One request as the origin saw it; `status` and `bytes_sent` grow as it is answered."""

    def __init__(self, method: str, path: str, headers: Dict[str, str]) -> None:
        self.method = method
        self.path = path
        self.name = path.split("?")[0].lstrip("/")
        self.headers = headers                    # names in lower case
        self.range = headers.get("range")         # as sent, e.g. "bytes=5-"
        self.opening = self.range == "bytes=0-16383"  # a daemon's look at a blob's first bytes
        self.status = 0
        self.bytes_sent = 0                       # of the body
        self.started = time.monotonic()

    def __repr__(self) -> str:
        return "<%s %s range=%s -> %d, %d bytes>" % (self.method, self.path, self.range, self.status, self.bytes_sent)


class Origin:
    """A threaded origin server on a free port; `close` leaves no thread."""

    def __init__(self, host: str = "127.0.0.1", tls: Optional[Tuple[str, str]] = None) -> None:
        self.log: List[Record] = []
        self.contents: Dict[str, Content] = {}
        self.gates: Dict[str, threading.Event] = {}
        self.tickets: List[int] = []              # that redirects have given out
        self.closing = threading.Event()
        self._server = _Server(host, self, tls)
        self.port = self._server.server_address[1]
        shown = "[%s]" % host if ":" in host else host
        self.base = "%s://%s:%d/" % ("https" if tls else "http", shown, self.port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="origin")
        self._thread.start()

    def __enter__(self) -> "Origin":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def put(self, name: str, data: bytes = b"", **how: Any) -> str:
        """Offer `data` under `name` the way `how` says (fields of Content); return its URL."""
        self.gates[name] = threading.Event()
        self.contents[name] = PLAIN._replace(data=data, **how)
        return self.base + name

    def change(self, name: str, **how: Any) -> None:
        """Behave otherwise from the next request on."""
        self.contents[name] = self.contents[name]._replace(**how)

    def hang_up(self) -> None:
        """Break every connection; new ones are welcome."""
        self._server.break_all()

    def release(self, name: str) -> None:
        """Let the stalled answers of `name` go on."""
        self.gates[name].set()

    def ticket_to(self, url: str) -> str:
        """Return where a redirect leads; to a file that wants tickets with one."""
        name = url.rpartition("/")[2]
        if name not in self.contents or not self.contents[name].tickets:
            return url
        self.tickets.append(len(self.log))
        return "%s?ticket=%d" % (url, self.tickets[-1])

    def take_ticket(self, path: str) -> bool:
        """Return whether this request has a ticket, which is gone then."""
        ticket = path.rpartition("?ticket=")[2]
        if not ticket.isdigit() or int(ticket) not in self.tickets:
            return False
        self.tickets.remove(int(ticket))
        return True

    def requests(self, name: str, method: str = "GET") -> List[Record]:
        return [r for r in list(self.log) if r.name == name and r.method == method]

    def gets(self, name: str) -> int:
        """Number of GETs that were answered with body bytes or an error (304 is none, and no daemon's look at a blob's first bytes)."""
        return len([r for r in self.requests(name) if r.status != 304]) - self.openings(name)

    def openings(self, name: str) -> int:
        """How often a daemon has asked for a blob's first 16 KB, and got no more."""
        return len([r for r in self.requests(name) if r.opening and r.status in (206, 416)])

    def bytes_sent(self, name: str) -> int:
        return sum(r.bytes_sent for r in self.requests(name))

    def close(self) -> None:
        if not self.closing.is_set():
            self.closing.set()
            self._server.shutdown()
            self._server.hang_up()
            self._server.server_close()
            self._thread.join()


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, host: str, origin: Origin, tls: Optional[Tuple[str, str]]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.origin = origin
        self.lock = threading.Lock()                         # guards the next two
        self.open: List[socket.socket] = []
        self.threads: List[threading.Thread] = []
        super().__init__((host, 0), _Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        # HTTPServer.server_bind asks the name service for its own name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.open.append(request)
            self.threads.append(threading.current_thread())
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.lock:
                self.open.remove(request)
                self.threads.remove(threading.current_thread())

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away, or one that did not like our certificate

    def break_all(self) -> None:
        """Shut every connection down."""
        with self.lock:
            sockets = list(self.open)
        for connection in sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # already gone

    def hang_up(self) -> None:
        """Close every connection and wait for the threads that served them."""
        with self.lock:
            threads = list(self.threads)
        self.break_all()
        for thread in threads:
            thread.join(10)


class _Cut(Exception):
    """This answer ends here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # type: ignore[assignment]
    timeout = 60

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        origin = self.server.origin
        record = Record(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        what = origin.contents.get(record.name)
        if what is not None and what.once and record.method == "GET" and not record.opening:
            origin.change(record.name, once=False, **WELL)
        origin.log.append(record)
        try:
            if what is None:
                self._short(record, 404)
            else:
                origin.closing.wait(what.delay)
                self._content(record, what)
        except (_Cut, OSError):
            self.close_connection = True
        self.wfile.flush()

    def _short(self, record: Record, status: int, **headers: str) -> None:
        """An answer whose body is only its reason."""
        record.status = status
        body = b"" if status == 304 else (b"station says %d\n" % status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if record.method != "HEAD":
            self.wfile.write(body)

    def _content(self, record: Record, what: Content) -> None:
        if record.method == "HEAD" and not what.head:
            return self._short(record, 405)
        if record.method == "HEAD" and what.bare_head:
            return self._short(record, 200)
        if what.status or (what.middle and record.range):
            return self._short(record, what.status or what.middle or 0, **({"Retry_After": what.retry_after} if what.retry_after else {}))
        if what.redirect_to:
            return self._short(record, what.redirect_status, Location=self.server.origin.ticket_to(what.redirect_to))
        if what.tickets and not self.server.origin.take_ticket(record.path):
            return self._short(record, 403)
        if what.auth and record.headers.get("authorization") != what.auth:
            return self._short(record, 401, WWW_Authenticate="Basic realm=\"station\"")
        tag = what.tag or '"%s"' % hashlib.md5(what.data).hexdigest()
        date = email.utils.formatdate(MODIFIED, usegmt=True)
        if not what.conditional:
            for name in ("if-none-match", "if-modified-since", "if-range"):
                record.headers.pop(name, None)
        if what.etag and "if-none-match" in record.headers:
            if tag in record.headers["if-none-match"]:
                return self._short(record, 304, ETag=tag)
        elif what.last_modified and record.headers.get("if-modified-since") == date:
            return self._short(record, 304)
        squeeze = what.gzip and "gzip" in record.headers.get("accept-encoding", "")
        data = gzip.compress(what.data) if squeeze else what.data
        chunked = squeeze or not what.length
        start, stop, status = 0, len(data), 200
        if record.range and what.ranges and not chunked and record.headers.get("if-range", tag) in (tag, date):
            try:
                start, stop = _parse_range(record.range, len(data))
            except ValueError:
                return self._short(record, 416, Content_Range="bytes */%d" % len(data))
            status = 206
        record.status = status
        self.send_response(status)
        if not any(name.lower() == "content-type" for name, _ in what.headers):
            self.send_header("Content-Type", "application/octet-stream")
        if what.etag:
            self.send_header("ETag", tag)
        if what.last_modified:
            self.send_header("Last-Modified", date)
        if what.ranges and not chunked:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", "bytes %d-%d/%d" % (start, stop - 1, len(data)))
        if squeeze:
            self.send_header("Content-Encoding", "gzip")
        for name, value in what.headers:
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(stop - start if what.declared is None else what.declared))
        self.end_headers()
        if record.method == "HEAD":
            return None
        if what.wrong is not None and not squeeze and what.wrong < len(data):
            at = what.wrong
            data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1:]
        return self._body(record, what, memoryview(data)[start:stop], chunked)

    def _body(self, record: Record, what: Content, body: memoryview, chunked: bool) -> None:
        gate, closing = self.server.origin.gates[record.name], self.server.origin.closing
        step = 65536 if what.rate is None else max(1024, min(65536, int(what.rate / 20)))
        begun = time.monotonic()
        for at in range(0, len(body), step):
            piece = body[at:at + step]
            for limit in (what.stall_after, what.cut_after):
                if limit is not None and at + len(piece) > limit:
                    self._write(record, body[at:max(at, limit)], chunked)
                    piece = body[max(at, limit):at + step]
                    if limit is what.cut_after:
                        self.wfile.flush()
                        self._cut(what)
                    self.wfile.flush()
                    while not gate.wait(0.02):
                        if closing.is_set():
                            raise _Cut()
            self._write(record, piece, chunked)
            if what.rate is not None:
                closing.wait(max(0.0, begun + (at + step) / what.rate - time.monotonic()))
            if closing.is_set():
                raise _Cut()
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _cut(self, what: Content) -> None:
        """End the connection, politely or not."""
        if what.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        raise _Cut()

    def _write(self, record: Record, piece: memoryview, chunked: bool) -> None:
        if not len(piece):
            return
        if chunked:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece.tobytes()))
        else:
            self.wfile.write(piece)
        record.bytes_sent += len(piece)


def _parse_range(text: str, size: int) -> Tuple[int, int]:
    """Return (start, stop) of one `bytes=` range, or raise ValueError when nothing of it exists."""
    match = re.match(r"bytes=(\d*)-(\d*)$", text.strip())
    if not match or not (match.group(1) or match.group(2)):
        raise ValueError(text)
    if not match.group(1):
        start, stop = max(0, size - int(match.group(2))), size
    else:
        start = int(match.group(1))
        stop = min(size, int(match.group(2)) + 1) if match.group(2) else size
    if start >= stop:
        raise ValueError(text)
    return start, stop


def make_certificate(folder: str) -> Tuple[str, str]:
    """Make a self-signed certificate for loopback with the openssl command; return (certificate, key) paths."""
    certificate, key = os.path.join(folder, "station.pem"), os.path.join(folder, "station.key")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1", "-keyout", key, "-out", certificate],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return certificate, key
