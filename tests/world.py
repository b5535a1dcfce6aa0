"""The world of one end-to-end test: real supernodes, hosts and downloads of dfly.py in a folder of their own.

    with World() as world:
        url = world.origin().put("big.bin", blob(5 << 20))
        node = world.supernode()
        result = world.host().get(url, node=node.node)
        assert result.code == 0 and result.data == blob(5 << 20)

Every process carries the world's mark in its environment (DFLY_TEST_ID), daemonised children included, so `close` finds
whatever was left behind.  Standard library only, Python 3.6 to 3.13: the short end-to-end pass uses it too.
"""
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from station import Origin, make_certificate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DFLY = os.environ.get("DFLY") or os.path.join(ROOT, "dfly.py")
PYTHON = os.environ.get("DFLY_PYTHON") or sys.executable
MARK = "DFLY_TEST_ID"

PIECE = 262144                # the smallest piece on the wire, bytes
CONTENT = PIECE - 5           # what of it is file content
MB = 1 << 20

TROUBLE = re.compile(r"^.*(Traceback \(most recent call last\)|ResourceWarning|Exception ignored in|DeprecationWarning).*(\n.*){0,12}", re.M)


# ---- bytes -----------------------------------------------------------------------------------------------------------

def blob(size: int, seed: Any = 0) -> bytes:
    """Return `size` bytes that look random and are always the same for the same seed."""
    rng = random.Random("dfly-%s" % seed)
    return rng.getrandbits(8 * size).to_bytes(size, "little") if size else b""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


# ---- waiting ---------------------------------------------------------------------------------------------------------

def wait_for(fact: Callable[[], Any], limit: float = 20.0, what: str = "") -> Any:
    """Return the first true value of `fact()`; AssertionError when there is none within `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        value = fact()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("not within %g s: %s" % (limit, what or getattr(fact, "__doc__", None) or fact))
        time.sleep(0.02)


def tail(text: str, count: int = 60) -> str:
    lines = text.splitlines()
    return "\n".join((["..."] if len(lines) > count else []) + lines[-count:])


def trouble(text: str, where: str) -> List[str]:
    """What no program of ours should ever say: a traceback, a warning, an exception that nobody caught."""
    found = TROUBLE.search(text)
    return ["trouble in %s:\n%s" % (where, found.group(0)[:2500].replace("\\n", "\n"))] if found else []


# ---- processes -------------------------------------------------------------------------------------------------------

def alive(pid: int) -> bool:
    """Is there such a process, and is it more than a zombie?"""
    try:
        with open("/proc/%d/stat" % pid) as f:
            return f.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def marked(mark: str) -> Dict[int, str]:
    """Return {pid: command line} of the processes that carry the mark, this one excepted."""
    needle, found = ("%s=%s" % (MARK, mark)).encode(), {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open("/proc/%s/environ" % name, "rb") as f:
                if needle not in f.read().split(b"\0"):
                    continue
            with open("/proc/%s/cmdline" % name, "rb") as f:
                command = f.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue  # gone meanwhile, or another user's
        if alive(int(name)):
            found[int(name)] = command
    return found


def descriptors(pid: int) -> int:
    return len(os.listdir("/proc/%d/fd" % pid))


def threads(pid: int) -> int:
    return len(os.listdir("/proc/%d/task" % pid))


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    with open("/proc/%d/statm" % pid) as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


Result = NamedTuple("Result", [
    ("code", int),               # exit code
    ("stdout", str),
    ("stderr", str),
    ("path", str),               # of the output
    ("data", Optional[bytes]),   # the output's content, None when there is none
    ("seconds", float),          # from start to exit
])


class Outcome(Result):
    """How a command ended."""

    @property
    def out(self) -> str:
        return self.stdout + self.stderr

    @property
    def last(self) -> str:
        """The last line of stdout."""
        lines = [line for line in self.stdout.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def cost(self) -> float:
        """The seconds that the program itself says it took."""
        return float(re.search(r"cost:([\d.]+)s", self.stdout).group(1))  # type: ignore[union-attr]

    @property
    def began(self) -> float:
        """When it began, seconds since 1970, as the program itself says."""
        return float(re.search(r"^sign:\d+-([\d.]+)$", self.stdout, re.M).group(1))  # type: ignore[union-attr]

    @property
    def reason(self) -> Optional[int]:
        found = re.search(r"reason:(\d+)", self.stdout)
        return int(found.group(1)) if found else None

    @property
    def shares(self) -> Dict[str, int]:
        """Percent of the bytes by source, from the last line: origin, supernode, peers."""
        return {name: int(share) for name, share in re.findall(r"(origin|supernode|peers) (\d+) ?%", self.last)}


class Command:
    """A running command of dfly.py; its output goes to files in the world's folder."""

    def __init__(self, world: "World", label: str, argv: Sequence[str], path: str = "", env: Optional[dict] = None,
                 cwd: Optional[str] = None) -> None:
        self.label = label
        self.path = path
        self.started = time.monotonic()
        base = os.path.join(world.logs, "%02d-%s" % (len(world.commands), label))
        self._files = (base + ".out", base + ".err")
        with open(self._files[0], "wb") as out, open(self._files[1], "wb") as err:
            self.proc = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd or world.root,
                                         env=dict(world.env, **(env or {})), start_new_session=True,
                                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a shell's background job has it off
        self.pid = self.proc.pid
        world.commands.append(self)

    @property
    def stdout(self) -> str:
        return self._read(0)

    @property
    def stderr(self) -> str:
        return self._read(1)

    def output(self) -> str:
        return self.stdout + self.stderr

    def _read(self, which: int) -> str:
        with open(self._files[which], "rb") as f:
            return f.read().decode("utf-8", "replace")

    def running(self) -> bool:
        return self.proc.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a power cut would have it."""
        if self.running():
            self.proc.kill()
        self.proc.wait(10)

    def stop(self, limit: float = 10.0) -> int:
        """SIGTERM and wait; return the exit code."""
        if self.running():
            self.proc.terminate()
        try:
            return self.proc.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("%s did not end within %g s of SIGTERM\n%s" % (self.label, limit, tail(self.output())))

    def wait(self, timeout: float = 60.0) -> Outcome:
        """Wait for the end; past `timeout` seconds the command is killed and the test fails with what it said."""
        try:
            code = self.proc.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("%s still ran after %g s\n%s" % (self.label, timeout, tail(self.output())))
        seconds = time.monotonic() - self.started
        data = None
        if self.path and os.path.isfile(self.path):
            with open(self.path, "rb") as f:
                data = f.read()
        return Outcome(code, self.stdout, self.stderr, self.path, data, seconds)


class Supernode(Command):
    """A running `dfly.py supernode` on free ports."""

    LISTENING = re.compile(r"^supernode listening on (\S+):(\d+) pieces on (\S+):(\d+)\s*$", re.M)

    def __init__(self, world: "World", flags: Sequence[str], home: str, ip: str, ports: Tuple[int, int]) -> None:
        self.home = home
        super().__init__(world, "supernode", world.dfly(
            "supernode", "--home", home, "--port", str(ports[0]), "--download-port", str(ports[1]), "--advertise-ip", ip, *flags))
        wait_for(lambda: self.LISTENING.search(self.stdout) or not self.running(), 20, "the supernode's listening line")
        match = self.LISTENING.search(self.stdout)
        if not match:
            raise AssertionError("the supernode did not start\n" + tail(self.output()))
        self.ip = ip
        self.port, self.cdn_port = int(match.group(2)), int(match.group(4))
        self.node = "%s:%d" % ("[%s]" % ip if ":" in ip else ip, self.port)

    def ask(self, method: str, path: str, body: Any = None, headers: Optional[dict] = None, timeout: float = 20.0) -> "Answer":
        """One request to the control port."""
        return ask((self.ip, self.port), method, path, body, headers, timeout)

    def old_client(self, url: str, cid: str, port: int = 0) -> Iterator[Dict[str, Any]]:
        """Register and pull as dfget 1.0.6 does: yield every piece task, report each as done, end at 600.  Wire: 1, 3, 4.1"""
        answer = self.ask("POST", "/peer/registry", {
            "superNodeIp": self.ip, "rawUrl": url, "taskUrl": url, "cid": cid, "ip": self.ip, "hostName": "old", "port": port,
            "path": "/peer/file/old-" + cid.partition("-")[2], "version": "1.0.6", "callSystem": "test"}).json
        assert answer["code"] == 200, answer
        task, report, end = answer["data"]["taskId"], "status=700&result=502&dstCid=&range=", time.monotonic() + 30
        while answer["code"] != 600:
            answer = self.ask("GET", "/peer/task?srcCid=%s&taskId=%s&%s" % (cid, task, report)).json
            assert answer["code"] in (600, 601, 602) and time.monotonic() < end, answer
            if answer["code"] == 602:
                time.sleep(0.05)  # what it does before it asks again
            for piece in answer.get("data") or [] if answer["code"] == 601 else []:
                yield piece
                report = "status=701&result=503&dstCid=%s&range=%s" % (piece["cid"], piece["range"])
                self.ask("GET", "/peer/piece/suc?taskId=%s&cid=%s&dstCid=%s&pieceRange=%s" % (task, cid, piece["cid"], piece["range"]))

    def metrics(self) -> Dict[str, float]:
        """GET /metrics as {name: sum over its labels}; also {'name{labels}': value}."""
        values: Dict[str, float] = {}
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            match = re.match(r"([a-zA-Z_:][\w:]*)(\{.*\})?\s+(\S+)", line)
            if match:
                name, labels, value = match.group(1), match.group(2), float(match.group(3))
                values[name] = values.get(name, 0.0) + value
                if labels:
                    values[name + labels] = value
        return values

    def bytes_sent(self) -> int:
        """Piece bytes that this supernode has sent."""
        return int(self.metrics()["dfly_sent_bytes_total"])


class Daemon(Command):
    """A running `dfly.py daemon`, or one under another name, on a free port of 127.0.0.1."""

    LISTENING = re.compile(r"^dfdaemon listening on (\S+):(\d+) for (.+)$", re.M)

    def __init__(self, world: "World", label: str, argv: Sequence[str]) -> None:
        super().__init__(world, label, argv)
        wait_for(lambda: self.LISTENING.search(self.stdout) or not self.running(), 20, "the daemon's listening line")
        match = self.LISTENING.search(self.stdout)
        if not match:
            raise AssertionError("the daemon did not start\n" + tail(self.output()))
        self.address = ("127.0.0.1", int(match.group(2)))

    def ask(self, path: str, method: str = "GET", headers: Optional[dict] = None, body: Any = None, timeout: float = 30.0) -> "Answer":
        """One request; `path` may be a whole URL, as a proxy is asked."""
        return ask(self.address, method, path, body, headers, timeout)

    def status(self) -> dict:
        """What GET /_dfly/status says."""
        return self.ask("/_dfly/status").json

    def metric(self, name: str) -> int:
        """One number of GET /metrics."""
        return int(re.search(r"^dfly_daemon_%s (\d+)$" % name, self.ask("/metrics").body.decode(), re.M).group(1))  # type: ignore[union-attr]


class Host:
    """One machine: a home, an uploader, and the downloads that share them."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.dir = os.path.join(world.root, name)
        self.home = os.path.join(self.dir, "home")
        os.makedirs(self.home)

    def path(self, out: str) -> str:
        return os.path.join(self.dir, out)

    def start(self, url: str, *flags: str, out: str = "out", node: Optional[str] = None, ip: str = "127.0.0.1") -> Command:
        """Start `dfly.py get`; without `node` the world's newest supernode, or a dead address, is used."""
        path = os.path.join(self.dir, out)
        argv = self.world.dfly("get", "-u", url, "-o", path, "--node", node or self.world.node(), "--home", self.home, "--ip", ip, *flags)
        return Command(self.world, "get-" + self.name, argv, path)

    def get(self, url: str, *flags: str, out: str = "out", node: Optional[str] = None, ip: str = "127.0.0.1",
            timeout: float = 60.0, check: Optional[bytes] = None) -> Outcome:
        """Run `dfly.py get` to its end; with `check`, it must succeed with exactly these bytes."""
        result = self.start(url, *flags, out=out, node=node, ip=ip).wait(timeout)
        if check is not None:
            good(result, check)
        return result

    def daemon(self, registry: str, *flags: str, node: Optional[str] = None, ip: str = "127.0.0.1") -> Daemon:
        """Start this machine's `dfly.py daemon` as the mirror of `registry`."""
        return Daemon(self.world, "daemon-" + self.name, self.world.dfly(
            "daemon", "--home", self.home, "--port", "0", "--registry", registry, "--node", node or self.world.node(), "--ip", ip, *flags))

    def uploader_pid(self) -> Optional[int]:
        """The pid of this home's running uploader, None when there is none."""
        try:
            with open(os.path.join(self.home, "peer.pid")) as f:
                pid = int(f.read().split()[0])
        except (OSError, ValueError, IndexError):
            return None
        return pid if alive(pid) else None

    def kill_uploader(self) -> None:
        pid = self.uploader_pid()
        assert pid, "%s has no uploader" % self.name
        send(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), 10, "the uploader's death")

    def uploader_address(self) -> Tuple[str, int]:
        """Where this home's uploader listens, found by its sockets."""
        pid = wait_for(self.uploader_pid, 10, "an uploader of " + self.name)
        return "127.0.0.1", wait_for(lambda: listening_port(pid), 10, "a listening port of the uploader")

    def leftovers(self) -> List[str]:
        """Files beside the outputs whose names say that they are ours: half-written data and journals."""
        return sorted(name for name in os.listdir(self.dir)
                      if name.endswith(".dfly") or ".dfly." in name or name.startswith((".", "dfget-", "backsource")))


def good(result: Outcome, data: bytes) -> Outcome:
    """Assert that a download succeeded with exactly these bytes."""
    assert result.code == 0, "exit %d\n%s" % (result.code, tail(result.out))
    assert result.data is not None, "no output file\n" + tail(result.out)
    if result.data != data:
        at = next((i for i, (a, b) in enumerate(zip(result.data, data)) if a != b), min(len(result.data), len(data)))
        raise AssertionError("%d bytes for %d, first difference at %d\n%s" % (len(result.data), len(data), at, tail(result.out)))
    return result


def bad(result: Outcome, *codes: int) -> Outcome:
    """Assert that a download failed cleanly: one of these codes, no file, no traceback."""
    assert result.code in (codes or range(1, 128)), "exit %d, expected %s\n%s" % (result.code, codes, tail(result.out))
    assert result.data is None, "a failed download left a file\n" + tail(result.out)
    assert "Traceback" not in result.out, tail(result.out)
    return result


def listening_port(pid: int) -> Optional[int]:
    """The first TCP port on which the process listens."""
    inodes = set()
    for fd in os.listdir("/proc/%d/fd" % pid):
        try:
            match = re.match(r"socket:\[(\d+)\]", os.readlink("/proc/%d/fd/%s" % (pid, fd)))
        except OSError:
            continue
        if match:
            inodes.add(match.group(1))
    for table in ("tcp", "tcp6"):
        with open("/proc/net/" + table) as f:
            for line in f.readlines()[1:]:
                column = line.split()
                if column[3] == "0A" and column[9] in inodes:
                    return int(column[1].rpartition(":")[2], 16)
    return None


def dead_port() -> int:
    """A port on which nothing listens (nor will: it was free a moment ago and lies outside the ephemeral range)."""
    for port in random.Random(os.getpid()).sample(range(10000, 14999), 50):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


# ---- raw HTTP --------------------------------------------------------------------------------------------------------

class Answer(NamedTuple("Answer", [("status", int), ("headers", Dict[str, str]), ("body", bytes)])):
    """One HTTP answer; status 0 when the server just closed the connection."""

    @property
    def json(self) -> Any:
        return json.loads(self.body.decode("utf-8"))


def raw(address: Tuple[str, int], request: bytes, timeout: float = 20.0, half_close: bool = False) -> Answer:
    """Send these very bytes and read one answer."""
    with socket.create_connection(address, timeout) as s:
        try:
            s.sendall(request)
            if half_close:
                s.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused while we still talked: its answer may be there all the same
        return read_answer(s, request.startswith(b"HEAD "))


def read_answer(s: socket.socket, head_only: bool = False) -> Answer:
    """Read one HTTP answer from a connection, and nothing of what may follow it."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        more = _receive(s, 1)
        if not more:
            return Answer(0, {}, data)
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    status = int(lines[0].split()[1])
    if head_only or status in (204, 304):
        return Answer(status, headers, b"")
    wanted = int(headers["content-length"]) if "content-length" in headers else None
    while wanted is None or len(body) < wanted:
        more = _receive(s, 65536 if wanted is None else wanted - len(body))
        if not more:
            break
        body += more
    return Answer(status, headers, body)


def _receive(s: socket.socket, most: int) -> bytes:
    try:
        return s.recv(most)
    except ConnectionError:
        return b""


def ask(address: Tuple[str, int], method: str, path: str, body: Any = None, headers: Optional[dict] = None,
        timeout: float = 20.0) -> Answer:
    """One request; a dict or list as `body` is sent as JSON, bytes and str as they are."""
    headers = dict(headers or {})
    if isinstance(body, (dict, list)):
        headers.setdefault("Content-Type", "application/json;charset=utf-8")
        body = json.dumps(body)
    data = body.encode("utf-8") if isinstance(body, str) else (body or b"")
    if data or method == "POST":
        headers.setdefault("Content-Length", str(len(data)))
    headers.setdefault("Host", "%s:%d" % address)
    headers.setdefault("Connection", "close")
    head = "%s %s HTTP/1.1\r\n" % (method, path) + "".join("%s: %s\r\n" % pair for pair in headers.items()) + "\r\n"
    return raw(address, head.encode("latin-1") + data, timeout)


# ---- the world -------------------------------------------------------------------------------------------------------

class World:
    """Everything that one test starts, in one folder; `close` ends it and returns what should not have been there."""

    def __init__(self, python: str = PYTHON, warnings: bool = True) -> None:
        self.root = tempfile.mkdtemp(prefix="dfly-")
        self.logs = os.path.join(self.root, "logs")
        self.tmp = os.path.join(self.root, "tmp")     # TMPDIR of all processes; must be empty at the end
        for folder in (self.logs, self.tmp, os.path.join(self.root, "user")):
            os.mkdir(folder)
        self.python = python
        self.mark = uuid.uuid4().hex
        self.commands: List[Command] = []
        self.hosts: List[Host] = []
        self.origins: List[Origin] = []
        self.supernodes: List[Supernode] = []
        self.env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("PYTHON")}
        self.env.update({MARK: self.mark, "TMPDIR": self.tmp, "HOME": os.path.join(self.root, "user"), "LC_ALL": "C.UTF-8",
                         "PYTHONDONTWRITEBYTECODE": "1"})
        if warnings:
            self.env.update(PYTHONDEVMODE="1", PYTHONWARNINGS="error")
        self._threads = set(threading.enumerate())

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        complaints = self.close()
        if complaints and kind is None:
            raise AssertionError("\n".join(complaints))

    def dfly(self, *args: str) -> List[str]:
        """The command line of dfly.py on the interpreter under test."""
        return [self.python, DFLY] + list(args)

    def run(self, *args: str, timeout: float = 60.0, env: Optional[dict] = None, cwd: Optional[str] = None) -> Outcome:
        """Run any dfly.py command to its end."""
        return Command(self, args[0].strip("-") if args else "dfly", self.dfly(*args), env=env, cwd=cwd).wait(timeout)

    def origin(self, host: str = "127.0.0.1", tls: bool = False) -> Origin:
        """A new origin; with tls its certificate is `<root>/station.pem`."""
        origin = Origin(host, make_certificate(self.root) if tls else None)
        self.origins.append(origin)
        return origin

    def supernode(self, *flags: str, home: Optional[str] = None, ip: str = "127.0.0.1",
                  ports: Tuple[int, int] = (0, 0)) -> Supernode:
        """Start a supernode and wait until it listens."""
        home = home or os.path.join(self.root, "sn%d" % len(self.supernodes))
        node = Supernode(self, flags, home, ip, ports)
        self.supernodes.append(node)
        return node

    def host(self, name: Optional[str] = None) -> Host:
        host = Host(self, name or "host%d" % len(self.hosts))
        self.hosts.append(host)
        return host

    def node(self) -> str:
        """The address of the newest supernode, or one where nobody listens."""
        return self.supernodes[-1].node if self.supernodes else "127.0.0.1:%d" % dead_port()

    def close(self) -> List[str]:
        """End all processes and threads, remove all files; return complaints about what did not end by itself."""
        complaints: List[str] = []
        try:
            for command in self.commands:
                if not isinstance(command, (Supernode, Daemon)):
                    command.kill()
            self._stop_all([command for command in self.commands if isinstance(command, Daemon)], complaints)
            self._stop_uploaders(complaints)
            self._stop_all(self.supernodes, complaints)
            for origin in self.origins:
                origin.close()
            complaints += self._left_behind()
        finally:
            for pid in marked(self.mark):
                send(pid, signal.SIGKILL)
            wait_for(lambda: not marked(self.mark), 10, "the end of all processes")
            shutil.rmtree(self.root, ignore_errors=True)
        return complaints

    @staticmethod
    def _stop_all(commands: Sequence[Command], complaints: List[str]) -> None:
        for command in commands:
            try:
                command.stop()
            except AssertionError as error:
                complaints.append(str(error))

    def _stop_uploaders(self, complaints: List[str]) -> None:
        pids = [pid for pid in (host.uploader_pid() for host in self.hosts) if pid]
        for pid in pids:
            send(pid, signal.SIGTERM)
        for pid in pids:
            try:
                wait_for(lambda: not alive(pid), 10)
            except AssertionError:
                complaints.append("an uploader did not end within 10 s of SIGTERM")

    def _left_behind(self) -> List[str]:
        end = time.monotonic() + 5
        while marked(self.mark) and time.monotonic() < end:  # one that was told to end may still be saying good-bye
            time.sleep(0.01)
        complaints = ["process left behind: %d %s" % item for item in marked(self.mark).items()]
        complaints += ["file left behind in TMPDIR: " + name for name in os.listdir(self.tmp)]
        for command in self.commands:
            complaints += trouble(command.output(), "what %s printed" % command.label)
        for text, where in self._logs():
            complaints += trouble(text, where)
        end = time.monotonic() + 5
        while set(threading.enumerate()) - self._threads and time.monotonic() < end:
            time.sleep(0.01)
        complaints += ["thread left behind: " + t.name for t in set(threading.enumerate()) - self._threads]
        return complaints

    def _logs(self) -> List[Tuple[str, str]]:
        """The log files that the programs wrote under their homes."""
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.endswith(".log"):
                    path = os.path.join(folder, name)
                    with open(path, "rb") as f:
                        found.append((f.read().decode("utf-8", "replace"), os.path.relpath(path, self.root)))
        return found

    def report(self) -> str:
        """What every command said, for a failed test."""
        parts = []
        for command in self.commands:
            parts.append("----- %s (exit %s): %s" % (command.label, command.proc.poll(), " ".join(command.proc.args)))  # type: ignore
            parts.append(tail(command.output()))
        for text, where in self._logs():
            parts += ["----- " + where, tail(text)]
        for origin in self.origins:
            parts += ["----- origin"] + [repr(r) for r in origin.log[-40:]]
        return "\n".join(parts)
