"""What each program says of itself to Prometheus."""
import re

from world import MB, ask, wait_for


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
