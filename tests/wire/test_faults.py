"""The faults of the original that must not come back, as protocol.md, section 16, numbers them.

Each line: the fault, what it was, the tests that show it gone (in this file, or in the one that is named).

 1  anybody deletes, poisons             test_only_the_supernodes_own_host_deletes_a_task, test_nobody_says_good_bye_for_another_host,
                                         test_nobody_fills_the_task_of_one_url_from_another
 2  one login lets everybody in          wire/test_wire_register.py::test_a_login_is_not_lent_to_others,
                                         test_who_was_refused_gets_no_pieces_by_a_task_id_of_his_own_making,
                                         test_nobody_gets_pieces_while_the_origin_is_still_being_asked_about_him,
                                         test_a_file_behind_credentials_is_not_served_to_who_knows_only_its_task_id,
                                         test_an_origin_that_can_not_be_asked_vouches_for_nobody, test_an_origin_without_head_is_asked_otherwise
 3  fetches whatever anybody names       test_a_machines_own_secrets_are_fetched_for_nobody, test_origins_that_are_denied_are_not_fetched,
                                         test_only_origins_that_are_allowed_are_fetched, test_a_list_of_origins_that_makes_no_sense_is_said,
                                         unit/test_filler.py::test_a_name_that_leads_elsewhere_when_it_comes_to_it_is_not_asked,
                                         wire/test_wire_uploader.py::test_finish_calls_nobody
 4  peers' addresses on their word       test_a_client_that_names_the_address_of_another_is_offered_to_nobody,
                                         test_the_address_by_which_one_client_reaches_the_supernode_is_told_to_no_other
 5  an uploader that anybody controls    wire/test_wire_uploader.py::test_control_calls_give_nobody_power, test_another_host_sets_no_limit_of_an_uploader
 6  a complaint purges the cache         wire/test_wire_pull.py::test_piece_error_with_junk_purges_nothing
 7  MD5 only                             test_our_own_programs_name_pieces_by_sha_256, e2e/test_swarm.py::test_a_peer_that_serves_wrong_bytes_is_isolated
 8  a pickle on disk, secrets in `ps`    test_what_lies_on_disk_is_read_and_never_run; the daemon downloads in its own process
 9  one client's TLS is everybody's      test_what_came_without_a_trusted_certificate_is_not_for_those_who_want_one,
                                         e2e/test_origins.py::test_https_needs_a_known_certificate
10  innards open to all                  test_neither_settings_nor_innards_can_be_asked_for; its own ports belong to the daemon
11  SUCCESS without a file               wire/test_wire_get.py::test_a_600_with_another_md5_never_makes_a_file_from_the_swarm,
                                         wire/test_wire_downloads.py::test_the_users_md5
12  the user's MD5, error pages as files wire/test_wire_get.py::test_the_users_md5_is_checked_in_the_swarm,
                                         e2e/test_origins.py::test_an_origin_that_refuses_is_named_with_its_status,
                                         e2e/test_source.py::test_a_supernode_that_hangs_is_left_within_seconds
13  a cache cut short marked whole       test_a_cache_cut_in_the_middle_of_a_piece_is_mended_and_whole
14  empty files hang                     wire/test_wire_downloads.py::test_an_empty_file_for_client_after_client,
                                         wire/test_wire_get.py::test_a_second_get_of_an_empty_file_does_not_stall_on_1_0_6
15  port 0 is offered                    wire/test_wire_pull.py::test_a_client_with_port_0_is_never_offered,
                                         wire/test_wire_get.py::test_a_port_0_peer_of_1_0_6_is_passed_over
16  broken and dead peers are offered    wire/test_wire_pull.py::test_a_provider_that_always_fails_is_left_alone_in_the_end,
                                         wire/test_wire_downloads.py::test_a_crashed_peer_costs_little
17  slots that nobody frees              test_a_client_that_never_reports_holds_up_nobody, test_failed_pieces_of_the_supernode_block_no_task
18  retries without pause or end         wire/test_wire_get.py::test_a_source_that_fails_for_ever_is_given_up_without_a_storm
19  any 600 is believed                  wire/test_wire_get.py::test_a_600_that_comes_too_early_is_not_believed
20  crashes on odd answers               wire/test_wire_get.py::test_a_600_without_a_digest_is_taken_when_all_is_here,
                                         wire/test_wire_get.py::test_piece_tasks_that_make_no_sense_never_make_a_wrong_file
21  generations that fail each other     wire/test_wire_downloads.py::test_a_py_peer_never_fails_a_go_clients_last_piece,
                                         wire/test_wire_register.py::test_608_reaches_a_daemon_whose_origin_wants_a_login,
                                         e2e/test_links.py::test_dfget_fails_with_79_when_credentials_are_missing
22  Range, headers, first byte           e2e/test_daemon.py::test_open_ranges_come_by_the_swarm_and_others_from_the_registry,
                                         e2e/test_daemon.py::test_a_blob_leaves_the_registry_once_for_all_hosts,
                                         e2e/test_daemon.py::test_a_blob_is_sent_on_while_it_still_comes
23  an edited output poisons             wire/test_wire_uploader.py::test_an_edited_output_is_not_served,
                                         e2e/test_swarm.py::test_an_edited_output_does_not_poison_others
24  the cache empties the wrong way      test_the_longest_unused_file_makes_room_first, test_a_cache_is_kept_on_a_disk_of_any_size
25  temporary files stay                 test_auth_failures_leave_nothing_behind, e2e/test_resume.py::test_after_kill_9_only_missing_pieces_travel,
                                         e2e/test_limits.py::test_on_a_disk_that_is_full_to_the_last_byte_nothing_is_left,
                                         wire/test_wire_preheat.py::test_what_fails_says_why_and_may_be_tried_again
26  one failure is for ever              test_an_origin_that_can_not_be_reached_is_tried_again_soon
27  a task expires under a client        test_a_task_does_not_expire_under_a_client,
                                         wire/test_wire_downloads.py::test_a_restarted_supernode_sends_its_clients_on
28  two envelopes, encoded twice         test_failures_are_told_in_one_form_and_in_plain_words
29  two GETs for a cold task             wire/test_wire_pull.py::test_a_cold_task_asks_the_origin_for_each_byte_once
30  all waits for the cache's digest     unit/test_store.py::test_pieces_are_told_one_by_one_as_they_are_found_true
31  control calls without number         wire/test_wire_downloads.py::test_a_small_download_costs_few_calls,
                                         e2e/test_budget.py::test_a_file_of_500_mb_takes_at_most_20_control_requests
32  fixed limits, huge pieces            test_a_small_file_has_pieces_enough_for_a_swarm, e2e/test_limits.py::test_without_a_limit_nothing_is_slowed
33  sources chosen blindly               sim/test_scheduler_sim.py::test_a_piece_crosses_into_a_rack_about_once,
                                         sim/test_scheduler_sim.py::test_slow_hosts_do_not_hold_up_the_fast_ones,
                                         e2e/test_swarm.py::test_peers_that_only_drip_do_not_hold_a_download_up
34  limited peers are black-listed       test_a_peer_that_keeps_to_a_limit_is_no_bad_peer
35  a connection for every piece         test_many_pieces_travel_on_few_connections
36  a new uploader deletes               test_a_new_uploader_deletes_nothing, e2e/test_uploader.py::test_a_file_is_served_until_it_expires_and_then_dropped
37  a record for every register          test_a_client_that_registers_again_is_still_one_client,
                                         e2e/test_swarm.py::test_the_supernode_forgets_clients_that_serve_nobody_while_the_task_lives_on
38  IPv4 only                            e2e/test_origins.py::test_ipv6_carries_everything_that_ipv4_does
39  a silent origin hangs a task         unit/test_filler.py::test_an_origin_that_falls_silent_fails_the_fetch
40  all fall upon the origin             test_clients_of_a_task_that_failed_go_to_the_origin_one_after_the_other,
                                         wire/test_wire_downloads.py::test_the_file_travels_once_from_the_origin
"""
import hashlib
import os
import pickle
import re

import dfly
import hand as hands
import pytest
from rawhttp import talk
from world import ask, bad, dead_port, good, wait_for

MIB = 1 << 20
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
JSON = {"Content-Type": "application/json"}
NATIVE = dict(JSON, **{"X-Dfly": "1 "})


def native(node, url, number, **more):
    """Register as our own get does; return (cid, answer)."""
    cid = "127.0.0.1-%d-1795408506.429" % number
    fields = dict(superNodeIp="127.0.0.1", rawUrl=url, taskUrl=url, cid=cid, ip="127.0.0.1", port=0, path="/peer/file/x-" + cid)
    return cid, node.ask("POST", "/peer/registry", dict(fields, **more), NATIVE).json


def sync(node, task, cid, **more):
    """One sync that does not wait; return the answer."""
    return node.ask("POST", "/peer/sync", dict({"task": task, "cid": cid, "wait": 0}, **more), NATIVE).json


def hidden(host):
    """{path: content} of what an unfinished download has beside its output."""
    found = {}
    for name in os.listdir(host.dir):
        if ".dfly" in name:
            with open(host.path(name), "rb") as file:
                found[host.path(name)] = file.read()
    return found


def cached(node):
    """The paths of the files in a supernode's cache."""
    return [os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(node.home, "repo")) for name in names if "." not in name]


def test_every_fault_has_a_test():
    """The table above is true."""
    found = {}
    for line in __doc__.splitlines():
        match = re.match(r"([ \d]\d)  \S", line)
        number = int(match.group(1)) if match else max(found, default=0)
        names = re.findall(r"(?:(\w+/test_\w+\.py)::)?\b(test_\w+)(?=[,;]|$)", line)
        found.setdefault(number, []).extend(names)
        for file, name in names:
            with open(os.path.join(TESTS, file or "wire/test_faults.py")) as source:
                assert "\ndef %s(" % name in source.read(), name
    assert sorted(found)[-40:] == list(range(1, 41)) and all(found[number] for number in range(1, 41))


# -- security --------------------------------------------------------------------------------------
def test_nobody_fills_the_task_of_one_url_from_another(supernode, hand, host, origin, blob):
    """Wire: 16.1"""
    node = supernode()
    good_data, evil_data = blob(MIB, "good"), blob(MIB, "evil")
    url, evil = origin.put("good", good_data), origin.put("evil", evil_data)
    poisoner = hand(node)
    poisoner.join(evil, taskUrl=url)
    assert hands.unwrapped(poisoner.finish()[0]) == evil_data
    host("a").get(url, "--notbs", node=node.node, check=good_data)
    hands.refused(hand(node).json(evil, taskUrl=url))
    node.stop()
    node = supernode(home=node.home)
    poisoner = hand(node)
    poisoner.join(evil, taskUrl=url)
    poisoner.finish()
    host("b").get(url + "?a=1", "-f", "a", "--notbs", node=node.node, check=good_data)


def test_only_the_supernodes_own_host_deletes_a_task(supernode, hand, origin, blob):
    """Wire: 16.1"""
    node = supernode()
    client = hand(node)
    client.join(origin.put("f.bin", blob(MIB)))
    assert hand(node, source="127.0.0.9").get("/api/v1/tasks/" + client.task, method="DELETE").status == 403
    assert client.start()["code"] == 601
    assert client.get("/api/v1/tasks/" + client.task, method="DELETE").status == 200
    assert client.pull()["code"] == 502


def test_nobody_says_good_bye_for_another_host(supernode, hand, origin, blob):
    """Wire: 16.1"""
    node = supernode("--trusted-peers", "127.0.0.1")
    client, other = hand(node, source="127.0.0.7"), hand(node, source="127.0.0.9")
    client.join(origin.put("f.bin", blob(MIB)))
    other.get("/peer/service/down?taskId=%s&cid=%s" % (client.task, client.cid))
    assert client.start()["code"] == 601
    assert hands.envelope(client.down())["code"] == 612
    assert client.pull()["code"] == 502


def test_who_was_refused_gets_no_pieces_by_a_task_id_of_his_own_making(supernode, hand, origin, blob):
    """Wire: 16.2"""
    node = supernode()
    url = origin.put("secret", blob(MIB), auth="Basic abc")
    owner, thief = hand(node), hand(node)
    owner.join(url, headers=["Authorization: Basic abc"])
    owner.finish()
    hands.refused(thief.json(url))
    thief.task = dfly.task_id_of(url)
    assert thief.task == owner.task
    assert thief.pull()["code"] == 502
    assert sync(node, thief.task, thief.cid, slots=4)["code"] == 502


def test_nobody_gets_pieces_while_the_origin_is_still_being_asked_about_him(supernode, hand, origin, blob):
    """Wire: 16.2"""
    node = supernode()
    url = origin.put("secret", blob(MIB), auth="Basic abc")
    owner, thief = hand(node), hand(node)
    owner.join(url, headers=["Authorization: Basic abc"])
    owner.finish()
    origin.change("secret", delay=8.0)
    hands.refused(thief.json(url))
    thief.task = owner.task
    assert thief.pull()["code"] == 502


def test_a_file_behind_credentials_is_not_served_to_who_knows_only_its_task_id(supernode, hand, origin, blob):
    """Wire: 16.2"""
    node = supernode()
    data = blob(MIB)
    owner = hand(node)
    owner.join(origin.put("secret", data, auth="Basic abc"), headers=["Authorization: Basic abc"])
    got, _finish, seen = owner.finish()
    assert hands.unwrapped(got) == data
    for path in ("/download/%s/%s" % (owner.task[:3], owner.task), "/qtdown/%s/%s" % (owner.task[:3], owner.task)):
        assert hands.fetch(("127.0.0.1", node.cdn_port), path, "bytes=0-262143").status == 404
    assert owner.fetch(seen[0]).status == 206


def test_an_origin_that_can_not_be_asked_vouches_for_nobody(supernode, hand, origin, blob):
    """Wire: 16.2"""
    node = supernode()
    url = origin.put("secret", blob(MIB), auth="Basic abc")
    owner = hand(node)
    owner.join(url, headers=["Authorization: Basic abc"])
    owner.finish()
    origin.close()
    hands.refused(hand(node).json(url))
    hands.registered(hand(node).json(url, headers=["Authorization: Basic abc"]))


def test_an_origin_without_head_is_asked_otherwise(supernode, hand, origin, blob):
    """Wire: 16.2"""
    node = supernode()
    data = blob(MIB)
    url = origin.put("secret", data, auth="Basic abc", head=False)
    hand(node).join(url, headers=["Authorization: Basic abc"])
    hands.refused(hand(node).json(url))
    hand(node).join(url, headers=["Authorization: Basic abc", "X-Other: 1"])
    assert origin.bytes_sent("secret") <= len(data) + 1


METADATA = ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "2852039166", "100.100.100.200", "[fd00:ec2::254]", "192.0.0.192", "168.63.129.16"]


@pytest.mark.parametrize("way", ["straight", "by a redirect"])
def test_a_machines_own_secrets_are_fetched_for_nobody(supernode, hand, origin, way):
    """Wire: 16.3"""
    node = supernode()
    for number, address in enumerate(METADATA):
        url = "http://%s/latest/meta-data" % address
        client = hand(node)
        answer = hands.refused(client.json(url if way == "straight" else origin.put("to%d" % number, redirect_to=url)))
        assert "not fetched" in answer["msg"], answer


def test_origins_that_are_denied_are_not_fetched(supernode, hand, origin, blob):
    """Wire: 16.3"""
    data = blob(1000)
    port = origin.put("f.bin", data).split(":")[2].split("/")[0]
    by_name, by_address = "http://localhost:%s/f.bin" % port, "http://127.0.0.1:%s/f.bin" % port
    for denied, refused, taken in (("127.0.0.0/8", [by_name, by_address], []), ("localhost", [by_name], [by_address]), (".example.com, 10.0.0.0/8", [], [by_name])):
        node = supernode("--deny-origins", denied)
        for url in refused:
            assert "not fetched" in hands.refused(hand(node).json(url))["msg"]
        for url in taken:
            hands.registered(hand(node).json(url))


def test_only_origins_that_are_allowed_are_fetched(supernode, hand, origin, blob):
    """Wire: 16.3"""
    data = blob(1000)
    port = origin.put("f.bin", data).split(":")[2].split("/")[0]
    by_name, by_address = "http://localhost:%s/f.bin" % port, "http://127.0.0.1:%s/f.bin" % port
    away = origin.put("away", redirect_to=by_address)
    for flags, refused, taken in ((["--allow-origins", "localhost"], [by_address], [by_name]), (["--allow-origins", "10.0.0.0/8, 127.0.0.1"], [], [by_address]),
                                  (["--allow-origins", ".example.com"], [by_name, by_address, "http://example.com.localhost:1/"], []),
                                  (["--allow-origins", "localhost", "--deny-origins", "127.0.0.1"], [by_name, by_address], []),
                                  (["--allow-origins", "localhost"], [away.replace("127.0.0.1", "localhost", 1)], [])):
        node = supernode(*flags)
        for url in refused:
            assert "not fetched" in hands.refused(hand(node).json(url))["msg"], (flags, url)
        for url in taken:
            hands.registered(hand(node).json(url))


def test_a_list_of_origins_that_makes_no_sense_is_said(world):
    """Wire: 16.3"""
    for flag in ("--allow-origins", "--deny-origins", "--trusted-peers"):
        for text in ("10.0.0.0/99", "http://x/", "a b/c"):
            result = world.run("supernode", flag, text, "--home", os.path.join(world.root, "sn"))
            assert result.code == 2 and text.split()[-1] in result.out, result.out


def test_a_client_that_names_the_address_of_another_is_offered_to_nobody(supernode, hand, origin, blob):
    """Wire: 16.4"""
    node = supernode("--trusted-peers", "127.0.0.1")
    url = origin.put("f.bin", blob(2 * MIB))
    honest, liar = hand(node, "127.0.0.7", 15999, "127.0.0.7"), hand(node, "127.0.0.8", 15999, "127.0.0.9")
    trusted = hand(node, "10.9.8.7", 15999)
    offered = set()
    for client in (liar, honest, trusted, hand(node)):
        client.join(url)
        offered |= client.offers()
    assert honest.cid in offered and trusted.cid in offered and liar.cid not in offered


def test_the_address_by_which_one_client_reaches_the_supernode_is_told_to_no_other(supernode, hand, origin, blob):
    """Wire: 16.4"""
    node = supernode()
    url = origin.put("f.bin", blob(MIB))
    first, second = hand(node), hand(node)
    first.join(url, superNodeIp="203.0.113.7")
    second.join(url)
    assert {task["peerIp"] for task in first.start()["data"]} == {"203.0.113.7"}
    assert {task["peerIp"] for task in second.start()["data"]} == {"127.0.0.1"}


def test_another_host_sets_no_limit_of_an_uploader(supernode, host, origin, blob):
    """Wire: 16.5"""
    supernode()
    here = host("a")
    data = blob(4 * MIB)
    url = origin.put("f.bin", data)
    here.get(url, check=data)
    address = here.uploader_address()
    for call in ("/check/x", "/rate/x", "/client/finish?taskFileName=x&taskID=x&cid=x"):
        request = "GET %s HTTP/1.1\r\nHost: x\r\ntotalLimit: 1\r\nrateLimit: 1\r\n\r\n" % call
        assert talk(address, request.encode("ascii"), source_ip="127.0.0.9").status == 400
    result = host("b").get(url, check=data)
    assert result.shares["peers"] and result.seconds < 10, result.last


def test_our_own_programs_name_pieces_by_sha_256(supernode, origin, blob):
    """Wire: 16.7"""
    node = supernode()
    data = blob(MIB)
    cid, answer = native(node, origin.put("f.bin", data), 1)
    task, size = answer["data"]["taskId"], answer["data"]["pieceSize"]
    got = wait_for(lambda: sync(node, task, cid, slots=3).get("pieces"), 10)
    for num, _holder, seal in got:
        assert dfly.Seal.long(seal) == "sha256:" + hashlib.sha256(data[num * (size - 5):(num + 1) * (size - 5)]).hexdigest()


def test_what_lies_on_disk_is_read_and_never_run(supernode, host, origin, blob, world):
    """Wire: 16.8"""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (os.path.join(world.root, "boom"),)
    data = blob(4 * MIB)
    url = origin.put("f.bin", data, stall_after=2 * MIB, once=True)
    node, here = supernode(), host("a")
    command = here.start(url)
    wait_for(lambda: any(len(content) > MIB for content in hidden(here).values()), 20)
    command.kill()
    node.kill()
    journals = [path for path in hidden(here) if path.endswith(".journal")] + [path + ".journal" for path in cached(node)]
    assert len(journals) == 2
    for path in journals:
        with open(path, "wb") as file:
            file.write(pickle.dumps(Bomb()))
    node = supernode(home=node.home)
    here.get(url, node=node.node, check=data)
    assert not os.path.exists(os.path.join(world.root, "boom"))


@pytest.mark.parametrize("lax", [lambda certificate: ["--insecure"], lambda certificate: ["--cacerts", certificate]])
def test_what_came_without_a_trusted_certificate_is_not_for_those_who_want_one(supernode, host, origin_tls, blob, lax):
    """Wire: 16.9"""
    supernode()
    data = blob(MIB)
    url = origin_tls.put("f.bin", data)
    host("a").get(url, *lax(origin_tls.certificate), "--notbs", check=data)
    bad(host("b").get(url, "-e", "8"), 5)
    host("c").get(url, *lax(origin_tls.certificate), "--notbs", check=data)
    assert origin_tls.gets("f.bin") == 1


def test_neither_settings_nor_innards_can_be_asked_for(supernode, host, origin, blob):
    """Wire: 16.10"""
    node, here = supernode(), host("a")
    here.get(origin.put("f.bin", blob(1000)), check=blob(1000))
    for address in (("127.0.0.1", node.port), ("127.0.0.1", node.cdn_port), here.uploader_address()):
        for path in ("/env", "/args", "/debug/pprof/", "/debug/version"):
            assert ask(address, "GET", path).status == 404


# -- correctness -----------------------------------------------------------------------------------
def test_a_cache_cut_in_the_middle_of_a_piece_is_mended_and_whole(supernode, host, old, origin, blob):
    """Wire: 16.13"""
    data = blob(6 * MIB)
    url = origin.put("f.bin", data, stall_after=4 * MIB, once=True)
    node = supernode()
    command = host("a").start(url)
    wait_for(lambda: node.bytes_sent() > 3 * MIB, 20)
    node.kill()
    command.kill()
    path, = cached(node)
    os.truncate(path, 5 * MIB // 2 + 123)
    node = supernode(home=node.home)
    for kind in ("go", "py"):
        old.get(kind, node, url, check=data)
    host("b").get(url, "--notbs", node=node.node, check=data)
    assert 3 * MIB < origin.requests("f.bin")[-1].bytes_sent < 4 * MIB, origin.log


def test_a_client_that_never_reports_holds_up_nobody(supernode, hand, old, origin, blob):
    """Wire: 16.17"""
    data = blob(4 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    silent = hand(node)
    silent.join(url)
    assert silent.start()["code"] == 601
    old.get("go", node, url, check=data, patience_s=10)


def test_failed_pieces_of_the_supernode_block_no_task(supernode, hand, old, origin, blob):
    """Wire: 16.17"""
    data = blob(4 * MIB)
    url = origin.put("f.bin", data)
    node = supernode()
    client = hand(node)
    client.join(url)
    for task in client.start()["data"]:
        client.pull(701, 500, task["cid"], task["range"])
    old.get("go", node, url, check=data, patience_s=10)
    got, _finish, _seen = client.finish(limit_s=15)
    assert hands.unwrapped(got) == data


def test_an_origin_that_can_not_be_reached_is_tried_again_soon(supernode, hand, origin, blob):
    """Wire: 16.26"""
    node = supernode("--fail-access-interval", "1s")
    url = origin.put("f.bin", blob(MIB), redirect_to="http://127.0.0.1:%d/" % dead_port())
    hands.refused(hand(node).json(url))
    origin.change("f.bin", redirect_to=None)
    wait_for(lambda: hand(node).json(url).json()["code"] == 200, 10)


def test_auth_failures_leave_nothing_behind(supernode, host, origin, blob):
    """Wire: 16.25"""
    supernode()
    here = host("a")
    url = origin.put("secret", blob(MIB), auth="Basic abc")
    for flags in ([], ["-p", "source"], ["-p", "cdn"], ["--notbs"]):
        bad(here.get(url, *flags), 6)
    assert os.listdir(here.dir) == ["home"]


def test_the_longest_unused_file_makes_room_first(supernode, host, origin, blob):
    """Wire: 16.24"""
    home = None
    for names in (["a", "b"], ["a"]):
        node = supernode(home=home)
        for name in names:
            host().get(origin.put(name, blob(MIB, name)), node=node.node, check=blob(MIB, name))
        home = node.home
        node.stop()
    log = dfly.Log()
    cdn = dfly.Cdn(home, log, dfly.TokenBucket(), 5.0, dfly.DiskRules(), dfly.Turns(1, 1))
    assert [os.path.basename(path) for _used, _size, path in cdn.idle_files()] == [dfly.task_id_of(origin.base + name) for name in ("b", "a")]
    log.close()


def test_a_cache_is_kept_on_a_disk_of_any_size(supernode, host, origin, blob):
    """Wire: 16.24"""
    data = blob(MIB)
    url = origin.put("a", data)
    node = supernode("--disk-reserve", "%dG" % (dfly.free_bytes("/") // 2 ** 30 + 1000), "--task-expire-time", "1s")
    host().get(url, check=data)
    wait_for(lambda: node.metrics()["dfly_tasks"] == 0, 20)
    host().get(url, "--notbs", check=data)
    assert origin.bytes_sent("a") == len(data)


def test_a_task_does_not_expire_under_a_client(supernode, host, origin, blob):
    """Wire: 16.27"""
    data = blob(3 * MIB)
    node = supernode("--task-expire-time", "1s")
    result = host().get(origin.put("f.bin", data), "-s", "300K", "--notbs", check=data)
    assert result.reason == 0 and "migrated" not in result.out and result.seconds > 6
    assert node.metrics()['dfly_requests_total{call="register"}'] == 1


def test_failures_are_told_in_one_form_and_in_plain_words(supernode, hand, origin, blob):
    """Wire: 16.28"""
    node = supernode()
    client = hand(node)
    client.join(origin.put("f.bin", blob(MIB)))
    replies = [client.get(target) for target in (
        "/peer/task?srcCid=x&taskId=y&status=700&result=502", "/peer/task?srcCid=%s&taskId=%s&status=9&result=9" % (client.cid, client.task),
        "/peer/piece/suc?taskId=x&cid=y&pieceRange=0-1", "/peer/service/down?taskId=x&cid=y", "/nothing", "/api/v1/tasks/x")]
    replies += [hand(node).json("ftp://x"), client.post(b"{", "application/json"), client.post(b"{}", "application/json", "/peer/sync")]
    for reply in replies:
        answer = hands.refused(reply)
        for key in ("msg", "message"):
            assert not re.search(r'[{}\\"]', answer.get(key, "")), answer


# -- efficiency ------------------------------------------------------------------------------------
def test_a_small_file_has_pieces_enough_for_a_swarm(supernode, hand, origin, blob):
    """Wire: 16.32"""
    data = blob(5 * MIB)
    size = hand(supernode()).join(origin.put("f.bin", data))["pieceSize"]
    assert len(data) // (size - 5) >= 16


def test_a_peer_that_keeps_to_a_limit_is_no_bad_peer(supernode, host, origin, blob):
    """Wire: 16.34"""
    data = blob(2 * MIB)
    url = origin.put("f.bin", data)
    node, slow = supernode(), host("a")
    slow.get(url, "--totallimit", "400K", check=data)
    result = host("b").get(url, "--notbs", check=data)
    assert result.shares["peers"], result.last
    peers = node.ask("GET", "/api/v1/tasks/" + dfly.task_id_of(url)).json["peers"]
    assert len(peers) == 2 and not any(peer["isolated"] for peer in peers.values())


def test_many_pieces_travel_on_few_connections(old, host, origin, blob):
    """Wire: 16.35"""
    data = blob(50 * MIB)
    node = old.node("sn1")
    host("a").get(origin.put("f.bin", data), node=node.node, check=data)
    assert len(node.cdn_log) == 13 and node._cdn.accepted <= node.down_limit  # pieces it hands out at once
    assert node._api.accepted <= 4


def test_a_new_uploader_deletes_nothing(supernode, host, origin, blob):
    """Wire: 16.36"""
    data = blob(4 * MIB)
    url = origin.put("f.bin", data, stall_after=3 * MIB, once=True)
    supernode()
    here = host("a")
    command = here.start(url)
    wait_for(lambda: any(len(content) > 2 * MIB for content in hidden(here).values()), 20)
    command.kill()
    here.kill_uploader()
    before = hidden(here)
    here.get(origin.put("other", blob(MIB)), out="other", check=blob(MIB))
    assert here.uploader_pid() and hidden(here) == before
    origin.release("f.bin")
    assert "kept from an earlier run" in here.get(url, check=data).last


def test_a_client_that_registers_again_is_still_one_client(supernode, hand, origin, blob):
    """Wire: 16.37"""
    node = supernode()
    client = hand(node)
    for _ in range(5):
        client.join(origin.put("f.bin", blob(1000)))
    assert node.metrics()["dfly_peers"] == 1


def test_clients_of_a_task_that_failed_go_to_the_origin_one_after_the_other(supernode, host, origin, blob):
    """Wire: 16.40"""
    data = blob(2 * MIB)
    node = supernode("--fail-access-interval", "1h")
    url = origin.put("f.bin", data, status=500)
    pauses = [native(node, url, number)[1]["pause"] for number in range(30)]
    assert pauses[0] == 0.0 and all(0.0 < later - sooner < 1.0 for sooner, later in zip(pauses, pauses[1:]))
    origin.change("f.bin", status=None)
    here = host("a").start(url)
    good(here.wait(), data)
    assert origin.requests("f.bin")[-1].started - here.started > pauses[-1]
