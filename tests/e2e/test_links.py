"""Called through a link named like one of Dragonfly's programs, the file is that program, exit codes included."""
import os

import pytest
from world import DFLY, MB, Command, Supernode, bad, dead_port, good, md5, wait_for


@pytest.fixture
def link(world):
    """`link("dfget")` makes a link of that name to dfly.py and returns its path."""
    def make(name):
        path = os.path.join(world.root, name)
        os.symlink(DFLY, path)
        return path
    return make


@pytest.fixture
def dfget(world, supernode, host, link):
    """`dfget(*flags)` runs dfget once, with a home and an output of its own."""
    program, here = link("dfget"), host()

    def run(*flags, node=None):
        argv = [world.python, program, "--home", here.home, "--ip", "127.0.0.1", "-o", here.path("out"), "-n", node or world.node(), *flags]
        return Command(world, "dfget", argv, here.path("out")).wait()
    return run


def test_dfget_downloads(dfget, origin, supernode, blob):
    supernode()
    result = dfget("-u", origin.put("f", blob(MB)))
    assert result.code == 0 and result.data == blob(MB), result.out


def test_dfget_fails_with_80_while_another_download_writes_the_same_output(dfget, origin, supernode, host, blob):
    """As 1.0 does with everything that fails once it has begun; 77 is for what fails before."""
    supernode()
    here, url = host(), origin.put("f", blob(2 * MB), stall_after=MB)
    first = here.start(url)
    wait_for(lambda: any(name.endswith(".journal") for name in here.leftovers()), 20, "a download that has begun")
    result = bad(dfget("-u", url, "-o", here.path("out")), 80)
    assert "download FAIL(1104)" in result.stdout and "another download is writing it" in result.stdout, result.out
    result = bad(here.get(url), 3)
    assert "another download is writing it" in result.stdout, result.out
    origin.release("f")
    good(first.wait(), blob(2 * MB))


def test_dfget_fails_with_80_when_the_download_failed(dfget, origin, supernode, blob):
    supernode()
    result = bad(dfget("-u", origin.put("f", b"", status=404)), 80)
    assert "download FAIL(1104)" in result.stdout, result.out
    bad(dfget("-u", origin.put("g", blob(MB)), "--notbs", node="127.0.0.1:%d" % dead_port()), 80)
    bad(dfget("-u", origin.put("h", blob(MB)), "-m", md5(b"other")), 80)


def test_dfget_fails_with_79_when_credentials_are_missing(dfget, origin, supernode, blob):
    supernode()
    result = bad(dfget("-u", origin.put("f", blob(MB), auth="Basic eDp5")), 79)
    assert "download FAIL(1103)" in result.stdout and "reason:10 error:{\"Code\":608,\"Msg\":\"" in result.stdout, result.out
    assert "reason:1010 " in bad(dfget("-u", origin.put("f", blob(MB), auth="Basic eDp5"), "--notbs"), 79).stdout


def test_dfget_fails_with_1_for_bad_options(dfget, supernode):
    supernode()
    bad(dfget("-u", "nonsense"), 1)
    bad(dfget("--bogus"), 1)


def test_dfget_fails_with_77_when_it_cannot_prepare(world, supernode, origin, host, link, blob):
    node = supernode()
    here = host()
    with open(here.path("file"), "w"):
        pass
    argv = [world.python, link("dfget"), "--home", here.path("file/home"), "--ip", "127.0.0.1", "-o", here.path("out"), "-n", node.node,
            "-u", origin.put("f", blob(1000))]
    assert "download FAIL(1101)" in bad(Command(world, "dfget", argv, here.path("out")).wait(), 77).stdout


def test_dfget_version_is_printed(world, link):
    result = Command(world, "dfget", [world.python, link("dfget"), "version"]).wait()
    assert result.code == 0 and result.stdout.startswith("dfget version:")
    result = Command(world, "supernode", [world.python, link("supernode"), "version"]).wait()
    assert result.code == 0 and result.stdout.startswith("dfly ")


def test_supernode_serves(world, link, origin, host, blob):
    home = os.path.join(world.root, "home")
    command = Command(world, "supernode", [world.python, link("supernode"), "--home-dir", home, "--port", "0", "--download-port", "0",
                                           "--advertise-ip", "127.0.0.1"])
    found = wait_for(lambda: Supernode.LISTENING.search(command.stdout), 20)
    url = origin.put("f", blob(MB))
    assert host().get(url, node="127.0.0.1:" + found.group(2), check=blob(MB)).reason == 0
    assert command.stop() == 0


def test_the_settings_of_dragonfly_1_0_are_read(world, link, origin, host, blob):
    home, here = os.path.join(world.root, "home"), host()
    settings = os.path.join(world.root, "supernode.yml")
    with open(settings, "w") as file:
        file.write("base:\n  cdnPattern: local\n  listenPort: 0\n  downloadPort: 0\n  homeDir: %s\n  advertiseIP: 127.0.0.1\n  maxBandwidth: 200M\n"
                   "  systemReservedBandwidth: 20M\n  peerUpLimit: 5\n  taskExpireTime: 3m0s\n  CleanRatio: 1\n  debug: true\n"
                   "  logConfig:\n    maxSize: 40\nplugins: {}\nstorages: {}\n" % home)
    command = Command(world, "supernode", [world.python, link("supernode"), "--config", settings])
    found = wait_for(lambda: Supernode.LISTENING.search(command.stdout), 20)
    assert os.path.exists(os.path.join(home, "logs", "app.log"))
    settings = os.path.join(world.root, "dfget.yml")
    with open(settings, "w") as file:
        file.write("nodes:\n- 127.0.0.1:%s=2\nlocalLimit: 20M\nclientQueueSize: 6\nworkHome: %s\nlogConfig: {}\n" % (found.group(2), here.home))
    run = [world.python, link("dfget"), "--config", settings, "-u", origin.put("f", blob(MB)), "-o", here.path("out"), "--ip", "127.0.0.1", "--notbs"]
    good(Command(world, "dfget", run, here.path("out")).wait(), blob(MB))
    assert os.path.exists(os.path.join(here.home, "logs", "dfclient.log")) and command.stop() == 0


@pytest.mark.parametrize("program, text", [("dfget", "bogus: 1"), ("dfget", "nodes: {a"), ("dfget", "localLimit: fast"), ("dfget", "- a"),
                                           ("supernode", "base:\n  bogus: 1"), ("supernode", "base: 1"), ("supernode", "base:\n  cdnPattern: source"),
                                           ("supernode", "base:\n  homeDir:\n    a: b")])
def test_settings_of_dragonfly_1_0_that_make_no_sense_are_said(world, link, program, text):
    settings = os.path.join(world.root, "x.yml")
    with open(settings, "w") as file:
        file.write(text + "\n")
    result = Command(world, program, [world.python, link(program), "--config", settings]
                     + (["-u", "http://127.0.0.1/x", "-o", os.path.join(world.root, "x")] if program == "dfget" else [])).wait(20)
    assert result.code == (1 if program == "dfget" else 2) and len(result.stderr.splitlines()) == 1, result.out


def test_dfdaemon_is_known(world, link):
    result = Command(world, "dfdaemon", [world.python, link("dfdaemon"), "--help"]).wait(20)
    assert "Traceback" not in result.out and result.code in (0, 2), result.out


@pytest.mark.parametrize("arguments", [["bogus"], [], ["get", "--help"], ["supernode", "--help"], ["peer", "--help"], ["demo", "--help"], ["config", "--help"], ["--help"]])
def test_the_command_line_explains_itself(world, arguments):
    result = world.run(*arguments)
    assert result.code == (0 if "--help" in arguments else 2) and result.out.strip() and "Traceback" not in result.out, result.out


@pytest.mark.parametrize("arguments", [["--port", "99999"], ["--max-bandwidth", "x"], ["--bogus"], ["--home", "/dev/null/x"], ["--config", "/nonexistent"],
                                       ["--advertise-ip", "here"], ["--max-bandwidth", "20M", "--system-bandwidth", "20M"]])
def test_a_supernode_with_bad_settings_says_so_and_ends(world, arguments):
    home = os.path.join(world.root, "h")
    result = world.run("supernode", "--home", home, "--port", "0", "--download-port", "0", *arguments, timeout=20)
    assert result.code in (2, 3) and len(result.stderr.splitlines()) == 1, result.out


def test_a_second_supernode_on_the_same_port_or_home_says_so_and_ends(world, supernode):
    node = supernode()
    for home, port in ((os.path.join(world.root, "other"), node.port), (node.home, 0)):
        result = world.run("supernode", "--home", home, "--port", str(port), "--download-port", "0", timeout=20)
        assert result.code in (2, 3, 4) and len(result.stderr.splitlines()) == 1, result.out
