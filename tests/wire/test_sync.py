"""Our own call, POST /peer/sync: which of two that wait brings what there is."""
import json

import dfly
import pytest
from world import wait_for

MIB = 1 << 20
HEADERS = [("Content-Type", "application/json"), ("X-Dfly", "1 ")]


class Line:
    """The syncs of one client that has registered; each goes on a connection of its own."""

    def __init__(self, node, url):
        self._node, self._links = node, []
        fields = dict(superNodeIp="127.0.0.1", rawUrl=url, taskUrl=url, cid="127.0.0.1-1-1795408506.429", ip="127.0.0.1", port=0, path="/peer/file/x")
        self.task = self.answer(self.ask("/peer/registry", fields))["data"]["taskId"]
        self.cid = fields["cid"]

    def ask(self, target, message):
        link = dfly.HttpLink("127.0.0.1", self._node.port, 20.0)
        self._links.append(link)
        link.send("POST", target, HEADERS, json.dumps(message).encode())
        return link

    def about(self):
        """What the supernode says about the task."""
        return self._node.ask("GET", "/api/v1/tasks/" + self.task).json

    def sync(self, slots, wait=15):
        """Send a sync; once it has arrived, return the connection its answer will come on."""
        before = self.about()["peers"][self.cid]["requests"]
        link = self.ask("/peer/sync", {"task": self.task, "cid": self.cid, "slots": slots, "wait": wait})
        wait_for(lambda: self.about()["peers"][self.cid]["requests"] > before, 10)
        return link

    @staticmethod
    def answer(link):
        return json.loads(link.reply().body().decode())

    def close(self):
        for link in self._links:
            link.close()


@pytest.fixture
def line(supernode, origin, blob):
    """A client of a file that the supernode has as a whole."""
    node = supernode()
    url = origin.put("f.bin", blob(4 * MIB))
    made = Line(node, url)
    wait_for(lambda: made.about()["cdnStatus"] == "SUCCESS", 10)
    yield made
    made.close()


def test_the_older_of_two_syncs_brings_the_pieces_and_the_newer_one_waits_in_its_place(line):
    older = line.sync(0)
    newer = line.sync(2)
    assert len(line.answer(older)["pieces"]) == 2
    newest = line.sync(4)
    assert line.answer(newer)["pieces"]
    newest.close()


def test_an_older_sync_ends_at_once_also_when_there_is_nothing(line):
    older = line.sync(0)
    newer = line.sync(0)
    assert line.answer(older)["code"] == 602
    assert line.answer(line.sync(0, 0))["code"] == 602
    assert line.answer(newer)["code"] == 602


def test_a_sync_that_does_not_wait_is_answered_itself_though_an_older_one_waits(line):
    older = line.sync(0)
    assert len(line.answer(line.sync(2, 0)).get("pieces", []) or line.answer(older)["pieces"]) == 2


def test_a_sync_whose_client_has_hung_up_brings_nothing_any_more(line):
    line.sync(0).close()
    newer = line.sync(0)
    assert len(line.answer(line.sync(2, 0)).get("pieces", []) or line.answer(newer)["pieces"]) == 2
