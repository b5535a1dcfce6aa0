#!/usr/bin/env python3
"""dfly: one big file, or one container image, onto a thousand hosts in the time it takes to get it onto one.

A drop-in for Alibaba's Dragonfly 0.2 - 1.0, on the wire and on the command line, in one file that needs
nothing but a Python 3.6 or later: copy it to a host and run it.

    dfly.py supernode      tracker, scheduler and passive CDN                 ports 8002 (API) and 8001 (pieces)
    dfly.py get -u URL     the wget-like client
    dfly.py peer           the host's uploader; `get` starts it by itself     ports 15000 - 65000
    dfly.py daemon         registry mirror and proxy for docker and its kin   port 65001
    dfly.py config         which supernodes there are, and which are near     port 8004
    dfly.py status         what the daemon of this host is doing
    dfly.py preheat WHAT   have a file or an image on the supernodes before anybody asks
    dfly.py demo           an origin, a supernode and four peers on loopback, to see it work
    (a link named dfget, supernode or dfdaemon makes the file act as that program)

The map:
     1. Wire words          codes, header names, defaults, the error tree
     2. Units and files     sizes, rates, durations; atomic writes, locks, log lines
     3. Settings            /etc/dragonfly.conf under the flags; the list of supernodes
     4. Pieces              layout arithmetic, the 4+1 byte wrapper, digests
     5. Rates               limits, what a link does, and where compression pays
     6. HTTP messages       requests and answers, and what a handler may decide
     7. HTTP server         event-driven: parks what waits, sends files as they lie
     8. HTTP client         kept-alive connections that read into a buffer
     9. Store               a task's bytes on disk and the journal that says which of them are true
    10. Origin              everything that is asked of the source station, for ourselves and for others
    11. Filling             a file from its origin into the store
    12. Scheduler's books   which piece is where, and how rare
    13. Scheduler           who fetches which piece from whom; pure
    14. Cache rules         how long what an origin said holds, and which files have to go
    15. CDN                 from origin to seed pieces: one fetch a task
    16. Swarm               tasks and their clients over scheduler and CDN
    17. Preheat             files and images brought into the cache before anybody asks
    18. Supernode           the API, old and native
    19. Uploader            a host's piece server
    20. Fetching            pieces from peers
    21. Lines               orders from a supernode, and reports to it
    22. Downloader          get: from supernode and peers, or back to source
    23. Siblings            a supernode as a client of others
    24. Daemon's door       where container engines knock
    25. Blobs               files on their way through the daemon
    26. Daemon              registry mirror and proxy: blobs by the swarm, the rest straight
    27. Engines             the settings of docker, containerd and podman that point at the daemon
    28. Config Service      which supernodes there are and how they do; clients ask it for the nearest
    29. Demo                the main job on one machine, to see it work
    30. Flags               of each command, over the configuration files
    31. Programs            what each command does; main

One piece's way: the supernode reads it from the origin once (11), writes it at its offset, knows its digest and
announces it (16).  The scheduler gives it to a peer that lacks it, from the nearest holder with a free upload slot (13);
the order travels in the answer of a parked /peer/sync (18).  A fetcher thread of `get` (20) asks the holder for it on a
kept-alive connection (8); the holder's event loop sends head, file bytes by sendfile and tail (7, 19).  The
fetcher moves it from the socket into its place in the file, through a pipe of the kernel's where it can, else through one
reused buffer, and digests what the file then has, together with other pieces that have just come (4); it journals it (9) and
reports it in the one request that also asks for more work (21).  From then on it is served on from the same file, which becomes
the output by a rename when every piece has been found true (22).

Sections use only what stands above them.  "Wire: N.N" names the section of the Dragonfly protocol description
that a piece of code implements.
"""
import collections
import errno
import fcntl
import functools
import hashlib
import heapq
import io
import json
import os
import queue
import random
import re
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

VERSION = "0.1.0"


# ==============================================================================
# 1. Wire words
#    What both ends of a connection must spell alike: codes, states, header names,
#    ports, and the errors with the code and the exit status each one becomes.
#    No logic.
# ==============================================================================

#: Secret both generations mix into a task id.  Wire: 2.1
TASK_KEY = bytes.fromhex("3e492470672d7e41537e7350277271755f604f68266c7a23395d223d3b6e4525")

SUPERNODE_PORT = 8002
PIECE_PORT = 8001
#: A peer's port is 15000 plus a number that changes every five minutes.  Wire: 7.1
PEER_PORTS = (15000, 65000)

# Codes inside an answer's JSON.  Wire: 1.4
SUCCESS, NOT_FOUND, SYSTEM_ERROR, PARAM_ERROR, UNKNOWN_TARGET = 200, 404, 500, 501, 502
FINISH, CONTINUE, WAIT, LIMITED, SUPER_FAIL, UNKNOWN_STATE = 600, 601, 602, 603, 604, 605
URL_UNREACHABLE, NEED_AUTH, WAIT_AUTH, SOURCE_ERROR = 607, 608, 609, 610
PIECE_REPORTED, SERVICE_DOWN = 611, 612

# `status` and `result` of a pull.  Wire: 3.1
STARTED, RUNNING, FINISHED = 700, 701, 702
FAILED, SUCCEEDED, INVALID, SEMI_SUCCEEDED = 500, 501, 502, 503

# Why a download left the swarm.  Wire: 8.4
REASON_NONE, REASON_REGISTER, REASON_MD5, REASON_DOWNLOAD, REASON_NO_SPACE = 0, 1, 2, 3, 4
REASON_INIT, REASON_WRITE, REASON_HOST, REASON_NO_NODE = 5, 6, 7, 8
REASON_SOURCE, REASON_USER = 10, 100
REASON_NO_SOURCE = 1000  # added when the origin was not allowed

#: The header by which our programs know each other; an old party ignores it, and without it we say nothing new.
#: Requests carry "1 <site/rack>", those for pieces "1 rate=<bytes/s>" where a deflated answer may pay (they accept that encoding, too);
#: a supernode's piece answers carry "sha256:<hex>" of the plain piece.
DFLY_HEADER = "x-dfly"

#: By this a supernode that registers with another says so, and as which version it knows the file ("" where it does not).
SIBLING_HEADER = "x-dfly-sibling"

#: Largest body that is read at all, in bytes: a sync with 700 reports is 40 KB, a register with CAs 200 KB.
MAX_BODY = 1 << 20
#: Largest request or answer head, in bytes (nginx allows 32 KB in all).
MAX_HEAD = 32 << 10


class DflyError(Exception):
    """Something went wrong that has a name.  `code` is what it becomes on the wire, `exit` the status of
    `dfly.py get`, `old_exit` that of `dfget` (Wire: 8.5), `reason` the number in dfget's last line, `pause_s` how long
    to wait before the origin is asked instead."""

    code = SYSTEM_ERROR
    http = 500
    exit = 1
    old_exit = 80
    reason = REASON_DOWNLOAD
    pause_s = 0.0


class BadUsage(DflyError):
    """The command line or the configuration can't be understood."""
    exit, old_exit, reason = 2, 1, REASON_INIT


class BadRequest(DflyError):
    """A peer sent something that can't be understood."""
    code, http = PARAM_ERROR, 400


class NoSuchTask(DflyError):
    """The supernode does not (or no longer) know this task or client."""
    code, http = UNKNOWN_TARGET, 404


class NoSuchPiece(DflyError):
    """The file ends before this piece, or the piece is not here yet."""
    code, http = PARAM_ERROR, 416


class CannotWrite(DflyError):
    """The output, the work folder or the cache can't be written."""
    exit, old_exit, reason = 3, 77, REASON_WRITE


class CannotPrepare(CannotWrite):
    """What a download needs before its first byte can't be written."""


class CannotRead(CannotWrite):
    """A file of ours can't be read back."""


class NetworkError(DflyError):
    """A connection could not be made, broke, or carried something that is not HTTP."""
    exit, reason = 4, REASON_REGISTER
    why = "refused"  # how a piece failed, in the scheduler's words


class TimedOut(NetworkError):
    """Nothing came for as long as we were willing to wait."""
    why = "stalled"


class HungUp(NetworkError):
    """Somebody took our connection, and ended it before he had answered."""


class TlsError(DflyError):
    """The other side's certificate is not trusted, or TLS could not be agreed on."""
    exit, reason, code = 5, REASON_SOURCE, URL_UNREACHABLE


class SourceError(DflyError):
    """The origin answered, but not with the file.  `status` is its HTTP status (0: it did not answer), `retry_s` how many
    seconds it wants to be left alone (None: it did not say)."""
    exit, reason, code = 8, REASON_SOURCE, URL_UNREACHABLE

    def __init__(self, message: str, status: int = 0, retry_s: Optional[float] = None) -> None:
        super().__init__(message)
        self.status, self.retry_s = status, retry_s


class NeedAuth(SourceError):
    """The origin wants credentials that were not given, or not these."""
    exit, old_exit, code = 6, 79, NEED_AUTH
    challenge = ""  # its WWW-Authenticate


class SourceChanged(SourceError):
    """The origin's file is no longer the one whose first pieces we hold."""


class WrongBytes(DflyError):
    """Bytes arrived, or lie on disk, that do not have the digest they must have."""
    exit, reason = 9, REASON_MD5
    why = "digest"

    def __init__(self, what: str, expected: str, got: str) -> None:
        super().__init__("%s: digest is %s, expected %s" % (what, got, expected))


class NoSpace(DflyError):
    """The disk is full, or will be.  Sizes in bytes."""
    exit, reason = 10, REASON_NO_SPACE

    def __init__(self, path: str, need: int = 0, free: int = 0) -> None:
        if need:
            super().__init__("no space on %s: %.1f MB needed, %.1f MB free" % (path, need / 2.0 ** 20, free / 2.0 ** 20))
        else:
            super().__init__("no space left on %s" % path)


class Stalled(DflyError):
    """The download made no progress, or not enough of it, within its time."""
    exit = 11


class NoMd5(DflyError):
    """This Python refuses MD5, which the old wire and --md5 can't do without."""
    exit, reason = 1, REASON_INIT


# ==============================================================================
# 2. Units and files
#    Sizes, rates and durations as people write them; files that are either whole or
#    absent; locks between processes; log lines.
# ==============================================================================

_SIZE = re.compile(r"^([0-9]{1,15})(?:([kmgt])(?:i?b)?|b)?$", re.I)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)", re.I)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """Return a size or a rate in bytes (per second): `20M`, `64KB`, `1g`, `500`, 1024-based.  Wire: 8.2"""
    match = _SIZE.match(text.strip())
    if not match:
        raise BadUsage("not a size: %r (write 500, 64K, 20M or 2G)" % text)
    return int(match.group(1)) << 10 * " kmgt".index((match.group(2) or " ").lower())


def parse_duration(text: str) -> float:
    """Return seconds: `30` (dfget 0.2) as well as `30s`, `3m0s`, `1h30m`, `500ms` (dfget 1.0).  Wire: 8.2"""
    text = text.strip()
    if re.match(r"^[0-9]+(\.[0-9]+)?$", text):
        return float(text)
    if not text or _DURATION.sub("", text):
        raise BadUsage("not a duration: %r (write 30, 30s, 3m or 1h30m)" % text)
    return sum(float(number) * _SECONDS[unit.lower()] for number, unit in _DURATION.findall(text))


def show_size(count: float) -> str:
    """Return a size in bytes as a person reads it: `4.2 GB` (1024-based, as the flags are)."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return "%d B" % count if unit == "B" else "%.*f %s" % (1 if count < 100 else 0, count, unit)
        count /= 1024.0
    return ""


def show_time(seconds: float) -> str:
    """Return a duration in seconds as a person reads it: `1.3 s`, `4m05s`."""
    if seconds < 60:
        return "%.1f s" % seconds
    return "%dm%02ds" % divmod(int(seconds), 60) if seconds < 3600 else "%dh%02dm" % divmod(int(seconds) // 60, 60)


_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_SIGNATURE = re.compile(r"([?&][^=&\s]*(?:sig|token|passw|secret|credential|accesskey|apikey|auth)[^=&\s]*=)[^&#\s\"']+", re.I)


def without_secrets(text: str) -> str:
    """Return a text in whose URLs users, passwords and signatures are stars: what is kept on disk has none."""
    return _SIGNATURE.sub(r"\1***", _USER.sub("***@", text)) if "://" in text else text


def os_error(error: OSError, path: str) -> DflyError:
    """Return the named error that an OSError about `path` is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(path)
    return CannotWrite("%s: %s" % (path, error.strerror or error))


def free_bytes(folder: str) -> int:
    """Return how many bytes an ordinary user may still write below `folder`."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


TMPFS_MAGIC = 0x01021994  # f_type of a file system in memory


def reserve_bytes(fd: int, size: int) -> bool:
    """Have the file system keep room for a file of so many bytes, as long as it seems now; return whether it has.  Raises OSError.

    By the system's own call: posix_fallocate writes into every block where the file system has nothing of the kind.  Not in
    memory: there each page would be cleared first, 0.3 s for a GB before its first byte is asked for.
    """
    import ctypes
    libc, about = ctypes.CDLL(None, use_errno=True), (ctypes.c_long * 64)()  # of a struct statfs; the first field is its type
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if not call or not size or libc.fstatfs(fd, about) or about[0] == TMPFS_MAGIC:
        return False
    if call(fd, 1, ctypes.c_longlong(0), ctypes.c_longlong(size)) == 0:  # FALLOC_FL_KEEP_SIZE
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        raise OSError(number, os.strerror(number))
    return False


def make_folder(path: str, mode: int = 0o755) -> str:
    """Make a folder and its parents where missing; return its path.  Raises CannotWrite."""
    try:
        os.makedirs(path, mode, exist_ok=True)
    except OSError as error:
        raise os_error(error, path)
    return path


def remove(path: str) -> None:
    """Remove a file that may already be gone."""
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise os_error(error, path)


def copy_to_disk(source: str, target: str) -> None:
    """Copy a file and its times, and see it written; what of it stays in the page cache is the source's.  Raises OSError."""
    with open(source, "rb") as old, open(target, "wb") as new:
        at, stat = 0, os.fstat(old.fileno())
        while at < stat.st_size:
            count = os.sendfile(new.fileno(), old.fileno(), at, 1 << 24)
            if not count:
                raise OSError(errno.EIO, "the file became shorter")
            at += count
        os.fdatasync(new.fileno())
        os.posix_fadvise(new.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.utime(new.fileno(), ns=(stat.st_atime_ns, stat.st_mtime_ns))


def open_owned(path: str, flags: int) -> int:
    """Open a file that this process alone may write, and return the descriptor; the lock ends with that.

    A file that lost its name between our opening and our locking it is left to its owner, and the next one of that name
    is tried.  Raises BlockingIOError while another process owns it, OSError.
    """
    for _ in range(100):
        fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(fd)
            raise BlockingIOError(errno.EAGAIN, "locked") if error.errno == errno.EACCES else error  # NFS says it so
        os.close(fd)
    raise BlockingIOError(errno.EAGAIN, "replaced again and again")


class FileLock:
    """An advisory lock between processes; ends with the process, however that ends."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1  # of the file, while the lock is ours

    def acquire(self, limit_s: float = 0.0) -> bool:
        """Try for at most `limit_s` seconds; return whether the lock is ours.  Raises CannotWrite."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self.fd = open_owned(self.path, os.O_RDWR | os.O_CREAT)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.02)  # flock has no wait with a limit
            except OSError as error:
                raise os_error(error, self.path)

    def release(self) -> None:
        """Give the lock up; harmless without it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


WRITE_S = 10.0  # how long to wait for another process that writes the same small file


def write_whole(path: str, data: bytes, private: bool = False) -> None:
    """Write a small file so that a reader sees the old one or the new one and never a part.  Raises NoSpace, CannotWrite.

    All writers of `path` use one temporary file, locked: what a killed one leaves is taken up by the next.  A `private` file
    is for its owner only.
    """
    temporary = FileLock(path + ".tmp")
    if not temporary.acquire(WRITE_S):
        raise CannotWrite("%s: another process is writing it" % path)
    try:
        os.ftruncate(temporary.fd, 0)
        if private:
            os.fchmod(temporary.fd, 0o600)
        with open(temporary.fd, "wb", closefd=False) as file:
            file.write(data)
        os.rename(temporary.path, path)
    except OSError as error:
        remove(temporary.path)
        raise os_error(error, path)
    finally:
        temporary.release()


class Metrics:
    """The numbers of this process, for Prometheus: a counter ends in _total, what has a sum and a count is a summary, the rest is as
    large as it is now.  _lock guards _counts."""

    HELP = collections.OrderedDict((
        ("dfly_requests_total", "Requests by call."),
        ("dfly_tasks", "Tasks in memory."),
        ("dfly_peers", "Clients of these tasks."),
        ("dfly_tasks_ended_total", "Fetches from origins that have ended, by result."),
        ("dfly_cache_total", "Tasks begun, by what the cache had: hit, part or miss."),
        ("dfly_cache_checks_total", "Questions to origins whether a cached file is still theirs, by result."),
        ("dfly_fetches", "Fetches from origins under way."),
        ("dfly_fetches_waiting", "Fetches that wait for their turn."),
        ("dfly_origin_bytes_total", "Bytes read from origins."),
        ("dfly_sibling_bytes_total", "Bytes that other supernodes and their clients have sent instead."),
        ("dfly_sent_bytes_total", "Bytes of files sent to others."),
        ("dfly_saved_bytes_total", "Bytes that did not have to be sent, since pieces went compressed."),
        ("dfly_received_bytes_total", "Bytes that clients say they have got, by source."),
        ("dfly_received_pieces_total", "Pieces that clients say they have got, by source."),
        ("dfly_piece_failures_total", "Pieces that clients say they could not get, by why."),
        ("dfly_isolations_total", "Holders left out for a while because of wrong bytes."),
        ("dfly_scheduler_seconds", "Time to take in a client's reports and choose its next pieces."),
        ("dfly_gc_files_total", "Files removed from the cache, by why."),
        ("dfly_gc_bytes_total", "Bytes removed from the cache, by why."),
        ("dfly_disk_free_bytes", "Free space where the cache is."),
        ("dfly_disk_errors_total", "Fetches that the disk has ended, by why."),
        ("dfly_memory_bytes", "Bytes of cached files that lie in memory."),
        ("dfly_memory_moved_bytes_total", "Bytes of files that have moved from there to the disk."),
        ("dfly_preheats_total", "Preheats that have ended, by result."),
        ("dfly_daemon_blobs_total", "Blobs served from the swarm."),
        ("dfly_daemon_blob_bytes_total", "Bytes of these."),
        ("dfly_daemon_fallbacks_total", "Blobs, or rests of blobs, that came straight from their origin instead."),
        ("dfly_daemon_relayed_total", "Other requests passed on."),
        ("dfly_daemon_tunnels_total", "Tunnels passed through."),
        ("dfly_daemon_opened_total", "Tunnels opened with our CA."),
        ("dfly_daemon_downloads", "Blobs under way."),
        ("dfly_daemon_kept_blobs", "Blobs that are here."),
        ("dfly_daemon_received_bytes_total", "Bytes of blobs received, by source."),
        ("dfly_uploader_tasks", "Files that this host offers."),
        ("dfly_config_supernode_up", "Whether a supernode is heard of regularly."),
        ("dfly_config_supernode_load", "What a supernode says of its load."),
    ))

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = collections.defaultdict(float)  # type: Dict[Tuple[str, Tuple[Tuple[str, str], ...]], float]

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Count."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += value

    def observe(self, name: str, seconds: float) -> None:
        """Count something that took so long."""
        with self._lock:
            self._counts[name + "_sum", ()] += seconds
            self._counts[name + "_count", ()] += 1

    def text(self, *now: Any, calls: Optional[Dict[str, int]] = None) -> str:
        """Return all in Prometheus' text form, with what is so `now`, as (name, value) or (name, value, labels), and requests by call."""
        with self._lock:
            found = dict(self._counts)
        for name, value, *labels in now:
            found[name, tuple(sorted(labels[0].items()) if labels else ())] = value
        found.update({("dfly_requests_total", (("call", call),)): count for call, count in (calls or {}).items()})
        lines = []
        for name, about in self.HELP.items():
            rows = [(key, labels, value) for (key, labels), value in sorted(found.items()) if key in (name, name + "_sum", name + "_count")]
            if rows:
                kind = "summary" if rows[0][0] != name else "counter" if name.endswith("_total") else "gauge"
                lines += ["# HELP %s %s" % (name, about), "# TYPE %s %s" % (name, kind)]
            for key, labels, value in rows:
                shown = ",".join('%s="%s"' % (label, text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for label, text in labels)
                lines.append("%s%s %s" % (key, "{%s}" % shown if shown else "", "%d" % value if value == int(value) else "%.6f" % value))
        return "\n".join(lines) + "\n"


METRICS = Metrics()


class Log:
    """A log file in the form of dfget 1.0, rotated once at 40 MB.  _lock guards _fd and _size.  Wire: 8.6"""

    LIMIT = 40 << 20

    def __init__(self, path: str = "", sign: str = "", verbose: bool = False, console: bool = False) -> None:
        self.path = path  # "" keeps nothing
        self.sign = sign  # which process, or which download, says it
        self.verbose = verbose  # whether debug lines are kept
        self.console = console  # whether lines go to standard error as well
        self._lock = threading.Lock()
        self._fd = -1
        self._size = 0

    def debug(self, message: str, *args: Any) -> None:
        """Keep a line that only matters when something is being looked for."""
        if self.verbose:
            self._write("DEBU", message, args)

    def info(self, message: str, *args: Any) -> None:
        """Keep a line about the ordinary course of things."""
        self._write("INFO", message, args)

    def warn(self, message: str, *args: Any) -> None:
        """Keep a line about something that went wrong and was dealt with."""
        self._write("WARN", message, args)

    def error(self, message: str, *args: Any) -> None:
        """Keep a line about something that went wrong and ended something."""
        self._write("ERRO", message, args)

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _write(self, level: str, message: str, args: Tuple[Any, ...]) -> None:
        now = time.time()
        text = without_secrets(message % args if args else message).replace("\n", "\\n").replace("\r", "\\r")
        line = "%s.%03d %s sign:%s : %s\n" % (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)), now % 1 * 1000, level, self.sign, text)
        data = line.encode("utf-8", "replace")
        if self.console:
            sys.stderr.write(line)
        if not self.path:
            return
        with self._lock:
            try:
                self._append_locked(data)
            except OSError:  # a full disk must not end a download that needs none of it
                pass

    def _append_locked(self, data: bytes) -> None:
        if self._fd < 0:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = os.fstat(self._fd).st_size
        os.write(self._fd, data)
        self._size += len(data)
        if self._size > self.LIMIT:
            os.close(self._fd)
            self._fd = -1
            os.replace(self.path, self.path + ".1")


# ==============================================================================
# 3. Settings
#    /etc/dragonfly.conf under the flags, and the list of supernodes.  A section of
#    the file is named after a command and holds its long flags, so that there is one
#    list of settings and one way to read each.
# ==============================================================================

CONFIG = "/etc/dragonfly.conf"


class Node(NamedTuple):
    """A supernode: where it is, how large a share of its group's URLs it gets, and how many groups are nearer."""

    host: str
    port: int
    weight: int = 1
    group: int = 0

    def __str__(self) -> str:
        return join_host(self.host, self.port)


def is_address(text: str) -> bool:
    """Return whether this is an IP address, perhaps with a zone (`fe80::1%eth0`)."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text.partition("%")[0])
            return True
        except OSError:
            continue
    return False


def parse_address(text: str) -> str:
    """Return an IP address as it is written, "" for "".  Raises BadUsage."""
    if text and not is_address(text):
        raise BadUsage("not an IP address: %r" % text)
    return text


def split_host(text: str, port: int) -> Tuple[str, int]:
    """Return (host, port) of `host`, `host:port`, `::1`, `[::1]` or `[::1]:port`.  Raises BadUsage."""
    match = re.match(r"^\[([0-9a-fA-F:.%\w]+)\](?::(\d+))?$", text) or re.match(r"^([^:\[\]/\s]+)(?::(\d+))?$", text)
    if match:
        host, given = match.group(1), int(match.group(2) or port)
    elif text.count(":") > 1 and re.match(r"^[0-9a-fA-F:.]+(%\w+)?$", text):
        host, given = text, port
    else:
        host, given = "", port
    if not host or (":" in host and not is_address(host)):
        raise BadUsage("not a host: %r (write host, host:port or [ipv6]:port)" % text)
    if not 0 < given < 65536:
        raise BadUsage("not a port: %d in %r" % (given, text))
    return host, given


def join_host(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 address in brackets."""
    return "%s:%d" % ("[%s]" % host if ":" in host else host, port)


def parse_nodes(text: str) -> List[Node]:
    """Return the supernodes of `host[:port][=weight],…`.  Raises BadUsage.  Wire: 9"""
    nodes = []
    for entry in filter(None, re.split(r"[,\s]+", text)):
        where, _, weight = entry.partition("=")
        if weight and not re.match(r"^[1-9]\d{0,3}$", weight):
            raise BadUsage("not a weight: %r in %r (1 to 9999)" % (weight, entry))
        nodes.append(Node(*split_host(where, SUPERNODE_PORT), weight=int(weight or 1)))
    return nodes


class HostList:
    """Hosts as a setting names them: `10.0.0.0/8`, `10.0.0.1`, `files.example.com`, or `.example.com` for all names below."""

    def __init__(self, text: str) -> None:
        import ipaddress
        self.networks = []  # type: List[Any]
        self.names = []  # type: List[str]
        for entry in filter(None, re.split(r"[,\s]+", text)):
            if re.match(r"^[\d.]+(/\d+)?$|^[^/]*:", entry):
                try:
                    self.networks.append(ipaddress.ip_network(entry, strict=False))
                except ValueError:
                    raise BadUsage("not a network: %r" % entry)
            elif re.match(r"^\.?[\w-]+(\.[\w-]+)*\.?$", entry):
                self.names.append(entry.lower().rstrip("."))
            else:
                raise BadUsage("not a host: %r (write 10.0.0.0/8, host.example.com or .example.com)" % entry)

    def __bool__(self) -> bool:
        return bool(self.networks or self.names)

    def has_name(self, name: str) -> bool:
        """Return whether a host of this name is meant, as far as names say."""
        name = name.lower().rstrip(".")
        return any(name.endswith(entry) if entry.startswith(".") else name == entry for entry in self.names)

    def has_address(self, text: str) -> bool:
        """Return whether an IP address lies in one of the networks."""
        import ipaddress
        address = ipaddress.ip_address(text.split("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.networks)


def order_nodes(nodes: List[Node], task: str) -> List[Node]:
    """Return the supernodes in the order in which `task` shall try them, each once.

    The nearest group comes first.  In each, highest random weight: every client finds the same order for the same task, the
    shares follow the weights, and when a node goes only its own tasks move.
    """
    import math

    def score(node: Node) -> float:
        digest = hashlib.sha256(("%s %s" % (node, task)).encode()).digest()
        return -node.weight / math.log((int.from_bytes(digest[:8], "big") + 1) / 2.0 ** 64 * (1 - 1e-12))

    return sorted(dict.fromkeys(nodes), key=lambda node: (node.group, -score(node)))


def read_config(path: str, must_exist: bool) -> Dict[str, Dict[str, str]]:
    """Return {section: {key: text}} of an INI file; {} where there is none.  Raises BadUsage.

    A key is a long flag of the command its section is named after; `[node] address` is read as dfget 0.2 wrote it.
    """
    import configparser
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#", ";"))
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except FileNotFoundError:
        if must_exist:
            raise BadUsage("%s: no such file" % path)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise BadUsage("%s: %s" % (path, " ".join(str(error).split())))
    return {name.lower(): {key.replace("_", "-"): value for key, value in parser.items(name)} for name in parser.sections()}


class YamlFile:
    """As much of YAML as dfdaemon.yml needs: maps, lists and scalars, by indentation; lists of scalars also in brackets.

    `data` has what the file says: truth values as such, everything else as text.  Wire: 11.3
    """

    _KEY = re.compile(r"^(\"[^\"]*\"|'[^']*'|[^\s\"'\[{#&*!|>%@`-][^:#]*?|-[^\s:]+)\s*:(?:\s+(.*))?$")
    _COMMENT = re.compile(r"^((?:[^\"'#]|\"(?:\\.|[^\"])*\"|'[^']*'|(?<=\S)#)*)\s#.*$")

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines = []  # type: List[Tuple[int, str]]  # how far indented, and what
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    text = self._COMMENT.sub(r"\1", " " + line.rstrip()).rstrip()[1:]
                    if self._lines and re.search(r"(^|[:-] +)\[[^\]]*$", self._lines[-1][1]):  # brackets may go on for lines
                        self._lines[-1] = (self._lines[-1][0], self._lines[-1][1] + " " + text.strip())
                    elif text.strip() and text.strip() != "---" and not text.lstrip().startswith("#"):
                        self._lines.append((len(text) - len(text.lstrip()), text.strip()))
        except (OSError, UnicodeDecodeError) as error:
            raise BadUsage("%s: %s" % (path, getattr(error, "strerror", None) or error))
        self._at = 0
        self.data = self._block(self._lines[0][0]) if self._lines else {}  # type: Any
        if self._at < len(self._lines) or not isinstance(self.data, dict):
            raise self._bad()

    def _bad(self) -> BadUsage:
        return BadUsage("%s: can't read %r" % (self._path, self._lines[min(self._at, len(self._lines) - 1)][1]))

    def _block(self, indent: int) -> Any:
        """Return the map or the list that begins at this line."""
        found = {}  # type: Dict[str, Any]
        items = []  # type: List[Any]
        while self._at < len(self._lines) and self._lines[self._at][0] == indent:
            text = self._lines[self._at][1]
            if re.match(r"^-(\s|$)", text):
                items.append(self._item(indent, text))
                continue
            match = self._KEY.match(text)
            if not match or items:
                break
            self._at += 1
            found[self._scalar(match.group(1))] = self._scalar(match.group(2)) if match.group(2) else self._below(indent)
        if items and found:
            raise self._bad()
        return items or found

    def _item(self, indent: int, text: str) -> Any:
        rest = text[1:].strip()
        if self._KEY.match(rest):  # a map that begins on the dash's line
            inner = indent + len(text) - len(rest)
            self._lines[self._at] = (inner, rest)
            return self._block(inner)
        self._at += 1
        return self._scalar(rest) if rest else self._below(indent)

    def _below(self, indent: int) -> Any:
        """Return what stands, further in or as a list, under a key or a dash; "" when nothing does."""
        if self._at < len(self._lines):
            inner, text = self._lines[self._at]
            if inner > indent or (inner == indent and text.startswith("- ") and not self._lines[self._at - 1][1].startswith("-")):
                return self._block(inner)
        return ""

    def _scalar(self, text: str) -> Any:
        if text[:1] == "[" and text[-1:] == "]":
            return [self._scalar(item) for item in re.findall(r"\"(?:\\.|[^\"])*\"|'[^']*'|[^,\s\[\]][^,\[\]]*", text[1:-1])]
        if text[:1] == '"' and text[-1:] == '"' and len(text) > 1:
            return re.sub(r"\\(.)", r"\1", text[1:-1])
        if text[:1] == "'" and text[-1:] == "'" and len(text) > 1:
            return text[1:-1].replace("''", "'")
        if text == "{}":
            return {}
        if text[:1] in ("{", "|", ">", "&", "*", "!", "[", '"', "'"):
            raise BadUsage("%s: can't read %r" % (self._path, text))
        text = text.strip()
        return text == "true" if text in ("true", "false") else "" if text in ("null", "~") else text


# ==============================================================================
# 4. Pieces
#    A file is cut into pieces; on the wire each wears a 4-byte head and a 1-byte
#    tail.  Offsets here are either plain (in the file) or wrapped (as all peers of
#    Dragonfly count).  Also: digests, and sets of piece numbers as bit masks.
# ==============================================================================

WRAP = 5  # bytes of head and tail
TAIL = b"\x7f"
MIB = 1 << 20
#: What the largest head can say.  Wire: 5.1
MAX_PIECE = 15 * MIB
#: No file has more pieces than this: 100,000 pieces of 15 MiB are 1.5 TB, and their masks stay small.
MAX_COUNT = 1 << 17

def nums_of(mask: int) -> List[int]:
    """Return the piece numbers in a bit mask, lowest first."""
    return [num for num, bit in enumerate(reversed(bin(mask))) if bit == "1"] if mask > 0 else []


def splice_all(sock: socket.socket, pipe: Tuple[int, int], fd: int, offset: int, count: int, heap: int, behind: int) -> Tuple[int, int, int, int]:
    """Move `count` bytes, as far as they come within a second or so, from a blocking socket by a pipe into a file, from `offset` on.

    With a `heap` we are woken only for so many bytes; at least `behind` more will follow.  Returns how many left the socket and how
    many are in the file (the rest is in the pipe), and the errno that ended it at the socket and at the file, 0 for none.
    """
    got = put = lowat = 0
    end_s = time.monotonic() + SPLICE_S
    while got < count:
        try:
            if heap and lowat != min(heap, count - got + behind):
                lowat = min(heap, count - got + behind)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowat)
            moved = os.splice(sock.fileno(), pipe[1], count - got, flags=os.SPLICE_F_NONBLOCK)  # type: ignore[attr-defined]  # as to the pipe
            fault = 0 if moved else -1
        except OSError as error:
            moved, fault = 0, 0 if error.errno == errno.EAGAIN and put < got else error.errno or errno.EIO  # a pipe may be full
        got, late = got + moved, time.monotonic() >= end_s
        try:
            while put < got and (fault or late or not moved or got == count or got - put >= SPLICE_BYTES):
                put += os.splice(pipe[0], fd, got - put, offset_dst=offset + put)  # type: ignore[attr-defined]
        except OSError as error:
            return got, put, 0, error.errno or errno.EIO
        if fault or late:
            return got, put, max(0, fault), 0
    return got, put, 0, 0


SPLICE_BYTES = 1 << 17  # that are in a pipe before they move on into the file
SPLICE_S = 1.0  # that one call goes on: whoever asks wants to see that something moves, and how fast
LANES = ""  # how wide the vectors of the accelerator are; "" without it
WORTH = {}  # type: Dict[str, int]  # from how many messages on it is faster than hashlib, by kind of digest
try:
    if not os.environ.get("DFLY_NO_FASTPIECE"):
        import _fastpiece as fast  # type: ignore[import-not-found]
        LANES, WORTH, digest_lanes, nums_of, splice_all = fast.LANES, fast.WORTH, fast.digest_many, fast.nums_of, fast.splice_all  # all, or none
except ModuleNotFoundError:  # not built
    pass
except Exception as error:  # noqa: BLE001 a build of another Python, or of another version of us: whatever is wrong with it, we can do without
    sys.stderr.write("dfly: _fastpiece is left out, since it is of no use here: %s\n" % " ".join(str(error).split()))


def accelerator() -> str:
    """Say whether _fastpiece is in use."""
    return "_fastpiece, " + LANES if LANES else "without _fastpiece"


def each_processor(function: Callable[[Any], Any], items: List[Any]) -> Iterator[Any]:
    """Yield function(item) of each item, in their order, with as many at work as there are processors (at most 4)."""
    workers = min(len(items), os.cpu_count() or 1, 4)
    if workers < 2:
        yield from map(function, items)
    else:
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(function, items)


def read_into(fd: int, offset: int, buffer: Any) -> int:
    """Fill a buffer with bytes of a file, as far as it goes; return the count.  Raises OSError."""
    if hasattr(os, "preadv"):  # 3.7; saves a new page for every page read
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)
    buffer[:len(data)] = data
    return len(data)


def read_fd(fd: int, offset: int, length: int) -> Iterator[Any]:
    """Yield bytes of a file, as far as it goes, some at a time; what is yielded is valid until the next turn.  Raises OSError."""
    end, buffer = offset + length, memoryview(bytearray(min(length, 1 << 18)))
    while offset < end:
        count = read_into(fd, offset, buffer[:end - offset])
        if not count:
            return
        offset += count
        yield buffer[:count]


def put_bytes(fd: int, offset: int, data: Any) -> None:
    """Write all of `data` (any buffer) into a file.  Raises OSError."""
    view = memoryview(data)
    while len(view):  # a disk that fills up takes a part first
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class Funnel:
    """Brings bytes from sockets into files, for one thread: by a pipe, where it can do that, so that they never come into this process
    (Linux; the accelerator, or Python 3.10), else through its buffer."""

    PIPE_BYTES = 1 << 19  # a user's pipes may have 64 MB in all

    def __init__(self, size: int) -> None:
        self.buffer = memoryview(bytearray(size))  # for bytes that have to be looked at, too
        self.splices = bool(LANES or hasattr(os, "splice"))  # as far as is known yet
        self._pipe = None  # type: Optional[Tuple[int, int]]  # once it is needed

    def _lay_pipe(self) -> None:
        try:
            self._pipe = os.pipe()
            fcntl.fcntl(self._pipe[1], 1031, self.PIPE_BYTES)  # F_SETPIPE_SZ; else a network's small segments fill it soon
        except OSError:  # this process has too many files, or this user too many pipes
            self.splices = self._pipe is not None

    def splice(self, sock: socket.socket, fd: int, offset: int, count: int, heap: int = 0, behind: int = 0) -> Tuple[int, int, Optional[OSError]]:
        """Bring `count` bytes, as far as they come, from a blocking socket into a file; `heap` and `behind` as in splice_all.

        Returns how many, the errno at the socket (0 for none, also at its end), and what is wrong with the file.  Who finds that it no
        longer `splices` takes the buffer.
        """
        if not self._pipe:
            self._lay_pipe()
        if not self._pipe:
            return 0, 0, None
        got, put, fault, file_fault = splice_all(sock, self._pipe, fd, offset, count, heap, behind)
        if fault in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP) and not got:  # a sandbox, say
            self.splices = False
        if not file_fault:
            return put, fault, None
        wrong = OSError(file_fault, os.strerror(file_fault))  # type: Optional[OSError]
        if file_fault == errno.EINVAL:  # a file system that takes nothing from pipes
            self.splices, wrong = False, self._rescue(fd, offset + put, got - put)
        self.close()  # there may still be bytes in it
        return put if wrong else got, fault, wrong

    def _rescue(self, fd: int, offset: int, left: int) -> Optional[OSError]:
        assert self._pipe
        try:
            while left:
                data = os.read(self._pipe[0], left)
                put_bytes(fd, offset, data)
                offset, left = offset + len(data), left - len(data)
        except OSError as error:
            return error
        return None

    def put(self, fd: int, offset: int, count: int) -> Tuple[int, Optional[OSError]]:
        """Write the first bytes of the buffer into a file; return how many it has, and what is wrong with it."""
        try:
            put_bytes(fd, offset, self.buffer[:count])
        except OSError as error:
            return 0, error
        return count, None

    def close(self) -> None:
        """Give the pipe back."""
        for fd in self._pipe or ():
            os.close(fd)
        self._pipe = None


def digest_many(kind: str, messages: List[Tuple[bytes, Any, bytes]]) -> List[bytes]:
    """Return the digests, `kind` md5 or sha256, of messages, each (head, data, tail): head and tail are at most 60 bytes together, data
    is a buffer or (fd, offset, length) of a file; b"" for one whose file ends too early.  Raises OSError."""
    if len(messages) >= WORTH.get(kind, len(messages) + 1):
        return digest_lanes(kind, messages)
    found = []
    for head, data, tail in messages:
        digest, count = new_md5() if kind == "md5" else hashlib.sha256(), 0
        digest.update(head)
        for part in read_fd(*data) if isinstance(data, tuple) else (data,):
            digest.update(part)
            count += len(part)
        digest.update(tail)
        found.append(digest.digest() if not isinstance(data, tuple) or count == data[2] else b"")
    return found


class Batcher:
    """Digests for many threads: whoever comes first takes what the others bring meanwhile along, so that it goes through the lanes
    side by side, and nobody waits for a batch to fill.  _turn guards each batch, and who leaves _waiting."""

    MOST = 16  # messages at once

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._waiting = collections.deque()  # type: collections.deque  # of [message, digest or error]

    def sha256(self, message: Tuple[bytes, Any, bytes]) -> bytes:
        """Return the SHA-256 of a message as digest_many takes it.  Raises OSError."""
        if WORTH.get("sha256") != 1:  # one by one they are as fast, and on all processors
            return digest_many("sha256", [message])[0]
        mine = [message, None]  # type: List[Any]
        self._waiting.append(mine)
        while mine[1] is None:
            with self._turn:
                if mine[1] is None:
                    self._take([self._waiting.popleft() for _ in range(min(len(self._waiting), self.MOST))])
        if isinstance(mine[1], Exception):
            raise mine[1]
        return mine[1]

    @staticmethod
    def _take(batch: List[List[Any]]) -> None:
        try:
            found = digest_many("sha256", [one[0] for one in batch])  # type: List[Any]
        except Exception as error:  # noqa: BLE001 whoever is left without an answer waits for ever
            if len(batch) == 1:
                batch[0][1] = error
                return
            for one in batch:  # which of them it was is not said
                Batcher._take([one])
            return
        for one, digest in zip(batch, found):
            one[1] = digest


BATCHES = Batcher()


def mask_of(nums: Any) -> int:
    """Return the bit mask of piece numbers."""
    mask = 0
    for num in nums:
        mask |= 1 << num
    return mask


def choose_piece_size(length: Optional[int]) -> int:
    """Return the wrapped piece size in bytes for a file of `length` bytes (None: not known).

    256 to 512 pieces, since a swarm of N hosts ends (log2 N + 1) pieces after the first copy, and longer pieces hold up
    more links that wait for them.  On shaped links twice as many as that cost nothing, half as many 5 to 10 % of the time.
    """
    if length is None:
        return MIB
    size = 256 << 10
    while size < 8 * MIB and length > 512 * (size - WRAP):
        size *= 2
    return MAX_PIECE if length > 512 * (size - WRAP) else size


class Layout:
    """How a file of `length` bytes (None: not known yet) lies in pieces of `size` wrapped bytes.  Wire: 5.1"""

    __slots__ = ("length", "size", "stride", "count")

    def __init__(self, length: Optional[int], size: int) -> None:
        self.length = length
        self.size = size  # of a full piece, head and tail included
        self.stride = size - WRAP  # plain bytes in a full piece
        self.count = None if length is None else max(1, -(-length // self.stride))  # pieces; an empty file has one

    def content_range(self, num: int) -> Tuple[int, int]:
        """Return (offset, length) in bytes of piece `num` in the plain file.

        Of a file of unknown length every piece counts as full.  Raises NoSuchPiece when the file ends before it.
        """
        if num < 0 or num >= (MAX_COUNT if self.count is None else self.count):
            raise NoSuchPiece("there is no piece %d" % num)
        offset = num * self.stride
        return offset, self.stride if self.length is None else min(self.stride, self.length - offset)

    def range_text(self, num: int) -> str:
        """Return the `range` by which all peers know piece `num`: wrapped, exact for the last piece.  Wire: 3.2"""
        return "%d-%d" % (num * self.size, num * self.size + self.content_range(num)[1] + WRAP - 1)

    def num_of(self, text: str) -> int:
        """Return the piece number of a `range` that some client sends back, exact or not.  Raises BadRequest."""
        match = re.match(r"^(\d{1,18})-(\d{1,18})$", text)
        if not match or int(match.group(1)) % self.size:
            raise BadRequest("pieceRange: %.60s: invalid value" % text)
        num = int(match.group(1)) // self.size
        if num >= (MAX_COUNT if self.count is None else self.count):
            raise BadRequest("pieceRange: %.60s: the file has %s pieces" % (text, self.count))
        return num

    def head(self, num: int) -> bytes:
        """Return the four bytes before the content of piece `num`."""
        return piece_head(self.content_range(num)[1], self.size)

    @property
    def wrapped_length(self) -> int:
        """The length in bytes of all pieces with their wrappers; the length must be known."""
        assert self.length is not None and self.count is not None
        return self.length + WRAP * self.count

    def spans(self, num: int, start: int, end: int) -> Iterator[Tuple[bytes, int, int]]:
        """Yield what bytes [start, end) of wrapped piece `num` consist of: (bytes, 0, 0) or (b"", offset, length)
        of the plain file."""
        offset, length = self.content_range(num)
        head = self.head(num)
        if start < 4:
            yield head[start:min(end, 4)], 0, 0
        first, last = max(start - 4, 0), min(end - 4, length)
        if last > first:
            yield b"", offset + first, last - first
        if start <= length + 4 < end:
            yield TAIL, 0, 0


def piece_head(length: int, size: int) -> bytes:
    """Return the head of a piece of `length` plain bytes in a layout of `size`.  Wire: 5.1"""
    return struct.pack(">I", length | size << 4)


def new_md5() -> Any:
    """Return an MD5 object, also where a policy forbids it for security (here it finds damage, not forgers).

    Raises NoMd5 where Python has no way around the policy.
    """
    try:
        return hashlib.md5()
    except ValueError:
        try:
            return hashlib.md5(usedforsecurity=False)  # type: ignore[call-arg]  # 3.9 has it, and some older builds
        except (TypeError, ValueError):
            raise NoMd5("this Python refuses MD5 (a FIPS policy?), which Dragonfly 0.2-1.0 and --md5 need; "
                        "use a supernode of this program, without --md5")


class Seal(NamedTuple):
    """What is known of a piece's plain bytes: enough to trust a stranger's copy."""

    sha256: str

    length: int

    def __str__(self) -> str:
        return "sha256:" + self.sha256

    def short(self) -> str:
        """Return the digest as it travels in great numbers: the base64 of its 32 bytes."""
        import binascii
        return binascii.b2a_base64(bytes.fromhex(self.sha256), newline=False).decode().rstrip("=")

    @staticmethod
    def long(text: str) -> str:
        """Return `sha256:…` of a digest in either form.  Raises ValueError."""
        import binascii
        if text.startswith("sha256:"):
            return text
        return "sha256:" + binascii.a2b_base64(text + "=").hex()


def filter_url(url: str, names: str) -> str:
    """Return `url` without the query parameters named in `a&b`.  Wire: 2.2 (as dfget 1.0 does it)"""
    base, mark, query = url.partition("?")
    if not mark or not names:
        return url
    dropped = set(names.split("&"))
    kept = [part for part in query.split("&") if part.partition("=")[0] not in dropped]
    return base + "?" + "&".join(kept) if kept else base


def content_of(task_url: str) -> str:
    """Return `sha256:…` where a task is named by what is in its file, as the daemon names that of a blob; "" where by a URL.

    Wherever such a file comes from, whoever takes it holds it against its name.
    """
    return task_url if re.match(r"^sha256:[0-9a-f]{64}$", task_url) else ""


def same_file(url: str, other: str) -> bool:
    """Return whether two URLs differ at most in their queries: only those may tell a task's URL from its file's.  Wire: 2.2, 16 (1)

    If `other` names a blob's content, `url` may be any registry's blob of that digest.
    """
    path = url.partition("?")[0]
    return path == other.partition("?")[0] or bool(content_of(other)) and path.endswith("/blobs/" + other)


def task_id_of(task_url: str, md5: str = "", identifier: str = "", range_header: str = "", trust: str = "") -> str:
    """Return the 64 hex digits that name a task; `trust` as Origin.trust says it.  Wire: 2.1"""
    text = (task_url + (md5 or identifier) + range_header + trust).encode("utf-8", "surrogateescape")
    return hashlib.sha256(TASK_KEY + text + TASK_KEY).hexdigest()


# ==============================================================================
# 5. Rates
#    One kind of bucket for the limits of a download, a host and a server; what a
#    link does; and which pieces it pays to compress for it.
# ==============================================================================


class TokenBucket:
    """Hands out the right to move bytes at `rate` bytes a second; 0 is no limit.

    It keeps the moment at which everything handed out so far is paid for, so it neither drifts nor bursts by more
    than BURST_S after a pause.  _lock guards _rate and _paid_at.
    """

    BURST_S = 0.25

    def __init__(self, rate: int = 0, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._lock = threading.Lock()
        self._clock, self._sleep = clock, sleep
        self._rate = rate
        self._paid_at = 0.0

    @property
    def rate(self) -> int:
        """Bytes a second; 0 is no limit.  May be changed at any time."""
        return self._rate

    @rate.setter
    def rate(self, rate: int) -> None:
        with self._lock:
            self._rate = max(0, rate)

    def chunk(self, most: int) -> int:
        """Return how many bytes to move at once: about a fortieth of a second's worth, at most `most`."""
        return most if not self._rate else min(most, max(1024, self._rate // 40))

    def delay(self) -> float:
        """Return the seconds until more may be moved (0 is now)."""
        if not self._rate:
            return 0.0
        with self._lock:
            return max(0.0, self._paid_at - self._clock())

    def spend(self, count: int) -> None:
        """Book `count` bytes that have been moved."""
        if self._rate:
            with self._lock:
                self._paid_at = max(self._paid_at, self._clock() - self.BURST_S) + count / float(self._rate)

    def take(self, count: int) -> None:
        """Wait until more may be moved, then book `count` bytes.  For threads of their own."""
        while True:
            delay = self.delay()
            if not delay:
                return self.spend(count)
            self._sleep(min(delay, 0.5))  # in steps, since the rate may be raised meanwhile


class Meter:
    """How fast bytes come while any are awaited: those of the last two seconds spent inside a `with` block of it, by any
    number of threads.  _lock guards everything with an underscore."""

    LEAST_S, MOST_S = 0.25, 2.0  # what comes first is the kernels' buffers

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._at, self._waiting = 0.0, 0  # up to when it has measured, and how many threads await bytes
        self._bytes, self._seconds = 0.0, 0.0

    def __enter__(self) -> None:
        self._step(0, 1)

    def __exit__(self, *_: Any) -> None:
        self._step(0, -1)

    def add(self, count: int) -> None:
        """Note bytes that have come."""
        self._step(count, 0)

    def _step(self, count: int, more: int) -> None:
        with self._lock:
            now = self._clock()
            if self._waiting:
                self._seconds += now - self._at
            self._at, self._waiting, self._bytes = now, self._waiting + more, self._bytes + count
            if self._seconds > self.MOST_S:
                self._bytes, self._seconds = self._bytes / 2, self._seconds / 2

    @property
    def rate(self) -> int:
        """Bytes a second; 0 while that is not known."""
        with self._lock:
            return int(self._bytes / self._seconds) if self._seconds > self.LEAST_S else 0


#: zlib's level 1 hardly does more on one processor: nobody who receives as many bytes a second asks for it.
FASTEST_DEFLATE = 32 << 20


def pays(ratio: float, pace: float, rate: float, size: int) -> bool:
    """Return whether to compress a piece of `size` bytes to `ratio` of that, at `pace` bytes/s, for a link of `rate` bytes/s.

    It does if that takes half the time that it saves at most (processors have other work, and what is measured is never
    exact), and no second in which the receiver hears nothing; for less than a packet or two it doesn't matter.
    """
    return ratio < 0.8 and rate / pace < (1 - ratio) / 2 and 4096 <= size < pace


class Squeezer:
    """Compresses the pieces that a sample says it pays for, each once; a piece is known by its head on the wire and its digest.
    _lock guards everything with an underscore."""

    PACE = 50e6  # bytes/s that are believed of this machine at first
    SAMPLE = 8 << 10  # bytes taken at each quarter of a piece
    PLAIN = 15  # pieces that go as they are, unseen, behind one that does not shrink
    TASKS = 1000  # whose ratio is remembered
    WAIT_S = 2.0  # for another thread to compress the same piece

    def __init__(self, most_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._most_bytes = most_bytes  # of compressed pieces kept
        self._most = os.cpu_count() or 1  # pieces compressed at once
        self._running = 0
        self._pace = self.PACE  # bytes/s, averaged
        self._ratios = collections.OrderedDict()  # type: collections.OrderedDict  # by task: how far the last piece shrank,
        self._plain = {}  # type: Dict[str, int]  # and how many go unseen before the next look
        self._kept = collections.OrderedDict()  # type: collections.OrderedDict  # compressed pieces, the longest unused first
        self._kept_bytes = 0
        self._making = {}  # type: Dict[Tuple[bytes, str], threading.Event]  # pieces being compressed
        self.samples = 0
        self.saved_bytes = 0  # of all that went compressed

    def kept(self, head: bytes, seal: Seal) -> Optional[bytes]:
        """Return a piece that is compressed already; None else."""
        with self._lock:
            return self._kept_locked(head, seal)

    def _kept_locked(self, head: bytes, seal: Seal) -> Optional[bytes]:
        packed = self._kept.get((head, seal.sha256))
        if packed is not None:
            self._kept.move_to_end((head, seal.sha256))
            self.saved_bytes += seal.length - len(packed)
        return packed

    def promising(self, task: str, seal: Seal, rate: int) -> bool:
        """Return whether a piece of a task may be worth `pack`; quick, and to be asked once for each."""
        with self._lock:
            if self._plain.get(task):
                self._plain[task] -= 1
                return False
            ratio = self._ratios.get(task, 1.0)
            worth = pays(ratio if ratio < 0.8 else 0.1, self._pace, rate, seal.length)
            if not worth and self._pace < self.PACE:  # some other work may have made it slow: try again, in time
                self._pace += 0.02 * (self.PACE - self._pace)
            return worth

    def pack(self, task: str, seal: Seal, parts: List[Any], rate: int) -> Optional[bytes]:
        """Return a wrapped piece compressed; None where that does not pay, all processors are at it, or the piece is not what its seal
        says.  `parts`: its head, (fd, offset, length) of its plain bytes, its tail.  Raises OSError."""
        key = parts[0], seal.sha256
        with self._lock:
            packed, making = self._kept_locked(parts[0], seal), self._making.get(key)
            if packed is not None or not making and self._running >= self._most:
                return packed
            if not making:
                self._running += 1
                ours = self._making[key] = threading.Event()
        if making:
            making.wait(self.WAIT_S)
            return self.kept(parts[0], seal)
        try:
            packed = self._pack(task, seal, parts, rate)
            return packed
        finally:
            with self._lock:
                self._running -= 1
                del self._making[key]
                if packed is not None:
                    self.saved_bytes += seal.length - len(packed)
                    self._keep_locked(key, packed)
            ours.set()

    def _keep_locked(self, key: Tuple[bytes, str], packed: bytes) -> None:
        self._kept[key] = packed
        self._kept_bytes += len(packed)
        while self._kept_bytes > self._most_bytes:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _pack(self, task: str, seal: Seal, parts: List[Any], rate: int) -> Optional[bytes]:
        with self._lock:
            ratio, pace = self._ratios.get(task, 1.0), self._pace
        if ratio >= 0.8:
            ratio = self._sample(task, parts)
        if not pays(ratio, pace, rate, seal.length):
            return None
        began, digest, stream, packed = self._clock(), hashlib.sha256(), zlib.compressobj(1), []
        for part in parts:
            for data in read_fd(*part) if isinstance(part, tuple) else (part,):
                packed.append(stream.compress(data))
                if isinstance(part, tuple):
                    digest.update(data)
        packed.append(stream.flush())
        whole = b"".join(packed)
        self._note(task, len(whole) / max(1, seal.length), seal.length / max(self._clock() - began, 1e-6))
        return whole if len(whole) < 0.8 * seal.length and digest.hexdigest() == seal.sha256 else None

    def _sample(self, task: str, parts: List[Any]) -> float:
        """Return, and note, how far some bytes of a piece shrink, taken from all over it: the beginning may be a head unlike the rest."""
        stream, before, after = zlib.compressobj(1), 0, 0
        for fd, offset, length in [part for part in parts if isinstance(part, tuple)]:
            for quarter in (1, 2, 3):
                data = os.pread(fd, min(self.SAMPLE, length), offset + min(length * quarter // 4, max(0, length - self.SAMPLE)))
                before, after = before + len(data), after + len(stream.compress(data))
        after += len(stream.flush())
        self._note(task, after / max(1, before), 0.0)
        return after / max(1, before)

    def _note(self, task: str, ratio: float, pace: float) -> None:
        """Remember how far the last piece of a task, or a sample of it (`pace` 0), shrank, and how fast."""
        with self._lock:
            self.samples += not pace
            self._pace += 0.2 * (pace - self._pace) if pace else 0.0
            self._ratios[task] = ratio
            self._ratios.move_to_end(task)
            self._plain[task] = self.PLAIN if ratio >= 0.8 else 0
            while len(self._ratios) > self.TASKS:
                del self._plain[self._ratios.popitem(last=False)[0]]


# ==============================================================================
# 6. HTTP messages
#    Requests and answers, and what a handler may decide.
#    Not http.server and http.client: importing their e-mail parser costs each `get`
#    20 ms, and a head takes it 33 us where ours takes 4 (3,000 syncs/s leave us 330).
# ==============================================================================

_REQUEST_LINE = re.compile(r"^([A-Z]{1,16}) (\S{1,16000}) HTTP/1\.([01])$")
_STATUS_LINE = re.compile(r"^HTTP/1\.([01]) (\d{3})(?: .*)?$")
_RANGE = re.compile(r"^bytes=(\d{1,18})-(\d{0,18})$")
_NUMBER = re.compile(r"^\d{1,18}$")
_PROXIED = re.compile(r"^https?://[^/]*")
_VERSIONED = re.compile(r"^/v[0-9.]+(?=/)")
_to_json = json.JSONEncoder(separators=(",", ":")).encode
PHRASES = {200: "OK", 201: "Created", 206: "Partial Content", 208: "Already Reported", 400: "Bad Request", 401: "Unauthorized",
           403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 411: "Length Required",
           413: "Payload Too Large", 416: "Range Not Satisfiable", 431: "Request Header Fields Too Large",
           500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}


def parse_head(data: bytes) -> Tuple[str, Dict[str, str]]:
    """Return the first line and the headers (names in lower case, repeated ones joined by a comma) of a head.

    Raises BadRequest.
    """
    first, *lines = data.decode("latin-1").split("\r\n")
    headers = {}  # type: Dict[str, str]
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name[-1] in " \t" or name[0] in " \t":
            raise BadRequest("not a header: %.80r" % line)
        name, value = name.lower(), value.strip()
        headers[name] = headers[name] + ", " + value if name in headers else value
    return first, headers


class FileSpan:
    """A part of a file on its way out, by a descriptor of its answer's own, so that the file may be dropped meanwhile.

    The spans of one answer share it, and it goes with the `last` one.
    """

    __slots__ = ("fd", "offset", "count", "last")

    def __init__(self, fd: int, offset: int, count: int, last: bool = True) -> None:
        self.fd, self.offset, self.count, self.last = fd, offset, count, last

    def close(self) -> None:
        """Give the descriptor back; once."""
        if self.fd >= 0 and self.last:
            os.close(self.fd)
        self.fd = -1

    def send(self, sock: socket.socket, most: int) -> int:
        """Send at most so many of its next bytes; return the count.  Raises OSError, BlockingIOError."""
        return os.sendfile(sock.fileno(), self.fd, self.offset, min(self.count, most))


class ByteSpan(FileSpan):
    """Bytes in memory that go in place of a part of a file, and by its limits."""

    __slots__ = ("_view",)

    def __init__(self, data: bytes) -> None:
        super().__init__(-1, 0, len(data))
        self._view = memoryview(data)

    def send(self, sock: socket.socket, most: int) -> int:
        """Send at most so many of its next bytes; return the count.  Raises OSError, BlockingIOError."""
        return sock.send(self._view[self.offset:self.offset + min(self.count, most)])


class Response:
    """An answer: status, headers beyond the length, and a body of bytes and file spans."""

    def __init__(self, status: int = 200, body: Any = b"", kind: str = "application/json", headers: Any = ()) -> None:
        self.status = status
        self.segments = body if isinstance(body, list) else [body]
        self.headers = [("Content-Type", kind)] + list(headers)

    @classmethod
    def of_json(cls, data: Any, status: int = 200) -> "Response":
        """Return `data` as JSON."""
        return cls(status, _to_json(data).encode())

    @classmethod
    def of_metrics(cls, text: str) -> "Response":
        """Return what Prometheus reads."""
        return cls(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    @classmethod
    def of_error(cls, status: int, message: str) -> "Response":
        """Return an error outside the protocol's own envelope, as supernode 1.0 words it.  Wire: 1.5"""
        return cls.of_json({"code": status, "message": message}, status)

    def head(self, keep: bool) -> bytes:
        """Return the bytes before the body."""
        length = sum(s.count if isinstance(s, FileSpan) else len(s) for s in self.segments)
        lines = ["HTTP/1.1 %d %s" % (self.status, PHRASES.get(self.status, "Unknown")), "Content-Length: %d" % length]
        lines += ["%s: %s" % pair for pair in self.headers]
        if not keep:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def close(self) -> None:
        """Let go of the files."""
        for segment in self.segments:
            if isinstance(segment, FileSpan):
                segment.close()


class Park(NamedTuple):
    """An answer that has to wait: run the handler again when `key` is notified, or after `limit_s`."""

    key: Any
    limit_s: float


class Request:
    """What a client asks.  A handler that parks finds its own notes in `state` when it is run again."""

    def __init__(self, method: str, target: str, headers: Dict[str, str], body: bytes, client: str, server: str) -> None:
        self.method, self.target, self.headers, self.body = method, target, headers, body
        self.client, self.server = client, server  # IP addresses of the two ends
        path, _, self.query_text = target.partition("?")
        self.path = unquote(_PROXIED.sub("", path)) or "/"
        self.rest = ""  # of the path, behind a route that ends in a slash
        self.state = {}  # type: Dict[str, Any]
        self.expired = False  # its time in the park is over: it must be answered now
        self.on_gone = None  # type: Optional[Callable[[], None]]  # called when the client leaves while parked

    @property
    def query(self) -> Dict[str, str]:
        """The query's parameters; of a repeated one the last."""
        return dict(parse_qsl(self.query_text, keep_blank_values=True))

    def json(self) -> Dict[str, Any]:
        """Return the body as a JSON object.  Raises BadRequest."""
        try:
            data = json.loads(self.body.decode("utf-8"))
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON")
        if not isinstance(data, dict):
            raise BadRequest("the body is not a JSON object")
        return data

    def range(self, length: int) -> Optional[Tuple[int, int]]:
        """Return (start, end) in bytes, end exclusive and clipped, of a Range header; None without a usable one.

        Raises NoSuchPiece when it begins at or behind `length`.
        """
        match = _RANGE.match(self.headers.get("range", ""))
        if not match:
            return None
        start, end = int(match.group(1)), int(match.group(2) or length - 1) + 1
        if end <= start:
            return None
        if start >= length:
            raise NoSuchPiece("the file has %d bytes" % length)
        return start, min(end, length)


class Aside(NamedTuple):
    """An answer that a worker may make better than it is, in its own time: `make` returns that, or `plain`."""

    make: Callable[[Request], Any]
    plain: Response


class Route(NamedTuple):
    """A path (with all below it, if it ends in a slash) and the handler for it: a method's name of the application."""

    method: str
    path: str
    handler: str
    worker: bool = False  # whether it may block and so runs on a worker thread


def plain_address(ip: str) -> str:
    """Return an address without what a socket of both families puts before an IPv4 one."""
    return ip[7:] if ip.startswith("::ffff:") else ip


# ==============================================================================
# 7. HTTP server
#    One thread over a selector: it reads requests, runs what is quick at once and
#    the rest on a few workers, parks what has to wait, and sends files by sendfile.
# ==============================================================================

class _Link:
    """One accepted connection, driven by the server's thread alone."""

    IDLE, READING, WORKING, PARKED, WRITING, CLOSED = range(6)

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.client, self.server = ("", "") if sock.family == socket.AF_UNIX else (
            plain_address(sock.getpeername()[0]), plain_address(sock.getsockname()[0]))
        self.state = self.IDLE
        self.deadline = 0.0  # monotonic; when the state ends by force
        self.input = bytearray()
        self.request = None  # type: Optional[Request]
        self.route = None  # type: Optional[Route]
        self.response = None  # type: Optional[Response]
        self.output = collections.deque()  # type: collections.deque
        self.keep = True  # whether another request may follow
        self.site = ""  # https://… of whom we speak as, inside a tunnel
        self.closing = False  # the client has shut its sending side
        self.quick = False  # its congestion control is the one for bursts
        self.events = 0  # what the selector watches for


class Server:
    """An HTTP/1.1 server over one listening socket and one thread.

    All links belong to that thread.  Other threads reach it by `notify` and through _posted, a deque and a pipe; _wake_lock guards
    the pipe.
    `application` has the handlers that `routes` name: each takes a Request and returns a Response or a Park, or
    raises; a DflyError is answered with its words, anything else with a plain 500 and a log line.
    """

    IDLE_S, READ_S, WRITE_S = 180.0, 20.0, 60.0  # how long a client may be silent between, in and behind a request
    WORKERS = 16
    BURST = 1 << 20  # bytes sent on one link before the others get their turn

    def __init__(self, sock: socket.socket, routes: Any, application: Any, log: Log, name: str, bucket: Optional[TokenBucket] = None) -> None:
        self._sock, self._app, self._log = sock, application, log
        self._routes = {(r.method, r.path): r for r in routes}
        self._bucket = bucket or TokenBucket()  # for file bytes going out
        self._selector = selectors.DefaultSelector()
        self._links = set()  # type: Set[_Link]
        self._parked = collections.defaultdict(set)  # type: Dict[Any, Set[_Link]]
        self._timers = []  # type: List[Tuple[float, int, Callable[[], None]]]
        self._timer_count = 0
        self._posted = collections.deque()  # type: collections.deque
        self._wake_lock = threading.Lock()
        self._wake_r, self._wake_w = os.pipe()
        self._woken = False  # there is a byte in the pipe, or no pipe any more
        self._stopping = False
        self._jobs = queue.Queue()  # type: queue.Queue
        self._workers = []  # type: List[threading.Thread]
        self._busy = 0  # jobs that wait or run
        self._deciding = False  # a handler runs and may be about to park: what it waits for must not come unheard meanwhile
        self.address = sock.getsockname()[:2]
        self.sent_bytes = 0  # of files
        self.requests = collections.Counter()  # type: Dict[str, int]  # by handler
        self._thread = threading.Thread(target=self._run, name="dfly-http-" + name, daemon=True)

    # -- for other threads ----------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self, limit_s: float = 5.0) -> None:
        """End the thread and close every connection."""
        self._stopping = True
        self.post(lambda: None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(limit_s)
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join(limit_s)

    def notify(self, key: Any) -> None:
        """Run again what is parked under `key`.  From any thread."""
        if key in self._parked or self._deciding:
            self.post(lambda: self._unpark(key))

    def post(self, call: Callable[[], None]) -> None:
        """Have the server's thread make a call soon."""
        self._posted.append(call)
        if threading.current_thread() is self._thread or self._woken:
            return
        with self._wake_lock:
            if not self._woken:
                self._woken = True
                os.write(self._wake_w, b"x")

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have the server's thread make a call in `delay_s` seconds.  From the server's thread, or before `start`."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timer_count, call))

    # -- the loop --------------------------------------------------------------

    def _run(self) -> None:
        self._sock.setblocking(False)
        self._selector.register(self._sock, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._drain)
        self.later(1.0, self._sweep)
        try:
            while not self._stopping:
                self._turn()
        finally:
            for link in list(self._links):
                self._close(link)
            self._selector.close()
            self._sock.close()
            with self._wake_lock:
                self._woken = True
                os.close(self._wake_r)
                os.close(self._wake_w)

    def _turn(self) -> None:
        timeout = 0.0 if self._posted else max(0.0, self._timers[0][0] - time.monotonic())
        for key, events in self._selector.select(timeout):
            if isinstance(key.data, _Link):
                self._serve(key.data, events)
            else:
                key.data()
        for _ in range(len(self._posted)):
            self._guard(self._posted.popleft())
        while self._timers[0][0] <= time.monotonic():
            self._guard(heapq.heappop(self._timers)[2])

    def _guard(self, call: Callable[[], None]) -> None:
        """Make a call whose failure must not end the server."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 the last frame before the thread: say it and go on
            self._log.error("%s: %r", getattr(call, "__name__", call), error)

    def _drain(self) -> None:
        os.read(self._wake_r, 4096)
        self._woken = False

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock = self._sock.accept()[0]
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):  # no descriptors: let some end first
                    self._log.warn("can't accept: %s", error.strerror)
                    self._selector.unregister(self._sock)
                    self.later(0.2, lambda: self._selector.register(self._sock, selectors.EVENT_READ, self._accept) and None)
                    return
                continue
            self._adopt(sock)

    def _adopt(self, sock: socket.socket, client: str = "", site: str = "") -> None:
        sock.setblocking(False)
        try:
            link = _Link(sock)
            link.client, link.site = link.client or client, site
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # it left between accept and here
            sock.close()
            return
        self._links.add(link)
        self._set(link, _Link.IDLE, self.IDLE_S)
        self._watch(link, selectors.EVENT_READ)

    def _set(self, link: _Link, state: int, limit_s: float) -> None:
        link.state, link.deadline = state, time.monotonic() + limit_s

    def _watch(self, link: _Link, events: int) -> None:
        """Have the selector watch a link for `events` (0: leave it alone)."""
        if link.events == events or link.state == _Link.CLOSED:
            return
        if not events:
            self._selector.unregister(link.sock)
        elif link.events:
            self._selector.modify(link.sock, events, link)
        else:
            self._selector.register(link.sock, events, link)
        link.events = events

    def _sweep(self) -> None:
        """Once a second: end what has waited too long."""
        self.later(1.0, self._sweep)
        now = time.monotonic()
        for link in [link for link in self._links if link.deadline <= now]:
            if link.state == _Link.PARKED:
                self._resume(link, expired=True)
            elif link.state == _Link.READING:
                link.keep = False
                self._respond(link, Response.of_error(408, "the request did not arrive within %d s" % self.READ_S))
            elif link.state != _Link.WORKING:
                self._close(link)

    def _serve(self, link: _Link, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(link)
            if events & selectors.EVENT_WRITE and link.state == _Link.WRITING:
                self._write(link)
        except OSError:  # the client is gone
            self._close(link)

    # -- reading ---------------------------------------------------------------

    def _read(self, link: _Link) -> None:
        try:
            data = link.sock.recv(65536)
        except BlockingIOError:
            return
        if not data:
            if link.state in (_Link.WORKING, _Link.WRITING):
                link.closing = True  # it may have shut its sending side only: it still gets its answer
                self._watch(link, link.events & ~selectors.EVENT_READ)
            else:
                self._close(link)
            return
        link.input += data
        if link.state in (_Link.IDLE, _Link.READING):
            self._parse(link)
        elif len(link.input) > MAX_HEAD + MAX_BODY:
            self._close(link)

    def _parse(self, link: _Link) -> None:
        """Take a request from the input, if it is all there, and run it."""
        while link.input[:2] == b"\r\n":  # RFC 7230, 3.5: some clients end a body with one too many
            del link.input[:2]
        if not link.input:
            return
        if link.input[0] == 0x16:  # engines try TLS first, and would wait for it
            return self._refuse(link, 400, "this port speaks plain HTTP, not TLS")
        if link.state == _Link.IDLE:
            self._set(link, _Link.READING, self.READ_S)
        end = link.input.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end < 0:
            if len(link.input) >= MAX_HEAD:
                self._refuse(link, 431, "the head is larger than %d bytes" % MAX_HEAD)
            return
        try:
            line, headers = parse_head(bytes(link.input[:end]))
            match = _REQUEST_LINE.match(line)
            if not match:
                raise BadRequest("not a request: %.80r" % line)
            tokens = headers.get("connection", "").lower()
            link.keep = "close" not in tokens if match.group(3) == "1" else "keep-alive" in tokens
            self._begin(link, match, headers, end + 4)
        except BadRequest as error:
            self._refuse(link, error.http, str(error))

    def _begin(self, link: _Link, line: Any, headers: Dict[str, str], begin: int) -> None:
        """Take the body that begins at `begin`, if it is all there, and run the request.  Raises BadRequest."""
        length = self._body_length(headers)
        if length > MAX_BODY:
            return self._refuse(link, 413, "the body is larger than %d bytes" % MAX_BODY)
        if length < 0:
            return self._refuse(link, 411, "say the body's Content-Length")
        if len(link.input) < begin + length:
            if headers.get("expect", "").lower() == "100-continue" and len(link.input) == begin:
                link.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        body = bytes(link.input[begin:begin + length])
        del link.input[:begin + length]
        link.request = Request(line.group(1), line.group(2), headers, body, link.client, link.server)
        return self._route(link)

    @staticmethod
    def _body_length(headers: Dict[str, str]) -> int:
        """Return the body's length in bytes; -1 when it is chunked."""
        if "transfer-encoding" in headers:
            return -1
        text = headers.get("content-length", "0")
        if not _NUMBER.match(text):
            raise BadRequest("not a Content-Length: %.40r" % text)
        return int(text)

    def _refuse(self, link: _Link, status: int, message: str) -> None:
        """Answer what could not even be read, and hang up, since nobody knows where the next request begins."""
        self._log.warn("%s: %d %s", link.client, status, message)
        link.keep, link.request = False, None
        del link.input[:]
        self._respond(link, Response.of_error(status, message))

    # -- handling --------------------------------------------------------------

    def _route(self, link: _Link) -> None:
        request = link.request
        assert request
        path = _VERSIONED.sub("", request.path)  # supernode 1.0 has every path a second time.  Wire: 4.6
        method = "GET" if request.method == "HEAD" else request.method
        route = self._routes.get((method, path))
        cut = len(path)
        while route is None and cut > 0:
            cut = path.rfind("/", 0, cut)
            route = self._routes.get((method, path[:cut + 1]))
        if route is None:
            known = any(other[1] == path for other in self._routes)
            self._respond(link, Response.of_error(405 if known else 404, "%s %.100s: no such thing here" % (request.method, request.path)))
            return
        if route.path.endswith("/"):
            request.rest = path[len(route.path):]
        link.route = route
        self.requests[route.handler] += 1
        self._call(link)

    def _call(self, link: _Link) -> None:
        """Run the handler of a link, here or on a worker."""
        assert link.route and link.request
        if not link.route.worker:
            self._deciding = True
            self._take(link, self._outcome(getattr(self._app, link.route.handler), link.request))
            self._deciding = False
        elif not self._delegate(link, getattr(self._app, link.route.handler)):
            self._respond(link, Response.of_error(503, "there is no thread for this request"))

    def _delegate(self, link: _Link, handler: Callable[[Request], Any]) -> bool:
        """Have a worker run a handler; return whether there is any."""
        if not self._hire(self._busy + 1):
            return False
        self._set(link, _Link.WORKING, 3600.0)
        self._busy += 1
        self._jobs.put((link, handler, link.request))
        return True

    def _hire(self, jobs: int) -> bool:
        """Have a worker for each of so many jobs, or as many as we may; return whether there is any to do them."""
        if len(self._workers) < min(jobs, self.WORKERS):
            worker = threading.Thread(target=self._work, name="dfly-worker-%d" % len(self._workers), daemon=True)
            try:
                worker.start()
            except RuntimeError as error:  # the system has no more for us: those that there are do it in turn
                self._log.warn("no worker more than %d: %s", len(self._workers), error)
            else:
                self._workers.append(worker)
        return bool(self._workers)

    def _work(self) -> None:
        """A worker's life."""
        for link, handler, request in iter(self._jobs.get, None):
            outcome = self._outcome(handler, request)
            self.post(lambda link=link, outcome=outcome: self._worked(link, outcome))  # type: ignore[misc]

    def _worked(self, link: _Link, outcome: Any) -> None:
        """A worker has done its job."""
        self._busy -= 1
        self._take(link, outcome)

    def _outcome(self, handler: Callable[[Request], Any], request: Request) -> Any:
        """Run a handler; return what it says, or its error as an answer."""
        try:
            return handler(request)
        except DflyError as error:
            self._log.warn("%s %s from %s: %s", request.method, request.path, request.client, error)
            return Response.of_error(error.http, str(error))
        except Exception as error:  # noqa: BLE001 a fault of ours: the client gets no traceback, the log does
            import traceback
            self._log.error("%s %s: %s", request.method, request.path, traceback.format_exc())
            return Response.of_error(500, "internal error: %s" % type(error).__name__)

    def _take(self, link: _Link, outcome: Any) -> None:
        """Do what a handler has decided."""
        if link.state == _Link.CLOSED:
            if isinstance(outcome, (Response, Aside)):
                (outcome.plain if isinstance(outcome, Aside) else outcome).close()
        elif isinstance(outcome, Aside):
            if not self._delegate(link, outcome.make):
                self._respond(link, outcome.plain)
        elif isinstance(outcome, Park):
            self._set(link, _Link.PARKED, outcome.limit_s)
            assert link.request
            link.request.state["key"] = outcome.key
            self._parked[outcome.key].add(link)
            if link.closing:
                self._close(link)
        else:
            self._respond(link, outcome)

    def _forget_park(self, link: _Link) -> None:
        if link.state == _Link.PARKED and link.request:
            key = link.request.state["key"]
            self._parked[key].discard(link)
            if not self._parked[key]:
                del self._parked[key]

    def _unpark(self, key: Any) -> None:
        for link in list(self._parked.get(key, ())):
            self._resume(link, expired=False)

    def _resume(self, link: _Link, expired: bool) -> None:
        assert link.request
        self._forget_park(link)
        link.state = _Link.WORKING
        link.request.expired = expired
        self._call(link)

    # -- writing ---------------------------------------------------------------

    def _respond(self, link: _Link, response: Response) -> None:
        link.keep = link.keep and not self._stopping
        link.response = response
        head = response.head(link.keep)
        segments = response.segments
        if link.request and link.request.method == "HEAD":
            response.close()
            segments = []
        if all(isinstance(segment, bytes) for segment in segments):
            link.output = collections.deque([memoryview(head + b"".join(segments))])
        else:
            link.output = collections.deque([memoryview(head)])
            link.output.extend(s if isinstance(s, FileSpan) else memoryview(s) for s in segments)
            self._quicken(link)
            self._cork(link, 1)
        self._set(link, _Link.WRITING, self.WRITE_S)
        try:
            self._write(link)
        except OSError:
            self._close(link)

    def _quicken(self, link: _Link) -> None:
        """Near by, have bursts grow at once into the room that other transfers leave.  BBR, the default of some systems, takes
        eight round trips for each quarter more: longer than a piece, and 3 % of a swarm's time."""
        if not link.quick and hasattr(socket, "TCP_CONGESTION") and 0 < round_trips(link.sock)[0] < 0.02:
            link.quick = True
            try:
                link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
            except OSError:  # not in this kernel: its default will do
                pass

    def _cork(self, link: _Link, on: int) -> None:
        """Have the kernel fill whole segments: head, file and tail leave together."""
        if link.sock.family != socket.AF_UNIX and hasattr(socket, "TCP_CORK"):
            link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, on)

    def _write(self, link: _Link) -> None:
        """Send what the socket, the limit and the others' turn allow."""
        budget = self.BURST
        while link.output:
            segment = link.output[0]
            if budget <= 0:
                return self._watch(link, selectors.EVENT_READ | selectors.EVENT_WRITE)
            try:
                count = self._send_span(link, segment) if isinstance(segment, FileSpan) else link.sock.send(segment)
            except BlockingIOError:
                return self._watch(link, selectors.EVENT_WRITE | (0 if link.closing else selectors.EVENT_READ))
            if count < 0:
                return None  # the limit has it: a timer will come back
            budget -= count
            link.deadline = time.monotonic() + self.WRITE_S
            if isinstance(segment, FileSpan):
                if not segment.count:
                    segment.close()
                    link.output.popleft()
            elif count == len(segment):
                link.output.popleft()
            else:
                link.output[0] = segment[count:]
        self._end_response(link)
        return None

    def _send_span(self, link: _Link, span: FileSpan) -> int:
        """Send part of a file; return the bytes sent, -1 when the limit says later.  Raises OSError, BlockingIOError."""
        delay = self._bucket.delay()
        if delay:
            self._watch(link, 0)
            self.later(delay, lambda: self._serve(link, selectors.EVENT_WRITE))
            return -1
        count = span.send(link.sock, self._bucket.chunk(1 << 20))
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it was")
        self._bucket.spend(count)
        span.offset += count
        span.count -= count
        self.sent_bytes += count
        return count

    def _end_response(self, link: _Link) -> None:
        assert link.response
        if any(isinstance(segment, FileSpan) for segment in link.response.segments):
            self._cork(link, 0)
        link.request, link.response, link.route = None, None, None
        if not link.keep or link.closing:
            self._close(link)
            return
        self._set(link, _Link.IDLE, self.IDLE_S)
        self._watch(link, selectors.EVENT_READ)
        if link.input:
            self.post(lambda: self._parse(link) if link.state == _Link.IDLE else None)

    def _close(self, link: _Link) -> None:
        if link.state == _Link.CLOSED:
            return
        self._watch(link, 0)
        self._forget_park(link)
        gone = link.request.on_gone if link.state == _Link.PARKED and link.request else None
        link.state = _Link.CLOSED
        self._links.discard(link)
        if link.response:
            link.response.close()
        link.sock.close()
        if gone:
            self._guard(gone)


_ACCEPTS = re.compile(r"^1 rate=([1-9]\d{0,11})$")


def squeezed(request: Request, plain: Response, squeezer: Optional[Squeezer], task: str, seal: Optional[Seal]) -> Any:
    """Return the answer that is one wrapped piece of a task, deflated if that pays: as it is, or an Aside to find out.

    Only for who says that he takes it, which no old client does.
    """
    accepts = _ACCEPTS.match(request.headers.get(DFLY_HEADER, ""))
    if not squeezer or not seal or not accepts or request.headers.get("accept-encoding", "") != "deflate" or request.method != "GET":
        return plain
    found, the_squeezer, the_seal, rate = squeezer.kept(plain.segments[0], seal), squeezer, seal, int(accepts.group(1))
    if found is not None:
        return _deflated(plain, found)
    if not squeezer.promising(task, seal, rate):
        return plain

    def make(_request: Request) -> Response:
        parts = [(part.fd, part.offset, part.count) if isinstance(part, FileSpan) else part for part in plain.segments]
        try:
            packed = the_squeezer.pack(task, the_seal, parts, rate)
        except OSError:  # whoever sends it plain meets the same, and says so
            packed = None
        return _deflated(plain, packed) if packed is not None else plain

    return Aside(make, plain)


def _deflated(plain: Response, packed: bytes) -> Response:
    plain.close()
    response = Response(plain.status, ByteSpan(packed))
    response.headers = plain.headers + [("Content-Encoding", "deflate")]
    return response


def readable(things: List[Any], seconds: float) -> List[Any]:
    """Return which of some sockets, files and descriptors can be read, as soon as one can, within `seconds`.

    A poll: select knows no descriptor above 1,023.
    """
    poll, known = select.poll(), {}
    for thing in things:
        known[thing if isinstance(thing, int) else thing.fileno()] = thing
    for fd in known:
        poll.register(fd, select.POLLIN)
    return [known[fd] for fd, _ in poll.poll(max(0.0, seconds) * 1000)]


class Ending(threading.Event):
    """What a signal sets.  Its handler runs in the middle of whatever the main thread does, and that may hold an Event's lock just
    then, in `wait`, where `set` would wait for it for ever: this one has none."""

    def __init__(self) -> None:
        super().__init__()
        self._read, self._write = os.pipe()

    def set(self) -> None:
        """It is so, for ever."""
        os.write(self._write, b"x")

    def is_set(self) -> bool:
        """Return whether it is."""
        return bool(readable([self._read], 0.0))

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait until it is, at most `timeout` seconds; return whether."""
        return bool(readable([self._read], 86400.0 if timeout is None else timeout))


def round_trips(sock: socket.socket) -> Tuple[float, float]:
    """Return the shortest round trip in seconds that the kernel has seen on a connection, and its average of late; 0.0 where it
    doesn't say."""
    if sock.family == socket.AF_UNIX or not hasattr(socket, "TCP_INFO"):
        return 0.0, 0.0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) < 152:  # tcpi_min_rtt came with Linux 4.6
        return 0.0, 0.0
    return struct.unpack_from("@I", info, 148)[0] / 1e6, struct.unpack_from("@I", info, 68)[0] / 1e6


def listen(host: str, port: int, tries: int = 1) -> socket.socket:
    """Return a listening socket on `port` (0: any) or one of the `tries` after it; host "" is every address, of
    both families where the machine has them.  Raises NetworkError."""
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    for number in range(port, port + tries):
        try:
            return _listen_once(family, host, number)
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and not host and family == socket.AF_INET6:
                family = socket.AF_INET
                return listen("0.0.0.0", port, tries)
            if error.errno != errno.EADDRINUSE or number == port + tries - 1:
                raise NetworkError("can't listen on %s: %s" % (join_host(host or "*", number), error.strerror))
    raise NetworkError("no port to listen on")


def _listen_once(family: int, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if host else 0)
        sock.bind((host or "::", port))
        sock.listen(4096)
    except OSError:
        sock.close()
        raise
    return sock


# ==============================================================================
# 8. HTTP client
#    Kept-alive connections that read into a buffer of the caller's.
# ==============================================================================

def addresses_to(host: str, port: int, timeout_s: float) -> Tuple[str, str]:
    """Return the addresses of both ends of a connection to host:port, ours first.  Raises NetworkError.  Wire: 2.3"""
    sock = connect(host, port, timeout_s)
    try:
        return plain_address(sock.getsockname()[0]), plain_address(sock.getpeername()[0])
    finally:
        sock.close()


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """Return a connected socket; a `host` with a slash is a socket file.  Raises NetworkError, TimedOut."""
    if host.startswith("/"):
        return _connect_file(host, timeout_s)
    try:
        sock = socket.create_connection((host, port), timeout_s)
    except socket.timeout:
        raise TimedOut("%s did not answer within %g s" % (join_host(host, port), timeout_s))
    except OSError as error:
        raise NetworkError("%s: %s" % (join_host(host, port), error.strerror or error))
    except UnicodeError:  # a..b, or a part of more than 63 letters: Python's codec for names says so, not the resolver
        raise NetworkError("%s: not the name of a host" % join_host(host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _connect_file(path: str, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise NetworkError("%s: %s" % (path, error.strerror or error))
    return sock


def limit_silence(sock: socket.socket, timeout_s: float) -> None:
    """Limit the silence in one read or write, in seconds.  By socket options, so that the socket stays a blocking one."""
    sock.settimeout(None)
    limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class Reply:
    """The head of an answer, and its body as far as it has been read."""

    def __init__(self, link: "HttpLink", status: int, headers: Dict[str, str], old: bool) -> None:
        self._link = link
        self.status, self.headers = status, headers
        text = headers.get("content-length", "")
        self.length = int(text) if _NUMBER.match(text) else None  # None: chunked, or up to the end
        self.chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        tokens = headers.get("connection", "").lower()
        self.keep = "keep-alive" in tokens if old else "close" not in tokens
        self.left = self.length  # bytes of the body not read yet
        self.taken = 0  # bytes of it that were read
        self.stream = None  # type: Any  # what inflates it

    def body(self, limit: int = 16 << 20) -> bytes:
        """Return the whole body of at most `limit` bytes.  Raises NetworkError."""
        if self.chunked:
            return self._chunked_body(limit)
        if (self.length or 0) > limit:
            raise NetworkError("an answer of %d bytes" % (self.length or 0))
        data = bytearray()
        while self.left is None or self.left > 0:
            chunk = bytearray(min(65536, limit + 1 - len(data) if self.left is None else self.left))
            count = self._read_raw(memoryview(chunk))
            data += chunk[:count]
            if not count:
                if self.left:
                    raise NetworkError("%s hung up in the middle of an answer" % self._link)
                break
            if len(data) > limit:
                raise NetworkError("an answer of more than %d bytes" % limit)
        return bytes(data)

    def _chunked_body(self, limit: int) -> bytes:
        data = b""
        while True:
            line = self._link.read_line()
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError:
                raise NetworkError("not a chunk: %.40r" % line)
            if size > limit - len(data):
                raise NetworkError("an answer of more than %d bytes" % limit)
            if not size:
                while self._link.read_line():
                    pass
                self.left = 0
                return data
            data += self._link.read_exactly(size)
            self._link.read_line()

    def inflate(self, length: int) -> None:
        """Have `read_into` give the `length` bytes that a deflated body was made from; no more than it is asked for, so none can do
        harm.  Each fault of the body is a zlib.error."""
        if self.length is None or self.length > length:
            raise zlib.error("longer than what it was made from")
        self.stream = zlib.decompressobj()

    def end_inflated(self) -> None:
        """Read what is behind the last byte of a deflated body: nothing that counts.  Raises zlib.error, NetworkError."""
        if (self.left or 0) > 64:  # our own deflater leaves eight or so
            raise zlib.error("more than what it was made from")
        data = self.stream.unconsumed_tail + self.body()
        if self.stream.decompress(data, 1) or not self.stream.eof or self.stream.unused_data:
            raise zlib.error("not the end of what it was made from")

    def _read_inflated(self, view: Any) -> int:
        data = self.stream.decompress(self.stream.unconsumed_tail, len(view))
        if not data:
            if self.stream.eof or not self.left:
                raise zlib.error("shorter than what it was made from")
            part = memoryview(bytearray(min(len(view), 65536)))
            data = self.stream.decompress(part[:self._read_raw(part)], len(view))
        view[:len(data)] = data
        return len(data)

    def read_into(self, view: Any) -> int:
        """Read some of the body into `view`; return the count, 0 at the end (and while nothing can be inflated, though it is `taken`).

        Raises TimedOut when nothing came at all, NetworkError.
        """
        return self._read_inflated(view) if self.stream else self._read_raw(view)

    def pour(self, funnel: Funnel, fd: int, offset: int, count: int) -> Tuple[int, Optional[OSError]]:
        """Bring at most `count` bytes into a file at `offset`, as `read_into` would into memory; what is wrong with the file is returned."""
        if self.stream:
            return funnel.put(fd, offset, self.read_into(funnel.buffer[:count]))
        count = count if self.left is None else min(count, self.left)
        if not count:
            return 0, None
        done, wrong = self._link.pour(funnel, fd, offset, count, 0 if self.left is None else self.left - count)
        if self.left is not None:
            self.left -= done
        self.taken += done
        return done, wrong

    def _read_raw(self, view: Any) -> int:
        if self.left is not None:
            view = view[:self.left]
        if not len(view):
            return 0
        count = self._link.receive(view, 0 if self.left is None else self.left - len(view))
        if self.left is not None:
            self.left -= count
        self.taken += count
        return count

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return self.keep and self.left == 0


class HttpLink:
    """One connection to a server, kept alive.  Used by one thread at a time."""

    HEAP_TO_SPLICE = 1 << 16  # bytes; of smaller heaps, on slow links, many would have to move for each piece: 2 % of a swarm's time

    def __init__(self, host: str, port: int, timeout_s: float = 10.0, connect_s: float = 3.0,
                 sock: Optional[socket.socket] = None, ahead: bytes = b"") -> None:
        self.host, self.port = host, port
        self._name = join_host(host, port)
        self.sock = sock or connect(host, port, connect_s)
        self.fresh = True  # no answer has come over it yet
        self.follower = None  # type: Optional[Follower]  # the place behind an answer that is about to end; its pool's
        self._ahead = ahead  # bytes read behind a head
        self._heap = 1  # bytes that wake a reader
        self._heap_most = 0  # for bodies, where that is worth while
        self._timeout_s = 0.0
        self.set_timeout(timeout_s)

    def __str__(self) -> str:
        return self._name

    def set_timeout(self, timeout_s: float) -> None:
        """Limit the silence in one read or write, in seconds."""
        if timeout_s == self._timeout_s:
            return
        self._timeout_s = timeout_s
        limit_silence(self.sock, timeout_s)

    def keep_short(self, pace: float) -> float:
        """Let no more be under way to us than 30 ms of `pace` bytes/s (and three round trips, where those are long); return
        the seconds that a round trip takes of late, 0.1 where the kernel doesn't say.

        What a sender has under way beyond that only waits in queues: ours for the pieces of others, and in front of
        every request.  With 50 ms of buffer on each link it costs a swarm 4 % of its time, and 128 KB instead of 48 2 %.
        """
        shortest, usual = round_trips(self.sock)
        if hasattr(socket, "TCP_WINDOW_CLAMP"):
            segment = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)  # 64 KB within a host: few of them stall it
            window = min(max(48 << 10, 16 * segment, int(pace * (0.03 + 3 * shortest))), 1 << 30)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, window)
            if not self._heap_most:
                self._poll = select.poll()
                self._poll.register(self.sock, select.POLLIN)
            self._heap_most = window // 3
        return usual or 0.1

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def interrupt(self) -> None:
        """Wake a thread that waits on this connection, with an error."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is closed already
            pass

    def send(self, method: str, target: str, headers: Any = (), body: bytes = b"") -> None:
        """Send a request.  Raises NetworkError."""
        lines = ["%s %s HTTP/1.1" % (method, target), "Host: " + self._name]
        lines += ["%s: %s" % pair for pair in headers]
        if body or method == "POST":
            lines.append("Content-Length: %d" % len(body))
        try:
            self.sock.sendall("\r\n".join(lines + ["", ""]).encode("utf-8", "surrogateescape") + body)
        except (BlockingIOError, socket.timeout):
            raise TimedOut("%s does not take our request" % self)
        except OSError as error:
            raise HungUp("%s: %s" % (self, error.strerror))

    def receive(self, view: Any, behind: int = 0) -> int:
        """Fill `view`, or a good part of it, as far as the connection's time limit allows; return the count, 0 at the end.

        `behind` it at least so many bytes will follow.  Raises TimedOut when nothing came at all, NetworkError.
        """
        if self._ahead:
            count = min(len(self._ahead), len(view))
            view[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
            return count
        try:
            if not self._heap_most:
                return self.sock.recv_into(view, len(view), socket.MSG_WAITALL)
            if behind >= self._heap_most:  # a whole heap is sure to come after each one that we sleep for
                self._wake_at(self._heap_most)
                return self.sock.recv_into(view, len(view), socket.MSG_WAITALL)
            self._wake_at(min(len(view), self._heap_most))
            self._poll.poll(self._timeout_s * 1000)  # a recv would first take what is there, and then wait for so much more
            return self.sock.recv_into(view, len(view), socket.MSG_DONTWAIT)
        except (BlockingIOError, socket.timeout):
            raise TimedOut("%s is silent" % self)
        except OSError as error:
            raise NetworkError("%s: %s" % (self, error.strerror))

    def pour(self, funnel: Funnel, fd: int, offset: int, count: int, behind: int = 0) -> Tuple[int, Optional[OSError]]:
        """As `receive`, but into a file; what is wrong with that is returned."""
        if self._ahead or not funnel.splices or 0 < self._heap_most < self.HEAP_TO_SPLICE:
            return funnel.put(fd, offset, self.receive(funnel.buffer[:count], behind))
        done, fault, wrong = funnel.splice(self.sock, fd, offset, count, self._heap_most, behind)
        self._heap = 0 if self._heap_most else self._heap
        if not (done or wrong or funnel.splices):
            return self.pour(funnel, fd, offset, count, behind)
        if fault and not done and not wrong:
            raise TimedOut("%s is silent" % self) if fault == errno.EAGAIN else NetworkError("%s: %s" % (self, os.strerror(fault)))
        return done, wrong

    def _wake_at(self, count: int) -> None:
        """Let a reader sleep until that many bytes have come: a wake-up for each segment costs a busy host more than all the rest."""
        if count != self._heap:
            self._heap = count
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _more(self) -> None:
        """Read on behind what is there, without waiting for more than comes at once."""
        self._wake_at(1)
        try:
            data = self.sock.recv(4096)
        except (BlockingIOError, socket.timeout):
            raise TimedOut("%s is silent" % self)
        except OSError as error:
            raise HungUp("%s: %s" % (self, error.strerror))
        if not data:
            raise HungUp("%s hung up" % self)
        self._ahead += data

    def read_exactly(self, count: int) -> bytes:
        """Return exactly `count` bytes.  Raises NetworkError."""
        while len(self._ahead) < count:
            self._more()
        data, self._ahead = self._ahead[:count], self._ahead[count:]
        return data

    def rest(self) -> bytes:
        """Return, and forget, what has been read ahead."""
        data, self._ahead = self._ahead, b""
        return data

    def read_line(self) -> bytes:
        """Return a line without its end.  Raises NetworkError."""
        while b"\n" not in self._ahead:
            if len(self._ahead) > MAX_HEAD:
                raise NetworkError("%s sends no end of line" % self)
            self._more()
        line, _, self._ahead = self._ahead.partition(b"\n")
        return line.rstrip(b"\r")

    def reply(self) -> Reply:
        """Wait for the head of the answer.  Raises NetworkError, TimedOut."""
        head = b"HTTP/1.1 100 "
        while re.match(br"^HTTP/1\.[01] 1\d\d ", head):  # not yet the answer
            while b"\r\n\r\n" not in self._ahead:
                if len(self._ahead) > MAX_HEAD:
                    raise NetworkError("%s sends no end of its head" % self)
                self._more()
            head, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        try:
            line, headers = parse_head(head)
        except BadRequest as error:
            raise NetworkError("%s: %s" % (self, error))
        match = _STATUS_LINE.match(line)
        if not match:
            raise NetworkError("%s does not speak HTTP: %.40r" % (self, line))
        self.fresh = False
        return Reply(self, int(match.group(2)), headers, match.group(1) == "0")


class Follower:
    """The place behind an answer that is about to end: who takes it sends his request at once, and reads when it is his turn.

    So the server goes on without a pause, and the connection keeps its pace.
    """

    def __init__(self, link: HttpLink) -> None:
        self.link = link
        self.taken = False
        self.usable = True  # the next answer on the connection will be the taker's
        self.turn = threading.Event()


class Pool:
    """Kept-alive connections to many servers, for many threads.  _lock guards _idle, _busy, _ended and the followers."""

    KEEP = 4  # idle connections kept for one server
    TURN_S = 60.0  # longest wait behind another answer

    def __init__(self, timeout_s: float = 10.0, connect_s: float = 3.0) -> None:
        self.timeout_s, self.connect_s = timeout_s, connect_s  # of silence, of connecting
        self._lock = threading.Lock()
        self._idle = collections.defaultdict(list)  # type: Dict[Tuple[str, int], List[HttpLink]]
        self._busy = set()  # type: Set[HttpLink]
        self._ended = False

    def open(self, host: str, port: int, method: str, target: str, headers: Any = (), body: bytes = b"",
             timeout_s: float = 0.0) -> Tuple[HttpLink, Reply]:
        """Send a request and return the connection with the head of the answer; give it back with `done`.

        `timeout_s` is the silence allowed in this one exchange.  A kept connection that the server has meanwhile closed
        is replaced.  Raises NetworkError, TimedOut.
        """
        while True:
            link = self._behind(host, port, (method, target, headers, body))
            ahead = link is not None
            link = link or self._link(host, port)
            kept = not link.fresh
            try:
                link.set_timeout(timeout_s or self.timeout_s)
                if not ahead:
                    link.send(method, target, headers, body)
                return link, link.reply()
            except NetworkError as error:
                self.done(link, None)
                if not kept or self._ended or isinstance(error, TimedOut):
                    raise

    def ending(self, link: HttpLink, reply: Reply) -> None:
        """Let another thread send its request on `link` already, whose answer is about to end."""
        with self._lock:
            if reply.keep and reply.length is not None:
                link.follower = Follower(link)

    def _behind(self, host: str, port: int, request: Any) -> Optional[HttpLink]:
        """Send a request behind an answer that is about to end, wait for that, and return the connection; None if there is none."""
        with self._lock:
            found = next((link.follower for link in self._busy if link.follower and not link.follower.taken
                          and (link.host, link.port) == (host, port)), None)
            if not found:
                return None
            found.taken = True
        try:
            found.link.send(*request)
        except NetworkError:  # whoever reads in front meets the same
            found.usable = False
        ours = found.turn.wait(self.TURN_S)
        with self._lock:
            ours = ours and found.usable
            found.usable = False  # if the answer in front ends later than that, nobody waits for it any more
        return found.link if ours else None

    def ask(self, host: str, port: int, method: str, target: str, headers: Any = (), body: bytes = b"") -> Tuple[int, bytes]:
        """Send a request and return (status, body).  Raises NetworkError, TimedOut."""
        link, reply = self.open(host, port, method, target, headers, body)
        try:
            return reply.status, reply.body()
        finally:
            self.done(link, reply)

    def _link(self, host: str, port: int) -> HttpLink:
        """Return an idle connection or a new one.  Raises NetworkError, TimedOut."""
        with self._lock:
            links = self._idle[host, port]
            link = links.pop() if links else None
        link = link or HttpLink(host, port, self.timeout_s, self.connect_s)
        with self._lock:
            self._busy.add(link)
            ended = self._ended
        if ended:
            self.done(link, None)
            raise NetworkError("%s: no longer wanted" % link)
        return link

    def done(self, link: HttpLink, reply: Optional[Reply]) -> None:
        """Keep the connection if it can be used again, else (and without a reply) hang up."""
        with self._lock:
            good = bool(reply and reply.reusable and not self._ended)
            follower, link.follower = link.follower, None
            if follower and follower.taken:
                follower.usable = good = good and follower.usable
                follower.turn.set()
                if good:
                    return
            self._busy.discard(link)
            links = self._idle[link.host, link.port]
            if good and len(links) < self.KEEP:
                links.append(link)
                return
        link.close()

    def interrupt(self) -> None:
        """Wake every thread that waits on one of these connections, with an error, and refuse new ones."""
        with self._lock:
            self._ended = True
            for link in self._busy:
                link.interrupt()

    def close(self) -> None:
        """Hang up on everybody that nobody is talking to."""
        with self._lock:
            for links in self._idle.values():
                for link in links:
                    link.close()
            self._idle.clear()


def ask_json(pool: Pool, node: Node, method: str, target: str, data: Any = None, who: str = "supernode") -> Dict[str, Any]:
    """Return what a program of ours answers.  Raises NetworkError, and BadRequest where it refuses."""
    body = b"" if data is None else json.dumps(data).encode()
    try:
        code, text = pool.ask(node.host, node.port, method, target, [("Content-Type", "application/json")] if body else (), body)
    except NetworkError as error:
        raise type(error)("%s %s" % (who, error))
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError):
        found = None
    if code < 400 and isinstance(found, dict):
        return found
    if isinstance(found, dict) and (found.get("message") or found.get("msg")):
        raise BadRequest("%s %s answers %d: %.300s" % (who, node, code, found.get("message") or found.get("msg")))
    raise NetworkError("%s %s answers %d: %.200s" % (who, node, code, text.decode("utf-8", "replace")))


# ==============================================================================
# 9. Store
#    A task's bytes on disk and the journal that says which of them are true.  The
#    same class on supernode and peer.  Knows pieces and files; knows no peers, no
#    HTTP.
# ==============================================================================


class TaskFile:
    """A task's plain file, growing or finished, and its journal.

    The journal is text, a line a fact, each line closed by its own CRC-32, so that what a SIGKILL tore off is seen:
    `task {json}` first, then `length N`, `piece NUM LENGTH SHA256 CRC`.  A piece is journalled after it is written;
    what the journal says after a restart is a claim that `verify` tests.  _lock guards everything with a leading
    underscore.  One process writes; others may `attach` to read along.
    """

    MD5S = 32  # wrapped pieces that are digested together once the old wire wants one of them

    def __init__(self, data: str, journal: str, about: Dict[str, Any], length: Optional[int], piece_size: int) -> None:
        self.data, self.journal = data, journal  # paths
        self.about = about  # what the bytes belong to: task, url, version; all JSON
        self.layout = Layout(length, piece_size)
        self.have = 0  # bit mask of the pieces that are here and true
        self.reread = 0  # mask of those that were read back from the file after they were written
        self.on_news = None  # type: Optional[Callable[[], None]]  # told of each piece, and of the length
        self._lock = threading.Lock()
        self._seals = {}  # type: Dict[int, Seal]
        self._md5s = {}  # type: Dict[int, str]
        self._fd = -1
        self._journal_fd = -1
        self._journal_inode = 0  # which journal a reader has read,
        self._read_to = 0  # and how far

    # -- beginnings -----------------------------------------------------------

    @classmethod
    def create(cls, data: str, journal: str, about: Dict[str, Any], length: Optional[int], piece_size: int) -> "TaskFile":
        """Return a new, empty one in place of whatever was there.  Raises NoSpace, CannotWrite."""
        self = cls(data, journal, about, length, piece_size)
        try:
            self._own(os.O_RDWR | os.O_CREAT)
            os.ftruncate(self._fd, 0)
            self._rewrite()
        except (OSError, DflyError) as error:
            if self._fd >= 0:  # else it is another's
                self.delete()
            self.close()
            raise os_error(error, data) if isinstance(error, OSError) else error
        return self

    @classmethod
    def resume(cls, data: str, journal: str) -> Optional["TaskFile"]:
        """Return what an earlier process left, its pieces still only claimed (`claimed`); None if nothing usable.
        Raises CannotWrite while another process writes it."""
        self = cls(data, journal, {}, None, MIB)
        try:
            self._own(os.O_RDWR)
            self.refresh()
        except OSError:
            self.close()
            return None
        except CannotWrite:
            self.close()
            raise
        if not self.about:
            self.close()
            return None
        self.have = 0
        return self

    @classmethod
    def attach(cls, data: str, journal: str) -> "TaskFile":
        """Return a reader of a file that another process of this host writes.  Raises CannotWrite."""
        self = cls(data, journal, {}, None, MIB)
        try:
            self._fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
            self.refresh()
        except OSError as error:
            self.close()
            raise os_error(error, data)
        return self

    def _own(self, flags: int) -> None:
        """Open the file as the one process that writes it.  Raises CannotWrite while another does, OSError."""
        try:
            self._fd = open_owned(self.data, flags)
        except BlockingIOError:
            raise CannotWrite("%s: another download is writing it; wait for that one, or choose another output" % self.data)

    def close(self) -> None:
        """Let go of the files; they stay."""
        with self._lock:
            if self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # an answer under way may have a descriptor of its own, which would keep it
            for fd in (self._fd, self._journal_fd):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._journal_fd = -1

    def delete(self) -> None:
        """Remove data and journal from the disk, the data last and still ours: whoever owns the next one has a journal of his own."""
        remove(self.journal)
        remove(self.data)
        self.close()

    # -- the journal -----------------------------------------------------------

    @staticmethod
    def _line(text: str) -> bytes:
        data = text.encode()
        return data + b" %08x\n" % zlib.crc32(data)

    @staticmethod
    def _piece_line(num: int, seal: Seal) -> bytes:
        return TaskFile._line("piece %d %d %s" % (num, seal.length, seal.sha256))

    def _rewrite(self) -> None:
        """Write the journal anew with just what is true now.  Raises OSError, CannotWrite."""
        with self._lock:
            lines = [self._line("task " + json.dumps(dict(self.about, piece_size=self.layout.size), sort_keys=True))]
            if self.layout.length is not None:
                lines.append(self._line("length %d" % self.layout.length))
            lines += [self._piece_line(num, seal) for num, seal in sorted(self._seals.items())]
            old, self._journal_fd = self._journal_fd, -1  # whatever becomes of the new one
            if old >= 0:
                os.close(old)
            write_whole(self.journal, b"".join(lines))
            self._journal_fd = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _append_locked(self, line: bytes) -> None:
        if self._journal_fd < 0:
            return
        try:
            if os.write(self._journal_fd, line) != len(line):
                raise NoSpace(self.journal)
        except OSError as error:
            raise os_error(error, self.journal)

    def refresh(self) -> None:
        """Read what the journal has gained; stop before the first line that is torn or not ours.  Raises OSError."""
        with self._lock:
            with open(self.journal, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._journal_inode:  # written anew: what was dropped is not in it
                    self._journal_inode, self._read_to, self.have = inode, 0, 0
                file.seek(self._read_to)
                for raw in file:
                    text, _, check = raw[:-1].rpartition(b" ")
                    if raw[-1:] != b"\n" or check != b"%08x" % zlib.crc32(text) or not self._replay_locked(text.decode()):
                        break
                    self._read_to += len(raw)

    def _replay_locked(self, text: str) -> bool:
        kind, _, rest = text.partition(" ")
        if kind == "task":
            self.about = json.loads(rest)
            self.layout = Layout(None, self.about.pop("piece_size"))
        elif kind == "length":
            self.layout = Layout(int(rest), self.layout.size)
        elif kind == "piece":
            num, length, sha256 = rest.split(" ")
            self._seals[int(num)] = Seal(sha256, int(length))
            self.have |= 1 << int(num)
        return kind in ("task", "length", "piece")

    # -- facts -------------------------------------------------------------------

    @property
    def claimed(self) -> int:
        """How many pieces the journal speaks of."""
        return len(self._seals)

    @property
    def complete(self) -> bool:
        """Whether the length is known and every piece is here."""
        return self.layout.count is not None and self.have == (1 << self.layout.count) - 1

    @property
    def kept_bytes(self) -> int:
        """How many plain bytes are here and true."""
        with self._lock:
            return sum(seal.length for seal in self._seals.values())

    def seal(self, num: int) -> Optional[Seal]:
        """Return the digests of piece `num`, None while it is not here."""
        return self._seals.get(num) if self.have >> num & 1 else None

    def missing(self) -> int:
        """Return the bit mask of the pieces that are not here; the length must be known."""
        assert self.layout.count is not None
        return (1 << self.layout.count) - 1 & ~self.have

    def note(self, **facts: str) -> None:
        """Note what has become known of the file, as which `version` it is.  Raises NoSpace, CannotWrite."""
        if any(self.about.get(name, "") != value for name, value in facts.items()):
            self.about = dict(self.about, **facts)
            try:
                self._rewrite()
            except OSError as error:
                raise os_error(error, self.journal)

    def set_length(self, length: int) -> None:
        """Note the file's length, once it is known, and cut the file to it.  Raises NoSpace, CannotWrite."""
        with self._lock:
            if self.layout.length == length:
                return
            self.layout = Layout(length, self.layout.size)
            self._append_locked(self._line("length %d" % length))
        if self.on_news:
            self.on_news()

    def reserve(self) -> bool:
        """Have the disk keep room for the whole file; return whether it can.  Raises NoSpace, CannotWrite."""
        try:
            return reserve_bytes(self._fd, self.layout.length or 0)
        except OSError as error:
            raise os_error(error, self.data)

    def need_space(self) -> None:
        """Check that the rest of the file fits on the disk.  Raises NoSpace."""
        if self.layout.length is None:
            return
        folder = os.path.dirname(os.path.abspath(self.data))
        need, free = self.layout.length - os.fstat(self._fd).st_blocks * 512, free_bytes(folder)
        if need > free:
            raise NoSpace(folder, need, free)

    # -- bytes -------------------------------------------------------------------

    def write(self, offset: int, plain: Any) -> None:
        """Write plain bytes at an offset; they count only once `seal_piece` has been called.
        Raises NoSpace, CannotWrite."""
        try:
            put_bytes(self._fd, offset, plain)
        except OSError as error:
            raise os_error(error, self.data)

    def pour(self, source: Any, funnel: Funnel, offset: int, count: int) -> int:
        """Write at most `count` bytes of an answer (Reply or OriginReply) at an offset, as they come; return how many, 0 at its end.

        They count only once `seal_piece` has been called.  Raises NoSpace, CannotWrite, and what the answer raises.
        """
        done, wrong = source.pour(funnel, self._fd, offset, count)
        if wrong:
            raise os_error(wrong, self.data)
        return int(done)

    def digest(self, num: int, length: int) -> Seal:
        """Return the seal of what the file now has in the place of piece `num`: who compares that has checked what came and what
        was written in one.  Raises CannotRead."""
        message = b"", (self._fd, num * self.layout.stride, length), b""
        try:
            return Seal(self._whole(BATCHES.sha256(message)).hex(), length)
        except OSError as error:  # also when the file has been let go of meanwhile
            raise CannotRead("%s: %s" % (self.data, error.strerror))

    def wrapped_digest(self, num: int, length: int) -> str:
        """Return `<md5>:<len>` of the same, wrapped.  Raises NoMd5, CannotRead.  Wire: 3.2"""
        return self._wrapped_digests([(num, length)])[0]

    def _wrapped_digests(self, pieces: List[Tuple[int, int]]) -> List[str]:
        """Return those of pieces, each (number, length), digested together."""
        layout = self.layout
        messages = [(piece_head(length, layout.size), (self._fd, num * layout.stride, length), TAIL) for num, length in pieces]
        try:
            return ["%s:%d" % (self._whole(digest).hex(), length + WRAP) for digest, (_, length) in zip(digest_many("md5", messages), pieces)]
        except OSError as error:  # also when the file has been let go of meanwhile
            raise CannotRead("%s: %s" % (self.data, error.strerror))

    def _whole(self, digest: bytes) -> bytes:
        if not digest:
            raise CannotRead("%s: the file is shorter than it was" % self.data)
        return digest

    def seal_piece(self, num: int, seal: Seal, reread: bool = False) -> None:
        """Declare that piece `num` has been written (or read back, if `reread`) and has this seal.  Raises NoSpace, CannotWrite."""
        with self._lock:
            self._append_locked(self._piece_line(num, seal))
            self._seals[num] = seal
            self._md5s.pop(num, None)
            self.have |= 1 << num
            self.reread = self.reread & ~(1 << num) | reread << num
        if self.on_news:
            self.on_news()

    def drop(self, nums: List[int]) -> None:
        """Forget pieces that turned out to be wrong.  Raises CannotWrite."""
        with self._lock:
            for num in nums:
                self._seals.pop(num, None)
                self.have &= ~(1 << num)
        try:
            self._rewrite()
        except OSError as error:
            raise os_error(error, self.journal)

    def _read(self, offset: int, length: int) -> Iterator[Any]:
        """Yield bytes of the file as `read_fd` does.  Raises CannotRead."""
        try:
            yield from read_fd(self._fd, offset, length)
        except OSError as error:
            raise CannotRead("%s: %s" % (self.data, error.strerror))

    def read_back(self, nums: Iterable[int], on_piece: Callable[[int], None] = lambda num: None) -> List[int]:
        """Read pieces back from the disk, and note and return which are not, or no longer, what their seals say.

        `on_piece` is told of each that is, as it is found.  Each processor takes as many at once as it can digest together.  Raises CannotRead.
        """
        claims = [(num, self._seals.get(num)) for num in nums]
        wrong = [num for num, seal in claims if not seal]
        sealed = [(num, seal) for num, seal in claims if seal]
        most = 16 if WORTH.get("sha256", 99) <= 16 else 1
        batches = [sealed[at:at + most] for at in range(0, len(sealed), most)]
        for batch, digests in zip(batches, each_processor(self._sha256s, batches)):
            for (num, seal), digest in zip(batch, digests):
                right = digest.hex() == seal.sha256
                with self._lock:
                    self.reread = self.reread | 1 << num if right else self.reread & ~(1 << num)
                if right:
                    on_piece(num)
                else:
                    wrong.append(num)
        return wrong

    def _sha256s(self, claims: List[Tuple[int, Seal]]) -> List[bytes]:
        try:
            return digest_many("sha256", [(b"", (self._fd, num * self.layout.stride, seal.length), b"") for num, seal in claims])
        except OSError as error:  # also when the file has been let go of meanwhile
            raise CannotRead("%s: %s" % (self.data, error.strerror))

    def verify(self, on_piece: Callable[[int], None] = lambda num: None) -> int:
        """Digest every claimed piece of a resumed file again, keep what is true, and return how many were not.

        `on_piece` is told of each true piece as it is found.  Raises CannotRead, CannotWrite.
        """
        def keep(num: int) -> None:
            with self._lock:
                self.have |= 1 << num
            on_piece(num)

        claimed = sorted(self._seals)
        fitting = [num for num in claimed if num < (self.layout.count or MAX_COUNT) and self._seals[num].length == self.layout.content_range(num)[1]]
        wrong = self.read_back(fitting, keep)
        wrong += set(claimed).difference(fitting)
        self.drop(wrong)
        return len(wrong)

    def wrapped_md5(self, num: int) -> str:
        """Return `<md5>:<len>` of the wrapped piece `num`, which the old wire wants.  Raises NoMd5, NoSuchPiece.  Wire: 3.2"""
        if num not in self._md5s:
            nums, most = [num], min(self.MD5S, (64 << 20) // self.layout.size) if LANES else 1  # one after the other there is nothing to win
            nums += [other for other in range(num + 1, num + most) if self.have >> other & 1 and other not in self._md5s]
            self._md5s.update(zip(nums, self._wrapped_digests([(other, self.layout.content_range(other)[1]) for other in nums])))
        return self._md5s[num]

    def wrapped_body(self, start: int, end: int) -> List[Any]:
        """Return bytes [start, end) of the wrapped file as segments of an answer.

        Raises NoSuchPiece where a piece of them is not here.  Wire: 5.3
        """
        layout, parts = self.layout, []  # type: Layout, List[Tuple[bytes, int, int]]
        for num in range(start // layout.size, (end - 1) // layout.size + 1):
            if not self.have >> num & 1:
                raise NoSuchPiece("piece %d is not here" % num)
            base = num * layout.size
            wrapped = layout.content_range(num)[1] + WRAP
            parts += layout.spans(num, max(start - base, 0), min(end - base, wrapped))
        return self._segments(parts)

    def plain_body(self, start: int, end: int) -> List[Any]:
        """Return bytes [start, end) of the plain file as segments of an answer.  Raises NoSuchPiece."""
        return self._segments([(b"", start, end - start)])

    def _segments(self, parts: List[Tuple[bytes, int, int]]) -> List[Any]:
        """Return bytes, and (b"", offset, count) of the file, as segments of an answer.  Raises NoSuchPiece."""
        last = max((i for i, part in enumerate(parts) if part[2] > 0), default=-1)
        try:
            fd = os.dup(self._fd) if last >= 0 else -1
        except OSError:
            raise NoSuchPiece("the file is no longer here")
        return [FileSpan(fd, offset, count, i == last) if count > 0 else data for i, (data, offset, count) in enumerate(parts)]

    def read_plain(self, num: int) -> Iterator[Any]:
        """Yield the plain bytes of piece `num`, some at a time."""
        return self._read(*self.layout.content_range(num))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, fewer at its end.  Raises CannotRead."""
        return b"".join(bytes(view) for view in self._read(offset, length))

    def stamp(self) -> Tuple[int, int, int]:
        """Return what changes when somebody edits the file: size, time of change, inode."""
        stat = os.fstat(self._fd)
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def publish(self, path: str, mode: int) -> None:
        """Give the finished file its name.  The descriptor stays, and goes on being served.  Raises CannotWrite."""
        try:
            if os.fstat(self._fd).st_size != self.layout.length:  # an equal one would touch the time of change
                os.ftruncate(self._fd, self.layout.length or 0)
            os.fchmod(self._fd, mode)
            os.rename(self.data, path)
        except OSError as error:
            raise os_error(error, path)
        self.data = path
        remove(self.journal)


class Md5Follower:
    """Computes the MD5 of a whole file behind its growth, on a thread of its own, since only the old wire and --md5
    want it and it is the slowest thing we ever do to a byte.  Call `nudge` when pieces arrive, and `stop` before the
    store is closed."""

    def __init__(self, store: TaskFile, on_done: Callable[[], None] = lambda: None) -> None:
        self._store, self._on_done = store, on_done
        self._md5 = new_md5()
        self._event = threading.Event()
        self._stopping = False
        self.digest = ""  # hex, once the last piece is in
        self._thread = threading.Thread(target=self._run, name="dfly-md5", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Look for new pieces."""
        self._event.set()

    def stop(self, limit_s: float = 10.0) -> None:
        """Give up; when this returns (unless the disk takes more than `limit_s` for a piece), nobody reads the store any more."""
        self._stopping = True
        self._event.set()
        self._thread.join(limit_s)

    def wait(self) -> str:
        """Return the digest of the file, all of whose pieces must be here; "" when it can't be read."""
        assert self._store.complete
        self._event.set()
        self._thread.join()
        return self.digest

    def _run(self) -> None:
        num, store = 0, self._store
        while not self._stopping and (store.layout.count is None or num < store.layout.count):
            if not store.have >> num & 1:
                self._event.wait(1.0)
                self._event.clear()
                continue
            try:
                for data in store.read_plain(num):
                    self._md5.update(data)
            except (CannotRead, NoSuchPiece):  # whoever asks finds no digest
                return
            num += 1
        if not self._stopping:
            self.digest = self._md5.hexdigest()
            self._on_done()


class ReadAlong:
    """A file that others read from its beginning while it grows, its end only when its digest is right.  One thread writes the
    store, one runs `digest_along`, any number wait in `sendable`.  _changed guards everything with an underscore."""

    PROGRESS_S = 30.0  # without a byte more, before those that wait are sent elsewhere
    HELD = 1 << 20  # bytes of the end that wait for the digest; a smaller file does as a whole

    def __init__(self, name: str, digest: str) -> None:
        self.name, self.digest = name, digest  # SHA-256 of the file; "": whatever comes is right
        self._changed = threading.Condition()
        self._store = None  # type: Optional[TaskFile]
        self._spans = []  # type: List[FileSpan]  # descriptors of the stores so far; the last one is in use
        self._passed = 0  # bytes that are here without a gap, and digested
        self._length = None  # type: Optional[int]
        self._right = False  # all is here, and has the digest
        self._error = None  # type: Optional[DflyError]
        self._news = threading.Event()  # there may be new pieces

    # -- who writes -----------------------------------------------------------

    def follow(self, store: Any) -> None:
        """Take what `store` gains from now on.  Raises NoSuchPiece."""
        with self._changed:
            if store is self._store:
                return
            if self._passed:
                self._error = self._error or SourceChanged("%s: the origin has another file now" % self.name)
            self._spans += [span for span in store.plain_body(0, 1) if isinstance(span, FileSpan)]
            self._store, self._passed, self._length = store, 0, None
            self._changed.notify_all()
        store.on_news = self._news.set
        self._news.set()

    def fail(self, error: DflyError) -> None:
        """There will be no more."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._news.set()

    def digest_along(self) -> None:
        """Digest the file in its order while it grows, until it ends or the download has failed: what has passed here may be sent."""
        store, at, digest = None, 0, hashlib.sha256()
        buffer = memoryview(bytearray(1 << 18))
        while not self.over:
            if self._store is not store:
                store, at, digest = self._store, 0, hashlib.sha256()
            self._news.clear()
            count = self._next(store, at, buffer)
            if self.digest:
                digest.update(buffer[:count])
            at += count
            with self._changed:
                if store is self._store and store:
                    self._passed, self._length = at, store.layout.length
                    if at == self._length and not self._error:
                        self._judge_locked(digest.hexdigest())
                self._changed.notify_all()
            if not (count or self.over):
                self._news.wait(1.0)

    def _next(self, store: Optional[TaskFile], at: int, buffer: Any) -> int:
        """Fill a buffer with the next bytes of the file; return how many, 0 while they are not here."""
        num = at // store.layout.stride if store else 0
        if not store or not store.have >> num & 1:
            return 0
        try:
            offset, length = store.layout.content_range(num)
            return read_into(self._spans[-1].fd, at, buffer[:offset + length - at])
        except NoSuchPiece:
            return 0
        except OSError as error:
            self.fail(CannotRead("%s: %s" % (self.name, error.strerror)))
            return 0

    def _judge_locked(self, digest: str) -> None:
        if self.digest and digest != self.digest:
            self._error = WrongBytes(self.name, self.digest, digest)
        self._right = not self._error

    @property
    def over(self) -> bool:
        """Whether all that can come has come."""
        return self._right or self._error is not None

    @property
    def error(self) -> Optional[DflyError]:
        """Why there is no more of it."""
        return None if self._right else self._error

    # -- who reads ------------------------------------------------------------

    def length(self, gone: Callable[[], bool]) -> int:
        """Wait until something of it may be sent, and return its length in bytes.  Raises as `sendable`."""
        self.sendable(0, gone)
        with self._changed:
            assert self._length is not None
            return self._length

    def sendable(self, at: int, gone: Callable[[], bool]) -> Tuple[int, int]:
        """Wait until bytes from `at` on may be sent; return the descriptor to send from, and up to which.

        Raises what the download has ended with, Stalled, NetworkError when the client is `gone`.
        """
        passed, deadline = -1, 0.0
        while True:
            with self._changed:
                limit = self._limit_locked()
                if self._length is not None and (limit > at or self._right):
                    return self._spans[-1].fd, limit
                if self._error:
                    raise self._error
                if self._passed != passed:
                    passed, deadline = self._passed, time.monotonic() + self.PROGRESS_S
                self._changed.wait(1.0)
            if gone():
                raise NetworkError("the client has hung up")
            if time.monotonic() > deadline:
                raise Stalled("%s: not a byte within %g s" % (self.name, self.PROGRESS_S))

    def _limit_locked(self) -> int:
        if self._right or not self.digest:
            return self._passed
        return max(0, min(self._passed, (self._length or 0) - self.HELD))

    @property
    def version(self) -> str:
        """What the origin says of the file's version."""
        return self._store.about.get("version", "") if self._store else ""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes of what has come of it.  Raises CannotRead."""
        try:
            return os.pread(self._spans[-1].fd, length, offset)
        except OSError as error:
            raise CannotRead("%s: %s" % (self.name, error.strerror))

    def progress(self) -> Dict[str, Optional[int]]:
        """Return how many bytes have come without a gap, and how many there will be (None: not known yet)."""
        with self._changed:
            return {"bytes": self._passed, "length": self._length}

    def close(self) -> None:
        """Give the descriptors back; when nobody reads or writes any more."""
        for span in self._spans:
            span.close()


# ==============================================================================
# 10. Origin
#    Everything that is asked of the source station: whole, ranged and conditional
#    GET, redirects, proxies, headers, TLS; and reading a body into pieces.
#    By urllib, which is imported only where an origin is really asked.
# ==============================================================================

class Fence:
    """Which origins are fetched from; a supernode does so for strangers.  Wire: 16 (3)"""

    #: Addresses that only ever lead to a machine's own secrets: link-local ones, and where clouds keep a machine's data.
    METADATA = "169.254.0.0/16, fe80::/10, 100.100.100.200, 192.0.0.192, 168.63.129.16, fd00:ec2::254"

    def __init__(self, allow: Optional[HostList] = None, deny: Optional[HostList] = None) -> None:
        self._allow, self._deny, self._never = allow or HostList(""), deny or HostList(""), HostList(self.METADATA)

    def check(self, name: str, addresses: Any) -> None:
        """Raise SourceError unless the host `name`, found at all these addresses, may be asked."""
        if any(self._never.has_address(address) for address in addresses):
            why = "link-local and metadata addresses are not fetched for others"
        elif self._deny.has_name(name) or any(self._deny.has_address(address) for address in addresses):
            why = "this supernode has it among those that are not fetched (deny-origins)"
        elif self._allow and not self._allow.has_name(name) and not (addresses and all(self._allow.has_address(a) for a in addresses)):
            why = "this supernode has it not among those that alone are fetched: not fetched (allow-origins)"
        else:
            return
        raise SourceError("%s: %s" % (name, why), 403)


def request_url(url: str) -> Tuple[str, str]:
    """Return `url` as HTTP can carry it, and the `Authorization` that a user and password in it make ("" without).

    Raises BadRequest.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 raises where there is none such
    except ValueError as error:
        raise BadRequest("not an http(s) URL: %.200r: %s" % (url, error))
    user, at, host = parts.netloc.rpartition("@")
    before, _, after = url.partition(parts.netloc)
    asked = before + host + quote(after, safe="%/?:@!$&'()*+,;=~#[]|^{}`\\\"<>", errors="surrogateescape")
    if not at:
        return asked, ""
    import base64
    pair = unquote(user if ":" in user else user + ":")
    return asked, "Basic " + base64.b64encode(pair.encode("utf-8", "surrogateescape")).decode()


def tls_context(insecure: bool, cacerts: Any) -> Any:
    """Return what makes TLS trust these CAs too (paths of PEM files, or PEM text), or anybody.  Raises BadUsage.

    It is kept, until one of the files changes: to read the system's CAs takes longer than many a request.
    """
    import ssl
    system = ssl.get_default_verify_paths()
    files = [ca for ca in cacerts if "-----BEGIN" not in ca] + [path for path in (system.cafile, system.capath) if path]
    return _tls_context(insecure, tuple(cacerts), tuple(os.stat(path).st_mtime_ns for path in files if os.path.exists(path)))


@functools.lru_cache(maxsize=64)
def _tls_context(insecure: bool, cacerts: Tuple[str, ...], _stamps: Tuple[int, ...]) -> Any:
    import ssl
    context = ssl.create_default_context()
    for ca in cacerts:
        try:
            context.load_verify_locations(**({"cadata": ca} if "-----BEGIN" in ca else {"cafile": ca}))
        except (OSError, ssl.SSLError) as error:
            raise BadUsage("--cacerts %.80s: %s" % (ca, error.strerror or error))
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def seconds_until(retry_after: str) -> Optional[float]:
    """Return the seconds that a Retry-After header asks for, None where it says nothing that can be understood."""
    import email.utils
    if re.match(r"^\d{1,9}$", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.mktime_tz(email.utils.parsedate_tz(retry_after)) - time.time())  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


class Origin:
    """A URL with everything needed to ask for it.  Immutable; used by any thread."""

    TIMEOUT_S = 30.0

    def __init__(self, url: str, headers: Any = (), insecure: bool = False, cacerts: Any = (), fence: Optional[Fence] = None,
                 timeout_s: float = TIMEOUT_S, content: str = "") -> None:
        self.url = url
        self.timeout_s = timeout_s  # without a byte
        self.content = content  # as content_of says it: then that is the only version there is
        self.headers = collections.OrderedDict()  # type: Dict[str, str]
        for name, value in headers:
            known = next((k for k in self.headers if k.lower() == name.lower()), name)
            self.headers[known] = self.headers[known] + "," + value if known in self.headers else value
        self._asked, basic = request_url(url)
        if basic and not self.header("authorization"):
            self.headers["Authorization"] = basic
        self.insecure = insecure  # whatever certificate it has is good
        self.cacerts = tuple(cacerts)  # more CAs: paths of PEM files, or PEM text
        self.fence = fence  # which hosts may be asked; None: all
        given = self.header("range")
        match = re.match(r"^bytes=(\d{1,18})-(\d{0,18})$", given)
        self.base = int(match.group(1)) if match else 0  # where in the origin's file our file begins
        self.limit = int(match.group(2)) + 1 if match and match.group(2) else None  # and where it ends
        if given and (not match or (self.limit is not None and self.limit <= self.base)):
            raise BadRequest("Range: %.80r can't be downloaded: say bytes=FIRST-LAST or bytes=FIRST-" % given)

    def header(self, name: str) -> str:
        """Return a header that the user gave, "" if he did not."""
        return next((value for key, value in self.headers.items() if key.lower() == name), "")

    def credentials(self) -> str:
        """Return a fingerprint of what this asker would show the origin.  Two equal ones may read the same."""
        shown = sorted((k.lower(), v) for k, v in self.headers.items() if k.lower() not in ("range", "user-agent", "accept", "x-forwarded-for"))
        if self.content:  # many repositories may have it, and each judges for itself
            shown.append(("url", self.url.partition("?")[0]))
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest() if shown else ""

    def trust(self) -> str:
        """Name what is believed instead of the system's certificate authorities, "" where that is nothing.

        It makes a task of its own: who trusts less must not get what was fetched by trusting more.  Wire: 16 (9)
        """
        if self.content or not self.url.lower().startswith("https:") or not (self.insecure or self.cacerts):
            return ""
        return "\0insecure" if self.insecure else "\0" + hashlib.sha256("\0".join(self.cacerts).encode("utf-8", "surrogateescape")).hexdigest()

    def vouch(self, headers: Any = ()) -> "OriginReply":
        """Ask whether it would give the file to this asker; return the head of its answer.  Raises as `open`."""
        try:
            reply = self.open(headers=headers, method="HEAD")
        except SourceError as refusal:
            if refusal.status not in (403, 405, 501):
                raise
            reply = self.open(headers=headers) if headers else self.open(0, 1)  # no HEAD here, or a signature that is for GET only
        reply.close()
        return reply

    def prove(self, start: int, end: int, read_at: Callable[[int, int], bytes]) -> None:
        """Ask for some of the bytes [start, end), which `read_at` reads (offset, length): anybody can say that he has a file, and would
        give it.  Raises SourceError as `open` and where they are others, and what `read_at` raises."""
        if start >= end:
            self.vouch()
            return
        at = start + random.randrange(max(1, end - start - (1 << 14)))
        end = min(at + (1 << 14), end)
        reply, found = self.open(at, end), bytearray(end - at)
        try:
            count, more = 0, 1
            while more and count < len(found):
                more = reply.read_into(memoryview(found)[count:])
                count += more
        finally:
            reply.close()
        if reply.start != at or found[:count] != read_at(at, end - at):
            raise SourceError("%s: it says that it has %s, but sends something else" % (self.url, self.content))

    def open(self, start: int = 0, end: Optional[int] = None, headers: Any = (), method: str = "GET") -> "OriginReply":
        """Ask for bytes [start, end) (all, if both are left out) of our file; return the answer once its head is there.

        A 304 is an answer; other failures raise SourceError, NeedAuth, TlsError, TimedOut.
        """
        import http.client
        import ssl
        import urllib.error
        import urllib.request
        self.check_address()
        request = urllib.request.Request(self._asked, method=method)
        for name, value in list(self.headers.items()) + list(headers):
            if name.lower() not in ("range", "host", "accept-encoding", "content-length", "connection"):
                request.add_unredirected_header(name, value) if name.lower() in ("authorization", "cookie") else request.add_header(name, value)
        if not self.header("user-agent"):
            request.add_header("User-Agent", "dfly/" + VERSION)
        ranged = bool(start or end is not None or self.base or self.limit is not None)
        if ranged:
            stop = self.base + end if end is not None else self.limit
            request.add_header("Range", "bytes=%d-%s" % (self.base + start, "" if stop is None else stop - 1))
        try:
            response = self._opener(urllib.request).open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 304:
                return OriginReply(self, error, start, ranged)
            raise self._refusal(error.code, error.headers)
        except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError) as error:
            raise self._failure(getattr(error, "reason", error), ssl)
        return OriginReply(self, response, start, ranged)

    def _refusal(self, status: int, headers: Any) -> SourceError:
        if status in (401, 407):
            refusal = NeedAuth("%s: authentication needed (%d)" % (self.url, status), status)
            refusal.challenge = headers.get("WWW-Authenticate", "")
            return refusal
        if 300 <= status < 400:
            return SourceError("%s: redirects in a circle, or to no http(s) URL (%d)" % (self.url, status), status)
        retry_s = seconds_until(headers.get("Retry-After", ""))
        wish = "" if retry_s is None else " and wants to be asked again in %s" % show_time(retry_s)
        return SourceError("%s: the origin answers %d%s" % (self.url, status, wish), status, retry_s)

    def _failure(self, reason: Any, ssl: Any) -> DflyError:
        if isinstance(reason, socket.timeout) or "timed out" in str(reason):
            return SourceError("%s: the origin does not answer within %g s" % (self.url, self.timeout_s))
        if isinstance(reason, (ssl.SSLError, ssl.CertificateError)):
            return TlsError("%s: %s" % (self.url, getattr(reason, "verify_message", "") or getattr(reason, "reason", "") or reason))
        return SourceError("%s: %s" % (self.url, getattr(reason, "strerror", None) or reason or type(reason).__name__))

    def check_address(self) -> None:
        """Raise BadRequest, SourceError unless this is a URL that may be asked."""
        parts = urlsplit(self._asked)
        if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
            raise BadRequest("not an http(s) URL: %.200r" % self.url)
        if self.fence:
            try:
                found = {str(info[4][0]) for info in socket.getaddrinfo(parts.hostname, None)}
            except (OSError, UnicodeError):
                found = set()  # the request itself will say it better
            self.fence.check(parts.hostname, found)

    def _opener(self, urllib_request: Any) -> Any:
        https = urllib_request.HTTPSHandler(context=None if self.url.lower().startswith("http:") and not self.cacerts and not self.insecure
                                            else tls_context(self.insecure, self.cacerts))
        http, origin = urllib_request.HTTPHandler(), self
        if self.fence:
            for handler in (http, https):
                handler.do_open = self._fenced(handler.do_open)

        class Redirects(urllib_request.HTTPRedirectHandler):
            """Keeps credentials on the host they were given for, and looks at each new address."""

            def redirect_request(self, request: Any, reply: Any, code: int, *args: Any) -> Any:
                following = super().redirect_request(request, reply, 307 if code == 308 else code, *args)  # 3.11 is the first that knows 308
                if following is not None:
                    try:
                        Origin(following.full_url, fence=origin.fence).check_address()
                    except DflyError as error:
                        raise SourceError("%s: redirects to what is not fetched: %s" % (origin.url, error), getattr(error, "status", 0))
                    if urlsplit(following.full_url).netloc == urlsplit(request.full_url).netloc:
                        following.unredirected_hdrs.update(request.unredirected_hdrs)
                return following

            def http_error_302(self, request: Any, reply: Any, *args: Any) -> Any:
                try:
                    return super().http_error_302(request, reply, *args)
                except (DflyError, ValueError):  # urllib leaves the connection open
                    reply.close()
                    raise

            http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

        return urllib_request.build_opener(Redirects(), http, https)

    def _fenced(self, do_open: Any) -> Any:
        """Return a `do_open` of urllib that looks again whom it has reached: a name may lead elsewhere than a moment ago."""
        fence = self.fence or Fence()

        def fenced(connection: Any, request: Any, **how: Any) -> Any:
            class Fenced(connection):  # type: ignore[misc]
                """Says nothing before the other end is known."""

                def connect(self) -> None:
                    super().connect()
                    if not self._tunnel_host and not request.has_proxy():
                        fence.check(self.host, [self.sock.getpeername()[0]])

            return do_open(Fenced, request, **how)

        return fenced


class OriginReply:
    """An origin's answer: what file it is, where in our file its body begins, and the body."""

    HEAP = 1 << 16  # bytes that wake who pours it into a file, where they come fast

    def __init__(self, origin: Origin, response: Any, start: int, ranged: bool) -> None:
        self._origin, self._response = origin, response
        self._socket = None  # type: Optional[socket.socket]  # once nothing of the body is elsewhere
        self._brisk = False  # the last bytes that were poured came in no time
        self.headers = headers = response.headers
        self.status = response.code
        self.etag = headers.get("ETag", "")
        self.modified = headers.get("Last-Modified", "")
        self.ranges = headers.get("Accept-Ranges", "").lower() == "bytes"  # it says itself that it can begin in the middle
        length = headers.get("Content-Length", "")
        self.body_length = int(length) if re.match(r"^\d{1,18}$", length) and not headers.get("Transfer-Encoding") else None
        self.start = start if self.status == 206 else -origin.base  # of the body, in our file
        self.end = None if self.body_length is None else self.start + self.body_length  # None: not known
        self.length = self._whole_length(headers.get("Content-Range", ""))  # of our file; None: not known
        if self.status == 206 and ranged:
            match = re.match(r"^bytes (\d+)-", headers.get("Content-Range", ""))
            if not match or int(match.group(1)) != origin.base + start:
                self.close()
                raise SourceError("%s: asked from byte %d on, the origin sends %r" % (
                    origin.url, origin.base + start, headers.get("Content-Range", "")))

    def _whole_length(self, content_range: str) -> Optional[int]:
        match = re.match(r"^bytes \d+-\d+/(\d+)$", content_range) if self.status == 206 else None
        whole = int(match.group(1)) if match else self.body_length if self.status == 200 else None
        if whole is None:
            return None
        stop = whole if self._origin.limit is None else min(whole, self._origin.limit)
        return max(0, stop - self._origin.base)

    @property
    def version(self) -> str:
        """What tells this file from the next one under the same URL; "" when the origin says nothing of the kind."""
        if self._origin.content:
            return self._origin.content + "||"
        if not (self.etag or self.modified):
            return ""
        return "%s|%s|%s" % (self.etag, self.modified, "" if self.length is None else self.length)

    def read_into(self, view: Any) -> int:
        """Fill as much of `view` as comes; return the count, 0 at the end.  Raises SourceError."""
        return self._read(self._read_straight if self._socket else self._response.readinto, view)

    def _read(self, readinto: Callable[[Any], int], view: Any) -> int:
        import http.client
        try:
            return readinto(view)
        except (BlockingIOError, socket.timeout):
            raise self._silent()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SourceError("%s: %s" % (self._origin.url, getattr(error, "strerror", None) or error or type(error).__name__))

    def _read_straight(self, view: Any) -> int:
        """Read past Python's own buffer, since what goes into that is lost to who pours next."""
        assert self._socket
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)  # who poured may have wished for more than is left
        count = self._socket.recv_into(view[:self._response.length])
        self._response.length -= count
        return count

    def _silent(self) -> SourceError:
        return SourceError("%s: the origin has been silent for %g s" % (self._origin.url, self._origin.timeout_s))

    def pour(self, funnel: Funnel, fd: int, offset: int, count: int) -> Tuple[int, Optional[OSError]]:
        """Bring at most `count` bytes into a file at `offset`; return how many, 0 at the end, and what is wrong with the file.

        A body of known length and without TLS comes straight from the socket, once what Python has read ahead is used up.
        Raises SourceError.
        """
        response = self._response
        raw = getattr(getattr(response.fp, "raw", None), "_sock", None)
        if not funnel.splices or self.body_length is None or type(raw) is not socket.socket:
            return funnel.put(fd, offset, self.read_into(funnel.buffer[:count]))
        count = min(count, response.length or 0)
        if not count:
            return 0, None
        if not self._socket:
            return funnel.put(fd, offset, self._read_ahead(raw, funnel.buffer[:count]))
        began = time.monotonic()
        done, fault, wrong = funnel.splice(raw, fd, offset, count, self.HEAP if self._brisk else 1)
        self._brisk = time.monotonic() - began < 0.3
        response.length -= done
        if not (done or wrong or funnel.splices):
            return self.pour(funnel, fd, offset, count)
        if fault and not done and not wrong:
            raise self._silent() if fault == errno.EAGAIN else SourceError("%s: %s" % (self._origin.url, os.strerror(fault)))
        return done, wrong

    def _read_ahead(self, raw: socket.socket, view: Any) -> int:
        """Read what Python has read ahead, and see whether that was all of it."""
        count = self._read(self._response.fp.readinto1, view)
        self._response.length -= count
        if count < len(view) or len(view) > io.DEFAULT_BUFFER_SIZE:
            limit_silence(raw, self._origin.timeout_s)
            self._socket = raw
        return count

    def close(self) -> None:
        """Hang up."""
        self._response.close()


def version_parts(version: str) -> Tuple[str, str, str]:
    """Return (ETag, Last-Modified, length) of an origin's version; nothing of a name that a supernode made up itself."""
    parts = version.rsplit("|", 2)  # an ETag may have anything in it
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else ("", "", "")


def same_version(one: str, other: str) -> bool:
    """Return whether two versions may be of one file: an answer without a length does not contradict one with it."""
    a, b = version_parts(one), version_parts(other)
    return a[:2] == b[:2] and (a[2] == b[2] or not a[2] or not b[2])


def if_none_match(version: str) -> List[Tuple[str, str]]:
    """Return the headers that make the origin answer 304 while it still has `version`.  Wire: 10.3"""
    etag, modified, _ = version_parts(version)
    return [pair for pair in (("If-None-Match", etag), ("If-Modified-Since", modified)) if pair[1] and not content_of(etag)]


def if_range(version: str) -> List[Tuple[str, str]]:
    """Return the header that makes the origin send the whole file when it no longer has `version`."""
    etag, modified, _ = version_parts(version)
    mark = etag if etag and not etag.startswith("W/") else modified
    return [("If-Range", mark)] if mark and not content_of(etag) else []


def bare(url: str) -> str:
    """Return a URL, or a path, as it may be shown to everybody: a user, a password or a signature may be in the rest."""
    return re.sub(r"^([\w+.-]+://)[^/]*@", r"\1", url.partition("?")[0])


class BadGateway(SourceError):
    """A site can't be asked what a client wants of it through us."""
    http = 502


class Upstream:
    """Connections to registries and other sites, TLS among them, kept alive, for requests and answers that are passed on as
    they come.  By http.client, which knows more forms of a body than our own client.  _lock guards _idle."""

    KEEP = 8  # idle connections kept for one site
    CONNECT_S = 10.0  # TLS included
    ANSWER_S = 120.0  # without a byte: a registry may have to commit a large layer first

    def __init__(self, trust: Callable[[str], Tuple[bool, List[str]]]) -> None:
        self._trust = trust  # of a site (host, or host:port): whether any certificate is good, and more CAs
        self._lock = threading.Lock()
        self._idle = collections.defaultdict(list)  # type: Dict[Tuple[str, str], List[Any]]

    def trust(self, url: str) -> Tuple[bool, List[str]]:
        """Return whether any certificate of a URL's site is good, and the CAs that count there besides the system's."""
        return self._trust(urlsplit(url).netloc.rpartition("@")[2])

    def ask(self, method: str, url: str, headers: Any, body: Optional[Iterator[bytes]] = None, length: Optional[int] = 0) -> Tuple[Any, Any]:
        """Send a request with a body of `length` bytes (None: as many as come), and return (connection, answer) once the
        answer's head is there; end with `done`.  Raises BadGateway, and what `body` raises."""
        import http.client
        parts = urlsplit(url)
        target = quote(url.partition("://")[2][len(parts.netloc):], safe="%/?:@!$&'()*+,;=~#[]|^{}`\\\"<>", encoding="latin-1")
        while True:
            connection, kept, prefix = self._connection(parts)
            try:
                connection.putrequest(method, prefix + (target if target[:1] == "/" else "/" + target), skip_host=True, skip_accept_encoding=True)
                for name, value in [("Host", parts.netloc.rpartition("@")[2])] + list(headers):
                    connection.putheader(name, value.encode("latin-1", "replace"))
                self._send_body(connection, method, body, length)
                return connection, connection.getresponse()
            except (http.client.HTTPException, OSError, ValueError) as error:
                connection.close()
                if kept and not body and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                    continue  # it was closed just before we asked
                raise self._failure(parts, error)
            except BaseException:
                connection.close()
                raise

    @staticmethod
    def _send_body(connection: Any, method: str, body: Optional[Iterator[bytes]], length: Optional[int]) -> None:
        chunked = bool(body) and length is None
        if chunked:
            connection.putheader("Transfer-Encoding", "chunked")
        elif body or method in ("POST", "PUT", "PATCH"):
            connection.putheader("Content-Length", str(length if body else 0))
        connection.endheaders()
        try:
            for data in body or ():
                connection.send(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            if chunked:
                connection.send(b"0\r\n\r\n")
        except ConnectionError:  # it wants no more: the answer says why
            pass

    def _connection(self, parts: Any) -> Tuple[Any, bool, str]:
        """Return a connection for a URL, whether it has been used before, and what goes before each path on it.  Raises BadGateway."""
        import http.client
        import urllib.request
        host, port = split_host(parts.netloc.rpartition("@")[2], 443 if parts.scheme == "https" else 80)
        proxy = "" if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme, "")
        prefix = "http://" + parts.netloc if proxy and parts.scheme == "http" else ""
        kept = self._kept(parts)
        if kept:
            return kept, True, prefix
        try:
            way = split_host(urlsplit(proxy).netloc.rpartition("@")[2], 80) if proxy else (host, port)
            if parts.scheme == "https":
                context = tls_context(*self.trust(parts.geturl()))
                connection = http.client.HTTPSConnection(way[0], way[1], timeout=self.CONNECT_S, context=context)  # type: Any
                if proxy:
                    connection.set_tunnel(host, port)
            else:
                connection = http.client.HTTPConnection(way[0], way[1], timeout=self.CONNECT_S)
            connection.connect()
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise self._failure(parts, error)
        connection.sock.settimeout(self.ANSWER_S)
        return connection, False, prefix

    def _kept(self, parts: Any) -> Any:
        """Return an idle connection that the other end has not closed; None without one."""
        while True:
            with self._lock:
                idle = self._idle[parts.scheme, parts.netloc]
                if not idle:
                    return None
                connection = idle.pop()
            if not readable([connection.sock], 0):
                return connection
            connection.close()

    @staticmethod
    def _failure(parts: Any, error: Exception) -> BadGateway:
        late = isinstance(error, socket.timeout)
        reason = "no answer in time" if late else getattr(error, "verify_message", "") or getattr(error, "strerror", "") or error
        failure = BadGateway("%s://%s: %s" % (parts.scheme, parts.netloc.rpartition("@")[2], reason or type(error).__name__))
        failure.http = 504 if late else 502
        return failure

    def done(self, url: str, connection: Any, answer: Any) -> None:
        """Keep a connection whose answer has been read to its end; else hang up."""
        parts = urlsplit(url)
        with self._lock:
            idle = self._idle[parts.scheme, parts.netloc]
            if answer.isclosed() and not answer.will_close and connection.sock and len(idle) < self.KEEP:
                idle.append(connection)
                return
        answer.close()
        connection.close()

    def close(self) -> None:
        """Hang up on everybody that nobody is talking to."""
        with self._lock:
            for connection in sum(self._idle.values(), []):
                connection.close()
            self._idle.clear()


# ==============================================================================
# 11. Filling
#    A file from its origin into a TaskFile: in order, resumed where a connection
#    breaks, with patience for an origin that has trouble.
# ==============================================================================

class Patience:
    """When an origin that fails is asked again, and when no more: TRIES times without a new byte, or as often as it says when
    (Retry-After), MOST_S in all.  One for each fetch, used by its thread."""

    TRIES = 3
    PAUSE_S = 0.5  # before the second try; doubled each time
    MOST_S = 60.0  # longer nobody waits: other supernodes, or another time, are better
    LATER = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others in a moment

    def __init__(self, stopped: Callable[[], bool], say: Callable[..., None] = lambda *_: None, sleep: Callable[[float], None] = time.sleep) -> None:
        self._stopped, self._say, self._sleep = stopped, say, sleep
        self._failures, self._left_s = 0, self.MOST_S

    def reset(self) -> None:
        """Begin anew: there has been progress."""
        self._failures, self._left_s = 0, self.MOST_S

    def wait(self, error: SourceError) -> None:
        """Wait until the origin may be asked again.  Raises `error` when that makes no sense (any more), Stalled when told to stop."""
        self._failures += 1
        pause = max(self.PAUSE_S * 2 ** (self._failures - 1), error.retry_s or 0.0)
        for_good = isinstance(error, SourceChanged) or (400 <= error.status < 500 and error.status not in self.LATER)
        if for_good or pause > self._left_s or (error.retry_s is None and self._failures >= self.TRIES):
            raise error
        self._say("%s: asked again in %s", error, show_time(pause))
        self._left_s -= pause
        while pause > 0.0:
            if self._stopped():
                raise Stalled(str(error))
            self._sleep(min(0.2, pause))
            pause -= 0.2

    def first(self, origin: Origin, headers: Any = ()) -> OriginReply:
        """As Origin.open, again and again while the origin says that it is for later.  Raises the same, and Stalled."""
        while True:
            try:
                return origin.open(headers=headers)
            except SourceError as error:
                if error.status not in self.LATER:
                    raise
                self.wait(error)


class Filler:
    """Fills a TaskFile from an origin: what is missing, in order, resuming where a connection breaks.

    The same class feeds the supernode's cache and a client that goes back to source.  The caller's thread reads and writes; a few
    of its own digest behind it what the file has, since SHA-256 takes longer than that.
    """

    CHUNK = 1 << 18  # bytes read at once
    HANDS = 3  # threads behind the reader, so that there are two pieces to digest at once
    BEHIND = 1  # pieces that wait for them at most: what is written and not digested is lost to a kill

    def __init__(self, origin: Origin, store: TaskFile, bucket: TokenBucket, on_piece: Callable[[int], None],
                 on_length: Callable[[], None] = lambda: None, stopped: Callable[[], bool] = lambda: False,
                 say: Callable[..., None] = lambda *_: None, sleep: Callable[[float], None] = time.sleep) -> None:
        self.origin, self.store = origin, store
        self._bucket = bucket
        self._on_piece, self._on_length, self._stopped = on_piece, on_length, stopped
        self._patience = Patience(stopped, say, sleep)
        self.read_bytes = 0  # from the origin, in all
        self._funnel = Funnel(self.CHUNK)
        self._work = queue.Queue(self.BEHIND)  # type: queue.Queue  # (num, length) of what is written and not digested
        self._error = None  # type: Optional[Exception]  # of the hands
        self._threads = []  # type: List[threading.Thread]

    def fill(self, first: Optional[OriginReply] = None) -> None:
        """Fetch every missing piece; `first` is an answer that is already open and whose body is to be used.

        Raises SourceError and its kin, NoSpace, CannotWrite, Stalled when told to stop.
        """
        try:
            for i in range(self.HANDS):
                thread = threading.Thread(target=self._hand, name="dfly-fill-%d" % i, daemon=True)
                thread.start()  # where there may be no more threads, none of them is left behind
                self._threads.append(thread)
            self._fill(first)
        finally:
            for _ in self._threads:
                self._work.put(None)
            for thread in self._threads:
                thread.join()
            self._funnel.close()

    def _fill(self, first: Optional[OriginReply]) -> None:
        while not self.store.complete:
            before = self.store.have
            try:
                reply = first or self._reopen()
                first = None
                self._drink(reply)
            except SourceError as error:
                if self.store.have != before:
                    self._patience.reset()
                self._patience.wait(error)

    def _reopen(self) -> OriginReply:
        """Ask for the first run of missing bytes.  Raises SourceChanged when it is, or may be, another file now."""
        layout = self.store.layout
        start, end = self._first_gap()
        old = self.store.about.get("version", "")
        if self.store.have and not any(version_parts(old)):
            raise SourceChanged("%s: the origin names no version (ETag, Last-Modified) by which to go on in the middle" % self.origin.url)
        if not start and (end is None or end == layout.length):
            reply = self.origin.open()
        else:
            reply = self._from_middle(start, end, if_range(old))
        if (old or self.store.have) and (not same_version(reply.version, old) or (layout.length is not None and reply.length not in (None, layout.length))):
            reply.close()
            raise SourceChanged("%s: the origin has another file now" % self.origin.url)
        return reply

    def _from_middle(self, start: int, end: Optional[int], headers: List[Tuple[str, str]]) -> OriginReply:
        """Ask for a range; where the origin has none to give, for the whole file, which tells whether it is still the same."""
        try:
            return self.origin.open(start, end, headers)
        except SourceError as error:
            if error.status != 416:
                raise
            return self.origin.open()

    def _first_gap(self) -> Tuple[int, Optional[int]]:
        """Return [start, end) in bytes of the first run of missing pieces; end None: to the end."""
        layout, have = self.store.layout, self.store.have
        first = 0
        while have >> first & 1:
            first += 1
        if not have >> first:
            return first * layout.stride, layout.length
        last = first
        while not have >> last & 1:
            last += 1
        return first * layout.stride, last * layout.stride

    def _drink(self, reply: OriginReply) -> None:
        """Read one body into pieces.  It may start in front of our file (the origin ignores Range) and run through
        pieces that are here."""
        position = reply.start
        try:
            if reply.length is not None and self.store.layout.length is None:
                self._set_length(reply.length)
            position = self._skip(reply, position, 0)
            while not self._past_end(position) and not reply.end == position > reply.start:
                layout, num = self.store.layout, position // self.store.layout.stride
                stop = (num + 1) * layout.stride if layout.length is None else min((num + 1) * layout.stride, layout.length)
                if position > num * layout.stride or self.store.have >> num & 1:
                    ended = self._skip(reply, position, stop)
                    ended, position = ended == position, ended
                else:
                    position, ended = self._piece(reply, num, stop)
                if ended:
                    break
        finally:
            reply.close()
            self._settle()

    def _past_end(self, position: int) -> bool:
        return self.store.layout.length is not None and position >= self.store.layout.length > 0

    def _set_length(self, length: int) -> None:
        self.store.set_length(length)
        self.store.need_space()
        self._on_length()

    def _skip(self, reply: OriginReply, position: int, stop: int) -> int:
        """Read and forget the body up to `stop`; return where that ended."""
        while position < stop:
            count = reply.read_into(self._funnel.buffer[:self._most(stop - position)])
            self.read_bytes += count
            if not count:
                raise SourceError("%s: the origin hung up after %d bytes" % (self.origin.url, max(position, 0)))
            position += count
        return position

    def _most(self, left: int) -> int:
        """Return how many bytes of `left` may be read now, once the limit allows it.  Raises Stalled, and what a hand has met."""
        if self._stopped():
            raise Stalled("stopped")
        if self._error:
            raise self._error
        count = self._bucket.chunk(min(self.CHUNK, left))
        self._bucket.take(count)
        return count

    def _piece(self, reply: OriginReply, num: int, stop: int) -> Tuple[int, bool]:
        """Write piece `num`, which ends at `stop`, and have it digested; return the new position and whether the body has ended."""
        layout = self.store.layout
        start, got = num * layout.stride, 0
        while start + got < stop:
            count = self.store.pour(reply, self._funnel, start + got, self._most(stop - start - got))
            self.read_bytes += count
            if not count:
                break
            got += count
        position, short = start + got, start + got < stop
        if short and (layout.length is not None or reply.body_length is not None):
            raise SourceError("%s: the origin hung up after %d bytes" % (self.origin.url, position))
        if short:
            self._set_length(position)
            if not got and num:  # the body ended just with the piece before
                return position, True
        self._work.put((num, got))
        return position, short or stop == start

    def _settle(self) -> None:
        """Wait until everything read has been written.  Raises what a hand has met."""
        self._work.join()
        if self._error:
            raise self._error

    def _hand(self) -> None:
        """The life of a thread that digests."""
        for num, length in iter(self._work.get, None):
            try:
                if not self._error:
                    self.store.seal_piece(num, self.store.digest(num, length), reread=True)
                    self._on_piece(num)
            except Exception as error:  # noqa: BLE001 the reader raises it: a hand that died would leave it waiting
                self._error = error
            finally:
                self._work.task_done()


# ==============================================================================
# 12. Scheduler's books
#    What is known of a task: its pieces and how rare each is, who has and who fetches
#    them, on which hosts, in which racks and sites.  Decides nothing.
# ==============================================================================

REFUSED, STALLED, WRONG_BYTES, GONE, OTHER = "refused", "stalled", "digest", "gone", "other"  # why a piece failed
SEED = ""  # the supernode, as a holder


class Assignment(NamedTuple):
    """One piece for one receiver: fetch `num` from the peer `holder` (SEED: from the supernode)."""

    num: int
    holder: str


class Waiting(NamedTuple):
    """Why a receiver has nothing to do: `missing` pieces, of which `num` is one that the seed has (`seeded`) or has
    not yet, and that `holders` peers could serve if they were free."""

    missing: int
    num: int
    seeded: bool
    holders: int


class _Sample:
    """A set from which members are drawn at random in constant time."""

    def __init__(self) -> None:
        self._members = []  # type: List[Any]
        self._places = {}  # type: Dict[Any, int]

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: Any) -> bool:
        return member in self._places

    def put(self, member: Any, present: bool) -> None:
        """Have `member` in the set, or not."""
        if present and member not in self._places:
            self._places[member] = len(self._members)
            self._members.append(member)
        elif not present and member in self._places:
            place, last = self._places.pop(member), self._members.pop()
            if last is not member:
                self._members[place] = last
                self._places[last] = place

    def draw(self, count: int, rng: random.Random) -> List[Any]:
        """Return `count` members in random order, or all."""
        return rng.sample(self._members, min(count, len(self._members)))


class _Place:
    """A rack, a site, or the whole swarm (which only the seed is outside of), for one task."""

    def __init__(self) -> None:
        self.held = collections.Counter()  # type: Dict[int, int]  # piece -> peers here that have it or fetch it
        self.present = 0  # mask of those pieces
        self.entering = 0  # fetches under way from outside
        self.leaving = 0  # and to outside
        self.idle = _Sample()  # holders here that could begin an upload
        self.hungry = _Sample()  # receivers here that could begin a fetch

    def count(self, num: int, change: int) -> None:
        """Note that one more or one less peer here has piece `num` or fetches it."""
        self.held[num] += change
        if self.held[num] > 0:
            self.present |= 1 << num
        else:
            del self.held[num]
            self.present &= ~(1 << num)


class _Host:
    """The machine that some peers (of any task) upload from; `key` is (address, port)."""

    def __init__(self, key: Any) -> None:
        self.key = key
        self.uploads = 0  # under way
        self.peers = []  # type: List[_Peer]
        self.partners = {}  # type: Dict[_Host, int]  # those it has exchanged pieces with -> how near they are (_common)
        self.speed = 0.0  # bytes/s of one upload, averaged over the last few


class _Flight:
    """One piece on its way."""

    __slots__ = ("num", "holder", "since", "slot", "crossed", "ending")

    def __init__(self, num: int, holder: Optional["_Peer"], since: float, slot: bool, crossed: List[_Place]) -> None:
        self.num, self.holder, self.since = num, holder, since  # holder None: the seed
        self.slot = slot  # whether it counts as one of the holder's uploads (a lone receiver's batch does not)
        self.crossed = crossed  # the places it enters
        self.ending = False  # its end has been announced


class _Peer:
    """One client of one task, as receiver and as holder."""

    def __init__(self, task: "_Task", cid: str, host: _Host, places: List[_Place], serves: bool, legacy: bool, seed_only: bool) -> None:
        self.task, self.cid, self.host = task, cid, host
        self.places = places  # wide to narrow: the swarm, its site, its rack
        self.serves, self.legacy, self.seed_only = serves, legacy, seed_only
        self.counted = serves  # whether its pieces count as held: it serves, and is not suspended
        self.starved = False  # nobody but the seed could serve it the last time
        self.idle = self.hungry = False  # whether it is among its places' idle holders, hungry receivers
        self.hungry_since = 0.0
        self.have = 0  # mask: verified
        self.offers = 0  # mask: servable to others
        self.flights = {}  # type: Dict[int, _Flight]
        self.asked = 0  # mask of flights
        self.slots = 0  # fetches it would have under way at once
        self.busy = 0  # flights that are not about to end
        self.queue = 0  # and how many more it would take in advance
        self.batch = 4  # size of its next batch in advance
        self.mail = []  # type: List[Assignment]
        self.receiving = False
        self.idle_since = None  # type: Optional[float]  # since when it waits with nothing under way
        self.blocked = {}  # type: Dict[str, float]  # holder -> until when
        self.accusers = {}  # type: Dict[str, int]  # receiver -> failures it reported
        self.accused = set()  # type: Set[str]  # holders it said were sending wrong bytes
        self.suspended_until = 0.0
        self.suspensions = 0  # one after the other, without a good upload in between
        self.doubters = set()  # type: Set[str]  # the receivers that brought those about
        self.isolations = 0  # how often it sent wrong bytes to several: each time it is out for longer
        self.seed_retry_at = 0.0
        self.duration = 0.0  # seconds a fetch takes it, averaged

    @property
    def room(self) -> int:
        """How many fetches it could begin now."""
        return self.slots - self.busy if self.slots > self.busy else 0


class _Task:
    """One file: which pieces there are, who has them, and how rare each is."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.count = None  # type: Optional[int]
        self.all = 0  # mask of the pieces known to exist
        self.seeded = 0  # mask of the pieces that the seed has
        self.peers = {}  # type: Dict[str, _Peer]
        self.places = {}  # type: Dict[Tuple[str, ...], _Place]
        self.swarm = self.place(())
        self.levels = [0] * 128  # masks of pieces, by how many peers have or fetch them (see _level)
        self.seed_uploads = 0
        self.seed_sent = 0  # pieces, in all
        self.offered = collections.Counter()  # type: Dict[int, int]  # piece -> counted peers that would serve it
        self.duration = 0.0  # seconds a fetch takes, averaged
        self.receivers = 0
        self.feeders = 0  # those of them whose pieces count as held: what they get, others get from them
        self.direct = set()  # type: Set[_Peer]  # receivers that only the seed may serve

    def place(self, location: Tuple[str, ...]) -> _Place:
        """Return the place of that name."""
        return self.places.setdefault(location, _Place())

    def known(self, nums: int) -> None:
        """Note that these pieces exist."""
        new = nums & ~self.all
        self.all |= new
        self.levels[0] |= new

    def change(self, peer: _Peer, num: int, change: int) -> None:
        """Note that `peer` has begun (1) or given up (-1) to have or fetch piece `num`, if that is of use to others."""
        if not peer.counted:
            return
        bit, before = 1 << num, self.swarm.held[num]
        self.levels[_level(before)] &= ~bit
        self.levels[_level(before + change)] |= bit
        for place in peer.places:
            place.count(num, change)

    def rarest(self, nums: int, rng: random.Random) -> int:
        """Return one of the rarest pieces in a mask that is not empty."""
        for level in self.levels:
            found = level & nums
            if found:
                break
        else:
            found = nums
        above = found >> rng.randrange(found.bit_length())
        if above:
            found = above << (found.bit_length() - above.bit_length())
        return (found & -found).bit_length() - 1

    def rarity(self, num: int) -> int:
        """Return how many peers have or fetch piece `num`."""
        return self.swarm.held.get(num, 0)


def _level(count: int) -> int:
    """Return the rarity level of a piece that `count` peers have: exact up to 16, then eight levels for each doubling."""
    if count < 16:
        return count
    octave = count.bit_length() - 5
    return min(127, 16 + 8 * octave + (count >> octave + 1) - 8)


# ==============================================================================
# 13. Scheduler
#    Who fetches which piece from whom.  Pure: no sockets, no files, no locks, no
#    clock of its own, so that a simulator drives the very class that runs.  Its
#    caller serialises all calls.
# ==============================================================================

class Scheduler:
    """Decides who fetches which piece from whom.

    Uplinks are what is scarce, so the rules are about them.  The seed sends pieces that nobody has yet, each once, a few
    at a time.  Every other upload goes from a holder with a free slot to a receiver that waits, near ones first, and
    carries the rarest piece it can.  A piece enters a rack (and a site) once, and spreads inside.  Assignments are made
    in the very call that makes them possible; `woken` names the receivers that got some.
    """

    SAMPLE = 12  # candidates looked at where all would be too many; 4 to 24 do equally well in the simulator
    PATIENCE = 0.5  # times the usual duration, for which a receiver waits before a holder turns to it from another
    CROSSINGS = 3  # fetches into (and out of) one rack at a time; in the simulator 2 ends at 1.44, 3 at 1.20, 4 at 1.27
    LATE = 4.0  # times the usual duration, plus LATE_S: then a piece may be fetched a second time
    LATE_S = 1.0
    LOST_S = 60.0  # after this a fetch in advance, too, counts as lost
    STARVE_S = 1.0  # a receiver with nothing under way gets a second copy from the seed after this (or 6 durations)
    SEED_COPIES = 1.2  # that the seed sends at most to swarms that could do without
    SPARE_SEED_SLOTS = 2  # for those
    SUSPEND_S, ISOLATE_S = 3.0, 60.0
    LOST_AFTER, LOST_BY = 6, 3  # suspensions (a minute and a half at least), brought about by so many receivers: then nobody is there
    PARTNERS = 10  # hosts in its rack (and elsewhere in its site, and elsewhere) that one looks for; it is found by half as many more

    def __init__(self, up_slots: int = 3, seed_slots: int = 3, rng: Optional[random.Random] = None) -> None:
        self._up_slots, self._seed_slots = up_slots, seed_slots
        self._rng = rng or random.Random()
        self.isolations = 0  # ever
        self._tasks = {}  # type: Dict[str, _Task]
        self._hosts = {}  # type: Dict[Any, _Host]
        self._woken = {}  # type: Dict[Tuple[str, str], None]

    # -- tasks -----------------------------------------------------------------

    def add_task(self, task_id: str, count: Optional[int] = None) -> None:
        """Begin a task of `count` pieces (None: not known yet); an existing one learns its count."""
        task = self._tasks.setdefault(task_id, _Task(task_id))
        if count is not None:
            task.count = count
            task.known((1 << count) - 1)

    def set_count(self, task_id: str, count: int, now: float) -> None:
        """The number of pieces is known at last."""
        self.add_task(task_id, count)
        self._feed(self._tasks[task_id], now)

    def seeded(self, task_id: str, num: int, now: float) -> None:
        """The seed has piece `num`."""
        task = self._tasks[task_id]
        task.known(1 << num)
        task.seeded |= 1 << num
        self._feed(task, now)

    def unseeded(self, task_id: str, num: int, _now: float) -> None:
        """The seed has lost piece `num`."""
        self._tasks[task_id].seeded &= ~(1 << num)

    def drop_task(self, task_id: str) -> None:
        """Forget a task and its peers."""
        task = self._tasks.pop(task_id, None)
        for peer in list(task.peers.values()) if task else ():
            self._remove(peer, 0.0)

    # -- peers -----------------------------------------------------------------

    def add_peer(self, task_id: str, cid: str, host: Any, location: Tuple[str, ...], now: float, have: int = 0, serves: bool = True,
                 legacy: bool = False, seed_only: bool = False) -> None:
        """A client has registered; one of the same cid is replaced."""
        self.drop_peer(task_id, cid, now)
        task = self._tasks[task_id]
        places = [task.swarm] + [task.place(location[:depth]) for depth in range(1, len(location) + 1)]
        machine = self._hosts.setdefault(host, _Host(host))
        peer = task.peers[cid] = _Peer(task, cid, machine, places, serves, legacy, seed_only)
        machine.peers.append(peer)
        self._start_receiving(peer)
        for num in nums_of(have):
            self.done(task_id, cid, num, now)

    def drop_peer(self, task_id: str, cid: str, now: float) -> None:
        """A client is gone for good, as holder and as receiver."""
        task = self._tasks.get(task_id)
        peer = task.peers.pop(cid, None) if task else None
        if peer:
            self._remove(peer, now)

    def _remove(self, peer: _Peer, now: float) -> None:
        self._stop_receiving(peer, now)
        self._count(peer, False)
        peer.serves, peer.offers = False, 0
        self._index(peer, now)
        peer.host.peers.remove(peer)
        if not peer.host.peers:
            self._hosts.pop(peer.host.key, None)
            self._part(peer.host)

    def leave(self, task_id: str, cid: str, now: float) -> None:
        """A client receives no more, but what it has it still offers."""
        peer = self._peer(task_id, cid)
        if peer:
            self._stop_receiving(peer, now)

    @staticmethod
    def _start_receiving(peer: _Peer) -> None:
        if not peer.receiving:
            peer.receiving = True
            peer.task.receivers += 1
            peer.task.feeders += peer.counted
            if peer.seed_only:
                peer.task.direct.add(peer)

    def _stop_receiving(self, peer: _Peer, now: float) -> None:
        if peer.receiving:
            peer.receiving = False
            peer.task.receivers -= 1
            peer.task.feeders -= peer.counted
            peer.task.direct.discard(peer)
        peer.slots = peer.queue = 0
        peer.mail = []
        for flight in list(peer.flights.values()):
            self._land(peer, flight)
        if not any(other.receiving for other in peer.host.peers):
            self._part(peer.host)
        self._index(peer, now)

    def _peer(self, task_id: str, cid: str) -> Optional[_Peer]:
        task = self._tasks.get(task_id)
        return task.peers.get(cid) if task else None

    # -- what peers say --------------------------------------------------------

    def request(self, task_id: str, cid: str, slots: int, now: float, queue: int = 0) -> None:
        """A client would have `slots` fetches under way at once, those that it has among them, and take `queue` more in advance.

        What it has is counted here, not by the client: that does not know yet what is on its way to it.
        """
        peer = self._peer(task_id, cid)
        if not peer:
            return
        self._start_receiving(peer)
        peer.slots, peer.queue = slots, queue
        if not peer.flights:
            peer.idle_since = peer.idle_since if peer.idle_since is not None else now
        self._serve(peer, now)
        self._index(peer, now)

    def done(self, task_id: str, cid: str, num: int, now: float, holder: Optional[str] = None, seconds: Optional[float] = None,
             nbytes: Optional[int] = None, servable: bool = True) -> None:
        """A client has piece `num`, verified; `servable`: and its uploader has it."""
        peer = self._peer(task_id, cid)
        if not peer:
            return
        flight = peer.flights.get(num)
        if flight:
            self._land(peer, flight)
        if not peer.have >> num & 1:
            peer.have |= 1 << num
            peer.task.known(1 << num)
            peer.task.change(peer, num, 1)
        if servable and not peer.offers >> num & 1:
            peer.offers |= 1 << num
            peer.task.offered[num] += peer.counted
        if holder is not None:
            self._praise(peer, self._peer(task_id, holder), flight, seconds, nbytes, now)
        self._index(peer, now)
        self._reuse(peer, flight, now)
        self._use(peer, now)

    def soon(self, task_id: str, cid: str, num: int, now: float) -> None:
        """Piece `num` is about to arrive: its slots are as good as free, so that the next fetch is on its way by then."""
        peer = self._peer(task_id, cid)
        flight = peer.flights.get(num) if peer else None
        if not peer or not flight or flight.ending:
            return
        flight.ending = True
        peer.busy -= 1
        self._index(peer, now)
        if flight.slot:
            self._release(peer, flight)
            self._reuse(peer, flight, now)

    def failed(self, task_id: str, cid: str, num: int, holder: str, why: str, now: float) -> None:
        """A client could not get piece `num` from `holder`, because of `why`."""
        peer = self._peer(task_id, cid)
        if not peer:
            return
        flight = peer.flights.get(num)
        if flight and (flight.holder.cid if flight.holder else SEED) == holder:
            self._land(peer, flight)
        if holder == SEED:
            peer.seed_retry_at = now + 0.2
        else:
            self._blame(peer, self._peer(task_id, holder), holder, why, now)
        self._index(peer, now)
        self._reuse(peer, flight, now)
        self._serve(peer, now)

    def _reuse(self, peer: _Peer, flight: Optional[_Flight], now: float) -> None:
        """An upload to `peer` has ended, or is about to: begin another from the same holder, if it can be to the same
        receiver, whose connection to it is warm."""
        if not flight:
            return
        holder = flight.holder  # the seed's turns go by who has least, not by whose connection is warm
        if holder and holder.places[-1] is peer.places[-1] and peer.room > 0 and self._free(holder, now):
            nums = self._allowed(peer, holder, now)
            if nums and not self._others_wait(peer, holder, now):
                self._launch(peer, holder, peer.task.rarest(nums, self._rng), now)
                self._index(peer, now)
        if not holder:
            self._feed(peer.task, now)
            return
        for other in self._rotated(holder.host.peers):
            self._use(other, now)

    def _others_wait(self, peer: _Peer, holder: _Peer, now: float) -> bool:
        """Return whether another partner of `holder` has waited for long: holders that always go on with the same receivers
        leave some with two fetches where others have three, and those end a fifth later."""
        task, limit = peer.task, now - self.PATIENCE * peer.task.duration
        for host in holder.host.partners:
            for other in host.peers:
                if (other.hungry and other.hungry_since < limit and other.task is task and len(other.flights) <= len(peer.flights)
                        and self._allowed(other, holder, now)):
                    return True
        return False

    def _rotated(self, peers: List[_Peer]) -> List[_Peer]:
        """Return the peers of one host beginning anywhere, so that its tasks get even shares of its slots."""
        if len(peers) < 2:
            return list(peers)
        start = self._rng.randrange(len(peers))
        return peers[start:] + peers[:start]

    # -- trust -----------------------------------------------------------------

    def _praise(self, peer: _Peer, holder: Optional[_Peer], flight: Optional[_Flight], seconds: Optional[float], nbytes: Optional[int],
                now: float) -> None:
        task = peer.task
        took = seconds or (now - flight.since if flight else 0.0)
        if took:
            task.duration = 0.9 * task.duration + 0.1 * took if task.duration else took
            peer.duration = 0.7 * peer.duration + 0.3 * took if peer.duration else took
        if holder:
            holder.accusers.clear()
            holder.suspensions = 0
            holder.doubters.clear()
            if seconds and nbytes:
                speed = nbytes / seconds
                holder.host.speed = 0.7 * holder.host.speed + 0.3 * speed if holder.host.speed else speed

    def _count(self, peer: _Peer, counted: bool) -> None:
        """Have the pieces of a peer count as held, or not."""
        if counted == peer.counted:
            return
        change = 1 if counted else -1
        peer.counted = True  # as `change` wants it
        for num in nums_of(peer.have | peer.asked):
            peer.task.change(peer, num, change)
        for num in nums_of(peer.offers):
            peer.task.offered[num] += change
        peer.task.feeders += change if peer.receiving else 0
        peer.counted = counted

    def _blame(self, peer: _Peer, holder: Optional[_Peer], cid: str, why: str, now: float) -> None:
        """Draw the conclusions from a failure."""
        peer.blocked[cid] = now + (1.0 if why == OTHER else self.ISOLATE_S if why in (REFUSED, WRONG_BYTES) else self.SUSPEND_S)
        if not holder:
            return
        holder.accusers[peer.cid] = holder.accusers.get(peer.cid, 0) + 1
        if why == WRONG_BYTES:
            peer.accused.add(cid)
            if len(peer.accused) > 3:  # who finds everybody wrong is wrong himself
                return
        reports, accusers = sum(holder.accusers.values()), len(holder.accusers)
        if why == WRONG_BYTES and (accusers >= 2 or reports >= 3):
            self._suspend(holder, now, self.ISOLATE_S * 2 ** min(holder.isolations, 4))
            holder.isolations += 1
            self.isolations += 1
        elif holder.suspended_until <= now and (why in (REFUSED, STALLED) or reports >= 6):
            # Many may say so at once, of many, when a switch or a tracker of connections is overrun: so a short while first
            holder.suspensions += 1
            holder.doubters.add(peer.cid)
            self._suspend(holder, now, self.SUSPEND_S * 2 ** min(holder.suspensions - 1, 5))
            if holder.suspensions >= self.LOST_AFTER and len(holder.doubters) >= self.LOST_BY:
                holder.serves = False  # until it registers again

    def _suspend(self, holder: _Peer, now: float, seconds: float) -> None:
        """Have a holder serve nobody for a while."""
        holder.suspended_until = max(holder.suspended_until, now + seconds)
        holder.accusers.clear()
        self._count(holder, False)
        self._part(holder.host)
        self._index(holder, now)

    def serves(self, task_id: str, cid: str) -> bool:
        """Return whether a client is, or will again be, offered to others."""
        peer = self._peer(task_id, cid)
        return bool(peer and peer.serves)

    def isolated(self, task_id: str, now: float) -> Set[str]:
        """Return the cids that serve nobody at present because of what they did again and again."""
        task = self._tasks.get(task_id)
        return {peer.cid for peer in task.peers.values()
                if peer.suspended_until > now and (peer.isolations or peer.suspensions > 2)} if task else set()

    # -- flights ---------------------------------------------------------------

    def _launch(self, peer: _Peer, holder: Optional[_Peer], num: int, now: float, slot: bool = True) -> None:
        """Assign a piece."""
        task = peer.task
        common = _common(peer, holder)
        crossed = peer.places[common:] if slot else []
        for place in crossed:
            place.entering += 1
        if holder:
            if holder.host is not peer.host:
                peer.host.partners[holder.host] = holder.host.partners[peer.host] = common
            if slot:
                holder.host.uploads += 1
                for place in holder.places[common:]:
                    place.leaving += 1
        else:
            task.seed_sent += 1
            task.seed_uploads += 1 if slot else 0
        peer.flights[num] = _Flight(num, holder, now, slot, crossed)
        peer.asked |= 1 << num
        peer.busy += 1
        peer.idle_since = None
        task.change(peer, num, 1)
        peer.mail.append(Assignment(num, holder.cid if holder else SEED))
        self._woken[task.task_id, peer.cid] = None
        if holder:
            for other in holder.host.peers:
                self._index(other, now)

    def _land(self, peer: _Peer, flight: _Flight) -> None:
        """A flight has ended, however."""
        del peer.flights[flight.num]
        peer.asked &= ~(1 << flight.num)
        peer.busy -= 0 if flight.ending else 1
        peer.task.change(peer, flight.num, -1)
        self._release(peer, flight)

    @staticmethod
    def _release(peer: _Peer, flight: _Flight) -> None:
        """Give back what a flight takes of its holder and of the ways between."""
        if not flight.slot:
            return
        flight.slot = False
        for place in flight.crossed:
            place.entering -= 1
        if flight.holder:
            flight.holder.host.uploads -= 1
            for place in flight.holder.places[_common(peer, flight.holder):]:
                place.leaving -= 1
        else:
            peer.task.seed_uploads -= 1

    # -- partners ----------------------------------------------------------------
    # Who talks with few has warm connections, and a thousand hosts don't fill each other's tables of neighbours and
    # connections (Linux has room for 1,024 neighbours).  A random graph of eight is as good as one of all.

    def _may_meet(self, host: _Host, other: _Host, common: int) -> bool:
        """Return whether a host may fetch from another: from a partner, or from one more."""
        if other in host.partners or other is host:
            return True
        return (sum(1 for near in host.partners.values() if near == common) < self.PARTNERS
                and sum(1 for near in other.partners.values() if near == common) < 1.5 * self.PARTNERS)

    def _candidates(self, sample: _Sample, host: _Host) -> List[_Peer]:
        """Return peers of a set, all if they are few, else those that `host` has met and some others: of a thousand that wait
        twelve would hardly be among its partners."""
        if len(sample) <= self.SAMPLE:
            return sample.draw(self.SAMPLE, self._rng)
        met = [peer for other in host.partners for peer in other.peers if peer in sample]
        return met + [peer for peer in sample.draw(self.SAMPLE, self._rng) if peer.host not in host.partners]

    @staticmethod
    def _part(host: _Host) -> None:
        """A host has nothing more to fetch, or is better avoided, or chooses anew."""
        for other in host.partners:
            del other.partners[host]
        host.partners.clear()

    # -- matching ----------------------------------------------------------------

    def _index(self, peer: _Peer, now: float) -> None:
        """Put a peer among the idle holders and the hungry receivers of its places, or take it out."""
        idle, hungry = self._free(peer, now), peer.receiving and peer.room > 0
        if idle != peer.idle:
            peer.idle = idle
            for place in peer.places:
                place.idle.put(peer, idle)
        if hungry != peer.hungry:
            peer.hungry, peer.hungry_since = hungry, now
            for place in peer.places:
                place.hungry.put(peer, hungry)

    def _free(self, holder: _Peer, now: float) -> bool:
        return bool(holder.serves and holder.offers and holder.host.uploads < self._up_slots and holder.suspended_until <= now)

    def _allowed(self, peer: _Peer, holder: Optional[_Peer], now: float) -> int:
        """Return the mask of the pieces that `peer` may fetch from `holder` now."""
        task = peer.task
        nums = (task.seeded if holder is None else holder.offers) & ~peer.have & ~peer.asked
        if not nums:
            return 0
        if holder is not None:
            if holder is peer or peer.seed_only or (peer.blocked and peer.blocked.get(holder.cid, 0) > now) or (
                    peer.legacy and ":" in str(holder.host.key[0])):  # an old client can't write an IPv6 address
                return 0
            nums &= task.seeded  # of another piece nobody could say what it must be
        common = _common(peer, holder)
        if holder is not None and not self._may_meet(peer.host, holder.host, common):
            return 0
        if holder is None and task.count is not None and not task.all & ~task.swarm.present and task.seed_sent < self.SEED_COPIES * task.count:
            return nums  # all is out: now the seed is a holder like any other
        if holder is None and not peer.counted and not peer.seed_only and 2 * task.feeders > task.receivers:
            return 0  # a first copy is for who passes it on, as most do
        for place in peer.places[common:]:
            if place.entering >= self.CROSSINGS and place is not task.swarm:
                return 0
            nums &= ~place.present
        if holder is None:
            return nums
        for place in holder.places[common:]:
            if place.leaving >= self.CROSSINGS:
                return 0
        return nums

    def _feed(self, task: _Task, now: float) -> None:
        """Have the seed send what nobody has yet, to receivers that have least under way."""
        while task.seed_uploads < self._seed_slots and len(task.swarm.hungry):
            found = [(len(peer.flights), peer.places[-1].entering, i, peer) for i, peer in enumerate(task.swarm.hungry.draw(self.SAMPLE, self._rng))
                     if now >= peer.seed_retry_at and self._allowed(peer, None, now)]
            if not found:
                break
            peer = min(found)[3]
            self._launch(peer, None, self._first(task, self._allowed(peer, None, now)), now)
            self._index(peer, now)
        for peer in task.swarm.hungry.draw(1, self._rng) if task.receivers == 1 else [p for p in task.direct if p.room > 0]:
            self._serve(peer, now)
            self._index(peer, now)

    def _first(self, task: _Task, nums: int) -> int:
        """Return what the seed sends next: of what nobody has the lowest, else the rarest."""
        new = nums & ~task.swarm.present
        return (new & -new).bit_length() - 1 if new else task.rarest(nums, self._rng)

    def _use(self, holder: _Peer, now: float) -> None:
        """Have a holder upload, as long as it has slots and somebody near wants what it has."""
        while self._free(holder, now):
            best = None
            for place in reversed(holder.places):
                best = self._best_receiver(holder, place, now)
                if best:
                    break
            if not best:
                break
            self._launch(best[0], holder, best[1], now)
            self._index(best[0], now)
        self._index(holder, now)

    def _best_receiver(self, holder: _Peer, place: _Place, now: float) -> Optional[Tuple[_Peer, int]]:
        found = []
        for i, peer in enumerate(self._candidates(place.hungry, holder.host)):
            nums = self._allowed(peer, holder, now)
            if nums:
                num = holder.task.rarest(nums, self._rng)
                found.append((len(peer.flights), holder.task.rarity(num), i, peer, num))
        return min(found)[3:] if found else None  # type: ignore[return-value]

    def _serve(self, peer: _Peer, now: float) -> None:
        """Give a receiver as much as it has room for."""
        task = peer.task
        if task.receivers == 1 and not peer.legacy and not peer.seed_only and peer.queue:
            self._serve_alone(peer, now)
            return
        while peer.room > 0:
            if task.seed_uploads < self._seed_slots and now >= peer.seed_retry_at:
                nums = self._allowed(peer, None, now)
                if nums:
                    self._launch(peer, None, self._first(task, nums), now)
                    continue
            if peer.seed_only:
                nums = task.seeded & ~peer.have & ~peer.asked
                if not nums or now < peer.seed_retry_at:
                    return
                self._launch(peer, None, (nums & -nums).bit_length() - 1, now)
                continue
            best = self._best_holder(peer, now)
            if best:
                peer.starved = False
                self._launch(peer, best[0], best[1], now)
            elif not (peer.starved and self._second_copy(peer, now)):
                return

    def _second_copy(self, peer: _Peer, now: float) -> bool:
        """Give a receiver that nobody else can serve a piece from the seed, if that has a spare slot."""
        task = peer.task
        nums = task.seeded & ~peer.have & ~peer.asked
        if not nums or task.seed_uploads >= self._seed_slots + self.SPARE_SEED_SLOTS or now < peer.seed_retry_at:
            return False
        peer.starved = True
        self._launch(peer, None, self._first(task, nums), now)
        return True

    def _best_holder(self, peer: _Peer, now: float) -> Optional[Tuple[_Peer, int]]:
        """Return the nearest free holder of something rare: same rack, same site, anywhere; the faster one of two."""
        for place in reversed(peer.places):
            found = []
            for i, holder in enumerate(self._candidates(place.idle, peer.host)):
                nums = self._allowed(peer, holder, now) if self._free(holder, now) else 0
                if nums:
                    num = peer.task.rarest(nums, self._rng)
                    found.append((holder.host is not peer.host, peer.task.rarity(num), -holder.host.speed, i, holder, num))
            if found:
                return min(found)[4:]  # type: ignore[return-value]
        return None

    def _serve_alone(self, peer: _Peer, now: float) -> None:
        """Give the only receiver of a task a long batch, in order, spread over those who have it by their speed.

        From the seed also pieces that are still to come: its piece port holds such a request.
        """
        task = peer.task
        count = min(peer.room + peer.queue, peer.batch + peer.room) - sum(not flight.slot for flight in peer.flights.values())
        if count <= 0:
            return
        wanted = (task.all if task.count is not None else task.seeded) & ~peer.have & ~peer.asked
        holders = [h for h in task.swarm.idle.draw(self.SAMPLE, self._rng) if h is not peer and peer.blocked.get(h.cid, 0) <= now]
        fastest = max([h.host.speed for h in holders] or [0.0]) or 1.0
        busy = {flight.holder for flight in peer.flights.values()}
        load = {h: 0.0 for h in holders}
        for num in nums_of(wanted)[:count]:
            able = [h for h in holders if h.offers >> num & 1 and (
                not h.suspensions or now < peer.seed_retry_at  # else one that has kept others waiting is tried with one piece
                or h.suspensions < 2 and h not in busy and not load[h])] if task.seeded >> num & 1 else []
            best = min(able, key=lambda h: load[h]) if able else None
            if best:
                load[best] += fastest / (best.host.speed or fastest)
            elif now < peer.seed_retry_at:
                break
            self._launch(peer, best, num, now, slot=False)
        peer.batch *= 2 if peer.flights else 1

    # -- time --------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """A few times a second: what is late, who starves, who is forgiven."""
        for task in self._tasks.values():
            for peer in list(task.peers.values()):
                if 0 < peer.suspended_until <= now:
                    peer.suspended_until = 0.0
                    self._count(peer, peer.serves)
                    self._index(peer, now)
                    self._use(peer, now)
                if peer.receiving:
                    self._look_after(peer, self.LATE * max(task.duration, peer.duration) + self.LATE_S, now)
            self._feed(task, now)

    def _look_after(self, peer: _Peer, late: float, now: float) -> None:
        """See what a receiver has waited for too long."""
        task = peer.task
        ending = peer.room > 0 and not task.all & ~peer.have & ~peer.asked  # it has nothing else to do than to fetch a late piece again
        for flight in list(peer.flights.values()):
            limit = self.LOST_S if not flight.slot else late if ending else max(10.0, 3 * late)
            if now - flight.since > limit:
                self._land(peer, flight)
                if flight.holder:
                    peer.blocked[flight.holder.cid] = now + 2 * late
                    self._use(flight.holder, now)
        if peer.room > 0 and not peer.flights:
            peer.idle_since = peer.idle_since if peer.idle_since is not None else now
            self._part(peer.host)
            self._serve(peer, now)
            starving = now - peer.idle_since > max(self.STARVE_S, 6 * task.duration) if peer.idle_since is not None else False
            if starving and self._second_copy(peer, now):
                self._serve(peer, now)
        elif peer.room > 0:
            self._serve(peer, now)
        self._index(peer, now)

    # -- asking ------------------------------------------------------------------

    def take(self, task_id: str, cid: str) -> List[Assignment]:
        """Return what has been assigned to a client since the last call."""
        peer = self._peer(task_id, cid)
        if not peer:
            return []
        mail, peer.mail = peer.mail, []
        return mail

    def inflight(self, task_id: str, cid: str) -> List[Assignment]:
        """Return all that is assigned to a client and has not ended."""
        peer = self._peer(task_id, cid)
        return [Assignment(f.num, f.holder.cid if f.holder else SEED) for f in peer.flights.values()] if peer else []

    def receivers(self, task_id: str) -> int:
        """Return how many clients receive a task."""
        task = self._tasks.get(task_id)
        return task.receivers if task else 0

    def others(self, task_id: str, cid: str) -> bool:
        """Return whether anybody but this client receives the task."""
        peer = self._peer(task_id, cid)
        return bool(peer and peer.task.receivers > peer.receiving)

    def woken(self) -> List[Tuple[str, str]]:
        """Return (task, cid) of the clients that were assigned something since the last call."""
        woken, self._woken = list(self._woken), {}
        return woken

    def finished(self, task_id: str, cid: str) -> bool:
        """Return whether a client has every piece."""
        peer = self._peer(task_id, cid)
        return bool(peer and peer.task.count is not None and peer.have == (1 << peer.task.count) - 1)

    def waiting_for(self, task_id: str, cid: str) -> Waiting:
        """Return why a client has nothing to do."""
        peer = self._peer(task_id, cid)
        if not peer:
            return Waiting(0, 0, True, 0)
        missing = peer.task.all & ~peer.have
        unseeded = missing & ~peer.task.seeded
        num = ((unseeded or missing or 1) & -(unseeded or missing or 1)).bit_length() - 1
        return Waiting(bin(missing).count("1"), num, not unseeded and bool(missing), peer.task.offered[num])

    def progress(self, task_id: str) -> Dict[str, Tuple[int, int]]:
        """Return (pieces held, pieces under way) by cid."""
        task = self._tasks.get(task_id)
        return {cid: (bin(peer.have).count("1"), len(peer.flights)) for cid, peer in task.peers.items()} if task else {}

    def seed_copies(self, task_id: str) -> float:
        """Return how many copies of the file the seed has sent."""
        task = self._tasks.get(task_id)
        return task.seed_sent / float(task.count) if task and task.count else 0.0


def _common(peer: _Peer, holder: Optional[_Peer]) -> int:
    """Return how many of a receiver's places its holder is in, wide to narrow; the seed is in none."""
    if holder is None:
        return 0
    if peer.places[-1] is holder.places[-1]:
        return len(peer.places)
    depth = 0
    for mine, other in zip(peer.places, holder.places):
        if mine is not other:
            break
        depth += 1
    return depth


# ==============================================================================
# 14. Cache rules
#    How long what an origin said holds, whose fetch is next, which files have to go,
#    and where they lie.
# ==============================================================================

class Caching(NamedTuple):
    """How long an origin lets its answer be used without another question.  RFC 9111, 4.2"""

    lifetime: float  # seconds from now on
    explicit: bool  # it has said so, else it is a guess
    keep: bool  # whether it may lie on a disk once nobody uses it
    must: bool  # no longer than that, also when it can't be asked

    @classmethod
    def of(cls, headers: Any, now: float) -> "Caching":
        """Read an answer's headers; what is no date or number counts as past."""
        said = {}  # type: Dict[str, str]
        for part in ",".join(headers.get_all("Cache-Control") or ()).split(","):
            name, _, value = part.strip().partition("=")
            said.setdefault(name.strip().lower(), value.strip(' "'))
        date = cls._time(headers.get("Date")) or now
        ages = [said[name] for name in ("s-maxage", "max-age") if name in said]
        explicit = True
        if "no-cache" in said or "no-store" in said:
            lifetime = 0.0
        elif ages:
            lifetime = float(ages[0]) if re.match(r"^\d{1,10}$", ages[0]) else 0.0
        elif headers.get("Expires"):
            lifetime = (cls._time(headers["Expires"]) or 0.0) - date
        else:
            explicit = False
            lifetime = min(max(10.0, (date - (cls._time(headers.get("Last-Modified")) or date)) / 10), 180.0)
        age = headers.get("Age", "")
        if explicit and re.match(r"^\d{1,10}$", age):
            lifetime -= int(age)
        return cls(max(0.0, lifetime), explicit, "no-store" not in said,
                   any(name in said for name in ("must-revalidate", "proxy-revalidate", "s-maxage", "no-cache")))

    @staticmethod
    def _time(text: Optional[str]) -> Optional[float]:
        import email.utils
        try:
            parts = email.utils.parsedate_tz(text or "")
            return float(email.utils.mktime_tz(parts)) if parts else None
        except (TypeError, ValueError, OverflowError, IndexError):
            return None


YOUNG_S = 7200.0  # how long a file is left alone while the disk is only getting full.  Wire: 10.4


class Turns:
    """Who may fetch: so many at once in all, and so many of one origin; among those that could, who has waited longest.

    _changed guards everything with an underscore.
    """

    def __init__(self, most: int, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._changed = threading.Condition()
        self._running = collections.Counter()  # type: Dict[str, int]  # by origin
        self._waiting = collections.OrderedDict()  # type: Dict[Any, str]  # tickets, the oldest first, and their origins

    def take(self, origin: str, stopped: Callable[[], bool]) -> None:
        """Wait for a turn at an origin (host and port); end it with `give`.  Raises Stalled when `stopped`."""
        ticket = object()
        with self._changed:
            self._waiting[ticket] = origin
            try:
                while self._next_locked() is not ticket:
                    if stopped():
                        raise Stalled("stopped")
                    self._changed.wait(1.0)
                self._running[origin] += 1
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()  # there may be room for the next one, too

    def _next_locked(self) -> Any:
        if sum(self._running.values()) >= self._most:
            return None
        return next((ticket for ticket, origin in self._waiting.items() if self._running[origin] < self._most_each), None)

    def give(self, origin: str) -> None:
        """End a turn."""
        with self._changed:
            self._running[origin] -= 1
            if not self._running[origin]:
                del self._running[origin]
            self._changed.notify_all()

    def counts(self) -> Tuple[int, int]:
        """Return how many fetch, and how many wait."""
        with self._changed:
            return sum(self._running.values()), len(self._waiting)


class DiskRules(NamedTuple):
    """How much of its disk a cache may take.  Sizes in bytes, 0: as its flag's help says."""

    reserve: int = 0  # of the disk, left free
    capacity: int = 0  # of all cached files
    expire_s: float = 0.0  # after the last use
    young: int = 0  # free space below which what has not been used for YOUNG_S goes
    full: int = 0  # free space below which everything goes that is not in use

    def why(self, unused_s: float, used: int, free: int) -> str:
        """Return why a file goes that was not used for so long, "" if it stays; `used` and `free` bytes are on the disk."""
        if self.capacity and used > self.capacity:
            return "capacity"
        if self.expire_s and unused_s > self.expire_s:
            return "expired"
        return "full" if free < self.full else "young" if free < self.young and unused_s > YOUNG_S else ""


def path_of_task(folder: str, task_id: str) -> str:
    """Return where a task's bytes lie in a folder of the cache.  Wire: 5.2"""
    return os.path.join(folder, task_id[:3], task_id)


def cached_files(folder: str) -> List[Tuple[float, int, str]]:
    """Return (last use, bytes on the disk, path) of every file in a folder of the cache, oldest use first."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if re.match(r"^[0-9a-f]{64}$", name):
                try:
                    stat = os.stat(path)
                except OSError:
                    continue
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_blocks * 512, path))
    return sorted(found)


class MemoryShelf:
    """The part of a cache that lies in a memory file system: new files go there as long as they fit, the longest unused ones move to
    the disk so that a quarter stays free.  _lock guards _promised."""

    def __init__(self, folder: str, capacity: int) -> None:
        self.folder = make_folder(folder)
        self._capacity = capacity  # bytes, of all files there
        self._lock = threading.Lock()
        self._promised = {}  # type: Dict[str, int]  # bytes of files that are being written, by task

    def files(self) -> List[Tuple[float, int, str]]:
        """As cached_files."""
        return cached_files(self.folder)

    def take(self, need: int, task_id: str) -> bool:
        """Promise room for a file of so many bytes, unless there is none."""
        sizes = {os.path.basename(path): size for _, size, path in self.files()}
        try:
            free = free_bytes(self.folder)
        except OSError:
            return False
        with self._lock:
            others = {name: promised for name, promised in self._promised.items() if name != task_id}
            coming = sum(max(0, promised - sizes.get(name, 0)) for name, promised in others.items())
            own = sizes.get(task_id, 0)
            room = min(self._capacity - sum(sizes.values()) + own, free + own) - coming
            if need + (64 << 10) > room:  # there is a journal, too
                return False
            self._promised[task_id] = need
            return True

    def ended(self, task_id: str) -> None:
        """What was promised is written, or will not be."""
        with self._lock:
            self._promised.pop(task_id, None)

    def excess(self) -> int:
        """Return how many bytes are to move to the disk."""
        return sum(size for _, size, _ in self.files()) - self._capacity * 3 // 4


# ==============================================================================
# 15. CDN
#    From origin to seed pieces: one fetch a task, the cache on disk, whether it is
#    still what the origin has, and room for the next.  Knows no peers.
# ==============================================================================

class Sibling:
    """Another supernode that has, or gets, a task's file, and has taken us in for it."""

    version = ""  # what it is told to be a version of, as an origin says it or as the sibling names it itself
    length = None  # type: Optional[int]  # of the file, None while it is not known
    piece_size = 0  # as it was cut there
    caching = None  # type: Optional[Caching]  # as the origin has said it, None where that is not known

    def fill(self, store: TaskFile, on_piece: Callable[[int, int], None], on_length: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Fetch every missing piece, and tell of each with its bytes.  Raises whatever makes that impossible."""
        raise NotImplementedError


class CdnEvents:
    """What a CDN task tells its owner; called on the task's thread, without a lock."""

    def on_way(self, task: "CdnTask") -> None:
        """It is decided whether a sibling is asked first (`relays`)."""

    def on_known(self, task: "CdnTask") -> None:
        """The origin has answered: the piece size is fixed, the length perhaps known."""

    def on_length(self, task: "CdnTask") -> None:
        """The length is known."""

    def on_piece(self, task: "CdnTask", num: int) -> None:
        """Piece `num` is on disk and its digest known."""

    def on_end(self, task: "CdnTask") -> None:
        """The fetch is over: `state` and `error` say how."""

    def on_full(self, task: "CdnTask") -> bool:
        """There is no room for it: let go of the longest unused task that nobody downloads; return whether there was one."""
        return False


class CdnTask:
    """The supernode's own copy of one task.  _lock guards state, error, store, promised_size and _thread."""

    WAITING, RUNNING, SUCCESS, FAILED = "WAITING", "RUNNING", "SUCCESS", "FAILED"

    def __init__(self, cdn: "Cdn", task_id: str, url: str, events: CdnEvents) -> None:
        self._cdn, self._events = cdn, events
        self.task_id, self.url = task_id, url
        self.folder = cdn.folder  # where its file is, or will be
        self.state = self.WAITING
        self.error = None  # type: Optional[DflyError]
        self.store = None  # type: Optional[TaskFile]
        self.ended_at = 0.0  # monotonic
        self.likely_size = MIB  # of pieces, as far as can be said before the origin has answered
        self.promised_size = 0  # the same, once it is certain
        self.version = ""  # names this very copy to peers that resume, also where the origin names none
        self.origin_bytes = 0  # read from the origin, by all fetches
        self.sibling_bytes = 0  # and from siblings and their clients
        self.names = ("", "", "")  # taskUrl, MD5 and identifier: under which a sibling finds it
        self.piece_path = ""  # where its pieces are found on our piece port
        self.relays = None  # type: Optional[bool]  # whether it comes, or shall come, from a sibling; None: not decided
        self.caching = None  # type: Optional[Caching]  # as the origin's last answer has it
        self._fresh_until = 0.0  # time.time() until which it need not be asked again
        self._lock = threading.Lock()
        self.settled = threading.Event()  # no fetch is under way, and its end has been told
        self._thread = None  # type: Optional[threading.Thread]
        self._stopping = False
        self._speed = (0.0, 0)  # (when, bytes) the last time somebody asked how fast it is

    @property
    def path(self) -> str:
        """Where its bytes lie.  Wire: 5.2"""
        return path_of_task(self.folder, self.task_id)

    def promise(self, size: int = 0) -> int:
        """Return how large its pieces are, in bytes: from now on `size`, or what is likely, unless that has been said before."""
        with self._lock:
            self.promised_size = self.promised_size or size or self.likely_size
            return self.promised_size

    def ensure(self, origin: Origin, alone: bool = False) -> None:
        """Begin to fetch, unless that is under way, done, or has failed a moment ago; `alone`: from the origin only, since it is a
        sibling that asks, and two that wait for each other would wait for ever."""
        with self._lock:
            if self._stopping or self.state in (self.RUNNING, self.SUCCESS):
                return
            if self.state == self.FAILED and time.monotonic() < self.fails_until():
                return
            self.state, self.error = self.RUNNING, None
            self.relays = None if self._cdn.siblings and not alone else False
            self.settled.clear()
            self._speed = (time.monotonic(), self.origin_bytes + self.sibling_bytes)
            self._thread = threading.Thread(target=self._run, args=(origin,), name="dfly-cdn-" + self.task_id[:8], daemon=True)
            self._thread.start()

    def fails_until(self) -> float:
        """Return until when (monotonic) a failure stands before the origin is asked again: longer where it wants to be left alone."""
        wish = getattr(self.error, "retry_s", None) or 0.0
        return self.ended_at + max(self._cdn.retry_s, min(wish, self._cdn.LEAVE_S))

    def refetch(self, num: int, origin: Origin, on_lost: Callable[[], None]) -> bool:
        """Look at piece `num` again; when it is no longer what it was, or can't be read, say so, fetch it anew and return True."""
        store = self.store
        if not store or not store.seal(num):
            return False
        try:
            if not store.read_back([num]):
                return False
        except CannotRead as error:
            self._cdn.log.error("task %s: %s", self.task_id, error)
        try:
            store.drop([num])
        except (NoSpace, CannotWrite) as error:
            self._end(self.FAILED, error)
            return True
        on_lost()
        with self._lock:
            if self.state == self.SUCCESS:
                self.state = self.WAITING
        self.ensure(origin)
        return True

    def stale(self) -> bool:
        """Return whether the origin is to be asked before this is given to anybody else; of a file without a name of its version it
        could say nothing."""
        return (self.state == self.SUCCESS and any(version_parts(self.version)) and not content_of(self.url) and bool(self.caching)
                and time.time() >= self._fresh_until)

    def revalidate(self, origin: Origin) -> bool:
        """Ask the origin whether this is still its file; return whether it is, or can't be asked.  Raises SourceError where it refuses
        this asker."""
        assert self.caching and self.store
        try:
            reply = origin.vouch(if_none_match(self.version))
            if reply.status != 304 and not reply.version:  # not every origin answers HEAD as it answers GET
                reply = origin.open(headers=if_none_match(self.version))
                reply.close()
        except SourceError as error:
            if error.status in (401, 403, 407):
                raise
            if error.status or self.caching.must:
                return False  # the next fetch will say why
            self._cdn.log.warn("task %s: %s; what is here is served on", self.task_id, error)
            self._fresh_until = time.time() + self._cdn.retry_s
            return True
        same = self._unchanged(self.store, reply)
        METRICS.add("dfly_cache_checks_total", result="same" if same else "changed")
        if not same:
            return False
        self._note_caching(self.store, origin, self._caching_of(reply))
        return True

    def doubt(self, version: str) -> None:
        """Somebody says which version the origin has now: if it is another one, the origin is asked before this is given on."""
        if version and self.version and not same_version(version, self.version):
            self._fresh_until = 0.0

    def fresh_caching(self) -> Optional[Caching]:
        """Return how long this may be served from now on without a question."""
        return self.caching and self.caching._replace(lifetime=max(0.0, self._fresh_until - time.time()))

    def rate(self, now: float) -> float:
        """Return bytes per second from origin or sibling since this was last asked, at least a second ago."""
        (then, count), came = self._speed, self.origin_bytes + self.sibling_bytes
        if now - then >= 1.0:
            self._speed = (now, came)
        return (came - count) / max(now - then, 0.1) if then else 0.0

    def stop(self, limit_s: float = 0.0) -> None:
        """End the fetch, and wait for that at most `limit_s` seconds; what is on disk stays.

        Whoever is last lets go of the file: a fetch that waits for a silent origin does so when it ends.
        """
        with self._lock:
            self._stopping = True
            thread = self._thread
            if not thread and self.store:
                self.store.close()
        if thread and limit_s:
            thread.join(limit_s)

    # -- on the task's thread ---------------------------------------------------

    def _run(self, origin: Origin) -> None:
        try:
            self._obtain(origin)
            self._end(self.SUCCESS, None)
        except DflyError as error:
            if isinstance(error, CannotRead):
                self._cdn.forget_file(self.path)
            self._end(self.FAILED, error)
        except Exception as error:  # noqa: BLE001 a fault of ours: the peers must learn that nothing more will come
            import traceback
            self._cdn.log.error("task %s: %s", self.task_id, traceback.format_exc())
            self._end(self.FAILED, DflyError("internal error: %s" % type(error).__name__))
        with self._lock:
            if self._thread is threading.current_thread():  # else it has failed and been started again meanwhile
                self._thread = None
                if self._stopping and self.store:
                    self.store.close()

    def _end(self, state: str, error: Optional[DflyError]) -> None:
        with self._lock:
            self.state, self.error, self.ended_at = state, error, time.monotonic()
        self._cdn.ended(self.task_id)
        METRICS.add("dfly_tasks_ended_total", result=state.lower())
        if isinstance(error, (NoSpace, CannotWrite)):
            METRICS.add("dfly_disk_errors_total", why="full" if isinstance(error, NoSpace) else "unreadable" if isinstance(error, CannotRead) else "unwritable")
        self._cdn.log.info("task %s %s: %s", self.task_id, state, error or self.url)
        self._events.on_end(self)
        self.settled.set()

    def _obtain(self, origin: Origin) -> None:
        """Have the file here: from a sibling where one is to be asked first, else, and what it owes us, from the origin."""
        if self.store:
            self._decide(False)
        kept = None if self.store else self._kept()
        version = self._in_turn(origin, kept) if self.store or kept else ""
        if version is not None and not self._relay(origin, version):
            self._in_turn(origin, None)

    def _relay(self, origin: Origin, version: str) -> bool:
        """Fetch the file (this version, where one is named) from a sibling; return whether all of it has come."""
        siblings, node = self._cdn.siblings, None
        if siblings and self.relays is None:
            origin.check_address()  # what this supernode does not fetch it does not have fetched either
            node = siblings.first(self.names[0])
        if node is None:
            self._decide(False)
            return False
        self._decide(True)
        siblings.turns.take(str(node), lambda: self._stopping)
        try:
            self._take(origin, siblings.enter(node, self, origin, version, lambda: self._stopping))
            return True
        except (NoSpace, CannotWrite):
            raise
        except DflyError as error:
            if self._stopping:
                raise
            self._cdn.log.warn("task %s: a sibling fails, the origin is asked: %s", self.task_id, error)
            self._decide(False)
            return False
        finally:
            siblings.turns.give(str(node))

    def _decide(self, relays: bool) -> None:
        self.relays = relays
        self._events.on_way(self)

    def _take(self, origin: Origin, sibling: Sibling) -> None:
        """Fetch the file from a sibling.  Raises what `fill` does."""
        if self.promise(sibling.piece_size) != sibling.piece_size:
            raise Stalled("it comes in other pieces there than clients have been told here")
        METRICS.add("dfly_cache_total", result="miss")
        store = self._create(sibling.version, sibling.length, sibling.piece_size)
        if sibling.caching:
            self._note_caching(store, origin, sibling.caching)
        self._adopt(store)

        def on_piece(num: int, count: int) -> None:
            self.sibling_bytes += count
            METRICS.add("dfly_sibling_bytes_total", count)
            self._events.on_piece(self, num)

        sibling.fill(store, on_piece, lambda: self._events.on_length(self), lambda: self._stopping)

    def _in_turn(self, origin: Origin, kept: Optional[TaskFile]) -> Optional[str]:
        """As `_fetch`, when it is this task's turn at the origin."""
        place = urlsplit(origin.url).netloc.rpartition("@")[2].lower()
        try:
            self._cdn.turns.take(place, lambda: self._stopping)
        except DflyError:
            if kept:
                kept.close()
            raise
        try:
            return self._fetch(origin, kept)
        finally:
            self._cdn.turns.give(place)

    def _fetch(self, origin: Origin, kept: Optional[TaskFile]) -> Optional[str]:
        """Fetch what is missing; or return as which version the origin has the file now, where a sibling is to be asked for that first."""
        if self.store:  # only a piece or the rest is missing
            self._fill(origin, None)
            return None
        had = "miss" if not kept else "part" if kept.claimed != kept.layout.count else "hit"
        try:
            reply = self._ask(origin, kept)
        except DflyError:
            if kept:
                kept.close()  # it is locked as long as it is open
            raise
        if kept and (reply is None or self._unchanged(kept, reply)):
            METRICS.add("dfly_cache_total", result=had)
            self._decide(False)
            self._reuse(origin, kept, reply)
            return None
        assert reply
        if kept:
            kept.close()
            if self.relays is None:
                reply.close()
                return reply.version
        METRICS.add("dfly_cache_total", result="miss")
        self._anew(origin, reply)
        return None

    def _kept(self) -> Optional[TaskFile]:
        """Return what an earlier run has left, if it can still be of use."""
        self.folder = self._cdn.folder_of(self.task_id)
        kept = TaskFile.resume(self.path, self.path + ".journal")
        if kept and (not any(version_parts(kept.about.get("version", "")))  # nothing could tell us whether it is still the origin's file
                     or kept.about.get("keep") == "no"
                     or not same_file(kept.about.get("url", ""), without_secrets(self.url))
                     or self.promised_size not in (0, kept.layout.size)):
            kept.close()
            return None
        if kept:
            self.likely_size = kept.layout.size
        return kept

    @staticmethod
    def _unchanged(kept: TaskFile, reply: OriginReply) -> bool:
        return reply.status == 304 or (same_version(reply.version, kept.about["version"])
                                       and (reply.length is None or kept.layout.length in (None, reply.length)))

    def _ask(self, origin: Origin, kept: Optional[TaskFile]) -> Optional[OriginReply]:
        """Ask the origin for the file, or whether it has changed; None when it can't be reached and we have it all."""
        whole = kept is not None and kept.layout.count is not None and kept.claimed == kept.layout.count
        if kept and time.time() < float(kept.about.get("fresh", "0")):
            return None
        try:
            if whole and origin.content:
                origin.vouch()
                return None
            if kept and self.relays is None:
                head = origin.vouch(if_none_match(kept.about["version"]))
                if head.status == 304 or (head.version and not self._unchanged(kept, head)):
                    return head  # what it has now is perhaps a sibling's to fetch
            patience = Patience(lambda: self._stopping, self._cdn.log.warn)
            return patience.first(origin, if_none_match(kept.about["version"]) if kept else ())
        except NeedAuth:
            raise
        except SourceError as error:
            if not kept or not whole or error.status or kept.about.get("must") == "yes":
                raise
            self._cdn.log.warn("task %s: %s; serving what was fetched before", self.task_id, error)
            return None

    def _reuse(self, origin: Origin, kept: TaskFile, reply: Optional[OriginReply]) -> None:
        """Go on with what an earlier run has fetched: announce what is still true, fetch the rest."""
        self._adopt(kept)
        if reply:
            self._note_caching(kept, origin, self._caching_of(reply))
        else:
            self._recall_caching(kept)
        if reply and (reply.status == 304 or reply.ranges and kept.claimed):  # else it would send again what is here
            reply.close()
            reply = None
        wrong = kept.verify(lambda num: self._events.on_piece(self, num))
        if wrong:
            self._cdn.log.warn("task %s: %d cached pieces were damaged", self.task_id, wrong)
        if reply and kept.complete:
            reply.close()
            return
        self._fill(origin, reply)

    def _anew(self, origin: Origin, reply: OriginReply) -> None:
        """Fetch the file that `reply` begins."""
        try:
            store = self._create(reply.version, reply.length, self.promise(choose_piece_size(reply.length)))
            self._note_caching(store, origin, self._caching_of(reply))
        except DflyError:
            reply.close()
            raise
        self._adopt(store)
        self._fill(origin, reply)

    def _create(self, version: str, length: Optional[int], size: int) -> TaskFile:
        """Return an empty file for it, with room for all of it.  Raises NoSpace, CannotWrite."""
        if self._cdn.place_in_memory(length, self.task_id):
            assert self._cdn.memory
            self.folder = self._cdn.memory.folder
            try:
                return self._create_here(version, length, size)
            except (NoSpace, CannotWrite) as error:
                self._cdn.log.warn("task %s goes to the disk: %s", self.task_id, error)
        self.folder = self._cdn.folder
        if length:
            self._cdn.make_room(length, self.task_id, lambda: self._events.on_full(self))
        return self._create_here(version, length, size)

    def _create_here(self, version: str, length: Optional[int], size: int) -> TaskFile:
        make_folder(os.path.dirname(self.path))
        about = {"task": self.task_id, "url": without_secrets(self.url), "version": version}
        store = TaskFile.create(self.path, self.path + ".journal", about, length, size)
        try:
            if store.reserve():
                self._cdn.ended(self.task_id)  # no promise any more
        except DflyError:
            store.delete()
            raise
        return store

    def _caching_of(self, reply: OriginReply) -> Caching:
        caching = Caching.of(reply.headers, time.time())
        if reply.status == 304 and not caching.explicit and self.caching:
            return self.caching  # what it has said before still holds
        return caching

    def _recall_caching(self, kept: TaskFile) -> None:
        """What an earlier run has noted holds on; what it could not ask about now is asked about soon."""
        now, fresh = time.time(), float(kept.about.get("fresh", "0"))
        self.caching = Caching(max(0.0, fresh - now), fresh > 0, kept.about.get("keep") != "no", kept.about.get("must") == "yes")
        self._fresh_until = max(fresh, now + self._cdn.retry_s)

    def _note_caching(self, store: TaskFile, origin: Origin, caching: Caching) -> None:
        """Note how long this may be served without a question; on disk only what it takes no credentials to read, and no guess."""
        now = time.time()
        self.caching = caching
        self._fresh_until = now + max(1.0, caching.lifetime)  # those who ask at once are one question
        lasting = caching.explicit and not origin.credentials()
        store.note(fresh="%d" % (now + caching.lifetime if lasting else 0), keep="yes" if caching.keep else "no", must="yes" if caching.must else "no")

    def _adopt(self, store: TaskFile) -> None:
        self.store = store
        self.version = store.about["version"] or "once %.6f" % time.time()
        self._events.on_known(self)

    def _fill(self, origin: Origin, reply: Optional[OriginReply]) -> None:
        assert self.store
        store, start = self.store, self.origin_bytes

        def count() -> None:
            METRICS.add("dfly_origin_bytes_total", start + filler.read_bytes - self.origin_bytes)
            self.origin_bytes = start + filler.read_bytes

        def on_piece(num: int) -> None:
            count()
            self._events.on_piece(self, num)

        filler = Filler(origin, store, self._cdn.bucket, on_piece, lambda: self._events.on_length(self), lambda: self._stopping,
                        self._cdn.log.warn)
        try:
            filler.fill(reply)
        except SourceChanged:
            remove(store.journal)  # its first part is of no use to a later run
            raise
        finally:
            count()


class Cdn:
    """The cache of a supernode: where tasks lie, which may go.  _lock guards _tasks and _reserved."""

    LOOK_S = 15.0  # between two looks at the disk.  Wire: 10.4
    LEAVE_S = 600.0  # an origin that wants to be left alone is, for this long at most

    def __init__(self, home: str, log: Log, bucket: TokenBucket, retry_s: float, rules: DiskRules, turns: Turns, siblings: Any = None,
                 memory: Optional[MemoryShelf] = None) -> None:
        self.folder = make_folder(os.path.join(home, "repo", "download"))
        self.memory = memory  # above that; None: there is none
        self.log, self.bucket = log, bucket
        self.retry_s = retry_s  # how long a failure stands before the origin is asked again
        self.rules, self.turns = rules, turns
        self.siblings = siblings  # who may be asked before an origin is, in `turns`: first(task_url), enter(node, task, origin, version, stopped)
        self._making_room = threading.Lock()  # one at a time looks what is free
        self._reserved = {}  # type: Dict[str, int]  # bytes for which room was made, by task, until its fetch ends
        self._lock = threading.Lock()
        self._tasks = {}  # type: Dict[str, CdnTask]
        self._ended = threading.Event()
        self._crowded = threading.Event()  # something did not fit, or it is time for a look, or the end
        self._collector = threading.Thread(target=self._collect, name="dfly-gc", daemon=True)

    def start(self) -> None:
        """Begin to look after the disk."""
        if self.memory:  # of which there may be less than before
            self._crowded.set()
        self._collector.start()

    def folder_of(self, task_id: str) -> str:
        """Return the folder in which a task's file is, or would be looked for."""
        if self.memory and os.path.exists(path_of_task(self.memory.folder, task_id) + ".journal"):
            return self.memory.folder
        return self.folder

    def place_in_memory(self, length: Optional[int], task_id: str) -> bool:
        """Return whether a new file shall lie in memory, where it has room then; what an older one left elsewhere goes."""
        if not self.memory:
            return False
        fits = length is not None and self.memory.take(length, task_id)
        self._remove(path_of_task(self.folder if fits else self.memory.folder, task_id))
        if not fits:
            self._crowded.set()
        return fits

    def task(self, task_id: str, url: str, events: CdnEvents) -> CdnTask:
        """Return the task of that id, made if it is new."""
        with self._lock:
            if task_id not in self._tasks:
                self._tasks[task_id] = CdnTask(self, task_id, url, events)
            return self._tasks[task_id]

    def release(self, task_id: str, unused_s: float = 0.0) -> None:
        """Forget a task that nobody has used for so many seconds, without waiting for its fetch; its bytes stay in the cache."""
        with self._lock:
            task = self._tasks.pop(task_id, None)
        if task:
            task.stop()
            self._used(task, unused_s)
            if task.caching and not task.caching.keep:
                self.forget_file(task.path)

    def delete(self, task_id: str) -> None:
        """Forget a task and remove its bytes."""
        self.release(task_id)
        for folder in self._folders():
            self._remove(path_of_task(folder, task_id))

    def _folders(self) -> List[str]:
        return [self.folder] + ([self.memory.folder] if self.memory else [])

    def stop(self) -> None:
        """End all fetches, within two seconds."""
        self._ended.set()
        self._crowded.set()
        with self._lock:
            tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:  # all are told before any is waited for
            task.stop()
        deadline = time.monotonic() + 2.0
        for task in tasks:
            task.stop(max(0.0, deadline - time.monotonic()))
            self._used(task)

    @staticmethod
    def _used(task: CdnTask, unused_s: float = 0.0) -> None:
        """Note on its file until when a task was in use (many disks don't keep the time of a read; those forgotten in one sweep were
        not used at one time), and let others have the memory that its pages take.  Wire: 16 (24)"""
        last = time.time() - unused_s
        try:
            os.utime(task.path, (last, last))
            fd = os.open(task.path, os.O_RDONLY)
        except OSError:  # it has none
            return
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass
        finally:
            os.close(fd)

    def forget_file(self, path: str) -> None:
        """Remove what lies there and is of no more use; a disk that does not let us is no trouble of whoever asks."""
        try:
            self._remove(path)
        except DflyError as error:
            self.log.warn("cache: %s", error)

    def _remove(self, path: str) -> None:
        remove(path + ".journal")
        remove(path)

    def _sacrifice(self, path: str, size: int, why: str) -> bool:
        """Remove a file, unless a task has begun to use it meanwhile; return whether it is gone."""
        with self._lock:
            if os.path.basename(path) in self._tasks:
                return False
            self._remove(path)
        METRICS.add("dfly_gc_files_total", why=why)
        METRICS.add("dfly_gc_bytes_total", size, why=why)
        self.log.info("cache: %s (%s) goes: %s", path, show_size(size), why)
        return True

    def idle_files(self, folder: str = "") -> List[Tuple[float, int, str]]:
        """Return (last use, bytes, path) of every cached file on the disk (or there) that no task uses just now, oldest use first."""
        with self._lock:
            active = set(self._tasks)
        return [file for file in cached_files(folder or self.folder) if os.path.basename(file[2]) not in active]

    def _collect(self) -> None:
        """The life of the thread that looks after the disk."""
        self._tidy()
        while not self._ended.is_set():
            self._crowded.wait(self.LOOK_S)
            self._crowded.clear()
            try:
                self.cool()
                self.collect()
            except (OSError, DflyError) as error:  # the disk's trouble is its own
                self.log.warn("cache: %s", error)
            self._ended.wait(1.0)  # not for every file that does not fit

    def _tidy(self) -> None:
        """Remove what a killed process was just moving."""
        for place, _, names in os.walk(self.folder):
            for name in names:
                if name.endswith(".moving"):
                    remove(os.path.join(place, name))

    def cool(self) -> None:
        """Move the longest unused files from memory to the disk until a quarter of the memory is free; those go whose time has come."""
        excess = self.memory.excess() if self.memory else 0
        for used_at, size, path in self.idle_files(self.memory.folder) if self.memory else []:
            if self.rules.expire_s and time.time() - used_at > self.rules.expire_s:
                excess -= size if self._sacrifice(path, size, "expired") else 0
            elif excess > 0 and not self._ended.is_set():
                excess -= size if self._move(path, size) else 0

    def _move(self, path: str, size: int) -> bool:
        """Move a file from memory to the disk, or drop it where that takes no more; return whether it is gone from there."""
        task_id = os.path.basename(path)
        target = path_of_task(self.folder, task_id)
        try:
            make_folder(os.path.dirname(target))
            self.make_room(size, task_id)
            for tail in ("", ".journal"):
                copy_to_disk(path + tail, target + tail + ".moving")
            with self._lock:
                if task_id not in self._tasks:
                    os.rename(target + ".moving", target)
                    os.rename(target + ".journal.moving", target + ".journal")
                    self._remove(path)
                    METRICS.add("dfly_memory_moved_bytes_total", size)
                    self.log.info("cache: %s (%s) moves from memory to the disk", task_id, show_size(size))
                    return True
            return False
        except (OSError, DflyError) as error:
            self.log.warn("cache: %s can't move to the disk: %s", task_id, error)
            return self._sacrifice(path, size, "room")
        finally:
            self.ended(task_id)
            for tail in ("", ".journal"):
                remove(target + tail + ".moving")

    def collect(self) -> None:
        """Remove what is not in use and, by the rules for the disk, has to go; the longest unused first.  Wire: 10.4"""
        used = sum(size for _, size, _ in cached_files(self.folder))
        for used_at, size, path in self.idle_files():
            why = self.rules.why(time.time() - used_at, used, free_bytes(self.folder))
            if not why:
                return  # those that follow were used later
            if self._sacrifice(path, size, why):
                used -= size

    def _promised(self, task_id: str) -> int:
        """Return the bytes that other fetches will still write."""
        with self._lock:
            stores = [(need, self._tasks[other].store) for other, need in self._reserved.items() if other in self._tasks and other != task_id]
        return sum(max(0, need - (store.kept_bytes if store else 0)) for need, store in stores)

    def free(self) -> int:
        """Return the bytes free on the disk; none when it does not say."""
        try:
            return free_bytes(self.folder)
        except OSError:
            return 0

    def ended(self, task_id: str) -> None:
        """A fetch has ended: what room was made for and is not on the disk is free again."""
        with self._lock:
            self._reserved.pop(task_id, None)
        if self.memory:
            self.memory.ended(task_id)

    def make_room(self, need: int, task_id: str, let_go: Callable[[], bool] = lambda: False) -> None:
        """Remove the longest unused files until `need` bytes and the reserve are free, and all fits into the capacity.

        What the task itself has on disk counts as free, what other fetches will still write does not.  When no file is left,
        `let_go` may make one unused, and says whether it has.  Raises NoSpace when all that is not enough, CannotWrite.
        """
        make_folder(self.folder)  # somebody may have put another disk in its place
        with self._making_room:
            try:
                room = self._make_room(need + max(64 << 10, need >> 8), task_id, let_go)  # there are journals and logs, too
            except OSError as error:
                raise os_error(error, self.folder)
            if room + self.rules.reserve < need:  # what is left free for others is taken before a fetch fails
                raise NoSpace(self.folder, need, max(0, room))
            with self._lock:
                self._reserved[task_id] = need

    def _make_room(self, need: int, task_id: str, let_go: Callable[[], bool]) -> int:
        """Return the bytes free for the task, the reserve left out, once that is enough or nothing more can go."""
        own = path_of_task(self.folder, task_id)
        have = os.stat(own).st_blocks * 512 if os.path.exists(own) else 0
        while True:
            promised = self._promised(task_id)  # before what is on the disk is looked at: what comes meanwhile counts twice, not never
            idle = collections.deque(file for file in self.idle_files() if file[2] != own)
            used = sum(size for _, size, _ in cached_files(self.folder)) + promised - have
            while True:
                promised = self._promised(task_id)
                room = free_bytes(self.folder) - promised + have - self.rules.reserve
                room = min(room, self.rules.capacity - used) if self.rules.capacity else room
                if room >= need:
                    return room
                if not idle:
                    break
                _, size, path = idle.popleft()
                used -= size if self._sacrifice(path, size, "room") else 0
            if not let_go():
                return room


# ==============================================================================
# 16. Swarm
#    The tasks of a supernode and their clients: who is in, who may read, who is
#    gone; over scheduler and CDN, told by both.  Knows no requests.
# ==============================================================================

TICK_S = 0.25  # between two looks at what is late
SYNC_WAIT_S = 15.0  # how long a sync is held when there is nothing to say
HERD_S, HERD_MOST_S = 0.1, 60.0  # between two clients that a failed task sends to the origin; and for the last of them


class Peer:
    """One client of one task, as it registered.  Guarded by its Swarm's lock."""

    def __init__(self, cid: str, ip: str, port: int, path: str, reach: str, native: bool, caller: str) -> None:
        self.cid, self.ip, self.port, self.path = cid, ip, port, path
        self.caller = caller  # the address it called from
        self.reach = reach  # the address by which it reaches us, "" where it did not say
        self.native = native  # speaks /peer/sync
        self.turn = 0  # number of its newest sync
        self.parked = set()  # type: Set[int]  # those that wait for an answer; the API server's thread's
        self.seen_at = 0.0  # monotonic
        self.gone = False  # its connection broke while it waited
        self.requests = 0  # control requests, register included
        self.finished = False
        self.eager = False  # what it was last told: whether others wait for its pieces
        self.named = False  # whether it was told which version of the file this is
        self.measured = False  # whether it was told how long that is
        self.number = 0  # under which its task's clients know it
        self.line = ""  # under which it comes back
        self.md5_since = 0.0  # monotonic: since when it only lacks the MD5 of the whole file


class SwarmTask:
    """One task: its CDN half, its peers, and who may read it.  Guarded by its Swarm's lock."""

    def __init__(self, task_id: str, url: str, md5: str, cdn: CdnTask) -> None:
        self.task_id, self.url, self.md5 = task_id, url, md5
        self.cdn = cdn
        self.cid = ""  # under which our own pieces go
        self.secret = ""  # part of the way to our own pieces, where it takes credentials to read them
        self.peers = {}  # type: Dict[str, Peer]
        self.admitted = 0  # clients, ever
        self.cids = {}  # type: Dict[int, str]  # of those that are here, and some that were, by number
        self.used_at = 0.0  # monotonic
        self.origin = None  # type: Optional[Origin]  # as its last trusted asker asks for it
        self.proven = {}  # type: Dict[str, float]  # credentials -> until when (monotonic) the origin need not be asked again
        self.refused = {}  # type: Dict[str, Tuple[float, DflyError]]  # the same for those it refused
        self.checking = set()  # type: Set[str]
        self.begun = threading.Event()  # there is a piece, or there will be none
        self.follower = None  # type: Optional[Md5Follower]
        self.sent_away = 0  # clients that were told that it has failed
        self.rechecked_at = -1e9  # monotonic: when a complaint about our own pieces was last looked into

    def next_pause(self) -> float:
        """Return the seconds after which the next client may ask the origin itself.  Wire: 16 (40)"""
        self.sent_away += 1
        return min(HERD_MOST_S, round(HERD_S * (self.sent_away - 1), 3))

    def filled_by_another(self, origin: Origin) -> bool:
        """Return whether what is here came from another site than the one that this asker names."""
        return bool(content_of(self.url) and self.origin and urlsplit(origin.url).netloc != urlsplit(self.origin.url).netloc)

    def judged_for_another(self, origin: Origin) -> bool:
        """Return whether the fetch has failed for its first asker in a way that says nothing about this one."""
        if not self.cdn.error or not self.origin:
            return False
        return self.filled_by_another(origin) or (isinstance(self.cdn.error, NeedAuth) and self.origin.credentials() != origin.credentials())

    def stale(self) -> bool:
        """Return whether the origin is to be asked whether it still has this file; of what has a digest there is only one."""
        return not self.md5 and self.cdn.stale()

    def refusal(self, credentials: str, now: float) -> Optional[DflyError]:
        """Return why the origin has lately refused the file to these credentials, None if it has not."""
        until, error = self.refused.get(credentials, (0.0, None))
        return error if error and until > now else None

    def reportable(self) -> int:
        """Return the mask of the pieces that a client may have: all, or while their count is not known those that we have."""
        store = self.cdn.store
        if not store:
            return 0
        return store.have if store.layout.count is None else (1 << store.layout.count) - 1

    def num_of(self, text: str) -> int:
        """Return the piece that a range of the old wire means.  Raises BadRequest when nobody can have it.  Wire: 3.1"""
        num = (self.cdn.store.layout if self.cdn.store else Layout(None, MIB)).num_of(text)
        if not self.reportable() >> num & 1:
            raise BadRequest("pieceRange: %.60s: nobody has this piece" % text)
        return num

    def holder(self, cid: Any) -> str:
        """Return whom the scheduler knows under a cid of the wire, or under a number of ours."""
        if isinstance(cid, int):
            return self.cids.get(cid, "") if cid else SEED
        return SEED if str(cid) == self.cid or str(cid).startswith("cdnnode:") else str(cid)

    def piece_path(self) -> str:
        """Return where our own pieces are found on the piece port.  Wire: 5.3"""
        return "/download/%s/%s%s" % (self.task_id[:3], self.task_id, self.secret)


def locate(label: str, ip: str) -> Tuple[str, ...]:
    """Return a peer's location, wide to narrow: its `site/rack` label, else its /16 and /24 (IPv6: /48 and /64)."""
    import ipaddress
    parts = tuple(part.strip() for part in label.split("/") if part.strip())[:4]
    if parts:
        return parts if len(parts) > 1 else parts + ("",)
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return ("", "")
    wide, narrow = (16, 24) if address.version == 4 else (48, 64)
    return tuple(str(ipaddress.ip_network("%s/%d" % (ip, bits), strict=False)) for bits in (wide, narrow))


class Swarm(CdnEvents):
    """The tasks of a supernode and their clients, over scheduler and CDN.

    `lock` guards the tasks, their peers and the scheduler; it is never held over I/O, and what must wait for a change
    is parked in one of the two servers under ("task", id), ("peer", id, cid), ("md5", id) or ("piece", id, num).
    """

    QUIET_S = 2.0  # how long the check of a whole file waits for those who are receiving it

    def __init__(self, ip: str, log: Log, scheduler: Scheduler, cdn: Cdn, expire_s: float, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self.tasks = {}  # type: Dict[str, SwarmTask]
        self.lines = {}  # type: Dict[str, Tuple[str, str]]  # (task, cid) by what stands for them in a sync
        self.scheduler, self.cdn = scheduler, cdn
        self._ip, self._log = ip, log
        self._clock = clock
        self._expire_s = expire_s  # how long a task nobody asks for stays in memory
        self._api = None  # type: Optional[Server]
        self._pieces = None  # type: Optional[Server]

    def watch(self, api: Server, pieces: Server) -> None:
        """From now on wake what waits in these two servers, and look after tasks and clients."""
        self._api, self._pieces = api, pieces
        self.cdn.start()
        api.later(TICK_S, self._tick)
        api.later(1.0, self._watch_peers)
        api.later(5.0, self._collect)

    def stop(self) -> None:
        """End everything that runs; the cache stays."""
        for task in list(self.tasks.values()):
            if task.follower:
                task.follower.stop(1.0)
        self.cdn.stop()

    # -- what the CDN tells ----------------------------------------------------

    def on_way(self, task: CdnTask) -> None:
        """Siblings may wait to hear whether this one waits for others."""
        self.notify(("task", task.task_id))

    def on_known(self, task: CdnTask) -> None:
        """The size of the pieces is known, perhaps their number."""
        with self.lock:
            if task.task_id in self.tasks:
                assert task.store
                self.scheduler.add_task(task.task_id, task.store.layout.count)
        self.notify(("task", task.task_id))

    def on_length(self, task: CdnTask) -> None:
        """The number of pieces is known."""
        with self.lock:
            if task.task_id in self.tasks:
                assert task.store and task.store.layout.count is not None
                self.scheduler.set_count(task.task_id, task.store.layout.count, self._clock())
        self.after()

    def on_piece(self, task: CdnTask, num: int) -> None:
        """There is a new seed piece."""
        with self.lock:
            mine = self.tasks.get(task.task_id)
            if mine:
                mine.begun.set()
                self.scheduler.seeded(task.task_id, num, self._clock())
                if mine.follower:
                    mine.follower.nudge()
        self._notify_pieces(("piece", task.task_id, num))
        self.after()

    def on_end(self, task: CdnTask) -> None:
        """The fetch has ended; a digest that the user gave is checked before it counts as a success."""
        with self.lock:
            mine = self.tasks.get(task.task_id)
            peers = list(mine.peers) if mine else []
        if mine and task.state == task.SUCCESS:
            try:
                self._judge(mine)
            except (WrongBytes, CannotWrite, NoMd5) as error:
                task.state, task.error = task.FAILED, error
        if mine:
            mine.begun.set()
        self.notify(("task", task.task_id))
        for cid in peers:
            self.notify(("peer", task.task_id, cid))
        if task.state == task.FAILED and task.store:
            for num in range(min(task.store.layout.count or 0, MAX_COUNT)):
                self._notify_pieces(("piece", task.task_id, num))

    def on_full(self, task: CdnTask) -> bool:
        """There is no room on the disk: whatever nobody downloads just now may go."""
        with self.lock:
            idle = [other for other in self.tasks.values() if other.task_id != task.task_id and other.cdn.state != CdnTask.RUNNING
                    and all(peer.finished for peer in other.peers.values())]
            if not idle:
                return False
            self.forget_locked(min(idle, key=lambda other: other.used_at))
            return True

    def _judge(self, task: SwarmTask) -> None:
        """Hold a file that is here against what it must be.  Raises WrongBytes, CannotRead, NoMd5."""
        store = task.cdn.store
        assert store and store.layout.count is not None
        if task.md5:
            digest = self.follow(task).wait()
            if digest != task.md5.lower():
                raise WrongBytes(task.url, task.md5, digest)
        elif content_of(task.url):
            self._await_quiet(task)
            found = hashlib.sha256()
            for num in range(store.layout.count):
                for view in store.read_plain(num):
                    found.update(view)
            if "sha256:" + found.hexdigest() != task.url:
                remove(store.journal)  # of no use to anybody
                raise WrongBytes(task.url, task.url, "sha256:" + found.hexdigest())

    def _await_quiet(self, task: SwarmTask) -> None:
        """Wait a moment for those who are still receiving a file: they hold it against its digest themselves, and need the processor."""
        deadline = self._clock() + self.QUIET_S
        while self._clock() < deadline:
            with self.lock:
                if not self.scheduler.receivers(task.task_id):
                    return
            time.sleep(0.05)

    def follow(self, task: SwarmTask) -> Md5Follower:
        """Return the task's MD5 follower, started if it is new; its store must be known."""
        with self.lock:
            if not task.follower:
                assert task.cdn.store
                task.follower = Md5Follower(task.cdn.store, lambda: self.notify(("md5", task.task_id)))
            return task.follower

    # -- waking what waits -------------------------------------------------------

    def notify(self, key: Any) -> None:
        """Wake what is parked under a key."""
        if self._api:
            self._api.notify(key)

    def _notify_pieces(self, key: Any) -> None:
        if self._pieces:
            self._pieces.notify(key)

    def after(self) -> None:
        """After every change of the scheduler: wake the peers for whom it has found work."""
        with self.lock:
            woken = self.scheduler.woken()
        for task_id, cid in woken:
            self.notify(("peer", task_id, cid))

    def _tick(self) -> None:
        assert self._api
        self._api.later(TICK_S, self._tick)
        with self.lock:
            self.scheduler.tick(self._clock())
        self.after()

    # -- tasks that come and go ----------------------------------------------------

    def join_locked(self, task_id: str, url: str, md5: str, origin: Origin, own: bool) -> SwarmTask:
        """Return the task of that id, made if it is new.  `own`: its URL is that of the file.  Raises BadRequest."""
        task = self.tasks.get(task_id)
        now = self._clock()
        if task and not same_file(url, task.url):  # somebody has the task filled from elsewhere.  Wire: 16 (1)
            if not own:
                raise BadRequest("rawUrl: %.200s: the task has another file" % url)
            self.forget_locked(task)
            task = None
        if task and task.cdn.state == CdnTask.FAILED and (now > task.cdn.fails_until() or task.judged_for_another(origin)):
            self.forget_locked(task)  # what its peers hold may be of another version of the file
            task = None
        if not task:
            task = SwarmTask(task_id, url, md5, self.cdn.task(task_id, url, self))
            task.cid = "cdnnode:%s~%s" % (self._ip, task_id)  # Wire: 2.3
            task.origin = origin
            task.secret = "/" + os.urandom(16).hex() if origin.credentials() else ""
            task.cdn.piece_path = task.piece_path()
            task.proven[origin.credentials()] = float("inf")  # whoever's request fetches it is judged by that fetch
            self.tasks[task_id] = task
            self.scheduler.add_task(task_id, None)
        task.used_at = now
        return task

    def begin(self, task_url: str, md5: str, identifier: str, origin: Origin, alone: bool = False) -> SwarmTask:
        """Return the task that a client means, its fetch begun (`alone`: without siblings), its right to it not yet looked into.
        Raises BadRequest."""
        content = content_of(task_url)
        if content and not same_file(origin.url, content):
            raise BadRequest("rawUrl: %.200s: is no blob of the digest that taskUrl names" % origin.url)
        task_id = task_id_of(task_url, md5, identifier, origin.header("range"), origin.trust())
        with self.lock:
            task = self.join_locked(task_id, content or origin.url, md5, origin, own=same_file(origin.url, task_url))
        if task.cdn.state in (CdnTask.WAITING, CdnTask.FAILED):
            task.cdn.names = (task_url, md5, identifier)
            task.cdn.ensure(origin, alone)
        return task

    def forget_locked(self, task: SwarmTask) -> None:
        """Let go of a task; its file stays in the cache."""
        for peer in task.peers.values():
            self.lines.pop(peer.line, None)
        self.tasks.pop(task.task_id, None)
        self.scheduler.drop_task(task.task_id)
        if task.follower:
            task.follower.stop(0.0)
        self.cdn.release(task.task_id, max(0.0, self._clock() - task.used_at))
        self._log.info("task %s is no longer in use", task.task_id)

    def lives(self, task: SwarmTask) -> bool:
        """Return whether a task is still the one of its name."""
        with self.lock:
            return self.tasks.get(task.task_id) is task

    def look_again(self, task: SwarmTask, num: int, pause_s: float) -> None:
        """Somebody could not get piece `num` from us: unless that was looked into less than `pause_s` ago, see whether the disk still has it,
        and fetch it anew where not.  Wire: 16 (6)"""
        with self.lock:
            now = self._clock()
            if not task.cdn.store or not task.origin or now < task.rechecked_at + pause_s:
                return
            task.rechecked_at = now

        def on_lost() -> None:
            self._log.error("piece %d of %s was damaged on our disk", num, task.task_id)
            with self.lock:
                if self.tasks.get(task.task_id) is task:
                    self.scheduler.unseeded(task.task_id, num, self._clock())

        task.cdn.refetch(num, task.origin, on_lost)

    def _collect(self) -> None:
        """Forget tasks that nobody has asked for in a while.  Wire: 10.4"""
        assert self._api
        self._api.later(5.0, self._collect)
        with self.lock:
            now = self._clock()
            idle = [t for t in self.tasks.values() if now > t.used_at + self._expire_s and t.cdn.state != CdnTask.RUNNING
                    and all(peer.finished for peer in t.peers.values())]
            for task in idle:
                self.forget_locked(task)

    # -- whom the origin would let read ----------------------------------------------

    def prove(self, task: SwarmTask, origin: Origin, credentials: str, wait: bool = False) -> None:
        """Have the origin asked (and `wait` for its answer) whether it would give the file to these credentials too, and still has it.

        Wire: 10.3, 16 (2)
        """
        with self.lock:
            if credentials in task.checking or (task.proven.get(credentials, 0) > self._clock() and not task.stale()):
                return
            task.checking.add(credentials)
        if wait:
            return self._check(task, origin, credentials)
        threading.Thread(target=self._check, args=(task, origin, credentials), name="dfly-access", daemon=True).start()
        return None

    def _check(self, task: SwarmTask, origin: Origin, credentials: str) -> None:
        error, changed = None, False  # type: Optional[DflyError], bool
        try:
            if task.stale():
                changed = not task.cdn.revalidate(origin)
            elif task.filled_by_another(origin):
                task.begun.wait(Origin.TIMEOUT_S)
                if not task.cdn.store or not task.cdn.store.have:
                    raise SourceError("%s: nothing of it is here yet against which to hold what %s sends" % (task.url, origin.url))
                store = task.cdn.store
                start, length = store.layout.content_range(random.choice(nums_of(store.have)))
                origin.prove(start, start + length, store.read_at)
            else:
                origin.vouch()
        except DflyError as failure:
            error = failure
        with self.lock:
            task.checking.discard(credentials)
            public = "" in task.proven  # whom the origin does not know may read it: then anybody may, also while it can't be asked
            if error and not (public and getattr(error, "status", 0) not in (401, 403, 407)):
                task.refused[credentials] = (self._clock() + 10.0, error)
            else:
                task.proven[credentials] = max(task.proven.get(credentials, 0.0), self._clock() + 300.0)
            if changed and self.tasks.get(task.task_id) is task:
                self._log.info("task %s: the origin has another file now", task.task_id)
                self.forget_locked(task)
        self.notify(("task", task.task_id))

    # -- clients that come and go ------------------------------------------------------

    def admit_locked(self, task: SwarmTask, peer: Peer, label: str, seed_only: bool) -> None:
        """Take a client in whose right to the file is beyond doubt; `label` says where it is, if it does.  Wire: 16 (2)"""
        peer.seen_at = self._clock()
        peer.requests = 1
        if peer.cid in task.peers:
            self.lines.pop(task.peers[peer.cid].line, None)
        task.peers[peer.cid] = peer
        if len(task.cids) > 2 * len(task.peers) + 1000:  # of those that have left, somebody may still report
            task.cids = {other.number: other.cid for other in task.peers.values()}
        task.admitted += 1
        peer.number, peer.line = task.admitted, os.urandom(8).hex()
        task.cids[peer.number], self.lines[peer.line] = peer.cid, (task.task_id, peer.cid)
        self.scheduler.add_peer(task.task_id, peer.cid, (peer.ip, peer.port or peer.cid), locate(label, peer.ip), self._clock(),
                                 serves=peer.port > 0, legacy=not peer.native, seed_only=seed_only)
        if self.scheduler.receivers(task.task_id) == 2:  # whoever was alone need not have reported each piece at once until now
            for other in task.peers.values():
                if other.native and not other.finished and other is not peer:
                    self.notify(("peer", task.task_id, other.cid))

    def find(self, task_id: str, cid: str) -> Tuple[SwarmTask, Peer]:
        """Return a task and its client, both just seen alive.  Raises NoSuchTask."""
        with self.lock:
            task = self.tasks.get(task_id)
            peer = task.peers.get(cid) if task else None
            if not task or not peer:
                raise NoSuchTask("failed to get dfgetTask with taskID (%.64s) clientID (%.64s): data not found" % (task_id, cid))
            now = self._clock()
            task.used_at = peer.seen_at = now
            peer.gone = False
            peer.requests += 1
            return task, peer

    def leave(self, task: SwarmTask, peer: Peer) -> None:
        """As leave_locked."""
        with self.lock:
            self.leave_locked(task, peer)

    def leave_locked(self, task: SwarmTask, peer: Peer) -> None:
        """A client receives no more; what it has it still offers."""
        peer.finished = True
        self.scheduler.leave(task.task_id, peer.cid, self._clock())

    def drop_locked(self, task: SwarmTask, peer: Peer) -> None:
        """A client neither receives nor offers any more."""
        self.lines.pop(peer.line, None)
        del task.peers[peer.cid]
        self.scheduler.drop_peer(task.task_id, peer.cid, self._clock())

    def hung_up(self, task: SwarmTask, peer: Peer, turn: int) -> None:
        """A client has closed its parked sync: unless it comes back at once, it is gone.  On the API server's thread."""
        assert self._api
        peer.parked.discard(turn)
        if peer.turn == turn:
            peer.gone = True
            self._api.later(0.3, lambda: self._lose(task, peer))

    def _lose(self, task: SwarmTask, peer: Peer) -> None:
        with self.lock:
            if peer.gone and not peer.finished:
                self.leave_locked(task, peer)
        self.after()

    def _watch_peers(self) -> None:
        """Once a second: give up on clients that have not been heard of for too long, and forget those that serve nobody, too."""
        assert self._api
        self._api.later(1.0, self._watch_peers)
        with self.lock:
            now = self._clock()
            for task in self.tasks.values():
                for peer in list(task.peers.values()):
                    if not peer.finished and now > peer.seen_at + (4 * SYNC_WAIT_S if peer.native else self._expire_s):
                        self.leave_locked(task, peer)
                    if peer.finished and now > peer.seen_at + self._expire_s and not self.scheduler.serves(task.task_id, peer.cid):
                        self.drop_locked(task, peer)
        self.after()


# ==============================================================================
# 17. Preheat
#    A file, or all that is in an image, brought into the cache before anybody asks for
#    it: by an operator's word, or by a registry's that something was pushed.
# ==============================================================================

MANIFEST = 4 << 20  # bytes that a manifest may have for us to look into it
_BLOB = re.compile(r"^.+/blobs/sha256:([0-9a-f]{64})$")
_MANIFEST_URL = re.compile(r"^(https?://[^/?#]+/v2/.+)/manifests/([^/?#]+)$", re.I)
_MANIFESTS = ", ".join("application/vnd." + name for name in (
    "oci.image.index.v1+json", "oci.image.manifest.v1+json", "docker.distribution.manifest.list.v2+json", "docker.distribution.manifest.v2+json",
    "docker.distribution.manifest.v1+prettyjws"))


def parse_headers(texts: List[str]) -> List[Tuple[str, str]]:
    """Return (name, value) pairs of `Name: value` texts; raises BadRequest for what can't stand in a request.  Wire: 1.2"""
    pairs = []
    for text in texts:
        name, colon, value = text.partition(":")
        name, value = name.strip(), value.strip()
        if not colon or not re.match(r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$", name) or re.search(r"[\r\n\0]", value):
            raise BadRequest("not a header: %.80r" % text)
        if value:
            pairs.append((name, value))
    return pairs


def image_url(reference: str, plain_http: bool = False) -> str:
    """Return where the manifest of an image is, as docker reads `[HOST/]NAME[:TAG|@DIGEST]`.  Raises BadUsage."""
    match = re.match(r"^(?:((?:[\w-]+(?:\.[\w-]+)+(?::\d+)?|[\w-]+:\d+|localhost|\[[0-9a-fA-F:]+\](?::\d+)?))/)?"
                     r"([a-z0-9]+(?:(?:[._/]|__|-+)[a-z0-9]+)*)(?::([\w][\w.-]{0,127}))?(?:@(sha256:[0-9a-f]{64}))?$", reference, re.ASCII)
    if not match:
        raise BadUsage("neither a URL nor an image: %.200r" % reference)
    host, name, tag, digest = match.groups()
    if host in (None, "docker.io", "index.docker.io"):
        host, name = "registry-1.docker.io", name if "/" in name else "library/" + name
    return "%s://%s/v2/%s/manifests/%s" % ("http" if plain_http else "https", host, name, digest or tag or "latest")


class ManifestReader:
    """Reads manifests of one registry, with the token that it sends its askers for.  Used by one thread."""

    def __init__(self, headers: List[Tuple[str, str]], insecure: bool, fence: Optional[Fence]) -> None:
        self.headers = headers  # for the registry; they gain a token where it wants one
        self._insecure, self._fence = insecure, fence
        self._told = False  # it has got one

    def blobs(self, url: str, depth: int = 2) -> List[str]:
        """Return the URLs of all that is in the image whose manifest is at `url`, for all platforms.  Raises SourceError, NeedAuth."""
        base = _MANIFEST_URL.match(url)
        if not base:
            raise BadRequest("url: %.200s: not a manifest's (http://HOST/v2/NAME/manifests/TAG)" % url)
        try:
            known = json.loads(self._get(url).decode())
            inner = ["%s/manifests/%s" % (base.group(1), part["digest"]) for part in known.get("manifests") or ()]
            parts = [known["config"]] if known.get("config") else []
            digests = [part["digest"] for part in parts + (known.get("layers") or []) if not part.get("urls")]
            digests += [part["blobSum"] for part in known.get("fsLayers") or ()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError("%s: not a manifest" % url)
        found = ["%s/blobs/%s" % (base.group(1), digest) for digest in digests if content_of(str(digest))]
        for other in inner if depth else ():
            found += self.blobs(other, depth - 1)
        return list(collections.OrderedDict.fromkeys(found))

    def _get(self, url: str, accept: str = _MANIFESTS) -> bytes:
        try:
            reply = Origin(url, self.headers + [("Accept", accept)], self._insecure, (), self._fence).open()
        except NeedAuth as refusal:
            self._authorize(refusal)
            return self._get(url, accept)
        data, view = b"", memoryview(bytearray(1 << 16))
        try:
            count = reply.read_into(view)
            while count and len(data) <= MANIFEST:
                data += view[:count]
                count = reply.read_into(view)
        finally:
            reply.close()
        if len(data) > MANIFEST:
            raise SourceError("%s: a manifest of more than %s" % (url, show_size(MANIFEST)))
        return data

    def knock(self, url: str) -> None:
        """Get the token that it takes to read what is at `url`, if it takes one.  Raises SourceError, NeedAuth."""
        try:
            Origin(url, self.headers, self._insecure, (), self._fence).vouch()
        except NeedAuth as refusal:
            self._authorize(refusal)

    def _authorize(self, refusal: NeedAuth) -> None:
        if self._told or not refusal.challenge.lower().startswith("bearer "):
            raise refusal
        self._told = True
        token = self._token(dict(re.findall(r'(\w+)="([^"]*)"', refusal.challenge)))
        self.headers = [pair for pair in self.headers if pair[0].lower() != "authorization"] + [("Authorization", "Bearer " + token)]

    def _token(self, said: Dict[str, str]) -> str:
        query = "&".join("%s=%s" % (name, quote(said[name], safe=":/")) for name in ("service", "scope") if name in said)
        realm = said.get("realm", "")
        try:
            known = json.loads(self._get(realm + ("&" if "?" in realm else "?") + query, "application/json").decode())
            token = str(known.get("token") or known.get("access_token") or "")
        except (ValueError, AttributeError):
            token = ""
        if not re.match(r"^[!-~]+$", token):
            raise NeedAuth("%.200s: gives no token" % realm)
        return token


class Preheat:
    """One order to have something here.  Guarded by its Preheats' lock."""

    WAITING, RUNNING, SUCCESS, FAILED = "WAITING", "RUNNING", "SUCCESS", "FAILED"

    def __init__(self, number: str, kind: str, url: str, parent: str = "") -> None:
        self.number, self.kind, self.url, self.parent = number, kind, url, parent
        self.filter, self.identifier, self.headers, self.insecure = "", "", [], False  # type: str, str, List[Tuple[str, str]], bool
        self.children = []  # type: List[str]
        self.status, self.error = self.WAITING, ""
        self.began, self.finished = 0.0, 0.0  # time.time()

    def brief(self) -> Dict[str, Any]:
        """Return how it stands, for JSON.  Wire: 12"""
        def moment(seconds: float) -> str:
            return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds else "0001-01-01T00:00:00Z"
        found = {"ID": self.number, "startTime": moment(self.began), "finishTime": moment(self.finished), "status": self.status}
        return dict(found, errorMsg=self.error) if self.error else found

    def whole(self) -> Dict[str, Any]:
        """Return all that is known of it, without anybody's secrets, for JSON.  Wire: 12"""
        return {"ID": self.number, "URL": self.url, "Type": self.kind, "Filter": self.filter, "Identifier": self.identifier,
                "Headers": {name: "" if name.lower() in ("authorization", "cookie") else value for name, value in self.headers},
                "ParentID": self.parent, "Children": self.children, "Status": self.status, "StartTime": int(self.began * 1000),
                "FinishTime": int(self.finished * 1000), "ErrorMsg": self.error}


class Preheats:
    """The preheats of a supernode and the threads that see to them.  _lock guards _all, and the preheats in it."""

    WORKERS, ABREAST, MOST = 4, 4, 1000  # orders at once; blobs of an image at once; preheats that are remembered

    def __init__(self, swarm: Swarm, fence: Fence, log: Log, accounts: Dict[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._swarm, self._fence, self._log, self._clock = swarm, fence, log, clock
        self._accounts = accounts  # Authorization for those of whose pushes registries tell us, by host
        self._lock = threading.Lock()
        self._all = collections.OrderedDict()  # type: Dict[str, Preheat]
        self._orders = queue.Queue()  # type: queue.Queue
        self._threads = []  # type: List[threading.Thread]
        self._stopping = False

    def post(self, data: Dict[str, Any]) -> Tuple[int, str]:
        """Begin a preheat as a request's body describes it; return the HTTP status and its ID.  Raises BadRequest.  Wire: 12"""
        kind, url, headers = data.get("type"), data.get("url"), data.get("headers") or {}
        if kind not in ("file", "image"):
            raise BadRequest("type: %.60r: is neither image nor file" % kind)
        if not isinstance(url, str) or not re.match(r"^https?://[^/\s]+", url, re.I):
            raise BadRequest("url: %.200r: invalid value" % url)
        if kind == "image" and not _MANIFEST_URL.match(url):
            raise BadRequest("url: %.200s: not a manifest's (http://HOST/v2/NAME/manifests/TAG)" % url)
        if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
            raise BadRequest("headers: invalid value")
        names, identifier = str(data.get("filter") or ""), str(data.get("identifier") or "")
        pairs = parse_headers(["%s: %s" % pair for pair in headers.items()])
        origin = Origin(url, pairs, data.get("insecure") is True, (), self._fence)
        preheat = Preheat(task_id_of(filter_url(url, names), "", identifier, origin.header("range"), origin.trust()), str(kind), url)
        preheat.filter, preheat.identifier, preheat.headers, preheat.insecure = names, identifier, pairs, origin.insecure
        return self._enter(preheat)

    def pushed(self, data: Dict[str, Any]) -> List[str]:
        """Begin preheats of what a registry says was pushed to it (its notifications' envelope); return their IDs.  Raises BadRequest."""
        events, begun = data.get("events"), []
        if not isinstance(events, list):
            raise BadRequest("events: not a registry's notification")
        for event in events:
            target = event.get("target") if isinstance(event, dict) else None
            url = str(target.get("url") or "") if isinstance(target, dict) else ""
            if not url or event.get("action") not in ("push", "mount") or not (_MANIFEST_URL.match(url) or _BLOB.match(url)):
                continue
            kind = "image" if _MANIFEST_URL.match(url) else "file"
            preheat = Preheat(task_id_of(url), kind, url)
            account = self._accounts.get(urlsplit(url).netloc.lower())
            preheat.headers = [("Authorization", account)] if account else []
            begun.append(self._enter(preheat)[1])
        return begun

    def _enter(self, preheat: Preheat) -> Tuple[int, str]:
        with self._lock:
            known = self._all.get(preheat.number)
            if known and known.status in (known.WAITING, known.RUNNING):
                return 201, preheat.number
            self._all[preheat.number] = preheat
            over = [number for number, other in self._all.items() if other.finished][:max(0, len(self._all) - self.MOST)]
            for number in over:
                del self._all[number]
            if len(self._threads) < self.WORKERS:
                self._threads.append(threading.Thread(target=self._work, name="dfly-preheat", daemon=True))
                self._threads[-1].start()
        self._orders.put(preheat)
        return 201, preheat.number

    def find(self, number: str) -> Preheat:
        """Return a preheat.  Raises NoSuchTask."""
        with self._lock:
            if number not in self._all:
                raise NoSuchTask("preheat task %.80s doesn't exists" % number)
            return self._all[number]

    def whole(self) -> List[Dict[str, Any]]:
        """Return all that is known of all, for JSON.  Wire: 12"""
        with self._lock:
            return [preheat.whole() for preheat in self._all.values()]

    def delete(self, number: str) -> None:
        """Forget a preheat and its children; what is under way goes on.  Raises NoSuchTask."""
        preheat = self.find(number)
        with self._lock:
            for gone in [number] + preheat.children:
                self._all.pop(gone, None)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping = True
        for _ in self._threads:
            self._orders.put(None)

    # -- on the threads ------------------------------------------------------------

    def _work(self) -> None:
        while True:
            preheat = self._orders.get()
            if not preheat or self._stopping:
                return
            self._do(preheat, self._bring_image if preheat.kind == "image" else self._bring)

    def _do(self, preheat: Preheat, act: Callable[[Preheat], None]) -> None:
        preheat.status, preheat.began = preheat.RUNNING, time.time()
        try:
            act(preheat)
        except DflyError as error:
            preheat.error = str(error)
        except Exception as error:  # noqa: BLE001 a fault of ours must not end the thread
            import traceback
            self._log.error("preheat %s: %s", preheat.url, traceback.format_exc())
            preheat.error = "internal error: %r" % error
        with self._lock:
            preheat.status, preheat.finished = preheat.FAILED if preheat.error else preheat.SUCCESS, time.time()
        METRICS.add("dfly_preheats_total", result=preheat.status.lower())
        self._log.info("preheat %s %s: %s", preheat.number, preheat.status, preheat.error or preheat.url)

    def _bring_image(self, preheat: Preheat) -> None:
        from concurrent.futures import ThreadPoolExecutor
        reader = ManifestReader(preheat.headers, preheat.insecure, self._fence)
        children = []
        for url in reader.blobs(preheat.url):
            child = Preheat(task_id_of(url), "file", url, preheat.number)
            child.headers, child.insecure = reader.headers, preheat.insecure
            children.append(child)
        with self._lock:
            preheat.children = [child.number for child in children]
            self._all.update((child.number, child) for child in children)
        with ThreadPoolExecutor(self.ABREAST) as pool:
            list(pool.map(lambda child: self._do(child, self._bring), children))
        failed = [child for child in children if child.error]
        if failed:
            raise SourceError("%d of %d blobs: %s" % (len(failed), len(children), failed[0].error))

    def _bring(self, preheat: Preheat) -> None:
        """Have a file here.  Raises what keeps it from coming."""
        blob = _BLOB.match(preheat.url.partition("?")[0])
        content = "sha256:" + blob.group(1) if blob else ""
        headers = preheat.headers
        if blob and not preheat.parent:  # pushed by itself: it may take a token
            reader = ManifestReader(headers, preheat.insecure, self._fence)
            reader.knock(preheat.url)
            headers = reader.headers
        origin = Origin(preheat.url, headers, preheat.insecure, (), self._fence, content=content)
        credentials, task_url = origin.credentials(), content or filter_url(preheat.url, preheat.filter)
        for _ in range(3):  # a file that has changed is begun anew
            task = self._swarm.begin(task_url, "", preheat.identifier, origin)
            self._swarm.prove(task, origin, credentials, wait=True)
            refusal = task.refusal(credentials, self._clock())
            if refusal:
                raise refusal
            while not task.cdn.settled.wait(1.0):
                if self._stopping:
                    raise Stalled("the supernode ends")
            if task.cdn.error:
                raise task.cdn.error
            if self._swarm.lives(task):
                return


# ==============================================================================
# 18. Supernode
#    The HTTP API of a supernode: the old one as a thin translation onto the same
#    calls, and ours, one long-polled request for everything.  Knows no files.
# ==============================================================================

PULL_WAIT_S = 0.4  # how long an old pull is held: dfget 0.2 gives up after 3 s and then sleeps up to 2
REGISTER_WAIT_S = 2.5  # for the origin to say how long the file is; old clients give up after 5 s
LOOK_AGAIN_S = 0.5  # between two looks at pieces of ours of a task that clients say they could not get
SMALL = 256 << 10  # bytes: a file up to this size travels inside the register answer
_HALF = re.compile("[\ud800-\udfff]")  # JSON can write half a character, which nothing can be encoded from


class Fields:
    """The fields of a register, from JSON or a form, keys in any case.  Wire: 1.1, 1.2"""

    def __init__(self, request: Request) -> None:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        self._lists = {}  # type: Dict[str, List[Any]]
        if kind == "application/x-www-form-urlencoded":
            try:
                pairs = parse_qsl(request.body.decode("utf-8"), keep_blank_values=True)
            except ValueError:
                raise BadRequest("the form can't be read")
            for key, value in pairs:
                self._lists.setdefault(key.lower(), []).append(value)
        else:
            for key, value in request.json().items():
                self._lists[key.lower()] = value if isinstance(value, list) else [] if value is None else [value]

    def text(self, name: str, limit: int = 8192) -> str:
        """Return a field as text, "" when missing.  Raises BadRequest when it is no text or too long."""
        values = self._lists.get(name.lower(), [])
        value = values[-1] if values else ""
        if not isinstance(value, (str, int, float)) or len(str(value)) > limit or _HALF.search(str(value)):
            raise BadRequest("%s: invalid value" % name)
        return str(value)

    def number(self, name: str, least: int, most: int) -> int:
        """Return a field as an integer, 0 when missing.  Raises BadRequest."""
        text = self.text(name) or "0"
        if not re.match(r"^-?\d{1,18}$", text) or not least <= int(text) <= most:
            raise BadRequest("%s: %.40s: invalid value" % (name, text))
        return int(text)

    def flag(self, name: str) -> bool:
        """Return a field as a truth value."""
        return self.text(name).lower() in ("true", "1")

    def texts(self, name: str) -> List[str]:
        """Return a repeated field; a form's single one is a list of one."""
        values = self._lists.get(name.lower(), [])
        if len(values) > 256 or not all(isinstance(value, str) and not _HALF.search(value) for value in values):
            raise BadRequest("%s: invalid value" % name)
        return values


class Supernode:
    """The HTTP API: what clients and operators ask, told to the Swarm and answered from it."""

    ROUTES = (
        Route("POST", "/peer/registry", "register"),                  # Wire: 1
        Route("GET", "/peer/task", "pull", worker=True),              # Wire: 3 (may have to compute MD5s)
        Route("GET", "/peer/piece/suc", "piece_succeeded"),           # Wire: 4.1
        Route("GET", "/peer/piece/error", "piece_failed", worker=True),  # Wire: 4.2 (may have to reread a piece)
        Route("GET", "/peer/service/down", "service_down"),           # Wire: 4.3
        Route("POST", "/peer/sync", "sync"),                          # ours
        Route("POST", "/task/metrics", "task_metrics"),               # Wire: 4.4
        Route("POST", "/peer/heartbeat", "heartbeat"),                # Wire: 4.5
        Route("POST", "/peer/network", "network"),
        Route("POST", "/api/v1/peer/heartbeat", "heartbeat"),
        Route("POST", "/api/v1/peer/network", "network"),
        Route("GET", "/api/v1/tasks/", "task_info"),                  # Wire: 4.6
        Route("DELETE", "/api/v1/tasks/", "task_delete", worker=True),
        Route("POST", "/preheats", "preheat"),                        # Wire: 12
        Route("POST", "/preheats/registry", "preheat_pushed"),        # ours
        Route("GET", "/preheats", "preheats"),
        Route("GET", "/preheats/", "preheat_info"),
        Route("DELETE", "/preheats/", "preheat_delete"),
        Route("POST", "/api/v1/preheats", "preheat"),
        Route("GET", "/api/v1/preheats", "preheats"),
        Route("GET", "/api/v1/preheats/", "preheat_info"),
        Route("DELETE", "/api/v1/preheats/", "preheat_delete"),
        Route("GET", "/_ping", "ping"),
        Route("GET", "/version", "version"),
        Route("GET", "/sibling", "sibling"),                          # ours
        Route("GET", "/metrics", "metrics"),
    )
    PIECE_ROUTES = (
        Route("GET", "/download/", "download"),                       # Wire: 5.3
        Route("GET", "/qtdown/", "download"),                         # as supernode 0.2 called it
    )

    def __init__(self, swarm: Swarm, preheats: Preheats, advertise_ip: str, log: Log, fence: Fence, trusted: HostList, down_limit: int = 4,
                 clock: Callable[[], float] = time.monotonic, squeezer: Optional[Squeezer] = None, about: Optional[Dict[str, Any]] = None) -> None:
        self._swarm, self._preheats = swarm, preheats
        self._ip, self._log = advertise_ip, log
        self._clock = clock
        self._fence = fence  # from which origins it fetches
        self._trusted = trusted  # whose word about a client's address is good
        self._down_limit = down_limit  # pieces an old client may have under way.  Wire: 14 (9)
        self._squeezer = squeezer  # None: all pieces go as they are
        self._about = about or {}  # as which its siblings know it
        self._api = None  # type: Optional[Server]
        self._pieces = None  # type: Optional[Server]

    def serve(self, api: Server, pieces: Server) -> None:
        """Begin to answer on both ports."""
        self._api, self._pieces = api, pieces
        self._swarm.watch(api, pieces)
        pieces.start()
        api.start()

    def stop(self) -> None:
        """End everything that runs; the cache stays."""
        for server in (self._api, self._pieces):
            if server:
                server.stop()
        self._preheats.stop()
        self._swarm.stop()

    # -- register ------------------------------------------------------------------

    def register(self, request: Request) -> Any:
        """POST /peer/registry.  Wire: 1"""
        if "task" not in request.state or request.state["task"].judged_for_another(request.state["origin"]) \
                or not self._swarm.lives(request.state["task"]):
            try:
                self._enter(request, Fields(request))
            except (BadRequest, SourceError) as refusal:
                return Response.of_json({"code": refusal.code, "msg": str(refusal), "message": str(refusal)}, 400)
        task, peer = request.state["task"], request.state["peer"]
        if request.state["sibling"] and task.cdn.state == CdnTask.RUNNING and task.cdn.relays is not False:
            return self._sibling_waits(task, request)
        error = task.refusal(request.state["credentials"], self._clock())
        if error is None and task.cdn.state == CdnTask.FAILED:
            error = task.cdn.error
        if error:
            return self._register_failure(task, peer, error)
        checking = request.state["credentials"] in task.checking
        left = request.state["until"] - self._clock()
        if left > 0 and not request.expired and (checking or self._worth_waiting(task, peer)):
            return Park(("task", task.task_id), left)
        if checking and task.proven.get(request.state["credentials"], 0) <= self._clock():
            return Response.of_json({"code": SYSTEM_ERROR, "msg": "the origin does not say whether this client may read %s" % task.url})
        return self._registered(task, peer, request)

    def _sibling_waits(self, task: SwarmTask, request: Request) -> Any:
        """What comes from a sibling, or may yet, is given to no other sibling: they could wait for each other."""
        left = request.state["until"] - self._clock()
        if task.cdn.relays is None and left > 0 and not request.expired:
            return Park(("task", task.task_id), left)
        return Response.of_json({"code": SUPER_FAIL, "msg": "%s: this supernode asks a sibling itself" % task.url})

    @staticmethod
    def _worth_waiting(task: SwarmTask, peer: Peer) -> bool:
        """Return whether the answer to a register will soon say more than now: how long the file is, or what is in a small one."""
        store = task.cdn.store
        if not store or not peer.native:
            return not store
        if store.layout.length is None:
            return task.cdn.state != CdnTask.SUCCESS and not store.have
        return store.layout.length <= SMALL and not store.complete

    def _enter(self, request: Request, fields: Fields) -> None:
        """Check a register, and have its task begun and its client's right to it looked into.  Raises BadRequest."""
        peer = self._peer_of(request, fields)
        url = fields.text("rawUrl")
        if not re.match(r"^https?://[^/\s]+", url, re.I):
            raise BadRequest("rawUrl: %.200s: invalid value" % url)
        headers = parse_headers(fields.texts("headers"))
        cas = []
        for text in fields.texts("rootCAs"):
            import base64
            try:
                cas.append(base64.b64decode(text, validate=True).decode("ascii", "ignore"))  # the comments of a bundle may be in any language
            except ValueError:
                raise BadRequest("rootCAs: invalid value")
            if "-----BEGIN" not in cas[-1]:  # else it would be the name of a file of ours
                raise BadRequest("rootCAs: not PEM")
        md5 = fields.text("md5").lower()
        task_url = fields.text("taskUrl") or url
        origin = Origin(url, headers, fields.flag("insecure"), cas, self._fence, content=content_of(task_url))
        sibling = SIBLING_HEADER in request.headers
        task = self._swarm.begin(task_url, md5, fields.text("identifier"), origin, alone=sibling)
        if sibling:
            task.cdn.doubt(request.headers[SIBLING_HEADER])
        credentials = origin.credentials()
        request.state.update(task=task, peer=peer, origin=origin, credentials=credentials, sibling=sibling, until=self._clock() + REGISTER_WAIT_S)
        self._swarm.prove(task, origin, credentials)

    def _peer_of(self, request: Request, fields: Fields) -> Peer:
        import ipaddress
        cid, path, ip = fields.text("cid", 512), fields.text("path", 1024), fields.text("ip", 64)
        for name, value in (("cid", cid), ("path", path), ("ip", ip)):
            if not value or re.search(r"[\s\0]", value):
                raise BadRequest("%s: %.60r: invalid value" % (name, value))
        try:
            ip = str(ipaddress.ip_address(ip.split("%")[0]))
        except ValueError:
            raise BadRequest("ip: %.60s: invalid value" % ip)
        if cid.startswith("cdnnode:"):
            raise BadRequest("cid: %.60s: that is a supernode's" % cid)
        if not path.startswith("/"):
            raise BadRequest("path: %.60s: invalid value" % path)
        port = fields.number("port", 0, 65535)
        if port and not self._speaks_for(request, ip):
            self._log.warn("%s names the address %s, from which it does not call: not offered to others (trusted-peers)", request.client, ip)
            port = 0
        return Peer(cid, ip, port, path, fields.text("superNodeIp", 256), DFLY_HEADER in request.headers, request.client)

    def _speaks_for(self, request: Request, ip: str) -> bool:
        """Return whether a caller is the host of that address, or one whose word is good.  Wire: 16 (4)"""
        return request.client == ip or self._trusted.has_address(request.client)

    def _register_failure(self, task: SwarmTask, peer: Peer, error: DflyError) -> Response:
        answer = {"code": error.code if isinstance(error, (SourceError, TlsError)) else SUPER_FAIL, "msg": str(error)}  # type: Dict[str, Any]
        if peer.native:
            with self._swarm.lock:
                answer["pause"] = task.next_pause()
        return Response.of_json(answer)

    def _registered(self, task: SwarmTask, peer: Peer, request: Request) -> Any:
        label = request.headers.get(DFLY_HEADER, "").partition(" ")[2]
        with self._swarm.lock:
            lives = self._swarm.tasks.get(task.task_id) is task
            if lives:
                self._swarm.admit_locked(task, peer, label, seed_only=request.headers.get("x-dfly-pattern", "") == "cdn")
        if not lives:  # forgotten since it was looked at, as when the origin turned out to have another file: there is another one by now
            return self.register(request)
        store = task.cdn.store
        length = store.layout.length if store else None
        size = store.layout.size if store else task.cdn.promise()
        data = {"taskId": task.task_id, "fileLength": -1 if length is None else length, "pieceSize": size,
                "cdnSource": "supernode", "asSeed": False, "seedTaskID": ""}  # type: Dict[str, Any]
        if peer.native:
            data["dfly"] = dict(self._register_extra(task, request.state["sibling"]), line=peer.line)
            peer.named, peer.measured = bool(task.cdn.version), length is not None
        elif store:
            self._old_client(task)
        self._log.info("register %s %s as %s (%s)", task.task_id, task.url, peer.cid, "native" if peer.native else "old")
        return Response.of_json({"code": SUCCESS, "data": data, "msg": "success"})

    def _register_extra(self, task: SwarmTask, sibling: bool) -> Dict[str, Any]:
        extra = {"version": task.cdn.version, "pieces": self._pieces.address[1] if self._pieces else 0}  # type: Dict[str, Any]
        store, caching = task.cdn.store, task.cdn.fresh_caching()
        if sibling and caching:
            extra["caching"] = list(caching)
        if store and store.complete and (store.layout.length or 0) <= SMALL and store.layout.count == 1:
            import base64
            extra["content"] = base64.b64encode(b"".join(map(bytes, store.read_plain(0)))).decode()
        return extra

    def _old_client(self, task: SwarmTask) -> None:
        """Begin to compute what only an old client asks for, the MD5 of the whole file."""
        try:
            self._swarm.follow(task)
        except NoMd5 as error:
            self._log.warn("%s", error)

    # -- the old calls -----------------------------------------------------------------

    def pull(self, request: Request) -> Any:
        """GET /peer/task: an old client reports a piece and asks for more.  Wire: 3"""
        query = request.query
        try:
            task, peer = self._swarm.find(query.get("taskId", ""), query.get("srcCid", ""))
            if "reported" not in request.state:
                self._pull_report(task, peer, query)
                request.state["reported"] = True
            self._swarm.after()
            return self._pull_answer(task, peer, request)
        except NoSuchTask as error:
            return Response.of_json({"code": UNKNOWN_TARGET, "msg": str(error)})
        except (BadRequest, NoSuchPiece) as error:
            return Response.of_json({"code": PARAM_ERROR, "msg": str(error)})
        except NoMd5 as error:
            return Response.of_json({"code": SYSTEM_ERROR, "msg": str(error)})

    def _pull_report(self, task: SwarmTask, peer: Peer, query: Dict[str, str]) -> None:
        try:
            status, result = int(query.get("status", "")[:9]), int(query.get("result", "")[:9])
        except ValueError:
            raise BadRequest("status or result: invalid value")
        if status == STARTED:
            return
        if status == FINISHED:
            self._swarm.leave(task, peer)
            return
        if status != RUNNING or result not in (SUCCEEDED, SEMI_SUCCEEDED, FAILED):
            raise BadRequest("status %d, result %d: invalid value" % (status, result))
        num = task.num_of(query.get("range", ""))
        holder = task.holder(query.get("dstCid", ""))
        with self._swarm.lock:
            if result == FAILED:
                self._swarm.scheduler.failed(task.task_id, peer.cid, num, holder, OTHER, self._clock())
            else:
                self._swarm.scheduler.done(task.task_id, peer.cid, num, self._clock(), holder=holder, servable=result == SUCCEEDED)

    def _pull_answer(self, task: SwarmTask, peer: Peer, request: Request) -> Any:
        if task.cdn.state == CdnTask.FAILED:
            return Response.of_json({"code": SUPER_FAIL, "msg": "taskID: %s: cdn status is fail: %s" % (task.task_id, task.cdn.error)})
        if not task.cdn.store:
            return self._wait(request, ("task", task.task_id), "the origin has not answered yet")
        with self._swarm.lock:
            finished = self._swarm.scheduler.finished(task.task_id, peer.cid)
        if finished and task.cdn.state == CdnTask.SUCCESS:
            return self._finish(task, peer, request)
        with self._swarm.lock:
            running = self._swarm.scheduler.inflight(task.task_id, peer.cid)
            if not finished:
                self._swarm.scheduler.request(task.task_id, peer.cid, self._down_limit, self._clock())
            fresh = self._swarm.scheduler.take(task.task_id, peer.cid)
            pieces = [(a.num, task.peers.get(a.holder)) for a in fresh or running if a.holder == SEED or a.holder in task.peers]
        self._swarm.after()
        pieces = [(num, holder) for num, holder in pieces if task.cdn.store.seal(num)]
        if pieces:
            return Response.of_json({"code": CONTINUE, "data": [self._piece_task(task, peer, num, holder) for num, holder in pieces]})
        return self._wait(request, ("peer", task.task_id, peer.cid), "peer should wait")

    def _wait(self, request: Request, key: Any, message: str) -> Any:
        if not request.expired and "parked" not in request.state:
            request.state["parked"] = True
            return Park(key, PULL_WAIT_S)
        return Response.of_json({"code": WAIT, "msg": message})

    def _finish(self, task: SwarmTask, peer: Peer, request: Request) -> Any:
        """All pieces are there: say so, with the MD5 as soon as that is known, or without when it takes too long."""
        store = task.cdn.store
        assert store
        peer.md5_since = peer.md5_since or self._clock()
        try:
            digest = self._swarm.follow(task).digest
        except NoMd5:
            digest, peer.md5_since = "", -1e9  # there will be none
        if not digest and self._clock() < peer.md5_since + 60.0:
            return self._wait(request, ("md5", task.task_id), "the digest of the whole file is being computed")
        self._swarm.leave(task, peer)
        return Response.of_json({"code": FINISH, "data": {"md5": digest, "fileLength": store.layout.wrapped_length}})

    def _piece_task(self, task: SwarmTask, peer: Peer, num: int, holder: Optional[Peer]) -> Dict[str, Any]:
        """Return one piece as an old client wants it; `holder` None: from ourselves.  Wire: 3.2"""
        store = task.cdn.store
        assert store
        piece = {"range": store.layout.range_text(num), "pieceNum": num, "pieceSize": store.layout.size, "pieceMd5": store.wrapped_md5(num),
                 "downLink": 0}
        if holder:
            piece.update(cid=holder.cid, peerIp=holder.ip, peerPort=holder.port, path=holder.path)
        else:
            piece.update(cid=task.cid, peerIp=peer.reach or self._ip, peerPort=self._pieces.address[1] if self._pieces else PIECE_PORT,
                         path=task.piece_path())
        return piece

    def piece_succeeded(self, request: Request) -> Response:
        """GET /peer/piece/suc.  Wire: 4.1"""
        query = request.query
        try:
            task, peer = self._swarm.find(query.get("taskId", ""), query.get("cid", ""))
            num = task.num_of(query.get("pieceRange", ""))
        except (NoSuchTask, BadRequest) as error:
            return Response.of_json({"code": error.code, "msg": str(error), "message": str(error)}, 400 if isinstance(error, BadRequest) else 200)
        with self._swarm.lock:
            self._swarm.scheduler.done(task.task_id, peer.cid, num, self._clock(), holder=task.holder(query.get("dstCid", "")))
        self._swarm.after()
        return Response.of_json({"code": PIECE_REPORTED})

    def piece_failed(self, request: Request) -> Response:
        """GET /peer/piece/error: somebody complains.  Only a look at our own bytes decides.  Wire: 4.2, 16 (6)"""
        query = request.query
        with self._swarm.lock:
            task = self._swarm.tasks.get(query.get("taskId", ""))
        if task and query.get("dstCid", "").startswith("cdnnode:"):
            try:
                self._swarm.look_again(task, task.num_of(query.get("range", "")), 3.0)
            except BadRequest:
                pass
        return Response.of_json({"code": SUCCESS, "msg": "success"})

    def service_down(self, request: Request) -> Response:
        """GET /peer/service/down: a client's uploader no longer has the task.  Wire: 4.3"""
        query = request.query
        with self._swarm.lock:
            task = self._swarm.tasks.get(query.get("taskId", ""))
            peer = task.peers.get(query.get("cid", "")) if task else None
            if peer and not self._speaks_for(request, peer.caller):
                peer = None
            if task and peer:
                self._swarm.drop_locked(task, peer)
        self._swarm.after()
        return Response.of_json({"code": SERVICE_DOWN} if peer else {"code": UNKNOWN_TARGET, "msg": "no such client"})

    # -- our own call ------------------------------------------------------------------

    def sync(self, request: Request) -> Any:
        """POST /peer/sync: reports and requests in one, held until there is something to say.  Where an older sync of the same
        client is still held, that one is answered at once, with what there is, and the newer one takes its place.

        Asked, under ?LINE of the register answer (else with task and cid): {done: [[num, holder, seconds, bytes]], failed: [[num,
        holder, why]], soon: [num] (about to end), slots (fetches at once), queue (more in advance), have (hex mask, first time),
        wait (seconds)}.  Answered: {code, length?, version? (once, if the register could not say them), eager? (when it changes:
        others wait, report each piece soon), holders: {number: [ip, port, path]}, pieces: [[num, number, digest?]]}; 0 is ourselves.
        Code 601 has pieces, 602 none (msg says why), 600 ends it, others send the client on (pause: seconds before it asks the origin).
        """
        state = request.state
        if "peer" not in state:
            data = request.json()
            try:
                named = str(data.get("task", "")), str(data.get("cid", ""))
                task, peer = self._swarm.find(*self._swarm.lines.get(request.query_text, named))
            except NoSuchTask as error:
                return Response.of_json({"code": UNKNOWN_TARGET, "msg": str(error)})
            began = time.perf_counter()
            with self._swarm.lock:
                peer.turn += 1
                doubtful = self._sync_reports_locked(task, peer, data)
            if doubtful >= 0 and self._clock() > task.rechecked_at + LOOK_AGAIN_S:
                threading.Thread(target=self._swarm.look_again, args=(task, doubtful, LOOK_AGAIN_S), name="dfly-look", daemon=True).start()
            METRICS.observe("dfly_scheduler_seconds", time.perf_counter() - began)
            wait = self._number(data, "wait", 0, SYNC_WAIT_S, SYNC_WAIT_S)
            state.update(task=task, peer=peer, turn=peer.turn, until=self._clock() + wait)
            if peer.parked:
                self._swarm.notify(("peer", task.task_id, peer.cid))
            self._swarm.after()
        task, peer, turn = state["task"], state["peer"], state["turn"]
        left = 0.0 if request.expired else state["until"] - self._clock()
        peer.seen_at = task.used_at = self._clock()
        peer.parked.discard(turn)
        if left <= 0 or turn < min(peer.parked, default=turn + 1):  # else an older one takes what there is, and this one its place
            answer = self._sync_answer(task, peer)
            if answer["code"] != WAIT or left <= 0 or answer["eager"] != peer.eager or peer.turn != turn:
                return self._synced(task, peer, answer, superseded=peer.turn != turn)
        peer.parked.add(turn)
        request.on_gone = lambda: self._swarm.hung_up(task, peer, turn)
        return Park(("peer", task.task_id, peer.cid), left)

    def _synced(self, task: SwarmTask, peer: Peer, answer: Dict[str, Any], superseded: bool) -> Response:
        if answer["code"] == WAIT and not superseded:
            answer["msg"] = self._why_waiting(task, peer)
        if answer.get("eager", peer.eager) == peer.eager:
            answer.pop("eager", None)
        peer.eager = answer.get("eager", peer.eager)
        peer.named, peer.measured = peer.named or "version" in answer, peer.measured or "length" in answer
        response = Response.of_json(answer)
        del response.headers[:]  # there is one for each piece of each client
        return response

    @staticmethod
    def _number(data: Dict[str, Any], name: str, least: float, most: float, default: float) -> float:
        value = data.get(name, default)
        if not isinstance(value, (int, float)) or not least <= value <= most:
            raise BadRequest("%s: %.40r: invalid value" % (name, value))
        return value

    def _sync_reports_locked(self, task: SwarmTask, peer: Peer, data: Dict[str, Any]) -> int:
        """Take in what a client says; return a piece that was no good as it came from us, -1 if there is none."""
        doubtful = -1
        scheduler, now = self._swarm.scheduler, self._clock()
        done, failed, have = data.get("done", []), data.get("failed", []), data.get("have", "")
        slots, ahead = int(self._number(data, "slots", 0, 64, 0)), int(self._number(data, "queue", 0, 256, 0))
        known = task.reportable()
        most = known.bit_length() - 1
        try:
            if have:
                mask = int(have, 16)
                if mask < 0:
                    raise ValueError(have[:20])
                for num in nums_of(mask & known):  # what else it has will turn out when we have it, too
                    scheduler.done(task.task_id, peer.cid, num, now)
            for num, holder, seconds, size in done:
                if not 0 <= int(num) <= most:
                    raise ValueError(num)
                source, nbytes = task.holder(holder), min(max(0, int(size)), MAX_PIECE)
                scheduler.done(task.task_id, peer.cid, int(num), now, holder=source, seconds=min(max(1e-6, float(seconds)), 3600.0), nbytes=nbytes)
                METRICS.add("dfly_received_bytes_total", nbytes, source="supernode" if source == SEED else "peer")
                METRICS.add("dfly_received_pieces_total", source="supernode" if source == SEED else "peer")
            for num in data.get("soon", []):
                scheduler.soon(task.task_id, peer.cid, int(num), now)
            for num, holder, why in failed:
                if not 0 <= int(num) <= most:
                    raise ValueError(num)
                scheduler.failed(task.task_id, peer.cid, int(num), task.holder(holder), str(why)[:20], now)
                METRICS.add("dfly_piece_failures_total", why=str(why) if why in (REFUSED, STALLED, WRONG_BYTES, GONE) else OTHER)
                if task.holder(holder) == SEED and why not in (STALLED, GONE):
                    doubtful = int(num)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest("done, failed or have: %.80s" % error)
        scheduler.request(task.task_id, peer.cid, slots, now, queue=ahead)
        return doubtful

    def _sync_answer(self, task: SwarmTask, peer: Peer) -> Dict[str, Any]:
        if task.cdn.state == CdnTask.FAILED:
            error = task.cdn.error
            with self._swarm.lock:
                return {"code": error.code if isinstance(error, SourceError) else SUPER_FAIL, "msg": str(error), "pause": task.next_pause()}
        with self._swarm.lock:
            store = task.cdn.store
            pieces = self._swarm.scheduler.take(task.task_id, peer.cid)
            finished = self._swarm.scheduler.finished(task.task_id, peer.cid)
            answer = {"code": CONTINUE if pieces else WAIT, "eager": self._swarm.scheduler.others(task.task_id, peer.cid)}  # type: Dict[str, Any]
            if store and store.layout.length is not None and not peer.measured:
                answer["length"] = store.layout.length
            if store and not peer.named:  # the origin had not answered when it registered
                answer["version"] = task.cdn.version
            if pieces:
                self._describe_locked(task, peer, pieces, answer)
            elif finished and store and store.layout.length is not None and (task.cdn.state == CdnTask.SUCCESS or not task.md5):
                self._swarm.leave_locked(task, peer)
                answer.update(code=FINISH, version=task.cdn.version)
        return answer

    def _describe_locked(self, task: SwarmTask, peer: Peer, pieces: List[Assignment], answer: Dict[str, Any]) -> None:
        store = task.cdn.store
        answer["holders"], answer["pieces"] = {}, []
        for num, cid in pieces:
            number = 0
            if cid == SEED:
                answer["holders"][0] = [peer.reach or self._ip, self._pieces.address[1] if self._pieces else PIECE_PORT, task.piece_path()]
            elif cid in task.peers:
                holder = task.peers[cid]
                number = holder.number
                answer["holders"][number] = [holder.ip, holder.port, holder.path]
            else:  # it left between the decision and now
                self._swarm.scheduler.failed(task.task_id, peer.cid, num, cid, GONE, self._clock())
                continue
            seal = store.seal(num) if store else None
            answer["pieces"].append([num, number, seal.short() if seal else None])
        if not answer["pieces"]:
            answer["code"] = WAIT

    def _why_waiting(self, task: SwarmTask, peer: Peer) -> str:
        """Return in words what `peer` waits for, for the line it prints when it stalls."""
        store = task.cdn.store
        if not store:
            return "waiting: the origin has not answered the supernode yet"
        with self._swarm.lock:
            why = self._swarm.scheduler.waiting_for(task.task_id, peer.cid)
        if why.missing and not why.seeded:
            return "waiting: piece %d has no holder; the supernode is fetching it at %s/s" % (
                why.num, show_size(task.cdn.rate(self._clock())))
        return "waiting: piece %d has %d holders, all busy (%d pieces missing)" % (why.num, why.holders, why.missing)

    # -- the piece port --------------------------------------------------------------

    def download(self, request: Request) -> Any:
        """GET /download/abc/abcdef…: bytes of the wrapped file.  Ours may ask for a piece that is still to come, and
        gets its seal in a header, and the piece deflated if that pays.  Wire: 5.3"""
        task_id = (request.rest.split("/") + [""])[1]
        with self._swarm.lock:
            task = self._swarm.tasks.get(task_id)
            store = task.cdn.store if task else None
            if task:
                task.used_at = self._clock()
        if not task or not store or "/download/" + request.rest != task.piece_path():
            return Response.of_error(404, "%.100s: no such task" % task_id)
        layout, native = store.layout, DFLY_HEADER in request.headers
        total = layout.wrapped_length if layout.length is not None else MAX_COUNT * layout.size
        try:
            span = request.range(total)
            start, end = span or (0, total)
            num = start // layout.size
            if native and span and not store.seal(num) and task.cdn.state == CdnTask.RUNNING and not request.expired:
                return Park(("piece", task_id, num), 25.0)
            if layout.length is not None and layout.count is not None and num < layout.count:
                end = min(end, total)
            body = store.wrapped_body(start, end)
        except NoSuchPiece as error:
            status = 404 if native else 416
            response = Response.of_error(status, str(error))
            response.headers.append(("Content-Range", "bytes */%s" % (total if layout.length is not None else "*")))
            return response
        headers = [("Accept-Ranges", "bytes")]
        if span:
            headers.append(("Content-Range", "bytes %d-%d/%s" % (start, end - 1, total if layout.length is not None else "*")))
        if native and start % layout.size == 0:
            headers.append((DFLY_HEADER, str(store.seal(num))))
        seal = store.seal(num) if start == num * layout.size else None
        response = Response(206 if span else 200, body, "application/octet-stream", headers)
        return squeezed(request, response, self._squeezer, task_id, seal if seal and end - start == seal.length + WRAP else None)

    # -- the rest --------------------------------------------------------------------

    def task_metrics(self, request: Request) -> Response:
        """POST /task/metrics: how a download went.  Wire: 4.4 (`code` 1 keeps dfget 1.0 from sending it twice)"""
        self._log.info("metrics from %s: %.500s", request.client, json.dumps(request.json()))
        return Response.of_json({"code": 1})

    def heartbeat(self, _request: Request) -> Response:
        """POST /peer/heartbeat.  Wire: 4.5"""
        return Response.of_json({"code": SUCCESS, "data": {"seedTaskIDs": None}, "seedTaskIDs": None})

    def network(self, _request: Request) -> Response:
        """POST /peer/network.  Wire: 4.5"""
        return Response.of_json({"code": SUCCESS, "data": {"nodes": None}, "nodes": None})

    def preheat(self, request: Request) -> Response:
        """POST /preheats: have a file or an image here before anybody asks.  Wire: 12"""
        status, number = self._preheats.post(request.json())
        return Response.of_json({"ID": number}, status)

    def preheat_pushed(self, request: Request) -> Response:
        """POST /preheats/registry: a registry of Docker Distribution's notification of what was pushed to it."""
        return Response.of_json({"preheats": self._preheats.pushed(request.json())})

    def preheats(self, _request: Request) -> Response:
        """GET /preheats.  Wire: 12"""
        return Response.of_json(self._preheats.whole())

    def preheat_info(self, request: Request) -> Response:
        """GET /preheats/{id}.  Wire: 12"""
        try:
            return Response.of_json(self._preheats.find(request.rest).brief())
        except NoSuchTask as error:
            return Response.of_error(404, str(error))

    def preheat_delete(self, request: Request) -> Response:
        """DELETE /preheats/{id}.  Wire: 12"""
        try:
            self._preheats.delete(request.rest)
        except NoSuchTask as error:
            return Response.of_error(404, str(error))
        return Response.of_json(True)

    def ping(self, _request: Request) -> Response:
        """GET /_ping.  Wire: 4.6"""
        return Response(200, b"OK", "text/plain")

    def sibling(self, _request: Request) -> Response:
        """GET /sibling: who this is, for supernodes that have it among their peers."""
        return Response.of_json(self._about)

    def version(self, _request: Request) -> Response:
        """GET /version.  Wire: 4.6"""
        return Response.of_json({"Version": VERSION, "Program": "dfly"})

    def _task_named(self, request: Request) -> SwarmTask:
        with self._swarm.lock:
            task = self._swarm.tasks.get(request.rest)
        if not task:
            raise NoSuchTask("%.80s: no such task" % request.rest)
        return task

    def task_info(self, request: Request) -> Response:
        """GET /api/v1/tasks/{id}.  Wire: 4.6"""
        task = self._task_named(request)
        layout = task.cdn.store.layout if task.cdn.store else Layout(None, MIB)
        known = layout.length is not None
        with self._swarm.lock:
            progress = self._swarm.scheduler.progress(task.task_id)
            isolated = self._swarm.scheduler.isolated(task.task_id, self._clock())
            copies = self._swarm.scheduler.seed_copies(task.task_id)
            peers = {peer.cid: {"requests": peer.requests, "finished": peer.finished, "isolated": peer.cid in isolated,
                                "pieces": progress[peer.cid][0], "running": progress[peer.cid][1]} for peer in task.peers.values()}
        return Response.of_json({"ID": task.task_id, "cdnStatus": task.cdn.state, "fileLength": layout.wrapped_length if known else -1,
                                 "httpFileLength": layout.length if known else -1, "pieceSize": layout.size,
                                 "pieceTotal": layout.count or 0, "rawURL": task.url, "taskURL": task.url,
                                 "realMd5": task.follower.digest if task.follower else "", "seedCopies": copies,
                                 "seedPieces": bin(task.cdn.store.have).count("1") if task.cdn.store else 0, "peers": peers})

    def task_delete(self, request: Request) -> Response:
        """DELETE /api/v1/tasks/{id}, from this host only.  Wire: 4.6, 16 (1)"""
        if request.client not in ("127.0.0.1", "::1", request.server):
            return Response.of_error(403, "tasks are deleted from the supernode's own host only")
        task = self._task_named(request)
        with self._swarm.lock:
            self._swarm.forget_locked(task)
        self._swarm.cdn.delete(task.task_id)
        return Response.of_json(True)

    def load(self) -> Dict[str, float]:
        """Return how busy it is: tasks, peers, and the bytes of pieces that it has sent."""
        with self._swarm.lock:
            return {"tasks": len(self._swarm.tasks), "peers": sum(len(task.peers) for task in self._swarm.tasks.values()),
                    "sent_bytes": self._pieces.sent_bytes if self._pieces else 0}

    def metrics(self, _request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        assert self._api and self._pieces
        cdn = self._swarm.cdn
        with self._swarm.lock:
            tasks, peers = len(self._swarm.tasks), sum(len(task.peers) for task in self._swarm.tasks.values())
        running, waiting = cdn.turns.counts()
        return Response.of_metrics(METRICS.text(
            ("dfly_tasks", tasks), ("dfly_peers", peers), ("dfly_fetches", running), ("dfly_fetches_waiting", waiting),
            ("dfly_sent_bytes_total", self._pieces.sent_bytes), ("dfly_saved_bytes_total", self._squeezer.saved_bytes if self._squeezer else 0),
            ("dfly_isolations_total", self._swarm.scheduler.isolations), ("dfly_disk_free_bytes", cdn.free()),
            ("dfly_memory_bytes", sum(size for _, size, _ in cdn.memory.files()) if cdn.memory else 0), calls=self._api.requests))


# ==============================================================================
# 19. Uploader
#    A host's piece server: one process for all downloads of a home folder, reached
#    by them through a socket file and by the world through one port.  Outlives the
#    downloads; knows no supernode but to say good-bye.
# ==============================================================================

CONTROL_S = 5.0  # seconds for an answer over the socket file


class Shared:
    """A task's file as this host serves it.  Guarded by its Uploader's _lock."""

    def __init__(self, name: str, task_id: str, cid: str, node: Tuple[str, int], pid: int) -> None:
        self.name, self.task_id, self.cid, self.node = name, task_id, cid, node
        self.pid = pid  # of the download; 0 when it has said that it is finished
        self.store = None  # type: Optional[TaskFile]
        self.stamp = None  # type: Optional[Tuple[int, int, int]]  # of the finished file, so that an edit is seen
        self.want = 0  # bytes/s its download would like, 0: all there is
        self.used_at = 0.0  # monotonic


class Uploader:
    """Serves pieces, shares out the host's limit, forgets files and itself in time.  _lock guards _tasks and _rates."""

    ROUTES = (
        Route("GET", "/peer/file/", "piece"),          # Wire: 7.6
        Route("GET", "/server/ping", "ping"),          # Wire: 7.5
        Route("GET", "/check/", "check"),              # Wire: 7.2
        Route("GET", "/rate/", "rate"),                # Wire: 7.3
        Route("GET", "/client/finish", "old_finish"),  # Wire: 7.4
        Route("GET", "/metrics", "metrics"),
    )
    CONTROL_ROUTES = (
        Route("POST", "/adopt", "adopt"),
        Route("POST", "/share", "share"),
        Route("POST", "/finish", "finish"),
        Route("GET", "/ping", "control_ping"),
    )

    def __init__(self, home: str, log: Log, expire_s: float, alive_s: float, total_limit: int, squeezer: Optional[Squeezer] = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.home, self.log = home, log
        self._squeezer = squeezer  # None: all pieces go as they are
        self._expire_s = expire_s  # how long a finished file is served after its last use
        self._alive_s = alive_s  # how long to live without work; 0: for ever
        self._clock = clock
        self.bucket = TokenBucket(total_limit)  # for what goes out
        self._lock = threading.Lock()
        self._tasks = {}  # type: Dict[str, Shared]
        self._rates = {}  # type: Dict[str, Tuple[int, float]]  # what old downloads want, and when they asked
        self._busy_at = clock()
        self._total = total_limit
        self._farewells = []  # type: List[threading.Thread]  # that are telling supernodes
        self.port = 0
        self._public = None  # type: Optional[Server]
        self.ended = Ending()  # time to go

    def serve(self, public: Server, control: Server) -> None:
        """Begin to answer on the port and on the socket file."""
        self._public = public
        self.port = public.address[1]
        control.later(1.0, lambda: self._tick(control))
        public.start()
        control.start()

    # -- the world --------------------------------------------------------------

    def piece(self, request: Request) -> Any:
        """GET /peer/file/NAME: one wrapped piece, for our own deflated if that pays, or plain bytes with `cdnSource: source`.  Wire: 7.6"""
        shared = self._shared(request.rest)
        store = shared.store
        assert store
        span = re.match(r"^bytes=(\d{1,18})-(\d{1,18})$", request.headers.get("range", ""))
        num, size = request.headers.get("piecenum", ""), request.headers.get("piecesize", "")
        if not span or int(span.group(2)) <= int(span.group(1)) or not re.match(r"^\d{1,9}$", num) or not re.match(r"^\d{1,9}$", size):
            raise BadRequest("say Range: bytes=a-b, pieceNum and pieceSize")
        first, last = int(span.group(1)), int(span.group(2))
        if request.headers.get("cdnsource", "") == "source":
            start, end = self._here(store, first, last + 1)
            return Response(206, store.plain_body(start, end), "application/octet-stream")
        if last - first + 1 < WRAP or first < WRAP * int(num):
            raise NoSuchPiece("range not satisfiable")
        start, end = self._here(store, first - WRAP * int(num), last + 1 - WRAP * (int(num) + 1))
        if end - start > 0xffffff:
            raise NoSuchPiece("a piece has at most %d bytes" % MAX_PIECE)
        head = struct.pack(">I", (end - start | int(size) << 4) & 0xffffffff)
        response = Response(206, [head] + store.plain_body(start, end) + [TAIL], "application/octet-stream")
        seal = store.seal(int(num)) if start == int(num) * store.layout.stride and int(size) == store.layout.size else None
        return squeezed(request, response, self._squeezer, shared.name, seal if seal and end - start == seal.length else None)

    def _here(self, store: TaskFile, start: int, end: int) -> Tuple[int, int]:
        """Return [start, end) clipped to the file.  Raises NoSuchPiece where some of it is not here or behind its end."""
        layout = store.layout
        if layout.length is not None:
            if start > layout.length or (start == layout.length and end > start and layout.length):
                raise NoSuchPiece("the file has %d bytes" % layout.length)
            end = min(end, layout.length)
        elif end - start > MAX_PIECE or start >= MAX_COUNT * layout.stride:
            raise NoSuchPiece("bytes %d-%d are no piece" % (start, end - 1))
        nums = mask_of(range(start // layout.stride, max(start, end - 1) // layout.stride + 1))
        if store.have & nums != nums:
            try:
                store.refresh()
            except OSError:  # the journal went when the file was published; all it said is known
                pass
        if store.have & nums != nums:
            raise NoSuchTask("these bytes are not here")
        return start, end

    def _shared(self, name: str) -> Shared:
        with self._lock:
            shared = self._tasks.get(name)
            self._busy_at = self._clock()
        if not shared or not shared.store:
            raise NoSuchTask("%.100s: no such file" % name)
        if shared.stamp and shared.store.stamp() != shared.stamp:
            self.log.warn("%s was edited: no longer served", shared.store.data)
            self._drop([shared])
            raise NoSuchTask("%.100s: no longer what it was" % name)
        shared.used_at = self._clock()
        return shared

    def ping(self, _request: Request) -> Response:
        """GET /server/ping.  Wire: 7.5"""
        return Response(200, b"success", "text/plain")

    def _from_here(self, request: Request) -> None:
        """Refuse what only this host's own downloads may ask.  Wire: 16 (5)"""
        if request.client not in (request.server, "127.0.0.1", "::1"):
            raise BadRequest("for this host only")

    @staticmethod
    def _param(request: Request) -> Dict[str, Any]:
        """Return an old control call's parameters: one JSON header (0.2) or several (1.0), names in lower case."""
        try:
            given = json.loads(request.headers.get("param", "{}"))
        except ValueError:
            raise BadRequest("param: not JSON")
        if not isinstance(given, dict):
            raise BadRequest("param: not JSON")
        return dict(request.headers, **{key.lower(): value for key, value in given.items()})

    def check(self, request: Request) -> Response:
        """GET /check/NAME.  Wire: 7.2 (it adopts nothing: an old download's folder is not ours to serve)"""
        self._from_here(request)
        param = self._param(request)
        limit = re.match(r"^\d{1,15}$", str(param.get("totallimit", "0")))
        if limit and int(limit.group()):
            self._set_total(int(limit.group()))
        return Response(200, ("%s@%s" % (request.rest, VERSION)).encode(), "text/plain")

    def rate(self, request: Request) -> Response:
        """GET /rate/NAME.  Wire: 7.3"""
        self._from_here(request)
        want = re.match(r"^\d{1,15}$", str(self._param(request).get("ratelimit", "")))
        if not want:
            raise BadRequest("rateLimit: not a number")
        with self._lock:
            self._busy_at = self._clock()
            self._rates[request.rest] = (int(want.group()), self._busy_at)
            rate = self._share_locked(int(want.group()))
        return Response(200, str(rate).encode() if int(want.group()) else b"", "text/plain")

    def old_finish(self, request: Request) -> Response:
        """GET /client/finish.  Wire: 7.4"""
        self._from_here(request)
        param = {key.lower(): value for key, value in request.query.items()} or self._param(request)
        if not all(param.get(key) for key in ("taskfilename", "taskid", "cid")):
            return Response(400, b"invalid params", "text/plain")
        with self._lock:
            self._rates.pop(str(param["taskfilename"]), None)
        return Response(200, b"success", "text/plain")

    # -- this host's downloads ----------------------------------------------------

    def metrics(self, _request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        assert self._public
        with self._lock:
            tasks = len(self._tasks)
        return Response.of_metrics(METRICS.text(("dfly_uploader_tasks", tasks), ("dfly_sent_bytes_total", self._public.sent_bytes),
                                                ("dfly_saved_bytes_total", self._squeezer.saved_bytes if self._squeezer else 0), calls=self._public.requests))

    def control_ping(self, _request: Request) -> Response:
        """GET /ping: where the public port is, and which program this is."""
        self._busy_at = self._clock()
        return Response.of_json({"port": self.port, "version": VERSION, "pid": os.getpid()})

    def adopt(self, request: Request) -> Response:
        """POST /adopt: serve a file that a download of this host is writing."""
        data = request.json()
        shared = Shared(data["name"], data["task"], data["cid"], (data["node"][0], data["node"][1]), data["pid"])
        shared.store = TaskFile.attach(data["data"], data["journal"])
        shared.used_at = self._clock()
        with self._lock:
            old = self._tasks.get(shared.name)
            self._tasks[shared.name] = shared
            self._busy_at = self._clock()
        if old and old.store:
            old.store.close()
        if data.get("total"):
            self._set_total(int(data["total"]))
        return Response.of_json({"port": self.port})

    def share(self, request: Request) -> Response:
        """POST /share: which part of the host's limit a download may use, in bytes/s (0: all there is)."""
        data = request.json()
        with self._lock:
            shared = self._tasks.get(data["name"])
            if shared:
                shared.want, shared.used_at = int(data["want"]), self._clock()
            return Response.of_json({"rate": self._share_locked(int(data["want"]))})

    def _share_locked(self, want: int) -> int:
        """Return the share of one that wants `want`: all of it when all wishes fit, else in proportion.  Wire: 7.3"""
        if not self._total:
            return want
        wants = [s.want or self._total for s in self._tasks.values() if s.pid] + [w or self._total for w, _ in self._rates.values()]
        return min(want or self._total, -(-(want or self._total) * self._total // max(self._total, sum(wants))))

    def _set_total(self, total: int) -> None:
        with self._lock:
            self._total = total
        self.bucket.rate = total

    def finish(self, request: Request) -> Response:
        """POST /finish: a download has all its pieces, or gives up; from now on its file expires."""
        data = request.json()
        with self._lock:
            shared = self._tasks.get(data["name"])
            self._busy_at = self._clock()
        if shared and shared.store:
            if data.get("complete") and not shared.stamp:
                shared.store.refresh()
                shared.stamp = shared.store.stamp()
            shared.pid = 0
            shared.used_at = self._clock()
        return Response.of_json({})

    # -- time ---------------------------------------------------------------------

    def _tick(self, control: Server) -> None:
        """Once a second: forget what has expired, and end when there has been nothing to do.  Wire: 7.7"""
        now = self._clock()
        with self._lock:
            for shared in self._tasks.values():
                if shared.pid and not os.path.exists("/proc/%d" % shared.pid):
                    shared.pid = 0  # it was killed: what it has can still be served for a while
                if shared.pid:
                    self._busy_at = now
            expired = [s for s in self._tasks.values() if not s.pid and now > s.used_at + self._expire_s]
            self._rates = {name: (want, at) for name, (want, at) in self._rates.items() if now < at + 60}
        if expired:
            self._drop(expired)
        if self._alive_s and now > self._busy_at + self._alive_s:
            self.log.info("nothing to do for %s", show_time(self._alive_s))
            self.ended.set()
            return
        control.later(min(1.0, self._expire_s / 4 or 1.0, self._alive_s / 4 or 1.0), lambda: self._tick(control))

    def _drop(self, tasks: List[Shared]) -> None:
        """Stop serving some tasks and tell their supernodes."""
        with self._lock:
            for shared in tasks:
                if self._tasks.get(shared.name) is shared:
                    del self._tasks[shared.name]
        for shared in tasks:
            if shared.store:
                shared.store.close()
        thread = threading.Thread(target=self._say_down, args=(tasks,), name="dfly-down", daemon=True)
        thread.start()
        with self._lock:
            self._farewells = [other for other in self._farewells if other.is_alive()] + [thread]

    def _say_down(self, tasks: List[Shared]) -> None:
        pool = Pool(timeout_s=3.0, connect_s=1.0)
        dead = set()  # type: Set[Tuple[str, int]]
        for shared in tasks:
            if shared.node in dead or not shared.node[0]:
                continue
            try:
                pool.ask(shared.node[0], shared.node[1], "GET", "/peer/service/down?taskId=%s&cid=%s" % (shared.task_id, quote(shared.cid)))
            except NetworkError as error:
                self.log.warn("service down: %s", error)
                dead.add(shared.node)
        pool.close()

    def farewell(self) -> None:
        """Tell every supernode that this host no longer serves anything, within ten seconds."""
        with self._lock:
            tasks, self._tasks = list(self._tasks.values()), {}
        self._drop(tasks)
        for thread in self._farewells:
            thread.join(10.0)


def socket_path(home: str) -> str:
    """Return the path of the uploader's socket file, short enough for the kernel's 107 bytes."""
    path = os.path.join(home, "peer.sock")
    if len(path) < 100:
        return path
    link = os.path.join("/tmp", "dfly-%d-%s" % (os.getuid(), hashlib.sha256(os.path.abspath(home).encode()).hexdigest()[:16]))
    make_folder(link, 0o700)
    if os.stat(link).st_uid != os.getuid():
        raise CannotWrite("%s belongs to somebody else" % link)
    return os.path.join(link, "peer.sock")


class UploaderLine:
    """A download's way to its host's uploader."""

    def __init__(self, home: str) -> None:
        self._path = socket_path(home)
        self.port = 0

    def call(self, method: str, path: str, data: Any = None) -> Optional[Dict[str, Any]]:
        """Ask the uploader; None when there is none, or it does not answer."""
        try:
            link = HttpLink(self._path, 0, CONTROL_S, CONTROL_S)
        except NetworkError:
            return None
        try:
            link.send(method, path, body=json.dumps(data).encode() if data is not None else b"")
            reply = link.reply()
            answer = json.loads(reply.body().decode())
            return answer if reply.status == 200 else None
        except (NetworkError, ValueError):
            return None
        finally:
            link.close()


SQUEEZED = 16 << 20  # bytes of compressed pieces that an uploader keeps: few ask it for the same


def run_uploader(home: str, ip: str, port: int, expire_s: float, alive_s: float, total_limit: int, compress: bool, verbose: bool,
                 on_ready: Callable[[int], None]) -> None:
    """Be the uploader of `home` until there is nothing left to do or a signal comes.

    Raises CannotWrite, NetworkError when it can't begin, or when there is one already.
    """
    log = Log(os.path.join(home, "logs", "dfserver.log"), str(os.getpid()), verbose)
    make_folder(home)
    lock = FileLock(os.path.join(home, "peer.lock"))
    if not lock.acquire():
        raise CannotWrite("%s: this home has an uploader already" % home)
    first = port or PEER_PORTS[0] + int(time.time() / 300) % (PEER_PORTS[1] - PEER_PORTS[0])
    sock = listen(ip, first, 1 if port else 200)
    path = socket_path(home)
    remove(path)
    control_sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o077)
    control_sock.bind(path)
    os.umask(mask)
    control_sock.listen(64)
    uploader = Uploader(home, log, expire_s, alive_s, total_limit, Squeezer(SQUEEZED) if compress else None)
    public = Server(sock, Uploader.ROUTES, uploader, log, "peer", uploader.bucket)
    control = Server(control_sock, Uploader.CONTROL_ROUTES, uploader, log, "control")
    write_whole(os.path.join(home, "peer.pid"), b"%d\n" % os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: uploader.ended.set())
    uploader.serve(public, control)
    log.info("uploader of %s on port %d, %s", home, uploader.port, accelerator())
    on_ready(uploader.port)
    while not uploader.ended.wait(0.5):  # a signal that comes just before the wait would else be seen after it
        pass
    control.stop()
    remove(path)
    remove(os.path.join(home, "peer.pid"))
    uploader.farewell()
    public.stop()
    lock.release()
    log.info("uploader ends")
    log.close()


def start_uploader(home: str, ip: str, port: int, expire_s: float, alive_s: float, total_limit: int, compress: bool, verbose: bool) -> int:
    """Return the port of the home's uploader, started by a double fork if there is none; 0 when that fails.

    A fork, not a new program: that saves 80 ms of a start that 24 downloads on one machine may do at once.  Must be
    called before this process has threads.
    """
    line = UploaderLine(home)
    make_folder(home)
    lock = FileLock(os.path.join(home, "start.lock"))
    answer = line.call("GET", "/ping")
    if not answer and lock.acquire(5.0):
        try:
            answer = line.call("GET", "/ping") or _fork_uploader(home, ip, port, expire_s, alive_s, total_limit, compress, verbose)
        finally:
            lock.release()
    return answer["port"] if answer and answer.get("version") == VERSION else 0


def _tell_port(fd: int, port: int) -> None:
    os.write(fd, b"%d" % port)
    os.close(fd)


def _fork_uploader(home: str, ip: str, port: int, expire_s: float, alive_s: float, total_limit: int, compress: bool,
                   verbose: bool) -> Optional[Dict[str, Any]]:
    ready_r, ready_w = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.chdir("/")
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.dup2(ready_w, 3)
            os.closerange(4, 4096)
            run_uploader(home, ip, port, expire_s, alive_s, total_limit, compress, verbose, lambda port: _tell_port(3, port))
        except BaseException as error:  # noqa: BLE001 nobody above this frame may run in the child
            Log(os.path.join(home, "logs", "dfserver.log"), str(os.getpid())).error("uploader: %r", error)
        finally:
            os._exit(0)
    os.close(ready_w)
    os.waitpid(pid, 0)
    try:
        if readable([ready_r], 5.0):
            text = os.read(ready_r, 16)
            return {"port": int(text), "version": VERSION} if text else None
    finally:
        os.close(ready_r)
    return None


class Companion:
    """The uploader of a home as a process with threads has it: whichever there is, else a child, which ends with us.  _lock
    guards _child.  A new program, not a fork as in `start_uploader`: a fork of a process with threads may stop for ever."""

    def __init__(self, home: str, arguments: List[str]) -> None:
        self._home, self._arguments = home, arguments
        self._lock = threading.Lock()
        self._child = None  # type: Any

    def port(self) -> int:
        """Return the uploader's port, starting one if there is none; 0 when that fails."""
        line = UploaderLine(self._home)
        with self._lock:
            answer = line.call("GET", "/ping")
            if not answer:
                self._start()
                answer = line.call("GET", "/ping")
        return answer["port"] if answer and answer.get("version") == VERSION else 0

    def _start(self) -> None:
        import subprocess
        self._end()
        self._child = subprocess.Popen([sys.executable, os.path.realpath(__file__), "peer", "--home", self._home] + self._arguments,
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        if readable([self._child.stdout], CONTROL_S):  # it says its port, or ends
            os.read(self._child.stdout.fileno(), 4096)

    def _end(self, limit_s: float = 0.5) -> None:
        import subprocess
        if self._child:
            self._child.terminate()
            self._child.stdout.close()
            try:
                self._child.wait(limit_s)
            except subprocess.TimeoutExpired:  # it says good-bye to a supernode that does not answer
                self._child.returncode = 0
            self._child = None

    def close(self) -> None:
        """End our child."""
        with self._lock:
            self._end()


# ==============================================================================
# 20. Fetching
#    The threads that fetch pieces from whoever has them.
# ==============================================================================

FETCHERS = 3  # pieces under way at once, as many as a peer uploads: where all have as many, the links share out evenly
AHEAD_S = 0.1  # how long before its end a piece is announced, at most: more puts ever more under way, all of them slower;
AHEAD_TRIPS = 1.5  # round trips, and this many if that is less: the word to the supernode, its answer, the request
HOLD_S = 0.12  # how long a good piece waits for company before it is reported: half of all messages less, for 0.2 % of the time
AHEAD = 128  # pieces a lone download may have been promised beyond those
PEER_SILENCE_S = 3.0  # from a peer, before its piece is asked for elsewhere
PEER_LEAST = 1024.0  # bytes/s, of a peer that is not silent
SEED_SILENCE_S = 30.0  # from a supernode, which holds a request until the origin has sent that far
UNNAMED = "unnamed"  # version of a file from an old supernode, whose digest of the whole file decides in the end
STALL_S = 5.0  # without a byte, before the reason is printed
CHUNK = 1 << 18  # bytes received at once


class Order(NamedTuple):
    """One piece to fetch: from whom, and what its digest must be ("": the answer will say; "<md5>:<len>": wrapped)."""

    num: int
    cid: str
    host: str
    port: int
    path: str
    digest: str
    range_text: str
    plain: bool = False  # `cdnSource: source`: unwrapped bytes from the origin itself.  Wire: 5.4

    @property
    def holder(self) -> Any:
        """The holder as a supernode knows it that has numbered them; 0 is the supernode itself."""
        return 0 if self.cid.startswith("cdnnode:") else int(self.cid) if self.cid.isdigit() else self.cid

    @property
    def from_peer(self) -> bool:
        """Whether neither the origin nor a supernode is asked."""
        return not self.plain and not self.cid.startswith("cdnnode:")

    @property
    def old(self) -> bool:
        """Whether the digest is the MD5 of the wrapped piece."""
        return bool(self.digest) and not self.digest.startswith("sha256:")


class Outcome(NamedTuple):
    """What became of an order; `error` is None when the piece is here.  `length` counts plain bytes, since who schedules asks how
    soon pieces are there, not how."""

    order: Order
    seconds: float
    length: int
    error: Optional[DflyError]


class Migrate(DflyError):
    """This supernode can't go on with the task; another one, or the origin, may."""


class Lost(Migrate):
    """This supernode does not know us any more: it has been restarted, and will after a register."""


class Unready(Migrate):
    """This supernode does not know yet whether what we hold is of the file that the origin has now."""


def with_pause(error: DflyError, answer: Dict[str, Any]) -> DflyError:
    """Return `error` with the time that a supernode's answer asks for before the origin is asked instead.  Wire: 16 (40)"""
    pause = answer.get("pause")
    if isinstance(pause, (int, float)):
        error.pause_s = min(max(0.0, pause), HERD_MOST_S)
    return error


class FinalFailure(DflyError):
    """What the last line reports: the error, the reason, and whether the origin was allowed.  Wire: 8.3, 8.5"""

    def __init__(self, cause: DflyError, reason: int) -> None:
        super().__init__(str(cause))
        self.cause, self.reason = cause, reason
        self.auth = isinstance(cause, NeedAuth)
        self.number = 1103 if self.auth else 1101 if isinstance(cause, CannotPrepare) else 1104
        self.exit, self.old_exit = cause.exit, self.number & 255  # dfget 1.0 exits with what a status has room for


class Fetchers:
    """The threads that move pieces of one download.  _lock guards _claims, _shunned, _left, _ending and the totals.

    Orders go in by `put`, outcomes come out of `outcomes`; `wake_fd` becomes readable when there is one.
    """

    def __init__(self, store: TaskFile, bucket: TokenBucket, headers: List[Tuple[str, str]], count: int, log: Log, compress: bool = True) -> None:
        self._store, self._bucket, self._headers, self._log = store, bucket, headers, log
        self._compress = compress  # whether to take deflated pieces, where that may pay
        self._meter = Meter()  # of bytes on the wire: what the link does, whatever they stand for
        self.outcomes = collections.deque()  # type: collections.deque
        self.endings = collections.deque()  # type: collections.deque  # orders that are about to end well

        self.wake_fd, self._wake_w = os.pipe()
        self.bytes = collections.Counter()  # type: Dict[str, int]  # plain bytes of good pieces, by kind of holder
        self.holders = collections.Counter()  # type: Dict[str, int]  # the same by address
        self.received = 0  # plain bytes, good or bad, to see whether anything moves
        self._lock = threading.Lock()
        self._claims = {}  # type: Dict[int, _Claim]  # who may write a piece
        self._shunned = {}  # type: Dict[Tuple[str, int], float]  # peers that have just kept us waiting, until when
        self._queue = queue.Queue()  # type: queue.Queue
        self._left = 0  # orders put and not ended

        self._stopping = False
        self._pool = Pool(PEER_SILENCE_S, 2.0)
        self._threads = [threading.Thread(target=self._run, name="dfly-get-%d" % i, daemon=True)
                         for i in range(2 * count)]  # twice as many: the next request leaves before a piece has ended
        self._count = count
        self._pace = 0.0  # bytes/s of one piece on the wire, averaged
        self._lead = AHEAD_S  # how long before its end a piece is announced, averaged
        self._ending = set()  # type: Set[int]  # pieces whose end has been announced
        for thread in self._threads:
            thread.start()

    @property
    def left(self) -> int:
        """Orders that have not ended."""
        return self._left

    def put(self, order: Order) -> None:
        """Have a piece fetched."""
        with self._lock:
            self._left += 1
        self._queue.put(order)

    def wait(self, seconds: float, others: Any = ()) -> List[Any]:
        """Wait for an outcome or for something to read on `others`; return those of them that are ready."""
        ready = readable([self.wake_fd] + list(others), seconds)
        if self.wake_fd in ready:
            os.read(self.wake_fd, 4096)
            ready.remove(self.wake_fd)
        return ready

    def drain(self) -> List[Outcome]:
        """Return the outcomes since the last call."""
        return [self.outcomes.popleft() for _ in range(len(self.outcomes))]

    def stop(self) -> None:
        """End the threads, also those that are waiting for somebody."""
        self._stopping = True
        self._pool.interrupt()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(SEED_SILENCE_S)
        self._pool.close()
        os.close(self.wake_fd)
        os.close(self._wake_w)

    def _run(self) -> None:
        funnel = Funnel(CHUNK)
        for order in iter(self._queue.get, None):
            started, error, length = time.monotonic(), None, 0
            if self._stopping:
                continue
            try:
                length = self._fetch(order, funnel)
            except DflyError as failure:
                error = failure
                self._log.warn("piece %d from %s: %s", order.num, join_host(order.host, order.port), failure)
                self._shun(order, failure)
            except Exception as failure:  # noqa: BLE001 a fault of ours must not leave the download waiting for this piece
                import traceback
                self._log.error("piece %d: %s", order.num, traceback.format_exc())
                error = DflyError("internal error: %r" % failure)
            with self._lock:
                self._left -= 1
                self._ending.discard(order.num)
                if not error:
                    kind = "origin" if order.plain else "supernode" if order.cid.startswith("cdnnode:") else "peers"
                    self.bytes[kind] += length
                    self.holders[join_host(order.host, order.port)] += length
            self.outcomes.append(Outcome(order, time.monotonic() - started, length, error))
            os.write(self._wake_w, b"x")
        funnel.close()

    def _shun(self, order: Order, error: DflyError) -> None:
        """Ask a peer that has just kept us waiting for no other piece in a while: each would cost a thread as much time."""
        if isinstance(error, TimedOut) and order.from_peer and not isinstance(error, _Shunned):
            with self._lock:
                self._shunned[order.host, order.port] = time.monotonic() + PEER_SILENCE_S

    # -- one piece ---------------------------------------------------------------

    def _fetch(self, order: Order, funnel: Funnel) -> int:
        """Fetch, check, write and journal one piece; return its plain bytes, 0 if another was faster."""
        if self._store.have >> order.num & 1:
            return 0
        with self._lock:
            if self._shunned.get((order.host, order.port), 0.0) > time.monotonic():
                raise _Shunned("%s has just kept another piece waiting" % join_host(order.host, order.port))
        link, reply = self._ask(order)
        claim = self._claim(order, link)
        try:
            if reply.status not in (200, 206):
                raise self._refused(order, reply.status)
            with self._meter:
                frame = self._receive(order, link, reply, funnel, claim)
        except zlib.error as error:
            raise WrongBytes(self._named(order), order.digest or "that of the piece", "missing, since what came can't be inflated (%s)" % error)
        except NetworkError:  # perhaps it was hung up on in favour of another
            claim.check(order)
            raise
        finally:
            claim.leave(order)
            self._pool.done(link, reply)
        seal = self._store.digest(order.num, self._length_of(order))
        try:
            self._check(order, reply, seal, frame)
        except WrongBytes:
            claim.check(order)  # else they may be the other's
            raise
        return seal.length if self._commit(order, claim, seal) else 0

    def _ask(self, order: Order) -> Tuple[HttpLink, Reply]:
        """Ask for a piece; return the connection and the head of the answer.  Raises NetworkError, TimedOut.  Wire: 5.3, 5.4"""
        layout = self._store.layout
        start = int(order.range_text.partition("-")[0])
        exact = "bytes=%d-%d" % (start, start + self._length_of(order) + (0 if order.plain else WRAP) - 1)  # Wire: 7.6 (0.2's last piece)
        headers = [("Range", exact), ("pieceNum", str(order.num)), ("pieceSize", str(layout.size)),
                   ("User-Agent", "dfget/" + VERSION)] + (self._headers if order.plain else self._accepted(order))
        target = order.path
        if order.plain:
            headers.append(("cdnSource", "source"))
            parts = urlsplit(order.path)
            target = order.path.split(parts.netloc, 1)[1] if parts.netloc else order.path
        link, reply = self._pool.open(order.host, order.port, "GET", target, headers,
                                      timeout_s=PEER_SILENCE_S if order.from_peer else SEED_SILENCE_S)
        if self._pace:
            lead = min(AHEAD_S, AHEAD_TRIPS * link.keep_short(self._pace))
            self._lead += 0.2 * (lead - self._lead)
        return link, reply

    def _accepted(self, order: Order) -> List[Tuple[str, str]]:
        """Return the headers that say who we are, and, on a link that is slow enough, how slow, so that its holder may deflate the piece."""
        rate = self._meter.rate if self._compress and not order.old else 0
        if not 0 < rate < FASTEST_DEFLATE:
            return [(DFLY_HEADER, "1")]
        return [(DFLY_HEADER, "1 rate=%d" % rate), ("Accept-Encoding", "deflate")]

    @staticmethod
    def _named(order: Order) -> str:
        return "piece %d from %s" % (order.num, join_host(order.host, order.port))

    @staticmethod
    def _refused(order: Order, status: int) -> DflyError:
        error = NetworkError("%s answers %d for piece %d" % (join_host(order.host, order.port), status, order.num))
        error.why = "gone" if status in (404, 416) else "other"
        return error

    def _receive(self, order: Order, link: HttpLink, reply: Reply, funnel: Funnel, claim: "_Claim") -> bytes:
        """Write a piece as it comes; return its head and tail.  Raises NetworkError, TimedOut, NoSpace, CannotWrite, zlib.error."""
        expected, began = self._length_of(order), time.monotonic()
        if reply.headers.get("content-encoding", "") == "deflate" and not order.plain:
            reply.inflate(expected + WRAP)
        frame = b"" if order.plain else self._frame(order, reply, funnel, 4)
        self._fill(order, link, reply, funnel, claim)
        if not order.plain:
            frame += self._frame(order, reply, funnel, 1)
        if reply.stream:
            reply.end_inflated()
        pace = reply.taken / max(time.monotonic() - began, 1e-4)
        self._pace += 0.2 * (pace - self._pace) if self._pace else pace
        return frame

    def _frame(self, order: Order, reply: Reply, funnel: Funnel, count: int) -> bytes:
        """Return the next bytes of an answer, which are no part of the file."""
        found = b""
        while len(found) < count:
            before = reply.taken
            got = reply.read_into(funnel.buffer[:count - len(found)])
            found += bytes(funnel.buffer[:got])
            if not self._book(reply, before) and not got:
                raise self._short(order, count)
        return found

    def _book(self, reply: Reply, before: int) -> int:
        """Return how many bytes an answer has taken on the wire since `before`, and book them."""
        taken = reply.taken - before
        self._bucket.spend(taken)
        self._meter.add(taken)
        return taken

    def _fill(self, order: Order, link: HttpLink, reply: Reply, funnel: Funnel, claim: "_Claim") -> None:
        """Write the content of a piece as it comes.  Raises NetworkError, TimedOut, NoSpace, CannotWrite, zlib.error.

        Limits and paces are those of the bytes on the wire, fewer than are to come where they are deflated.
        """
        offset, left = order.num * self._store.layout.stride, self._length_of(order)
        waited, came = 0.0, 0  # seconds spent on reading, and bytes read, since its pace was last looked at
        while left > 0:
            behind = (0 if order.plain else 1) + left if not reply.stream else reply.left or 0
            most = self._bucket.chunk(min(left, self._watch_pace(order, link, reply, behind)))
            self._bucket.take(0)
            asked, before = time.monotonic(), reply.taken
            with claim.writing:
                claim.check(order)
                if self._stopping or self._store.have >> order.num & 1:
                    raise _Superseded("piece %d is here already, or the download ends" % order.num)
                count = self._store.pour(reply, funnel, offset, most)
            taken = self._book(reply, before)
            if not count and not taken:
                raise self._short(order, left)
            self.received += count
            offset, left = offset + count, left - count
            waited, came = waited + time.monotonic() - asked, came + taken
            if waited > PEER_SILENCE_S:
                self._check_pace(order, came / waited)
                waited, came = 0.0, 0

    def _watch_pace(self, order: Order, link: HttpLink, reply: Reply, left: int) -> int:
        """Announce the end of a piece when it is as far off as the answer to a request; return how much to read next.

        By the pace of the pieces before it: a piece's own first bytes come faster than the link is, from the kernel's buffer.
        """
        pace, lead = self._pace, self._lead
        if 0.3 * pace * lead < left <= 1.2 * pace * lead and order.num not in self._ending and len(self._ending) < self._count - 1:
            with self._lock:
                self._ending.add(order.num)
            self._pool.ending(link, reply)
            self.endings.append(order)
            os.write(self._wake_w, b"x")
        most = int(min(CHUNK, max(CHUNK / 4, pace * AHEAD_S)))
        return min(most, left - int(pace * lead)) if 1.2 * pace * lead < left else most

    def _check_pace(self, order: Order, pace: float) -> None:
        """Give up on a peer that only drips, and on one far slower than the others while pieces wait for a thread.  Raises TimedOut."""
        least = max(PEER_LEAST, self._pace / 20 if self._queue.qsize() else 0.0)
        if pace < least and order.from_peer:
            raise TimedOut("%s sends %s/s" % (join_host(order.host, order.port), show_size(pace)))

    def _length_of(self, order: Order) -> int:
        """Return the plain bytes the piece must have."""
        if order.old:
            return int(order.digest.rpartition(":")[2]) - WRAP
        start, _, end = order.range_text.partition("-")
        return int(end) - int(start) + 1 - (0 if order.plain else WRAP)

    @staticmethod
    def _short(order: Order, left: int) -> DflyError:
        error = NetworkError("%s hung up %d bytes before the end of piece %d" % (join_host(order.host, order.port), left, order.num))
        error.why = "other"
        return error

    def _check(self, order: Order, reply: Reply, seal: Seal, frame: bytes) -> None:
        """See whether a piece is what it must be.  Raises WrongBytes, CannotRead."""
        what = self._named(order)
        if order.old:
            if frame != piece_head(seal.length, self._store.layout.size) + TAIL:
                raise WrongBytes(what, "head and tail of %d bytes" % seal.length, frame.hex())
            got = self._store.wrapped_digest(order.num, seal.length)
            if got != order.digest:
                raise WrongBytes(what, order.digest, got)
        elif not order.plain:
            seed = order.cid.startswith("cdnnode:")  # a peer's word about its own bytes is worth nothing
            text = order.digest or (reply.headers.get(DFLY_HEADER, "") if seed else "")
            if text != str(seal):
                raise WrongBytes(what, text or "missing", str(seal))

    # -- who may write -------------------------------------------------------------

    def _claim(self, order: Order, link: HttpLink) -> "_Claim":
        with self._lock:
            claim = self._claims.setdefault(order.num, _Claim())
        claim.take(order, link)
        return claim

    def _commit(self, order: Order, claim: "_Claim", seal: Seal) -> bool:
        """Declare a piece right; return whether it was not yet.  Raises _Superseded where it may be another's by now, and wrong."""
        with claim.writing:
            if self._store.have >> order.num & 1:
                return False
            claim.check(order)
            self._store.seal_piece(order.num, seal, reread=True)
            return True


class _Claim:
    """Who may write a piece: late ones are fetched twice, and then its place in the file is the newest fetch's.

    `writing` is held while somebody writes, or says that what is written is right; _lock guards _order and _link.
    """

    def __init__(self) -> None:
        self.writing = threading.Lock()
        self._lock = threading.Lock()
        self._order = None  # type: Optional[Order]
        self._link = None  # type: Optional[HttpLink]

    def take(self, order: Order, link: HttpLink) -> None:
        """Be the newest; hang up on the one before, who else waits for bytes with the place in his hands."""
        with self._lock:
            before, self._order, self._link = self._link, order, link  # first: he looks whose it is as soon as he is woken
            if before:
                before.interrupt()

    def leave(self, order: Order) -> None:
        """The fetch of `order` reads no more from its connection."""
        with self._lock:
            if self._order is order:
                self._link = None

    def check(self, order: Order) -> None:
        """Raise _Superseded unless the fetch of `order` is the newest."""
        if self._order is not order:
            raise _Superseded("piece %d is fetched from elsewhere" % order.num)


class _Shunned(TimedOut):
    """A fetch that was not begun, since its peer has just kept another one waiting."""


class _Superseded(DflyError):
    """A fetch whose piece came from elsewhere first; nobody's fault."""

    why = ""


# ==============================================================================
# 21. Lines
#    The conversation with a supernode on which pieces are ordered and reported, native
#    or old.
# ==============================================================================

class Registration(NamedTuple):
    """What a supernode said to our register."""

    node: Node
    task_id: str
    length: Optional[int]
    piece_size: int
    native: bool
    version: str  # "" while it is not known
    content: Optional[bytes]
    plain: bool  # cdnSource "source": pieces are ranges of the origin's file
    line: str = ""  # what stands for task and client in each sync
    caching: Any = None  # what a supernode tells another one about that

    @property
    def whole(self) -> Optional[bytes]:
        """The file itself, where it is small enough to come inside the answer."""
        return b"" if self.length == 0 else self.content

    def fill(self, store: TaskFile) -> int:
        """Have the file that came inside the answer written; return its bytes.  Raises Migrate, NoSpace, CannotWrite."""
        whole = self.whole or b""
        if store.layout.count != 1 or len(whole) != store.layout.length:
            raise Migrate("the file in the register answer has %d bytes" % len(whole))
        store.write(0, whole)
        store.seal_piece(0, store.digest(0, len(whole)), reread=True)
        return len(whole)

    @classmethod
    def ask(cls, node: Node, headers: List[Tuple[str, str]], body: Dict[str, Any]) -> "Registration":
        """Register.  Raises NetworkError, Migrate, NeedAuth, SourceError.  Wire: 1"""
        pool = Pool(5.0, 2.0)
        for _ in range(4):
            try:
                status, text = pool.ask(node.host, node.port, "POST", "/peer/registry", headers, json.dumps(body).encode())
            finally:
                pool.close()
            try:
                answer = json.loads(text.decode())
                code = answer["code"]
            except (ValueError, KeyError, TypeError):
                raise Migrate("supernode %s answers %d: %.200s" % (node, status, text.decode("utf-8", "replace")))
            if code != WAIT_AUTH:
                break
            time.sleep(1.0)
        message = "supernode %s: code %s: %.300s" % (node, code, answer.get("msg") or answer.get("message") or "")
        if code == NEED_AUTH:
            raise NeedAuth(message)
        if code == URL_UNREACHABLE:
            raise with_pause(SourceError(message), answer)
        if code != SUCCESS or not isinstance(answer.get("data"), dict):
            raise with_pause(Migrate(message), answer)
        return cls._read(node, answer["data"])

    @classmethod
    def _read(cls, node: Node, data: Dict[str, Any]) -> "Registration":
        try:
            length, size, task_id = int(data["fileLength"]), int(data["pieceSize"]), str(data["taskId"])
        except (KeyError, TypeError, ValueError):
            raise Migrate("supernode %s: a register answer that can't be read: %.300s" % (node, data))
        if not WRAP < size <= 1 << 27 or not -1 <= length <= MAX_COUNT * (size - WRAP) or not re.match(r"^[\w.:~-]{1,256}$", task_id):
            raise Migrate("supernode %s: a register answer that makes no sense: %.300s" % (node, data))
        extra = data.get("dfly") or {}
        content = None
        if not isinstance(extra, dict):
            raise Migrate("supernode %s: a register answer that makes no sense: %.300s" % (node, data))
        if "content" in extra:
            import base64
            try:
                content = base64.b64decode(extra["content"])
            except (TypeError, ValueError):
                raise Migrate("supernode %s: a register answer that makes no sense: %.300s" % (node, data))
        plain = data.get("cdnSource") == "source"
        version = str(extra.get("version", "")) if extra or plain else UNNAMED
        return cls(node, task_id, None if length < 0 else length, size, bool(extra), version, content, plain, str(extra.get("line", "")), extra.get("caching"))


class SyncLine:
    """The native conversation with a supernode: one sync is always parked there, and a newer one takes its place.

    Two or three connections take turns, since an answer to the older sync may still be on its way.
    """

    NEVER = float("inf")
    PATIENCE_S = 0.1  # for a batch to come, before it is asked for again because another piece is here
    PAUSE_S = (0.05, 1.0)  # before asking again, doubling, whoever does not hold what he has no answer to
    ENCODE = staticmethod(json.JSONEncoder(separators=(",", ":")).encode)

    def __init__(self, registration: Registration, cid: str, fetchers: Fetchers, store: TaskFile,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._registration, self._cid = registration, cid
        self._fetchers, self._store, self._clock = fetchers, store, clock
        self._node = registration.node
        self._idle = []  # type: List[HttpLink]
        self._pending = []  # type: List[HttpLink]  # a sync is unanswered on these, oldest first
        self._reports = []  # type: List[Outcome]
        self._soon = []  # type: List[int]  # pieces about to arrive
        self._have = store.have  # to be told once
        self._eager = False  # others wait for what we have
        self._send_at = self.NEVER  # when there is something to say that should wait no longer
        self._batches = False  # it gives us more than we can fetch at once
        self._asked_at = -self.NEVER  # when the next batch was asked for, and has not come
        self._sent_at = 0.0  # when the newest sync went
        self._pause = 0.0  # the last pause, 0 after an answer with something in it
        self._again_at = -self.NEVER  # when to ask again, with no sync parked and nothing to say
        self.reason = ""  # why there is nothing to do, in the supernode's words
        self.finished = False

    def step(self, outcomes: List[Outcome], limit_s: float) -> None:
        """Report, ask, wait at most `limit_s` for something to happen, and take orders.  Raises Migrate, NetworkError."""
        now = self._clock()
        self._reports += [o for o in outcomes if not isinstance(o.error, _Superseded)]
        while self._fetchers.endings:
            self._soon.append(self._fetchers.endings.popleft().num)
        if self._reports and (self._runs_low(now) or any(o.error for o in self._reports)) or self._eager and self._soon:
            self._send_at = now
        elif self._eager and self._reports:
            self._send_at = min(self._send_at, now + HOLD_S)
        if now >= self._due_at():
            self._send(FETCHERS)
        for sock in self._fetchers.wait(max(0.0, min(limit_s, self._due_at() - now)), [link.sock for link in self._pending]):
            self._answer(next(link for link in self._pending if link.sock is sock))

    def _due_at(self) -> float:
        """Return when the next sync is to go: when there is something to say, or, while none is parked, to ask again."""
        return self._send_at if self._pending else min(self._send_at, self._again_at)

    def _pace(self, news: bool) -> None:
        """Pause after an answer that has no news and was not held either: a proxy between, or a supernode with too many clients."""
        now = self._clock()
        if news or now - self._sent_at >= self.PAUSE_S[1]:
            self._pause, self._again_at = 0.0, now
        elif not self._pending:  # else it is the answer to a sync that a newer one has taken the place of
            self._pause = min(max(2 * self._pause, self.PAUSE_S[0]), self.PAUSE_S[1])
            self._again_at = now + self._pause

    def _runs_low(self, now: float) -> bool:
        """Return whether the fetchers soon have nothing to do, though there are pieces that nobody has asked for."""
        left, layout = self._fetchers.left, self._store.layout
        if self._eager:
            return left <= 1
        if left > FETCHERS or now < self._asked_at + self.PATIENCE_S:
            return False
        return layout.count is None or bin(self._store.have).count("1") + left < layout.count

    def _send(self, slots: int) -> None:
        done = [[o.order.num, o.order.holder, round(o.seconds, 3), o.length] for o in self._reports if not o.error]
        failed = [[o.order.num, o.order.holder, getattr(o.error, "why", "other")] for o in self._reports if o.error]
        queue = AHEAD if slots and not self._eager and self._fetchers.left <= FETCHERS else 0
        if queue and self._batches and self._store.layout.count is not None:
            self._asked_at = self._clock()
        self._sent_at = self._clock()
        said = {"done": done, "failed": failed, "soon": self._soon, "slots": slots, "queue": queue, "have": self._have and "%x" % self._have}
        message = {name: value for name, value in said.items() if value}  # to a supernode of many every byte counts
        self._reports, self._soon, self._send_at, self._have = [], [], self.NEVER, 0
        line = self._registration.line
        message.update({} if slots else {"wait": 0}, **({} if line else {"task": self._registration.task_id, "cid": self._cid}))
        target, body = "/peer/sync" + ("?" + line if line else ""), self.ENCODE(message).encode()
        while True:
            link = self._idle.pop() if self._idle else HttpLink(self._node.host, self._node.port, SYNC_WAIT_S + 10.0, 3.0)
            kept = not link.fresh
            try:
                link.send("POST", target, (), body)
            except NetworkError:
                link.close()
                if not kept:
                    raise
                continue
            self._pending.append(link)
            return

    def _answer(self, link: HttpLink) -> None:
        self._pending.remove(link)
        try:
            reply = link.reply()
            text = reply.body()
            if reply.status != 200:
                raise Migrate("%s answers %d: %.200s" % (link, reply.status, text.decode("utf-8", "replace")))
            answer = json.loads(text.decode())
            code = answer["code"]
        except (NetworkError, Migrate):
            link.close()
            raise
        except (ValueError, KeyError, TypeError):
            link.close()
            raise Migrate("%s answers what can't be read" % link)
        if reply.reusable:
            self._idle.append(link)
        else:
            link.close()
        try:
            news = self._learn(answer)
            orders = self._orders(answer) if code == CONTINUE else []
        except (NoSuchPiece, AttributeError, KeyError, TypeError, ValueError):
            raise Migrate("supernode %s hands out what can't be read: %.200s" % (self._node, text.decode("utf-8", "replace")))
        self._pace(news or bool(orders))
        if code == CONTINUE:
            self.reason, self._asked_at, self._batches = "", -self.NEVER, len(orders) > FETCHERS
            for order in orders:
                self._fetchers.put(order)
        elif code == FINISH:
            if not self._store.complete:  # Wire: 16 (19)
                raise Migrate("supernode %s says that the download is finished, but pieces are missing" % str(self._node))
            self.finished = True
        elif code == WAIT:
            self.reason = answer.get("msg") or self.reason
        else:
            kind = Lost if code == UNKNOWN_TARGET else Migrate
            raise with_pause(kind("supernode %s: code %s: %s" % (self._node, code, answer.get("msg", ""))), answer)

    def _learn(self, answer: Dict[str, Any]) -> bool:
        """Take what an answer says about the file and who waits for it; return whether that is news.  Raises ValueError, TypeError."""
        before = self._eager, self._store.layout.length
        self._eager = bool(answer.get("eager", self._eager))
        if answer.get("version") and not self._registration.version:
            self._store.note(version=str(answer["version"]))
        length, layout = answer.get("length"), self._store.layout
        if length is not None:
            if not 0 <= length <= MAX_COUNT * layout.stride or layout.length not in (None, length):
                raise ValueError(length)
            self._store.set_length(int(length))
        return before != (self._eager, self._store.layout.length)

    def _orders(self, answer: Dict[str, Any]) -> List[Order]:
        """Return the pieces that an answer hands out.  Raises NoSuchPiece, and what Python does of answers of another form."""
        orders = []
        for num, cid, digest in answer["pieces"]:
            host, port, path = answer["holders"][str(cid)]
            if not (0 < port < 65536 and path.startswith("/") and not host.startswith("/")):
                raise ValueError(cid)
            orders.append(Order(int(num), "cdnnode:" if cid == 0 else str(cid), host, port, path, Seal.long(digest) if digest else "",
                                self._store.layout.range_text(num)))
        return orders

    def close(self) -> None:
        """Say what is still unsaid, without waiting for more than a moment, and hang up."""
        try:
            self._reports += [o for o in self._fetchers.drain() if not o.error]
            if self._reports:
                self._send(0)
                self._pending[-1].set_timeout(1.0)
                self._pending[-1].reply().body()
        except NetworkError:
            pass
        for link in self._idle + self._pending:
            link.close()


class PullLine:
    """The old conversation: a pull and a report a piece, polling when there is nothing.  Wire: 15"""

    PAUSE_S = (0.05, 1.6)  # between polls, doubling

    def __init__(self, registration: Registration, cid: str, fetchers: Fetchers, store: TaskFile) -> None:
        self._registration, self._cid = registration, cid
        self._fetchers, self._store = fetchers, store
        self._node = registration.node
        self._pool = Pool(5.0, 2.0)
        self._running = set()  # type: Set[int]
        self._lengths = {}  # type: Dict[int, int]  # plain bytes of each piece seen, to learn the file's length
        self._failures = collections.Counter()  # type: Dict[Tuple[int, str], int]
        self._pause = self.PAUSE_S[0]
        self._owed = [("", "", STARTED, INVALID)]  # type: List[Tuple[str, str, int, int]]  # pulls to send
        self.reason = ""
        self.finished = False
        self.md5 = ""  # of the whole file, as the supernode says at the end

    def step(self, outcomes: List[Outcome], limit_s: float) -> None:
        """Report what has ended, ask for more, and wait for something to happen.  Raises Migrate, NetworkError."""
        for outcome in outcomes:
            self._report(outcome)
        if not self._owed:
            self._fetchers.wait(limit_s)
            return
        range_text, cid, status, result = self._owed[0]
        query = "srcCid=%s&dstCid=%s&range=%s&result=%d&status=%d&taskId=%s" % (
            quote(self._cid, safe=":~"), quote(cid, safe=":~"), range_text, result, status, self._registration.task_id)
        answer = self._ask("/peer/task?" + query)
        code = answer.get("code")
        nothing = code == WAIT or (code == CONTINUE and not answer.get("data") and not self._running)
        if nothing and len(self._owed) == 1:  # else the next report may be what it waits for
            self.reason = "waiting: supernode %s has nothing to hand out: %.200s" % (self._node, answer.get("msg", ""))
            self._fetchers.wait(min(limit_s, self._pause))
            self._pause = min(self.PAUSE_S[1], self._pause * 2)
            if self._fetchers.outcomes:  # the same report need not be repeated: another one is coming
                self._owed.pop(0)
            return
        self._owed.pop(0)
        self._pause = self.PAUSE_S[0]
        if nothing:
            return
        if code == CONTINUE:
            self._take(answer.get("data") or [])
        elif code == FINISH:
            self._finish(answer.get("data"))
        else:
            kind = Lost if code == UNKNOWN_TARGET else Migrate
            raise kind("supernode %s: code %s: %.300s" % (self._node, code, answer.get("msg") or answer.get("message", "")))

    def _ask(self, target: str) -> Dict[str, Any]:
        status, body = self._pool.ask(self._node.host, self._node.port, "GET", target)
        try:
            answer = json.loads(body.decode())
        except ValueError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            raise Migrate("supernode %s answers %d: %.200s" % (self._node, status, body.decode("utf-8", "replace")))
        return answer

    def _report(self, outcome: Outcome) -> None:
        order, error = outcome.order, outcome.error
        self._running.discard(order.num)
        if error is None:
            self._report_done(order)
            return
        self._failures[order.num, order.cid] += 1
        tries = sum(self._failures.values())
        if tries > 30 + 3 * len(self._lengths):
            raise Migrate("pieces keep failing, the last one: %s" % error)
        self._fetchers.wait(min(1.0, 0.02 * 2 ** self._failures[order.num, order.cid]))  # no storm.  Wire: 16 (18)
        kind = "FILE_NOT_EXIST" if getattr(error, "why", "") == "gone" else "FILE_MD5_NOT_MATCH" if isinstance(error, WrongBytes) else ""
        if kind:
            self._tell("/peer/piece/error?errorType=%s&srcCid=%s&dstCid=%s&dstIp=%s&taskId=%s&range=%s&realMd5=&expectedMd5=%s" % (
                kind, quote(self._cid, safe=":~"), quote(order.cid, safe=":~"), order.host, self._registration.task_id, order.range_text,
                order.digest))
        self._owed.append((order.range_text, order.cid, RUNNING, FAILED))

    def _report_done(self, order: Order) -> None:
        """Say that a piece is here; 1.0.6 frees its holder's slot by this report only.  Wire: 4.1, 16 (17)"""
        self._tell("/peer/piece/suc?taskId=%s&cid=%s&dstCid=%s&pieceRange=%s" % (
            self._registration.task_id, quote(self._cid, safe=":~"), quote(order.cid, safe=":~"), order.range_text))
        self._owed.append((order.range_text, order.cid, RUNNING, SEMI_SUCCEEDED))

    def _tell(self, target: str) -> None:
        """Send a report whose answer does not matter."""
        try:
            self._pool.ask(self._node.host, self._node.port, "GET", target)
        except NetworkError as error:
            self.reason = "waiting: %s" % error

    def _take(self, pieces: List[Dict[str, Any]]) -> None:
        self.reason = ""
        if not isinstance(pieces, list):
            raise Migrate("supernode %s hands out what can't be read: %.200s" % (self._node, pieces))
        for piece in pieces:
            try:
                order = self._order(piece)
            except (KeyError, TypeError, ValueError):
                raise Migrate("supernode %s hands out what can't be read: %.200s" % (self._node, piece))
            if self._store.have >> order.num & 1:
                self._report_done(order)
            elif order.num not in self._running:
                self._running.add(order.num)
                self._fetchers.put(order)

    def _order(self, piece: Dict[str, Any]) -> Order:
        num, range_text, path = int(piece["pieceNum"]), str(piece["range"]), str(piece["path"])
        if not re.match(r"^\d{1,18}-\d{1,18}$", range_text) or not 0 <= num < MAX_COUNT:
            raise ValueError(range_text)
        if self._registration.plain or "://" in path:
            parts = urlsplit(path)
            start, end = map(int, range_text.split("-"))
            if self._registration.length is not None:
                end = min(end, self._registration.length - 1)
            if end < start - 1:  # nothing at all is right where the file is empty
                raise ValueError(range_text)
            return Order(num, str(piece["cid"]), parts.hostname or str(piece["peerIp"]), parts.port or int(piece["peerPort"] or 80), path, "",
                         "%d-%d" % (start, end), plain=True)
        digest = str(piece["pieceMd5"])
        match = re.match(r"^([0-9a-f]{32}):(\d{1,9})$", digest)
        if not match or int(match.group(2)) < WRAP:
            raise ValueError(digest)
        self._lengths[num] = int(match.group(2)) - WRAP
        return Order(num, str(piece["cid"]), str(piece["peerIp"]), int(piece["peerPort"]), path, digest, range_text)

    def _finish(self, data: Any) -> None:
        """Believe a 600 only when every piece is here.  Wire: 16 (19)"""
        self.md5 = str(data.get("md5") or "") if isinstance(data, dict) else ""
        layout = self._store.layout
        if layout.length is None and self._lengths:
            count = max(self._lengths) + 1
            if self._store.have == (1 << count) - 1:
                self._store.set_length((count - 1) * layout.stride + self._store_length(count - 1))
        if not self._store.complete:
            raise Migrate("supernode %s says that the download is finished, but pieces are missing" % str(self._node))
        self.finished = True

    def _store_length(self, num: int) -> int:
        seal = self._store.seal(num)
        return seal.length if seal else 0

    def close(self) -> None:
        """Hang up."""
        self._pool.close()


# ==============================================================================
# 22. Downloader
#    `get`: from a supernode and its peers, or back to source; resume, the last check,
#    progress and the last lines.  And a supernode as the client of another one.
# ==============================================================================

def show_shares(sources: Dict[str, int]) -> str:
    """Return bytes by kind of holder as a person reads them: `origin 0 %, supernode 12 %, peers 88 %`."""
    total = float(sum(sources.values())) or 1.0
    return ", ".join("%s %d %%" % (kind, round(100 * sources.get(kind, 0) / total)) for kind in ("origin", "supernode", "peers"))


class Progress:
    """What a person sees while it runs: a bar on a terminal, else a line now and then; and why it stands still."""

    def __init__(self, out: Any, bar: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._bar = bar
        self._tty = bar and out.isatty()
        self._drawn_at = self._moved_at = self._told_at = self._shown_at = clock()
        self._bytes = 0
        self._marks = collections.deque()  # type: collections.deque  # (when, bytes), over the last seconds
        self.best = 0.0  # bytes per second in the fastest second: what this link can do at least
        self._width = 0

    def due(self) -> bool:
        """Return whether the last look is so long ago that another may show something."""
        return self._clock() - self._shown_at > 0.05

    def show(self, received: int, length: Optional[int], kept: int, peers: int, share: float, reason: str) -> None:
        """Note that `received` bytes have come, and tell what is worth telling."""
        self._shown_at = now = self._clock()
        if received != self._bytes:
            self._bytes, self._moved_at = received, now
        self._marks.append((now, received))
        while now - self._marks[0][0] > 1.0:
            then, before = self._marks.popleft()
            self.best = max(self.best, (received - before) / (now - then))
        if now - self._moved_at > STALL_S:
            self.complain(reason or "waiting: no byte for %s" % show_time(now - self._moved_at))
        if self._bar and now - self._drawn_at > (0.2 if self._tty else 5.0):
            self._drawn_at = now
            self._draw(received, length, kept, peers, share)

    def complain(self, reason: str) -> None:
        """Tell why it does not get on, now and then."""
        if self._clock() - self._told_at > STALL_S:
            self._told_at = self._clock()
            self.line(reason)

    def _draw(self, received: int, length: Optional[int], kept: int, peers: int, share: float) -> None:
        then, before = self._marks[0]
        rate = (received - before) / max(self._clock() - then, 0.1)
        have = kept + received
        text = "%s  %s/s" % (show_size(have), show_size(rate))
        if length:
            left = max(0, length - have)
            text = "%3d%% %s of %s  %s/s  %s left" % (min(100, 100 * have // length), show_size(have), show_size(length), show_size(rate),
                                                    show_time(left / rate) if rate > 1 else "?")
        text += "  %d peers, %d%% P2P" % (peers, 100 * share)
        if self._tty:
            cells = int(20 * min(have, length) / length) if length else 0
            text = "[%s%s] %s" % ("#" * cells, "." * (20 - cells), text)
            self._out.write("\r" + text.ljust(self._width))
            self._width = len(text)
            self._out.flush()
        else:
            self.line(text)

    def line(self, text: str) -> None:
        """Print a line of its own."""
        if self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._out.write(text + "\n")
        self._out.flush()


class Download:
    """One run of `get`.  `options` are the parsed flags (see the command line section)."""

    ABSENT_S = 2.0  # --notbs: how long supernodes are asked again of which none has answered yet,
    LOST_S = (5.0, 15.0)  # and how long one that has, without a new piece: before back to source, and with --notbs
    AGAIN_S = (0.1, 1.0)  # between two rounds over all supernodes, doubling
    TROUBLES = 10  # pieces that fail in a row, before that is told

    def __init__(self, options: Any, out: Any = None, clock: Callable[[], float] = time.monotonic, content: str = "") -> None:
        self.options = options
        self._clock = clock
        self.began = clock()
        self.out = out or sys.stdout
        self.sign = "%d-%.3f" % (os.getpid(), time.time())  # Wire: 2.3
        self.home = os.path.abspath(options.home)
        self.log = Log(os.path.join(self.home, "logs", "dfclient.log"), self.sign, options.verbose, options.console)
        self.url = options.url
        self.headers = parse_headers(options.header)
        self.origin = Origin(self.url, self.headers, options.insecure, options.cacerts,
                             timeout_s=min(Origin.TIMEOUT_S, options.timeout or Origin.TIMEOUT_S), content=content)
        self.task_url = content or filter_url(self.url, options.filter)
        self.task_id = task_id_of(self.task_url, options.md5, options.identifier, self.origin.header("range"), self.origin.trust())
        self.target = self._target()
        folder, name = os.path.split(self.target)
        short = name.encode("utf-8", "surrogateescape")[:150].decode("utf-8", "ignore")  # a name has 255 bytes, not characters
        hidden = os.path.join(folder, ".%s.%s.dfly" % (short, self.task_id[:16]))
        self._data, self._journal = hidden, hidden + ".journal"
        self.name = "%s-%s" % (re.sub(r"[^\w.@+-]", "_", name, flags=re.ASCII)[:100], self.sign)  # Wire: 2.3, and safe in a path
        self.store = None  # type: Optional[TaskFile]
        self.bucket = TokenBucket(min(filter(None, (options.locallimit, options.totallimit)), default=0))
        self.reason = REASON_NONE
        self.ip, self.cid, self.port, self.reach = "", "", 0, ""
        self.kept = 0  # bytes that an earlier run had left
        self.bytes = collections.Counter()  # type: Dict[str, int]  # where the rest came from
        self.holders = collections.Counter()  # type: Dict[str, int]  # by the address that sent it
        self.progress = Progress(self.out, options.showbar)
        self._deadline = None  # type: Optional[float]
        self._line = None  # type: Any
        self._uploader = UploaderLine(self.home)
        self._share_at = 0.0
        self._md5 = None  # type: Optional[Md5Follower]
        self._old_md5 = ""  # what an old supernode says at the end
        self._served = False  # a supernode has taken us in, or was about to
        self._peers = set()  # type: Set[str]
        self._troubles = 0  # pieces that have failed since the last good one
        self._trouble = ""  # why, once they are many

    def _target(self) -> str:
        """Return the absolute path of the output.  Raises BadUsage, CannotWrite."""
        output = self.options.output or unquote(urlsplit(self.url).path).rstrip("/").rpartition("/")[2]
        if not output:
            raise BadUsage("%s names no file: say one with -o" % self.url)
        target = os.path.abspath(output)
        if os.path.isdir(target) or output.endswith("/"):
            raise BadUsage("%s is a folder: name the file with -o" % output)
        if os.path.exists(target) and not os.path.isfile(target):  # as root we would put a file in the place of /dev/null
            raise BadUsage("%s is not a regular file, and would be replaced by one" % output)
        folder = make_folder(os.path.dirname(target))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CannotWrite("%s: Permission denied" % folder)
        return target

    # -- the run ---------------------------------------------------------------

    def run(self) -> None:
        """Download.  Raises FinalFailure, and BadUsage or CannotWrite before it has begun."""
        say = self.progress.line
        say("--%s--  %s" % (time.strftime("%Y-%m-%d %H:%M:%S"), self.url))
        say("dfget version:%s" % VERSION)
        say("workspace:%s" % self.home)
        say("sign:%s" % self.sign)
        try:
            if self.options.md5:
                new_md5()
            self._everything()
        except (NoSpace, CannotWrite) as error:
            raise FinalFailure(error, error.reason + REASON_NO_SOURCE)
        finally:
            self._finish_up()

    def _everything(self) -> None:
        if self.options.pattern == "source":
            self.reason = REASON_USER
            self._from_source()
            return
        try:
            self._from_swarm()
        except (NoSpace, CannotWrite):
            raise
        except DflyError as error:
            self.reason = self.reason or error.reason
            self.log.warn("%s", error)
            if self.options.notbs or isinstance(error, NeedAuth):
                raise FinalFailure(error, self.reason + (REASON_NO_SOURCE if self.options.notbs else REASON_NONE))
            self.progress.line("failed to download by dragonfly: %s, and start try to download from source" % error)
            if error.pause_s:
                self.log.info("others ask the origin first: waiting %.1f s", error.pause_s)
                time.sleep(error.pause_s)
            self._from_source()

    def _finish_up(self) -> None:
        complete = bool(self.store and self.store.complete)
        if self.port:
            self._uploader.call("POST", "/finish", {"name": self.name, "complete": complete})
        if self._md5:
            self._md5.stop()
        if self.store:
            self.store.close()
        self.log.info("|%s|%s|%s|%s|%s|%s|%.3f|", self.task_id, self.url, self.store and self.store.layout.length,
                      dict(self.bytes), self.reach, self.options.callsystem, self._clock() - self.began)
        self.log.info("sources %s", json.dumps(self.holders))
        self.log.close()

    # -- by the swarm -------------------------------------------------------------

    def _from_swarm(self) -> None:
        """Download by supernodes and peers.  Raises whatever makes that impossible."""
        find = self.options.find_nodes
        nodes = order_nodes(find(self.log) if find else self.options.nodes, self.task_url)
        if not nodes:
            self.reason = REASON_NO_NODE
            raise NetworkError("no supernode is configured (--node, or [node] address in %s)" % CONFIG)
        error, best, since, pause = self._round(nodes, None), -1, 0.0, 0.0
        while error:
            now, kept = self._clock(), self.store.kept_bytes if self.store else 0
            if kept > best:
                best, since, pause = kept, now, self.AGAIN_S[0]
            if now >= min(since + self._patience_s(error), self._deadline or now + 1.0):
                raise error
            time.sleep(pause * random.uniform(0.5, 1.0))  # all who were there would else come back at once
            pause = min(2 * pause, self.AGAIN_S[1])
            error = self._round(nodes, error)

    def _patience_s(self, error: DflyError) -> float:
        """Return how long failed supernodes are asked again: one that was there a moment ago is perhaps just being restarted."""
        if isinstance(error, Unready):
            return Origin.TIMEOUT_S  # as long as it waits itself
        if self._served and isinstance(error, (NetworkError, Lost)):
            return self.LOST_S[bool(self.options.notbs)]
        return self.ABSENT_S if self.options.notbs else 0.0

    def _round(self, nodes: List[Node], last: Optional[DflyError]) -> Optional[DflyError]:
        """Try each supernode once, until one brings the file; return why the last one failed (`last`: in the round before)."""
        for node in nodes:
            try:
                registration = self._register(node)
            except (NetworkError, Migrate) as error:
                self.log.warn("supernode %s: %s", node, error)
                self._served = self._served or isinstance(error, HungUp)
                last, self.reason = error, self.reason or REASON_REGISTER
                continue
            self._served = True
            if last is not None and self.store is not None:
                self.progress.line("migrated to node:%s" % str(node))
            try:
                self.reason = REASON_NONE
                self._swarm(registration)
                return None
            except (NetworkError, Migrate) as error:
                self.log.warn("supernode %s: %s", node, error)
                last, self.reason = error, REASON_DOWNLOAD
        return last

    def _prepare(self, node: Node) -> None:
        """Find the own address and the host's uploader; once."""
        literal = re.match(r"^[\d.]+$|^[^:]*:", node.host)
        ours, self.reach = ("", node.host) if literal and (self.cid or self.options.ip) else addresses_to(node.host, node.port, 2.0)
        if self.cid:
            return
        self.ip = self.options.ip or ours
        self.cid = "%s-%s" % (self.ip, self.sign)
        if self.options.pattern == "p2p":
            try:
                self.port = self._start_uploader()
            except CannotWrite as error:
                raise CannotPrepare(str(error))
            if not self.port:
                self.log.warn("no uploader: this host will not serve others")

    def _start_uploader(self) -> int:
        options = self.options
        return start_uploader(self.home, "", options.port, options.expiretime, options.alivetime, options.totallimit,
                              options.compress != "off", options.verbose)

    def _register(self, node: Node) -> Registration:
        """Register with a supernode.  Raises NetworkError, Migrate, NeedAuth.  Wire: 1"""
        self._prepare(node)
        body = {"superNodeIp": self.reach, "rawUrl": self.url, "taskUrl": self.task_url, "cid": self.cid, "ip": self.ip,
                "hostName": socket.gethostname(), "port": self.port, "path": "/peer/file/" + self.name, "version": VERSION}
        options = self.options
        for key, value in (("callSystem", options.callsystem), ("md5", options.md5), ("identifier", "" if options.md5 else options.identifier),
                           ("headers", ["%s: %s" % pair for pair in self.headers]), ("dfdaemon", options.dfdaemon), ("insecure", options.insecure),
                           ("rootCAs", self._root_cas())):
            if value:
                body[key] = value
        headers = [("Content-Type", "application/json"), ("User-Agent", "dfly/" + VERSION), (DFLY_HEADER, "1 " + options.location)]
        if options.pattern == "cdn":
            headers.append(("X-Dfly-Pattern", "cdn"))
        try:
            return Registration.ask(node, headers, body)
        except NeedAuth:
            raise
        except SourceError:
            self.reason = REASON_REGISTER
            raise

    def _root_cas(self) -> List[str]:
        import base64
        texts = []
        for path in self.options.cacerts:
            try:
                with open(path, "rb") as file:
                    texts.append(base64.b64encode(file.read()).decode())
            except OSError as error:
                raise BadUsage("--cacerts %s: %s" % (path, error.strerror))
        return texts

    def _swarm(self, registration: Registration) -> None:
        """Fetch what is missing through one supernode; publish when all is right."""
        if self.store and self.store.have and not registration.version:
            raise Unready("supernode %s: the origin has not answered it yet" % str(registration.node))
        self.progress.line("client:%s connected to node:%s" % (self.ip, registration.node))
        self.progress.line("start download by dragonfly...")
        self._open_store(registration.length, registration.piece_size + (WRAP if registration.plain else 0), registration.version)
        assert self.store
        self._set_deadline(registration.length)
        if registration.whole is not None and not self.store.complete:
            self.bytes["supernode"] += registration.fill(self.store)
            self._publish()
            return
        if self.port:
            self._uploader.call("POST", "/adopt", {
                "name": self.name, "task": registration.task_id, "cid": self.cid, "node": [registration.node.host, registration.node.port],
                "pid": os.getpid(), "data": self.store.data, "journal": self.store.journal, "total": self.options.totallimit})
        fetchers = Fetchers(self.store, self.bucket, self.headers, FETCHERS, self.log, self.options.compress != "off")
        line = (SyncLine if registration.native else PullLine)(registration, self.cid, fetchers, self.store)
        try:
            self._loop(line, fetchers)
            self._settle()
            self._old_md5 = getattr(line, "md5", "")
            self._publish()
        finally:
            line.close()
            fetchers.stop()
            self.bytes.update(fetchers.bytes)
            self.holders.update(fetchers.holders)

    def _loop(self, line: Any, fetchers: Fetchers) -> None:
        """Run the conversation until every piece is here."""
        store = self.store
        assert store
        while not line.finished and not (isinstance(line, SyncLine) and store.complete):
            now = self._clock()
            if self._deadline is not None and now > self._deadline:
                raise Stalled("not finished within the %s allowed; %s" % (show_time(self._deadline - self.began),
                                                                        line.reason or self._trouble or "no reason known"))
            limit = 0.2 if self.progress._tty or self.options.totallimit else 0.5
            outcomes = fetchers.drain()
            self._watch(line, fetchers, outcomes)
            line.step(outcomes, max(0.0, min(limit, self._deadline - now if self._deadline is not None else limit)))

    def _watch(self, line: Any, fetchers: Fetchers, outcomes: List[Outcome]) -> None:
        """Between two steps: progress, the host's limit, and what failed for good."""
        assert self.store
        if self.progress.due():
            total = sum(fetchers.bytes.values())
            self.progress.show(fetchers.received, self.store.layout.length, self.kept, len(self._peers),
                               fetchers.bytes["peers"] / total if total else 0.0, line.reason)
        for outcome in outcomes:
            if isinstance(outcome.error, (NoSpace, CannotWrite)):
                raise outcome.error
            if not outcome.error and outcome.order.from_peer:
                self._peers.add(outcome.order.cid)
            self._note_trouble(outcome.error)
        if self._md5:
            self._md5.nudge()
        self._share()

    def _note_trouble(self, error: Optional[DflyError]) -> None:
        """Take note of how a piece ended: bytes that come again and again, and are no piece, are a standstill, too."""
        if isinstance(error, _Superseded):
            return
        self._troubles = self._troubles + 1 if error else 0
        self._trouble = "waiting: pieces keep failing, the last one: %s" % error if self._troubles >= self.TROUBLES else ""
        if self._trouble:
            self.progress.complain(self._trouble)

    def _share(self) -> None:
        """Ask the uploader, now and then, for this download's share of the host's limit; without one it may use all of that."""
        if self.options.totallimit and self.port and self._clock() > self._share_at + 0.4:
            self._share_at = self._clock()
            answer = self._uploader.call("POST", "/share", {"name": self.name, "want": self.options.locallimit})
            if answer:
                self.bucket.rate = answer["rate"]

    def _set_deadline(self, length: Optional[int]) -> None:
        """Begin the time allowed for the whole: --timeout, else what --minrate makes of the length.  Wire: 3.5"""
        allowed = self.options.timeout
        if not allowed:
            allowed = 300.0 if length is None else length / float(self.options.minrate) + 10.0
        if self._deadline is None:
            self._deadline = self.began + allowed

    # -- the store, from beginning to end --------------------------------------------

    def _open_store(self, length: Optional[int], size: int, version: str) -> None:
        """Go on with what an earlier run or another supernode has left, or begin anew.  Raises NoSpace, CannotWrite."""
        about = {"task": self.task_id, "url": without_secrets(self.task_url), "version": version}
        if self.store and self._fits(self.store, length, size, version):
            if length is not None:
                self.store.set_length(length)
            return
        if self.store:
            self.store.close()
        self.store = TaskFile.resume(self._data, self._journal)
        if self.store and self._fits(self.store, length, size, version):
            wrong = self.store.verify()
            self.kept = self.store.kept_bytes
            self.log.info("resuming with %d bytes, %d pieces were damaged", self.kept, wrong)
            self.progress.line("resuming: %s of an earlier run kept%s" % (
                show_size(self.kept), ", %d damaged pieces dropped" % wrong if wrong else ""))
            if length is not None:
                self.store.set_length(length)
        else:
            if self.store:
                self.store.close()
            self.store = TaskFile.create(self._data, self._journal, about, length, size)
        try:
            self.store.need_space()
        except NoSpace:
            if not self.store.have:
                self.store.delete()
            raise
        if self._md5:
            self._md5.stop()
        self._md5 = Md5Follower(self.store) if self.options.md5 else None

    def _fits(self, store: TaskFile, length: Optional[int], size: int, version: str) -> bool:
        """Return whether kept pieces may be pieces of this file."""
        known = store.about.get("version", "")
        return (store.about.get("task") == self.task_id and store.layout.size == size and bool(version) and known == version
                and (length is None or store.layout.length in (None, length)))

    def _settle(self) -> None:
        """Read back what has not been yet, and drop what is not what arrived.  Raises WrongBytes."""
        store = self.store
        assert store and store.layout.count is not None
        wrong = store.read_back(num for num in range(store.layout.count) if not store.reread >> num & 1)
        if wrong:
            store.drop(wrong)
            raise WrongBytes(store.data, "that of %d pieces as they arrived" % store.layout.count, "another for %d of them" % len(wrong))

    def _publish(self) -> None:
        """Check the whole file, give it its name.  Raises WrongBytes, CannotWrite."""
        store = self.store
        assert store and store.complete
        expected = self.options.md5 or self._old_md5
        if self.kept and not expected and store.about.get("version") == UNNAMED:
            store.delete()
            self._forget()
            raise Migrate("the supernode names neither version nor digest of the file: what an earlier run kept may be of another one")
        if expected:
            follower = self._md5 or Md5Follower(store)
            digest = follower.wait()
            if digest != expected.lower():
                store.delete()
                self._forget()
                raise WrongBytes(self.url, expected, digest)
        if self.port:
            self._uploader.call("POST", "/finish", {"name": self.name, "complete": True})
        umask = os.umask(0)
        os.umask(umask)
        store.publish(self.target, 0o666 & ~umask)

    def _forget(self) -> None:
        """Begin anew: what we hold is wrong as a whole."""
        self.store, self.kept, self._old_md5 = None, 0, ""
        if self._md5:
            self._md5.stop()
            self._md5 = None

    # -- back to source ---------------------------------------------------------------

    def _from_source(self) -> None:
        """Download straight from the origin, keeping what is already here.  Raises FinalFailure."""
        self.progress.line("start download %s from the source station" % os.path.basename(self.target))
        try:
            try:
                self._source_once()
            except SourceChanged as error:  # what was kept is of an older file
                self.log.warn("%s", error)
                if self.store:
                    self.store.delete()
                self._forget()
                self._source_once()
        except (NoSpace, CannotWrite):
            raise
        except DflyError as error:
            raise FinalFailure(error, self.reason or error.reason)

    def _source_once(self) -> None:
        first = None  # type: Optional[OriginReply]
        self._deadline = self._clock() + self.options.timeout if self.options.timeout else None
        kept = self.store or TaskFile.resume(self._data, self._journal)
        usable = kept is not None and kept.about.get("task") == self.task_id and any(version_parts(kept.about.get("version", ""))) and kept.claimed
        if usable and kept:
            self.store = kept if kept is self.store else None
            if not self.store:
                kept.close()
                self._open_store(None, kept.layout.size, kept.about["version"])
            self._still_there()
        else:
            if kept:
                kept.close()
            first = Patience(self._late).first(self.origin)
            self.store = None
            self._open_store(first.length, choose_piece_size(first.length), first.version)
        assert self.store
        filler = Filler(self.origin, self.store, self.bucket, lambda num: self._md5.nudge() if self._md5 else None, stopped=self._late)
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch_source, args=(filler, ended), name="dfly-progress", daemon=True)
        watcher.start()
        try:
            filler.fill(first)
        except Stalled as error:
            raise Stalled("not finished within the %s allowed: %s" % (show_time(self.options.timeout), error))
        finally:
            ended.set()
            watcher.join()
            self.bytes["origin"] += filler.read_bytes
        self._settle()
        self._publish()

    def _still_there(self) -> None:
        """When all is here and nothing will be asked for, ask at least whether it still is the origin's file.  Raises SourceChanged."""
        assert self.store
        version = self.store.about["version"]
        if self.store.complete:
            reply = self.origin.open(headers=if_none_match(version))
            reply.close()
            if reply.status != 304 and not same_version(reply.version, version):
                raise SourceChanged("%s: the origin has another file now" % self.url)

    def _late(self) -> bool:
        return self._deadline is not None and self._clock() > self._deadline

    def _watch_source(self, filler: Filler, ended: threading.Event) -> None:
        """Show progress and keep to the host's limit until `ended`, on a thread of its own: the reader may wait long for a byte."""
        store = self.store
        assert store
        try:
            while not ended.wait(0.2):
                self._share()
                self.progress.show(filler.read_bytes, store.layout.length, self.kept, 0, 0.0, "waiting: the origin sends nothing")
        except OSError:  # nobody reads our lines any more: the last one will meet the same
            pass

    # -- the last lines --------------------------------------------------------------

    def last_lines(self, failure: Optional[FinalFailure]) -> None:
        """Print the original's last line, and ours that explains the download.  Wire: 8.3"""
        cost = self._clock() - self.began
        if failure:
            self.progress.line("download FAIL(%d) cost:%.3fs length:%s reason:%d error:%s" % (
                failure.number, cost, self._length(), failure.reason,
                json.dumps({"Code": NEED_AUTH if failure.auth else failure.number, "Msg": str(failure)}, separators=(",", ":"))))
            return
        length = self._length()
        self.progress.line("download SUCCESS cost:%.3fs length:%d reason:%d" % (cost, length, self.reason))
        total = sum(self.bytes.values())
        text = "%s in %s (%s/s)" % (show_size(length), show_time(cost), show_size(length / max(cost, 0.001)))
        if self.progress.best and cost > 1.5:
            floor = (length - self.kept) / self.progress.best
            text += "; floor for this link %s (%d %%)" % (show_time(floor), 100 * cost / max(floor, 0.001))
        if total:
            text += "; from: " + show_shares(self.bytes)
        if self._peers:
            text += " (%d of them)" % len(self._peers)
        if self.kept:
            text += "; %s kept from an earlier run" % show_size(self.kept)
        self.progress.line(text)

    def _length(self) -> int:
        return self.store.layout.length or 0 if self.store else 0


# ==============================================================================
# 23. Siblings
#    A supernode as a client of others: one of them asks the origin, the rest take part
#    in its swarm.
# ==============================================================================

class Siblings:
    """The other supernodes of a region, so that one fetch from far away serves all of it.

    Each says who it is (GET /sibling).  By that all of them find the same one responsible for a task, as clients do, and the others
    register with that one: they take part in its swarm, receive pieces and offer them.  Asked by a sibling, a supernode asks
    none itself.  _changed guards _seen.
    """

    LOOK_S = 5.0  # between two looks at one that is there,
    AGAIN_S = 1.0  # and at one that is not
    WAIT_S = 1.0  # for its answer

    def __init__(self, nodes: List[Node], about: Dict[str, Any], port: int, label: str, bucket: TokenBucket, turns: Turns, log: Log,
                 compress: bool) -> None:
        self._log, self.turns = log, turns
        self.about = about  # who this one is, as the others are told: node (host:port), weight, instance
        self._port = port  # of our pieces
        self._label = label  # site/rack
        self._bucket, self._compress = bucket, compress
        self._changed = threading.Condition()
        self._seen = {}  # type: Dict[Node, Optional[Node]]  # those that were looked at, and as which each knows itself; None: not there
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(node,), name="dfly-sibling-%d" % i, daemon=True)
                         for i, node in enumerate(dict.fromkeys(nodes))]

    def start(self) -> None:
        """Begin to look who is there."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End that."""
        self._ended.set()

    def _watch(self, node: Node) -> None:
        """The life of a thread that looks after one sibling, unless that turns out to be this one."""
        while not self._ended.is_set():
            found = self._look(node)
            own = found is not None and str(found) == self.about["node"]
            self._note(node, None if own else found)
            if own:
                return
            self._ended.wait(self.LOOK_S if found else self.AGAIN_S)

    def _look(self, node: Node) -> Optional[Node]:
        """Return as which a sibling knows itself; None when it is not there."""
        pool = Pool(self.WAIT_S, self.WAIT_S)
        try:
            status, text = pool.ask(node.host, node.port, "GET", "/sibling")
            about = json.loads(text.decode())
            own = about["instance"] == self.about["instance"]
            found = Node(*split_host(about["node"], SUPERNODE_PORT), weight=min(max(1, int(about["weight"])), 9999))
        except (NetworkError, BadUsage, ValueError, KeyError, TypeError):
            return None
        finally:
            pool.close()
        if str(found) == self.about["node"] and not own:
            self._log.warn("sibling %s says that it is %s, as this one does: not asked (advertise-ip)", node, found)
        return found

    def _note(self, node: Node, found: Optional[Node]) -> None:
        with self._changed:
            if node not in self._seen or self._seen[node] != found:
                self._log.info("sibling %s is %s", node, found or "not there, or this one")
            self._seen[node] = found
            self._changed.notify_all()

    def first(self, task_url: str) -> Optional[Node]:
        """Return where the sibling is that is responsible for a task; None where this supernode is."""
        own = Node(*split_host(self.about["node"], SUPERNODE_PORT), weight=self.about["weight"])
        with self._changed:
            self._changed.wait_for(lambda: len(self._seen) == len(self._threads), 2 * self.WAIT_S + 1.0)  # at the very beginning
            places = {found: node for node, found in self._seen.items() if found}
        return places.get(order_nodes([own] + list(places), task_url)[0])

    def enter(self, node: Node, task: CdnTask, origin: Origin, version: str, stopped: Callable[[], bool]) -> "SiblingSource":
        """Register for a task with a sibling.  Raises NetworkError, Migrate, SourceError where it has it not, or not this version."""
        deadline = time.monotonic() + Origin.TIMEOUT_S
        try:
            ip, reach = addresses_to(node.host, node.port, 2.0)
            cid = "%s-supernode-%s-%.3f" % (ip, self.about["instance"][:8], time.time())  # Wire: 2.3 (25 characters at least)
            headers, body = self._register(task, origin, version, ip, reach, cid)
            while True:
                registration = Registration.ask(node, headers, body)
                if registration.version or stopped() or time.monotonic() > deadline:
                    break  # else its origin has not answered yet
        except NetworkError:
            self._note(node, None)
            raise
        if not registration.native or not registration.version or (version and not same_version(version, registration.version)):
            raise Migrate("sibling %s has another version, or none" % str(node))
        return SiblingSource(registration, cid, self._bucket, self._log, self._compress)

    def _register(self, task: CdnTask, origin: Origin, version: str, ip: str, reach: str, cid: str) -> Tuple[List[Tuple[str, str]], Dict[str, Any]]:
        """Return headers and body of a register that shows the origin's credentials as its client would.  Wire: 1.2"""
        import base64
        task_url, md5, identifier = task.names
        headers = [("Content-Type", "application/json"), ("User-Agent", "dfly/" + VERSION), (DFLY_HEADER, "1 " + self._label),
                   (SIBLING_HEADER, re.sub("[^ -~\xa0-\xff]", "", version))]
        body = {"superNodeIp": reach, "rawUrl": origin.url, "taskUrl": task_url, "cid": cid, "ip": ip, "hostName": socket.gethostname(), "port": self._port,
                "path": task.piece_path, "version": VERSION, "callSystem": "supernode", "md5": md5, "identifier": identifier,
                "headers": ["%s: %s" % pair for pair in origin.headers.items()], "insecure": origin.insecure,
                "rootCAs": [base64.b64encode(text.encode()).decode() for text in origin.cacerts]}  # type: Dict[str, Any]
        return headers, {name: value for name, value in body.items() if value}


class SiblingSource(Sibling):
    """A sibling that has taken us in."""

    def __init__(self, registration: Registration, cid: str, bucket: TokenBucket, log: Log, compress: bool) -> None:
        self._registration, self._cid = registration, cid
        self._bucket, self._log, self._compress = bucket, log, compress
        self.version, self.length, self.piece_size = registration.version, registration.length, registration.piece_size
        self.caching = self._caching(registration.caching)

    @staticmethod
    def _caching(said: Any) -> Optional[Caching]:
        try:
            lifetime, explicit, keep, must = said
            return Caching(min(max(0.0, float(lifetime)), 1e9), bool(explicit), bool(keep), bool(must))
        except (TypeError, ValueError):
            return None

    def fill(self, store: TaskFile, on_piece: Callable[[int, int], None], on_length: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Take part in its swarm until every piece is here.  Raises NetworkError, Migrate, Stalled, NoSpace, CannotWrite."""
        if self._registration.whole is not None:
            on_piece(0, self._registration.fill(store))
            return
        fetchers = Fetchers(store, self._bucket, [], FETCHERS, self._log, self._compress)
        line = SyncLine(self._registration, self._cid, fetchers, store)
        measured, silence = store.layout.length, Silence(self._registration.node)
        try:
            while not store.complete:
                if stopped():
                    raise Stalled("stopped")
                outcomes = fetchers.drain()
                if store.layout.length != measured:
                    measured = store.layout.length
                    on_length()
                self._tell(outcomes, on_piece)
                silence.check(fetchers.received)
                line.step(outcomes, 0.5)
            if store.layout.length != measured:
                on_length()
            self._tell(list(fetchers.outcomes), on_piece)
        finally:
            line.close()
            fetchers.stop()

    @staticmethod
    def _tell(outcomes: List[Outcome], on_piece: Callable[[int, int], None]) -> None:
        """Announce the pieces that have come.  Raises NoSpace, CannotWrite where they can't be written."""
        for outcome in outcomes:
            if isinstance(outcome.error, (NoSpace, CannotWrite)):
                raise outcome.error
            if not outcome.error and outcome.length:
                on_piece(outcome.order.num, outcome.length)


class Silence:
    """How long nothing has come through a supernode, and whether it is there at all meanwhile."""

    SILENCE_S = 3.0  # without a byte, before it is asked that,
    MOST_S = Origin.TIMEOUT_S  # and before it does not matter: its origin may be as silent

    def __init__(self, node: Node) -> None:
        self._node = node
        self._received, self._since, self._asked_at = -1, 0.0, 0.0

    def check(self, received: int) -> None:
        """Note how many bytes have come.  Raises NetworkError, Stalled when no more are to be expected."""
        now = time.monotonic()
        if received != self._received:
            self._received, self._since = received, now
        if now < max(self._since, self._asked_at) + self.SILENCE_S:
            return
        if now > self._since + self.MOST_S:
            raise Stalled("supernode %s: not a byte within %g s" % (str(self._node), self.MOST_S))
        pool = Pool(1.0, 1.0)
        try:
            pool.ask(self._node.host, self._node.port, "GET", "/_ping")
        finally:
            pool.close()
        self._asked_at = time.monotonic()


# ==============================================================================
# 24. Daemon's door
#    Where a host's container engines knock: an idle connection costs a place in a
#    selector; a request that runs has a thread, which reads its body itself.
# ==============================================================================

DAEMON_PORT = 65001
CLIENT_S = 60.0  # without a client taking, or sending, a byte
TUNNEL_S = 600.0  # without a byte through a tunnel, either way
ABANDON_S = 30.0  # how long a download goes on that nobody waits for
PROVEN_S = 300.0  # how long credentials that the registry has taken for a blob are good for it
LEFTOVER_S = 3600.0  # how long half a blob may wait for another request.  Wire: 11.4

#: What belongs to one connection and not to the request on it (RFC 7230, 6.1).
_HOP = frozenset("connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split())
#: What a download must not show the origin in addition: it asks for the whole file, as it is.  Wire: 11.2
_OURS = frozenset("host range accept-encoding content-length expect".split())
_OPEN_RANGE = re.compile(r"^bytes=(\d{1,18})-$")
_BY_URL, _BY_DIGEST = re.compile(r"^[0-9a-f]{64}$"), re.compile(r"^sha256-[0-9a-f]{64}$")  # names of whole files
SILENT_S = 20.0  # how long a supernode that has not answered is not asked again
SIZES = 10000  # blobs whose size is remembered
_MANIFEST = re.compile(r"^application/vnd\.(docker\.distribution|oci\.image)\.manifest\.")
_TOKEN = re.compile(r"[?&](service|scope)=")


class BadSetting(BadUsage):
    """A flag of the daemon that can't be used; `daemon_exit` is the status with which dfdaemon 1.0 ends.  Wire: 11.4"""

    def __init__(self, message: str, daemon_exit: int) -> None:
        super().__init__(message)
        self.daemon_exit = daemon_exit


def _words(text: str, form: str, allowed: Set[str]) -> Tuple[str, Dict[str, str]]:
    """Return the first word of a setting, and the others as {name: value}; `form` says how it is written.  Raises BadSetting."""
    first, *words = text.split() or [""]
    known = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if not first or set(known) - allowed:
        raise BadSetting("can't be read: %r (write %s)" % (text, form), 10)
    return first, known


def _pattern(text: str) -> Any:
    """Return a regular expression of a setting.  Raises BadSetting."""
    try:
        return re.compile(text)
    except re.error as error:
        raise BadSetting("not a regular expression: %r: %s" % (text, error), 10)


class Rule(NamedTuple):
    """What becomes of a proxied URL that `pattern` is found in.  Wire: 11.3"""

    pattern: Any
    direct: bool = False  # not by the swarm
    use_https: bool = False  # the engine speaks plain HTTP, the registry TLS
    redirect: str = ""  # the host to ask instead

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Return the rule `REGEX [direct] [use_https] [redirect=HOST]`.  Raises BadSetting."""
        pattern, known = _words(text, "REGEX [direct] [use_https] [redirect=HOST]", {"direct", "use_https", "redirect"})
        return cls(_pattern(pattern), "direct" in known, "use_https" in known, known.get("redirect", ""))

    def apply(self, url: str) -> str:
        """Return what is asked instead of `url`."""
        parts = urlsplit(url)
        return url.replace("%s://%s" % (parts.scheme, parts.netloc),
                           "%s://%s" % ("https" if self.use_https else parts.scheme, self.redirect or parts.netloc), 1)


class Registry(NamedTuple):
    """A registry whose mirror this is: its name as `?ns=` has it ("": the one without), where it is, and whom to trust there."""

    name: str
    url: str
    insecure: bool = False
    cacerts: Tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Registry":
        """Return the registry `NAME=URL [insecure] [cacerts=FILE,…]`.  Raises BadSetting."""
        where, known = _words(text, "NAME=URL [insecure] [cacerts=FILE,…]", {"insecure", "cacerts"})
        name, _, url = where.partition("=")
        if not name or not re.match(r"^https?://[^/?#\s]+", url, re.I):
            raise BadSetting("not a mirror: %r (write NAME=URL [insecure] [cacerts=FILE,…])" % text, 10)
        return cls(name, url.rstrip("/"), "insecure" in known, tuple(filter(None, known.get("cacerts", "").split(","))))


class Once:
    """Questions that several ask at the same time, asked once.  _lock guards _asked."""

    WAIT_S = 30.0  # for whoever asks first

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = {}  # type: Dict[Any, Tuple[threading.Event, List[Any]]]

    def ask(self, key: Any, question: Callable[[], Any]) -> Any:
        """Return what `question` returns to the first who asks with this key, also to those who do so meanwhile; to these None when
        it raises."""
        with self._lock:
            others = self._asked.get(key)
            if not others:
                mine = self._asked[key] = (threading.Event(), [])
        if others:
            others[0].wait(self.WAIT_S)
            return others[1][0] if others[1] else None
        try:
            mine[1].append(question())
            return mine[1][0]
        finally:
            with self._lock:
                del self._asked[key]
            mine[0].set()


class Opened(NamedTuple):
    """The sites (`host:port`, by a pattern) whose tunnels are opened, and whom to trust there.  Wire: 11.3"""

    pattern: Any
    insecure: bool = False
    cacerts: Tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Opened":
        """Return the sites `REGEX [insecure] [cacerts=FILE,…]`.  Raises BadSetting."""
        pattern, known = _words(text, "REGEX [insecure] [cacerts=FILE,…]", {"insecure", "cacerts"})
        return cls(_pattern(pattern), "insecure" in known, tuple(filter(None, known.get("cacerts", "").split(","))))


class Authority:
    """The CA by whose word the daemon speaks as other hosts: a certificate for each, made by the `openssl` program when it is first
    needed, good for RENEW_S and kept in `folder`.  A certificate that is no CA's is shown as it is, for every host.

    _lock guards _contexts.
    """

    DAYS, RENEW_S, CA_DAYS = 90, 60 * 86400.0, 3650
    EXTENSIONS = "[req]\ndistinguished_name = dn\n[dn]\n[ext]\n"

    def __init__(self, cert: str, key: str, folder: str) -> None:
        self._cert, self._key, self._folder = cert, key, make_folder(folder)
        self._lock = threading.Lock()
        self._making = Once()
        self._contexts = {}  # type: Dict[str, Tuple[float, Any]]  # by host: when it was made (wall clock), and the context
        self._tls(cert, key)
        self._is_ca = b"CA:TRUE" in self.openssl("x509", "-in", cert, "-noout", "-text")

    @staticmethod
    def openssl(*arguments: str) -> bytes:
        """Return what the openssl program says.  Raises BadUsage when it fails or is not there."""
        import subprocess
        try:
            done = subprocess.run(("openssl",) + arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
        except FileNotFoundError:
            raise BadUsage("there is no openssl program here, which makes certificates: make them elsewhere")
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BadUsage("openssl: %s" % error)
        if done.returncode:
            raise BadUsage("openssl %s: %s" % (arguments[0], " ".join(done.stderr.decode("utf-8", "replace").split())[:300]))
        return done.stdout

    @classmethod
    def make_key(cls, path: str) -> None:
        """Write a new private key that nobody else may read."""
        write_whole(path, b"")
        os.chmod(path, 0o600)
        with open(path, "r+b") as file:
            file.write(cls.openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout"))

    @classmethod
    def make_ca(cls, cert: str, key: str) -> None:
        """Write a new CA's certificate and key, good for ten years.  Raises BadUsage, NoSpace, CannotWrite."""
        cls.make_key(key)
        config = cert + ".cnf"
        write_whole(config, (cls.EXTENSIONS + "basicConstraints = critical,CA:TRUE,pathlen:0\nkeyUsage = critical,keyCertSign,cRLSign\n"
                             "subjectKeyIdentifier = hash\n").encode())
        try:
            name = re.sub(r"[^\w.-]", "-", socket.gethostname())[:40]
            write_whole(cert, cls.openssl("req", "-x509", "-new", "-key", key, "-sha256", "-days", str(cls.CA_DAYS), "-set_serial",
                                          "0x" + os.urandom(8).hex(), "-subj", "/CN=dfly of " + name, "-config", config, "-extensions", "ext"))
        finally:
            remove(config)

    def context(self, host: str) -> Any:
        """Return the TLS context of a server that is `host`.  Raises BadGateway."""
        with self._lock:
            made, context = self._contexts.get(host, (0.0, None))
        if not context or time.time() > made + self.RENEW_S:
            context = self._making.ask(host, lambda: self._context(host))
            if not context:
                raise BadGateway("there is no certificate for %.100s" % host)
        return context

    def _context(self, host: str) -> Any:
        try:
            cert, key, made = (self._leaf(host) if self._is_ca else (self._cert, self._key, time.time()))
            context = self._tls(cert, key)
        except BadUsage as error:
            raise BadGateway("no certificate for %.100s: %s" % (host, error))
        context.set_alpn_protocols(["http/1.1"])
        with self._lock:
            self._contexts[host] = (made, context)
        return context

    @staticmethod
    def _tls(cert: str, key: str) -> Any:
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if hasattr(ssl, "PROTOCOL_TLS_SERVER") else ssl.PROTOCOL_TLS)
        try:
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise BadUsage("certificate %s and key %s: %s" % (cert, key, getattr(error, "reason", "") or error.strerror or error))
        return context

    def _leaf(self, host: str) -> Tuple[str, str, float]:
        """Return certificate, key and when it was made, of a host; made unless one is there that is young and of this CA."""
        key, cert = os.path.join(self._folder, "leaf.key"), os.path.join(self._folder, hashlib.sha256(host.encode()).hexdigest()[:32] + ".pem")
        with open(self._cert, "rb") as file:
            chain = file.read()
        try:
            made = os.stat(cert).st_mtime
            with open(cert, "rb") as file:
                if file.read().endswith(chain) and time.time() < made + self.RENEW_S and os.path.exists(key):
                    return cert, key, made
        except FileNotFoundError:
            pass
        if not os.path.exists(key):
            self._making.ask("", lambda: self.make_key(key) or True)
        write_whole(cert, self._signed(host, key, cert) + chain)
        return cert, key, time.time()

    def _signed(self, host: str, key: str, path: str) -> bytes:
        """Return a new certificate of a host."""
        kind = "IP" if re.match(r"^[\d.]+$|:", host) else "DNS"
        write_whole(path + ".cnf", (self.EXTENSIONS + "subjectAltName = %s:%s\nextendedKeyUsage = serverAuth\nbasicConstraints = critical,CA:FALSE\n" % (
            kind, host)).encode())
        try:
            write_whole(path + ".csr", self.openssl("req", "-new", "-key", key, "-sha256", "-subj", "/CN=" + host[:64], "-config", path + ".cnf"))
            return self.openssl("x509", "-req", "-in", path + ".csr", "-CA", self._cert, "-CAkey", self._key, "-set_serial", "0x" + os.urandom(8).hex(),
                                "-days", str(self.DAYS), "-sha256", "-extfile", path + ".cnf", "-extensions", "ext")
        finally:
            remove(path + ".cnf")
            remove(path + ".csr")


class Caller:
    """A client whose request a thread has in hand: what it asks, its body as far as unread, and the way back to it."""

    def __init__(self, link: _Link, request: Request, modern: bool, ahead: bytes, door: "Doorway") -> None:
        self.request, self.door = request, door
        self.site = link.site  # where it is, inside a tunnel
        self._modern = modern  # it knows chunks
        self.keep = link.keep  # another request may follow
        self.line = HttpLink(request.client, 0, CLIENT_S, sock=link.sock, ahead=ahead)
        self.chunked = "chunked" in request.headers.get("transfer-encoding", "").lower()
        self.length = None if self.chunked else Server._body_length(request.headers)  # of the body
        if self.length is not None and self.length < 0:
            raise BadRequest("Transfer-Encoding: %.60r is not known here" % request.headers["transfer-encoding"])
        self.unread = self.has_body = self.length != 0
        self.started = False  # the answer's head is on its way
        self.moved = 0  # bytes, either way
        self._chunks = False  # the answer goes out in chunks

    def body(self) -> Iterator[bytes]:
        """Yield the request's body.  Raises NetworkError, TimedOut, BadRequest."""
        if self.request.headers.get("expect", "").lower() == "100-continue":
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        left = self.length or 0
        while self.unread:
            if self.chunked and not left:
                left = self._chunk_size()
                if not left:
                    break
            data = self.line.read_exactly(min(left, 65536))
            left -= len(data)
            self.moved += len(data)
            yield data
            if self.chunked and not left:
                self.line.read_line()
            self.unread = self.chunked or left > 0
        self.unread = False

    def _chunk_size(self) -> int:
        """Return the bytes in the next chunk; at the last one read what follows it."""
        text = self.line.read_line().split(b";")[0].strip()
        if not re.match(br"^[0-9a-fA-F]{1,15}$", text):
            raise BadRequest("not a chunk: %.40r" % text)
        size = int(text, 16)
        while not size and self.line.read_line():
            pass
        return size

    def answer(self, status: int, reason: str, headers: List[Tuple[str, str]], length: Optional[int]) -> None:
        """Send an answer's head; its body of `length` bytes (None: as many as come) follows by `send`.  Raises NetworkError."""
        bodiless = self.request.method == "HEAD" or status in (204, 304)
        lines = ["HTTP/1.1 %d %s" % (status, reason or PHRASES.get(status, ""))] + ["%s: %s" % pair for pair in headers]
        self.keep = self.keep and not self.unread
        if length is not None:
            lines.append("Content-Length: %d" % length)
        elif not bodiless and self._modern:
            self._chunks = True
            lines.append("Transfer-Encoding: chunked")
        else:
            self.keep = self.keep and bodiless
        if not self.keep:
            lines.append("Connection: close")
        self.started = True
        self._send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace"))

    def send(self, data: Any) -> None:
        """Send some of the answer's body.  Raises NetworkError."""
        self._send(b"%x\r\n%s\r\n" % (len(data), data) if self._chunks else data)

    def send_file(self, fd: int, start: int, end: int) -> None:
        """Send bytes [start, end) of a file.  Raises NetworkError."""
        while start < end:
            try:
                count = os.sendfile(self.line.sock.fileno(), fd, start, min(end - start, 1 << 20))
            except OSError as error:
                raise NetworkError("%s takes no more: %s" % (self.request.client, error.strerror))
            if not count:
                raise NetworkError("the file is shorter than it was")
            start += count
            self.moved += count

    def end(self) -> None:
        """The answer's body has been sent."""
        if self._chunks:
            self._send(b"0\r\n\r\n")

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error in a registry's own form, which engines show to their users; or hang up in an answer's middle."""
        body = _to_json({"errors": [{"code": "UNAVAILABLE" if status >= 500 else "UNSUPPORTED", "message": message}]}).encode()
        try:
            if self.started:
                raise NetworkError(message)
            self.answer(status, "", [("Content-Type", "application/json")], len(body))
            self.send(b"" if self.request.method == "HEAD" else body)
        except NetworkError:
            self.keep = False

    def _send(self, data: Any) -> None:
        try:
            self.line.sock.sendall(data)
        except OSError as error:
            raise NetworkError("%s takes no more: %s" % (self.request.client, error.strerror or error))
        self.moved += len(data)

    def gone(self) -> bool:
        """Return whether the client has hung up."""
        try:
            return not self.line.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


class Doorway(Server):
    """A Server that gives each request but those of its routes to a thread, body unread, and takes the connection back after it.

    The application's `handle` takes a Caller.  _handed belongs to the server's thread.
    """

    MOST = 256  # requests at once
    FINISH_S, STILL_S = 8.0, 0.5  # how long requests may go on at the end, and how long without a byte of any of them

    def __init__(self, sock: socket.socket, application: Any, log: Log) -> None:
        super().__init__(sock, application.ROUTES, application, log, "daemon")
        self._handed = {}  # type: Dict[_Link, Tuple[threading.Thread, Caller]]
        self._retired = False  # there will be no other requests

    def _begin(self, link: _Link, line: Any, headers: Dict[str, str], begin: int) -> None:
        method, target, version = line.groups()
        if not link.site and (method, target.partition("?")[0]) in self._routes:
            return super()._begin(link, line, headers, begin)
        if len(self._handed) >= self.MOST:
            return self._refuse(link, 503, "%d requests are under way already" % self.MOST)
        request = Request(method, target, headers, b"", link.client, link.server)
        caller = Caller(link, request, version != "0", bytes(link.input[begin:]), self)
        del link.input[:]
        self._watch(link, 0)
        link.state = _Link.WORKING
        thread = threading.Thread(target=self._lend, args=(link, caller), name="dfly-client", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more
            link.sock.setblocking(False)
            return self._refuse(link, 503, "there is no thread left for this request")
        self._handed[link] = thread, caller
        return None

    def enter(self, sock: socket.socket, client: str, site: str) -> None:
        """Take a connection on which the client at an address asks for paths of `site`."""
        self.post(lambda: self._adopt(sock, client, site))

    def _lend(self, link: _Link, caller: Caller) -> None:
        """The life of a request's thread."""
        request = caller.request
        try:
            self._app.handle(caller)
        except DflyError as error:
            self._log.warn("%s %s from %s: %s", request.method, bare(request.target), request.client, error)
            caller.refuse(error.http, str(error))
        except Exception as error:  # noqa: BLE001 a fault of ours: the client gets no traceback, the log does
            import traceback
            self._log.error("%s %s: %s", request.method, bare(request.target), traceback.format_exc())
            caller.refuse(500, "internal error: %s" % type(error).__name__)
        if self._stopping:
            link.sock.close()
        else:
            self.post(lambda: self._take_back(link, caller))

    def _take_back(self, link: _Link, caller: Caller) -> None:
        del self._handed[link]
        link.keep = caller.keep and not caller.unread and not link.closing
        if not link.keep or self._stopping or self._retired:
            return self._close(link)
        link.sock.setblocking(False)
        link.input += caller.line.rest()
        self._set(link, _Link.IDLE, self.IDLE_S)
        self._watch(link, selectors.EVENT_READ)
        return self._parse(link) if link.input else None

    def _close(self, link: _Link) -> None:
        if link in self._handed:  # the socket is its thread's: only wake that
            try:
                link.sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # the client was faster
                pass
            return
        super()._close(link)

    def retire(self) -> None:
        """Let nobody in any more, so that engines ask elsewhere, and let the requests that are under way come to their end while they move."""
        self.post(self._retire)
        now = moved_at = time.monotonic()
        deadline, before = now + self.FINISH_S, -1
        while now < min(deadline, moved_at + self.STILL_S) and (self._handed or not self._retired):
            moved = sum(caller.moved for _, caller in list(self._handed.values()))
            if moved != before:
                before, moved_at = moved, now
            time.sleep(0.05)
            now = time.monotonic()

    def _retire(self) -> None:
        self._retired = True
        if self._sock.fileno() in self._selector.get_map():
            self._selector.unregister(self._sock)
        self._sock.close()
        for link in [link for link in self._links if link.state == _Link.IDLE]:
            self._close(link)

    def stop(self, limit_s: float = 1.0) -> None:
        """End the thread, and within `limit_s` more all requests."""
        super().stop(limit_s)
        deadline = time.monotonic() + limit_s
        for thread, _ in list(self._handed.values()):
            thread.join(max(0.0, deadline - time.monotonic()))


# ==============================================================================
# 25. Blobs
#    What the daemon has of files from the swarm: one download each, and everybody who
#    reads along.
# ==============================================================================

class Blob(ReadAlong):
    """A file on its way from the swarm: one download, and the clients that read along.  Its Blobs guards what it has of its own."""

    def __init__(self, url: str, digest: str, path: str) -> None:
        super().__init__(digest and "sha256:" + digest or url.partition("?")[0], digest)  # a query may have a signature in it
        self.url, self.path = url, path  # as its first client asked for it; where it will be
        self.users = 0  # clients
        self.began = self.used_at = time.monotonic()
        self._proven = {}  # type: Dict[str, float]  # fingerprints of credentials, and until when they are good
        self.unwanted = False  # nobody waits for it: the download shall end
        self.begins = threading.Event()  # its first client knows whether he may have it: the download may begin
        self.settled = threading.Event()  # its threads have ended

    @property
    def ended(self) -> bool:
        """Return whether its threads have."""
        return self.settled.is_set()

    def may_have(self, credentials: str) -> bool:
        """Return whether the registry has taken these credentials for it of late."""
        with self._changed:
            return self._proven.get(credentials, 0.0) >= time.monotonic()

    def prove(self, credentials: str) -> None:
        """The registry has taken these credentials for it."""
        now = time.monotonic()
        with self._changed:
            self._proven = {known: until for known, until in self._proven.items() if until >= now}  # each pull may have a token of its own
            self._proven[credentials] = now + PROVEN_S

    def close(self, keep: bool = False) -> None:
        """Give back its descriptors, and its place on the disk unless somebody could know it again."""
        super().close()
        if not (keep and self.digest):
            remove(self.path)


class Wanted(NamedTuple):
    """A file that a client wants, and that may come by the swarm."""

    origin: Origin
    digest: str  # SHA-256; "" where the URL does not say it
    headers: List[Tuple[str, str]]  # as they go to the origin
    ranged: bool
    at: int  # the first byte that is wanted; all from there on are

    @property
    def url(self) -> str:
        """Where it is."""
        return self.origin.url


class Opening:
    """The first bytes of a blob that is not here yet, straight from its registry: that it gives them says that this client may
    have the blob, and they are on their way to him while the swarm begins.  Used by one thread.

    Whoever sends them on compares them with what the swarm brings, before anything of that follows.
    """

    SIZE = 1 << 14

    def __init__(self, answer: Any, body: Iterator[Any]) -> None:
        self._body = body
        self.status = answer.status
        self.data = b""  # as far as it has come
        found = re.match(r"^bytes 0-(\d{1,18})/(\d{1,18})$", answer.getheader("Content-Range", "")) if self.status == 206 else None
        plain = answer.getheader("Content-Encoding", "identity") == "identity"
        self.length = int(found.group(2)) if found and int(found.group(1)) < self.SIZE else answer.length if self.status == 200 else None
        self.length = self.length if plain else None  # of the blob; None: not known, and the bytes are of no use

    def come(self) -> Iterator[bytes]:
        """Yield the bytes as they come; that the registry hangs up is only their end."""
        try:
            for data in self._body:
                data = bytes(data[:self.SIZE - len(self.data)])
                self.data += data
                yield data
                if self.status == 200 and len(self.data) == self.SIZE:  # it knows no ranges, and would go on
                    break
        except (NetworkError, BadGateway):
            pass


class Leftover:
    """A blob that an earlier run has left, with as much of a TaskFile as ReadAlong wants.  Raises OSError."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        self._span = FileSpan(fd, 0, os.fstat(fd).st_size)
        self.layout = Layout(self._span.count, MAX_PIECE)
        assert self.layout.count is not None
        self.have = (1 << self.layout.count) - 1
        self.about = {}  # type: Dict[str, str]

    def plain_body(self, _start: int, _end: int) -> List[FileSpan]:
        """Return the descriptor, which is the caller's from now on."""
        return [self._span]


class BlobDownload(Download):
    """A download for a Blob: others read along, and it ends when nobody wants it any more."""

    LOST_S = (5.0, 5.0)  # with --notbs too: the daemon itself can ask the registry for the rest

    def __init__(self, options: Any, out: Any, blob: Blob, uploader: Callable[[], int], silent: Dict[Node, float]) -> None:
        super().__init__(options, out, content=blob.digest and "sha256:" + blob.digest)
        self._blob, self._find_uploader = blob, uploader
        self._silent = silent  # supernodes that did not answer, and until when they are not asked again
        self._look_at, self._seen = self._clock() + options.patience, 0  # when to see whether it comes fast enough; bytes until then

    def _register(self, node: Node) -> Registration:
        if self._silent.get(node, 0.0) > self._clock() and not self._served:
            raise NetworkError("supernode %s has just not answered" % str(node))
        try:
            return super()._register(node)
        except NetworkError:
            self._silent[node] = self._clock() + SILENT_S
            raise

    def _start_uploader(self) -> int:
        return self._find_uploader()

    def _open_store(self, length: Optional[int], size: int, version: str) -> None:
        super()._open_store(length, size, version)
        assert self.store
        self._blob.follow(self.store)

    def _watch(self, line: Any, fetchers: Fetchers, outcomes: List[Outcome]) -> None:
        super()._watch(line, fetchers, outcomes)
        self._still_wanted()
        patience, now = self.options.patience, self._clock()
        if now >= self._look_at:
            if fetchers.received - self._seen < self.options.minrate * patience and self.store and not self.store.complete:
                raise Stalled("the swarm brings less than %s/s" % show_size(self.options.minrate))
            self._look_at, self._seen = now + patience, fetchers.received

    def _from_source(self) -> None:
        self._still_wanted()
        super()._from_source()

    def _late(self) -> bool:
        return self._blob.unwanted or super()._late()

    def _still_wanted(self) -> None:
        if self._blob.unwanted or self._blob.error:
            raise Stalled("nobody waits for it any more")


class Blobs:
    """The blobs that are under way, or were a little while ago, by digest (those without one, by URL).

    _lock guards _blobs, _bad, recent, sources and the blobs' users.
    """

    MOST = 32  # downloads at once
    HEAD_START_S = 0.01  # how long a download waits for a registry to answer the blob's first client: a near one has by then

    def __init__(self, repo: str, log: Log, options_for: Callable[[str], Any], keep_s: float, uploader: Callable[[], int]) -> None:
        self.repo, self.log = repo, log
        self._options_for = options_for  # makes the flags of `get` for a URL
        self._keep_s = keep_s  # how long a blob stays after its last use
        self._uploader = uploader
        self._lock = threading.Lock()
        self._blobs = {}  # type: Dict[str, Blob]
        self._bad = {}  # type: Dict[str, float]  # those that the swarm gives wrong, or that don't fit, and until when that counts
        self._silent = {}  # type: Dict[Node, float]
        self._swept_at = 0.0
        self.recent = collections.deque(maxlen=50)  # type: collections.deque  # what has become of the last ones
        self.sources = collections.Counter()  # type: Dict[str, int]  # bytes by kind of holder
        for name in os.listdir(repo):
            if _BY_URL.match(name):  # nobody knows any more what is in it
                remove(os.path.join(repo, name))

    def join(self, url: str, digest: str, headers: List[Tuple[str, str]], credentials: str, head_start: bool) -> Optional[Blob]:
        """Return the blob at `url`, on its way from now on; None when it had better be asked of its origin.  End with `leave`.

        With `head_start` a new one waits a moment for its client, who asks the registry himself, and sets `begins`.
        """
        now, key = time.monotonic(), digest or url
        with self._lock:
            ending = self._blobs.get(key)
        if ending and (ending.error or ending.unwanted):
            ending.settled.wait(1.0)  # those who waited for it know before its file is free
        with self._lock:
            blob = self._blobs.get(key)
            if blob and (blob.error or blob.unwanted or (blob.ended and not digest)):
                blob = None  # a new one, as soon as the old one's file is free
                if not self._drop_locked(key):
                    return None
            if not blob:
                if self._bad.get(key, 0.0) > now or sum(not other.ended for other in self._blobs.values()) >= self.MOST:
                    return None
                name = "sha256-" + digest if digest else hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
                blob = Blob(url, digest, os.path.join(self.repo, name))
                left = bool(digest) and os.path.exists(blob.path)
                if not (left or head_start):  # the download itself asks the origin
                    blob.prove(credentials)
                if left or not head_start:
                    blob.begins.set()
                threading.Thread(target=self._run, args=(blob, headers, left), name="dfly-blob", daemon=True).start()
                self._blobs[key] = blob
            blob.users += 1
            return blob

    def leave(self, blob: Blob) -> None:
        """A client of a blob has ended."""
        with self._lock:
            blob.users -= 1
            blob.used_at = time.monotonic()
            blob.unwanted = blob.unwanted or not (blob.users or blob.begins.is_set())  # he may not have it, or has all
        blob.begins.set()

    def _drop_locked(self, key: str) -> bool:
        """Forget a blob that nobody uses; return whether nobody does."""
        blob = self._blobs[key]
        if blob.users or not blob.ended:
            return False
        blob.close()
        del self._blobs[key]
        return True

    def _run(self, blob: Blob, headers: List[Tuple[str, str]], left: bool) -> None:
        """The life of a download's thread; of what is `left` of an earlier run there is nothing to download."""
        blob.begins.wait(self.HEAD_START_S)
        digester = threading.Thread(target=blob.digest_along, name="dfly-digest", daemon=True)
        digester.start()
        try:
            if left:
                blob.follow(Leftover(blob.path))
            elif blob.unwanted:
                blob.fail(Stalled("nobody waits for it"))
            else:
                self._download(blob, headers)
            digester.join(None if left else blob.PROGRESS_S)
            blob.fail(Stalled("%s: can't be read back" % blob.name))  # changes nothing when all of it was
        except OSError as error:
            blob.fail(CannotRead("%s: %s" % (blob.path, error.strerror)))
        except FinalFailure as failure:
            blob.fail(failure.cause)
        except DflyError as error:
            blob.fail(error)
        except Exception as error:  # noqa: BLE001 a fault of ours must not leave the clients waiting
            import traceback
            self.log.error("%s: %s", blob.name, traceback.format_exc())
            blob.fail(DflyError("internal error: %r" % error))
        digester.join()
        if blob.error:
            (self.log.debug if blob.unwanted else self.log.warn)("%s: %s", blob.name, blob.error)
            remove(blob.path)
            self._mark_bad(blob, 0.0 if left else 600.0)
        blob.settled.set()

    def _download(self, blob: Blob, headers: List[Tuple[str, str]]) -> None:
        """Have a blob fetched, and note how that went.  Raises FinalFailure, DflyError."""
        import io
        options = self._options_for(blob.url)
        options.output = blob.path
        options.header = options.header + ["%s: %s" % pair for pair in headers]
        download = BlobDownload(options, io.StringIO(), blob, self._uploader, self._silent)
        error = "it has ended early"
        try:
            download.run()
            error = ""
        except DflyError as failure:
            error = str(failure)
            raise
        finally:
            self._note(blob, download, error)

    def _note(self, blob: Blob, download: BlobDownload, error: str) -> None:
        seconds = time.monotonic() - blob.began
        sources = {kind: count for kind, count in download.bytes.items() if count}
        count = sum(sources.values())
        self.log.info("blob %s %s in %.2f s, %s/s, from: %s%s", blob.name, show_size(count), seconds, show_size(count / max(seconds, 1e-3)),
                      show_shares(sources), error and "; " + error)
        with self._lock:
            self.sources.update(sources)
            for kind, size in sources.items():
                METRICS.add("dfly_daemon_received_bytes_total", size, source=kind)
            self.recent.append({"blob": blob.name, "at": round(time.time(), 3), "bytes": count, "seconds": round(seconds, 3),
                                "sources": sources, "kept": download.kept, "error": error})

    def _mark_bad(self, blob: Blob, wrong_s: float) -> None:
        """After wrong bytes (for `wrong_s`), or on a full disk, let the blob's next clients ask its origin."""
        seconds = wrong_s if isinstance(blob.error, WrongBytes) else 30.0 if isinstance(blob.error, (NoSpace, CannotWrite)) else 0.0
        with self._lock:
            if seconds:
                self._bad[blob.digest or blob.url] = time.monotonic() + seconds
            for key in [key for key in self._blobs if isinstance(blob.error, NoSpace)]:
                self._drop_locked(key)

    def tick(self) -> None:
        """Twice a second or so: let go of what has expired, and end what nobody waits for."""
        now = time.monotonic()
        with self._lock:
            for key, blob in list(self._blobs.items()):
                if not blob.ended and not blob.users and now > blob.used_at + ABANDON_S:
                    blob.unwanted = True
                if blob.ended and (blob.error or not blob.digest or now > blob.used_at + self._keep_s):
                    self._drop_locked(key)
            self._bad = {key: until for key, until in self._bad.items() if until > now}
        if now > self._swept_at + 60.0:
            self._swept_at = now
            self._sweep()

    def _sweep(self) -> None:
        """Remove blobs of an earlier run, and halves of blobs, that nobody has asked for again.  Wire: 11.4"""
        with self._lock:
            busy = tuple(prefix + os.path.basename(blob.path) for blob in self._blobs.values() for prefix in ("", "."))
        try:
            names = os.listdir(self.repo)
        except OSError:  # whoever wants to write there will say it
            return
        for name in names:
            path, keep_s = os.path.join(self.repo, name), LEFTOVER_S if ".dfly" in name else self._keep_s
            try:
                if (".dfly" in name or _BY_DIGEST.match(name)) and not name.startswith(busy or ("/",)) and time.time() > os.stat(path).st_mtime + keep_s:
                    remove(path)
            except FileNotFoundError:
                pass

    def counts(self) -> Tuple[int, int]:
        """Return how many blobs are under way, and how many are kept."""
        with self._lock:
            running = sum(not blob.ended for blob in self._blobs.values())
            return running, len(self._blobs) - running

    def status(self) -> Dict[str, Any]:
        """Return what is under way, what has become of the last ones, and bytes by source, for JSON."""
        with self._lock:
            running = [dict(blob.progress(), blob=blob.name, seconds=round(time.monotonic() - blob.began, 3), clients=blob.users)
                       for blob in self._blobs.values() if not blob.ended]
            return {"running": running, "recent": list(self.recent), "sources": dict(self.sources),
                    "kept": sum(blob.ended for blob in self._blobs.values())}

    def close(self, limit_s: float = 0.5) -> None:
        """End all downloads, within `limit_s` seconds if they do, and remove what is whole."""
        with self._lock:
            blobs = list(self._blobs.values())
        for blob in blobs:
            blob.unwanted = True
        deadline = time.monotonic() + limit_s
        for blob in blobs:
            blob.settled.wait(max(0.0, deadline - time.monotonic()))
            if blob.ended and not blob.users:
                blob.close(keep=not blob.error)
            elif not blob.digest:
                remove(blob.path)


# ==============================================================================
# 26. Daemon
#    The registry mirror and HTTP proxy: blobs come by the swarm, all else straight
#    from where it is asked of.
# ==============================================================================

class Reception:
    """Where engines learn whom to show their credentials, when the daemon is the mirror of several registries.

    They ask `/v2/` first, which says nothing of the registry that they mean: the answer sends them to us for a token.  There they
    name the repository, and with it the registry, whose own token they get.  To a registry that wants a password, or nothing at
    all, a token of ours stands for that, and is never shown: it exists in the engine only.
    """

    PATH, SERVICE = "/_dfly/token", "dfly"
    NOTHING, PASSWORD = "dfly-nothing", "dfly-password."  # tokens of ours; before the password, as Basic has it

    def __init__(self, registries: List[Registry], upstream: Upstream, fetch_token: Callable[[str, List[Tuple[str, str]]], Any]) -> None:
        self._registries, self._upstream, self._fetch_token = registries, upstream, fetch_token

    def receives(self, caller: Caller, target: str) -> bool:
        """Answer what is for us; return whether it was.  In what goes on turn a token of ours into what it stands for."""
        path, _, query = target.partition("?")
        headers = caller.request.headers
        if path == self.PATH and caller.request.method == "GET":
            self._give(caller, parse_qsl(query), headers.get("authorization", ""))
        elif path in ("/v2", "/v2/") and caller.request.method in ("GET", "HEAD"):
            self._greet(caller)
        else:
            token = headers.get("authorization", "").partition(" ")[2]
            if token == self.NOTHING:
                del headers["authorization"]
            elif token.startswith(self.PASSWORD):
                headers["authorization"] = "Basic " + token[len(self.PASSWORD):]
            return False
        return True

    def _greet(self, caller: Caller) -> None:
        """Answer an engine's first question: it shall fetch a token."""
        headers = [("Content-Type", "application/json"), ("Docker-Distribution-Api-Version", "registry/2.0")]
        host, known = caller.request.headers.get("host", ""), "authorization" in caller.request.headers
        if not re.match(r"^[\w.:\[\]-]+$", host, re.ASCII):
            raise BadRequest("not a Host: %.100r" % host)
        if not known:
            headers.append(("WWW-Authenticate", 'Bearer realm="http://%s%s",service="%s"' % (host, self.PATH, self.SERVICE)))
        body = b"{}" if known else b'{"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}'
        caller.answer(200 if known else 401, "", headers, len(body))
        caller.send(b"" if caller.request.method == "HEAD" else body)

    def _give(self, caller: Caller, query: List[Tuple[str, str]], shown: str) -> None:
        """Answer a request for a token with that of the registry that it means.  Raises BadGateway."""
        registry, scopes = self._meant([scope for name, value in query if name == "scope" for scope in value.split()])
        wanted, said = self._wish(registry) if scopes else ("", {})  # a login names no repository: nothing to show yet
        if wanted == "bearer":
            asked = [("service", said["service"])] * ("service" in said) + [("scope", scope) for scope in scopes]
            asked += [pair for pair in query if pair[0] in ("account", "client_id")]
            realm = said.get("realm", "")
            answer = self._fetch_token(realm + ("&" if "?" in realm else "?") + urlencode(asked), [("authorization", shown)] if shown else [])
            if not answer:
                raise BadGateway("%.200s: gives no token" % realm)
            status, reason, headers, body = answer
        else:
            kind, _, password = shown.partition(" ")
            token = self.PASSWORD + password.strip() if wanted == "basic" and kind.lower() == "basic" else self.NOTHING
            status, reason, headers = 200, "", [("Content-Type", "application/json")]
            body = _to_json({"token": token, "access_token": token, "expires_in": 300}).encode()
        caller.answer(status, reason, headers, len(body))
        caller.send(body)

    def _meant(self, scopes: List[str]) -> Tuple[Registry, List[str]]:
        """Return the registry that the first of these scopes means, and those of them that are of it, as it names them itself."""
        found = []  # type: List[Tuple[Registry, str]]
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, slash, repository = rest.partition("/")
            registry = next((registry for registry in self._registries[1:] if slash and registry.name == name), self._registries[0])
            found.append((registry, "%s:%s" % (kind, repository) if registry.name else scope))
        meant = found[0][0] if found else self._registries[0]
        return meant, [scope for registry, scope in found if registry is meant]

    def _wish(self, registry: Registry) -> Tuple[str, Dict[str, str]]:
        """Return by what scheme ("": none) a registry wants to know who asks, and what else it says of that.  Raises BadGateway."""
        url = registry.url + "/v2/"
        connection, answer = self._upstream.ask("GET", url, [])
        answer.read(65536)
        self._upstream.done(url, connection, answer)
        challenge = answer.getheader("WWW-Authenticate", "") if answer.status == 401 else ""
        scheme, _, rest = challenge.strip().partition(" ")
        return scheme.lower(), dict(re.findall(r'(\w+)="([^"]*)"', rest))


class Daemon:
    """Decides what becomes of a request: a blob by the swarm, all else straight to its origin, or a tunnel.  Wire: 11"""

    ROUTES = (
        Route("GET", "/_dfly/status", "status"),
        Route("GET", "/env", "env"),               # Wire: 11.1
        Route("GET", "/args", "args"),
        Route("GET", "/debug/version", "version"),
        Route("GET", "/metrics", "metrics"),
    )
    COUNTED = ("blobs", "blob_bytes", "fallbacks", "relayed", "tunnels", "opened")
    REST_PAUSES_S = (0.25, 0.5, 1.0, 2.0)  # before a registry that has sent nothing is asked once more for the rest of a blob

    def __init__(self, registries: List[Registry], rules: List[Rule], selected: List[Any], opened: List[Opened], authority: Optional[Authority],
                 small: int, upstream: Upstream, blobs: Blobs, log: Log, settings: Dict[str, Any]) -> None:
        self._registries = registries  # the first one is for requests that name none
        self._rules = rules  # for what is proxied
        self._selected = selected  # patterns of more URLs of the registry that come by the swarm
        self._opened, self._authority = opened, authority  # which tunnels are opened, and by whose word
        self._small = small  # bytes below which a blob is not worth the swarm
        self._upstream, self._blobs, self._log = upstream, blobs, log
        self._settings = settings
        self.port = 0
        self._tokens, self._checks = Once(), Once()
        self._reception = Reception(registries, upstream, self._fetch_token)
        self._lock = threading.Lock()
        self._counts = collections.Counter()  # type: Dict[str, int]
        self._sizes = collections.OrderedDict()  # type: Dict[str, int]  # bytes of blobs, by digest, as manifests have them
        self._rangeless = set()  # type: Set[str]  # sites that have sent all of a blob when asked for a part
        self._since = time.time()

    def serve(self, door: Doorway, ended: threading.Event) -> None:
        """Serve until it is `ended`."""
        self.port = door.address[1]
        door.start()
        mirrored = ", ".join(registry.url for registry in self._registries)
        self._log.info("daemon %s on %s, mirror of %s, %s", VERSION, join_host(door.address[0], self.port), mirrored, accelerator())
        print("dfdaemon listening on %s for %s" % (join_host(door.address[0], self.port), mirrored), flush=True)
        while not ended.wait(0.5):  # a signal that comes just before the wait would else be seen after it
            self._blobs.tick()
        door.retire()
        door.stop(0.5)
        self._blobs.close()
        self._upstream.close()
        self._log.info("daemon ends")

    def handle(self, caller: Caller) -> None:
        """Serve one request.  Raises DflyError, which is answered if nothing has been sent yet."""
        request = caller.request
        try:
            if caller.site:
                self._proxy(caller, caller.site + request.target if request.target.startswith("/") else request.target)
            elif request.method == "CONNECT":
                self._connect(caller)
            elif request.target.startswith("/"):
                self._mirror(caller, request.target)
            elif re.match(r"^https?://[^/?#]+", request.target, re.I):
                self._proxy(caller, request.target)
            else:
                raise BadRequest("neither a path nor an http URL: %.200r" % bare(request.target))
        except BadUsage as error:  # a host that is none
            raise BadRequest("%.200r: %s" % (bare(request.target), error))

    # -- what is asked ------------------------------------------------------------

    def _mirror(self, caller: Caller, target: str) -> None:
        """A path: it is a registry's.  Wire: 11.1"""
        named = re.search(r"[?&]ns=([^&]*)", target)  # containerd says whose mirror it takes us for
        inside = re.match(r"^/v2/([^/?]+)/", target)  # podman is told to say it so
        if not named and len(self._registries) > 1 and self._reception.receives(caller, target):
            return
        if inside and not named and any(registry.name == inside.group(1) for registry in self._registries[1:]):
            registry, target = self._registry(inside.group(1)), "/v2/" + target[inside.end():]
        else:
            registry = self._registry(unquote(named.group(1)) if named else "")
        url = registry.url + re.sub(r"(?<=[?&])ns=[^&]*&?", "", target).rstrip("?&")
        blob = _BLOB.match(url.partition("?")[0])
        swarm = blob or any(pattern.search(url) for pattern in self._selected)
        if not (swarm and self._by_swarm(caller, url, blob.group(1) if blob else "")):
            self._relay(caller, url, registry)

    def _registry(self, name: str) -> Registry:
        """Return the registry of that name, of the settings or else the one that it means.  Raises BadRequest."""
        default = self._registries[0]
        if name in ("", urlsplit(default.url).netloc):
            return default
        known = next((registry for registry in self._registries if registry.name == name), None)
        if not known and not re.match(r"^([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?$", name, re.ASCII):
            raise BadRequest("not a registry: ns=%.100r" % name)
        return known or Registry(name, "https://" + ("registry-1.docker.io" if name == "docker.io" else name))

    def _proxy(self, caller: Caller, url: str) -> None:
        """A whole URL: the first rule that matches decides.  Wire: 11.1"""
        if not re.match(r"^https?://[^/?#]+", url, re.I):
            raise BadRequest("not an http URL: %.200r" % bare(url))
        try:
            host, port = split_host(urlsplit(url).netloc.rpartition("@")[2], 80)
        except ValueError as error:
            raise BadRequest("%.200r: %s" % (bare(url), error))
        user, at, _ = urlsplit(url).netloc.rpartition("@")
        if at:  # from here on it is a header like any other, which is shown to nobody else
            caller.request.headers.setdefault("authorization", request_url(url)[1])
            url = url.replace(user + at, "", 1)
        if port == self.port and host in ("127.0.0.1", "localhost", "::1", caller.request.server):
            parts = urlsplit(url)
            return self._mirror(caller, (parts.path or "/") + ("?" + parts.query if parts.query else ""))
        rule = next((rule for rule in self._rules if rule.pattern.search(url)), None)
        url = rule.apply(url) if rule else url
        blob = _BLOB.match(url.partition("?")[0])
        swarm = not rule.direct if rule else bool(blob and caller.site)  # who has a tunnel opened wants that
        if not (swarm and self._by_swarm(caller, url, blob.group(1) if blob else "")):
            self._relay(caller, url, None)
        return None

    # -- by the swarm ---------------------------------------------------------------

    def _by_swarm(self, caller: Caller, url: str, digest: str) -> bool:
        """Serve a GET from the swarm; return False, with nothing sent, where it had better go to the origin."""
        wanted = self._wanted(caller, url, digest)
        if not wanted:
            return False
        blob = self._blobs.join(url, digest, wanted.headers, wanted.origin.credentials(), self._may_open(wanted))
        if not blob:
            self._count("fallbacks")
            return False
        opened = []  # type: List[Tuple[Opening, Callable[[], None]]]
        try:
            if not self._proven(caller, blob, wanted, opened):
                return False
            if opened and opened[0][0].length is not None:
                self._send_from_opening(caller, blob, wanted, opened[0][0])
            else:
                blob.begins.set()
                self._send_blob(caller, blob, wanted)
        except DflyError as error:
            if caller.started or caller.gone():
                raise
            self._count("fallbacks")
            self._log.warn("%s: %s; straight from its origin", blob.name, error)
            return False
        finally:
            self._blobs.leave(blob)
            for _, close in opened:
                close()
        return True

    def _wanted(self, caller: Caller, url: str, digest: str) -> Optional[Wanted]:
        """Return what a client wants; None where that had better go to the origin."""
        headers = caller.request.headers
        ranged = headers.get("range", "")
        if caller.request.method != "GET" or caller.has_body or any(name.startswith("if-") for name in headers):
            return None
        found = _OPEN_RANGE.match(ranged) if digest else None
        if ranged and not found:
            return None  # a look inside: not worth the whole file
        with self._lock:
            if digest and self._sizes.get(digest, self._small) < self._small:
                return None
        passed = [pair for pair in self._forwarded(headers) if pair[0] not in _OURS]
        return Wanted(Origin(url, passed, *self._upstream.trust(url), content=digest and "sha256:" + digest), digest, passed,
                      bool(found), int(found.group(1)) if found else 0)

    # -- who may, and the first bytes -------------------------------------------------

    def _may_open(self, wanted: Wanted) -> bool:
        """Return whether a blob's first bytes may come straight from its registry, without being as good as all of it."""
        with self._lock:
            return bool(wanted.digest) and not wanted.at and Opening.SIZE < self._sizes.get(wanted.digest, MAX_PIECE) // 2 and (
                urlsplit(wanted.url).netloc not in self._rangeless)

    def _proven(self, caller: Caller, blob: Blob, wanted: Wanted, opened: List[Tuple[Opening, Callable[[], None]]]) -> bool:
        """Return whether its origin gives the blob to this client, too: what is here came on another one's credentials.  Of a
        blob that is not here yet it is asked for the first bytes, which become `opened`, with what ends that.

        Wire: 16 (2)
        """
        credentials = wanted.origin.credentials()

        def question() -> bool:
            if blob.begins.is_set() or not self._may_open(wanted) or urlsplit(wanted.url).netloc != urlsplit(blob.url).netloc:
                return self._ask_whether(caller, blob, wanted.origin, wanted.headers)
            opened.append(self._open_blob(wanted))
            return opened[0][0].status in (200, 206, 416)  # 416: an empty one

        if blob.may_have(credentials):
            return True
        good = bool(self._checks.ask((blob.name, credentials), question))
        if good:
            blob.prove(credentials)
        return good

    def _open_blob(self, wanted: Wanted) -> Tuple[Opening, Callable[[], None]]:
        """Ask a registry for a blob's first bytes; return them, and what to call behind them.  Raises BadGateway."""
        last, connection, answer = self._ask("GET", wanted.url, wanted.headers + [("range", "bytes=0-%d" % (Opening.SIZE - 1))], None, 0, follow=True)
        opening = Opening(answer, self._body(last, answer))
        if answer.status == 200 and (opening.length is None or opening.length > Opening.SIZE):
            with self._lock:
                self._rangeless.add(urlsplit(wanted.url).netloc)
        return opening, functools.partial(self._upstream.done, last, connection, answer)

    def _ask_whether(self, caller: Caller, blob: Blob, origin: Origin, headers: List[Tuple[str, str]]) -> bool:
        """Return whether an origin says that it would give a blob, and shows that it can if the blob came from another.  Raises DflyError."""
        connection, answer = self._upstream.ask("HEAD", origin.url, headers)
        answer.read()
        self._upstream.done(origin.url, connection, answer)
        if answer.status in (405, 501):
            origin.vouch()
        elif answer.status >= 400:
            return False
        if urlsplit(origin.url).netloc != urlsplit(blob.url).netloc:
            blob.length(caller.gone)  # of a blob that has begun there is something to hold it against
            origin.prove(0, blob.progress()["bytes"] or 0, blob.read_at)
        return True

    def _send_from_opening(self, caller: Caller, blob: Blob, wanted: Wanted, opening: Opening) -> None:
        """Send a blob's first bytes as its registry sends them, and then the blob as it comes.  Raises as `_send_blob`."""
        length = opening.length
        assert length is not None
        if length <= Opening.SIZE:  # it has come, and is no matter for the swarm
            digest = hashlib.sha256(b"".join(opening.come())).hexdigest()
            if digest != wanted.digest:
                raise WrongBytes(blob.name, wanted.digest, digest)
            self._answer_blob(caller, blob, wanted, length)
            caller.send(opening.data)
            return self._count("blob_bytes", length)
        self._answer_blob(caller, blob, wanted, length)
        for data in opening.come():
            caller.send(data)
        blob.begins.set()
        self._count("blob_bytes", len(opening.data))
        return self._send_on(caller, blob, wanted, (-1, len(opening.data), length), opening.data)

    def _answer_blob(self, caller: Caller, blob: Blob, wanted: Wanted, length: int) -> None:
        """Send the head of the answer that has a blob of `length` bytes from the first wanted one on."""
        at = wanted.at
        headers = [("Content-Range", "bytes %d-%d/%d" % (at, length - 1, length))] if wanted.ranged else []
        caller.answer(206 if wanted.ranged else 200, "", headers + self._blob_headers(blob), length - at)
        self._count("blobs")

    def _send_blob(self, caller: Caller, blob: Blob, wanted: Wanted) -> None:
        """Send a blob as it comes; if that fails in its middle, the rest from its origin.  Raises what keeps it from coming."""
        length = blob.length(caller.gone)
        if wanted.ranged and wanted.at >= length:
            raise NoSuchPiece("the file has %d bytes" % length)
        fd, _ = blob.sendable(wanted.at, caller.gone)
        self._answer_blob(caller, blob, wanted, length)
        self._send_on(caller, blob, wanted, (fd, wanted.at, length), b"")

    def _send_on(self, caller: Caller, blob: Blob, wanted: Wanted, where: Tuple[int, int, int], head: bytes) -> None:
        """Send bytes [at, length) of a blob as they come; those before are in `fd`, or are `head`, which came straight from its
        registry, and nothing else has been sent yet.  Raises as `_send_blob`."""
        fd, at, length = where
        while at < length:
            try:
                fd, limit = blob.sendable(at, caller.gone)
            except DflyError as error:
                if caller.gone() or (isinstance(error, WrongBytes) and not head) or not blob.digest:
                    raise
                self._log.warn("%s: %s; the rest straight from its origin", blob.name, error)
                return self._send_rest(caller, blob, wanted, (fd, at, length), head)
            if head and (blob.progress()["length"], blob.read_at(0, len(head))) != (length, head):
                raise WrongBytes(blob.name, "of one file", "of another for its first bytes, straight from %s" % urlsplit(wanted.url).netloc)
            head = b""
            caller.send_file(fd, at, limit)
            self._count("blob_bytes", limit - at)
            at = limit
        return None

    def _send_rest(self, caller: Caller, blob: Blob, wanted: Wanted, where: Tuple[int, int, int], head: bytes) -> None:
        """Send what is still missing of a blob, of which bytes [0, at) are in `fd`, or are `head`, straight from its origin; its end
        only if it is right.

        Raises BadGateway, NetworkError, SourceError, WrongBytes, CannotRead.
        """
        fd, at, length = where
        self._count("fallbacks")
        digest, done = hashlib.sha256(head), len(head)
        while done < at:
            data = os.pread(fd, min(at - done, 1 << 18), done)
            if not data:
                raise CannotRead("%s: the file is shorter than it was" % blob.name)
            digest.update(data)
            done += len(data)
        held = b""
        for data in self._rest(wanted.url, wanted.headers, at, length, blob.name):
            digest.update(data)
            held += data
            caller.send(held[:-blob.HELD])
            self._count("blob_bytes", max(0, len(held) - blob.HELD))
            held = held[-blob.HELD:]
        if digest.hexdigest() != blob.digest:
            raise WrongBytes(blob.name, blob.digest, digest.hexdigest())
        caller.send(held)
        self._count("blob_bytes", len(held))

    def _rest(self, url: str, passed: List[Tuple[str, str]], at: int, length: int, name: str) -> Iterator[Any]:
        """Yield bytes [at, length) of a blob straight from its origin, however often that hangs up.  Raises BadGateway, NetworkError."""
        pauses = iter(self.REST_PAUSES_S)
        while at < length:
            began, answer = at, None
            try:
                last, connection, answer = self._ask("GET", url, passed + [("range", "bytes=%d-" % at)], None, 0, follow=True)
                if answer.status != 206 or answer.getheader("Content-Range", "") != "bytes %d-%d/%d" % (at, length - 1, length):
                    raise SourceError("%s answers %d to a range" % (name, answer.status), answer.status)
                for data in self._body(last, answer):
                    data = data[:length - at]
                    at += len(data)
                    yield data
            except (NetworkError, BadGateway) as error:
                pause_s = 0.0 if at > began else next(pauses, None)
                if pause_s is None:
                    raise
                self._log.warn("%s: %s; once more from byte %d on", name, error, at)
                time.sleep(pause_s)
            finally:
                if answer:
                    self._upstream.done(last, connection, answer)

    @staticmethod
    def _blob_headers(blob: Blob) -> List[Tuple[str, str]]:
        headers = [("Content-Type", "application/octet-stream"), ("Accept-Ranges", "bytes")]
        if blob.digest:
            headers += [("Docker-Content-Digest", "sha256:" + blob.digest), ("ETag", '"sha256:%s"' % blob.digest)]
        else:
            headers += [pair for pair in zip(("ETag", "Last-Modified"), version_parts(blob.version)) if pair[1]]
        return headers

    # -- straight ---------------------------------------------------------------------

    @staticmethod
    def _forwarded(headers: Dict[str, str]) -> List[Tuple[str, str]]:
        """Return what of a request's headers concerns the far end."""
        dropped = _HOP | {name.strip().lower() for name in headers.get("connection", "").split(",")}
        return [(name, value) for name, value in headers.items() if name not in dropped]

    def _relay(self, caller: Caller, url: str, registry: Optional[Registry]) -> None:
        """Pass a request to its origin and the answer back.  For a registry of ours follow where it sends us, since the engine may
        be able to reach nobody else."""
        self._count("relayed")
        headers = [pair for pair in self._forwarded(caller.request.headers) if pair[0] not in ("host", "content-length", "expect")]
        method = caller.request.method
        if method == "GET" and not caller.has_body and _TOKEN.search(url) and "/v2/" not in url:
            token = self._fetch_token(url, headers)
            if token:
                status, reason, passed, data = token
                caller.answer(status, reason, passed, len(data))
                return caller.send(data)
        body = caller.body() if caller.has_body else None
        last, connection, answer = self._ask(method, url, headers, body, caller.length, follow=bool(registry) and method in ("GET", "HEAD"))
        try:
            return self._pass_back(caller, last, answer, registry)
        finally:
            self._upstream.done(last, connection, answer)

    def _ask(self, method: str, url: str, headers: List[Tuple[str, str]], body: Optional[Iterator[bytes]], length: Optional[int],
             follow: bool) -> Tuple[str, Any, Any]:
        """Return (URL, connection, answer) of a request, with `follow` where its redirects lead.  Raises BadGateway."""
        asked = url
        for _ in range(6):
            connection, answer = self._upstream.ask(method, url, headers, body, length)
            onward = answer.getheader("Location", "") if follow and answer.status in (301, 302, 303, 307, 308) else ""
            if not onward:
                return url, connection, answer
            answer.read(65536)
            self._upstream.done(url, connection, answer)
            before, url, body = url, self._join(url, onward), None
            if urlsplit(before).netloc != urlsplit(url).netloc:
                headers = [pair for pair in headers if pair[0] not in ("authorization", "cookie")]
        raise BadGateway("%s redirects in a circle" % urlsplit(asked).netloc)

    def _fetch_token(self, url: str, headers: List[Tuple[str, str]]) -> Optional[Tuple[int, str, List[Tuple[str, str]], bytes]]:
        """Return what a token server answers, as `_token` does; asked once for all who ask the same meanwhile."""
        return self._tokens.ask((url, tuple(sorted(headers))), lambda: self._token(url, headers))

    def _token(self, url: str, headers: List[Tuple[str, str]]) -> Optional[Tuple[int, str, List[Tuple[str, str]], bytes]]:
        """Return (status, reason, headers, body) of what a token server answers; None when it is no token.  Raises BadGateway."""
        connection, answer = self._upstream.ask("GET", url, headers)
        try:
            if (answer.length or 0) > MIB:
                return None
            return answer.status, answer.reason, self._own_headers(answer), b"".join(self._body(url, answer))
        finally:
            self._upstream.done(url, connection, answer)

    @staticmethod
    def _join(url: str, onward: str) -> str:
        from urllib.parse import urljoin
        try:
            following = urljoin(url, onward)
            urlsplit(following)
        except ValueError:
            following = ""
        if not re.match(r"^https?://[^/?#]+", following, re.I):
            raise BadGateway("%s redirects to what is no http URL: %.200r" % (bare(url), bare(onward)))
        return following

    @staticmethod
    def _own_headers(answer: Any) -> List[Tuple[str, str]]:
        """Return what of an answer's headers concerns its reader."""
        dropped = _HOP | {name.strip().lower() for name in answer.getheader("Connection", "").split(",")} | {"content-length"}
        return [pair for pair in answer.getheaders() if pair[0].lower() not in dropped]

    def _pass_back(self, caller: Caller, url: str, answer: Any, registry: Optional[Registry]) -> None:
        """Send an origin's answer to the client, as it comes."""
        head = caller.request.method == "HEAD"
        length = answer.getheader("Content-Length", "") if head else "" if answer.length is None else str(answer.length)
        headers = self._own_headers(answer)
        if registry:
            headers = [(name, self._back_to_us(value, registry) if name.lower() == "location" else value) for name, value in headers]
        caller.answer(answer.status, answer.reason, headers, int(length) if _NUMBER.match(length) and answer.status not in (204, 304) else None)
        body = self._body(url, answer)
        if answer.status == 200 and not head and _MANIFEST.search(answer.getheader("Content-Type", "")):
            body = self._learning(body, answer.getheader("Content-Encoding", ""))
        for data in body:
            caller.send(data)
        caller.end()

    @staticmethod
    def _back_to_us(url: str, registry: Registry) -> str:
        """Return a URL to which a registry sends its client: what leads back to it leads back to us."""
        if not url.startswith(registry.url + "/"):
            return url
        path = url[len(registry.url):]
        return path + ("&" if "?" in path else "?") + "ns=" + registry.name if registry.name else path

    @staticmethod
    def _body(url: str, answer: Any) -> Iterator[Any]:
        """Yield an answer's body as it comes.  Raises NetworkError, BadGateway."""
        import http.client
        left = answer.length  # of Pythons before 3.12 read1 does not count it down
        while left != 0:
            try:
                data = answer.read1(65536 if left is None else min(left, 65536))
            except (http.client.HTTPException, OSError, ValueError) as error:
                raise BadGateway("%s: %s" % (bare(url), error))
            if not data and left:
                raise NetworkError("%s hung up with %d bytes to come" % (bare(url), left))
            if not data:
                break
            left = left if left is None else left - len(data)
            yield data
        answer.close()  # it has been read to its end: the connection may be used again

    def _learning(self, body: Iterator[Any], coding: str) -> Iterator[Any]:
        """Yield a manifest's body as it comes, its last bytes when its sizes have been noted: an engine acts on them at once."""
        seen, held = b"", b""
        for data in body:
            if held:
                yield held
            held = data
            seen += data if len(seen) <= MANIFEST else b""
        if len(seen) <= MANIFEST:
            self._learn_sizes(seen, coding)
        if held:
            yield held

    def _learn_sizes(self, manifest: bytes, coding: str) -> None:
        """Note how large the blobs of a manifest are."""
        try:
            text = zlib.decompressobj(47).decompress(manifest, MANIFEST) if coding in ("gzip", "deflate") else manifest
            known = json.loads(text.decode())
            parts = [known["config"]] + known["layers"]
            sizes = {str(part["digest"]).partition("sha256:")[2]: int(part["size"]) for part in parts}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error):  # an index of manifests, an old form, or nonsense
            return
        with self._lock:
            self._sizes.update(sizes)
            while len(self._sizes) > SIZES:
                self._sizes.popitem(last=False)  # type: ignore[call-arg]

    # -- tunnels ----------------------------------------------------------------------

    def _connect(self, caller: Caller) -> None:
        """CONNECT: a tunnel, opened where that is asked for.  Wire: 11.1"""
        host, port = split_host(caller.request.target, 443)
        if self._authority and any(opened.pattern.search(join_host(host, port)) for opened in self._opened):
            return self._open(caller, self._authority, host, port)
        return self._tunnel(caller, host, port)

    def _open(self, caller: Caller, authority: Authority, host: str, port: int) -> None:
        """Speak to a client as the host that it wants a tunnel to; what it asks comes in by the door as from a connection of its own."""
        context = authority.context(host)
        near, inner = socket.socketpair()
        try:
            caller.keep, caller.started = False, True
            caller.line.sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            tls = context.wrap_socket(caller.line.sock.dup(), server_side=True)
        except OSError as error:  # it trusts nobody whose word is ours, or does not speak TLS
            near.close()
            inner.close()
            raise NetworkError("%s: no TLS with the client: %s" % (caller.request.target, getattr(error, "reason", "") or error.strerror or error))
        self._count("opened")
        caller.door.enter(inner, caller.request.client, "https://" + (join_host(host, port) if port != 443 else host))
        try:
            self._splice(tls, near)
            tls.settimeout(1.0)
            tls.unwrap()
        except OSError as error:
            self._log.debug("opened tunnel to %s: %s", caller.request.target, error)
        finally:
            near.close()
            tls.close()

    def _tunnel(self, caller: Caller, host: str, port: int) -> None:
        """Pass bytes both ways until both have ended."""
        try:
            far = connect(host, port, Upstream.CONNECT_S)
        except NetworkError as error:
            raise BadGateway(str(error))
        self._count("tunnels")
        try:
            caller.keep, caller.started = False, True
            caller.line.sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            far.settimeout(CLIENT_S)
            far.sendall(caller.line.rest())
            self._splice(caller.line.sock, far)
        except OSError as error:
            self._log.debug("tunnel to %s: %s", caller.request.target, error)
        finally:
            far.close()

    @staticmethod
    def _splice(near: socket.socket, far: socket.socket) -> None:
        """Pass on what either side sends, until both have ended (of TLS, `near`, either) or nothing has come for TUNNEL_S.  Raises OSError."""
        open_ends = {near: far, far: near}
        pending = getattr(near, "pending", None)  # bytes that TLS has taken from the socket already
        while open_ends:
            ready = [near] if pending and pending() and near in open_ends else readable(list(open_ends), TUNNEL_S)
            if not ready:
                return
            for sock in ready:
                data = sock.recv(65536)
                if data:
                    open_ends[sock].sendall(data)
                elif pending:
                    return
                else:
                    open_ends.pop(sock).shutdown(socket.SHUT_WR)

    # -- pages ---------------------------------------------------------------------------

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def status(self, _request: Request) -> Response:
        """GET /_dfly/status: what is under way, what has become of the last blobs, and totals."""
        with self._lock:
            counts = {name: self._counts[name] for name in self.COUNTED}
        return Response.of_json(dict(self._blobs.status(), version=VERSION, since=round(self._since, 3), counts=counts,
                                     mirrors=[registry.url for registry in self._registries]))

    def env(self, _request: Request) -> Response:
        """GET /env: the settings.  Wire: 11.1"""
        return Response.of_json(self._settings)

    def args(self, _request: Request) -> Response:
        """GET /args: the command line.  Wire: 11.1"""
        return Response(200, "\n".join(sys.argv).encode("utf-8", "replace"), "text/plain")

    def version(self, _request: Request) -> Response:
        """GET /debug/version.  Wire: 11.1"""
        return Response(200, VERSION.encode(), "text/plain")

    def metrics(self, _request: Request) -> Response:
        """GET /metrics: what has been done, in Prometheus' form."""
        running, kept = self._blobs.counts()
        with self._lock:
            counts = [("dfly_daemon_%s_total" % name, float(self._counts[name])) for name in self.COUNTED]
        return Response.of_metrics(METRICS.text(("dfly_daemon_downloads", running), ("dfly_daemon_kept_blobs", kept), *counts))


# ==============================================================================
# 27. Engines
#    The settings that make docker, containerd and podman ask the daemon first:
#    put in, and taken out again without a trace.
# ==============================================================================

ENGINES = ("docker", "containerd", "podman")
OURS = "# by dfly.py daemon --install"  # marks our files, and our lines in files of others


class Edit(NamedTuple):
    """What a file becomes; None where there is, or shall be, none."""

    path: str
    before: Optional[bytes]
    after: Optional[bytes]

    def shown(self) -> str:
        """Return the change as `diff -u` shows it, "" where there is none."""
        import difflib
        sides = [(data or b"").decode("utf-8", "replace").splitlines(True) for data in (self.before, self.after)]
        names = ["/dev/null" if data is None else self.path for data in (self.before, self.after)]
        return "".join(line if line.endswith("\n") else line + "\n" for line in difflib.unified_diff(sides[0], sides[1], names[0], names[1]))

    def apply(self) -> None:
        """Write it.  Raises NoSpace, CannotWrite."""
        if self.after is None:
            remove(self.path)
            return
        make_folder(os.path.dirname(self.path))
        write_whole(self.path, self.after)
        os.chmod(self.path, 0o644)


class EngineSettings:
    """What the settings of one engine look like with the daemon at `url` as its mirror, and without; `etc` is its /etc.

    `names` are the registries that the daemon knows, the one of requests that name none first.
    """

    BACKUP = ".before-dfly"  # kept beside what we have changed, until it is taken out

    def __init__(self, engine: str, etc: str, url: str, names: List[str]) -> None:
        self.engine, self._etc = engine, etc
        self._url, self._names = url, names

    def install(self) -> List[Edit]:
        """Return what puts the setting in; nothing where it is.  Raises BadUsage where what is there can't be read, CannotRead."""
        edits = []
        for path, put, _ in self._files():
            now = self._read(path)
            then = put(now)
            if then != now:
                edits += [Edit(path + self.BACKUP, None, now)] if now is not None and self._read(path + self.BACKUP) is None else []
                edits.append(Edit(path, now, then))
        return edits

    def uninstall(self) -> List[Edit]:
        """Return what takes out exactly what `install` has put in.  Raises as that."""
        edits = []
        for path, put, take in self._files():
            now, old = self._read(path), self._read(path + self.BACKUP)
            if now is None and old is None:
                continue
            then = old if old is not None and now == put(old) else None if old is None and now == put(None) else take(now)
            edits += [Edit(path, now, then)] if then != now else []
            edits += [Edit(path + self.BACKUP, old, None)] if old is not None else []
        return edits

    def next_step(self) -> str:
        """Return what the operator does then."""
        return {"docker": "systemctl reload docker", "containerd": "systemctl restart containerd"}.get(self.engine, "")

    def overruled(self) -> List[str]:
        """Return what containerd follows in the place of `_default`, each for one registry, where that does not name the daemon.  Raises CannotRead."""
        folder = self._hosts_folder(self._read(os.path.join(self._etc, "containerd", "config.toml"))) if self.engine == "containerd" else ""
        found = []
        for name in sorted(os.listdir(folder) if folder and os.path.isdir(folder) else ()):
            own = os.path.join(folder, name)  # of the registry of that name, also when there is nothing in it
            hosts = self._read(os.path.join(own, "hosts.toml"))
            if name != "_default" and os.path.isdir(own) and ('"%s"' % self._url).encode() not in (hosts or b"").replace(b"'", b'"'):
                found.append(own if hosts is None else os.path.join(own, "hosts.toml"))
        return found

    @staticmethod
    def _read(path: str) -> Optional[bytes]:
        try:
            with open(path, "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CannotRead("%s: %s" % (path, error.strerror))

    def _files(self) -> List[Tuple[str, Callable[[Optional[bytes]], bytes], Callable[[Optional[bytes]], Optional[bytes]]]]:
        """Return (path, how our setting goes into its content, how it goes out) of each file."""
        path = functools.partial(os.path.join, self._etc)
        if self.engine == "docker":
            daemon = path("docker", "daemon.json")
            return [(daemon, functools.partial(self._into_json, daemon), functools.partial(self._out_of_json, daemon))]
        if self.engine == "podman":
            return [self._own(path("containers", "registries.conf.d", "50-dfly.conf"), self._podman())]
        config = path("containerd", "config.toml")
        hosts = os.path.join(self._hosts_folder(self._read(config)), "_default", "hosts.toml")
        return [self._own(hosts, '[host."%s"]\n  capabilities = ["pull", "resolve"]\n' % self._url),
                (config, functools.partial(self._into_toml, config), self._out_of_toml)]

    # -- a file of our own -----------------------------------------------------------

    def _own(self, path: str, text: str) -> Any:
        def put(now: Optional[bytes]) -> bytes:
            if now is not None and not now.startswith(OURS.encode()):
                raise BadUsage("%s: there is one already that is not ours: add to it by hand\n%s" % (path, text))
            return (OURS + "\n" + text).encode()

        def take(now: Optional[bytes]) -> Optional[bytes]:
            return None if now is not None and now.startswith(OURS.encode()) else now

        return path, put, take

    def _podman(self) -> str:
        where = self._url.partition("://")[2]
        mirrors = [(self._names[0], where)] + [(name, "%s/%s" % (where, name)) for name in self._names[1:] if name != self._names[0]]
        return "\n".join('[[registry]]\nprefix = "%s"\nlocation = "%s"\n[[registry.mirror]]\nlocation = "%s"\ninsecure = true\n' % (name, name, mirror)
                         for name, mirror in mirrors)

    # -- docker's daemon.json ----------------------------------------------------------

    @staticmethod
    def _json(path: str, now: Optional[bytes]) -> Dict[str, Any]:
        try:
            found = json.loads((now or b"").decode() or "{}", object_pairs_hook=collections.OrderedDict)
            if not isinstance(found, dict) or not isinstance(found.get("registry-mirrors", []), list):
                raise ValueError("not a map, or its registry-mirrors not a list")
            return found
        except ValueError as error:
            raise BadUsage("%s: can't be read, and is left as it is: %s" % (path, error))

    def _into_json(self, path: str, now: Optional[bytes]) -> bytes:
        found = self._json(path, now)
        mirrors = found.setdefault("registry-mirrors", [])
        if self._url in mirrors:
            return now or b""
        mirrors.insert(0, self._url)
        return (json.dumps(found, indent=4, ensure_ascii=False) + "\n").encode()

    def _out_of_json(self, path: str, now: Optional[bytes]) -> Optional[bytes]:
        found = self._json(path, now)
        if self._url not in found.get("registry-mirrors", []):
            return now
        found["registry-mirrors"].remove(self._url)
        if not found["registry-mirrors"]:
            del found["registry-mirrors"]
        return (json.dumps(found, indent=4, ensure_ascii=False) + "\n").encode() if found else None

    # -- containerd's config.toml: its CRI plugin looks into a folder of hosts only if told so -----------

    #: What the plugin is called in each version of the file; one that names none has the first.
    CRI = {"1": "cri", "2": "io.containerd.grpc.v1.cri", "3": "io.containerd.cri.v1.images"}
    INSTEAD = ", in the place of "
    _PATH = re.compile(r"""^[^\S\n]*config_path\s*=\s*(["'])([^"'\n]*)\1[^\n]*(\n|$)""", re.M)

    def _hosts_folder(self, config: Optional[bytes]) -> str:
        """Return where containerd looks for hosts: the first of several, as its 2.1 does."""
        found = self._PATH.search((config or b"").decode("utf-8", "replace"))
        return (found.group(2).split(":")[0] if found else "") or os.path.join(self._etc, "containerd", "certs.d")

    def _into_toml(self, path: str, now: Optional[bytes]) -> bytes:
        text = (now or b"").decode("utf-8", "surrogateescape")
        there = self._PATH.search(text)
        if there and there.group(2):
            return now or b""
        if re.search(r"^\s*\[plugins\..*\.registry\.(mirrors|configs)\.", text, re.M):
            raise BadUsage("%s: has registry.mirrors or registry.configs, which containerd does not take together with a folder of hosts" % path)
        setting = 'config_path = "%s"' % os.path.join(self._etc, "containerd", "certs.d")
        if there:  # an empty one, as `containerd config default` prints
            indent, old = re.match(r"(\s*)(.*)", there.group(0)).groups()  # type: ignore[union-attr]
            line = "%s%s  %s%s%s%s" % (indent, setting, OURS, self.INSTEAD, old, there.group(3))
            return (text[:there.start()] + line + text[there.end():]).encode("utf-8", "surrogateescape")
        version = re.search(r"^\s*version\s*=\s*(\d+)", text, re.M)
        plugin = self.CRI.get(version.group(1) if version else "1" if text.strip() else "2")
        if not plugin:
            raise BadUsage("%s: of a version that is not known here: add %s for its CRI plugin by hand" % (path, setting))
        line = "%s  %s\n" % (setting, OURS)
        section = re.search(r"""^\s*\[plugins\.(["']?)%s\1\.registry\][^\n]*(\n|$)""" % re.escape(plugin), text, re.M)
        if section:
            gap = "" if section.group(0).endswith("\n") else "\n"
            return (text[:section.end()] + gap + line + text[section.end():]).encode("utf-8", "surrogateescape")
        start = "" if text else "version = 2  %s\n" % OURS
        gap = "" if not text or text.endswith("\n") else "\n"
        name = '"%s"' % plugin if "." in plugin else plugin
        return (text + gap + start + "[plugins.%s.registry]  %s\n" % (name, OURS) + line).encode("utf-8", "surrogateescape")

    @staticmethod
    def _out_of_toml(now: Optional[bytes]) -> Optional[bytes]:
        before, ours, instead = (text.encode() for text in ("config_path", OURS, EngineSettings.INSTEAD))
        lines = [line if ours not in line else line.partition(before)[0] + line.partition(ours + instead)[2] if ours + instead in line else b""
                 for line in (now or b"").splitlines(True)]
        left = b"".join(lines)
        return left if left or not now else None


# ==============================================================================
# 28. Config Service
#    Which supernodes there are and how they do: they say so themselves, and clients
#    ask for the nearest.  Its books and its API; the supernode's word to it; and the
#    client's list, which outlives it.  Knows no tasks.
# ==============================================================================

CONFIG_PORT = 8004
HEARTBEAT_S = 10.0  # between two words of a supernode
MISSED = 3  # so many times without one, and a supernode counts as unhealthy
FORGET_S = 3600.0  # and after so long it is forgotten
REFRESH_S = 60.0  # how long a client uses the same list
ASK_S = 2.0  # how long it waits for another,
RETRY_S, EMPTY_RETRY_S = 30.0, 5.0  # and how long it does not ask again when none has come: with one of its own, and without
AGE_MOST_S = 86400.0  # of a list, whatever the service and the clock say


def parse_service(text: str) -> Optional[Node]:
    """Return where the Config Service of `host[:port]` is, None for "".  Raises BadUsage."""
    return Node(*split_host(text, CONFIG_PORT)) if text else None


def parse_label(text: str) -> Tuple[str, ...]:
    """Return the parts of a label `site/rack`, wide to narrow.  Raises BadRequest."""
    if not re.fullmatch(r"[\w .:@+/-]{0,200}", text):
        raise BadRequest("label: %.60r: invalid value (write site/rack)" % text)
    return tuple(part.strip() for part in text.split("/") if part.strip())


def _number(data: Dict[str, Any], name: str, least: float, most: float, default: float) -> float:
    """Return a number of a JSON object.  Raises BadRequest."""
    value = data.get(name, default)
    if not isinstance(value, (int, float)) or not least <= value <= most:
        raise BadRequest("%s: %.40r: invalid value (%g to %g)" % (name, value, least, most))
    return value


class Subnets:
    """Which networks are where, by rules `10.1.0.0/16=site/rack`; where several have an address, the narrowest counts."""

    def __init__(self, rules: List[str]) -> None:
        import ipaddress
        self._rules = []  # type: List[Tuple[Any, Tuple[str, ...]]]  # narrow ones first
        for rule in rules:
            network, equals, label = rule.partition("=")
            try:
                if not parse_label(label):
                    raise ValueError(label)
                self._rules.append((ipaddress.ip_network(network.strip(), strict=False), parse_label(label)))
            except (ValueError, BadRequest):
                raise BadUsage("not a rule for a subnet: %r (write 10.1.0.0/16=site/rack)" % rule)
        self._rules.sort(key=lambda rule: -rule[0].prefixlen)
        self._find_again = functools.lru_cache(maxsize=4096)(self._find)  # each answer has every supernode's

    def label(self, ip: str) -> Tuple[str, ...]:
        """Return where an address is, () where no rule says it.  Raises BadRequest."""
        return self._find_again(ip)

    def _find(self, ip: str) -> Tuple[str, ...]:
        import ipaddress
        try:
            address = ipaddress.ip_address(ip.split("%")[0])
        except ValueError:
            raise BadRequest("ip: %.60r: invalid value" % ip)
        address = getattr(address, "ipv4_mapped", None) or address
        return next((label for network, label in self._rules if address in network), ())


class Entry(NamedTuple):
    """What a supernode has said of itself, and when."""

    ip: str
    port: int
    label: str
    weight: int
    version: str
    load: Dict[str, float]  # tasks, peers, bytes_s, and what later versions may add
    leaving: bool  # it has said good-bye
    heard_at: float  # monotonic

    @classmethod
    def parse(cls, data: Dict[str, Any], caller: str, heard_at: float) -> "Entry":
        """Return the entry that a JSON object makes; the address is the `caller`'s where it names none.  Raises BadRequest."""
        import ipaddress
        label, version, load = str(data.get("label", "")), str(data.get("version", "")), data.get("load", {})
        try:
            ip = str(ipaddress.ip_address(str(data.get("ip") or caller)))
        except ValueError:
            raise BadRequest("ip: %.60r: invalid value" % data["ip"])
        parse_label(label)
        if not re.fullmatch(r"[\w.+-]{0,40}", version):
            raise BadRequest("version: %.60r: invalid value" % version)
        if not isinstance(load, dict) or len(load) > 16 or not all(re.fullmatch(r"[a-z_]{1,32}", name) for name in load):
            raise BadRequest("load: %.60r: invalid value" % (load,))
        return cls(ip, int(_number(data, "port", 1, 65535, SUPERNODE_PORT)), label, int(_number(data, "weight", 1, 9999, 1)), version,
                   {name: _number(load, name, 0, 1e18, 0) for name in sorted(load)}, bool(data.get("leaving", False)), heard_at)

    def __str__(self) -> str:
        return join_host(self.ip, self.port)

    def same(self, other: Optional["Entry"]) -> bool:
        """Return whether another says the same, load and time aside."""
        return other is not None and self._replace(load={}, heard_at=0) == other._replace(load={}, heard_at=0)


class Directory:
    """The supernodes that have been heard of, how they do, and who is near whom; kept in a file.

    All of it belongs to the server's thread.  The file has ages, not times: while nobody listens nobody grows older, so after
    a restart a supernode has its three heartbeats' time to be heard again.
    """

    MOST = 1000

    def __init__(self, path: str, subnets: Subnets, interval_s: float, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._subnets, self._log, self._clock = path, subnets, log, clock
        self.interval_s = interval_s  # between two words of a supernode
        self._entries = {}  # type: Dict[Tuple[str, int], Entry]
        self._changed = False  # since the file was written
        self._ill = False  # the file could not be written
        self._load()

    def entries(self) -> List[Entry]:
        """Return all that are known, by label and address."""
        return sorted(self._entries.values(), key=lambda entry: (entry.label, entry.ip, entry.port))

    def healthy(self, entry: Entry) -> bool:
        """Return whether a supernode is heard of regularly."""
        return not entry.leaving and self.age(entry) <= MISSED * self.interval_s

    def age(self, entry: Entry) -> float:
        """Return for how many seconds a supernode has not been heard."""
        return max(0.0, self._clock() - entry.heard_at)

    def hear(self, data: Dict[str, Any], caller: str) -> None:
        """Take a supernode's word.  Raises BadRequest."""
        entry = Entry.parse(data, caller, self._clock())
        key = (entry.ip, entry.port)
        known = self._entries.get(key)
        if not known and (entry.leaving or len(self._entries) >= self.MOST):
            if not entry.leaving:
                raise BadRequest("%s: %d supernodes are known already, and that is the most" % (entry, self.MOST))
            return
        self._entries[key], self._changed = entry, True
        if not entry.same(known):
            self._log.info("supernode %s: %s, weight %d, %s", entry, entry.label or "no label", entry.weight,
                           "leaves" if entry.leaving else "known" if known else "new")
            self.save()

    def near(self, ip: str, label: str) -> List[Tuple[int, Entry]]:
        """Return the healthy supernodes for a client, each with the number of groups that are nearer; nearest first.

        A group are those who have as much of their label in common with the client's.  Where none is healthy all are given:
        the clients find out.  Raises BadRequest.
        """
        here = parse_label(label) or self._subnets.label(ip)
        found = [entry for entry in self.entries() if self.healthy(entry)] or [entry for entry in self.entries() if not entry.leaving]
        common = [len(os.path.commonprefix([here, self.where(entry)])) for entry in found]
        depths = sorted(set(common), reverse=True)
        return sorted(((depths.index(depth), entry) for depth, entry in zip(common, found)), key=lambda pair: pair[0])

    def where(self, entry: Entry) -> Tuple[str, ...]:
        """Return where a supernode is: what it says, else what the rules say."""
        return parse_label(entry.label) or self._subnets.label(entry.ip)

    def sweep(self) -> None:
        """Once a heartbeat: forget whom nobody has heard of for long, and keep the rest."""
        for key, entry in list(self._entries.items()):
            if self.age(entry) > FORGET_S:
                self._log.info("supernode %s: forgotten", entry)
                del self._entries[key]
                self._changed = True
        if self._changed:
            self.save()

    def save(self) -> None:
        """Write the file; a disk that does not take it is no reason not to serve."""
        rows = []
        for entry in self.entries():
            row = entry._asdict()
            del row["heard_at"]
            rows.append(dict(row, age=round(self.age(entry), 3)))
        try:
            write_whole(self._path, (json.dumps({"supernodes": rows}, indent=1, sort_keys=True) + "\n").encode())
            self._changed = self._ill = False
        except DflyError as error:
            if not self._ill:
                self._log.error("the supernodes can't be kept: %s", error)
            self._ill = True

    def _load(self) -> None:
        """Read the file; what can't be read will be heard again."""
        try:
            with open(self._path, encoding="utf-8") as file:
                for row in json.load(file)["supernodes"]:
                    entry = Entry.parse(row, "", self._clock() - _number(row, "age", 0, 2 * FORGET_S, 0))
                    self._entries[entry.ip, entry.port] = entry
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BadRequest) as error:
            self._log.warn("%s can't be read, begun anew: %r", self._path, error)


class ConfigService:
    """The HTTP API of the Config Service: what supernodes say and clients ask, told to the Directory and answered from it."""

    ROUTES = (
        Route("POST", "/supernodes", "heartbeat"),
        Route("GET", "/supernodes", "nearest"),
        Route("POST", "/preheats", "preheat"),
        Route("GET", "/preheats/", "preheat_info"),
        Route("GET", "/metrics", "metrics"),
        Route("GET", "/_ping", "ping"),
        Route("GET", "/", "page"),
    )
    STYLE = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em 1em .2em 0;text-align:left}.bad{color:#b00}"

    def __init__(self, directory: Directory, refresh_s: float, allowed: HostList) -> None:
        self._directory, self._refresh_s = directory, refresh_s
        self._allowed = allowed  # who may say that there is a supernode; nobody named: all
        self._server = None  # type: Optional[Server]

    def serve(self, server: Server) -> None:
        """Begin to answer."""
        self._server = server
        server.later(self._directory.interval_s, self._sweep)
        server.start()

    def stop(self) -> None:
        """End, with all on disk."""
        if self._server:
            self._server.stop()
        self._directory.save()

    def _sweep(self) -> None:
        assert self._server
        self._server.later(self._directory.interval_s, self._sweep)
        self._directory.sweep()

    def heartbeat(self, request: Request) -> Response:
        """POST /supernodes: a supernode registers, and says again and again that it is there.

        Said: {port, ip? (else the caller's), label?, weight?, version?, load? {name: number}, leaving?}.  Answered: {interval}, the
        seconds until it shall say so again.
        """
        if self._allowed and not self._allowed.has_address(request.client):
            return Response.of_error(403, "%s may not register supernodes here (--supernodes)" % request.client)
        self._directory.hear(request.json(), request.client)
        return Response.of_json({"interval": self._directory.interval_s})

    def nearest(self, request: Request) -> Response:
        """GET /supernodes?ip=&label=: the supernodes for a client, nearest group first, and the seconds that this holds."""
        query, directory = request.query, self._directory
        nodes = [{"ip": entry.ip, "port": entry.port, "weight": entry.weight, "group": group, "label": "/".join(directory.where(entry)),
                  "healthy": directory.healthy(entry), "load": entry.load}
                 for group, entry in directory.near(query.get("ip") or request.client, query.get("label", ""))]
        return Response.of_json({"refresh": self._refresh_s, "nodes": nodes})

    def ping(self, _request: Request) -> Response:
        """GET /_ping."""
        return Response(200, b"OK", "text/plain")

    def metrics(self, _request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        assert self._server
        rows = []  # type: List[Any]
        for entry in self._directory.entries():
            labels = {"node": str(entry), "label": "/".join(self._directory.where(entry))}
            rows.append(("dfly_config_supernode_up", self._directory.healthy(entry), labels))
            rows += [("dfly_config_supernode_load", value, dict(labels, what=name)) for name, value in entry.load.items()]
        return Response.of_metrics(METRICS.text(*rows, calls=self._server.requests))

    def preheat(self, request: Request) -> Any:
        """POST /preheats: as a supernode's, for all healthy ones, or those at `label`: {ID, supernodes: {address: what each answers}}."""
        data = request.json()
        label = parse_label(str(data.pop("label", "")))
        nodes = self._healthy(label)
        if not nodes:
            return Response.of_error(503, "no healthy supernode %s" % ("at " + "/".join(label) if label else "is known"))
        return self._forward(nodes, "POST", "/preheats", data, self._begun)

    def preheat_info(self, request: Request) -> Any:
        """GET /preheats/{id}: as a supernode's, SUCCESS once it is so on all that know it; with `supernodes` as above."""
        return self._forward(self._healthy(()), "GET", "/preheats/" + quote(request.rest, safe=""), None, self._standing)

    def _healthy(self, label: Tuple[str, ...]) -> List[Node]:
        return [Node(entry.ip, entry.port) for entry in self._directory.entries()
                if self._directory.healthy(entry) and self._directory.where(entry)[:len(label)] == label]

    @staticmethod
    def _forward(nodes: List[Node], method: str, target: str, data: Any, answer: Callable[[Dict[str, Any]], Response]) -> Any:
        """Return an Aside that asks these supernodes, and makes the answer from theirs by address."""
        def ask(node: Node) -> Tuple[str, Dict[str, Any]]:
            pool = Pool(10.0, ASK_S)
            try:
                return str(node), ask_json(pool, node, method, target, data)
            except DflyError as error:
                return str(node), {"code": getattr(error, "status", 0), "message": str(error)}
            finally:
                pool.close()

        def make(_request: Request) -> Response:
            from concurrent.futures import ThreadPoolExecutor
            with ThreadPoolExecutor(16) as pool:
                return answer(dict(pool.map(ask, nodes)))

        return Aside(make, Response.of_error(503, "busy"))

    @staticmethod
    def _begun(found: Dict[str, Any]) -> Response:
        numbers = [said["ID"] for said in found.values() if "ID" in said]
        if not numbers:
            return Response.of_error(502, next(str(said.get("message")) for said in found.values()))
        return Response.of_json({"ID": numbers[0], "supernodes": found}, 201)

    @staticmethod
    def _standing(found: Dict[str, Any]) -> Response:
        known = {node: said for node, said in found.items() if "status" in said}
        if not known:
            return Response.of_error(404, "no supernode knows such a preheat")
        states = [said["status"] for said in known.values()]
        status = next((state for state in (Preheat.RUNNING, Preheat.WAITING, Preheat.FAILED) if state in states), Preheat.SUCCESS)
        errors = ["%s: %s" % (node, said["errorMsg"]) for node, said in known.items() if said.get("errorMsg")]
        number = next(iter(known.values()))["ID"]
        return Response.of_json(dict({"ID": number, "status": status, "supernodes": known}, **({"errorMsg": "; ".join(errors)} if errors else {})))

    def page(self, request: Request) -> Response:
        """GET /: the supernodes, for people."""
        import html
        if request.rest:
            return Response.of_error(404, "GET %.100s: no such thing here" % request.path)
        entries, directory = self._directory.entries(), self._directory
        heads = ("supernode", "where", "health", "last heard", "weight", "tasks", "peers", "sends", "version")
        rows = ["<tr>%s</tr>" % "".join("<th>%s</th>" % head for head in heads)]
        for entry in entries:
            health = "leaves" if entry.leaving else "healthy" if directory.healthy(entry) else "silent"
            load = entry.load
            cells = (entry, "/".join(directory.where(entry)) or "-", health, show_time(directory.age(entry)) + " ago", entry.weight,
                     "%d" % load.get("tasks", 0), "%d" % load.get("peers", 0), show_size(load.get("bytes_s", 0)) + "/s", entry.version)
            rows.append("<tr%s>%s</tr>" % ("" if health == "healthy" else ' class="bad"', "".join("<td>%s</td>" % html.escape(str(c)) for c in cells)))
        well = sum(directory.healthy(entry) for entry in entries)
        text = "<!DOCTYPE html><html lang=en><title>dfly: supernodes</title><style>%s</style><h1>%d of %d supernodes healthy</h1><table>%s</table></html>\n" % (
            self.STYLE, well, len(entries), "".join(rows))
        return Response(200, text.encode(), "text/html; charset=utf-8",
                        [("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"), ("Cache-Control", "no-store")])


def _ask_service(pool: Pool, service: Node, method: str, target: str, data: Any = None) -> Dict[str, Any]:
    """Return what a Config Service answers.  Raises NetworkError."""
    try:
        return ask_json(pool, service, method, target, data, "Config Service")
    except BadRequest as error:
        raise NetworkError(str(error))


class Announcer:
    """Tells a Config Service, from a thread of its own, that a supernode is here and how busy it is.

    All belongs to that thread but _ended, an event.
    """

    def __init__(self, service: Node, about: Dict[str, Any], load: Callable[[], Dict[str, float]], log: Log,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._service, self._about, self._log, self._clock = service, about, log, clock
        self._load = load  # says tasks, peers and sent_bytes
        self._ended = threading.Event()
        self._pool = Pool(ASK_S, ASK_S)
        self._interval_s = ASK_S  # until the service says another
        self._heard = None  # type: Optional[bool]  # whether the last word arrived
        self._sent = (clock(), 0.0)  # when, and the bytes sent until then
        self._thread = threading.Thread(target=self._run, name="dfly-announcer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Say good-bye, if the service listens, and end."""
        self._ended.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._say(self._words())
            self._ended.wait(self._interval_s)
        if self._heard:
            self._say({"leaving": True})
        self._pool.close()

    def _words(self) -> Dict[str, Any]:
        load, now = self._load(), self._clock()
        sent, (then, before) = load.pop("sent_bytes"), self._sent
        self._sent = (now, sent)
        return {"load": dict(load, bytes_s=round((sent - before) / max(now - then, 0.001)))}

    def _say(self, words: Dict[str, Any]) -> None:
        try:
            answer = _ask_service(self._pool, self._service, "POST", "/supernodes", dict(self._about, **words))
            self._interval_s = _number(answer, "interval", 0.05, 3600, HEARTBEAT_S)
            if not self._heard:
                self._log.info("Config Service %s: %s", self._service, "registered" if self._heard is None else "is back")
            self._heard = True
        except (NetworkError, BadRequest) as error:
            if self._heard is not False:
                self._log.warn("%s; trying on", error)
            self._heard = False


class Kept(NamedTuple):
    """A list of supernodes, and when (time.time) to ask for another."""

    nodes: List[Node]
    ask_at: float
    why: str = ""  # it is not the service's newest


class NodeList:
    """The supernodes that a Config Service names for this host, also on disk, so that they are known while it is away.

    _lock guards _kept and _followed.
    """

    def __init__(self, service: Node, folder: str, fallback: List[Node], label: str, ip: str, clock: Callable[[], float] = time.time) -> None:
        self._service, self._label, self._ip = service, label, ip
        self._fallback = fallback  # if neither the service nor the disk has any
        self._path = os.path.join(folder, "supernodes.json")
        self._clock = clock
        self._lock = threading.Lock()
        self._kept = None  # type: Optional[Kept]
        self._followed = False  # a thread sees to it that it stays fresh

    def nodes(self, log: Log) -> List[Node]:
        """Return them; asks the service only where ours are older than they may be.  Raises NetworkError when there are none."""
        kept = self._known()
        with self._lock:
            followed = self._followed
        if not kept or (not followed and not self._due(kept)):
            kept = self._refresh(kept, log)
        if not kept.nodes:
            raise NetworkError(kept.why)
        return kept.nodes

    def follow(self, ended: threading.Event, log: Log) -> None:
        """Keep the list fresh until something has ended: so no download waits for the service."""
        with self._lock:
            self._followed = True
        kept = self._known()
        while not ended.wait(self._due(kept) if kept else 0.0):
            kept = self._refresh(kept, log)

    def _due(self, kept: Kept) -> float:
        """Return in how many seconds the service shall be asked again; 0.0 also where the clock has been put back."""
        left = kept.ask_at - self._clock()
        return left if 0 < left <= AGE_MOST_S else 0.0

    def _known(self) -> Optional[Kept]:
        """Return what was known last, here or by another process of the same home."""
        with self._lock:
            if not self._kept:
                self._kept = self._read()
            return self._kept

    def _refresh(self, old: Optional[Kept], log: Log) -> Kept:
        """Ask the service; what it does not say is as it was."""
        try:
            kept = self._ask()
            if old and old.why:
                log.info("Config Service %s is back", self._service)
        except NetworkError as error:
            nodes = old.nodes if old and old.nodes else self._fallback
            kept = Kept(nodes, self._clock() + (RETRY_S if nodes else EMPTY_RETRY_S),
                        "%s; %s" % (error, "going on with the supernodes known before" if nodes else "and no supernode is known from before"))
            if not (old and old.why):
                log.warn("%s", kept.why)
        with self._lock:
            self._kept = kept
        if kept.nodes and kept.nodes is not self._fallback:
            self._write(kept, log)
        return kept

    def _ask(self) -> Kept:
        """Return the service's list.  Raises NetworkError."""
        pool = Pool(ASK_S, ASK_S)
        try:
            answer = _ask_service(pool, self._service, "GET", "/supernodes?ip=%s&label=%s" % (quote(self._ip, safe=""), quote(self._label, safe="")))
        finally:
            pool.close()
        try:
            nodes = self._checked([[row["ip"], row["port"], row["weight"], row["group"]] for row in answer["nodes"]])
            refresh_s = _number(answer, "refresh", 0.1, AGE_MOST_S, REFRESH_S)
        except (KeyError, TypeError, ValueError, OverflowError, BadUsage, BadRequest) as error:
            raise NetworkError("Config Service %s: an answer that makes no sense: %r" % (self._service, error))
        if not nodes:
            raise NetworkError("Config Service %s knows no supernode" % str(self._service))
        return Kept(nodes, self._clock() + refresh_s)

    @staticmethod
    def _checked(rows: List[List[Any]]) -> List[Node]:
        """Return the supernodes of rows from elsewhere.  Raises ValueError, TypeError, OverflowError, BadUsage."""
        nodes = []
        for host, port, weight, group in rows[:Directory.MOST]:
            where = split_host(join_host(str(host), int(port)), SUPERNODE_PORT)
            if not 1 <= int(weight) <= 9999 or not 0 <= int(group) <= Directory.MOST:
                raise ValueError("weight %r, group %r" % (weight, group))
            nodes.append(Node(where[0], where[1], int(weight), int(group)))
        return nodes

    def _read(self) -> Optional[Kept]:
        """Return the list on disk, None when there is none for such a client as we are."""
        try:
            with open(self._path, encoding="utf-8") as file:
                data = json.load(file)
            nodes = self._checked(data["nodes"]) if data["for"] == self._asker() else []
            return Kept(nodes, float(data["ask_at"])) if nodes else None
        except (OSError, KeyError, TypeError, ValueError, OverflowError, BadUsage):  # no list, or one that is no use: there will be another
            return None

    def _write(self, kept: Kept, log: Log) -> None:
        rows = [list(node) for node in kept.nodes]
        try:
            make_folder(os.path.dirname(self._path))
            write_whole(self._path, json.dumps({"for": self._asker(), "ask_at": kept.ask_at, "nodes": rows}).encode(), private=True)
        except DflyError as error:
            log.warn("the list of supernodes can't be kept: %s", error)

    def _asker(self) -> List[str]:
        """Return what the answer depends on."""
        return [str(self._service), self._label, self._ip]


# ==============================================================================
# 29. Demo
#    The main job on one machine, to see it work.
# ==============================================================================

class _DemoOrigin:
    """The demo's origin: one file, whole or a range of it."""

    ROUTES = (Route("GET", "/demo.bin", "file"),)

    def __init__(self, path: str) -> None:
        self._path = path

    def file(self, request: Request) -> Response:
        """GET /demo.bin."""
        length = os.stat(self._path).st_size
        start, end = request.range(length) or (0, length)
        body = [FileSpan(os.open(self._path, os.O_RDONLY), start, end - start)]
        headers = [("Content-Range", "bytes %d-%d/%d" % (start, end - 1, length))] if end - start < length else []
        return Response(206 if headers else 200, body, "application/octet-stream", headers + [("ETag", '"demo"')])


class Demo:
    """The main job on one machine: an origin, a supernode and some peers, all real processes but the origin."""

    PEERS, SIZE = 4, 64 * MIB

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.processes = []  # type: List[Any]
        self.names = {}  # type: Dict[str, str]  # address -> name

    def run(self) -> int:
        """Show it; return the exit status."""
        origin, digest = self._origin()
        try:
            return self._swarm("http://127.0.0.1:%d/demo.bin" % origin.address[1], digest, origin)
        finally:
            self._end()
            origin.stop()

    def _origin(self) -> Tuple[Server, str]:
        path, digest = os.path.join(self.folder, "demo.bin"), hashlib.sha256()
        with open(path, "wb") as file:
            for _ in range(self.SIZE // MIB):
                block = os.urandom(MIB)
                digest.update(block)
                file.write(block)
        server = Server(listen("127.0.0.1", 0), _DemoOrigin.ROUTES, _DemoOrigin(path), Log(), "origin")
        server.start()
        return server, digest.hexdigest()

    def _spawn(self, *arguments: str) -> Any:
        import subprocess
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__)] + list(arguments), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def _swarm(self, url: str, digest: str, origin: Server) -> int:
        home = os.path.join(self.folder, "supernode")
        supernode = self._spawn("supernode", "--home", home, "--port", "0", "--download-port", "0", "--advertise-ip", "127.0.0.1", "--bind", "127.0.0.1")
        match = re.search(r"on (\S+):(\d+) pieces on (\S+)$", supernode.stdout.readline().decode().strip())
        if not match:
            raise NetworkError("the demo's supernode does not start")
        self.names[match.group(3)] = "supernode"
        print("origin     %s  (%s)" % (url, show_size(self.SIZE)))
        print("supernode  127.0.0.1:%s" % match.group(2))
        began = time.monotonic()
        peers = [self._spawn("get", "-u", url, "-o", self._path(i, "out"), "--node", "127.0.0.1:" + match.group(2), "--home", self._path(i, "home"),
                             "--ip", "127.0.0.1", "--notbs", "--locallimit", "40M") for i in range(self.PEERS)]
        self._watch(peers, began)
        outputs = [process.communicate(timeout=60)[0].decode() for process in peers]
        for i in range(self.PEERS):
            answer = UploaderLine(self._path(i, "home")).call("GET", "/ping") or {}
            self.names["127.0.0.1:%s" % answer.get("port")] = "peer %d" % (i + 1)
        good = [self._verified(i, digest) for i in range(self.PEERS)]
        self._table(good, origin, time.monotonic() - began)
        for i, output in enumerate(outputs):
            if not good[i]:
                print("peer %d: %s" % (i + 1, output))
        return 0 if all(good) else 1

    def _path(self, i: int, name: str) -> str:
        return os.path.join(make_folder(os.path.join(self.folder, "peer%d" % (i + 1))), name)

    def _watch(self, peers: List[Any], began: float) -> None:
        """Draw how far each peer is until all have ended."""
        shown = 0.0
        while any(process.poll() is None for process in peers):
            if time.monotonic() > began + 120:
                raise Stalled("the demo has not finished within two minutes")
            time.sleep(0.1)
            if sys.stdout.isatty() or time.monotonic() > shown + 1:
                shown = time.monotonic()
                print(("\r" if sys.stdout.isatty() else "") + "  ".join("peer %d %3d %%" % (i + 1, self._percent(i)) for i in range(self.PEERS)),
                      end="" if sys.stdout.isatty() else "\n", flush=True)
        print()

    def _percent(self, i: int) -> int:
        """Return how much of its file a peer has, by the blocks it has on disk."""
        for folder, _, names in os.walk(self._path(i, "")):
            for name in names:
                if name == "out" or name.endswith(".dfly"):
                    try:
                        return min(100, 100 * os.stat(os.path.join(folder, name)).st_blocks * 512 // self.SIZE)
                    except OSError:
                        return 100  # it has just got its name
        return 0

    def _verified(self, i: int, digest: str) -> bool:
        found = hashlib.sha256()
        try:
            with open(self._path(i, "out"), "rb") as file:
                for block in iter(lambda: file.read(MIB), b""):
                    found.update(block)
        except OSError:
            return False
        return found.hexdigest() == digest

    def _table(self, good: List[bool], origin: Server, seconds: float) -> None:
        rows = ["supernode"] + ["peer %d" % (i + 1) for i in range(self.PEERS)]
        print("\n%-10s %s   %s" % ("to \\ from", " ".join("%10s" % row for row in ["origin"] + rows), "sha256"))
        print("%-10s %10s" % ("supernode", show_size(origin.sent_bytes)))
        for i in range(self.PEERS):
            sources = {}  # type: Dict[str, int]
            with open(os.path.join(self._path(i, "home"), "logs", "dfclient.log"), encoding="utf-8") as file:
                for line in file:
                    if " sources {" in line:
                        sources = {self.names.get(where, where): count for where, count in json.loads(line.split(" sources ", 1)[1]).items()}
            cells = [show_size(sources.get(name, 0)) if sources.get(name) else "-" for name in ["origin"] + rows]
            print("%-10s %s   %s" % ("peer %d" % (i + 1), " ".join("%10s" % cell for cell in cells), "verified" if good[i] else "WRONG"))
        print("\n%d x %s in %s; the origin sent %.2f copies" % (self.PEERS, show_size(self.SIZE), show_time(seconds), origin.sent_bytes / float(self.SIZE)))

    def _end(self) -> None:
        for i in range(self.PEERS):
            answer = UploaderLine(self._path(i, "home")).call("GET", "/ping")
            if answer:
                os.kill(answer["pid"], signal.SIGTERM)
                deadline = time.monotonic() + 5
                while os.path.exists(os.path.join(self._path(i, "home"), "peer.pid")) and time.monotonic() < deadline:
                    time.sleep(0.02)
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
            process.wait(10)
            process.stdout.close()


# ==============================================================================
# 30. Flags
#    The flags of each command, over /etc/dragonfly.conf and the old programs' files.
# ==============================================================================

USAGE = "dfly.py get | supernode | peer | daemon | config | status | preheat | demo | version   (--help after any of them)"


def _flag(parser: Any, *names: str, **how: Any) -> None:
    how.setdefault("metavar", how.get("type", str).__name__.replace("parse_", "").strip("_").upper() if "action" not in how else None)
    if how["metavar"] is None or how.get("choices"):
        how.pop("metavar")
    parser.add_argument(*names, **how)


def _parser(command: str, about: str) -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        """Says what is wrong in one line."""

        def error(self, message: str) -> Any:
            raise BadUsage("%s (see %s --help)" % (message, self.prog))

    parser = Parser(prog=command, description=about, allow_abbrev=False)
    _flag(parser, "--config", metavar="FILE", default=None, help="settings (default %s, if it is there)" % CONFIG)
    return parser


def _csv(text: str) -> List[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


def _port(text: str) -> int:
    if not re.match(r"^\d{1,5}$", text) or int(text) > 65535:
        raise BadUsage("not a port: %r" % text)
    return int(text)


def _positive(text: str) -> int:
    if not re.match(r"^[1-9]\d{0,8}$", text):
        raise BadUsage("not a positive number: %r" % text)
    return int(text)


TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _switches(parser: Any, arguments: List[str]) -> List[str]:
    """Return the arguments with Go's `--notbs=true` as `--notbs`, and without its `--notbs=false`, which the configuration yields to."""
    found = []
    for text in arguments:
        name, _, value = text.partition("=")
        action = parser._option_string_actions.get(name)
        if not action or action.nargs != 0 or value.lower() not in TRUTHS:
            found.append(text)
        elif TRUTHS[value.lower()]:
            found.append(name)
        else:
            parser.set_defaults(**{action.dest: False})
    return found


#: Where dfget and supernode 1.0 have their settings, and our flag for each ("": there is nothing to set here).  Wire: 9
YML = "/etc/dragonfly/%s.yml"
YML_FLAGS = {
    "get": {"nodes": "node", "localLimit": "locallimit", "minRate": "minrate", "totalLimit": "totallimit", "clientQueueSize": "clientqueue",
            "workHome": "home", "logConfig": ""},
    "supernode": {"cdnPattern": "cdn-pattern", "listenPort": "port", "downloadPort": "download-port", "homeDir": "home", "advertiseIP": "advertise-ip",
                  "peerUpLimit": "up-limit", "peerDownLimit": "down-limit", "maxBandwidth": "max-bandwidth",
                  "systemReservedBandwidth": "system-bandwidth", "failAccessInterval": "fail-access-interval", "taskExpireTime": "task-expire-time",
                  "youngGCThreshold": "young-gc-threshold", "fullGCThreshold": "full-gc-threshold", "debug": "debug", "gcInitialDelay": "",
                  "gcMetaInterval": "", "gcDiskInterval": "", "peerGCDelay": "", "schedulerCorePoolSize": "", "eliminationLimit": "",
                  "failureCountLimit": "", "linkLimit": "", "enableProfiler": "", "IntervalThreshold": "", "CleanRatio": "", "logConfig": ""}}


def _read_yml(path: str, section: str) -> Dict[str, str]:
    """Return as settings of a section what a dfget.yml or supernode.yml says.  Raises BadUsage.  Wire: 9"""
    data, flags = YamlFile(path).data, YML_FLAGS.get(section, {})
    if section == "supernode":
        data = data.get("base") or {}
    found = {}
    for key, value in data.items() if isinstance(data, dict) else [("base", data)]:
        if key not in flags or isinstance(value, dict) and flags[key]:
            raise BadUsage("%s: there is no setting %r for %s" % (path, key, section))
        if flags[key] and value != "":
            found[flags[key]] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def _settings(given: str, section: str, program: str) -> Tuple[str, Dict[str, Dict[str, str]]]:
    """Return which file has the settings, the `given` one or the usual one of a program, and what it says.  Raises BadUsage."""
    path = given or CONFIG
    if not given and program in ("dfget", "supernode") and os.path.exists(YML % program):
        path = YML % program
    if path.endswith((".yml", ".yaml")):
        return path, {section: _read_yml(path, section)}
    return path, read_config(path, bool(given))


def _parse(parser: Any, section: str, arguments: List[str]) -> Any:
    """Return the flags, with what the configuration's section says under them.  Raises BadUsage."""
    given = [b for a, b in zip(arguments, arguments[1:]) if a == "--config"] + [a[9:] for a in arguments if a.startswith("--config=")]
    path, config = _settings(given[-1] if given else "", section, parser.prog)
    flags = {name.lstrip("-"): action for action in parser._actions for name in action.option_strings if name.startswith("--")}
    values = {"config-service" if key == "config" else key: value for key, value in config.get(section, {}).items()}
    for key, flag in (("address", "node"), ("config", "config-service"), ("compress", "compress")):
        if key in config.get("node", {}) and flag in flags and section != "supernode":
            values.setdefault(flag, config["node"][key])
    for key, value in values.items():
        if key not in flags:
            raise BadUsage("%s: [%s] has no setting %r" % (path, section, key))
        action = flags[key]
        if action.nargs == 0:
            if value.lower() not in TRUTHS:
                raise BadUsage("[%s] %s: say true or false" % (section, key))
            parser.set_defaults(**{action.dest: TRUTHS[value.lower()]})
        elif isinstance(action.default, list) and action.type is None:  # a flag that may be repeated: one a line
            parser.set_defaults(**{action.dest: value.strip().splitlines()})
        elif action.choices and value not in action.choices:  # argparse looks at those of the command line only
            raise BadUsage("[%s] %s: %r is none of %s" % (section, key, value, ", ".join(action.choices)))
        else:
            parser.set_defaults(**{action.dest: value})
    arguments = _switches(parser, arguments)
    options = parser.parse_args(arguments)
    if hasattr(options, "home"):
        options.home = os.path.abspath(os.path.expanduser(options.home))
    if "find_nodes" in options and options.config_service:
        _with_service(options, parser, arguments, "node" in values)
    return options


def _compress_flag(parser: Any) -> None:
    _flag(parser, "--compress", choices=("auto", "off"), default="auto", help="whether pieces travel compressed where a sample says that it pays (auto)")


def _with_service(options: Any, parser: Any, arguments: List[str], configured: bool) -> None:
    """Have the supernodes found by the Config Service, unless the command line names some; those of the configuration help out."""
    parser.set_defaults(nodes=[])
    if parser.parse_args(arguments).nodes:
        options.config_service = None
        return
    known = NodeList(options.config_service, options.home, options.nodes if configured else [], options.location, options.ip)
    options.find_nodes, options.follow_nodes = known.nodes, known.follow


def _node_flags(parser: Any) -> None:
    _flag(parser, "-n", "--node", dest="nodes", type=parse_nodes, default="127.0.0.1:8002", metavar="HOST[:PORT][=WEIGHT],…", help="supernodes")
    _flag(parser, "--config-service", type=parse_service, default="", metavar="HOST[:PORT]", help="who knows the supernodes, where --node does not say")
    parser.set_defaults(find_nodes=None, follow_nodes=None)


def _common_peer_flags(parser: Any) -> None:
    _flag(parser, "--home", metavar="FOLDER", default="~/.small-dragonfly", help="work folder (default ~/.small-dragonfly)")
    _flag(parser, "--ip", type=parse_address, default="", metavar="IP", help="address that other peers shall use for this host")
    _flag(parser, "--port", type=_port, default=0, metavar="PORT", help="port of this host's uploader (default: 15000 and up)")
    _flag(parser, "--expiretime", type=parse_duration, default=180.0, help="how long a finished file is served after its last use (3m)")
    _flag(parser, "--alivetime", type=parse_duration, default=300.0, help="how long the uploader lives without work; 0: for ever (5m)")
    _flag(parser, "--totallimit", "--total-limit", type=parse_size, default=0, metavar="RATE",
          help="limit of all downloads and of all uploads of this host, e.g. 20M (none)")
    _compress_flag(parser)
    _flag(parser, "--verbose", action="store_true", help="keep debug lines in the log")


def get_parser(command: str) -> Any:
    """Return the parser of `get`.  Wire: 8.2"""
    parser = _parser(command, "Download a file through a supernode and its peers, or straight from its origin.")
    _common_peer_flags(parser)
    _flag(parser, "-u", "--url", default="", help="what to download, http or https")
    _flag(parser, "-o", "-O", "--output", default="", metavar="PATH", help="where to (default: the URL's last part)")
    _flag(parser, "-m", "--md5", default="", help="MD5 the whole file must have")
    _flag(parser, "-i", "--identifier", default="", metavar="ID", help="makes the same URL another task (not with --md5)")
    _flag(parser, "-f", "--filter", default="", metavar="a&b", help="query parameters that do not matter to which file it is")
    _node_flags(parser)
    _flag(parser, "-s", "--locallimit", type=parse_size, default=0, metavar="RATE", help="limit of this download, e.g. 20M (none)")
    _flag(parser, "--minrate", type=parse_size, default=64 << 10, metavar="RATE", help="slowest acceptable rate: sets --timeout (64K)")
    _flag(parser, "-e", "--exceed", "--timeout", dest="timeout", type=parse_duration, default=0.0, metavar="TIME",
          help="give up on the swarm after this, e.g. 30 or 30s (length / minrate + 10 s)")
    _flag(parser, "-p", "--pattern", choices=("p2p", "cdn", "source"), default="p2p", help="peers and supernode, supernode only, or origin only")
    _flag(parser, "--header", action="append", default=[], metavar="'NAME: VALUE'", help="header for the origin; may be repeated")
    _flag(parser, "--notbs", action="store_true", help="never go back to source")
    _flag(parser, "--insecure", action="store_true", help="take any certificate of the origin")
    _flag(parser, "--cacerts", type=_csv, default=[], metavar="FILE,…", help="more certificate authorities for the origin")
    _flag(parser, "--callsystem", default="", metavar="NAME", help="who is calling, for the logs")
    _flag(parser, "--dfdaemon", action="store_true", help="called by dfdaemon")
    _flag(parser, "-b", "--showbar", action="store_true", help="show progress")
    _flag(parser, "--console", action="store_true", help="log lines on standard error too")
    _flag(parser, "--clientqueue", type=_positive, default=6, metavar="N", help="accepted for compatibility")
    _flag(parser, "--location", default="", metavar="SITE/RACK", help="where this host is (default: read from its address)")
    _flag(parser, "-v", "--version", action="store_true", help="print the version")
    parser.add_argument("address", nargs="?", default="", metavar="URL", help="the same as --url")
    return parser


def _accounts(text: str) -> Dict[str, str]:
    """Return Authorization by host of `HOST=USER:PASSWORD,…`.  Raises BadUsage."""
    import base64
    found = {}
    for entry in _csv(text):
        host, mark, account = entry.partition("=")
        if not mark or ":" not in account:
            raise BadUsage("not an account: %.20s… (write HOST=USER:PASSWORD)" % entry[:5])
        found[host.strip().lower()] = "Basic " + base64.b64encode(account.encode()).decode()
    return found


def _label(text: str) -> str:
    try:
        return "/".join(parse_label(text))
    except BadRequest as error:
        raise BadUsage(str(error))


def _weight(text: str) -> int:
    if not re.match(r"^[1-9]\d{0,3}$", text):
        raise BadUsage("not a weight: %r (1 to 9999)" % text)
    return int(text)


def supernode_parser(command: str) -> Any:
    """Return the parser of `supernode`.  Wire: 9"""
    parser = _parser(command, "Track, schedule and seed downloads.")
    _flag(parser, "--home", "--home-dir", metavar="FOLDER", default="~/.small-dragonfly/supernode", help="cache and logs")
    _flag(parser, "--port", type=_port, default=SUPERNODE_PORT, help="of the API (8002; 0: any)")
    _flag(parser, "--download-port", type=_port, default=PIECE_PORT, help="of the piece files (8001; 0: any)")
    _flag(parser, "--bind", default="", metavar="IP", help="address to listen on (all)")
    _flag(parser, "--advertise-ip", type=parse_address, default="", metavar="IP", help="address that peers shall use (first of this host)")
    _flag(parser, "--max-bandwidth", type=parse_size, default=0, metavar="RATE", help="limit each way: from origins, and to peers (none)")
    _flag(parser, "--system-bandwidth", type=parse_size, default=0, metavar="RATE", help="part of --max-bandwidth left to others (0)")
    _flag(parser, "--up-limit", type=_positive, default=3, metavar="N", help="pieces a peer uploads at once (3)")
    _flag(parser, "--down-limit", type=_positive, default=4, metavar="N", help="pieces an old client downloads at once (4)")
    _flag(parser, "--seed-limit", type=_positive, default=3, metavar="N", help="first copies the supernode sends at once (3)")
    _flag(parser, "--fail-access-interval", type=parse_duration, default=5.0, help="how long a failed origin is not asked again (5s)")
    _flag(parser, "--task-expire-time", type=parse_duration, default=180.0, help="how long an unused task stays in memory (3m)")
    _flag(parser, "--allow-origins", type=HostList, default="", metavar="HOST,…", help="fetch from these only: names, .domains, networks (all)")
    _flag(parser, "--deny-origins", type=HostList, default="", metavar="HOST,…", help="never fetch from these (metadata services are denied anyway)")
    _flag(parser, "--trusted-peers", type=HostList, default="127.0.0.0/8, ::1", metavar="NETWORK,…",
          help="whose clients may name another address for others than the one they call from (127.0.0.0/8, ::1)")
    _flag(parser, "--registry-auth", type=_accounts, default="", metavar="HOST=USER:PASSWORD,…",
          help="accounts with which to preheat what registries say was pushed to them")
    _flag(parser, "--fetches", type=_positive, default=32, metavar="N", help="fetches from origins at once (32)")
    _flag(parser, "--origin-fetches", type=_positive, default=8, metavar="N", help="... from one of them (8)")
    _compress_flag(parser)
    _flag(parser, "--memory-cache", type=parse_size, default=0, metavar="SIZE", help="of this much memory a part of the cache is made, above the disk (0)")
    _flag(parser, "--memory-folder", default="", metavar="FOLDER", help="the folder of a memory file system for it (one on /dev/shm)")
    _flag(parser, "--disk-reserve", type=parse_size, default=0, metavar="SIZE", help="free space that the cache leaves (0)")
    _flag(parser, "--capacity", type=parse_size, default=0, metavar="SIZE", help="what all cached files may take (no limit)")
    _flag(parser, "--cache-expire-time", type=parse_duration, default=0.0, metavar="TIME", help="a cached file goes so long after its last use (never)")
    _flag(parser, "--young-gc-threshold", type=parse_size, default=None, metavar="SIZE",
          help="with less free space, files unused for 2 h go (100G, or a quarter of a smaller disk)")
    _flag(parser, "--full-gc-threshold", type=parse_size, default=None, metavar="SIZE",
          help="with less free space, all go that are not in use (5G, or a twentieth of a smaller disk)")
    _flag(parser, "--config-service", type=parse_service, default="", metavar="HOST[:PORT]", help="whom to tell that it is here (nobody)")
    _flag(parser, "--peers", type=parse_nodes, default="", metavar="HOST[:PORT],…",
          help="other supernodes near this one (itself may be among them): one of them asks an origin, the others ask that one (none)")
    _flag(parser, "--location", type=_label, default="", metavar="SITE/RACK", help="where this host is, for the Config Service and for siblings")
    _flag(parser, "--weight", type=_weight, default=1, metavar="N", help="its share of the URLs, for the Config Service and among siblings (1)")
    for name in ("--peer-gc-delay", "--gc-initial-delay", "--gc-meta-interval", "--gc-disk-interval"):
        _flag(parser, name, default="", metavar="X", help="accepted for compatibility")
    _flag(parser, "--cdn-pattern", choices=("local", "cdn"), default="local", help="accepted for compatibility")
    _flag(parser, "-D", "--debug", action="store_true", help="keep debug lines in the log")
    return parser


def _exiting(status: int, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `parse`, with a complaint that makes dfdaemon end with `status`.  Wire: 11.4"""
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except DflyError as error:
            raise BadSetting(str(error), status)
    convert.__name__ = parse.__name__
    return convert


def daemon_parser(command: str) -> Any:
    """Return the parser of `daemon`.  Wire: 11.3"""
    parser = _parser(command, "Be the registry mirror and HTTP proxy of this host's container engines.")
    _flag(parser, "--home", "--workhome", "--workHome", metavar="FOLDER", default="~/.small-dragonfly", help="work folder (default ~/.small-dragonfly)")
    _flag(parser, "--port", type=_exiting(14, _port), default=DAEMON_PORT, metavar="PORT", help="to listen on (65001; 0: any)")
    _flag(parser, "--hostip", "--hostIp", default="127.0.0.1", metavar="IP", help="address to listen on (127.0.0.1)")
    _flag(parser, "--registry", default="https://index.docker.io", metavar="URL", help="whose mirror this is (https://index.docker.io)")
    _node_flags(parser)
    _flag(parser, "--proxy", action="append", default=[], metavar="'REGEX [direct] [use_https] [redirect=HOST]'",
          help="rule for what is proxied; may be repeated, the first that matches counts, without one it goes straight")
    _flag(parser, "--mirror", action="append", default=[], metavar="'NAME=URL [insecure] [cacerts=FILE,…]'",
          help="a registry that containerd calls NAME (?ns=NAME), where it is not https://NAME; may be repeated")
    _flag(parser, "--open", action="append", default=[], metavar="'REGEX [insecure] [cacerts=FILE,…]'",
          help="open the HTTPS tunnels to these sites (host:port) with our CA (see daemon gen-ca); may be repeated")
    _ca_flags(parser)
    _flag(parser, "--small", type=parse_size, default=16 << 10, metavar="SIZE", help="blobs smaller than this come straight from the registry (16K)")
    _flag(parser, "--rule", type=_csv, default=[], metavar="REGEX,…", help="what else of the registry comes by the swarm, besides blobs")
    _flag(parser, "--urlfilter", default="Signature&Expires&OSSAccessKeyId", metavar="a&b", help="query parameters that do not matter to which file it is")
    _flag(parser, "--localrepo", type=_exiting(12, _absolute), default="", metavar="FOLDER", help="where blobs lie meanwhile (HOME/dfdaemon/data)")
    _flag(parser, "--expiretime", type=parse_duration, default=180.0, help="how long a blob is kept, and served to peers, after its last use (3m)")
    _flag(parser, "--ratelimit", type=_exiting(13, parse_size), default=0, metavar="RATE", help="limit of all downloads and of all uploads (none)")
    _compress_flag(parser)
    _flag(parser, "--minrate", type=parse_size, default=64 << 10, metavar="RATE", help="a swarm slower than this is left for the registry (64K),")
    _flag(parser, "--patience", type=parse_duration, default=15.0, metavar="TIME", help="... if it was so for this long (15s)")
    _flag(parser, "--insecure", action="store_true", help="take any certificate of the registry")
    _flag(parser, "--cacerts", type=_csv, default=[], metavar="FILE,…", help="more certificate authorities for the registry")
    _flag(parser, "--ip", "--localip", "--localIP", default="", metavar="IP", help="address that other peers shall use for this host")
    _flag(parser, "--peerport", "--peerPort", type=_exiting(14, _port), default=0, metavar="PORT", help="of this host's uploader (15000 and up)")
    _flag(parser, "--location", default="", metavar="SITE/RACK", help="where this host is (default: read from its address)")
    _flag(parser, "--callsystem", default="", metavar="NAME", help="who is calling, for the logs")
    _flag(parser, "--notbs", action="store_true", help="downloads never go back to source (a blob that fails is then asked of the registry as a whole)")
    _flag(parser, "--verbose", action="store_true", help="keep debug lines in the log")
    _flag(parser, "--install", choices=ENGINES, default="", help="make this host's engine ask the daemon first, and end")
    _flag(parser, "--uninstall", choices=ENGINES, default="", help="take that out again, and end")
    _flag(parser, "--dry-run", action="store_true", help="only show what --install or --uninstall would change")
    _flag(parser, "--etc", type=_absolute, default="/etc", metavar="FOLDER", help="where the engine's settings are (/etc)")
    for name in ("--dfpath", "--maxprocs", "--certpem", "--keypem"):
        _flag(parser, name, default="", metavar="X", help="not used" if "pem" in name else "accepted for compatibility")
    _flag(parser, "--streammode", "--streamMode", action="store_true", help="accepted for compatibility: it always streams")
    _flag(parser, "-v", "--version", action="store_true", help="print the version")
    return parser


def _absolute(text: str) -> str:
    if text and not os.path.isabs(text):
        raise BadUsage("not an absolute path: %r" % text)
    return text


def _go_flags(arguments: List[str]) -> List[str]:
    """Return the arguments as we read them: Go takes `-port 1` for `--port 1`."""
    return [re.sub(r"^-(?=[A-Za-z]{2})", "--", text) for text in arguments]


DAEMON_YML = "/etc/dragonfly/dfdaemon.yml"


def _from_dfget_flags(flags: List[str]) -> List[str]:
    """Return as flags of the daemon what dfdaemon.yml would have it call dfget with.  Wire: 11.2"""
    parser = get_parser("dfget_flags")
    given, arguments = parser.parse_args([str(flag) for flag in flags]), []
    for name, flag in (("ip", "--ip"), ("port", "--peerport"), ("expiretime", "--expiretime"), ("filter", "--urlfilter"), ("locallimit", "--ratelimit"),
                       ("totallimit", "--ratelimit"), ("callsystem", "--callsystem"), ("home", "--home"), ("location", "--location"),
                       ("compress", "--compress"), ("config_service", "--config-service")):
        if getattr(given, name) not in (None, parser.get_default(name)):
            arguments += [flag, str(getattr(given, name))]
    if given.nodes != parse_nodes(parser.get_default("nodes")):
        arguments += ["--node", ",".join("%s=%d" % (node, node.weight) for node in given.nodes)]
    return arguments + ["--" + name for name in ("notbs", "verbose", "insecure") if getattr(given, name)]


def _from_yml(path: str) -> List[str]:
    """Return as flags what a dfdaemon.yml says.  Raises BadUsage.  Wire: 11.3"""
    data = dict(YamlFile(path).data)
    mirror, proxies, flags = data.pop("registry_mirror", None) or {}, data.pop("proxies", None) or [], data.pop("dfget_flags", None) or []
    data.pop("logConfig", None)
    hijack = data.pop("hijack_https", None) or {}
    sites = hijack.get("hosts") or [] if isinstance(hijack, dict) else [""]
    if not isinstance(sites, list) or not all(isinstance(site, dict) for site in sites):
        raise BadUsage("%s: hijack_https is a map, its hosts a list of maps" % path)
    if not isinstance(mirror, dict) or not isinstance(flags, list) or not isinstance(proxies, list) or not all(isinstance(rule, dict) for rule in proxies):
        raise BadUsage("%s: registry_mirror is a map, proxies a list of maps, dfget_flags a list" % path)
    data.update({name: mirror.pop(key) for key, name in (("remote", "registry"), ("insecure", "insecure"), ("certs", "cacerts")) if key in mirror})
    if "supernodes" in data:
        data["node"] = data.pop("supernodes")
    if any(mirror.values()):
        raise BadUsage("%s: registry_mirror has what is not part of this version: %s" % (path, ", ".join(mirror)))
    arguments = _from_dfget_flags(flags)
    for key, value in data.items():
        arguments += ["--" + key] if value is True else ["--%s=%s" % (key, ",".join(value) if isinstance(value, list) else value)] if value else []
    arguments += ["--ca-%s=%s" % (name, hijack[name]) for name in ("cert", "key") if hijack.get(name)]
    for site in sites:
        words = [str(site.get("regx", ""))] + ["insecure"] * (site.get("insecure") is True)
        arguments.append("--open=" + " ".join(words + (["cacerts=" + ",".join(site["certs"])] if site.get("certs") else [])))
    for rule in proxies:
        words = [str(rule.get("regx", ""))] + [word for word in ("direct", "use_https") if rule.get(word) is True]
        arguments += ["--proxy=" + " ".join(words + (["redirect=" + rule["redirect"]] if rule.get("redirect") else []))]
    return arguments


def _with_yml(arguments: List[str], old: bool) -> List[str]:
    """Return the arguments with those of a dfdaemon.yml, if that is the configuration, before them."""
    for at, text in enumerate(arguments):
        name, _, path = text.partition("=")
        count = 1 if path else 2
        path = path or "".join(arguments[at + 1:at + 2])
        if name == "--config" and path.endswith((".yml", ".yaml")):
            return _from_yml(path) + arguments[:at] + arguments[at + count:]
        if name == "--config":
            return arguments
    return (_from_yml(DAEMON_YML) if old and os.path.exists(DAEMON_YML) else []) + arguments


def _daemon_options(options: Any, trust: Callable[[str], Tuple[bool, List[str]]]) -> Callable[[str], Any]:
    """Return what makes the flags of `get` for a URL that the daemon downloads; whom to `trust` is the URL's own.  Wire: 11.2"""
    import copy
    template = _parse(get_parser("dfly.py daemon"), "get", ["--config", options.config] if options.config else [])
    template.home, template.nodes, template.ip, template.location = options.home, options.nodes, options.ip, options.location or template.location
    template.find_nodes = options.find_nodes
    template.port, template.expiretime = options.peerport, options.expiretime
    template.locallimit = template.totallimit = options.ratelimit
    template.filter, template.callsystem, template.notbs, template.dfdaemon = options.urlfilter, options.callsystem, options.notbs, True
    template.verbose, template.console, template.showbar = options.verbose, False, False
    template.minrate, template.patience, template.compress = options.minrate, options.patience, options.compress

    def options_for(url: str) -> Any:
        made = copy.copy(template)
        made.url = url
        made.insecure, made.cacerts = trust(url)
        return made

    return options_for


def _ca_flags(parser: Any) -> None:
    _flag(parser, "--ca-cert", "--cacert", default="", metavar="FILE", help="certificate of the CA for --open (HOME/dfdaemon/ca.crt)")
    _flag(parser, "--ca-key", "--cakey", default="", metavar="FILE", help="its private key (HOME/dfdaemon/ca.key)")


def _ca_paths(options: Any) -> None:
    options.ca_cert = os.path.abspath(options.ca_cert or os.path.join(options.home, "dfdaemon", "ca.crt"))
    options.ca_key = os.path.abspath(options.ca_key or os.path.join(options.home, "dfdaemon", "ca.key"))


def config_parser() -> Any:
    """Return the parser of `config`."""
    parser = _parser("dfly.py config", "Be the Config Service: know which supernodes there are, and tell clients the nearest.")
    _flag(parser, "--home", metavar="FOLDER", default="~/.small-dragonfly/config", help="what it knows, and logs")
    _flag(parser, "--port", type=_port, default=CONFIG_PORT, help="to listen on (8004; 0: any)")
    _flag(parser, "--bind", "--ip", default="", metavar="IP", help="address to listen on (all)")
    _flag(parser, "--subnet", action="append", default=[], metavar="NETWORK=SITE/RACK", help="where hosts that do not say it are; may be repeated")
    _flag(parser, "--supernodes", type=HostList, default="", metavar="NETWORK,…", help="from where supernodes may register (all)")
    _flag(parser, "--interval", type=parse_duration, default=HEARTBEAT_S, help="between two words of a supernode; after three it is unhealthy (10s)")
    _flag(parser, "--refresh", type=parse_duration, default=REFRESH_S, help="how long clients use the same list (1m)")
    return parser


def preheat_parser() -> Any:
    """Return the parser of `preheat`."""
    parser = _parser("dfly.py preheat", "Have a file or an image on the supernodes before anybody asks for it.")
    parser.add_argument("what", metavar="URL|IMAGE", help="http(s) URL of a file or a manifest, or an image as docker names it")
    _flag(parser, "-n", "--node", dest="nodes", type=parse_nodes, default="127.0.0.1:8002", metavar="HOST[:PORT][=WEIGHT],…", help="supernodes: all of them")
    _flag(parser, "--config-service", type=parse_service, default="", metavar="HOST[:PORT]", help="who knows the supernodes, where --node does not say")
    _flag(parser, "--location", type=_label, default="", metavar="SITE/RACK", help="those that the Config Service knows there only")
    _flag(parser, "-f", "--filter", default="", metavar="a&b", help="query parameters that do not matter to which file it is")
    _flag(parser, "-i", "--identifier", default="", metavar="ID", help="makes the same URL another task")
    _flag(parser, "--header", action="append", default=[], metavar="'NAME: VALUE'", help="header for the origin or the registry; may be repeated")
    _flag(parser, "--user", default="", metavar="NAME:PASSWORD", help="account at the origin or the registry")
    _flag(parser, "--plain-http", action="store_true", help="an image's registry speaks HTTP without TLS")
    _flag(parser, "--insecure", action="store_true", help="take any certificate of the origin")
    _flag(parser, "--no-wait", action="store_true", help="do not wait for the end")
    _flag(parser, "--timeout", type=parse_duration, default=1800.0, metavar="TIME", help="longest wait for the end (30m)")
    return parser


# ==============================================================================
# 31. Programs
#    What each command does with its flags; main.
# ==============================================================================

def run_get(arguments: List[str], old: bool) -> int:
    """`get` and `dfget`: download; return the exit status."""
    options = _parse(get_parser("dfget" if old else "dfly.py get"), "get", arguments)
    if options.version:
        print("dfget version:%s" % VERSION)
        return 0
    options.url = options.url or options.address
    if not options.url:
        raise BadUsage("say what to download with -u URL")
    if not re.match(r"^https?://[^/\s]+", options.url, re.I):
        raise BadUsage("not an http(s) URL: %r" % options.url)
    if options.md5 and not re.match(r"^[0-9a-fA-F]{32}$", options.md5):
        raise BadUsage("not an MD5: %r" % options.md5)
    if not options.minrate:
        raise BadUsage("--minrate must be more than 0")
    if options.cacerts:
        tls_context(options.insecure, options.cacerts)

    try:
        download = Download(options)
    except BadRequest as error:
        raise BadUsage(str(error))
    try:
        download.run()
    except FinalFailure as failure:
        download.last_lines(failure)
        return failure.old_exit if old else failure.exit
    download.last_lines(None)
    return 0


def run_peer(arguments: List[str]) -> int:
    """`peer`: be this host's uploader, in the foreground.  Wire: 7"""
    parser = _parser("dfly.py peer", "Serve this host's downloads to other peers; `get` starts one by itself.")
    _common_peer_flags(parser)
    for name in ("--meta", "--data"):  # as dfget 1.0 starts its own
        _flag(parser, name, default="", metavar="PATH", help="accepted for compatibility")
    options = _parse(parser, "peer", arguments)
    run_uploader(options.home, "", options.port, options.expiretime, options.alivetime, options.totallimit,
                 options.compress != "off", options.verbose, lambda port: print("dfget uploader server port is %d" % port, flush=True))
    return 0


def first_address() -> str:
    """Return this host's first IPv4 address that is not a loopback one, else 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing: it only asks the routing table
            return sock.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def warm_up() -> None:
    """Load, aside, what the first request to an origin would else wait for: a fifth of a second on small hosts."""
    def load() -> None:
        import http.client  # noqa: F401
        import urllib.request
        urllib.request.getproxies()
        "name".encode("idna")  # as each connection does, the first one for a millisecond
        tls_context(False, ())

    threading.Thread(target=load, name="dfly-warm-up", daemon=True).start()


def many_descriptors() -> None:
    """Allow this process as many open connections as the system does."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # not allowed here: the soft limit will do
            pass


def ended_by_signal() -> threading.Event:
    """Return what SIGTERM and SIGINT set."""
    ended = Ending()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    return ended


def _disk_rules(options: Any) -> DiskRules:
    """Return the rules for the disk of a cache, as far as they are not given made for its size.  Wire: 10.4"""
    stat = os.statvfs(options.home)
    whole = stat.f_blocks * stat.f_frsize
    young, full = options.young_gc_threshold, options.full_gc_threshold
    return DiskRules(options.disk_reserve, options.capacity, options.cache_expire_time,
                     min(100 << 30, whole // 4) if young is None else young, min(5 << 30, whole // 20) if full is None else full)


def _memory_shelf(options: Any) -> Optional[MemoryShelf]:
    """Return the part of the cache that lies in memory, None where there is to be none; then what an earlier run had there goes."""
    name = "dfly-%d-%s" % (os.getuid(), hashlib.sha256(os.path.abspath(options.home).encode("utf-8", "surrogateescape")).hexdigest()[:16])
    folder = options.memory_folder or os.path.join("/dev/shm", name)
    if not options.memory_cache:
        if not options.memory_folder and os.path.isdir(folder) and os.lstat(folder).st_uid == os.getuid():
            import shutil
            shutil.rmtree(folder, ignore_errors=True)
        return None
    make_folder(folder, 0o700)
    if os.lstat(folder).st_uid != os.getuid() or os.path.islink(folder):
        raise CannotWrite("%s belongs to somebody else" % folder)
    return MemoryShelf(os.path.join(folder, "download"), options.memory_cache)


def run_supernode(arguments: List[str], old: bool = False) -> int:
    """`supernode`: serve until a signal comes."""
    options = _parse(supernode_parser("supernode" if old else "dfly.py supernode"), "supernode", arguments)
    if options.max_bandwidth and options.system_bandwidth >= options.max_bandwidth:
        raise BadUsage("--system-bandwidth leaves nothing of --max-bandwidth")
    many_descriptors()
    log = Log(os.path.join(options.home, "logs", "app.log"), str(os.getpid()), options.debug)
    make_folder(options.home)
    lock = FileLock(os.path.join(options.home, "supernode.lock"))
    if not lock.acquire(2.0):
        raise CannotWrite("%s: another supernode uses this home" % options.home)
    rate = options.max_bandwidth - options.system_bandwidth if options.max_bandwidth else 0
    cdn = Cdn(options.home, log, TokenBucket(rate), options.fail_access_interval, _disk_rules(options), Turns(options.fetches, options.origin_fetches),
              memory=_memory_shelf(options))
    scheduler = Scheduler(up_slots=options.up_limit, seed_slots=options.seed_limit)
    ip = options.advertise_ip or first_address()
    swarm = Swarm(ip, log, scheduler, cdn, options.task_expire_time, time.monotonic)
    fence = Fence(options.allow_origins, options.deny_origins)
    preheats = Preheats(swarm, fence, log, options.registry_auth)
    api_sock, piece_sock = listen(options.bind, options.port), listen(options.bind, options.download_port)
    sibling = {"node": join_host(ip, api_sock.getsockname()[1]), "weight": options.weight, "instance": os.urandom(16).hex()}
    if options.peers:
        cdn.siblings = Siblings(options.peers, sibling, piece_sock.getsockname()[1], options.location, cdn.bucket,
                                 Turns(options.fetches, options.fetches), log, options.compress != "off")
    supernode = Supernode(swarm, preheats, ip, log, fence, options.trusted_peers, options.down_limit,
                          squeezer=Squeezer(64 << 20) if options.compress != "off" else None, about=sibling)
    api = Server(api_sock, Supernode.ROUTES, supernode, log, "api")
    pieces = Server(piece_sock, Supernode.PIECE_ROUTES, supernode, log, "pieces", TokenBucket(rate))
    about = {"ip": ip, "port": api.address[1], "label": options.location, "weight": options.weight, "version": VERSION}
    announcer = Announcer(options.config_service, about, supernode.load, log) if options.config_service else None
    ended = ended_by_signal()
    supernode.serve(api, pieces)
    warm_up()
    if announcer:
        announcer.start()
    if cdn.siblings:
        cdn.siblings.start()
    log.info("supernode %s on %s, %s", VERSION, join_host(ip, api.address[1]), accelerator())
    print("supernode listening on %s pieces on %s" % (join_host(ip, api.address[1]), join_host(ip, pieces.address[1])), flush=True)
    while not ended.wait(0.5):  # a signal that comes just before the wait would else be seen after it
        pass
    if announcer:
        announcer.stop()
    if cdn.siblings:
        cdn.siblings.stop()
    supernode.stop()
    lock.release()
    log.info("supernode ends")
    log.close()
    return 0


def _daemon_folders(options: Any) -> FileLock:
    """Make the daemon's folders; return the lock that it must hold.  Raises BadSetting."""
    _exiting(11, make_folder)(options.home)
    options.localrepo = options.localrepo or os.path.join(options.home, "dfdaemon", "data")
    _exiting(16, make_folder)(options.localrepo)
    lock = FileLock(os.path.join(options.localrepo, "dfdaemon.lock"))
    if not _exiting(16, lambda _: lock.acquire(2.0))(""):
        raise BadSetting("%s: another daemon uses this folder" % options.localrepo, 16)
    return lock


def _not_through_us(hosts: Tuple[str, ...], port: int) -> None:
    """Don't use ourselves as the proxy on the way to an origin, if the environment says so."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        where = urlsplit(os.environ[name])
        if where.hostname in hosts and where.port == port:
            del os.environ[name]


def _registries(options: Any) -> List[Registry]:
    """Return the registries that a daemon is a mirror of.  Raises BadSetting."""
    return [Registry("", options.registry.rstrip("/"), options.insecure, tuple(options.cacerts))] + [Registry.parse(text) for text in options.mirror]


def _trust_of(registries: List[Registry], opened: List[Opened], site: str) -> Tuple[bool, List[str]]:
    """Return whether any certificate of a site is good, and the CAs that count there besides the system's."""
    for registry in registries:
        if urlsplit(registry.url).netloc == site:
            return registry.insecure, list(registry.cacerts)
    found = [known for known in opened if known.pattern.search(site if re.search(r":\d+$", site) else site + ":443")]
    return (found[0].insecure, list(found[0].cacerts)) if found else (False, [])


def run_gen_ca(arguments: List[str]) -> int:
    """`daemon gen-ca`: make a CA for `--open`."""
    parser = _parser("dfly.py daemon gen-ca", "Make a certificate authority with which the daemon may open HTTPS tunnels (--open).")
    _flag(parser, "--home", metavar="FOLDER", default="~/.small-dragonfly", help="work folder (default ~/.small-dragonfly)")
    _ca_flags(parser)
    _flag(parser, "--force", action="store_true", help="replace one that is there")
    options = parser.parse_args(arguments)
    options.home = os.path.abspath(os.path.expanduser(options.home))
    _ca_paths(options)
    for path in (options.ca_cert, options.ca_key):
        if os.path.exists(path) and not options.force:
            raise BadUsage("%s is there already: --force replaces it, and who trusts it has to be told" % path)
        make_folder(os.path.dirname(path))
    Authority.make_ca(options.ca_cert, options.ca_key)
    print("written %s\nwritten %s (keep it secret: who has it can be any site to those who trust the first)" % (options.ca_cert, options.ca_key))
    print("now: dfly.py daemon --open 'REGEX'; and on the engine's host, once:\n"
          "  Debian, Ubuntu  cp %s /usr/local/share/ca-certificates/dfly.crt && update-ca-certificates\n"
          "  RHEL, SLES      cp %s /etc/pki/ca-trust/source/anchors/dfly.crt && update-ca-trust\n"
          "  docker only     cp %s /etc/docker/certs.d/REGISTRY/ca.crt" % ((options.ca_cert,) * 3))
    return 0


def _set_up(options: Any) -> int:
    """`daemon --install ENGINE`, `--uninstall ENGINE`: change the settings of an engine, or with --dry-run show how; return the status."""
    if options.install and options.uninstall:
        raise BadUsage("--install and --uninstall: one of them")
    registries = _registries(options)
    site = urlsplit(registries[0].url).netloc
    names = ["docker.io" if site in ("index.docker.io", "registry-1.docker.io") else site] + [registry.name for registry in registries[1:]]
    settings = EngineSettings(options.install or options.uninstall, options.etc, "http://" + join_host(options.hostip, options.port), names)
    edits = settings.install() if options.install else settings.uninstall()
    for edit in edits:
        if options.dry_run:
            sys.stdout.write(edit.shown())
        else:
            edit.apply()
            print("%s %s" % ("removed" if edit.after is None else "written", edit.path))
    if not edits:
        print("nothing to do: %s" % ("it is there already" if options.install else "nothing of ours is there"))
    elif settings.next_step() and not options.dry_run:
        print("now: %s" % settings.next_step())
    others = settings.overruled() if options.install else []
    if others:
        print("not through the daemon, since containerd prefers a registry's own to _default: %s" % ", ".join(others))
    return 0


def run_daemon(arguments: List[str], old: bool) -> int:
    """`daemon` and `dfdaemon`: serve until a signal comes.  Wire: 11"""
    if arguments[:1] == ["gen-ca"]:
        return run_gen_ca(arguments[1:])
    options = _parse(daemon_parser("dfdaemon" if old else "dfly.py daemon"), "daemon", _with_yml(_go_flags(arguments), old))
    if options.version:
        print("dfdaemon version:%s" % VERSION)
        return 0
    if not re.match(r"^https?://[^/\s]+", options.registry, re.I):
        raise BadSetting("not an http(s) URL: --registry %r" % options.registry, 10)
    if urlsplit(options.registry).netloc in ["%s:%d" % (host, options.port) for host in ("127.0.0.1", "localhost", options.hostip)]:
        raise BadSetting("--registry %s leads back to this daemon" % options.registry, 10)
    if not options.minrate or not options.patience:
        raise BadSetting("--minrate and --patience must be more than 0", 10)
    if options.certpem or options.keypem:
        raise BadSetting("--certpem, --keypem: this daemon speaks plain HTTP to its own host's engines only", 10)
    if options.install or options.uninstall:
        return _set_up(options)
    _ca_paths(options)
    rules = [Rule.parse(text) for text in options.proxy]
    selected = [Rule.parse(text).pattern for text in options.rule]
    registries, opened = _registries(options), [Opened.parse(text) for text in options.open]
    upstream = Upstream(functools.partial(_trust_of, registries, opened))
    options_for = _daemon_options(options, upstream.trust)
    lock = _daemon_folders(options)
    certs = os.path.join(options.home, "dfdaemon", "certs")
    authority = _exiting(10, lambda folder: Authority(options.ca_cert, options.ca_key, folder))(certs) if opened else None
    log = Log(os.path.join(options.home, "logs", "dfdaemon.log"), str(os.getpid()), options.verbose)
    sock = _exiting(14, lambda host: listen(host, options.port))(options.hostip)
    companion = Companion(options.home, ["--port", str(options.peerport), "--expiretime", "%g" % options.expiretime,
                                         "--totallimit", str(options.ratelimit), "--compress", options.compress])
    settings = {name: value for name, value in vars(options).items() if isinstance(value, (str, int, float, list)) and name != "nodes"}
    blobs = Blobs(options.localrepo, log, options_for, options.expiretime, companion.port)
    daemon = Daemon(registries, rules, selected, opened, authority, options.small, upstream, blobs, log,
                    dict(settings, nodes=[str(node) for node in options.nodes], config_service=str(options.config_service or "")))
    door = Doorway(sock, daemon, log)
    _not_through_us((options.hostip, "127.0.0.1", "localhost"), door.address[1])
    ended = ended_by_signal()
    if options.follow_nodes:
        threading.Thread(target=options.follow_nodes, args=(ended, log), name="dfly-nodes", daemon=True).start()
    threading.Thread(target=companion.port, name="dfly-companion", daemon=True).start()  # the first blob would wait for it
    warm_up()
    sys.setswitchinterval(0.0005)  # a dozen threads work on one blob, and the one that sends it on should not be the last to know
    daemon.serve(door, ended)
    companion.close()
    lock.release()
    log.close()
    return 0


def run_config(arguments: List[str]) -> int:
    """`config`: serve until a signal comes."""
    options = _parse(config_parser(), "config", arguments)
    if not 0.05 <= options.interval <= 3600 or not 0.1 <= options.refresh <= AGE_MOST_S:
        raise BadUsage("--interval is 50ms to 1h, --refresh 100ms to 24h")
    many_descriptors()
    subnets = Subnets(options.subnet)
    lock = FileLock(os.path.join(make_folder(options.home), "config.lock"))
    if not lock.acquire(2.0):
        raise CannotWrite("%s: another Config Service uses this home" % options.home)
    log = Log(os.path.join(options.home, "logs", "config.log"), str(os.getpid()))
    service = ConfigService(Directory(os.path.join(options.home, "directory.json"), subnets, options.interval, log), options.refresh, options.supernodes)
    server = Server(listen(options.bind, options.port), ConfigService.ROUTES, service, log, "config")
    ended = ended_by_signal()
    service.serve(server)
    where = join_host(options.bind or first_address(), server.address[1])
    log.info("Config Service %s on %s", VERSION, where)
    print("config service listening on %s" % where, flush=True)
    while not ended.wait(0.5):  # as in a supernode
        pass
    service.stop()
    lock.release()
    log.close()
    return 0


def run_status(arguments: List[str]) -> int:
    """`status`: show what a daemon does and has done."""
    parser = _parser("dfly.py status", "Show what the daemon of this host is doing, and what it has done.")
    parser.add_argument("address", nargs="?", default="127.0.0.1", metavar="HOST[:PORT]", help="where it listens (127.0.0.1:%d)" % DAEMON_PORT)
    _flag(parser, "--json", action="store_true", help="as it says it itself")
    options = parser.parse_args(arguments)
    host, port = split_host(options.address, DAEMON_PORT)
    pool = Pool(10.0, 3.0)
    try:
        code, text = pool.ask(host, port, "GET", "/_dfly/status")
    finally:
        pool.close()
    try:
        found = json.loads(text.decode())
        lines = [text.decode()] if options.json else _status_lines(found)
    except (ValueError, KeyError, TypeError):
        raise NetworkError("%s answers %d, and not as a daemon does" % (join_host(host, port), code))
    print("\n".join(lines))
    return 0


def _status_lines(found: Dict[str, Any]) -> List[str]:
    """Return a daemon's status as a person reads it.  Raises KeyError, TypeError."""
    counts = found["counts"]
    lines = ["daemon %s, since %s, mirror of %s" % (found["version"], time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"])),
                                                 ", ".join(found["mirrors"])),
             "%d blobs, %s served; fetched %s, from: %s" % (counts["blobs"], show_size(counts["blob_bytes"]), show_size(sum(found["sources"].values())),
                                                            show_shares(found["sources"])),
             "%d straight instead, %d other requests passed on, %d tunnels" % (counts["fallbacks"], counts["relayed"], counts["tunnels"])]
    for blob in found["running"]:
        lines.append("  now   %s  %s of %s  %s  %d clients" % (blob["blob"], show_size(blob["bytes"]), show_size(blob["length"] or 0),
                                                              show_time(blob["seconds"]), blob["clients"]))
    for blob in reversed(found["recent"]):
        lines.append("  %s  %s  %s in %s, from: %s%s" % (time.strftime("%H:%M:%S", time.localtime(blob["at"])), blob["blob"], show_size(blob["bytes"]),
                                                         show_time(blob["seconds"]), show_shares(blob["sources"]), blob["error"] and "; " + blob["error"]))
    return lines


def run_preheat(arguments: List[str]) -> int:
    """`preheat`: tell supernodes to fetch something, and wait until they have."""
    options = _parse(preheat_parser(), "preheat", arguments)
    url = options.what if "://" in options.what else image_url(options.what, options.plain_http)
    headers = dict(parse_headers(options.header))
    if options.user:
        headers["Authorization"] = list(_accounts("x=" + options.user).values())[0]
    order = {"type": "image" if re.search(r"/v2/.+/manifests/[^/?#]+$", url) else "file", "url": url, "filter": options.filter,
             "identifier": options.identifier, "headers": headers, "insecure": options.insecure}
    nodes = options.nodes
    if options.config_service and not any(word == "-n" or word.startswith("--node") for word in arguments):
        nodes, order["label"] = [options.config_service], options.location
    pool = Pool(10.0, 3.0)
    try:
        begun = [(node, str(ask_json(pool, node, "POST", "/preheats", order).get("ID"))) for node in nodes]
        deadline = time.monotonic() + options.timeout
        for node, number in begun:
            if options.no_wait:
                print("%s: %s begun" % (node, number))
            else:
                _await_preheat(pool, node, number, deadline)
    finally:
        pool.close()
    return 0


def _await_preheat(pool: Pool, node: Node, number: str, deadline: float) -> None:
    """Wait for the end of a preheat, and say how it was.  Raises SourceError, TimedOut."""
    began = told = time.monotonic()
    pause = 0.05
    while True:
        found = ask_json(pool, node, "GET", "/preheats/" + number)
        now = time.monotonic()
        if found.get("status") == Preheat.SUCCESS:
            print("%s: there, after %.1f s" % (node, now - began), flush=True)
            return
        if found.get("status") == Preheat.FAILED:
            raise SourceError("supernode %s: %s" % (node, found.get("errorMsg", "failed")))
        if now > deadline:
            raise TimedOut("supernode %s: not there yet; it goes on" % str(node))
        if now - told > 5.0:
            told = now
            print("%s: fetching since %.0f s" % (node, now - began), flush=True)
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def run_demo(arguments: List[str]) -> int:
    """`demo`: show the main job on a bare machine."""
    import shutil
    import tempfile
    _parser("dfly.py demo", "Run an origin, a supernode and four peers on loopback; show who sent what to whom.").parse_args(arguments)
    folder = tempfile.mkdtemp(prefix="dfly-demo-")
    try:
        return Demo(folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_version(_arguments: List[str]) -> int:
    """`version`: print it."""
    print("dfly %s (%s)" % (VERSION, accelerator()))
    return 0


COMMANDS = {"get": lambda arguments: run_get(arguments, old=False), "supernode": run_supernode, "peer": run_peer,
            "daemon": lambda arguments: run_daemon(arguments, old=False), "config": run_config, "status": run_status, "preheat": run_preheat,
            "demo": run_demo, "version": run_version}  # type: Dict[str, Callable[[List[str]], int]]


def run_dfget(arguments: List[str]) -> int:
    """Act as dfget: its own subcommands, else a download."""
    if arguments[:1] == ["version"]:
        print("dfget version:%s" % VERSION)
        return 0
    if arguments[:1] == ["server"]:
        return run_peer(arguments[1:])
    return run_get(["--help"] if arguments[:1] == ["help"] else arguments, old=True)


def _chosen(program: str, arguments: List[str]) -> Tuple[str, Callable[[], int]]:
    """Return the name to speak under and what to do, from the link's name or the first word."""
    if program == "dfget":
        return program, lambda: run_dfget(arguments)
    if program == "supernode":
        return program, lambda: run_version(arguments) if arguments[:1] == ["version"] else run_supernode(arguments, old=True)
    if program == "dfdaemon":
        if arguments[:1] == ["peer"]:  # its own uploader, in a copy of the file that bears this name
            return program, lambda: run_peer(arguments[1:])
        return program, lambda: run_daemon(["--version"] if arguments[:1] == ["version"] else arguments, old=True)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(__doc__.split("The map:")[0].rstrip() if __doc__ else USAGE)
        return program, lambda: 0 if arguments else 2
    if command in ("-v", "--version"):
        command = "version"
    if command not in COMMANDS:
        raise BadUsage("no command %r: %s" % (command, USAGE))
    return "dfly.py " + command, lambda: COMMANDS[command](arguments[1:])


def main(argv: List[str]) -> int:
    """Run the program that `argv` (its name first) asks for; return the exit status, below 128."""
    program = re.sub(r"\.py$", "", os.path.basename(argv[0]))
    old = program == "dfget"
    try:
        program, act = _chosen(program, argv[1:])
        return act()
    except DflyError as error:
        sys.stderr.write("%s: %s\n" % (program, " ".join(str(error).split())))
        if program == "dfdaemon":
            return getattr(error, "daemon_exit", 10)
        return error.old_exit if old else error.exit
    except BrokenPipeError:  # whoever read our lines has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("%s: interrupted\n" % program)
        return 127


def leave(status: int) -> None:
    """End the process at once.  Taking every object apart first takes a third of the time of a small download; who looks for
    what was left open (`-W`) gets it."""
    if sys.warnoptions:
        sys.exit(status)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads it any more
        status = status or 1
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv))
