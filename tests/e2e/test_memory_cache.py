"""A cache whose hot part lies in a memory file system, above the disk."""
import os
import shutil
import time

import pytest
from world import MB, wait_for

SIZE = 4 * MB


@pytest.fixture
def memory(world):
    """A folder of a memory file system."""
    folder = "/dev/shm/dfly-test-" + world.mark
    os.mkdir(folder, 0o700)
    yield folder
    for command in world.commands:
        command.kill()
    shutil.rmtree(folder)


def files(folder):
    """{name: bytes} of the cached files below a folder, journals left out."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            assert not name.endswith(".tmp"), name
            if len(name) == 64:
                found[name] = os.path.getsize(os.path.join(place, name))
    return found


def test_what_fits_is_fetched_into_memory_and_survives_a_kill(origin, supernode, host, blob, memory):
    flags = ("--memory-cache", "32M", "--memory-folder", memory)
    node = supernode(*flags)
    url = origin.put("f", blob(SIZE))
    host().get(url, "--notbs", check=blob(SIZE))
    assert list(files(memory).values()) == [SIZE] and not files(node.home)
    assert node.metrics()["dfly_memory_bytes"] >= SIZE
    node.kill()
    node = supernode(*flags, home=node.home)
    host().get(url, "--notbs", check=blob(SIZE))
    assert origin.bytes_sent("f") == SIZE
    assert node.metrics()['dfly_cache_total{result="hit"}'] == 1


def test_what_has_cooled_moves_to_the_disk_and_is_served_from_there(origin, supernode, host, blob, memory):
    node = supernode("--memory-cache", "10M", "--memory-folder", memory, "--task-expire-time", "1s")
    urls = [origin.put("f%d" % number, blob(SIZE, number)) for number in range(6)]
    here = host()
    for number, url in enumerate(urls):
        here.get(url, "--notbs", "-p", "cdn", out=str(number), check=blob(SIZE, number))
        assert sum(files(memory).values()) <= 10 * MB
        wait_for(lambda: node.metrics()["dfly_tasks"] == 0, 20)
    wait_for(lambda: sum(files(memory).values()) <= 7.5 * MB, 40, "a quarter of the memory that is free")
    assert files(memory), "all of it is free"
    assert sorted(list(files(memory).values()) + list(files(node.home).values())) == [SIZE] * 6
    assert not set(files(memory)) & set(files(node.home))
    for number, url in enumerate(urls):
        here.get(url, "--notbs", "-p", "cdn", out=str(number), check=blob(SIZE, number))
        assert origin.bytes_sent("f%d" % number) == SIZE


def test_what_does_not_fit_or_has_no_length_goes_to_the_disk(origin, supernode, host, blob, memory):
    node = supernode("--memory-cache", "6M", "--memory-folder", memory)
    for name, size, how in (("big", 8 * MB, {}), ("unknown", SIZE, dict(length=False)), ("hot", SIZE, {}), ("second", SIZE, {})):
        host().get(origin.put(name, blob(size, name), **how), "--notbs", check=blob(size, name))
    assert list(files(memory).values()) == [SIZE]  # hot, which is in use
    assert sorted(files(node.home).values()) == [SIZE, SIZE, 8 * MB]


def test_a_memory_that_others_have_filled_is_not_fetched_into(origin, supernode, host, blob, small_disk):
    folder = small_disk(host(), 6 * MB)
    with open(os.path.join(folder, "others"), "wb") as file:
        file.write(bytes(3 * MB))
    node = supernode("--memory-cache", "1G", "--memory-folder", folder)
    host().get(origin.put("f", blob(SIZE)), "--notbs", check=blob(SIZE))
    assert not files(folder) and list(files(node.home).values()) == [SIZE]


def test_a_file_that_changes_is_in_one_place_only(origin, supernode, host, blob, memory):
    node = supernode("--memory-cache", "6M", "--memory-folder", memory)
    url = origin.put("f", blob(8 * MB), headers=(("Cache-Control", "max-age=0"),))
    host().get(url, "--notbs", check=blob(8 * MB))
    assert list(files(node.home).values()) == [8 * MB]
    for size, here, there in ((SIZE, memory, node.home), (8 * MB, node.home, memory)):
        origin.change("f", data=blob(size, "new"))
        time.sleep(1.1)
        host().get(url, "--notbs", check=blob(size, "new"))
        assert list(files(here).values()) == [size] and not files(there)


def test_a_kill_while_files_move_loses_none(origin, supernode, host, blob, memory):
    flags = ("--memory-cache", "40M", "--memory-folder", memory, "--task-expire-time", "1s")
    node = supernode(*flags)
    urls = [origin.put("f%d" % number, blob(SIZE, number)) for number in range(9)]
    for number, url in enumerate(urls):
        host().get(url, "--notbs", "-p", "cdn", check=blob(SIZE, number))
    node.kill()
    leftover = os.path.join(node.home, "repo", "download", "abc", "a" * 64 + ".moving")
    os.makedirs(os.path.dirname(leftover), exist_ok=True)
    with open(leftover, "wb") as file:
        file.write(b"x")
    for _ in range(3):  # each with less memory than before: it begins to move at once
        flags = ("--memory-cache", "%dM" % (int(flags[1][:-1]) // 2)) + flags[2:]
        node = supernode(*flags, home=node.home)
        wait_for(lambda: len(files(node.home)) + len(files(memory)) >= 9 and node.metrics().get("dfly_memory_moved_bytes_total"), 40)
        node.kill()
    assert not os.path.exists(leftover)
    node = supernode(*flags, home=node.home)
    for number, url in enumerate(urls):
        host().get(url, "--notbs", "-p", "cdn", check=blob(SIZE, number))
        assert origin.bytes_sent("f%d" % number) == SIZE


def test_the_default_folder_is_on_dev_shm_and_goes_when_it_is_wanted_no_more(origin, supernode, host, blob):
    before = set(os.listdir("/dev/shm"))
    node = supernode("--memory-cache", "16M")
    made, = [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("dfly-%d-" % os.getuid())]
    host().get(origin.put("f", blob(SIZE)), "--notbs", check=blob(SIZE))
    assert list(files("/dev/shm/" + made).values()) == [SIZE]
    node.kill()
    supernode(home=node.home)
    assert not os.path.exists("/dev/shm/" + made)
