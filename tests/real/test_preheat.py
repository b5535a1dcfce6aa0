"""Images on the supernode before anybody pulls them: told by an operator, and by a real registry of each push."""
import json
import urllib.request

import pytest
from real.registries import Image, Registry, TokenServer
from world import MB, ask, bad, sha256, wait_for


def known(node):
    """Return the preheats of a supernode by URL."""
    with urllib.request.urlopen("http://%s/preheats" % node.node, timeout=10) as answer:
        return {preheat["URL"]: preheat for preheat in json.loads(answer.read().decode())}


def ended(node, count):
    """Wait until a supernode has at least `count` preheats and all have ended; return them."""
    wait_for(lambda: len(known(node)) >= count and all(p["FinishTime"] for p in known(node).values()), 30, "preheats to end")
    return known(node)


@pytest.mark.parametrize("account", ["", "me:secret"])
def test_what_is_pushed_is_there_before_anybody_pulls(world, supernode, host, blob, account):
    flags = ("--registry-auth", "127.0.0.1:0=no:body") if account else ()
    node = supernode(*flags)
    registry, image = Registry(world, tell="http://" + node.node, protected=bool(account)), Image(world, blob(12 * MB, 1), blob(300, 2))
    if account:
        node.kill()
        node = supernode("--registry-auth", "127.0.0.1:%d=%s" % (registry.port, account), home=node.home, ports=(node.port, node.cdn_port))
    image.push(registry.port, *(("--dest-creds", account) if account else ()))
    found = ended(node, len(image.blobs) + 1)
    assert {p["Status"] for p in found.values()} == {"SUCCESS"}, found
    assert "Basic" not in json.dumps(found)
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}
    daemon = host().daemon(registry.url, "--small", "0")
    image.pull(daemon.address[1], "out", *(("--src-creds", account) if account else ()))
    assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}, "the pull came from the cache"
    assert daemon.metric("fallbacks_total") == 0


def test_the_command_brings_a_whole_image(world, supernode, host, blob):
    nodes = [supernode(), supernode()]
    registry, image = Registry(world), Image(world, blob(5 * MB, 1), blob(MB, 2))
    image.push(registry.port)
    both = ",".join(node.node for node in nodes)
    result = world.run("preheat", "127.0.0.1:%d/team/app:1" % registry.port, "--plain-http", "--node", both)
    assert result.code == 0 and result.out.count(": there, after ") == 2, result.out
    assert registry.blobs_sent() == {digest: 2 for digest in image.blobs}
    image.pull(host().daemon(registry.url, "--small", "0", "--node", nodes[0].node).address[1], "out")
    assert registry.blobs_sent() == {digest: 2 for digest in image.blobs}
    result = world.run("preheat", "127.0.0.1:%d/team/app:none" % registry.port, "--plain-http", "--node", both)
    bad(result)
    assert "404" in result.out and len(result.out.strip().splitlines()) == 1


def test_a_registry_with_tokens(world, supernode, host, blob):
    node, tokens = supernode(), TokenServer(world)
    try:
        registry, image = Registry(world, tokens=tokens), Image(world, blob(5 * MB, 1))
        image.push(registry.port, "--dest-creds", "me:secret")
        name = "127.0.0.1:%d/team/app:1" % registry.port
        bad(world.run("preheat", name, "--plain-http", "--node", node.node))
        assert world.run("preheat", name, "--plain-http", "--node", node.node, "--user", "me:secret").code == 0
        image.pull(host().daemon(registry.url, "--small", "0").address[1], "out", "--src-creds", "me:secret")
        assert registry.blobs_sent() == {digest: 1 for digest in image.blobs}
    finally:
        tokens.close()


def test_an_index_brings_the_images_of_all_platforms(world, supernode, host, blob):
    node, registry = supernode(), Registry(world)
    images = [Image(world, blob(3 * MB, platform), folder=platform) for platform in ("amd64", "arm64")]
    parts = []
    for image, platform in zip(images, ("amd64", "arm64")):
        image.push(registry.port, name="team/app:" + platform)
        with open(image.folder + "/manifest.json", "rb") as file:
            manifest = file.read()
        parts.append({"mediaType": json.loads(manifest.decode())["mediaType"], "size": len(manifest), "digest": "sha256:" + sha256(manifest),
                      "platform": {"architecture": platform, "os": "linux"}})
    kind = "application/vnd.docker.distribution.manifest.list.v2+json"
    said = ask(("127.0.0.1", registry.port), "PUT", "/v2/team/app/manifests/1", json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": parts}),
               {"Content-Type": kind})
    assert said.status == 201, said
    url = registry.url + "/v2/team/app/manifests/1"
    number = node.ask("POST", "/preheats", {"type": "image", "url": url, "headers": {"X-Why": "test"}}).json["ID"]
    wait_for(lambda: node.ask("GET", "/preheats/" + number).json["status"] == "SUCCESS", 30, node.ask("GET", "/preheats/" + number).body)
    assert registry.blobs_sent() == {digest: 1 for image in images for digest in image.blobs}
    assert node.ask("DELETE", "/preheats/" + number).status == 200 and node.ask("GET", "/preheats/" + number).status == 404
