#!/usr/bin/env python3
"""Load one real supernode with the syncs of many peers, and say how many it serves and what peers that wait cost it.

    load.py                   1,000 peers of 20 tasks report and ask as fast as they are answered, for 10 s
    load.py --park 10000      10,000 peers of 20 tasks wait for a silent origin, for 20 s (a sync is held for 15)

The supernode is a process of its own on one core (--cores 0,1: it on core 0, this driver on core 1).  A pretended peer
says what the real one says when others wait for its pieces: a sync when a piece is about to end and another when it is
here, on two connections, one of which the supernode holds; only the bytes of the pieces are left out.  Whoever has
every piece registers anew.  One JSON row a case; "errors" must be 0.  Linux only; standard library only.
"""
import argparse
import collections
import json
import os
import re
import selectors
import socket
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from world import World, descriptors, wait_for  # noqa: E402

SLOTS = 3          # what the real client asks for
PER_ADDRESS = 20000           # connections from one 127.0.0.x, which has some 28,000 ports
LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n")
CODE = re.compile(rb'^\{"code":(\d+)')
PIECE = re.compile(rb'\[(\d+),(\d+),(?:"|null)')
LINE = re.compile(rb'"line":"([0-9a-f]+)"')
TASK = re.compile(rb'"taskId":"([0-9a-f]+)"')


def read_cpu(pid):
    """Return the CPU seconds a process has used."""
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_status(pid, name):
    """Return a line of /proc/PID/status that is in kB, in bytes."""
    with open("/proc/%d/status" % pid) as f:
        return int(re.search(r"^%s:\s+(\d+) kB" % name, f.read(), re.M).group(1)) << 10


def pin(pid, core):
    """Have all threads of a process run on one core."""
    for thread in os.listdir("/proc/%d/task" % pid):
        os.sched_setaffinity(int(thread), {core})


def many_descriptors(count):
    """Allow this process, and those it starts, `count` open files."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))


class Link:
    """One connection of a pretended peer."""

    __slots__ = ("sock", "peer", "input")

    def __init__(self, sock, peer):
        self.sock, self.peer, self.input = sock, peer, b""


class Peer:
    """A pretended client of one task."""

    def __init__(self, number, registration, answer):
        self.number = number
        self.registration = registration  # its register, ready to send
        self.task = TASK.search(answer).group(1).decode()
        self.line = LINE.search(answer).group(1)  # what stands for task and client in each of its messages
        self.idle = []                    # connections without a request
        self.waiting = 0                  # requests without an answer
        self.orders = collections.deque()  # [num, holder, since, announced] of pieces it has been told to fetch
        self.finished = False

    def next_message(self, now, size):
        """Return the request that a real client would send now, None to go on waiting."""
        if self.finished:
            if self.waiting:
                return None
            self.finished = False
            self.orders.clear()
            return self.registration
        done = soon = b""
        if self.orders:
            order = self.orders[0]
            if order[3]:
                done = b'"done":[[%d,%s,%.3f,%d]],' % (order[0], order[1], now - order[2], size)
                self.orders.popleft()
            else:
                soon, order[3] = b'"soon":[%d],' % order[0], True
        elif self.waiting:
            return None
        body = b'{%s%s"slots":%d}' % (done, soon, SLOTS)
        return b"POST /peer/sync?%s HTTP/1.1\r\nHost: supernode:8002\r\nContent-Length: %d\r\n\r\n%s" % (self.line, len(body), body)


class Load:
    """All pretended peers over one selector, against the supernode at `address`."""

    CONNECTIONS = 2  # of a peer; the real one has as many, sometimes three

    def __init__(self, address):
        self.address = address
        self.peers = []
        self.links = []
        self.selector = selectors.DefaultSelector()
        self.answers = 0              # to syncs
        self.codes = collections.Counter()
        self.errors = []
        self.size = 0                 # bytes of a piece

    def register(self, urls, count):
        """Enter `count` peers, spread over the tasks of `urls`."""
        with socket.create_connection(self.address, 20.0) as sock:
            for number in range(len(self.peers), len(self.peers) + count):
                ip, url = "10.%d.%d.%d" % (number >> 16, number >> 8 & 255, number & 255), urls[number % len(urls)]
                cid = "%s-%d-1.000" % (ip, number)
                body = json.dumps({"superNodeIp": self.address[0], "rawUrl": url, "taskUrl": url, "cid": cid, "ip": ip, "hostName": "host",
                                   "port": 15001, "path": "/peer/file/out-%d" % number, "version": "1.0.6"}).encode()
                request = (b"POST /peer/registry HTTP/1.1\r\nHost: supernode\r\nContent-Type: application/json\r\nx-dfly: 1 \r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                sock.sendall(request)
                data = b""
                while not data or len(data.partition(b"\r\n\r\n")[2]) < int(LENGTH.search(data).group(1)):
                    data += sock.recv(65536)
                answer = json.loads(data.partition(b"\r\n\r\n")[2].decode())
                if answer["code"] != 200:
                    raise SystemExit("register: %r" % answer)
                self.size = answer["data"]["pieceSize"] - 5
                self.peers.append(Peer(number, request, data))

    def begin(self):
        """Have every peer send its first sync."""
        for peer in self.peers:
            self.act(peer, time.monotonic())

    def act(self, peer, now):
        """Have a peer say all that it would say now."""
        while peer.waiting < self.CONNECTIONS:
            message = peer.next_message(now, self.size)
            if message is None:
                return
            link = peer.idle.pop() if peer.idle else self.connect(peer)
            peer.waiting += 1
            try:
                if link.sock.send(message) != len(message):
                    raise OSError("only a part was sent")
            except OSError as error:
                self.lose(link, error)

    def connect(self, peer):
        link = Link(socket.socket(), peer)
        self.links.append(link)
        link.sock.bind(("127.0.0.%d" % (1 + len(self.links) // PER_ADDRESS), 0))
        link.sock.settimeout(20.0)
        link.sock.connect(self.address)
        link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.sock.setblocking(False)
        self.selector.register(link.sock, selectors.EVENT_READ, link)
        return link

    def lose(self, link, why):
        self.errors.append("%s: %s" % (link.peer.number, why))
        self.selector.unregister(link.sock)
        link.sock.close()
        link.peer.waiting -= 1

    def run(self, seconds):
        """Go on for so long."""
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            if now >= end:
                return
            for key, _ in self.selector.select(end - now):
                self.receive(key.data, now)

    def receive(self, link, now):
        try:
            data = link.sock.recv(65536)
        except OSError as error:
            return self.lose(link, error)
        if not data:
            return self.lose(link, "the supernode hung up")
        if link.input:
            data = link.input + data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + int(LENGTH.search(data).group(1)):
            link.input = data
            return
        link.input = b""
        peer = link.peer
        peer.idle.append(link)
        peer.waiting -= 1
        self.take(peer, data, end + 4, now)
        self.act(peer, now)

    def take(self, peer, data, start, now):
        """Read an answer as far as this peer must."""
        match = CODE.match(data[start:start + 20])
        code = int(match.group(1)) if match and data.startswith(b"HTTP/1.1 200 ") else 0
        self.codes[code] += 1
        self.answers += code != 200  # else it was to a register
        if code == 200:
            peer.line = LINE.search(data).group(1)
        if code == 601:
            for num, holder in PIECE.findall(data, data.index(b'"pieces":')):
                peer.orders.append([int(num), holder, now, False])
        elif code == 600:
            peer.finished = True
        elif code not in (200, 602):
            self.errors.append("%d: %.300r" % (peer.number, data))
            peer.finished = True  # so that it begins anew, and not at once the same again

    def close(self):
        """Hang up."""
        for link in self.links:
            link.sock.close()
        self.selector.close()


def syncs(node):
    """How many syncs the supernode has begun to serve."""
    return int(node.metrics().get('dfly_requests_total{call="sync"}', 0))


def measure(node, load, seconds):
    """Run for `seconds`; return what that was like for both sides."""
    before = syncs(node)
    cpu, own, answers, began = read_cpu(node.pid), time.process_time(), load.answers, time.monotonic()
    load.run(seconds)
    took, answers = time.monotonic() - began, load.answers - answers
    cpu, own = read_cpu(node.pid) - cpu, time.process_time() - own
    return {"seconds": round(took, 2), "syncs": syncs(node) - before, "syncs_per_s": round(answers / took, 1), "errors": len(load.errors),
            "first_error": load.errors[0] if load.errors else "", "supernode_cpu": round(cpu / took, 2), "driver_cpu": round(own / took, 2),
            "us_per_sync": round(1e6 * cpu / max(1, answers), 1), "rss_mb": round(read_status(node.pid, "VmRSS") / 1e6, 1),
            "codes": {str(code): count for code, count in sorted(load.codes.items())}}


def origin_files(world, options, stall):
    """Return the URLs of one file a task; with `stall` the origin says how long they are and then nothing."""
    origin, data = world.origin(), bytes(options.size << 20)
    return [origin.put("file%d" % i, data, stall_after=0 if stall else None) for i in range(options.tasks)], origin


def settle(node, count):
    """Wait until the supernode has let go of the connections that were closed; return how many files it has open then."""
    try:
        wait_for(lambda: descriptors(node.pid) <= count, 20.0)
    except AssertionError:
        pass  # the row shows it
    return descriptors(node.pid)


def run_syncs(world, node, options):
    """Case one: as many syncs as it serves."""
    urls, _ = origin_files(world, options, stall=False)
    load = Load((node.ip, node.port))
    load.register(urls, options.peers)
    tasks = {peer.task for peer in load.peers}
    wait_for(lambda: all(node.ask("GET", "/api/v1/tasks/" + task).json["cdnStatus"] == "SUCCESS" for task in tasks), 120, "the supernode's own copies")
    fds = descriptors(node.pid)
    try:
        load.begin()
        load.run(1.0)
        row = measure(node, load, options.seconds)
        row["connections"] = len(load.links)
    finally:
        load.close()
    return dict({"case": "syncs", "peers": options.peers, "tasks": options.tasks}, fds=[fds, settle(node, fds)], **row)


def run_park(world, node, options):
    """Case two: peers that all wait."""
    urls, origin = origin_files(world, options, stall=True)
    load = Load((node.ip, node.port))
    fds, rss = descriptors(node.pid), read_status(node.pid, "VmRSS")
    try:
        load.register(urls, options.park)
        load.begin()
        wait_for(lambda: syncs(node) >= options.park, 60.0, "all syncs")
        row = measure(node, load, options.seconds)
        row["connections"] = len(load.links)
    finally:
        load.close()
        for i in range(options.tasks):
            origin.release("file%d" % i)
    fds = [fds, settle(node, fds + 2 * options.tasks)]  # a task has its file and its journal open
    return dict({"case": "park", "peers": options.park, "tasks": options.tasks}, fds=fds, rss_before_mb=round(rss / 1e6, 1), **row)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", type=int, default=1000)
    p.add_argument("--tasks", type=int, default=20)
    p.add_argument("--size", type=int, default=16, help="MB of each task's file (16 MB have 65 pieces)")
    p.add_argument("--seconds", type=float, default=0.0, help="how long to measure (10; parked 20)")
    p.add_argument("--park", type=int, default=0, metavar="N", help="have N peers wait instead")
    p.add_argument("--cores", default="0,1", help="the supernode's core and the driver's; empty: wherever the system puts them")
    options = p.parse_args()
    options.seconds = options.seconds or (20.0 if options.park else 10.0)
    many_descriptors(max(options.park, Load.CONNECTIONS * options.peers) + 500)
    with World(warnings=False) as world:
        node = world.supernode()
        if options.cores and len(os.sched_getaffinity(0)) > 1:
            theirs, ours = map(int, options.cores.split(","))
            pin(node.pid, theirs)
            pin(os.getpid(), ours)
        row = (run_park if options.park else run_syncs)(world, node, options)
    print(json.dumps(row))
    return 1 if row["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
