"""How long an origin's answer may be used without a question."""
import email.message
import email.utils
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import dfly  # noqa: E402

NOW = 1700000000.0


def date(seconds):
    return email.utils.formatdate(NOW + seconds, usegmt=True)


@pytest.mark.parametrize("headers, lifetime, explicit", [
    ([], 10, False),
    ([("Last-Modified", date(-86400))], 180, False),
    ([("Last-Modified", date(-1000))], 100, False),
    ([("Last-Modified", date(+1000))], 10, False),
    ([("Last-Modified", "yesterday")], 10, False),
    ([("Cache-Control", "max-age=60")], 60, True),
    ([("Cache-Control", 'public, MAX-AGE="60"')], 60, True),
    ([("Cache-Control", "max-age=60"), ("Age", "50")], 10, True),
    ([("Cache-Control", "max-age=60"), ("Age", "500")], 0, True),
    ([("Cache-Control", "max-age=60"), ("Age", "x")], 60, True),
    ([("Cache-Control", "max-age=60, s-maxage=5")], 5, True),
    ([("Cache-Control", "max-age=60"), ("Cache-Control", "no-cache")], 0, True),
    ([("Cache-Control", "no-store")], 0, True),
    ([("Cache-Control", "max-age=soon")], 0, True),
    ([("Cache-Control", "max-age=-1")], 0, True),
    ([("Expires", date(90))], 90, True),
    ([("Expires", date(90)), ("Date", date(30))], 60, True),
    ([("Expires", "0")], 0, True),
    ([("Expires", date(90)), ("Cache-Control", "max-age=7")], 7, True),
])
def test_lifetimes(headers, lifetime, explicit):
    message = email.message.Message()
    for name, value in headers:
        message[name] = value
    caching = dfly.Caching.of(message, NOW)
    assert (round(caching.lifetime), caching.explicit) == (lifetime, explicit)


@pytest.mark.parametrize("value, keep, must", [("", True, False), ("no-store", False, False), ("no-cache", True, True), ("max-age=5, must-revalidate", True, True),
                                               ("s-maxage=5", True, True), ("proxy-revalidate", True, True), ("max-age=5", True, False)])
def test_what_may_be_kept_and_what_must_be_asked(value, keep, must):
    message = email.message.Message()
    message["Cache-Control"] = value
    caching = dfly.Caching.of(message, NOW)
    assert (caching.keep, caching.must) == (keep, must)
