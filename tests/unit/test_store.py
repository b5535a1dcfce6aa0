"""Section 9: what a journal says after any kind of death."""
import os
import signal
import subprocess
import sys
import threading

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402

SIZE = 1 << 10
LENGTH = 5 * (SIZE - 5) + 100


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


def content(num):
    return bytes((num * 7 + i) % 251 for i in range(dfly.Layout(LENGTH, SIZE).content_range(num)[1]))


def put(store, num):
    store.write(num * store.layout.stride, content(num))
    store.seal_piece(num, store.digest(num, len(content(num))))


def create(folder, nums=(0, 2, 5)):
    store = dfly.TaskFile.create(folder + "/data", folder + "/journal", {"task": "t", "version": "v"}, LENGTH, SIZE)
    for num in nums:
        put(store, num)
    return store


def test_what_was_written_is_there_after_a_restart(folder):
    create(folder).close()
    store = dfly.TaskFile.resume(folder + "/data", folder + "/journal")
    assert store.have == 0 and store.claimed == 3 and store.about == {"task": "t", "version": "v"}
    assert store.verify() == 0
    assert store.have == 0b100101 and store.layout.length == LENGTH and store.layout.size == SIZE
    store.close()


def test_pieces_are_told_one_by_one_as_they_are_found_true(folder):
    """Wire: 16.30: what a restart reads again holds nobody up."""
    create(folder).close()
    store = dfly.TaskFile.resume(folder + "/data", folder + "/journal")
    told = []
    store.verify(lambda num: told.append((num, store.have)))
    assert told == [(0, 0b1), (2, 0b101), (5, 0b100101)]
    store.close()


def test_a_journal_torn_at_any_byte_never_claims_a_wrong_piece(folder):
    create(folder).close()
    with open(folder + "/journal", "rb") as file:
        journal = file.read()
    for cut in range(len(journal)):
        with open(folder + "/journal", "wb") as file:
            file.write(journal[:cut])
        store = dfly.TaskFile.resume(folder + "/data", folder + "/journal")
        if store:
            store.verify()
            assert store.have & ~0b100101 == 0
            assert all(b"".join(map(bytes, store.read_plain(num))) == content(num) for num in dfly.nums_of(store.have))
            put(store, 1)
            store.close()
            again = dfly.TaskFile.resume(folder + "/data", folder + "/journal")
            again.verify()
            assert again.have >> 1 & 1
            again.close()


def test_a_piece_that_was_damaged_on_disk_is_dropped(folder):
    create(folder).close()
    with open(folder + "/data", "r+b") as file:
        file.seek(2 * (SIZE - 5) + 17)
        file.write(b"X")
    store = dfly.TaskFile.resume(folder + "/data", folder + "/journal")
    assert store.verify() == 1 and store.have == 0b100001
    store.close()


def test_a_piece_that_comes_while_the_journal_is_written_anew_is_in_it(folder, monkeypatch):
    store, line = create(folder), dfly.TaskFile._piece_line
    other = threading.Thread(target=put, args=(store, 4))

    def watched(num, seal):
        if not other.ident:
            other.start()
            other.join(0.2)  # it ends here, or it has to wait for us
        return line(num, seal)
    monkeypatch.setattr(dfly.TaskFile, "_piece_line", staticmethod(watched))
    store.note(version="v2")
    other.join()
    store.close()
    again = dfly.TaskFile.resume(folder + "/data", folder + "/journal")
    assert again.verify() == 0 and again.have == 0b110101
    again.close()


def test_a_second_process_may_read_along_but_not_write(folder):
    store = create(folder, (0,))
    reader = dfly.TaskFile.attach(folder + "/data", folder + "/journal")
    assert reader.have == 1
    put(store, 3)
    reader.refresh()
    assert reader.have == 0b1001
    store.drop([0])
    reader.refresh()
    assert reader.have == 0b1000
    with pytest.raises(dfly.CannotWrite):
        dfly.TaskFile.resume(folder + "/data", folder + "/journal")
    reader.close()
    store.close()


def test_a_finished_file_gets_its_name_and_leaves_nothing_else(folder):
    store = create(folder, range(6))
    assert store.complete and not store.read_back(range(6))
    store.publish(folder + "/out", 0o600)
    assert os.listdir(folder) == ["out"] and os.stat(folder + "/out").st_mode & 0o777 == 0o600
    with open(folder + "/out", "rb") as file:
        assert file.read() == b"".join(content(num) for num in range(6))
    store.close()


def test_an_answer_of_many_pieces_takes_one_descriptor(folder):
    store = create(folder, range(6))
    before = len(os.listdir("/proc/self/fd"))
    answers = [dfly.Response(200, store.wrapped_body(0, store.layout.wrapped_length)) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    with pytest.raises(dfly.NoSuchPiece):
        store.drop([5])
        store.wrapped_body(0, store.layout.wrapped_length)
    store.close()
    body = b"".join(os.pread(s.fd, s.count, s.offset) if isinstance(s, dfly.FileSpan) else s for s in answers[0].segments)
    assert body == b"".join(dfly.Layout(LENGTH, SIZE).head(num) + content(num) + dfly.TAIL for num in range(6))
    for answer in answers:
        answer.close()
        answer.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2, "the store had two"


def test_the_md5_of_a_growing_file_is_that_of_the_whole(folder):
    import hashlib
    store = create(folder, (1, 0))
    follower = dfly.Md5Follower(store)
    for num in (4, 5, 3, 2):
        put(store, num)
        follower.nudge()
    assert follower.wait() == hashlib.md5(b"".join(content(num) for num in range(6))).hexdigest()
    store.close()


@pytest.mark.parametrize("finish", [lambda data: os.rename(data, data + ".out"), os.unlink])
def test_a_file_that_is_finished_while_we_open_it_is_left_alone(folder, monkeypatch, finish):
    """Its owner gives it its name, or removes it, between our opening it and our locking it."""
    data, journal, lock = folder + "/data", folder + "/journal", dfly.fcntl.flock

    def late(fd, how):
        monkeypatch.undo()
        finish(data)
        lock(fd, how)
    create(folder).close()
    with open(data, "rb") as file:
        whole = file.read()
        monkeypatch.setattr(dfly.fcntl, "flock", late)
        store = create(folder, (1,))
        assert file.seek(0) == 0 and file.read() == whole, "it was cut"
    assert os.path.samestat(os.stat(data), os.fstat(store._fd))
    store.close()
    monkeypatch.setattr(dfly.fcntl, "flock", late)
    assert dfly.TaskFile.resume(data, journal) is None


def test_what_is_deleted_is_ours_until_it_is_gone(folder, monkeypatch):
    """Else another process has it, and loses it to us."""
    store, gone, remove = create(folder), [], dfly.remove

    def watched(path):
        with pytest.raises(dfly.CannotWrite):
            dfly.TaskFile.create(folder + "/data", folder + "/journal", {}, LENGTH, SIZE)
        gone.append(path)
        remove(path)
    monkeypatch.setattr(dfly, "remove", watched)
    store.delete()
    assert len(gone) == 2 and os.listdir(folder) == []


# -- what lies under it: files that are either whole or absent ---------------------------------------
def test_a_kill_in_the_middle_of_a_write_leaves_nothing_for_ever(folder):
    path = folder + "/small"
    dfly.write_whole(path, b"old")
    script = "import os, signal, dfly; os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL); dfly.write_whole(%r, b'torn')" % path
    for _ in range(3):
        program = subprocess.Popen([sys.executable, "-c", script], cwd=os.path.dirname(dfly.__file__))
        assert program.wait(20) == -signal.SIGKILL
    with open(path, "rb") as file:
        assert file.read() == b"old"
    assert len(os.listdir(folder)) == 2, "each killed writer leaves a file of its own"
    dfly.write_whole(path, b"new")
    with open(path, "rb") as file:
        assert file.read() == b"new"
    assert os.listdir(folder) == ["small"]


def test_writers_of_the_same_name_do_not_break_each_other(folder):
    path, texts, errors, seen = folder + "/small", [bytes([65 + i]) * (1 + 5000 * i) for i in range(6)], [], set()

    def write(text):
        try:
            for _ in range(20):
                dfly.write_whole(path, text)
        except dfly.DflyError as error:
            errors.append(error)
    dfly.write_whole(path, texts[0])
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with open(path, "rb") as file:
            seen.add(file.read())
    for thread in threads:
        thread.join()
    assert not errors and seen <= set(texts)
    assert os.listdir(folder) == ["small"]
