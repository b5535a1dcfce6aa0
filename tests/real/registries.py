"""Debian's docker-registry, images to put into it, and what may stand in front of it."""
import base64
import collections
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.parse

import pytest
from world import Command, dead_port, sha256, wait_for

PASSWORD = "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"  # "secret", by bcrypt

CONFIG = """
version: 0.1
log: {level: warn, accesslog: {disabled: false}}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: "127.0.0.1:%d"%s}
"""
AUTH = "auth: {htpasswd: {realm: here, path: %s}}\n"
EVENTS = "notifications: {endpoints: [{name: supernode, url: %s/preheats/registry, timeout: 5s, threshold: 3, backoff: 1s}]}\n"
TOKENS = "auth: {token: {realm: %s, service: registry, issuer: tests, rootcertbundle: %s}}\n"


def program(name):
    """Return a program's path; where it could be installed and is not, fail."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path:
        return path
    return pytest.skip("%s is not here (apt-get install %s; .ci/run does it)" % (name, name))


class Registry(Command):
    """Debian's docker-registry."""

    def __init__(self, world, protected=False, tokens=None, tls=None, tell=None):
        self.port = dead_port()
        folder = os.path.join(world.root, "registry%d" % self.port)
        os.makedirs(folder)
        with open(os.path.join(folder, "passwords"), "w") as file:
            file.write(PASSWORD + "\n")
        with open(os.path.join(folder, "config.yml"), "w") as file:
            file.write(CONFIG % (os.path.join(folder, "data"), self.port, ", tls: {certificate: %s, key: %s}" % tls if tls else "") + (AUTH % os.path.join(folder, "passwords") if protected else "")
                       + (TOKENS % (tokens.url, tokens.certificate) if tokens else "") + (EVENTS % tell if tell else ""))
        super().__init__(world, "registry", [program("docker-registry"), "serve", os.path.join(folder, "config.yml")])
        self.url = "%s://127.0.0.1:%d" % ("https" if tls else "http", self.port)
        wait_for(self._listens, 20, "the registry on port %d\n%s" % (self.port, self.output()))

    def _listens(self):
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def blobs_sent(self, status="20[06]"):
        """Return {digest: how many times it was sent} from the access log; those parts that prove that it is there have 206, but for
        daemons' looks at first bytes."""
        return collections.Counter(digest for digest, count in self._answers(status) if count != "16384")

    def openings(self):
        """Return {digest: how often a daemon has asked for its first 16 KB} from the access log."""
        return collections.Counter(digest for digest, count in self._answers("206") if count == "16384")

    def _answers(self, status):
        return re.findall(r'"GET /v2/\S+/blobs/sha256:([0-9a-f]{64}) HTTP/1.1" (?:%s) (\d+)' % status, self.stdout)


class Image:
    """An image, each of whose layers has one file of these bytes, as a folder of skopeo's."""

    def __init__(self, world, *layers, folder="image"):
        self.world = world
        self.folder = os.path.join(world.root, folder)
        os.makedirs(self.folder)
        self.blobs = {}
        archives = [self._archive("file%d" % number, data) for number, data in enumerate(layers)]
        described = [self._blob(gzip.compress(data, 1), "application/vnd.docker.image.rootfs.diff.tar.gzip") for data in archives]
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {},
                             "rootfs": {"type": "layers", "diff_ids": ["sha256:" + sha256(data) for data in archives]}}).encode()
        self.id = "sha256:" + sha256(config)
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                    "config": self._blob(config, "application/vnd.docker.container.image.v1+json"), "layers": described}
        for name, data in (("version", b"Directory Transport Version: 1.1\n"), ("manifest.json", json.dumps(manifest).encode())):
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(data)

    @staticmethod
    def _archive(name, data):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        return file.getvalue()

    def _blob(self, data, kind):
        self.blobs[sha256(data)] = data
        with open(os.path.join(self.folder, sha256(data)), "wb") as file:
            file.write(data)
        return {"mediaType": kind, "size": len(data), "digest": "sha256:" + sha256(data)}

    def copy(self, *arguments, code=0, env=None):
        """Run skopeo copy; return its outcome."""
        result = Command(self.world, "skopeo", [program("skopeo"), "--insecure-policy", "copy"] + list(arguments), env=env).wait(60)
        assert (result.code == 0) == (code == 0), result.out
        return result

    def push(self, port, *flags, name="team/app:1"):
        self.copy("--dest-tls-verify=false", *flags, "dir:" + self.folder, "docker://127.0.0.1:%d/%s" % (port, name))

    def pull(self, port, out, *flags, code=0):
        """Pull through whatever listens there; every blob must be what it was."""
        folder = os.path.join(self.world.root, out)
        result = self.copy("--src-tls-verify=false", *flags, "docker://127.0.0.1:%d/team/app:1" % port, "dir:" + folder, code=code)
        if not code:
            self.verify(folder)
        return result

    def verify(self, folder):
        """Assert that a folder has every blob."""
        for digest in self.blobs:
            with open(os.path.join(folder, digest), "rb") as file:
                assert hashlib.sha256(file.read()).hexdigest() == digest


class TokenServer:
    """Gives tokens for everything to me:secret, or to strangers, too; `asked` has the queries of those that it gave."""

    def __init__(self, world, open_to_all=False):
        folder = tempfile.mkdtemp(prefix="tokens", dir=world.root)
        self.key, self.certificate = os.path.join(folder, "tokens.key"), os.path.join(folder, "tokens.pem")
        subprocess.run([program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tests", "-days", "2",
                        "-keyout", self.key, "-out", self.certificate], check=True, stderr=subprocess.DEVNULL)
        self.asked = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                user = self.headers.get("Authorization", "")
                self.answer(urllib.parse.urlsplit(self.path).query, open_to_all and not user or user == "Basic " + base64.b64encode(b"me:secret").decode())

            def do_POST(self):  # as containerd asks
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.answer(form, "username=me" in form and "password=secret" in form)

            def answer(self, text, good):
                query = urllib.parse.parse_qs(text)
                token = server.token(" ".join(query.get("scope", [])).split())
                body = json.dumps({"token": token, "access_token": token}).encode()
                if good:
                    server.asked.append(query)
                self.send_response(200 if good else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body) if good else 0))
                self.end_headers()
                self.wfile.write(body if good else b"")

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d/token" % self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def token(self, scopes):
        """A JSON web token for these scopes."""
        access = [dict(zip(("type", "name"), scope.split(":")), actions=scope.split(":")[2].split(",")) for scope in scopes]
        with open(self.certificate) as file:
            chain = ["".join(file.read().split("-----")[2].split())]
        now = int(time.time())
        claims = {"iss": "tests", "sub": "me", "aud": "registry", "exp": now + 600, "nbf": now - 60, "iat": now, "jti": "x", "access": access}
        parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": "RS256", "typ": "JWT", "x5c": chain}, claims)]
        signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", self.key], input=b".".join(parts), stdout=subprocess.PIPE, check=True).stdout
        return b".".join(parts + [base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Relay:
    """Passes TCP connections on to a port, at most `rate` bytes a second back on each; `reset` breaks them all."""

    def __init__(self, port, rate):
        self._target, self._rate = port, rate
        self._lock = threading.Lock()
        self._pairs, self._threads, self._ended = [], [], False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self._listener.getsockname()[1]
        self._spawn(self._accept)

    def _spawn(self, run, *arguments):
        thread = threading.Thread(target=run, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self._pairs += [near, far]
            self._spawn(self._pass, near, far, 0)
            self._spawn(self._pass, far, near, self._rate)

    def _pass(self, source, sink, rate):
        try:
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
        except OSError:
            pass
        for sock in (source, sink):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def reset(self):
        """Break all connections as a dying network does."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for sock in pairs:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
        for thread in self._threads:
            thread.join()
