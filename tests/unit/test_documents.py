"""The README's snippets and the example of the configuration, held against the program."""
import os
import re
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import dfly  # noqa: E402

PARSERS = {"get": lambda: dfly.get_parser("x"), "supernode": lambda: dfly.supernode_parser("x"), "daemon": lambda: dfly.daemon_parser("x"),
           "config": dfly.config_parser}
#: Of a command line, not of a host; or of [node].
ELSEWHERE = {"help", "config", "version", "install", "uninstall", "dry-run", "etc", "url", "output", "md5", "identifier", "header", "dfdaemon", "node",
             "compress"}
IN_NODE = {"get": {"config-service"}, "daemon": {"config-service"}}


def text_of(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def snippet(first):
    """The README's indented block that begins behind a line."""
    lines = text_of("README.md").split("    # " + first, 1)[1].splitlines()[1:]
    block = []
    for line in lines:
        if line.startswith("    #") or (line and not line.startswith("    ")):
            break
        block.append(line[4:])
    return "\n".join(block).strip() + "\n"


@pytest.mark.parametrize("engine,first,path", [
    ("docker", "docker: /etc/docker/daemon.json", "docker/daemon.json"),
    ("containerd", "containerd: /etc/containerd/certs.d/_default/hosts.toml", "containerd/certs.d/_default/hosts.toml"),
    ("containerd", "containerd: /etc/containerd/config.toml", "containerd/config.toml"),
    ("podman", "podman, skopeo, cri-o: /etc/containers/registries.conf.d/50-dfly.conf", "containers/registries.conf.d/50-dfly.conf"),
])
def test_an_engine_s_snippet_is_what_install_writes(tmp_path, engine, first, path):
    subprocess.run([sys.executable, os.path.join(ROOT, "dfly.py"), "daemon", "--install", engine, "--etc", str(tmp_path)], check=True)
    written = (tmp_path / path).read_text().replace(str(tmp_path), "/etc")
    written = re.sub(r" *%s\n" % re.escape(dfly.OURS), "\n", written).lstrip()
    assert snippet(first) == written


def test_the_unit_file_is_one(tmp_path):
    text = snippet("/etc/systemd/system/dfdaemon.service")
    assert "ExecStart=/usr/bin/python3 /usr/local/bin/dfly.py daemon" in text
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here")
    path = tmp_path / "dfdaemon.service"
    path.write_text(text.replace("/usr/bin/python3 /usr/local/bin/dfly.py", sys.executable + " " + os.path.join(ROOT, "dfly.py")))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert "dfdaemon.service" not in done.stdout.decode(), done.stdout


@pytest.mark.parametrize("section", sorted(PARSERS))
def test_the_example_shows_every_setting_and_is_taken_as_it_is(tmp_path, section):
    example = re.sub(r"(?m)^#(?=[\w-]+ =)", "", text_of("conf", "dragonfly.conf.example"))
    body = re.split(r"(?m)^\[(.+)\]\n", example)
    sections = dict(zip(body[1::2], body[2::2]))
    assert len(body[1::2]) == len(sections), "a section twice"
    shown = set(re.findall(r"(?m)^([\w-]+) =", sections[section]))
    parser = PARSERS[section]()
    flags = [{name.lstrip("-") for name in action.option_strings if name.startswith("--")} for action in parser._actions
             if action.option_strings and not action.help.startswith(("accepted for compatibility", "not used"))]
    assert not shown - set().union(*flags)
    assert not [names for names in flags if not names & (shown | ELSEWHERE | IN_NODE.get(section, set()))]
    path = tmp_path / "dragonfly.conf"
    path.write_text(re.sub(r"(?m)^[\w-]+ = *(;.*)?$", "", example))
    dfly._parse(parser, section, ["--config", str(path)])
