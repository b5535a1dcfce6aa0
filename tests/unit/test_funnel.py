"""Bytes from a socket into a file, by a pipe of the kernel's or by a buffer: the same bytes, ends and errors either way."""
import errno
import hashlib
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time

import dfly
import pytest

DATA = random.Random(7).getrandbits(8 * 3000000).to_bytes(3000000, "big")


@pytest.fixture(params=["buffer"] + ["pipe"] * dfly.Funnel(1).splices)
def funnel(request):
    """A funnel that goes one of the ways that there are here; the pipe is the accelerator's where that is in use."""
    funnel = dfly.Funnel(1 << 16)
    if request.param == "buffer":
        funnel.splices = False
    yield funnel
    funnel.close()


@pytest.fixture
def ends():
    """A link of ours, and the socket at its other end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        ours = socket.create_connection(listener.getsockname())
        other = listener.accept()[0]
    with other, ours:
        yield dfly.HttpLink("127.0.0.1", 1, timeout_s=5.0, sock=ours), other


@pytest.fixture
def target(tmp_path):
    """The descriptor of an empty file."""
    fd = os.open(str(tmp_path / "file"), os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def send(other, data, sizes):
    """Send bytes in pieces of these sizes, in turn, on a thread of its own."""
    def run():
        at = 0
        try:
            while at < len(data):
                size = sizes[at % len(sizes)]
                other.sendall(data[at:at + size])
                at += size
        except OSError:  # it was enough
            pass
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def pour_all(link, funnel, fd, offset, total, step, behind=0):
    """Pour `total` bytes, `step` at a time; return how many came."""
    got = 0
    while got < total:
        count = min(step, total - got)
        done, wrong = link.pour(funnel, fd, offset + got, count, total - got - count + behind)
        assert not wrong and done <= count
        if not done:
            break
        got += done
    return got


@pytest.mark.parametrize("heap", [False, True])
@pytest.mark.parametrize("step", [1 << 18, 100001, 1 << 16])
def test_what_is_sent_is_in_the_file(funnel, ends, target, step, heap):
    link, other = ends
    if heap:
        link.keep_short(1e7)
    other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sender = send(other, DATA, [1, 70000, 1448, 3])
    assert pour_all(link, funnel, target, 5, len(DATA) - 10, step, behind=10) == len(DATA) - 10
    assert link.read_exactly(10) == DATA[-10:]
    sender.join()
    assert os.pread(target, len(DATA), 5) == DATA[:-10] and os.fstat(target).st_size == len(DATA) - 5


def test_a_pipe_full_of_crumbs_moves_on(funnel, ends, target):
    link, other = ends
    other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(0, 20000, 10):
        other.send(DATA[at:at + 10])
    assert pour_all(link, funnel, target, 0, 20000, 1 << 18) == 20000
    assert os.pread(target, 30000, 0) == DATA[:20000]


def test_what_was_read_ahead_comes_first(funnel, ends, target):
    link, other = ends
    other.sendall(b"head\n" + DATA[:3000])
    assert link.read_line() == b"head"
    assert pour_all(link, funnel, target, 0, 3000, 1 << 18) == 3000
    assert os.pread(target, 4000, 0) == DATA[:3000]


def test_the_end_of_a_connection_ends_it(funnel, ends, target):
    link, other = ends
    other.sendall(DATA[:1000])
    other.close()
    assert pour_all(link, funnel, target, 0, 5000, 1 << 18) == 1000
    assert os.pread(target, 5000, 0) == DATA[:1000]


@pytest.mark.parametrize("heap", [False, True])
def test_silence_has_a_limit_and_what_came_before_it_is_kept(funnel, ends, target, heap):
    link, other = ends
    if heap:
        link.keep_short(1e7)
    link.set_timeout(0.3)
    other.sendall(DATA[:1000])
    assert link.pour(funnel, target, 0, 5000, 1 << 20) == (1000, None)
    with pytest.raises(dfly.TimedOut):
        link.pour(funnel, target, 1000, 5000, 1 << 20)
    other.sendall(DATA[1000:2000])
    assert link.pour(funnel, target, 1000, 1000) == (1000, None)
    assert os.pread(target, 5000, 0) == DATA[:2000]


def test_a_broken_connection_is_an_error_and_the_funnel_goes_on(funnel, ends, target):
    link, other = ends
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    other.close()  # by a reset
    with pytest.raises(dfly.NetworkError):
        link.pour(funnel, target, 0, 5000)
    ours, other = socket.socketpair()
    with ours, other:
        other.sendall(DATA[:100])
        assert dfly.HttpLink("127.0.0.1", 1, sock=ours).pour(funnel, target, 0, 100) == (100, None)


def test_a_full_disk_is_said_and_no_byte_of_before_comes_later(funnel, ends, target, tmp_path):
    if os.getuid():
        pytest.skip("needs root for a small disk")
    disk = str(tmp_path / "disk")
    os.mkdir(disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], check=True)
    try:
        full = os.open(disk + "/file", os.O_RDWR | os.O_CREAT)
        link, other = ends
        sender, at, wrong = send(other, DATA[:1 << 20], [1 << 16]), 0, None
        while not wrong:
            done, wrong = link.pour(funnel, full, at, 1 << 18, 1 << 18)
            at += done
        assert wrong.errno == errno.ENOSPC
        os.close(full)
        link.interrupt()
        other.close()
        sender.join()
    finally:
        subprocess.run(["umount", disk], check=True)
    ours, other = socket.socketpair()
    with ours, other:
        other.sendall(DATA[:100])
        assert dfly.HttpLink("127.0.0.1", 1, sock=ours).pour(funnel, target, 0, 100) == (100, None)
    assert os.pread(target, 200, 0) == DATA[:100]


def test_a_file_that_takes_nothing_from_pipes_is_written_by_the_buffer(funnel, ends, tmp_path):
    """One that is only appended to does not."""
    link, other = ends
    fd = os.open(str(tmp_path / "log"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    sender = send(other, DATA, [70000])
    assert pour_all(link, funnel, fd, 0, len(DATA), 1 << 18) == len(DATA)
    assert not funnel.splices
    assert os.pread(fd, len(DATA) + 1, 0) == DATA
    sender.join()
    os.close(fd)


def test_where_sockets_can_not_be_spliced_the_buffer_takes_over(funnel, ends, target, monkeypatch):
    monkeypatch.setattr(dfly, "splice_all", lambda *_: (0, 0, errno.EPERM, 0))
    link, other = ends
    other.sendall(DATA[:1000])
    assert link.pour(funnel, target, 0, 1000) == (1000, None) and not funnel.splices
    assert os.pread(target, 2000, 0) == DATA[:1000]


def test_a_process_that_may_open_no_more_files_takes_the_buffer(ends, target):
    link, other = ends
    other.sendall(DATA[:1000])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        funnel = dfly.Funnel(1 << 16)
        assert link.pour(funnel, target, 0, 1000) == (1000, None) and not funnel.splices
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert os.pread(target, 2000, 0) == DATA[:1000]


def test_a_call_ends_while_the_bytes_still_come(funnel, ends, target):
    link, other = ends
    other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.set_timeout(0.5)
    stop = threading.Event()

    def drip():
        while not stop.wait(0.1):
            other.send(b"x" * 10)
    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    done, wrong = link.pour(funnel, target, 0, 1 << 16)
    stop.set()
    thread.join()
    assert 0 < done < 300 and not wrong and time.monotonic() - began < 3


class _Signalled(Exception):
    pass


def test_a_signal_is_heard_while_nothing_comes(funnel, ends, target):
    def hear(*_):
        raise _Signalled()
    link, other = ends
    link.set_timeout(20)
    before = signal.signal(signal.SIGALRM, hear)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        began = time.monotonic()
        with pytest.raises(_Signalled):
            link.pour(funnel, target, 0, 1000)
        assert time.monotonic() - began < 5
    finally:
        signal.signal(signal.SIGALRM, before)
    other.sendall(DATA[:1000])
    assert link.pour(funnel, target, 0, 1000) == (1000, None) and os.pread(target, 2000, 0) == DATA[:1000]


def test_many_threads_get_the_digests_of_their_own_pieces(tmp_path):
    path = str(tmp_path / "file")
    with open(path, "wb") as file:
        file.write(DATA)
    fd, batches, wrong = os.open(path, os.O_RDONLY), dfly.Batcher(), []

    def ask(seed):
        rng = random.Random(seed)
        for _ in range(100):
            at, length = rng.randrange(len(DATA)), rng.choice([0, 1, 63, 64, 1000, 70000])
            want = hashlib.sha256(DATA[at:at + length]).digest() if at + length <= len(DATA) else b""
            if batches.sha256((b"", (fd, at, length), b"")) != want:
                wrong.append((at, length))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert not wrong


def test_one_thread_s_unreadable_file_is_no_trouble_of_the_others(tmp_path):
    path, batches, found = str(tmp_path / "file"), dfly.Batcher(), []
    with open(path, "wb") as file:
        file.write(DATA)
    good, bad = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)
    gone = -1  # as a store has it that has been let go of

    def ask(fd):
        for _ in range(50):
            try:
                found.append((fd, batches.sha256((b"", (fd, 0, 100000), b""))))
            except OSError as error:
                found.append((fd, error.errno))

    threads = [threading.Thread(target=ask, args=(fd,)) for fd in (good, bad, good, gone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(good)
    os.close(bad)
    right = hashlib.sha256(DATA[:100000]).digest()
    assert set(found) == {(good, right), (bad, errno.EBADF), (gone, errno.EBADF)} and len(found) == 200
