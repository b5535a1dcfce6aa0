"""Section 16: the conversation of `get` with a supernode, on a clock of the test's."""
import collections
import os
import select
import sys
import types

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402

WAIT, NEWS, HELD = {"code": 602, "msg": "later"}, {"code": 602, "msg": "later", "eager": True}, 15.0


class Supernode:
    """Answers each sync with the next of its script, at once or, where that is a number, after so many seconds without news."""

    ROUTES = (dfly.Route("POST", "/peer/sync", "sync"),)

    def __init__(self, script):
        self.now, self.asked_at, self._script = 0.0, [], list(script)

    def sync(self, _request):
        self.asked_at.append(self.now)
        answer = self._script.pop(0)
        if not isinstance(answer, dict):
            self.now += answer
            answer = WAIT
        return dfly.Response.of_json(answer)


class Idle:
    """Fetchers with nothing to fetch; their waiting is what time there is."""

    def __init__(self, node):
        self.left, self.endings, self._node = 0, collections.deque(), node

    def drain(self):
        return []

    def wait(self, seconds, others):
        if others:
            return select.select(others, [], [], 20)[0]
        self._node.now += seconds
        return []


def gaps(*script):
    """Return the seconds between the syncs that a client sends to a supernode with this script."""
    node = Supernode(script)
    server = dfly.Server(dfly.listen("127.0.0.1", 0), Supernode.ROUTES, node, dfly.Log(), "test")
    server.start()
    store = types.SimpleNamespace(have=0, layout=dfly.Layout(10000, 1000), complete=False)
    registration = dfly.Registration(dfly.Node("127.0.0.1", server.address[1]), "t", 10000, 1000, True, "v", None, False)
    line = dfly.SyncLine(registration, "c", Idle(node), store, lambda: node.now)
    while len(node.asked_at) < len(script):
        line.step([], 0.5)
    line.close()
    server.stop()
    return pytest.approx([then - before for before, then in zip(node.asked_at, node.asked_at[1:])])


def test_who_does_not_hold_a_sync_is_not_asked_again_at_once():
    assert [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0] == gaps(*[WAIT] * 8)


def test_an_answer_that_was_held_is_followed_by_a_sync_at_once():
    assert [HELD, HELD, 0.05, 0.1, HELD, 0.05] == gaps(HELD, HELD, WAIT, WAIT, HELD, WAIT, WAIT)


def test_an_answer_with_news_is_followed_by_a_sync_at_once():
    assert [0.05, 0.1, 0.0, 0.05, 0.1] == gaps(WAIT, WAIT, NEWS, WAIT, NEWS, WAIT)
