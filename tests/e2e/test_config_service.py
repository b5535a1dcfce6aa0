"""The Config Service: supernodes register, clients get the nearest healthy ones, and nobody needs it all the time."""
import json
import os
import re
import signal

import pytest

from world import MB, Command, Daemon, ask, bad, dead_port, good, tail, wait_for


class Service(Command):
    """A running `dfly.py config`."""

    LISTENING = re.compile(r"^config service listening on (\S+):(\d+)\s*$", re.M)

    def __init__(self, world, *flags, home="config", port=0):
        self.home = os.path.join(world.root, home)
        super().__init__(world, "config", world.dfly("config", "--home", self.home, "--bind", "127.0.0.1", "--port", str(port), *flags))
        wait_for(lambda: self.LISTENING.search(self.stdout) or not self.running(), 20, "the Config Service's listening line")
        match = self.LISTENING.search(self.stdout)
        assert match, "the Config Service did not start\n" + tail(self.output())
        self.port = int(match.group(2))
        self.where = "127.0.0.1:%d" % self.port

    def ask(self, method, path, body=None):
        return ask(("127.0.0.1", self.port), method, path, body)

    def near(self, label="", ip=""):
        """The supernodes for a client, as it would see them: [host:port], nearest first."""
        return ["%(ip)s:%(port)d" % row for row in self.ask("GET", "/supernodes?label=%s&ip=%s" % (label, ip)).json["nodes"]]

    def asked(self):
        """How many lists it has handed out."""
        found = re.search(r'\{call="nearest"\} (\d+)', self.ask("GET", "/metrics").body.decode())
        return int(found.group(1)) if found else 0


@pytest.fixture
def service(world):
    """Factory: start a Config Service."""
    return lambda *flags, **how: Service(world, *flags, **how)


def sited(supernode, service, *sites):
    """Start a supernode a site, and return them when the service knows them all."""
    nodes = [supernode("--config-service", service.where, "--location", site) for site in sites]
    wait_for(lambda: {node.node for node in nodes} <= set(service.near()), 20, "all supernodes registered")
    return nodes


def get(here, url, *flags, out="out", path=()):
    """Run `get` without --node."""
    target = here.path(out)
    argv = here.world.dfly("get", "-u", url, "-o", target, "--home", here.home, "--ip", "127.0.0.1", *flags)
    return Command(here.world, "get-" + here.name, argv, target).wait(60)


def went_to(result):
    """The supernodes that a client has connected to."""
    return re.findall(r"connected to node:(\S+)", result.stdout)


def text_of(*path):
    with open(os.path.join(*path)) as file:
        return file.read()


def log_of(supernode):
    return text_of(supernode.home, "logs", "app.log")


def test_a_client_gets_its_own_site_s_supernode(service, origin, supernode, host, blob):
    here = service("--subnet", "127.0.0.0/8=b/r1", "--subnet", "10.0.0.0/8=a")
    a, b = sited(supernode, here, "a/r1", "b/r2")
    assert here.near("a/r1") == [a.node, b.node] and here.near("b") == here.near() == [b.node, a.node]
    assert here.near(ip="10.1.2.3") == [a.node, b.node]
    data = blob(2 * MB)
    for label, node in (("a/r7", a), ("b", b)):
        one = host()
        for i in range(4):  # whichever supernode the URL's own order names first
            url = origin.put("%s%d" % (label[0], i), data)
            assert went_to(good(get(one, url, "--config-service", here.where, "--location", label, out=str(i)), data)) == [node.node]


def test_a_killed_supernode_s_clients_go_to_the_other(service, origin, supernode, host, blob):
    here = service("--interval", "1s")
    a, b = sited(supernode, here, "a", "b")
    data, early = blob(2 * MB), host()
    flags = ("--config-service", here.where, "--location", "a")
    assert went_to(good(get(early, origin.put("f", data), *flags), data)) == [a.node]
    a.kill()
    assert went_to(good(get(early, origin.put("g", data), *flags, "--notbs", out="g"), data)) == [b.node], "by the list it has"
    wait_for(lambda: here.near("a") == [b.node], 30, "three heartbeats missed")
    assert "silent" in here.ask("GET", "/").body.decode() and 'label="a",node="127.0.0.1:%d"} 0' % a.port in here.ask("GET", "/metrics").body.decode()
    late = host()
    assert went_to(good(get(late, origin.put("h", data), *flags, "--notbs"), data)) == [b.node]
    assert str(a.port) not in text_of(late.home, "supernodes.json"), "by a new list"


def test_a_supernode_that_is_stopped_says_good_bye(service, supernode):
    here = service()
    a, b = sited(supernode, here, "a", "b")
    assert a.stop() == 0
    wait_for(lambda: here.near("a") == [b.node], 20, "one supernode less")


def test_clients_go_on_without_the_service(service, origin, supernode, host, blob):
    here = service("--refresh", "100ms")
    a, _ = sited(supernode, here, "a", "b")
    data, one, other = blob(MB), host(), host()
    flags = ("--config-service", here.where, "--location", "a", "--notbs")
    good(get(one, origin.put("f", data), *flags), data)
    here.kill()
    for name in ("g", "h"):
        assert went_to(good(get(one, origin.put(name, data), *flags, out=name), data)) == [a.node]
    assert "going on with the supernodes known before" in text_of(one.home, "logs", "dfclient.log")
    failed = bad(get(other, origin.put("i", data), *flags), 4)
    assert "Config Service %s: Connection refused; and no supernode is known" % here.where in failed.last, failed.out
    assert went_to(good(get(other, origin.put("j", data), *flags[:-1]), data)) == [], "straight from the origin"


def test_a_service_that_hangs_holds_nobody_up_for_long(service, origin, supernode, host, blob):
    here = service("--refresh", "100ms", "--interval", "100ms")
    (a,) = sited(supernode, here, "a")
    data, one = blob(MB), host()
    flags = ("--config-service", here.where, "--notbs")
    good(get(one, origin.put("f", data), *flags), data)
    os.kill(here.pid, signal.SIGSTOP)
    for name in ("g", "h"):
        assert went_to(good(get(one, origin.put(name, data), *flags, out=name), data)) == [a.node]
    assert text_of(one.home, "logs", "dfclient.log").count("is silent; going on with") == 1, "asked again at once"
    wait_for(lambda: "is silent; trying on" in log_of(a), 20, "the supernode's complaint")
    assert a.stop() == 0


def test_a_restarted_service_knows_the_supernodes(service, supernode):
    here = service()
    nodes = sited(supernode, here, "a", "b")
    for command in nodes + [here]:
        command.kill()
    again = service(port=here.port)
    assert again.near("b") == [nodes[1].node, nodes[0].node]


def test_a_supernode_says_once_that_the_service_is_away_and_once_that_it_is_back(service, origin, supernode, host, blob):
    here = service("--interval", "500ms")
    (a,) = sited(supernode, here, "a")
    here.kill()
    wait_for(lambda: "trying on" in log_of(a), 20, "the supernode's complaint")
    data = blob(MB)
    host().get(origin.put("f", data), "--notbs", node=a.node, check=data)
    again = service(port=here.port, home="another")
    wait_for(lambda: again.near() == [a.node], 20, "the supernode registered again")
    wait_for(lambda: "is back" in log_of(a), 20, "the supernode's relief")
    assert log_of(a).count("trying on") == log_of(a).count("is back") == log_of(a).count(": registered") == 1


def test_a_supernode_may_come_before_the_service(service, supernode):
    port = dead_port()
    node = supernode("--config-service", "127.0.0.1:%d" % port)
    wait_for(lambda: "trying on" in log_of(node), 20, "the supernode's complaint")
    here = service(port=port)
    wait_for(lambda: here.near() == [node.node], 20, "the supernode registered")


def test_settings_say_where_it_is_and_a_fresh_list_costs_no_request(world, service, origin, supernode, host, blob):
    here = service()
    conf = os.path.join(world.root, "dragonfly.conf")
    with open(conf, "w") as file:
        file.write("[node]\nconfig = %s\naddress = 127.0.0.1:%d\n[supernode]\nconfig = %s\nlocation = a/r1\nweight = 7\n" % (here.where, dead_port(), here.where))
    node = supernode("--config", conf)
    wait_for(lambda: here.near() == [node.node], 20, "the supernode registered")
    row = here.ask("GET", "/supernodes").json["nodes"][0]
    assert (row["label"], row["weight"], row["healthy"]) == ("a/r1", 7, True) and set(row["load"]) == {"tasks", "peers", "bytes_s"}
    before, data, one = here.asked(), blob(MB), host()
    for name in ("f", "g"):
        assert went_to(good(get(one, origin.put(name, data), "--config", conf, out=name), data)) == [node.node]
    assert here.asked() == before + 1


def test_node_on_the_command_line_wins(service, origin, supernode, host, blob):
    here = service()
    sited(supernode, here, "a")
    lone, before, data = supernode(), here.asked(), blob(MB)
    assert went_to(good(get(host(), origin.put("f", data), "--config-service", here.where, "--node", lone.node), data)) == [lone.node]
    assert here.asked() == before


def test_configured_supernodes_help_out_while_nothing_else_is_known(world, origin, supernode, host, blob):
    node, data = supernode(), blob(MB)
    conf = os.path.join(world.root, "dragonfly.conf")
    with open(conf, "w") as file:
        file.write("[node]\nconfig = 127.0.0.1:%d\naddress = %s\n" % (dead_port(), node.node))
    assert went_to(good(get(host(), origin.put("f", data), "--config", conf), data)) == [node.node]


def test_a_daemon_keeps_its_list_fresh_and_goes_on_without_the_service(world, service, origin, supernode, host, blob):
    here = service("--refresh", "100ms")
    (a,) = sited(supernode, here, "a")
    one, data = host(), blob(2 * MB)

    def daemon():
        return Daemon(world, "daemon", world.dfly("daemon", "--home", one.home, "--port", "0", "--registry", "http://127.0.0.1:%d" % dead_port(),
                                                  "--ip", "127.0.0.1", "--config-service", here.where, "--location", "b", "--proxy", "."))

    def pull(running, name, node):
        before = node.bytes_sent()
        answer = running.ask(origin.put(name, data))
        assert (answer.status, answer.body) == (200, data) and node.bytes_sent() > before

    running = daemon()
    pull(running, "f", a)
    assert running.ask("/env").json["config_service"] == here.where
    (b,) = sited(supernode, here, "b")
    wait_for(lambda: str(b.port) in text_of(one.home, "supernodes.json"), 20, "the new supernode in the daemon's list")
    pull(running, "g", b)
    here.kill()
    pull(running, "h", b)
    running.stop()
    pull(daemon(), "i", b)


# ---- what makes no sense ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code, flags", [
    (2, ["--port", "99999"]), (2, ["--subnet", "10.0.0.0/8"]), (2, ["--subnet", "10.0.0.0/33=a"]), (2, ["--subnet", "10.0.0.0/8=<a>"]),
    (2, ["--supernodes", "10.0.0.0/99"]), (2, ["--interval", "0"]), (2, ["--refresh", "soon"]), (2, ["--bogus"]), (2, ["--config", "/nonexistent"]),
    (3, ["--home", "/dev/null/x"]), (4, ["--bind", "192.0.2.1"])])
def test_a_service_with_bad_settings_says_so_and_ends(world, code, flags):
    result = world.run("config", "--home", os.path.join(world.root, "h"), "--port", "0", *flags, timeout=20)
    assert result.code == code and len(result.stderr.splitlines()) == 1 and "Traceback" not in result.out, result.out


@pytest.mark.parametrize("command, flags", [
    ("get", ["-u", "http://127.0.0.1/x", "--config-service", "a b"]), ("get", ["-u", "http://127.0.0.1/x", "--config-service", "h:99999"]),
    ("daemon", ["--config-service", "h:x"]), ("supernode", ["--config-service", "h:0"]), ("supernode", ["--location", "<a>"]),
    ("supernode", ["--weight", "0"])])
def test_who_can_not_find_it_says_so_and_ends(world, command, flags):
    result = world.run(command, "--home", os.path.join(world.root, "h"), *flags, timeout=20)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1 and "Traceback" not in result.out, result.out


def test_rules_of_the_configuration_stand_one_on_a_line(world, service):
    conf = os.path.join(world.root, "dragonfly.conf")
    with open(conf, "w") as file:
        file.write("[config]\nsubnet =\n  10.1.0.0/16 = a\n  10.2.0.0/16 = b/r1\n  fd00::/8=c\n")
    here = service("--config", conf)
    for ip, label in (("10.2.0.9", ""), ("10.1.0.9", ""), ("127.0.0.1", "c")):
        assert here.ask("POST", "/supernodes", {"ip": ip, "port": 8002, "label": label}).json == {"interval": 10.0}
    assert here.near(ip="10.1.5.5")[0] == "10.1.0.9:8002" and here.near(ip="10.2.5.5")[0] == "10.2.0.9:8002"
    assert here.near(ip="fd00::5")[0] == "127.0.0.1:8002"


def test_a_second_service_in_the_same_home_says_so_and_ends(world, service):
    here = service()
    result = world.run("config", "--home", here.home, "--port", "0", timeout=20)
    assert result.code == 3 and len(result.stderr.splitlines()) == 1, result.out
    assert here.stop() == 0


def test_requests_that_make_no_sense_are_refused_and_it_goes_on(service):
    here = service()
    for body in ("", "{", "[]", '{"port": "x"}', '{"label": "<script>"}', '{"ip": 7}', "[" * 90000):
        answer = here.ask("POST", "/supernodes", body)
        assert answer.status == 400 and answer.json["message"], body
    for path, status in (("/supernodes?ip=x", 400), ("/supernodes?label=%3Cb%3E", 400), ("/nothing", 404), ("/supernodes/x", 404)):
        assert here.ask("GET", path).status == status, path
    assert here.ask("DELETE", "/supernodes").status == 405
    assert here.ask("GET", "/_ping").body == b"OK" and here.near() == []
    page = here.ask("GET", "/")
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8" and b"0 of 0" in page.body


def test_supernodes_register_from_the_named_networks_only(service, supernode):
    here = service("--supernodes", "10.0.0.0/8")
    assert here.ask("POST", "/supernodes", {"ip": "10.0.0.1", "port": 8002}).status == 403
    node = supernode("--config-service", here.where)
    wait_for(lambda: "answers 403" in log_of(node), 20, "the refusal in the supernode's log")
    assert here.near() == []


@pytest.mark.parametrize("answer", [{"nodes": [{"ip": "x/y", "port": 1, "weight": 1, "group": 0}]}, {"nodes": [{"ip": "127.0.0.1"}]}, {"nodes": 3}, {"nodes": []}, {},
                                    {"nodes": [{"ip": "127.0.0.1", "port": 8002, "weight": 1, "group": 0}], "refresh": "x"}])
def test_an_answer_that_makes_no_sense_is_as_good_as_none(origin, host, blob, answer):
    one, data = host(), blob(MB)
    url = origin.put("supernodes", json.dumps(answer).encode())
    result = good(get(one, origin.put("f", data), "--config-service", url.split("/")[2]), data)
    assert "Config Service" in result.stdout and not os.path.exists(os.path.join(one.home, "supernodes.json")), result.out


def test_a_preheat_given_to_the_service_reaches_all_supernodes_or_those_of_a_site(world, service, supernode, origin, blob):
    known = service()
    a, b = sited(supernode, known, "a/1", "b/1")
    url = origin.put("f", blob(MB))
    result = world.run("preheat", url, "--config-service", known.where, "--location", "b")
    assert result.code == 0 and "there, after" in result.out, result.out
    number = json.loads(b.ask("GET", "/preheats").body.decode())[0]["ID"]
    assert json.loads(a.ask("GET", "/preheats").body.decode()) == []
    assert origin.gets("f") == 1
    answer = known.ask("POST", "/preheats", {"type": "file", "url": url})
    assert answer.status == 201 and answer.json["ID"] == number and set(answer.json["supernodes"]) == {a.node, b.node}
    wait_for(lambda: known.ask("GET", "/preheats/" + number).json.get("status") == "SUCCESS", 20)
    assert set(known.ask("GET", "/preheats/" + number).json["supernodes"]) == {a.node, b.node}
    assert origin.gets("f") == 2


def test_a_preheat_that_nobody_can_take(world, service, supernode, origin):
    known = service()
    answer = known.ask("POST", "/preheats", {"type": "file", "url": "http://x/y"})
    assert answer.status == 503 and "no healthy supernode" in answer.json["message"]
    sited(supernode, known, "a")
    assert known.ask("POST", "/preheats", {"type": "dir", "url": "http://x/y"}).status == 502
    assert known.ask("POST", "/preheats", {"type": "file", "url": "http://x/y", "label": "nowhere"}).status == 503
    assert known.ask("GET", "/preheats/" + "0" * 64).status == 404
    url = origin.put("f", status=404)
    result = bad(world.run("preheat", url, "--config-service", known.where))
    assert "404" in result.out and len(result.out.strip().splitlines()) == 1
