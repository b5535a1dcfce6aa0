"""How long the supernode gives away what it has without asking its origin, and what it does with the answer."""
import os
import time

import pytest
from world import MB, bad, wait_for

SIZE = 2 * MB


def said(*words):
    return (("Cache-Control", ", ".join(words)),)


def questions(origin, name="f"):
    """Return how the origin was asked for a file, and what it answered."""
    return [(r.method, r.status) for r in origin.log if r.name == name]


def later(seconds=1.1):
    """Let the second pass in which all who ask are one question."""
    time.sleep(seconds)


def test_a_fresh_file_is_not_asked_for_again_also_after_a_restart(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f", blob(SIZE), headers=said("max-age=3600"))
    host().get(url, check=blob(SIZE))
    later()
    host().get(url, check=blob(SIZE))
    node.kill()
    supernode(home=node.home)
    host().get(url, "--notbs", check=blob(SIZE))
    assert questions(origin) == [("GET", 200)]


@pytest.mark.parametrize("head, question", [(True, ("HEAD", 304)), (False, ("GET", 304))])
def test_a_stale_file_is_asked_for_and_given_on_while_it_is_the_same(origin, supernode, host, blob, head, question):
    supernode()
    url = origin.put("f", blob(SIZE), headers=said("no-cache"), head=head)
    host().get(url, check=blob(SIZE))
    for count in (1, 2):
        later()
        host().get(url, "--notbs", check=blob(SIZE))
        asked = [pair for pair in questions(origin) if pair != ("HEAD", 405)]
        assert asked == [("GET", 200)] + [question] * count


def test_an_origin_whose_head_says_nothing_is_asked_by_a_conditional_get(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(SIZE), headers=said("no-cache"), bare_head=True)
    host().get(url, check=blob(SIZE))
    later()
    host().get(url, "--notbs", check=blob(SIZE))
    assert questions(origin) == [("GET", 200), ("HEAD", 200), ("GET", 304)]


def test_many_who_ask_at_once_are_one_question(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(SIZE), headers=said("max-age=0"))
    host().get(url, check=blob(SIZE))
    later()
    origin.change("f", delay=0.5)
    commands = [host().start(url, "--notbs") for _ in range(6)]
    for command in commands:
        assert command.wait().data == blob(SIZE)
    assert len(questions(origin)) < 6 and origin.gets("f") == 1, questions(origin)


def test_a_changed_file_is_fetched_anew_and_the_old_one_given_to_nobody(origin, supernode, host, blob):
    supernode()
    url = origin.put("f", blob(SIZE, 1), headers=said("max-age=1"))
    first = host()
    first.get(url, check=blob(SIZE, 1))
    origin.change("f", data=blob(SIZE, 2))
    later(2.1)
    host().get(url, "--notbs", check=blob(SIZE, 2))
    first.get(url, "--notbs", check=blob(SIZE, 2))
    assert origin.gets("f") == 2


def test_a_file_that_is_gone_fails_with_its_own_code_and_is_not_asked_for_all_the_time(origin, supernode, host, blob):
    supernode("--fail-access-interval", "60s")
    url = origin.put("f", blob(SIZE), headers=said("no-cache"))
    host().get(url, check=blob(SIZE))
    origin.change("f", status=404)
    later()
    result = host().get(url, "--notbs")
    bad(result)
    assert "404" in result.out
    count = len(questions(origin))
    for _ in range(3):
        bad(host().get(url, "--notbs"))
    assert len(questions(origin)) == count


@pytest.mark.parametrize("words, served", [(["max-age=1"], True), (["max-age=1", "must-revalidate"], False)])
def test_an_origin_that_is_away(world, supernode, host, blob, words, served):
    supernode()
    away = world.origin("127.0.0.1")
    url = away.put("f", blob(SIZE), headers=said(*words))
    host().get(url, check=blob(SIZE))
    away.close()
    later(2.1)
    result = host().get(url, "--notbs")
    assert (result.code == 0) == served and (not served or result.data == blob(SIZE)), result.out


def test_what_must_not_be_stored_leaves_the_disk_with_its_last_use(origin, supernode, host, blob):
    node = supernode("--task-expire-time", "1s")
    url = origin.put("f", blob(SIZE), headers=said("no-store"))
    here = host()
    here.get(url, "-p", "cdn", check=blob(SIZE))
    folder = os.path.join(node.home, "repo", "download")
    wait_for(lambda: not [name for _, _, names in os.walk(folder) for name in names], 20)
    here.get(url, "-p", "cdn", check=blob(SIZE))
    assert origin.gets("f") == 2


def test_what_took_credentials_is_asked_for_after_a_restart_however_fresh(origin, supernode, host, blob):
    node = supernode()
    url = origin.put("f", blob(SIZE), headers=said("max-age=3600"), auth="Basic dTpw")
    host().get(url, "--header", "Authorization: Basic dTpw", check=blob(SIZE))
    node.kill()
    supernode(home=node.home)
    bad(host().get(url, "--notbs"))
    host().get(url, "--notbs", "--header", "Authorization: Basic dTpw", check=blob(SIZE))
    assert origin.gets("f") == len([r for r in origin.requests("f") if r.status == 401]) + 1


def test_what_has_a_digest_is_never_asked_for_again(origin, supernode, host, blob):
    import hashlib
    supernode()
    url = origin.put("f", blob(SIZE), headers=said("no-cache"))
    for _ in range(2):
        host().get(url, "-m", hashlib.md5(blob(SIZE)).hexdigest(), check=blob(SIZE))
        later()
    assert questions(origin) == [("GET", 200)]
