"""Resume: what a killed download or supernode kept is checked, used, and never trusted unseen."""
import os
import random
import signal

import dfly
import pytest
from world import CONTENT, MB, bad, good, wait_for

SIZE = 8 * MB
STALL = 5 * MB


def kept_files(host, ending):
    return [host.path(name) for name in os.listdir(host.dir) if name.endswith(ending)]


def journal(host):
    return kept_files(host, ".journal")[0]


def data_file(host):
    return kept_files(host, ".dfly")[0]


def on_disk(host):
    files = kept_files(host, ".dfly")
    return os.stat(files[0]).st_blocks * 512 if files else 0


def journalled(host):
    """How many pieces are said to be here: what is on disk may be parts of many."""
    if not kept_files(host, ".journal"):
        return 0
    with open(journal(host), "rb") as file:
        return sum(line.startswith(b"piece ") for line in file)


def interrupted(origin, host, node, data, *flags):
    """Download about five of eight megabytes, then `kill -9`; return (host, url) with the origin well again."""
    url = origin.put("f", data, stall_after=STALL, once=True)
    here = host()
    command = here.start(url, *flags, node=node)
    wait_for(lambda: on_disk(here) >= STALL - MB, 20, "about %d bytes on disk" % STALL)
    command.kill()
    assert not os.path.exists(here.path("out"))
    return here, url


def test_after_kill_9_only_missing_pieces_travel(origin, supernode, host, blob):
    node = supernode()
    data = blob(SIZE)
    here, url = interrupted(origin, host, node.node, data)
    origin.release("f")
    before = node.bytes_sent()
    here.get(url, check=data)
    assert node.bytes_sent() - before <= SIZE - STALL + 2 * MB
    assert origin.bytes_sent("f") == SIZE and not here.leftovers()


def test_a_download_killed_five_times_in_a_row_arrives(origin, supernode, host, blob):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data)
    here = host()
    for round_ in range(5):
        command = here.start(url, "-s", "8M")
        wait_for(lambda: not command.running() or on_disk(here) >= (round_ + 1) * MB, 20)
        command.kill()
    here.get(url, check=data)
    assert origin.gets("f") == 1 and not here.leftovers()


def test_a_corrupted_kept_piece_is_fetched_again(origin, supernode, host, blob):
    node = supernode()
    data = blob(SIZE)
    here, url = interrupted(origin, host, node.node, data)
    origin.release("f")
    with open(data_file(here), "r+b") as f:
        f.seek(CONTENT * 2 + 77)
        f.write(b"rot")
    here.get(url, check=data)


def test_a_truncated_data_file_is_mended(origin, supernode, host, blob):
    node = supernode()
    data = blob(SIZE)
    here, url = interrupted(origin, host, node.node, data)
    origin.release("f")
    with open(data_file(here), "r+b") as f:
        f.truncate(CONTENT * 3 + 1000)
    here.get(url, check=data)


def test_a_journal_torn_at_any_byte_never_harms(origin, supernode, host, blob):
    node = supernode()
    data = blob(2 * MB)
    here, url = interrupted_small(origin, host, node, data)
    with open(journal(here), "rb") as f:
        whole = f.read()
    with open(data_file(here), "rb") as f:
        kept = f.read()
    names = journal(here), data_file(here)
    origin.release("f")
    rng = random.Random(5)
    cuts = sorted({0, 1, 2, 5, len(whole) // 2, len(whole) - 1, len(whole)} | {rng.randrange(len(whole)) for _ in range(5)})
    for cut in cuts:
        for path, content in zip(names, (whole[:cut], kept)):
            with open(path, "wb") as f:
                f.write(content)
        here.get(url, check=data)
        os.remove(here.path("out"))
        assert not here.leftovers(), "torn at %d" % cut


def interrupted_small(origin, host, node, data):
    url = origin.put("f", data, stall_after=len(data) - CONTENT // 2, once=True)
    here = host()
    command = here.start(url, node=node.node)
    wait_for(lambda: on_disk(here) >= len(data) - 3 * CONTENT, 20)
    command.kill()
    return here, url


@pytest.mark.parametrize("garbage", [b"", b"\0" * 4096, b"{\"pieces\": -1}\n" * 100, os.urandom(3000)], ids=["empty", "zeros", "json", "noise"])
def test_a_journal_of_garbage_is_not_believed(origin, supernode, host, blob, garbage):
    node = supernode()
    data = blob(2 * MB)
    here, url = interrupted_small(origin, host, node, data)
    origin.release("f")
    with open(journal(here), "wb") as f:
        f.write(garbage)
    here.get(url, check=data)


def test_a_journal_with_flipped_bytes_never_makes_a_wrong_file(origin, supernode, host, blob):
    node = supernode()
    data = blob(2 * MB)
    here, url = interrupted_small(origin, host, node, data)
    with open(journal(here), "rb") as f:
        whole = f.read()
    with open(data_file(here), "rb") as f:
        kept = f.read()
    names = journal(here), data_file(here)
    origin.release("f")
    rng = random.Random(6)
    for _ in range(6):
        at = rng.randrange(len(whole))
        for path, content in zip(names, (whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1:], kept)):
            with open(path, "wb") as f:
                f.write(content)
        here.get(url, check=data)
        os.remove(here.path("out"))


def test_back_to_source_resumes_with_a_range(origin, host, blob):
    data = blob(SIZE)
    here, url = interrupted(origin, host, None, data, "-p", "source")
    here.get(url, "-p", "source", check=data)
    last = origin.requests("f")[-1]
    assert last.status == 206 and last.bytes_sent <= SIZE - STALL + 2 * MB, origin.log
    assert not here.leftovers()


def test_back_to_source_starts_again_when_the_origin_has_no_ranges(origin, host, blob):
    data = blob(SIZE)
    here, url = interrupted(origin, host, None, data, "-p", "source")
    origin.change("f", ranges=False)
    here.get(url, "-p", "source", check=data)


def test_back_to_source_starts_again_when_the_file_has_changed(origin, host, blob):
    here, url = interrupted(origin, host, None, blob(SIZE, 1), "-p", "source")
    origin.change("f", data=blob(SIZE, 2))
    here.get(url, "-p", "source", check=blob(SIZE, 2))


def test_pieces_from_the_swarm_are_kept_for_back_to_source(origin, supernode, host, blob):
    node = supernode()
    data = blob(SIZE)
    here, url = interrupted(origin, host, node.node, data)
    node.kill()
    here.get(url, node=node.node, check=data)
    assert origin.requests("f")[-1].bytes_sent <= SIZE - STALL + 2 * MB, origin.log


def test_a_killed_supernode_resumes_its_fetch_with_a_range(origin, supernode, host, blob):
    node = supernode()
    data = blob(SIZE)
    url = origin.put("f", data, stall_after=STALL, once=True)
    command = host().start(url)
    wait_for(lambda: node.bytes_sent() >= STALL - MB, 20)
    node.kill()
    command.kill()
    again = supernode(home=node.home)
    result = host().get(url, "--notbs", node=again.node, check=data)
    assert result.reason == 0
    served = [r for r in origin.requests("f") if r.bytes_sent]
    assert served[-1].range and served[-1].bytes_sent <= SIZE - STALL + 2 * MB, origin.log


def test_a_corrupted_cache_of_the_supernode_is_noticed(origin, supernode, host, blob):
    node = supernode()
    data = blob(4 * MB)
    url = origin.put("f", data)
    host().get(url, check=data)
    node.kill()
    spoiled = 0
    for folder, _, names in os.walk(node.home):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and os.path.getsize(path) >= 4 * MB:
                with open(path, "r+b") as f:
                    f.seek(MB + 5)
                    f.write(b"rot")
                spoiled += 1
    assert spoiled, "no cached file found under " + node.home
    again = supernode(home=node.home)
    host().get(url, node=again.node, check=data)


def test_pieces_of_a_file_without_a_version_are_not_mixed_with_those_of_the_next(origin, supernode, host, blob):
    """The origin names no version, and the connection breaks just when the file changes."""
    supernode()
    old, new = blob(SIZE, 1), blob(SIZE, 2)
    url = origin.put("f", old, etag=False, last_modified=False, stall_after=STALL)
    swarm, source = host(), host()
    commands = [swarm.start(url), source.start(url, "-p", "source")]
    for here in (swarm, source):
        wait_for(lambda: on_disk(here) >= STALL - 2 * MB, 20, "most of the first half on disk")
    origin.put("f", new, etag=False, last_modified=False)
    origin.hang_up()
    for command in commands:
        good(command.wait(), new)


def test_pieces_are_not_kept_for_a_file_whose_version_was_not_known_yet(origin, supernode, host, blob):
    """The origin answers later than a register waits, so that both runs begin before the version is known."""
    node = supernode()
    old, new = blob(SIZE, 1), blob(SIZE, 2)
    url = origin.put("f", old, delay=3.2, stall_after=STALL)
    here = host()
    command = here.start(url)
    wait_for(lambda: on_disk(here) >= STALL - 2 * MB, 20)
    command.kill()
    node.kill()
    origin.put("f", new, delay=3.2)
    supernode()
    here.get(url, check=new)


def test_pieces_of_a_slow_origin_are_kept_under_the_version_that_was_learned_later(origin, supernode, host, blob):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, delay=3.2, stall_after=STALL)
    here = host()
    command = here.start(url)
    wait_for(lambda: journalled(here), 20)
    command.kill()
    origin.release("f")
    assert "kept from an earlier run" in here.get(url, check=data).last


def test_a_supernode_that_dies_leaves_pieces_without_a_version_that_are_fetched_anew(origin, supernode, host, blob):
    node = supernode()
    data = blob(SIZE)
    url = origin.put("f", data, etag=False, last_modified=False, stall_after=STALL, once=True)
    here = host()
    command = here.start(url)
    wait_for(lambda: on_disk(here) >= STALL - 2 * MB, 20)
    node.kill()
    assert good(command.wait(), data).reason == 3


def test_a_whole_kept_file_is_not_published_when_the_origin_has_another_one(origin, host, blob):
    """The kill came after the last piece and before the rename."""
    here = host()
    url = origin.put("f", blob(SIZE, 1), stall_after=SIZE - 1)
    command = here.start(url, "-p", "source")
    wait_for(lambda: on_disk(here) >= SIZE - 2 * MB, 20)
    command.kill()
    store = dfly.TaskFile.resume(data_file(here), journal(here))
    for num in range(store.layout.count):
        at, length = store.layout.content_range(num)
        store.write(at, blob(SIZE, 1)[at:at + length])
        store._seals[num] = store.digest(num, length)
    store.drop([])
    store.close()
    origin.put("f", blob(SIZE, 2))
    here.get(url, "-p", "source", check=blob(SIZE, 2))


def test_an_etag_may_have_anything_in_it(origin, supernode, host, blob):
    node = supernode()
    data = blob(3 * MB)
    url = origin.put("f", data, etag=False, headers=(("ETag", '"a|b|c"'),))
    host().get(url, check=data)
    node.kill()
    again = supernode(home=node.home)
    host().get(url, "--notbs", node=again.node, check=data)


def test_the_rest_of_a_chunked_answer_may_come_as_a_range(origin, host, blob):
    data = blob(SIZE)
    url = origin.put("f", data, length=False, stall_after=STALL)
    here = host()
    command = here.start(url, "-p", "source")
    wait_for(lambda: on_disk(here) >= STALL - 2 * MB, 20)
    origin.put("f", data)
    origin.hang_up()
    good(command.wait(), data)
    assert [r.range is not None for r in origin.requests("f")] == [False, True], origin.log


def test_a_supernode_whose_origin_was_away_once_can_resume_later(origin, supernode, host, blob):
    node = supernode("--fail-access-interval", "100ms")
    data = blob(SIZE)
    here, url = interrupted(origin, host, node.node, data)
    node.kill()
    origin.release("f")
    origin.change("f", status=503)
    again = supernode("--fail-access-interval", "100ms", home=node.home)
    bad(here.get(url, "--notbs", node=again.node))
    origin.change("f", status=None)
    here.get(url, "--notbs", node=again.node, check=data)
    assert origin.bytes_sent("f") <= SIZE + 2 * MB


def test_what_the_supernode_kept_has_the_piece_size_that_clients_are_told_while_the_origin_is_slow(origin, supernode, host, blob):
    node = supernode()
    data = blob(3 * MB)
    url = origin.put("f", data)
    host().get(url, check=data)
    node.kill()
    origin.change("f", delay=3.2)  # longer than a register waits
    again = supernode(home=node.home)
    host().get(url, "--notbs", node=again.node, check=data)


def test_the_supernode_restarted_on_its_ports_is_taken_up_again(origin, supernode, host, blob):
    """The download that is under way goes on, keeping its pieces; nobody goes to the origin because of a pause."""
    node = supernode()
    data = blob(SIZE)
    url = origin.put("f", data, stall_after=STALL, once=True)
    command = host().start(url)
    wait_for(lambda: node.bytes_sent() >= STALL - MB, 20)
    node.kill()
    supernode(home=node.home, ports=(node.port, node.cdn_port))
    assert good(command.wait(), data).reason == 0
    assert origin.bytes_sent("f") <= SIZE + 2 * MB, origin.requests("f")


def test_a_restarted_supernode_whose_origin_is_slow_costs_nobody_his_pieces(origin, supernode, host, blob):
    """The origin answers later than a register waits: until then nobody knows whether the pieces are still of its file."""
    node = supernode()
    data = blob(SIZE)
    url = origin.put("f", data, stall_after=STALL, once=True)
    command = host().start(url)
    wait_for(lambda: node.bytes_sent() >= STALL - MB, 20)
    origin.change("f", delay=4.0)
    node.kill()
    again = supernode(home=node.home, ports=(node.port, node.cdn_port))
    assert good(command.wait(), data).reason == 0
    assert again.bytes_sent() <= SIZE - STALL + 2 * MB


def test_an_interrupt_ends_at_once_and_can_be_resumed(origin, supernode, host, blob):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, stall_after=STALL, once=True)
    here = host()
    command = here.start(url)
    wait_for(lambda: on_disk(here) >= STALL - MB, 20)
    command.proc.send_signal(signal.SIGINT)
    bad(command.wait(10))
    origin.release("f")
    here.get(url, check=data)
