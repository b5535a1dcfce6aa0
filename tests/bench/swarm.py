#!/usr/bin/env python3
"""Time one file reaching N hosts, each a network namespace of its own with a rate-limited link.

Every host hangs on one bridge; its uplink and its downlink are both shaped to --rate.
The yardstick is `one copy`: the same file, origin -> one host, over the same links, by curl.
No system can hand a file to any host faster, so the figure is makespan / one-copy time.

    swarm.py --system direct|aria2|dfly --peers N --size MB --rate MBIT [--racks R --core MBIT] [--stagger S]

Needs root and, from Debian: iproute2 nginx-light curl, and for aria2: aria2 opentracker mktorrent.  The files lie in
SWARM_TMP; /dev/shm, the default, keeps disks out of it.  DFLY is another dfly.py to measure, DFLY_PYTHON its interpreter.
`direct` has every host fetch from the origin by curl.  One JSON row: makespan_s over one_copy_s is `ratio`; the copies of
the file that left the origin, left the supernode and entered each rack; CPU seconds of the whole machine.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DFLY = os.environ.get("DFLY") or os.path.join(ROOT, "dfly.py")
PYTHON = os.environ.get("DFLY_PYTHON") or sys.executable
ORIGIN, SUPER = "10.77.0.1", "10.77.0.2"
PREFIX = "dfb"  # of all namespaces; whatever is called so is removed before and after


def sh(cmd, check=True):
    """Run a shell command; return what it says."""
    return subprocess.run(cmd, shell=True, check=check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True).stdout


class Lab:
    """A bridge and its hosts; leaving the block removes every namespace and process of it."""

    def __init__(self, peers, rate, racks=0, core=0):
        self.rate, self.procs, self.racks, self.core = rate, [], racks, core
        self.hosts, self.rack = {"origin": ORIGIN, "super": SUPER}, {}
        for i in range(peers):
            r = i % racks if racks else i // 200
            self.rack["p%d" % i] = r
            self.hosts["p%d" % i] = "10.77.%d.%d" % (1 + r, 1 + (i // racks if racks else i % 200))

    def __enter__(self):
        self.clean()
        sh(f"ip netns add {PREFIX}sw; ip -n {PREFIX}sw link add br0 type bridge; ip -n {PREFIX}sw link set br0 up")
        for r in range(self.racks):
            sh(f"ip -n {PREFIX}sw link add rb{r} type bridge; ip -n {PREFIX}sw link set rb{r} up; "
               f"ip -n {PREFIX}sw link add up{r} type veth peer name dn{r}; ip -n {PREFIX}sw link set up{r} master rb{r} up; "
               f"ip -n {PREFIX}sw link set dn{r} master br0 up")
            if self.core:
                for dev in (f"up{r}", f"dn{r}"):
                    sh(f"tc -n {PREFIX}sw qdisc add dev {dev} root tbf rate {self.core}mbit burst {max(64, self.core * 2)}kb latency 50ms")
        for name, ip in self.hosts.items():
            ns, v = PREFIX + name, "v" + name
            bridge = f"rb{self.rack[name]}" if self.racks and name in self.rack else "br0"
            sh(f"ip netns add {ns} && ip -n {PREFIX}sw link add {v} type veth peer name eth0 netns {ns} && "
               f"ip -n {PREFIX}sw link set {v} master {bridge} up && ip -n {ns} addr add {ip}/16 dev eth0 && "
               f"ip -n {ns} link set eth0 up && ip -n {ns} link set lo up")
            if self.rate:
                shape = f"root tbf rate {self.rate}mbit burst {max(64, self.rate * 2)}kb latency 50ms"
                sh(f"tc -n {ns} qdisc add dev eth0 {shape} && tc -n {PREFIX}sw qdisc add dev {v} {shape}")
        return self

    def __exit__(self, *exc):
        for p in self.procs:
            if p.poll() is None:
                p.terminate()
        self.clean()

    def clean(self):
        for line in sh("ip netns list", check=False).splitlines():
            ns = line.split()[0] if line.split() else ""
            if ns.startswith(PREFIX):
                for pid in sh(f"ip netns pids {ns}", check=False).split():
                    try:
                        os.kill(int(pid), signal.SIGKILL)
                    except OSError:
                        pass
                sh(f"ip netns del {ns}", check=False)

    def into_racks(self):
        return sum(int(sh(f"ip netns exec {PREFIX}sw cat /sys/class/net/dn{r}/statistics/tx_bytes")) for r in range(self.racks))

    def spawn(self, host, argv, log=None, env=None, **kw):
        out = open(log, "ab") if log else subprocess.DEVNULL
        p = subprocess.Popen(["ip", "netns", "exec", PREFIX + host] + argv, stdout=out, stderr=out,
                             stdin=subprocess.DEVNULL, env=dict(os.environ, **(env or {})), **kw)
        self.procs.append(p)
        return p


def busy():
    """CPU seconds that this machine has worked."""
    f = open("/proc/stat").readline().split()
    return (sum(map(int, f[1:9])) - int(f[4]) - int(f[5])) / os.sysconf("SC_CLK_TCK")


def tx_bytes(host):
    return int(sh(f"ip netns exec {PREFIX}{host} cat /sys/class/net/eth0/statistics/tx_bytes"))


def digest(path):
    with open(path, "rb") as f:
        total = hashlib.sha256()
        for block in iter(lambda: f.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def nginx(lab, host, root, port, work):
    conf = os.path.join(work, f"nginx-{host}-{port}.conf")
    open(conf, "w").write(f"daemon off; worker_processes 1; pid {work}/nginx-{host}-{port}.pid; error_log /dev/null;\n"
                          "user root; events { worker_connections 4096; }\n"
                          "http { sendfile on; access_log off; keepalive_timeout 65; client_body_temp_path /tmp; "
                          f"server {{ listen {port}; root {root}; }} }}\n")
    lab.spawn(host, ["nginx", "-c", conf])


def wait_port(host, ip, port, limit=20):
    end = time.time() + limit
    while time.time() < end:
        if subprocess.run(["ip", "netns", "exec", PREFIX + host, "bash", "-c", f"</dev/tcp/{ip}/{port}"],
                          stderr=subprocess.DEVNULL).returncode == 0:
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on {ip}:{port}")


def peer_argv(a, i, lab, work, url):
    """Return the command line of peer `i`, and what is new in its environment."""
    ip, home, out = lab.hosts[f"p{i}"], f"{work}/p{i}", f"{work}/p{i}/out"
    os.makedirs(home, exist_ok=True)
    if a.system == "direct":
        return ["curl", "-s", "-S", "-o", out, url], {}
    if a.system == "aria2":
        return ["aria2c", "-q", "-d", home, "-o", "out", "--seed-time=0" if a.leave else "--seed-ratio=0.0", "--enable-dht=false", "--bt-enable-lpd=false",
                "--listen-port=6881", "--bt-max-peers=60", "--file-allocation=none", "--on-bt-download-complete=" + work + "/done.sh",
                "--bt-request-peer-speed-limit=100M", "--bt-tracker-interval=2", work + "/file.torrent"], {"HOME": home}
    program = spoilt(work) if 0 < i <= a.bad else DFLY
    return [PYTHON, program, "get", "-u", url, "-o", out, "--node", SUPER + ":8002",
            "--home", home + "/df", "--ip", ip, "--notbs"] + a.extra.split(), {"HOME": home}


def spoilt(work):
    """Return the path of a dfly.py whose uploader flips a bit of whatever it sends; its own downloads are right."""
    with open(DFLY) as f:
        text = f.read()
    right = "return os.sendfile(sock.fileno(), self.fd, self.offset, min(self.count, most))"
    assert text.count(right) == 1
    wrong = "data = bytearray(os.pread(self.fd, min(self.count, most, 1 << 16), self.offset)); data[0] ^= 1; return sock.send(data)"
    with open(work + "/spoilt.py", "w") as f:
        f.write(text.replace(right, wrong))
    return work + "/spoilt.py"


def start_dfly(lab, a, work):
    """Start the supernode."""
    lab.spawn("super", [PYTHON, DFLY, "supernode", "--home", work + "/super", "--advertise-ip", SUPER] + a.super_extra.split(), log=work + "/super.log")
    wait_port("p0", SUPER, 8002)


def start_aria2(lab, work, src):
    """Start the tracker, and the origin's seeder."""
    sh(f"mktorrent -l 18 -a http://{SUPER}:6969/announce -o {work}/file.torrent -n out {src}")
    with open(work + "/file.torrent", "rb") as f:
        torrent = f.read()
    with open(work + "/allow", "w") as f:  # the tracker, which reads it as nobody, serves nothing else
        f.write(hashlib.sha1(torrent[torrent.index(b"4:info") + 6:-1]).hexdigest() + "\n")
    lab.spawn("super", ["opentracker", "-i", SUPER, "-p", "6969", "-P", "6969", "-w", work + "/allow"], log=work + "/tracker.log")
    with open(work + "/done.sh", "w") as f:
        f.write("#!/bin/sh\ndate +%s.%N > $(dirname \"$3\")/done\n")
    os.chmod(work + "/done.sh", 0o755)
    wait_port("p0", SUPER, 6969)
    os.makedirs(work + "/seed")
    shutil.copy(src, work + "/seed/out")
    lab.spawn("origin", ["aria2c", "-q", "-d", work + "/seed", "--seed-ratio=0.0", "--check-integrity=true", "--enable-dht=false",
                         "--bt-enable-lpd=false", "--listen-port=6881", "--bt-max-peers=60", work + "/file.torrent"])
    time.sleep(3)


def ended_at(a, i, process, work):
    """Return when (time.time) peer `i` had its file, None before that."""
    if a.system != "aria2":
        return time.time() if process.poll() is not None else None
    done = f"{work}/p{i}/done"  # it goes on serving
    if os.path.exists(done) and os.path.getsize(done):
        with open(done) as f:
            return float(f.read())
    return None


def kill(lab, host):
    """End whatever runs on a host, as a power cut would."""
    for pid in sh(f"ip netns pids {PREFIX}{host}", check=False).split():
        os.kill(int(pid), signal.SIGKILL)


def race(lab, a, work, url, one):
    """Start all peers, wait for them; return when each began and when it ended (seconds), those that failed, those that never ended."""
    t0, began, running, ended, failed = time.time(), {}, {}, {}, []
    doomed = list(range(1, 1 + a.kill))
    while (running or len(began) < a.peers) and time.time() - t0 < a.limit:
        while len(began) < a.peers and time.time() - t0 >= len(began) * a.stagger:
            i = len(began)
            argv, env = peer_argv(a, i, lab, work, url)
            began[i] = time.time() - t0
            running[i] = lab.spawn(f"p{i}", argv, log=f"{work}/p{i}/log", env=env)
        while doomed and time.time() - t0 > one / 3:
            kill(lab, f"p{doomed[0]}")
            running.pop(doomed.pop(0), None)
        for i, process in list(running.items()):
            end = ended_at(a, i, process, work)
            if end is not None:
                ended[i] = end - t0
                if process.poll():
                    failed.append((i, process.poll()))
                del running[i]
        time.sleep(0.02)
    return began, ended, failed, sorted(running)


def isolations(a):
    """Return how often the supernode has left a peer out because of wrong bytes."""
    if a.system != "dfly":
        return None
    found = re.search(r"^dfly_isolations_total (\d+)", sh(f"ip netns exec {PREFIX}p0 curl -s http://{SUPER}:8002/metrics"), re.M)
    return int(found.group(1)) if found else 0


def measure(lab, a, work, src):
    """Run one case in a lab that stands; return its row."""
    url, megabytes = f"http://{ORIGIN}:80/file", float(a.size << 20)
    nginx(lab, "origin", work + "/www", 80, work)
    wait_port("p0", ORIGIN, 80)
    t = time.time()
    sh(f"ip netns exec {PREFIX}p0 curl -s -o /dev/null {url}")
    one = time.time() - t
    if a.system == "dfly":
        start_dfly(lab, a, work)
    if a.system == "aria2":
        start_aria2(lab, work, src)
    racks, sent, worked = lab.into_racks(), tx_bytes("origin"), busy()
    began, ended, failed, unfinished = race(lab, a, work, url, one)
    times, own = sorted(ended.values()), sorted(ended[i] - began[i] for i in ended)
    worked, sent, racks = busy() - worked, tx_bytes("origin") - sent, lab.into_racks() - racks
    want = digest(src)
    wrong = [i for i in range(a.peers) if not 0 < i <= a.kill and not os.path.exists(f"{work}/p{i}/out") or os.path.exists(f"{work}/p{i}/out") and digest(f"{work}/p{i}/out") != want]
    return {"system": a.system, "peers": a.peers, "size_mb": a.size, "rate_mbit": a.rate, "one_copy_s": round(one, 2),
            "makespan_s": round(times[-1], 2) if times else None, "median_s": round(times[len(times) // 2], 2) if times else None,
            "first_s": round(times[0], 2) if times else None, "ratio": round(times[-1] / one, 3) if times else None,
            "worst_own": round(own[-1] / one, 3) if own else None,
            "origin_copies": round(sent / megabytes, 2), "super_copies": round(tx_bytes("super") / megabytes, 2),
            "rack_copies": round(racks / megabytes / a.racks, 2) if a.racks else None, "cpu_s": round(worked, 1),
            "isolations": isolations(a), "spawn_s": round(max(began.values()), 2), "unfinished": unfinished, "failed": failed, "wrong_bytes": wrong}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--system", required=True, choices=("direct", "aria2", "dfly"))
    p.add_argument("--peers", type=int, default=16)
    p.add_argument("--size", type=int, default=100, help="MB")
    p.add_argument("--rate", type=int, default=100, help="Mbit/s; 0 leaves the links unshaped")
    p.add_argument("--racks", type=int, default=0, help="spread the peers over this many racks, each a /24 behind one uplink")
    p.add_argument("--core", type=int, default=0, help="Mbit/s of each rack's uplink")
    p.add_argument("--leave", action="store_true", help="aria2: leave the swarm when complete")
    p.add_argument("--kill", type=int, default=0, help="dfly: hosts whose processes are killed at a third of the way")
    p.add_argument("--bad", type=int, default=0, help="dfly: hosts that serve wrong bytes")
    p.add_argument("--stagger", type=float, default=0, help="seconds between peer starts")
    p.add_argument("--extra", default="", help="more flags for dfly get")
    p.add_argument("--super-extra", default="", help="more flags for dfly supernode")
    p.add_argument("--limit", type=int, default=500, help="seconds after which to give up")
    p.add_argument("--keep", action="store_true", help="keep the files")
    a = p.parse_args()
    tools = ["ip", "tc", "nginx", "curl"] + (["aria2c", "opentracker", "mktorrent"] if a.system == "aria2" else [])
    missing = [tool for tool in tools if not shutil.which(tool)]
    if os.getuid() or missing:
        raise SystemExit("swarm.py: " + ("not installed: " + " ".join(missing) if missing else "only root can make network namespaces"))
    work = tempfile.mkdtemp(prefix="swarm-", dir=os.environ.get("SWARM_TMP", "/dev/shm"))
    os.chmod(work, 0o755)
    os.makedirs(work + "/www")
    src = work + "/www/file"
    with open(src, "wb") as f:
        for _ in range(a.size):
            f.write(os.urandom(1 << 20))
    try:
        with Lab(a.peers, a.rate, a.racks, a.core) as lab:
            print(json.dumps(measure(lab, a, work, src)))
    finally:
        if a.keep:
            print("kept", work, file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
