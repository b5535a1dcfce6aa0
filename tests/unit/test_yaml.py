"""As much of YAML as dfdaemon.yml has."""
import pytest

import dfly

GOOD = [
    ("", {}), ("---\n# nothing\n", {}), ("a: b", {"a": "b"}), ("a: true\nb: false\nc: null\nd:\n", {"a": True, "b": False, "c": "", "d": ""}),
    ("url: http://h:1/#x # comment\n", {"url": "http://h:1/#x"}), ("a: 'it''s # no'\nb: \"q\\\"#x\"\n", {"a": "it's # no", "b": 'q"#x'}),
    ("a:\n- b\n- c\nd: e\n", {"a": ["b", "c"], "d": "e"}), ("a:\n    - b\n    - 'c d'\n", {"a": ["b", "c d"]}),
    ("p:\n  - regx: ^x.*$\n    direct: true\n  -\n    regx: y\n", {"p": [{"regx": "^x.*$", "direct": True}, {"regx": "y"}]}),
    ("f: [\"--node\",\"h:1\", '-f',\n   'a&b',  3m0s]\ng: []\n", {"f": ["--node", "h:1", "-f", "a&b", "3m0s"], "g": []}),
    ("m:\n  n:\n    o: p\n  q: r\n", {"m": {"n": {"o": "p"}, "q": "r"}}),
]


@pytest.mark.parametrize("text, data", GOOD)
def test_what_the_configuration_needs_is_read(tmp_path, text, data):
    path = tmp_path / "x.yml"
    path.write_text(text)
    assert dfly.YamlFile(str(path)).data == data


@pytest.mark.parametrize("text", ["- a\n", "a: {b: c}\n", "a: |\n  x\n", "a: b\n   c: d\n", "a\n", "a: [\n", "a: 'x\n", "? a\n: b\n", "a: &x b\n",
                                  "a: b\n- c\n", "a: !!int 5\n", "\xff\xfe".encode("latin-1").decode("latin-1")])
def test_what_is_not_understood_is_refused(tmp_path, text):
    path = tmp_path / "x.yml"
    path.write_text(text)
    with pytest.raises(dfly.BadUsage):
        dfly.YamlFile(str(path))
