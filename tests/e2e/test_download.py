"""One host, one supernode, one origin: the plain download and what it prints."""
import os
import re
import stat

import pytest
from world import CONTENT, MB, PIECE, bad, dead_port, good, md5

SIZES = {"empty": 0, "one_byte": 1, "five_bytes": 5, "just_under_a_piece": CONTENT - 1, "exactly_one_piece": CONTENT,
         "one_byte_more": CONTENT + 1, "wrapped_piece_size": PIECE, "two_pieces": 2 * CONTENT, "several_mb": 7 * MB + 13,
         "larger_pieces": 40 * MB + 1}


def test_files_of_every_size_arrive_as_they_are(origin, supernode, host, blob):
    supernode()
    here = host()
    for name, size in SIZES.items():
        data = blob(size, name)
        here.get(origin.put(name, data), out=name, check=data)
        assert origin.gets(name) <= 1 or size == 0, origin.requests(name)
    assert not here.leftovers()


def test_stdout_is_what_dfget_prints_and_one_line_more(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f.bin", blob(MB))
    result = host().get(url, check=blob(MB))
    lines = result.stdout.splitlines()
    patterns = [r"--\d{4}-\d\d-\d\d \d\d:\d\d:\d\d--  " + re.escape(url), r"dfget version:\S+", r"workspace:/\S+", r"sign:\d+-\d+\.\d{3}",
                r"client:127\.0\.0\.1 connected to node:" + re.escape(node.node), r"start download by dragonfly\.\.\.",
                r"download SUCCESS cost:\d+\.\d{3}s length:1048576 reason:0", r"\S+ MB in \S+ s .*from: .*"]
    assert len(lines) == len(patterns), result.stdout
    for line, pattern in zip(lines, patterns):
        assert re.match(pattern + "$", line), line
    assert not result.stderr


def test_the_last_line_says_where_the_bytes_came_from(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(3 * MB))
    first = host().get(url, check=blob(3 * MB))
    assert first.shares == {"origin": 0, "supernode": 100, "peers": 0}, first.last
    direct = host().get(url, "-p", "source", check=blob(3 * MB))
    assert direct.shares == {"origin": 100, "supernode": 0, "peers": 0}, direct.last


def test_without_o_the_file_is_named_like_the_url(world, origin, supernode, host, blob):
    node = supernode()
    here = host()
    url = origin.put("some.tar.gz", blob(1000))
    result = world.run("get", "-u", url + "?a=b", "--node", node.node, "--home", here.home, "--ip", "127.0.0.1", cwd=here.dir)
    assert result.code == 0, result.out
    with open(here.path("some.tar.gz"), "rb") as f:
        assert f.read() == blob(1000)


def test_every_spelling_of_a_flag_is_taken(origin, supernode, host, blob):
    node = supernode()
    here = host()
    url = origin.put("f", blob(1000))
    here.get(url, "-O", here.path("capital"), "-m", md5(blob(1000)), "-e", "30", "-s", "100M", "--totallimit", "500M", "--callsystem", "test",
             "--console", "--dfdaemon", "--clientqueue", "6", "--minrate", "64KB", "--expiretime", "3m0s", "--alivetime", "5m", "-p", "p2p",
             "--verbose", "-b", "--notbs", "--port", "0", "-n", node.node + "=2", "--insecure", "-f", "x&y")
    with open(here.path("capital"), "rb") as f:
        assert f.read() == blob(1000)
    here.get(url, "--timeout", "30s", "-i", "id1", "--header", "X: 1", check=blob(1000))


def test_an_existing_output_is_replaced_only_by_a_whole_file(origin, supernode, host, blob):
    supernode()
    here = host()
    with open(here.path("out"), "wb") as f:
        f.write(b"old")
    url = origin.put("f", blob(MB), wrong=5)
    assert here.get(url, "-m", md5(blob(MB))).data == b"old"
    here.get(origin.put("g", blob(MB)), check=blob(MB))


def test_cdn_pattern_takes_all_from_the_supernode(origin, supernode, host, blob):
    supernode()
    data = blob(2 * MB)
    url = origin.put("f", data)
    host().get(url, check=data)
    result = host().get(url, "-p", "cdn", check=data)
    assert result.shares["supernode"] == 100 and origin.gets("f") == 1


def test_filtered_query_parameters_make_one_task(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(MB))
    host().get(url + "?token=1&v=2", "-f", "token", check=blob(MB))
    host().get(url + "?token=3&v=2", "-f", "token", check=blob(MB))
    assert origin.gets("f") == 1
    host().get(url + "?token=3&v=4", "-f", "token", check=blob(MB))
    assert origin.gets("f") == 2


def test_an_identifier_makes_another_task(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(MB, 1))
    host().get(url, "-i", "v1", check=blob(MB, 1))
    origin.put("f", blob(MB, 2))
    host().get(url, "-i", "v2", check=blob(MB, 2))
    assert origin.gets("f") == 2


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_a_right_md5_is_accepted_and_a_wrong_one_leaves_no_file(origin, supernode, host, blob, pattern):
    supernode()
    data = blob(2 * MB)
    url = origin.put("f", data)
    host().get(url, "-m", md5(data), "-p", pattern, check=data)
    here = host()
    bad(here.get(url, "-m", "0" * 32, "-p", pattern), 9)
    assert "out" not in os.listdir(here.dir)


@pytest.mark.parametrize("arguments", [
    ["-u", "ftp://127.0.0.1/x"], ["-u", "nonsense"], [], ["-u", "http://127.0.0.1/x", "--bogus"],
    ["-u", "http://127.0.0.1/x", "-m", "xyz"], ["-u", "http://127.0.0.1/x", "-s", "fast"],
    ["-u", "http://127.0.0.1/x", "-e", "soon"], ["-u", "http://127.0.0.1/x", "-p", "carrier-pigeon"],
    ["-u", "http://127.0.0.1/x", "--minrate", "0"], ["-u", "http://[::1/x"], ["-u", "http://127.0.0.1:99999/x"], ["-u", "http://127.0.0.1/x", "--header", "Range: bytes=-5"],
    ["-u", "http://127.0.0.1/x", "-n", "host:99999"], ["-u", "http://127.0.0.1/x", "-n", "a:b:c"], ["-u", "http://127.0.0.1/x", "--ip", "here"],
    ["-u", "http://127.0.0.1/x", "--cacerts", "/nonexistent.pem"], ["-u", "http://127.0.0.1/x", "--cacerts", __file__],
    ["-u", "http://127.0.0.1/x", "--notbs=perhaps"],
    ["-u", "http://127.0.0.1/x", "--header", "no colon"],
    ["-u", "http://127.0.0.1/x", "--config", "/nonexistent.conf"]])
def test_bad_usage_is_said_in_one_line(world, host, arguments):
    here = host()
    result = world.run("get", "--home", here.home, "-o", here.path("out"), *arguments)
    assert result.code == 2, result.out
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.out, result.out


def test_an_output_that_cannot_be_written_is_said_before_the_download(origin, supernode, host, blob):
    supernode()
    here = host()
    url = origin.put("f", blob(MB))
    os.mkdir(here.path("folder"))
    assert here.get(url, out="folder").code in (2, 3)
    assert here.get(url, out="no/such/folder/out").code in (0, 3)
    with open(here.path("plain"), "w"):
        pass
    bad(here.get(url, out="plain/out"), 3)


def test_what_is_not_a_file_is_not_replaced_by_one(origin, supernode, host, blob):
    """As root, `-o /dev/null` would take that from everybody."""
    supernode()
    here = host()
    os.mkfifo(here.path("pipe"))
    result = here.get(origin.put("f", blob(MB)), out="pipe")
    assert result.code == 2 and stat.S_ISFIFO(os.stat(here.path("pipe")).st_mode), result.out


@pytest.mark.parametrize("pattern", ["p2p", "source"])
@pytest.mark.parametrize("range_", ["bytes=-500", "bytes=0-1,5-6", "bytes=10-5", "lines=1-2"])
def test_a_range_that_is_not_one_run_of_bytes_is_refused(origin, supernode, host, blob, range_, pattern):
    supernode()
    bad(host().get(origin.put("f", blob(MB)), "--header", "Range: " + range_, "-p", pattern), 2)


@pytest.mark.parametrize("name", ["\u6587" * 80, "a" * 250, "f\u00e4 & #1.bin"], ids=["bytes", "long", "odd"])
def test_any_name_that_the_disk_takes_is_taken_and_served_to_peers(origin, supernode, host, blob, name):
    supernode()
    data = blob(4 * MB)
    url = origin.put("f", data)
    here = host()
    here.get(url, out=name, check=data)
    assert not here.leftovers()
    assert host().get(url, check=data).shares["peers"] > 0


def test_two_names_of_one_file_can_be_downloaded_side_by_side(origin, supernode, host, blob):
    supernode()
    here = host()
    data = blob(4 * MB)
    url = origin.put("f", data, rate=4 * MB)
    commands = [here.start(url, out=name) for name in ("a", "b")]
    for command in commands:
        good(command.wait(), data)
    assert not here.leftovers()


def test_the_same_output_twice_at_once_ends_in_one_whole_file(origin, supernode, host, blob):
    supernode()
    here = host()
    data = blob(4 * MB)
    url = origin.put("f", data, rate=4 * MB)
    results = [command.wait() for command in [here.start(url), here.start(url)]]
    assert any(r.code == 0 for r in results), [r.out for r in results]
    assert next(r for r in results if r.code == 0).data == data


def test_settings_come_from_the_configuration_file(world, origin, supernode, host, blob):
    node = supernode()
    here = host()
    conf = os.path.join(world.root, "dragonfly.conf")
    with open(conf, "w") as f:
        f.write("[node]\naddress=%s\n" % node.node)
    url = origin.put("f", blob(MB))
    result = world.run("get", "--config", conf, "-u", url, "-o", here.path("out"), "--home", here.home, "--ip", "127.0.0.1")
    assert result.code == 0 and "node:" + node.node in result.stdout, result.out


def test_switches_may_be_said_with_true_or_false(world, origin, host, blob):
    """As Go programs take them; the command line wins over the file."""
    here, url = host(), origin.put("f", blob(MB))
    conf = os.path.join(world.root, "dragonfly.conf")
    with open(conf, "w") as f:
        f.write("[node]\naddress=127.0.0.1:%d\n[get]\nnotbs = true\n" % dead_port())
    for flags, code in ([], 4), (["--notbs=true"], 4), (["--notbs=false", "--callsystem", ""], 0):
        result = world.run("get", "--config", conf, "-u", url, "-o", here.path("out"), "--home", here.home, *flags)
        assert result.code == code, result.out


def test_settings_of_the_file_are_checked_like_flags(world, host):
    here = host()
    conf = os.path.join(world.root, "dragonfly.conf")
    for text in ("pattern = carrier-pigeon", "locallimit = fast", "showbar = maybe", "bogus = 1"):
        with open(conf, "w") as f:
            f.write("[get]\n%s\n" % text)
        result = world.run("get", "--config", conf, "-u", "http://127.0.0.1/x", "-o", here.path("out"), "--home", here.home)
        assert result.code == 2 and len(result.stderr.splitlines()) == 1, result.out


def test_repeated_flags_stand_on_lines_of_their_own_in_the_file(world, origin, host, blob):
    here = host()
    conf = os.path.join(world.root, "dragonfly.conf")
    with open(conf, "w") as f:
        f.write("[get]\nheader =\n  X-One: a; b\n  X-Two: c\n")
    url = origin.put("f", blob(MB))
    result = world.run("get", "--config", conf, "-p", "source", "-u", url, "-o", here.path("out"), "--home", here.home)
    assert result.code == 0 and origin.log[0].headers["x-one"] == "a; b" and origin.log[0].headers["x-two"] == "c", result.out


def test_version_is_printed(world):
    assert re.match(r"dfly \d+\.\d+\.\d+ \((without _fastpiece|_fastpiece, \w+)\)$", world.run("version").stdout.strip())
    assert "dfget version:" in world.run("get", "--version").stdout
