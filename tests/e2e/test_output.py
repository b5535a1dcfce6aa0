"""Progress: lines at intervals in a file, a bar on a terminal, quiet otherwise."""
import os
import pty
import re
import select
import subprocess

from world import MB, good


def test_progress_in_a_file_is_plain_lines(origin, supernode, host, blob):
    supernode()
    data = blob(6 * MB)
    command = host().start(origin.put("f", data, rate=MB), "-b")
    result = good(command.wait(), data)
    assert "\r" not in result.out and "\x1b" not in result.out
    assert re.search(r"\d+ ?%", result.stdout.split("download SUCCESS")[0] + result.stderr), result.out


def test_without_b_a_download_is_quiet(origin, supernode, host, blob):
    supernode()
    data = blob(4 * MB)
    result = host().get(origin.put("f", data, rate=MB), check=data)
    assert len(result.stdout.splitlines()) == 8 and not result.stderr, result.out


def test_progress_on_a_terminal_is_a_bar(world, origin, supernode, host, blob):
    node = supernode()
    here = host()
    data = blob(4 * MB)
    url = origin.put("f", data, rate=2 * MB)
    master, slave = pty.openpty()
    argv = world.dfly("get", "-u", url, "-o", here.path("out"), "--node", node.node, "--home", here.home, "--ip", "127.0.0.1", "-b")
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=dict(world.env, TERM="xterm"), close_fds=True)
    os.close(slave)
    said = b""
    try:
        while process.poll() is None or select.select([master], [], [], 0.2)[0]:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    said += os.read(master, 65536)
                except OSError:  # how a terminal says that its last writer has gone
                    break
        assert process.wait(30) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(master)
    text = said.decode("utf-8", "replace")
    assert re.search(r"\r[^\n]*\d+ ?%", text), text
    assert "download SUCCESS" in text


def test_when_nobody_reads_its_output_it_ends_quietly_or_goes_on(world, origin, supernode, host, blob):
    """As in `dfly.py get … | head -1`: dying is fine, a traceback or half a file is not."""
    node = supernode()
    here = host()
    data = blob(4 * MB)
    url = origin.put("f", data, rate=2 * MB)
    argv = world.dfly("get", "-u", url, "-o", here.path("out"), "--node", node.node, "--home", here.home, "--ip", "127.0.0.1", "-b")
    read, write = os.pipe()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, env=world.env)
    os.close(write)
    os.close(read)
    try:
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert b"Traceback" not in said and process.returncode >= 0, said
    if os.path.exists(here.path("out")):
        with open(here.path("out"), "rb") as f:
            assert f.read() == data
    here.get(url, check=data)
