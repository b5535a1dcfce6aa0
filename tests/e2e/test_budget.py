"""What a download may cost: requests to the supernode, and memory at both ends.  DFLY_BIG_MB=10240 tries a bigger file."""
import http.server
import os
import re
import socketserver
import threading

import pytest

from world import MB, Command, resident, wait_for

BIG = int(os.environ.get("DFLY_BIG_MB", "1024")) * MB


class Generated:
    """An origin of one file that is nowhere as a whole: a block of bytes, over and over."""

    def __init__(self, block, length):
        self.block, self.length, self.gets, self.log = block, length, 0, []
        origin = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.send_response(200)
                self.send_header("ETag", '"generated"')
                self.send_header("Content-Length", str(origin.length))
                self.end_headers()

            def do_GET(self):
                origin.gets += 1
                self.do_HEAD()
                left = origin.length
                while left:
                    left -= self.connection.send(memoryview(origin.block)[(origin.length - left) % len(origin.block):][:left])

            def log_message(self, *args):
                pass

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d/big" % self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def right(self, path):
        """Whether a file is what this origin has."""
        if os.path.getsize(path) != self.length:
            return False
        with open(path, "rb") as f:
            for at in range(0, self.length, len(self.block)):
                if f.read(len(self.block)) != self.block[:self.length - at]:
                    return False
        return True


@pytest.fixture
def generated(world, blob):
    """Factory: `generated(length)` is an origin with a file of so many bytes."""
    def make(length):
        world.origins.append(Generated(blob(8 * MB + 13), length))  # which the world closes
        return world.origins[-1]
    return make


def control_requests(node):
    """What the supernode has been asked until now, by this test excepted."""
    return sum(count for name, count in node.metrics().items() if name.startswith("dfly_requests_total{") and name != 'dfly_requests_total{call="metrics"}')


def peak(pid, before=0):
    """The most memory that a process has had resident until now, in bytes; `before` when it has ended."""
    try:
        with open("/proc/%d/status" % pid) as f:
            found = re.search(r"^VmHWM:\s+(\d+) kB", f.read(), re.M)
    except OSError:
        found = None
    return int(found.group(1)) << 10 if found else before


def download(host, url, out="out"):
    """Run a `get` to its end, without reading the output into this process; return the most memory it had."""
    command = Command(host.world, "get-" + host.name, host.world.dfly(
        "get", "-u", url, "-o", host.path(out), "--node", host.world.node(), "--home", host.home, "--ip", "127.0.0.1"))
    most = 0

    def ended():
        nonlocal most
        most = max(most, peak(command.pid, most))
        return not command.running()
    wait_for(ended, 60 + BIG / (20.0 * MB), "the end of the download")
    assert command.wait().code == 0, command.output()
    return most


def test_a_file_of_500_mb_takes_at_most_20_control_requests(generated, supernode, host):
    node, origin = supernode(), generated(500 * MB)
    first, second = host(), host()
    download(first, origin.url)
    alone = control_requests(node)
    assert alone <= 20
    download(second, origin.url)
    assert control_requests(node) - alone <= 20
    assert origin.gets == 1 and origin.right(first.path("out")) and origin.right(second.path("out"))


def test_neither_get_nor_supernode_keep_a_big_file_in_memory(generated, supernode, host):
    node, origin, here = supernode(), generated(BIG), host()
    assert download(here, origin.url) < 100 * MB
    assert peak(node.pid) < 150 * MB
    assert resident(here.uploader_pid()) < 100 * MB
    assert os.path.getsize(here.path("out")) == BIG
