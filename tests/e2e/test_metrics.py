"""What each program says of itself to Prometheus."""
import re

from world import MB, Command, ask, bad, wait_for


def numbers(text):
    """Return {name{labels}: value}, each line checked, each name with its HELP and TYPE before it."""
    found, known = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            known.add(line.split()[2])
        elif not line.startswith("#"):
            match = re.match(r'^([a-z_]+)((?:\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})?) (-?[\d.]+)$', line)
            assert match and re.sub("_(sum|count)$", "", match.group(1)) in known, line
            found[match.group(1) + match.group(2)] = float(match.group(3))
    return found


def test_the_supernode_and_the_peers(origin, supernode, host, blob):
    node, data = supernode(), blob(4 * MB)
    url = origin.put("f", data, headers=(("Cache-Control", "no-cache"),))
    first = host()
    first.get(url, check=data)
    for _ in range(2):
        host().get(url, check=data)
    found = numbers(ask((node.ip, node.port), "GET", "/metrics").body.decode())
    assert found["dfly_origin_bytes_total"] == len(data)
    assert found['dfly_cache_total{result="miss"}'] == 1 and found['dfly_tasks_ended_total{result="success"}'] == 1
    sources = {source: found.get('dfly_received_bytes_total{source="%s"}' % source, 0) for source in ("supernode", "peer")}
    assert sum(sources.values()) == 3 * len(data) and sources["peer"] > 0
    assert found["dfly_scheduler_seconds_count"] >= 3 and found["dfly_peers"] == 3 and found["dfly_fetches"] == 0
    assert found['dfly_requests_total{call="register"}'] == 3 and found["dfly_disk_free_bytes"] > 0
    address = first.uploader_address()
    wait_for(lambda: numbers(ask(address, "GET", "/metrics").body.decode())["dfly_sent_bytes_total"] > 0)
    assert numbers(ask(address, "GET", "/metrics").body.decode())["dfly_uploader_tasks"] == 1


def test_the_cache_counts_what_it_removes(origin, supernode, host, blob):
    node = supernode("--capacity", "5M", "--task-expire-time", "1s")
    here = host()
    for name in ("a", "b", "c"):
        here.get(origin.put(name, blob(2 * MB, name)), "-p", "cdn", check=blob(2 * MB, name))
        wait_for(lambda: node.metrics()["dfly_tasks"] == 0, 20)
    found = node.metrics()
    assert found['dfly_gc_files_total{why="room"}'] == 1 and found['dfly_gc_bytes_total{why="room"}'] >= 2 * MB


def lint(text):
    """What `promtool check metrics` complains of, and a series twice; names are held to HELP, TYPE and units as Prometheus advises."""
    complaints, kinds, helped, series, family = [], {}, set(), set(), None
    for line in text.splitlines():
        word = line.split()
        if line.startswith("# HELP "):
            if word[2] in helped or len(word) < 4:
                complaints.append("HELP twice, or empty: " + line)
            helped.add(word[2])
        elif line.startswith("# TYPE "):
            family = word[2]
            if family in kinds or family not in helped:
                complaints.append("TYPE twice, or before HELP: " + line)
            kinds[family] = word[3]
            if (word[3] == "counter") != family.endswith("_total") or word[3] not in ("counter", "gauge", "summary"):
                complaints.append("kind and name: " + line)
            if re.search(r"_(sum|count|bucket|info|milliseconds|ms|minutes|kb|mb|kilobytes|megabytes)(_total)?$|(counter|gauge|summary|total_total)", family):
                complaints.append("name: " + line)
            if re.search("bytes|seconds", family) and not re.search("_(bytes|seconds)(_total)?$", family):
                complaints.append("unit not at the end: " + line)
        else:
            name = re.match("[a-z_:]+", line).group()
            if name not in ([family + "_sum", family + "_count"] if kinds.get(family) == "summary" else [family]):
                complaints.append("not of the family above it: " + line)
            if line.rpartition(" ")[0] in series:
                complaints.append("twice: " + line)
            series.add(line.rpartition(" ")[0])
    return complaints + (["nothing there"] if not series else []) + ([] if text.endswith("\n") else ["no end of line"])


def test_all_names_and_units_are_as_prometheus_advises(world, origin, supernode, host, blob):
    service = world.dfly("config", "--home", world.root + "/config", "--port", "0")
    command = Command(world, "config", service)
    try:
        port = int(wait_for(lambda: re.search(r":(\d+)\s*$", command.stdout, re.M), 20).group(1))
        node = supernode("--config-service", "127.0.0.1:%d" % port, "--memory-cache", "8M", "--memory-folder", world.root + "/memory")
        here = host()
        daemon = here.daemon(origin.base.rstrip("/"))
        here.get(origin.put("f", blob(2 * MB)), check=blob(2 * MB))
        bad(host().get(origin.base + "none", "--notbs"))
        wait_for(lambda: "dfly_config_supernode_up" in ask(("127.0.0.1", port), "GET", "/metrics").body.decode(), 20)
        for address in ((node.ip, node.port), here.uploader_address(), daemon.address, ("127.0.0.1", port)):
            answer = ask(address, "GET", "/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert not lint(answer.body.decode()), lint(answer.body.decode())
    finally:
        command.stop()


def test_every_metric_has_its_place_in_the_list():
    import dfly
    with open(dfly.__file__) as file:
        used = set(re.findall(r'"(dfly_[a-z_]+)"', file.read()))
    assert used == set(dfly.Metrics.HELP)
