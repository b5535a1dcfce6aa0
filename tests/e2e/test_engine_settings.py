"""`dfly.py daemon --install`: an engine's settings with the daemon, and without a trace of it."""
import json
import os
import subprocess
import sys

import pytest
from world import DFLY

URL = "http://127.0.0.1:65001"
ENGINES = ("docker", "containerd", "podman")
CRI = '[plugins."io.containerd.grpc.v1.cri".registry]'

CRI_3 = "[plugins.'io.containerd.cri.v1.images'.registry]"


class Etc:
    """A folder of settings, and the command that changes it."""

    def __init__(self, folder):
        self.folder = os.path.join(folder, "etc")
        os.mkdir(self.folder)

    def path(self, name):
        return os.path.join(self.folder, *name.split("/"))

    def put(self, name, text):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as file:
            file.write(text.encode())

    def text(self, name):
        with open(self.path(name)) as file:
            return file.read()

    def files(self):
        found = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    found[os.path.relpath(os.path.join(folder, name), self.folder)] = file.read()
        return found

    def run(self, *flags, code=0):
        done = subprocess.run([sys.executable, DFLY, "daemon", "--etc", self.folder] + list(flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == code, done
        assert len(done.stderr.splitlines()) == (1 if code else 0), done.stderr
        return (done.stdout + done.stderr).decode()


@pytest.fixture
def etc(world):
    return Etc(world.root)


THERE = {
    "docker": ("docker/daemon.json", ['{}', '{"debug":true,\n  "registry-mirrors" : ["https://m.example"]}', '{"log-level": "warn", "hosts": ["unix:///x"]}\n\n', ""]),
    "containerd": ("containerd/config.toml", ["version = 2\n", "version = 2\n" + CRI + "\n  [x]\n y = 1", 'root = "/r"', CRI + '\nconfig_path = "/etc/somewhere"\n', CRI,
                                               CRI + '\n  config_path = ""\n  ' + CRI.replace("]", ".mirrors]") + "\n",
                                               "version = 3\n" + CRI_3 + "\n  config_path = ''  # none\n  [x]\n", "version = 3\n" + CRI_3,
                                               "version = 3\n", CRI_3 + '\nconfig_path = "/etc/somewhere:/etc/elsewhere"\n', "# nothing\n"]),
    "podman": ("containers/registries.conf", ['unqualified-search-registries = ["docker.io"]\n']),
}


@pytest.mark.parametrize("engine,text", [(engine, text) for engine in ENGINES for text in THERE[engine][1] + [None]])
def test_what_is_put_in_is_taken_out_to_the_byte(etc, engine, text, world):
    if text is not None:
        etc.put(THERE[engine][0], text.replace("/etc/somewhere", etc.path("somewhere")))
    before = etc.files()
    shown = etc.run("--install", engine, "--dry-run")
    assert etc.files() == before and "+" in shown, "a dry run changes nothing"
    assert "written " in etc.run("--install", engine)
    there = etc.files()
    assert URL.partition("//")[2].encode() in b"".join(there.values())
    assert "nothing to do" in etc.run("--install", engine) and etc.files() == there
    etc.run("--uninstall", engine, "--dry-run")
    assert etc.files() == there
    etc.run("--uninstall", engine)
    assert etc.files() == before
    assert "nothing to do" in etc.run("--uninstall", engine)


def test_docker_keeps_what_was_changed_meanwhile(etc):
    etc.put("docker/daemon.json", '{"registry-mirrors": ["https://m.example"], "debug": true}')
    etc.run("--install", "docker")
    found = json.loads(etc.text("docker/daemon.json"))
    assert found == {"registry-mirrors": [URL, "https://m.example"], "debug": True}
    found["experimental"] = True
    etc.put("docker/daemon.json", json.dumps(found))
    etc.run("--uninstall", "docker")
    assert json.loads(etc.text("docker/daemon.json")) == {"registry-mirrors": ["https://m.example"], "debug": True, "experimental": True}
    assert list(etc.files()) == ["docker/daemon.json"]


def test_containerd_keeps_what_was_changed_meanwhile(etc):
    etc.put("containerd/config.toml", "version = 2\n")
    etc.run("--install", "containerd")
    etc.put("containerd/config.toml", 'root = "/r"\n' + etc.text("containerd/config.toml") + "  [plugins.x]\n")
    etc.run("--uninstall", "containerd")
    assert etc.files() == {"containerd/config.toml": b'root = "/r"\nversion = 2\n  [plugins.x]\n'}


@pytest.mark.parametrize("text,plugin", [
    (None, "io.containerd.grpc.v1.cri"), ("version = 2", "io.containerd.grpc.v1.cri"), ('root = "/r"\n', "cri"), ("version = 3\n", "io.containerd.cri.v1.images")])
def test_containerd_s_setting_is_where_its_version_looks_for_it(etc, text, plugin):
    if text:
        etc.put("containerd/config.toml", text)
    etc.run("--install", "containerd")
    found = etc.text("containerd/config.toml").replace('"%s"' % plugin, plugin)
    assert "[plugins.%s.registry]" % plugin in found and 'config_path = "%s"' % etc.path("containerd/certs.d") in found


def test_containerd_s_own_default_keeps_its_form(etc):
    text = CRI + '\n      config_path = ""\n'
    etc.put("containerd/config.toml", text)
    etc.run("--install", "containerd")
    assert etc.text("containerd/config.toml").startswith(CRI + '\n      config_path = "%s"  #' % etc.path("containerd/certs.d"))
    etc.put("containerd/config.toml", etc.text("containerd/config.toml") + "# more\n")
    etc.run("--uninstall", "containerd")
    assert etc.text("containerd/config.toml") == text + "# more\n"


@pytest.mark.parametrize("engine,name,text", [
    ("docker", "docker/daemon.json", "{"), ("docker", "docker/daemon.json", "[]"), ("docker", "docker/daemon.json", '{"registry-mirrors": 1}'),
    ("docker", "docker/daemon.json", "\xff"),
    ("containerd", "containerd/config.toml", CRI.replace("]", '.mirrors."docker.io"]') + "\n"),
    ("containerd", "containerd/config.toml", "version = 4\n"),
    ("containerd", "containerd/certs.d/_default/hosts.toml", 'server = "https://m.example"\n'),
    ("podman", "containers/registries.conf.d/50-dfly.conf", "# mine\n"),
])
def test_what_is_there_and_can_t_be_changed_is_left_as_it_is(etc, engine, name, text):
    etc.put(name, text)
    before = etc.files()
    assert name.rpartition("/")[2] in etc.run("--install", engine, code=2)
    assert etc.files() == before


def test_podman_and_containerd_know_several_registries(etc):
    mirrors = ("--registry", "https://registry.example", "--mirror", "quay.io=https://quay.io", "--port", "7001", "--hostip", "::1")
    etc.run("--install", "podman", *mirrors)
    text = etc.text("containers/registries.conf.d/50-dfly.conf")
    assert 'prefix = "registry.example"' in text and 'location = "[::1]:7001"' in text and 'location = "[::1]:7001/quay.io"' in text


def test_containerd_s_settings_of_single_registries_that_go_before_ours_are_named(etc):
    etc.put("containerd/certs.d/a.example_5000_/hosts.toml", 'server = "https://a.example:5000"\n')
    etc.put("containerd/certs.d/b.example/hosts.toml", "[host.'%s']\n" % URL)
    etc.put("containerd/certs.d/c.example/ca.crt", "")
    before = etc.files()
    named = [etc.path("containerd/certs.d/a.example_5000_/hosts.toml"), etc.path("containerd/certs.d/c.example")]
    for flags in (("--dry-run",), (), ()):  # also when ours is there already
        assert etc.run("--install", "containerd", *flags).splitlines()[-1].endswith("_default: " + ", ".join(named))
    assert "_default: " not in etc.run("--uninstall", "containerd") and etc.files() == before
    etc.put("containerd/config.toml", CRI + '\nconfig_path = "/etc/somewhere"\n')
    assert "_default: " not in etc.run("--install", "containerd", "--dry-run"), "it does not look there"
    for engine in ("docker", "podman"):
        assert "_default: " not in etc.run("--install", engine, "--dry-run")


def test_bad_flags_are_one_line(etc):
    for flags in (("--install", "rkt"), ("--install", "docker", "--uninstall", "docker"), ("--install", "docker", "--etc", "relative"),
                  ("--install", "podman", "--mirror", "nonsense")):
        etc.run(*flags, code=2)
    assert not etc.files()
