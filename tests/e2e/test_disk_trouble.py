"""A supernode whose disk fails: that is the disk's trouble, and nobody's download ends for it."""
import fcntl
import os
import struct
import subprocess

import pytest
from world import MB, wait_for

SIZE = 8 * MB


class LoopDisk:
    """An ext4 of its own in a file, which can be made to fail as a disk does: what is read gives EIO, and the kernel takes no more."""

    def __init__(self, folder):
        self.image, self.folder = os.path.join(folder, "disk.img"), os.path.join(folder, "disk")
        os.mkdir(self.folder)
        self.heal()

    def _mount(self):
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", self.image], check=True)
        return subprocess.call(["mount", "-o", "loop", self.image, self.folder], stderr=subprocess.DEVNULL) == 0

    def heal(self):
        """Be a new, empty disk."""
        if os.path.exists(self.image):
            os.unlink(self.image)  # the kernel has the old one as long as somebody has a file of it open
        with open(self.image, "wb") as file:
            file.truncate(96 * MB)
        self.mounted = self._mount()

    def fail(self):
        """From now on every byte that is not in memory is lost, and none is taken any more."""
        os.sync()
        os.truncate(self.image, 0)
        for place, _, names in os.walk(self.folder):
            for name in names:
                with open(os.path.join(place, name), "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, 0x8004587D, struct.pack("I", 2))  # FS_IOC_SHUTDOWN: as after an error of the device
        finally:
            os.close(folder)

    def unmount(self):
        """Take it away, whoever uses it."""
        subprocess.run(["umount", "-l", self.folder], check=True)
        self.mounted = False


@pytest.fixture
def disk(world):
    if os.geteuid():
        pytest.skip("only root can mount a disk")
    made = LoopDisk(world.root)
    if not made.mounted:
        pytest.skip("this machine lets nobody mount")
    yield made
    for command in world.commands:
        command.kill()
    if made.mounted:
        made.unmount()


@pytest.fixture
def home(disk, world):
    """A supernode's home on that disk, its logs elsewhere."""
    path = os.path.join(disk.folder, "home")

    def make():
        os.makedirs(path)
        os.makedirs(os.path.join(world.root, "nodelogs"), exist_ok=True)
        os.symlink(os.path.join(world.root, "nodelogs"), os.path.join(path, "logs"))
        return path
    return make


def cached_file(home):
    found = [os.path.join(place, name) for place, _, names in os.walk(os.path.join(home, "repo")) for name in names if len(name) == 64]
    assert len(found) == 1, found
    return found[0]


def test_a_disk_that_can_no_longer_be_read_sends_hosts_to_the_origin_until_there_is_another(disk, home, origin, supernode, host, blob):
    node = supernode("--fail-access-interval", "1s", home=home())
    url = origin.put("f", blob(SIZE))
    host().get(url, "--notbs", "-p", "cdn", check=blob(SIZE))
    path = cached_file(node.home)
    disk.fail()
    with pytest.raises(OSError), open(path, "rb") as file:
        file.read()
    result = host().get(url, "-p", "cdn", check=blob(SIZE))
    assert result.seconds < 20 and result.reason == 3, result.out
    result = host().get(origin.put("g", blob(SIZE, 1)), "-p", "cdn", check=blob(SIZE, 1))
    assert result.seconds < 20 and result.reason in (1, 3), result.out
    assert node.ask("GET", "/_ping").status == 200
    disk.unmount()
    disk.heal()
    home()
    for number, name in enumerate(("f", "g", "h")):
        data = blob(SIZE, name) if name == "h" else blob(SIZE, number)
        other = origin.put(name, data)
        wait_for(lambda: host().get(other, "--notbs", "-p", "cdn").data == data, 30, "a download by the new disk")
    assert node.running()


def test_a_piece_that_the_disk_has_spoilt_is_fetched_anew(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f", blob(SIZE))
    host().get(url, "--notbs", "-p", "cdn", check=blob(SIZE))
    for offset in (5, SIZE // 2, SIZE - 5):
        with open(cached_file(node.home), "r+b") as file:
            file.seek(offset)
            file.write(b"spoilt")
    result = host().get(url, "--notbs", "-p", "cdn", check=blob(SIZE))
    assert result.seconds < 15, result.out
    assert SIZE < origin.bytes_sent("f") < SIZE + 6 * MB
    assert len([r for r in origin.requests("f") if r.range]) >= 3


def test_a_file_that_has_become_shorter_is_fetched_anew_where_it_was_cut(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f", blob(SIZE))
    host().get(url, "--notbs", "-p", "cdn", check=blob(SIZE))
    os.truncate(cached_file(node.home), SIZE - 3 * MB // 2)
    host().get(url, "--notbs", "-p", "cdn", check=blob(SIZE))


def test_a_disk_that_fills_up_in_the_middle_of_a_fetch_ends_that_and_no_other(origin, supernode, host, blob, small_disk):
    folder = small_disk(host(), 6 * MB)
    node = supernode("--fail-access-interval", "1s", "--task-expire-time", "1s", home=os.path.join(folder, "home"))
    result = host().get(origin.put("big", blob(SIZE), length=False), "-p", "cdn", check=blob(SIZE))
    assert result.reason in (1, 3) and result.seconds < 20, result.out
    assert node.metrics()['dfly_disk_errors_total{why="full"}'] == 1
    small = origin.put("small", blob(MB))
    wait_for(lambda: host().get(small, "--notbs", "-p", "cdn").data == blob(MB), 30, "room for another file")


def test_a_disk_that_fails_in_the_middle_of_a_fetch_sends_hosts_to_the_origin(disk, home, origin, supernode, host, blob):
    node = supernode("--fail-access-interval", "1s", home=home())
    url = origin.put("f", blob(SIZE), stall_after=SIZE // 2, once=True)
    command = host().start(url, "-p", "cdn")
    wait_for(lambda: origin.bytes_sent("f") >= SIZE // 2, 20)
    disk.fail()
    origin.release("f")
    assert command.wait().data == blob(SIZE)
    assert node.running() and node.metrics()["dfly_disk_errors_total"] >= 1


def test_a_disk_that_gets_full_loses_what_is_not_in_use_and_no_more_than_it_must(origin, supernode, host, blob, small_disk):
    folder = small_disk(host(), 48 * MB)
    node = supernode("--full-gc-threshold", "30M", "--task-expire-time", "1s", home=os.path.join(folder, "home"))
    for number in range(5):  # 40 of 48 MB
        host().get(origin.put("f%d" % number, blob(SIZE, number)), "--notbs", "-p", "cdn", check=blob(SIZE, number))
    wait_for(lambda: node.metrics().get('dfly_gc_files_total{why="full"}') == 3, 40, "room on the disk")
    wait_for(lambda: node.metrics()["dfly_disk_free_bytes"] >= 30 * MB, 20)
    host().get(origin.put("f4", blob(SIZE, 4)), "--notbs", "-p", "cdn", check=blob(SIZE, 4))
    assert origin.gets("f4") == 1 and node.metrics()['dfly_gc_files_total{why="full"}'] == 3, "the last used stay"


def test_what_nobody_uses_leaves_the_page_cache(world, origin, supernode, host, blob):
    node = supernode("--task-expire-time", "1s")
    host().get(origin.put("f", blob(SIZE)), "--notbs", "-p", "cdn", check=blob(SIZE))
    os.sync()  # as the system itself does within half a minute, long before a task expires
    path = cached_file(node.home)
    wait_for(lambda: node.metrics()["dfly_tasks"] == 0, 30)

    def pages():
        return int(subprocess.check_output(["fincore", "--bytes", "--noheadings", "--output", "RES", path]).decode())
    if subprocess.call(["fincore", "--version"], stdout=subprocess.DEVNULL):
        pytest.skip("fincore is not here")
    if subprocess.check_output(["stat", "--file-system", "--format", "%T", path]).strip() == b"tmpfs":
        pytest.skip("the cache lies in memory")
    wait_for(lambda: pages() < MB, 10, "a page cache without it")
