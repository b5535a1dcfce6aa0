"""Container engines of one host each, as Debian packages them: their settings lie in a folder, `etc`, of the host's."""
import base64
import json
import os
import re
import shutil

from real.registries import program
from world import Command, wait_for


class Engine:
    """An engine whose settings say to ask a daemon first."""

    NAME = ""

    def __init__(self, world, host):
        self.world, self.folder = world, os.path.join(host.dir, self.NAME)
        self.etc = os.path.join(host.dir, "etc")
        self.env = {"TMPDIR": os.path.join(self.folder, "tmp")}  # a dockerd that ends slowly leaves a dump of its containerd there
        os.makedirs(self.env["TMPDIR"], exist_ok=True)
        os.makedirs(self.etc, exist_ok=True)

    def run(self, argv, code=0, env=None, limit=90):
        result = Command(self.world, self.NAME, argv, env=dict(self.env, **(env or {}))).wait(limit)
        assert (result.code == 0) == (code == 0), result.out + result.stderr
        return result

    def close(self):
        """End what runs."""

    def store_account(self, address, user, name):
        """Write the file of accounts with one for whoever listens at an address; return its path."""
        path = os.path.join(self.folder, name)
        with open(path, "w") as file:
            json.dump({"auths": {address: {"auth": base64.b64encode(user.encode()).decode()}} if user else {}}, file)
        return path


class Docker(Engine):
    NAME = "docker"

    def __init__(self, world, host):
        super().__init__(world, host)
        self._socket = "unix://" + os.path.join(self.folder, "s")
        self._server = None

    def start(self):
        """Start the engine with the settings that are there."""
        os.makedirs(os.path.join(self.etc, "docker"), exist_ok=True)
        self._server = Command(self.world, "dockerd", [
            program("dockerd"), "--config-file", os.path.join(self.etc, "docker", "daemon.json"), "--data-root", os.path.join(self.folder, "data"),
            "--exec-root", os.path.join(self.folder, "exec"), "--pidfile", os.path.join(self.folder, "pid"), "-H", self._socket,
            "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"], env=self.env)
        wait_for(lambda: "API listen on" in self._server.output() or not self._server.running(), 60, "dockerd")
        assert self._server.running(), self._server.output()

    def command(self, *words):
        return [program("docker"), "--config", self.folder, "-H", self._socket] + list(words)

    def pull(self, name, code=0):
        """Pull an image of docker.io; return its id."""
        self.run(self.command("pull", "-q", name), code=code)
        return "" if code else self.run(self.command("image", "inspect", "-f", "{{.Id}}", name)).out.strip()

    def forget(self, name):
        """Remove an image."""
        self.run(self.command("rmi", name))

    def pull_by_name(self, daemon, name, user="", code=0):
        """Pull an image that is asked of the daemon itself; return its id."""
        self.store_account("127.0.0.1:%d" % daemon.address[1], user, "config.json")
        return self.pull("127.0.0.1:%d/%s" % (daemon.address[1], name), code=code)

    def forget_by_name(self, daemon, name):
        """Remove such an image."""
        self.forget("127.0.0.1:%d/%s" % (daemon.address[1], name))

    def close(self):
        if self._server:
            self._server.stop(30)


class Containerd(Engine):
    NAME = "containerd"
    CONFIG = 'root = "%s"\nstate = "%s"\n[grpc]\n  address = "%s"\n'

    def __init__(self, world, host):
        super().__init__(world, host)
        self._socket = os.path.join(self.folder, "s")
        self._server = None

    def start(self):
        """Start the engine with the settings that are there, and what else it needs."""
        path = os.path.join(self.etc, "containerd", "config.toml")
        with open(path) as file:
            text = file.read()
        with open(os.path.join(self.folder, "config.toml"), "w") as file:
            file.write(self.CONFIG % (os.path.join(self.folder, "root"), os.path.join(self.folder, "state"), self._socket) + text)
        self._server = Command(self.world, "containerd", [program("containerd"), "-c", os.path.join(self.folder, "config.toml")], env=self.env)
        wait_for(lambda: os.path.exists(self._socket) and "successfully booted" in self._server.output() or not self._server.running(), 60, "containerd")
        assert self._server.running(), self._server.output()

    def login(self, user):
        """Return the flags of a pull by `user`, NAME:PASSWORD."""
        return ("--user", user)

    def command(self, *words):
        return [program("ctr"), "-a", self._socket] + list(words)

    def pull(self, name, *flags, code=0):
        """Pull an image of docker.io; return its id."""
        self.run(self.command("images", "pull", "--snapshotter", "native", "--hosts-dir", os.path.join(self.etc, "containerd", "certs.d"),
                              *flags, "docker.io/" + name), code=code)
        if code:
            return ""
        listed = self.run(self.command("content", "ls")).out
        manifest = self.run(self.command("images", "ls", "name==docker.io/" + name)).out.split("sha256:")[1].split()[0]
        assert manifest in listed
        return json.loads(self.run(self.command("content", "get", "sha256:" + manifest)).out)["config"]["digest"]

    def forget(self, name):
        """Remove an image."""
        self.run(self.command("images", "rm", "--sync", "docker.io/" + name))

    def close(self):
        if self._server:
            self._server.stop(30)


class Podman(Engine):
    NAME = "podman"

    def login(self, user):
        """Return the flags of a pull whose mirror gets `user`, NAME:PASSWORD: podman shows a mirror nobody else's credentials."""
        with open(os.path.join(self.etc, "containers", "registries.conf.d", "50-dfly.conf")) as file:
            mirror = re.findall(r'location = "([^"/]+)', file.read())[-1]
        return ("--authfile", self.store_account(mirror, user, "auth.json"))

    def start(self):
        """It has no server."""
        with open(os.path.join(self.folder, "policy.json"), "w") as file:
            file.write('{"default": [{"type": "insecureAcceptAnything"}]}')

    def command(self, *words):
        return [program("podman"), "--root", os.path.join(self.folder, "root"), "--runroot", os.path.join(self.folder, "run"),
                "--tmpdir", os.path.join(self.folder, "tmp"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"] + list(words)

    def pull(self, name, *flags, code=0):
        """Pull an image of docker.io; return its id."""
        settings = os.path.join(self.etc, "containers", "registries.conf.d", "50-dfly.conf")
        result = self.run(self.command("pull", "-q", "--signature-policy", os.path.join(self.folder, "policy.json"), *flags, "docker.io/" + name),
                          code=code, env={"CONTAINERS_REGISTRIES_CONF": settings, "CONTAINERS_REGISTRIES_CONF_DIR": self.folder})
        return "" if code else "sha256:" + result.out.split()[-1]

    def pull_by_name(self, daemon, name, user="", code=0):
        """Pull an image whose mirror the daemon is, and nobody else; return its id."""
        address = "127.0.0.1:%d" % daemon.address[1]
        settings = os.path.join(self.folder, "by_name.conf")
        with open(settings, "w") as file:
            file.write('[[registry]]\nlocation = "%s"\ninsecure = true\n' % address)
        result = self.run(self.command("pull", "-q", "--signature-policy", os.path.join(self.folder, "policy.json"), "--authfile",
                                       self.store_account(address, user, "by_name.json"), address + "/" + name),
                          code=code, env={"CONTAINERS_REGISTRIES_CONF": settings, "CONTAINERS_REGISTRIES_CONF_DIR": self.folder})
        return "" if code else "sha256:" + result.out.split()[-1]

    def forget_by_name(self, daemon, name):
        """Remove such an image."""
        self.run(self.command("rmi", "127.0.0.1:%d/%s" % (daemon.address[1], name)))

    def forget(self, name):
        """Remove an image."""
        self.run(self.command("rmi", "docker.io/" + name))

    def close(self):
        shutil.rmtree(os.path.join(self.folder, "root"), ignore_errors=True)


ENGINES = {engine.NAME: engine for engine in (Docker, Containerd, Podman)}
