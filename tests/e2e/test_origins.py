"""What origins do: chunked, rangeless, gzipped, redirecting, guarded, broken, slow and far."""
import base64
import email.utils
import os
import socket
import time

import pytest
from world import CONTENT, MB, bad, good, md5, wait_for

SIZE = 3 * MB + 7


@pytest.mark.parametrize("pattern", ["p2p", "source"])
@pytest.mark.parametrize("how", [dict(length=False), dict(ranges=False), dict(gzip=True), dict(etag=False, last_modified=False),
                                 dict(etag=False), dict(length=False, ranges=False, etag=False, last_modified=False)],
                         ids=["chunked", "no_ranges", "gzip", "no_version", "date_only", "nothing_at_all"])
def test_every_kind_of_origin_is_read_right(origin, supernode, host, blob, how, pattern):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, **how)
    host().get(url, "-p", pattern, check=data)
    host().get(url, "-p", pattern, check=data)
    assert pattern == "source" or origin.gets("f") == 1, origin.requests("f")


@pytest.mark.parametrize("size", [0, 1, CONTENT, CONTENT + 1])
def test_small_files_of_unknown_length_arrive(origin, supernode, host, blob, size):
    supernode()
    url = origin.put("f", blob(size), length=False)
    host().get(url, check=blob(size))
    host().get(url, check=blob(size))


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_redirects_are_followed(origin, world, supernode, host, blob, pattern):
    supernode()
    data = blob(SIZE)
    other = world.origin()
    there = other.put("there", data)
    origin.put("middle", redirect_to=there)
    url = origin.put("here", redirect_to="/middle")
    host().get(url, "-p", pattern, check=data)


def test_a_redirect_in_a_circle_is_an_error(origin, supernode, host):
    supernode()
    url = origin.put("here", redirect_to="/here")
    bad(host().get(url), 8)
    assert len(origin.log) < 60


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_a_user_and_password_in_the_url_are_shown_to_the_origin(origin, supernode, host, blob, pattern):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, auth="Basic " + base64.b64encode(b"me:p@ss").decode())
    host().get(url.replace("://", "://me:p%40ss@"), "-p", pattern, check=data)


def test_no_credentials_are_kept_on_a_disk_whatever_becomes_of_the_download(origin, supernode, host, blob):
    node, here = supernode(), host()
    url = origin.put("f", blob(MB), auth="Basic bWU6cGEzM3cwcmQ=")
    origin.put("gone", status=404)
    query = "?X-Amz-Credential=AKpa33w0rd&X-Amz-Signature=pa33w0rd&token=pa33w0rd&v=1"
    here.get(url.replace("://", "://me:pa33w0rd@") + query, "--notbs", check=blob(MB))
    here.get(url, "--header", "Authorization: Basic bWU6cGEzM3cwcmQ=", out="second", check=blob(MB))
    bad(here.get(url.replace("://", "://you:pa33w0rd@"), "--notbs", out="third"), 6)
    bad(here.get(origin.base.replace("://", "://me:pa33w0rd@") + "gone" + query, out="fourth"))
    old = node.ask("POST", "/task/metrics", {"taskId": "x", "url": url.replace("://", "://me:pa33w0rd@")})
    assert old.status == 200
    for top in (node.home, here.home):
        for folder, _, names in os.walk(top):
            for name in names:
                if not name.endswith(".sock"):
                    with open(os.path.join(folder, name), "rb") as file:
                        data = file.read()
                    assert b"pa33w0rd" not in data and b"cGEzM3cwcmQ" not in data, (name, data[-2000:])
    assert any("v=1" in line for line in open(os.path.join(node.home, "logs", "app.log"))), "the rest of the URL is still there"


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_a_url_may_have_letters_that_http_cannot_carry(origin, supernode, host, blob, pattern):
    supernode()
    data = blob(SIZE)
    origin.put("a%20%C3%A4", data)
    host().get(origin.base + "a \u00e4", "-p", pattern, check=data)


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "http:///x", "http://a b/"])
@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_a_redirect_to_what_is_no_http_is_an_error_of_the_origin(origin, supernode, host, pattern, to):
    supernode()
    bad(host().get(origin.put("f", redirect_to=to), "-p", pattern), 8)


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_user_headers_reach_the_origin(origin, supernode, host, blob, pattern):
    supernode()
    url = origin.put("f", blob(MB), auth="Bearer abc:def")
    host().get(url, "--header", "Authorization: Bearer abc:def", "--header", "X-Mine:  two words ", "-p", pattern, check=blob(MB))
    served = [r for r in origin.requests("f") if r.status == 200]
    assert served and all(r.headers["x-mine"] == "two words" for r in served)


def test_credentials_do_not_go_along_to_another_host(origin, world, supernode, host, blob):
    supernode()
    other = world.origin(host="localhost")
    there = other.put("there", blob(MB))
    url = origin.put("here", redirect_to=there)
    host().get(url, "--header", "Authorization: Bearer secret", check=blob(MB))
    assert origin.requests("here")[0].headers.get("authorization") == "Bearer secret"
    assert all("authorization" not in r.headers for r in other.log), other.log[0].headers


def test_who_brings_no_credentials_does_not_get_what_others_fetched_with_theirs(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(MB), auth="Bearer abc")
    host().get(url, "--header", "Authorization: Bearer abc", check=blob(MB))
    bad(host().get(url), 6)


def test_who_brings_no_credentials_does_not_lock_out_those_who_do(origin, supernode, host, blob):
    supernode("--fail-access-interval", "1h")
    data = blob(2 * MB)
    url = origin.put("f", data, auth="Bearer good", delay=0.5)
    bad(host().get(url), 6)
    host().get(url, "--header", "Authorization: Bearer good", "--notbs", check=data)
    url = origin.put("g", data, auth="Bearer good", delay=1.0)
    first = host().start(url)
    wait_for(lambda: origin.requests("g"), 10)  # the second one joins while the first is judged
    host().get(url, "--header", "Authorization: Bearer good", "--notbs", check=data)
    bad(first.wait(), 6)


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_missing_credentials_have_a_code_of_their_own(origin, supernode, host, blob, pattern):
    supernode()
    url = origin.put("f", blob(MB), auth="Bearer abc")
    bad(host().get(url, "-p", pattern), 6)


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_an_origin_that_refuses_is_named_with_its_status(origin, supernode, host, blob, status, pattern):
    supernode()
    url = origin.put("f", blob(MB), status=status)
    result = bad(host().get(url, "-p", pattern, "-e", "8"), 8)
    assert str(status) in result.out, result.out
    assert len(origin.log) <= 12, "a refusal was asked again %d times" % len(origin.log)


def test_an_unreachable_origin_is_an_error(supernode, host):
    supernode()
    result = bad(host().get("http://127.0.0.1:9/f", "-e", "8"), 4, 8)
    assert "127.0.0.1:9" in result.out, result.out


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_an_origin_that_cuts_the_connection_is_asked_for_the_rest(origin, supernode, host, blob, pattern):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, cut_after=SIZE // 2, once=True)
    host().get(url, "-p", pattern, check=data)
    assert origin.bytes_sent("f") <= SIZE + CONTENT * 2, origin.requests("f")


def test_an_origin_that_cuts_always_at_one_place_ends_in_an_error(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(SIZE), cut_after=1000, ranges=False)
    bad(host().get(url, "-e", "8"), 4, 8, 11)


def test_a_file_that_changes_between_two_downloads_arrives_new(origin, supernode, host, blob):
    supernode("--task-expire-time", "1s")
    here = host()
    url = origin.put("f", blob(SIZE, 1))
    here.get(url, "-p", "source", check=blob(SIZE, 1))
    origin.put("f", blob(SIZE, 2))
    here.get(url, "-p", "source", check=blob(SIZE, 2))


def test_a_file_that_changes_in_the_middle_is_never_mixed(origin, supernode, host, blob):
    """Half of the old file, then the connection is cut and the origin has another file."""
    supernode()
    url = origin.put("f", blob(SIZE, 1), cut_after=SIZE // 2, once=True, rate=20 * MB)
    command = host().start(url)
    wait_for(lambda: origin.bytes_sent("f") > 100000, 10)
    origin.change("f", data=blob(SIZE, 2))
    result = command.wait()
    assert result.data is None or result.data in (blob(SIZE, 1), blob(SIZE, 2)), "two files mixed\n" + result.out
    assert (result.code == 0) == (result.data is not None)


@pytest.mark.parametrize("pattern", ["p2p", "source"])
def test_https_needs_a_known_certificate(world, origin_tls, supernode, host, blob, pattern):
    supernode()
    data = blob(SIZE)
    url = origin_tls.put("f", data)
    result = bad(host().get(url, "-p", pattern, "-e", "8"), 5)
    assert "certificate" in result.out.lower(), result.out
    host().get(url, "--cacerts", origin_tls.certificate, "-p", pattern, check=data)
    with open(origin_tls.certificate) as ours, open(os.path.join(world.root, "bundle.pem"), "w", encoding="utf-8") as bundle:
        bundle.write("# F\u0151tan\u00fas\u00edtv\u00e1ny, as bundles of CAs say it\n" + ours.read())
    assert host().get(url, "--cacerts", bundle.name, "-p", pattern, check=data).reason == (100 if pattern == "source" else 0)
    host().get(url, "--insecure", "-p", pattern, check=data)


def test_an_insecure_download_does_not_make_others_insecure(origin_tls, supernode, host, blob):
    supernode()
    url = origin_tls.put("f", blob(MB))
    host().get(url, "--insecure", check=blob(MB))
    bad(host().get(origin_tls.put("g", blob(MB)), "-e", "8"), 5)


def test_ipv6_carries_everything_that_ipv4_does(world, host, blob):
    with socket.socket(socket.AF_INET6) as s:
        try:
            s.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
    data = blob(SIZE)
    origin = world.origin(host="::1")
    url = origin.put("f", data)
    node = world.supernode(ip="::1")
    first = host().get(url, node=node.node, ip="::1", check=data)
    second = host().get(url, node=node.node, ip="::1", check=data)
    assert origin.gets("f") == 1 and "reason:0" in first.stdout + second.stdout
    host().get(url, "-p", "source", node=node.node, check=data)


def test_a_user_range_is_a_task_of_its_own(origin, supernode, host, blob):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data)
    host().get(url, "--header", "Range: bytes=100-%d" % (MB + 99), check=data[100:MB + 100])
    host().get(url, check=data)


def test_an_md5_that_the_origin_does_not_match_is_found_even_when_bytes_are_flipped_on_the_way(origin, supernode, host, blob):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, wrong=SIZE // 2)
    bad(host().get(url, "-m", md5(data), "-e", "8"), 9)


# ---- origins that are not well at the moment ---------------------------------------------------------------------------

def two_ways(command):
    """The swarm alone, and the origin alone: an origin must be borne with by both."""
    return pytest.mark.parametrize("way", [("--notbs",), ("-p", "source")], ids=["p2p", "source"])(command)


def gaps_s(origin):
    """The pauses between the requests that the origin saw."""
    times = [r.started for r in origin.log]
    return [later - sooner for sooner, later in zip(times, times[1:])]


@two_ways
@pytest.mark.parametrize("status", [429, 503])
def test_an_origin_that_says_when_it_wants_to_be_asked_again_is_asked_then(origin, supernode, host, blob, status, way):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, status=status, retry_after="2", once=True)
    host().get(url, *way, check=data)
    assert [r.status for r in origin.log] == [status, 200] and gaps_s(origin)[0] >= 2.0, (origin.log, gaps_s(origin))


@two_ways
def test_a_time_of_day_is_understood_as_well(origin, supernode, host, blob, way):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, status=503, retry_after=email.utils.formatdate(time.time() + 4.0, usegmt=True), once=True)
    host().get(url, *way, check=data)
    assert [r.status for r in origin.log] == [503, 200] and gaps_s(origin)[0] >= 1.0, (origin.log, gaps_s(origin))


@two_ways
def test_an_origin_that_asks_for_more_than_anybody_waits_is_given_up_at_once(origin, supernode, host, blob, way):
    supernode()
    url = origin.put("f", blob(SIZE), status=429, retry_after="3600")
    result = bad(host().get(url, *way), 8)
    assert "429" in result.out and len(origin.log) == 1 and result.seconds < 20, origin.log


def test_an_origin_that_wants_to_be_left_alone_for_long_is(origin, supernode, host, blob):
    """The next client is told so by the supernode, though a failure else stands for a moment only."""
    supernode("--fail-access-interval", "100ms")
    url = origin.put("f", blob(SIZE), status=429, retry_after="3600")
    for _ in range(2):
        assert "429" in bad(host().get(url, "--notbs"), 8).out
    assert len(origin.log) == 1, origin.log


@two_ways
def test_the_wish_for_a_pause_is_heard_in_the_middle_too(origin, supernode, host, blob, way):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, cut_after=SIZE // 2, once=True, rate=8 * MB)
    command = host().start(url, *way)
    wait_for(lambda: origin.bytes_sent("f") > 0, 10)
    origin.change("f", status=429, retry_after="2", once=True)
    good(command.wait(), data)
    assert [r.status for r in origin.log] == [200, 429, 206] and gaps_s(origin)[1] >= 2.0, (origin.log, gaps_s(origin))
    assert origin.bytes_sent("f") <= SIZE + CONTENT * 2, origin.log


@two_ways
@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_an_origin_that_fails_once_is_asked_again(origin, supernode, host, blob, status, way):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, status=status, once=True)
    host().get(url, *way, check=data)
    assert [r.status for r in origin.log] == [status, 200], origin.log


@two_ways
def test_a_connection_that_is_reset_is_made_again(origin, supernode, host, blob, way):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, cut_after=SIZE // 2, reset=True, once=True)
    host().get(url, *way, check=data)
    assert len(origin.log) == 2, origin.log


# ---- redirects -------------------------------------------------------------------------------------------------------------

@two_ways
def test_where_a_redirect_leads_is_good_for_one_request(origin, supernode, host, blob, way):
    """As with signed URLs: the rest is asked for where the user said, not where the first redirect led."""
    supernode()
    data = blob(SIZE)
    url = origin.put("here", redirect_to=origin.put("there", data, tickets=True, cut_after=SIZE // 2, once=True))
    host().get(url, *way, check=data)
    assert [(r.name, r.status) for r in origin.log] == [("here", 302), ("there", 200), ("here", 302), ("there", 206)], origin.log


@two_ways
def test_every_kind_of_redirect_is_followed(origin, supernode, host, blob, way):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data)
    for status in (301, 302, 303, 307, 308):
        url = origin.put("from%d" % status, redirect_to=url, redirect_status=status)
    host().get(url, *way, check=data)
    assert [r.status for r in origin.log] == [308, 307, 303, 302, 301, 200], origin.log


# ---- resumes that the origin does not take as they are meant ---------------------------------------------------------------

@two_ways
def test_an_origin_that_refuses_to_begin_in_the_middle_is_asked_for_all(origin, supernode, host, blob, way):
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, cut_after=SIZE // 2, once=True, middle=416)
    host().get(url, *way, check=data)
    assert [r.status for r in origin.log] == [200, 416, 200], origin.log


@pytest.mark.parametrize("how", [dict(data=2), dict(data=2, conditional=False), dict(data=2, conditional=False, etag=False),
                                 dict(tag='"another"'), dict(etag=False, conditional=False), dict(data=2, middle=416), dict(data=2, size=SIZE - MB)],
                         ids=["file", "if_range_ignored", "untagged", "tag", "tag_lost", "refused", "shorter"])
@pytest.mark.parametrize("way", [(), ("--notbs",), ("-p", "source")], ids=["either", "p2p", "source"])
def test_what_may_be_another_file_is_never_put_together_with_the_first(origin, supernode, host, blob, how, way):
    """The connection breaks in the middle, and what names the version is another one when the rest is asked for."""
    supernode()
    url = origin.put("f", blob(SIZE, 1), stall_after=SIZE // 2)
    here = host()
    command = here.start(url, *way)
    wait_for(lambda: origin.bytes_sent("f") >= SIZE // 2, 10)
    how = dict(how)
    new = blob(how.pop("size", SIZE), how.pop("data", 1))
    origin.put("f", new, **how)
    origin.hang_up()
    result = command.wait()
    if result.code and "--notbs" in way:
        bad(result, 8)
    else:
        good(result, new)


@pytest.mark.parametrize("etag", [True, False])
def test_what_a_restarted_supernode_kept_is_not_sent_again_by_an_origin_that_knows_no_conditions(origin, supernode, host, blob, etag):
    node = supernode()
    data = blob(SIZE)
    url = origin.put("f", data, stall_after=SIZE - MB, once=True, conditional=False, etag=etag)
    command = host().start(url)
    wait_for(lambda: node.bytes_sent() >= SIZE - 2 * MB, 20)
    node.kill()
    command.kill()
    before = origin.bytes_sent("f")
    again = supernode(home=node.home)
    host().get(url, "--notbs", node=again.node, check=data)
    ranged = [r for r in origin.requests("f") if r.range]
    assert before and len(ranged) == 1 and ranged[0].bytes_sent <= 2 * MB, origin.log


# ---- lengths that are not true -----------------------------------------------------------------------------------------------

@two_ways
def test_a_length_that_is_too_long_is_an_error(origin, supernode, host, blob, way):
    supernode()
    url = origin.put("f", blob(SIZE), declared=SIZE + 1000, cut_after=SIZE)
    bad(host().get(url, *way), 8)
    assert len(origin.log) <= 6, origin.log


@two_ways
def test_of_a_file_whose_length_is_too_short_nobody_takes_more_than_was_said(origin, supernode, host, blob, way):
    """All that HTTP lets a client see; a digest tells."""
    supernode()
    data = blob(SIZE)
    url = origin.put("f", data, declared=SIZE - 1000)
    host().get(url, *way, check=data[:-1000])
    bad(host().get(url, "-m", md5(data), *way))
