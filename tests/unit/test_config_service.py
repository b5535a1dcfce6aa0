"""Section 28: who is near whom, who is healthy, what is kept and for how long; by a clock that stands still."""
import json
import os
import re
import stat
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def directory(tmp_path, clock):
    """Factory: a Directory over the same file."""
    return lambda *rules: dfly.Directory(str(tmp_path / "supernodes.json"), dfly.Subnets(rules), 10.0, dfly.Log(), clock)


def hear(directory, *names, **more):
    """Have supernodes say that they are there: `site/rack@ip`, in short."""
    for name in names:
        label, _, ip = name.partition("@")
        directory.hear(dict({"ip": ip, "port": 8002, "label": label}, **more), "127.0.0.1")


def near(directory, label="", ip="192.0.2.9"):
    """The answer for a client, as [(group, ip)]."""
    return [(group, entry.ip) for group, entry in directory.near(ip, label)]


# ---- rules and labels ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ip, label", [
    ("10.1.2.3", ("a",)), ("10.1.7.9", ("a", "r7")), ("::ffff:10.1.7.9", ("a", "r7")), ("10.2.0.1", ("b",)), ("11.0.0.1", ()),
    ("fd00::1", ("c", "r1")), ("fe80::1%eth0", ())])
def test_the_narrowest_rule_says_where_an_address_is(ip, label):
    rules = dfly.Subnets(["10.1.0.0/16=a", "10.1.7.0/24 = a/r7", "10.2.0.0/16=b/", "fd00::/8=c/r1"])
    assert rules.label(ip) == label


@pytest.mark.parametrize("rule", ["", "10.0.0.0/8", "10.0.0.0/8=", "10.0.0.0/33=a", "a=b", "10.0.0.0/8=a<b", "10.0.0.0/8=%s" % ("x" * 201)])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(dfly.BadUsage):
        dfly.Subnets([rule])


def test_the_longest_common_label_is_nearest(directory):
    here = directory()
    hear(here, "a/r1@10.0.0.1", "a/r2@10.0.0.2", "b/r1@10.0.0.3", "@10.0.0.4")
    assert near(here, "a/r1") == [(0, "10.0.0.1"), (1, "10.0.0.2"), (2, "10.0.0.4"), (2, "10.0.0.3")]
    assert near(here, "a") == [(0, "10.0.0.1"), (0, "10.0.0.2"), (1, "10.0.0.4"), (1, "10.0.0.3")]
    assert near(here, " b / r9 ")[0] == (0, "10.0.0.3")
    assert {group for group, _ in near(here, "ab")} == {0}, "parts are compared, not letters"
    assert {group for group, _ in near(here)} == {0}, "who is nowhere is equally far from all"


def test_rules_place_clients_and_supernodes_that_do_not_say_where_they_are(directory):
    here = directory("10.1.0.0/16=a", "10.2.0.0/16=b")
    hear(here, "@10.1.0.1", "b@10.1.0.2", "@10.2.0.1")
    assert near(here, ip="10.1.5.5") == [(0, "10.1.0.1"), (1, "10.2.0.1"), (1, "10.1.0.2")]
    assert near(here, "b", ip="10.1.5.5")[:2] == [(0, "10.2.0.1"), (0, "10.1.0.2")], "the client's own label wins"


@pytest.mark.parametrize("label, ip", [("a\"b", "10.0.0.1"), ("a\n", "10.0.0.1"), ("", "here"), ("", "")])
def test_a_client_that_makes_no_sense_is_refused(directory, label, ip):
    with pytest.raises(dfly.BadRequest):
        near(directory(), label, ip)


# ---- health ----------------------------------------------------------------------------------------------------------

def test_three_missed_heartbeats_and_the_next_group_is_nearest(directory, clock):
    here = directory()
    hear(here, "a@10.0.0.1", "b@10.0.0.2")
    clock.now += 30
    hear(here, "b@10.0.0.2")
    assert near(here, "a") == [(0, "10.0.0.1"), (1, "10.0.0.2")]
    clock.now += 0.1
    assert near(here, "a") == [(0, "10.0.0.2")]
    hear(here, "a@10.0.0.1")
    assert near(here, "a") == [(0, "10.0.0.1"), (1, "10.0.0.2")]


def test_when_nobody_is_healthy_clients_get_all_but_those_that_said_good_bye(directory, clock):
    here = directory()
    hear(here, "a@10.0.0.1", "b@10.0.0.2", "b@10.0.0.3")
    clock.now += 31
    hear(here, "b@10.0.0.3", leaving=True)
    assert near(here, "b") == [(0, "10.0.0.2"), (1, "10.0.0.1")]


def test_who_says_good_bye_is_gone_at_once(directory):
    here = directory()
    hear(here, "a@10.0.0.1", "a@10.0.0.2")
    hear(here, "a@10.0.0.1", leaving=True)
    assert near(here, "a") == [(0, "10.0.0.2")]
    hear(here, "a@10.0.0.1")
    assert len(near(here, "a")) == 2


def test_an_hour_of_silence_and_a_supernode_is_forgotten(directory, clock):
    here = directory()
    hear(here, "a@10.0.0.1")
    clock.now += 3600
    here.sweep()
    assert here.entries()
    clock.now += 1
    here.sweep()
    assert not here.entries() and not directory().entries()


# ---- what supernodes say ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("said", [
    {"ip": "here"}, {"ip": "10.0.0.256"}, {"port": 0}, {"port": 65536}, {"port": "8002"}, {"port": None}, {"weight": 0}, {"weight": 10000}, {"weight": []},
    {"label": "<b>"}, {"label": {}}, {"label": "x" * 201}, {"version": "1 2"}, {"load": 3}, {"load": {"x": "y"}}, {"load": {"X-Y": 1}},
    {"load": {"x": -1}}, {"load": {"x": float("nan")}}, {"load": {"l%s" % chr(97 + i): 1 for i in range(17)}}, {"port": float("inf")}])
def test_a_word_that_makes_no_sense_is_refused(directory, said):
    here = directory()
    with pytest.raises(dfly.BadRequest):
        here.hear(dict({"ip": "10.0.0.1", "port": 8002}, **said), "127.0.0.1")
    assert not here.entries()


def test_a_supernode_that_names_no_address_has_that_of_its_caller(directory):
    here = directory()
    here.hear({}, "10.0.0.7")
    assert [str(entry) for entry in here.entries()] == ["10.0.0.7:8002"]


def test_there_is_a_most_of_supernodes_and_those_that_are_known_go_on(directory):
    here = directory()
    here.MOST = 2
    hear(here, "a@10.0.0.1", "a@10.0.0.2")
    with pytest.raises(dfly.BadRequest):
        hear(here, "a@10.0.0.3")
    hear(here, "a@10.0.0.2")
    assert len(here.entries()) == 2


# ---- the file --------------------------------------------------------------------------------------------------------

def test_a_restart_knows_the_supernodes_and_the_time_between_does_not_count(directory, clock):
    here = directory()
    hear(here, "a@10.0.0.1", weight=7, load={"tasks": 3})
    clock.now += 20
    hear(here, "b@10.0.0.2")
    here.save()
    clock.now += 7000
    again = directory()
    assert near(again, "a") == [(0, "10.0.0.1"), (1, "10.0.0.2")]
    assert again.entries()[0].weight == 7 and again.entries()[0].load == {"tasks": 3}
    clock.now += 10.5
    assert near(again, "a") == [(0, "10.0.0.2")]


def test_what_is_new_is_on_disk_before_the_answer(directory, tmp_path):
    hear(directory(), "a@10.0.0.1")
    assert json.loads((tmp_path / "supernodes.json").read_text())["supernodes"][0]["ip"] == "10.0.0.1"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"supernodes": 3}', '{"supernodes": [3]}', '{"supernodes": [{"ip": "x"}]}', '{"supernodes": [{"port": 1}]}', "\xff"])
def test_a_file_that_can_not_be_read_is_begun_anew(directory, tmp_path, text):
    (tmp_path / "supernodes.json").write_bytes(text.encode("latin-1"))
    here = directory()
    hear(here, "a@10.0.0.1")
    assert len(directory().entries()) == 1


# ---- the page --------------------------------------------------------------------------------------------------------

def test_the_page_is_escaped_and_has_no_scripts(directory):
    here = directory()
    hear(here, "a@10.0.0.1", load={"tasks": 2, "peers": 3, "bytes_s": 2048})
    text = b"".join(dfly.ConfigService(here, 60.0, dfly.HostList("")).page(dfly.Request("GET", "/", {}, b"", "127.0.0.1", "127.0.0.1")).segments).decode()
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells == ["10.0.0.1:8002", "a", "healthy", "0.0 s ago", "1", "2", "3", "2.0 KB/s", ""]
    assert "<script" not in text and "1 of 1 supernodes healthy" in text


# ---- the client's list -----------------------------------------------------------------------------------------------

class Service(dfly.NodeList):
    """A client's list whose service is `answers`: nodes for an hour, or an error; `asked` counts."""

    answers = []
    asked = 0

    def _ask(self):
        self.asked += 1
        if isinstance(self.answers, Exception):
            raise self.answers
        return dfly.Kept(self.answers, self._clock() + 3600)


A, B = dfly.Node("10.0.0.1", 8002, 2, 0), dfly.Node("10.0.0.2", 8002, 1, 1)
AWAY = dfly.NetworkError("Config Service: refused")


@pytest.fixture
def listed(tmp_path, clock):
    """Factory: a client's list as another run of `get` makes it."""
    def make(answers, fallback=(), label="a", service="c:8004"):
        made = Service(dfly.parse_service(service), str(tmp_path / "home"), list(fallback), label, "", clock)
        made.answers = answers
        return made
    return make


def test_a_fresh_list_costs_no_request_and_an_old_one_is_replaced(listed, clock):
    assert listed([A, B]).nodes(dfly.Log()) == [A, B]
    later = listed([B])
    assert later.nodes(dfly.Log()) == [A, B] and not later.asked
    clock.now += 3601
    assert later.nodes(dfly.Log()) == [B] and later.asked == 1
    assert listed(AWAY).nodes(dfly.Log()) == [B]


def test_an_old_list_is_used_while_the_service_is_away_and_the_service_not_asked_each_time(listed, clock):
    listed([A, B]).nodes(dfly.Log())
    clock.now += 1e6
    first, second = listed(AWAY), listed(AWAY)
    assert first.nodes(dfly.Log()) == second.nodes(dfly.Log()) == [A, B]
    assert (first.asked, second.asked) == (1, 0)
    clock.now += 31
    assert second.nodes(dfly.Log()) == [A, B] and second.asked == 1


def test_a_list_is_its_owner_s_and_private(listed, tmp_path):
    listed([A]).nodes(dfly.Log())
    assert stat.S_IMODE(os.stat(str(tmp_path / "home" / "supernodes.json")).st_mode) == 0o600
    assert listed([B], label="b").nodes(dfly.Log()) == [B]
    assert listed([A], service="d").nodes(dfly.Log()) == [A]


def test_a_clock_that_is_put_back_does_not_keep_a_list_for_ever(listed, clock):
    listed([A]).nodes(dfly.Log())
    clock.now -= 1e6
    assert listed([B]).nodes(dfly.Log()) == [B]


def test_without_a_list_the_configured_supernodes_help_out_and_are_not_taken_for_the_service_s(listed, tmp_path):
    assert listed(AWAY, [B]).nodes(dfly.Log()) == [B]
    assert not os.path.exists(str(tmp_path / "home" / "supernodes.json"))
    with pytest.raises(dfly.NetworkError) as refusal:
        listed(AWAY).nodes(dfly.Log())
    assert "refused" in str(refusal.value) and "no supernode is known" in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"for": ["c:8004", "a", ""], "ask_at": 9e9, "nodes": [["x/y", 1, 1, 0]]}',
                                  '{"for": ["c:8004", "a", ""], "ask_at": "x", "nodes": [["h", 1, 1, 0]]}',
                                  '{"for": ["c:8004", "a", ""], "ask_at": 1001, "nodes": [["h", 1, 0, 0]]}', '{"for": ["c:8004", "a", ""], "ask_at": 1, "nodes": []}',
                                  '{"for": ["c:8004", "a", ""], "ask_at": 1001, "nodes": [["h", Infinity, 1, 0]]}'])
def test_a_list_on_disk_that_makes_no_sense_is_replaced(listed, tmp_path, text):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "supernodes.json").write_text(text)
    assert listed([A]).nodes(dfly.Log()) == [A]
    assert listed(AWAY).nodes(dfly.Log()) == [A]


def test_the_nearest_group_is_tried_first_and_weights_count_within_it():
    near = [dfly.Node("10.0.0.%d" % i, 8002, weight, 0) for i, weight in ((1, 1), (2, 3))]
    far = [dfly.Node("10.0.1.%d" % i, 8002, 50, 1) for i in (1, 2)]
    first = []
    for i in range(2000):
        order = dfly.order_nodes(far + near, "task-%d" % i)
        assert {node.group for node in order[:2]} == {0} and len(order) == 4
        first.append(order[0].weight)
    assert 0.7 < first.count(3) / 2000.0 < 0.8
