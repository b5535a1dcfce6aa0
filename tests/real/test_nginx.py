"""Files from a real nginx, as Debian has it."""
import os
import re
import shutil
import signal
import socket
import subprocess

import pytest
from real.registries import program
from world import MB, Command, bad, dead_port, send, wait_for

SIZE = 8 * MB
CONFIG = """
daemon off; master_process off; pid {root}/nginx.pid; error_log {root}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  log_format seen '$request_method $request_uri $status $body_bytes_sent "$http_range" "$http_if_range"';
  access_log {root}/access.log seen;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3; uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{
    listen 127.0.0.1:{port};
    root {root}/files;
    location /slow/ {{ limit_rate 2m; alias {root}/files/; }}
    location /whole/ {{ max_ranges 0; alias {root}/files/; }}
    location /untagged/ {{ etag off; alias {root}/files/; }}
    location /nameless/ {{ etag off; if_modified_since off; add_header Last-Modified ""; alias {root}/files/; }}
    location /asked/ {{ add_header Cache-Control no-cache; alias {root}/files/; }}
    location /lasting/ {{ expires 1h; alias {root}/files/; }}
    location /packed/ {{ gzip on; gzip_types *; gzip_min_length 0; alias {root}/files/; }}
    location /private/ {{ auth_basic here; auth_basic_user_file {root}/passwords; alias {root}/files/; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /moved2/$1 permanent; }}
    location /moved2/ {{ rewrite ^/moved2/(.*)$ /$1 redirect; }}
    location /busy/ {{ return 503; }}
    location /teapot/ {{ return 429; }}
    location /forbidden/ {{ deny all; }}
  }}
}}
"""


class Nginx:
    """A running nginx whose files lie in `files`."""

    def __init__(self, world):
        self.world, self.root, self.port = world, os.path.join(world.root, "nginx"), dead_port()
        os.makedirs(os.path.join(self.root, "files"))
        with open(os.path.join(self.root, "passwords"), "w") as file:
            file.write("me:{PLAIN}secret\n")
        with open(os.path.join(self.root, "nginx.conf"), "w") as file:
            file.write(CONFIG.format(root=self.root, port=self.port))
        os.chmod(world.root, 0o755)
        self.start()

    def start(self):
        self.process = Command(self.world, "nginx", [program("nginx"), "-p", self.root, "-c", os.path.join(self.root, "nginx.conf")])

        def listens():
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.port)) == 0
        wait_for(listens, 20, "nginx on port %d\n%s" % (self.port, self.process.output()))

    def put(self, name, data, place=""):
        """Put a file in place of what was there; return its URL."""
        path = os.path.join(self.root, "files", name)
        with open(path + ".new", "wb") as file:
            file.write(data)
        os.rename(path + ".new", path)
        return self.url(place + name)

    def url(self, path):
        return "http://127.0.0.1:%d/%s" % (self.port, path)

    def seen(self):
        """Return (method, path, status, bytes, range, if-range) of all answers."""
        with open(os.path.join(self.root, "access.log")) as file:
            return [(m[0], m[1], int(m[2]), int(m[3]), m[4], m[5]) for m in re.findall(r'(\S+) (\S+) (\d+) (\d+) "(.*)" "(.*)"', file.read())]

    def sent(self):
        return sum(row[3] for row in self.seen() if row[2] in (200, 206))


@pytest.fixture
def nginx(world):
    made = Nginx(world)
    yield made
    made.process.kill()
    assert subprocess.call(["grep", "-c", "alert", os.path.join(made.root, "error.log")], stdout=subprocess.DEVNULL) != 0
    shutil.rmtree(made.root)


@pytest.mark.parametrize("way", [("--notbs",), ("-p", "source")], ids=["swarm", "source"])
@pytest.mark.parametrize("place", ["", "slow/", "whole/", "untagged/", "nameless/", "packed/", "moved/"])
def test_whatever_it_says_of_a_file(nginx, supernode, host, blob, place, way):
    supernode()
    url = nginx.put("f", blob(SIZE), place)
    host().get(url, *way, check=blob(SIZE))
    assert nginx.sent() == SIZE


@pytest.mark.parametrize("place, status", [("busy/", 503), ("teapot/", 429), ("forbidden/", 403), ("nothing/", 404)])
def test_what_it_refuses(nginx, supernode, host, blob, place, status):
    supernode()
    nginx.put("f", blob(SIZE))
    assert str(status) in bad(host().get(nginx.url(place + "f"), "--notbs"), 1, 8).out


def test_credentials(nginx, supernode, host, blob):
    supernode()
    url = nginx.put("f", blob(SIZE), "private/")
    bad(host().get(url, "--notbs"), 6)
    for _ in range(2):
        host().get(url.replace("://", "://me:secret@"), "--notbs", check=blob(SIZE))
    bad(host().get(url, "--notbs"), 6)
    assert nginx.sent() == SIZE


@pytest.mark.parametrize("place, questions", [("asked/", 1), ("lasting/", 0)])
def test_how_long_it_is_not_asked(nginx, supernode, host, blob, place, questions):
    node = supernode()
    url = nginx.put("f", blob(SIZE), place)
    host().get(url, "--notbs", check=blob(SIZE))
    node.kill()
    supernode(home=node.home)
    host().get(url, "--notbs", check=blob(SIZE))
    assert [row[2] for row in nginx.seen()] == [200] + [304] * questions


@pytest.mark.parametrize("change", [False, True])
def test_a_supernode_that_is_killed_in_the_middle_goes_on_by_range_if_it_is_the_same(nginx, supernode, host, blob, change):
    node = supernode()
    url = nginx.put("f", blob(SIZE), "slow/")
    command = host().start(url)
    wait_for(lambda: node.metrics().get("dfly_origin_bytes_total", 0) > SIZE // 3, 20)
    node.kill()
    command.kill()
    if change:
        nginx.put("f", blob(SIZE, "new"))
    node = supernode(home=node.home)
    host().get(url, "--notbs", check=blob(SIZE, "new" if change else 0))
    rows = nginx.seen()[1:]
    if change:
        assert [row[2] for row in rows] == [200]
    else:
        assert [row[2] for row in rows if row[2] != 304] == [206] and rows[-1][5].startswith("\\x22") and rows[-1][3] < SIZE * 3 // 4, rows


def test_a_file_that_changes_while_it_is_fetched_is_never_mixed(nginx, supernode, host, blob):
    node = supernode()
    url = nginx.put("f", blob(SIZE), "slow/")
    command = host().start(url)
    wait_for(lambda: node.metrics().get("dfly_origin_bytes_total", 0) > SIZE // 3, 20)
    nginx.put("f", blob(SIZE, "new"))
    send(nginx.process.pid, signal.SIGKILL)  # in the middle of a body
    wait_for(lambda: not nginx.process.running(), 10)
    nginx.start()
    result = command.wait()
    assert result.code == 0 and result.data == blob(SIZE, "new"), result.out


def test_one_that_dies_in_the_middle_is_asked_for_the_rest(nginx, supernode, host, blob):
    node = supernode()
    url = nginx.put("f", blob(SIZE), "slow/")
    command = host().start(url, "--notbs")
    wait_for(lambda: node.metrics().get("dfly_origin_bytes_total", 0) > SIZE // 3, 20)
    send(nginx.process.pid, signal.SIGKILL)
    wait_for(lambda: not nginx.process.running(), 10)
    nginx.start()
    assert command.wait().data == blob(SIZE)
    assert nginx.seen()[-1][2] == 206
