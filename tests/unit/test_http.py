"""Sections 6 and 7: the server and the client on real sockets."""
import os
import socket
import subprocess
import sys
import threading

import pytest

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
import dfly  # noqa: E402
from world import ask  # noqa: E402


class Application:
    """Handlers that a test fills in."""


@pytest.fixture
def serve():
    """`serve(**handlers)`: a running server that has them under their names (`slow...`: run by workers); returns it."""
    servers = []

    def start(**handlers):
        application = Application()
        application.__dict__.update(handlers)
        routes = [dfly.Route("GET", "/" + name, name, name.startswith("slow")) for name in handlers]
        servers.append(dfly.Server(dfly.listen("127.0.0.1", 0), routes, application, dfly.Log(), "test"))
        servers[-1].start()
        return servers[-1]
    yield start
    for server in servers:
        server.stop()


def test_what_happens_while_a_handler_decides_to_wait_is_not_missed(serve):
    happened = []

    def wait(request):
        if happened:
            return dfly.Response(200, b"expired" if request.expired else b"in time")
        other = threading.Thread(target=lambda: (happened.append(1), server.notify("key")))
        other.start()  # just behind our look at it, and before we are parked
        other.join()
        return dfly.Park("key", 3.0)
    server = serve(wait=wait)
    assert ask(server.address, "GET", "/wait").body == b"in time"


def test_a_server_that_only_ever_says_continue_ends_in_its_answer_or_an_error():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)

        def answer():
            connection = listening.accept()[0]
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 3000 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        thread = threading.Thread(target=answer)
        thread.start()
        pool = dfly.Pool()
        assert pool.ask("127.0.0.1", listening.getsockname()[1], "GET", "/") == (200, b"ok")
        pool.close()
        thread.join()


def test_a_server_that_gets_no_thread_says_so_and_goes_on(serve, monkeypatch):
    server = serve(quick=lambda request: dfly.Response(200, b"quick"), slow=lambda request: dfly.Response(200, b"slow"))

    def refuse(thread):
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            assert ask(server.address, "GET", "/slow").status == 503
        assert ask(server.address, "GET", "/quick").body == b"quick"
    assert ask(server.address, "GET", "/slow").body == b"slow"


def test_a_server_that_gets_no_more_threads_uses_those_it_has(serve, monkeypatch):
    busy, go, answers = threading.Event(), threading.Event(), []

    def slow(request):
        busy.set()
        assert go.wait(20)
        return dfly.Response(200, b"slow")
    server = serve(slow=slow, slower=lambda request: dfly.Response(200, b"slower"))
    clients = [threading.Thread(target=lambda path=path: answers.append(ask(server.address, "GET", path).body)) for path in ("/slow", "/slower")]
    clients[0].start()
    assert busy.wait(20)
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith("dfly-worker"):
            go.set()
            raise RuntimeError("can't start new thread")
        start(thread)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        clients[1].start()
        for client in clients:
            client.join(20)
    assert sorted(answers) == [b"slow", b"slower"]


HEAP = 64 << 10  # what wakes a reader of a long body, where keep_short has the least window


@pytest.mark.parametrize("length", [1, HEAP - 1, HEAP, HEAP + 1, 2 * HEAP, 3 * HEAP + 17, 5 * HEAP - 1])
@pytest.mark.parametrize("most", [1000, HEAP, 1 << 20])
def test_the_last_byte_of_a_body_is_never_waited_for_in_vain(serve, length, most):
    data = bytes(i % 251 for i in range(length))
    server = serve(body=lambda request: dfly.Response(200, data))
    link = dfly.HttpLink(*server.address, timeout_s=2.0)
    for _ in range(2):
        link.send("GET", "/body")
        reply = link.reply()
        link.keep_short(1e6)
        got, buffer = b"", memoryview(bytearray(most))
        while len(got) < length:
            count = reply.read_into(buffer)
            got += bytes(buffer[:count])
        assert got == data and reply.reusable
    link.close()


def test_who_has_something_to_say_to_a_server_that_has_stopped_is_not_harmed(serve):
    server = serve()
    server.stop()
    server.post(lambda: None)
    server.notify("key")
    server.stop()


SIGNALS = """
import random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import dfly
until = time.monotonic() + 1.5
while time.monotonic() < until:
    ended = dfly.Ending()
    signal.signal(signal.SIGALRM, lambda *_: ended.set())
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.0008))
    while not ended.wait(0.00005):
        pass
    assert ended.is_set() and ended.wait()
    dfly.os.close(ended._read), dfly.os.close(ended._write)
"""


def test_a_signal_ends_a_wait_wherever_it_meets_it():
    """With an Event a handler that met the main thread between two waits waited for it for ever."""
    subprocess.run([sys.executable, "-c", SIGNALS, os.path.dirname(os.path.abspath(dfly.__file__))], check=True, timeout=20)
