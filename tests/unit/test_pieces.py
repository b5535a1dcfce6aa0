"""Sections 2 to 5: units, settings, pieces, limits."""
import os
import random
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import dfly  # noqa: E402


@pytest.mark.parametrize("text, size", [("500", 500), ("64K", 65536), ("64kb", 65536), ("20M", 20 << 20), ("20MB", 20 << 20), ("2g", 2 << 30),
                                        ("7B", 7), ("0", 0), ("3MiB", 3 << 20)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert dfly.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5M", "M", "1Q", "9" * 16])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(dfly.BadUsage):
        dfly.parse_size(text)


@pytest.mark.parametrize("text, seconds", [("30", 30), ("30s", 30), ("3m0s", 180), ("1h30m", 5400), ("500ms", .5), ("1.5s", 1.5)])
def test_durations_of_both_generations_are_read(text, seconds):
    assert dfly.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "3x", "-3s", "3m x"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(dfly.BadUsage):
        dfly.parse_duration(text)


def test_nodes_may_have_ports_weights_and_ipv6_addresses():
    nodes = dfly.parse_nodes("a,b:9, [::1]:7=3 ::1,10.0.0.1=2")
    assert nodes == [dfly.Node("a", 8002), dfly.Node("b", 9), dfly.Node("::1", 7, 3), dfly.Node("::1", 8002), dfly.Node("10.0.0.1", 8002, 2)]
    assert str(nodes[2]) == "[::1]:7"


@pytest.mark.parametrize("text", ["a:0", "a:99999", "a=0", "a=x", "[::1", "a b:c", "http://x"])
def test_what_is_no_node_is_refused(text):
    with pytest.raises(dfly.BadUsage):
        dfly.parse_nodes(text)


def test_the_same_task_goes_to_the_same_node_and_the_shares_follow_the_weights():
    nodes = dfly.parse_nodes("a,b=3,c")
    tasks = ["http://x/%d" % i for i in range(2000)]
    first = {task: dfly.order_nodes(nodes, task)[0] for task in tasks}
    assert first == {task: dfly.order_nodes(list(reversed(nodes)), task)[0] for task in tasks}
    share = sum(node.host == "b" for node in first.values()) / len(tasks)
    assert .55 < share < .65
    left = dfly.parse_nodes("a,c")
    assert all(dfly.order_nodes(left, task)[0] == first[task] for task in tasks if first[task].host != "b")


def test_a_task_has_the_id_that_all_dragonflies_give_it():
    assert dfly.task_id_of("http://127.0.0.1:9000/f20.bin") == "9dd50acb84f01de661c3f0be541263cd6d315109f1e01d08bb7920efa5ae5f3c"
    assert dfly.task_id_of("http://127.0.0.1:9000/small.bin", range_header="bytes=0-99") == (
        "1e9aae0b1ea2088b6877003a0b38787f82ce85a3266c088d4d939002e0c3c02c")
    assert dfly.task_id_of("http://127.0.0.1:9000/f20.bin?c=2", "13256635854f2472f9deebfd4f1fe1a4") == (
        "32572f43fc2e8ce27bd11aa705e7673cdecf4575fbaf42c83ed76d47b019936f")


def test_filtered_parameters_do_not_matter():
    assert dfly.filter_url("http://x/p?a=1&b=2&c=3", "b") == "http://x/p?a=1&c=3"
    assert dfly.filter_url("http://x/p?a=1", "a") == "http://x/p"
    assert dfly.filter_url("http://x/p?b=2&&c=3", "b") == "http://x/p?&c=3"


@pytest.mark.parametrize("length, size, count, last", [(20971520, 4 << 20, 6, 25), (4194299, 4 << 20, 1, 4194299), (0, 4 << 20, 1, 0), (1, 1 << 18, 1, 1)])
def test_a_layout_cuts_as_the_protocol_says(length, size, count, last):
    layout = dfly.Layout(length, size)
    assert layout.count == count and layout.content_range(count - 1)[1] == last
    assert layout.wrapped_length == length + 5 * count
    with pytest.raises(dfly.NoSuchPiece):
        layout.content_range(count)


def test_heads_are_those_of_the_protocol():
    assert dfly.piece_head(4194299, 4 << 20).hex() == "043ffffb"
    assert dfly.piece_head(25, 4 << 20).hex() == "04000019"
    assert dfly.piece_head((15 << 20) - 5, 15 << 20).hex() == "0feffffb"


@pytest.mark.parametrize("start, end", [(0, 30), (0, 4), (3, 5), (4, 29), (29, 30), (2, 28), (0, 1)])
def test_any_part_of_a_wrapped_piece_can_be_cut_out(start, end):
    layout, content = dfly.Layout(60, 30), bytes(range(60))
    whole = layout.head(1) + content[25:50] + b"\x7f"
    assert b"".join(data or content[offset:offset + count] for data, offset, count in layout.spans(1, start, end)) == whole[start:end]


def test_files_are_cut_into_not_too_many_pieces():
    for length in [0, 1, 1 << 20, 16 << 20, 60 << 20, 100 << 20, 500 << 20, 10 << 30]:
        size = dfly.choose_piece_size(length)
        assert 256 << 10 <= size <= 15 << 20
        assert dfly.Layout(length, size).count <= 512 or size == 15 << 20


def test_an_empty_piece_has_the_digest_of_the_protocol():
    message = dfly.piece_head(0, 4 << 20), b"", dfly.TAIL
    assert dfly.digest_many("md5", [message])[0].hex() == "d6991051769098273e82477afd2bb93e"


@pytest.mark.parametrize("mask", [0, -1, 1, 2, 0b1011, 1 << 300, (1 << 200) - 1, random.Random(1).getrandbits(1000)])
def test_masks_and_numbers_are_the_same_thing(mask):
    nums = dfly.nums_of(mask)
    assert nums == [i for i in range(1001) if mask > 0 and mask >> i & 1]
    assert dfly.mask_of(nums) == max(mask, 0)


def test_the_accelerator_can_be_switched_off():
    code = "import dfly; print(dfly.nums_of.__module__)"
    env = dict(os.environ, DFLY_NO_FASTPIECE="1")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env).decode().strip() == "dfly"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_bucket_keeps_its_rate():
    clock = Clock()
    bucket = dfly.TokenBucket(1000000, clock, clock.sleep)
    began, moved = clock.now, 0
    while clock.now < began + 10:
        bucket.take(25000)
        moved += 25000
    assert abs(moved / 10.0 / 1000000 - 1) < .05


def test_a_bucket_without_a_rate_never_waits():
    clock = Clock()
    bucket = dfly.TokenBucket(0, clock, clock.sleep)
    bucket.take(1 << 40)
    assert clock.now == 100.0 and bucket.chunk(77) == 77
