"""The accelerator's digests against hashlib's: every boundary, alignment and number of lanes, on every width that is here."""
import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import dfly  # noqa: E402

EDGES = [0, 1, 3, 55, 56, 57, 59, 60, 61, 63, 64, 65, 119, 120, 121, 127, 128, 129, 191, 192, 1000]
WIDTHS = ("plain", "sse2", "avx2", "avx512")  # and "sha": the processor's own instructions, for SHA-256 alone
#: Draws messages of all kinds, for a process of its own as well.
CHECK = """
import hashlib, random, sys, tempfile
import _fastpiece
rng, file = random.Random(int(sys.argv[1])), tempfile.TemporaryFile()
fd = file.fileno()
for _ in range(int(sys.argv[2])):
    messages = []
    for _ in range(rng.choice([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 70])):
        at, size = rng.randrange(9), rng.choice([%s, rng.randrange(9000)])
        head, tail = rng.choice([b"", b"head", bytes(rng.randrange(50))]), rng.choice([b"", b"\\x7f", bytes(rng.randrange(10))])
        messages.append((head, memoryview(rng.getrandbits(8 * (at + size) + 1).to_bytes(at + size + 1, "little"))[at:at + size], tail))
    end, spans = 0, []
    for head, data, tail in messages:
        end += rng.randrange(100)
        file.seek(end)
        file.write(data)
        spans.append((head, (fd, end, len(data)), tail))
        end += len(data)
    file.flush()
    mixed = [rng.choice(both) for both in zip(messages, spans)]
    for kind in ("md5", "sha256"):
        right = [hashlib.new(kind, head + bytes(data) + tail).digest() for head, data, tail in messages]
        for given in (messages, spans, mixed):
            assert _fastpiece.digest_many(kind, given) == right, (kind, [len(m[1]) for m in messages])
""" % ", ".join(map(str, EDGES))


def version_of(folder):
    """Return what --version of the copy in a folder prints and says, whatever path the tests themselves run."""
    plain = {name: value for name, value in os.environ.items() if name != "DFLY_NO_FASTPIECE"}
    return subprocess.run([sys.executable, str(folder / "dfly.py"), "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True, env=plain)


def fast():
    return pytest.importorskip("_fastpiece", reason="the accelerator is not built")


def here(width, kind="sha256"):
    """Skip where the processor lacks a width."""
    try:
        fast().digest_many(kind, [(b"", b"", b"")], width)
    except ValueError:
        pytest.skip("this processor has no %s" % width)


@pytest.mark.parametrize("kind,width", [(kind, width) for kind in ("md5", "sha256") for width in WIDTHS] + [("sha256", "sha")])
def test_every_edge_with_and_without_the_wrapper(kind, width):
    here(width, kind)
    rng = random.Random(7)
    messages = [(head, bytes(rng.randrange(256) for _ in range(size)), tail) for size in EDGES for head, tail in ((b"", b""), (b"\0\1\2\3", b"\x7f"))]
    assert fast().digest_many(kind, messages, width) == [hashlib.new(kind, b"".join(message)).digest() for message in messages]


@pytest.mark.parametrize("width", WIDTHS + ("sha",))
def test_random_sizes_alignments_and_numbers(width):
    here(width)
    subprocess.run([sys.executable, "-c", CHECK, "1", "60"], cwd=ROOT, env=dict(os.environ, DFLY_LANES=width), check=True)


def test_long_and_short_together():
    rng = random.Random(3)
    messages = [(b"", rng.getrandbits(8 * size).to_bytes(size, "little") if size else b"", b"") for size in (3 << 20, 5, 1 << 20, 0, (1 << 20) + 1)]
    for kind in ("md5", "sha256"):
        assert fast().digest_many(kind, messages) == [hashlib.new(kind, message[1]).digest() for message in messages]


def digesters():
    """Return digest_many of both paths."""
    return [fast().digest_many, dfly.digest_many]


def test_large_spans_of_a_file_and_those_that_end_too_early(tmp_path):
    data = random.Random(5).getrandbits(8 * 3000000).to_bytes(3000000, "little")
    (tmp_path / "data").write_bytes(data)
    with open(str(tmp_path / "data"), "rb") as file:
        fd = file.fileno()
        messages = [(b"head", (fd, 7, 2000000), b"\x7f"), (b"", (fd, 2999999, 1), b""), (b"", (fd, 0, 3000001), b""), (b"", (fd, 1000000, 2000000), b""),
                    (b"", (fd, 5000000, 10), b""), (b"", (fd, 5000000, 0), b"x"), (b"", data, b"")]
        for kind in ("md5", "sha256"):
            right = [hashlib.new(kind, message).digest() for message in (b"head" + data[7:2000007] + b"\x7f", data[-1:], data[1000000:], b"x", data)]
            for digest_many in digesters():
                assert digest_many(kind, messages) == right[:2] + [b""] + right[2:3] + [b""] + right[3:]
    for digest_many in digesters():
        with pytest.raises(OSError) as caught:
            digest_many("md5", [(b"", (fd, 0, 10), b"")] * 2)
        assert caught.value.errno == errno.EBADF


def test_what_it_can_t_digest_is_an_error_and_leaks_nothing():
    module = fast()
    for kind, messages, error in (("sha1", [], ValueError), ("md5", [(b"", "text", b"")], TypeError), ("md5", [(b"", 5, b"")], TypeError),
                                  ("md5", [(b"x" * 60, b"", b"y")], ValueError), ("md5", [(b"", memoryview(b"abcd")[::2], b"")], BufferError),
                                  ("md5", [(b"", b"")], ValueError), ("md5", [(b"", (-1, 0, 5), b"")], OSError), ("md5", [(b"", (0, -1, 5), b"")], OSError),
                                  ("md5", [(b"", (0, 0, -5), b"")], OverflowError), ("md5", [(b"", (0, 0), b"")], ValueError)):
        with pytest.raises(error):
            module.digest_many(kind, messages)
    buffer = bytearray(100)
    with pytest.raises(TypeError):
        module.digest_many("md5", [(b"", buffer, b""), (b"", 5, b"")])
    buffer.append(1)  # nobody holds it any more


def test_the_pure_way_says_the_same():
    code = ("import dfly, hashlib; assert not dfly.LANES; found = dfly.digest_many('md5', [(b'a', b'b' * 100, b'c'), (b'', b'', b'')]); "
            "assert found == [hashlib.md5(b'a' + b'b' * 100 + b'c').digest(), hashlib.md5().digest()]; "
            "assert dfly.digest_many('sha256', [(b'', bytearray(3), b'')]) == [hashlib.sha256(bytes(3)).digest()]")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ, DFLY_NO_FASTPIECE="1"), check=True)


@pytest.mark.parametrize("content,warned", [(b"no module at all", True), (None, False)])
def test_a_broken_build_is_left_out_with_one_warning(tmp_path, content, warned):
    shutil.copy(os.path.join(ROOT, "dfly.py"), str(tmp_path))
    if content is not None:
        (tmp_path / ("_fastpiece" + sysconfig.get_config_var("EXT_SUFFIX"))).write_bytes(content)
    done = version_of(tmp_path)
    assert done.stdout.decode() == "dfly %s (without _fastpiece)\n" % dfly.VERSION
    assert len(done.stderr.splitlines()) == warned and (b"_fastpiece" in done.stderr) == warned


@pytest.mark.parametrize("names", ["nums_of", "LANES = WORTH = digest_many = nums_of"])
def test_an_older_build_is_left_out_too(tmp_path, names):
    shutil.copy(os.path.join(ROOT, "dfly.py"), str(tmp_path))
    (tmp_path / "_fastpiece.py").write_text(names + " = 'old'\n")
    done = version_of(tmp_path)
    assert b"without _fastpiece" in done.stdout and len(done.stderr.splitlines()) == 1


def test_a_build_with_sanitizers_finds_nothing(tmp_path):
    fast()
    compiler = shutil.which("gcc")
    libraries = [subprocess.check_output([compiler, "-print-file-name=" + name]).decode().strip() for name in ("libasan.so", "libubsan.so")] if compiler else []
    if not libraries or not all(os.path.isabs(path) and os.path.exists(path) for path in libraries):
        pytest.skip("no gcc with its sanitizers here")
    for name in ("_fastpiece.pyx", "setup.py"):
        shutil.copy(os.path.join(ROOT, name), str(tmp_path))
    flags = "-g0 -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    built = subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, env=dict(os.environ, CC=compiler, CFLAGS=flags, LDFLAGS=flags, DFLY_CFLAGS="-O1"))
    assert built.returncode == 0, built.stdout.decode()
    for width in WIDTHS + ("sha",):
        done = subprocess.run([sys.executable, "-c", CHECK, "2", "12"], cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, DFLY_LANES=width, LD_PRELOAD=":".join(libraries), ASAN_OPTIONS="detect_leaks=0"))
        assert done.returncode == 0, done.stdout.decode()
    for name in (os.path.join(ROOT, "dfly.py"), os.path.join(ROOT, "tests", "unit", "test_funnel.py")):
        shutil.copy(name, str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_funnel.py"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=dict(os.environ, LD_PRELOAD=":".join(libraries), ASAN_OPTIONS="detect_leaks=0"))
    assert done.returncode == 0, done.stdout.decode()
