"""The old conversation, against a supernode that answers from a script."""
import json
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import dfly  # noqa: E402


class Fetchers:
    """Those of a client to which nothing more comes."""

    outcomes = ()

    def wait(self, limit_s):
        """Return at once."""


class Node:
    """A supernode 1.0.6 that has handed out two pieces, and has nothing more until both are reported."""

    def __init__(self):
        self.reported = []

    def ask(self, _host, _port, _method, target):
        if target.startswith("/peer/task?"):
            self.reported.append(dict(pair.split("=") for pair in target.partition("?")[2].split("&"))["range"])
        both = {"0-4", "5-9"} <= set(self.reported)
        return 200, json.dumps({"code": dfly.FINISH, "data": {"md5": ""}} if both else {"code": dfly.WAIT, "msg": "peer should wait"}).encode()

    def close(self):
        """Nothing to hang up."""


class Store:
    """A whole file."""

    complete, layout = True, dfly.Layout(10, 10)


def test_of_two_pieces_that_end_at_once_both_are_reported():
    registration = dfly.Registration(dfly.Node("127.0.0.1", 1), "t" * 64, 10, 10, False, "", None, False)
    line = dfly.PullLine(registration, "cid", Fetchers(), Store())
    line.close()
    line._pool, line._owed = Node(), []
    orders = [dfly.Order(num, "cdnnode:x", "127.0.0.1", 1, "/p", "", text) for num, text in ((0, "0-4"), (1, "5-9"))]
    line.step([dfly.Outcome(order, 0.1, 5, None) for order in orders], 0.0)
    for _ in range(3):
        if not line.finished:
            line.step([], 0.0)
    assert line.finished and line._pool.reported == ["0-4", "5-9"]


@pytest.mark.parametrize("text, right", [("0-9", True), ("5-4", True), ("9-3", False), ("20-29", False)])
def test_a_range_that_ends_before_it_begins_is_no_order(text, right):
    """Its bytes would be written over those of other pieces."""
    registration = dfly.Registration(dfly.Node("127.0.0.1", 1), "t" * 64, 10, 10, True, "", None, False)
    line = dfly.PullLine(registration, "cid", Fetchers(), Store())
    piece = {"pieceNum": 0, "range": text, "path": "http://127.0.0.1:1/f", "cid": "x", "peerIp": "127.0.0.1", "peerPort": 1, "pieceMd5": ""}
    try:
        assert line._order(piece).plain and right
    except ValueError:
        assert not right
    line.close()
