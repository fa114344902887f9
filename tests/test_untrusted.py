"""Names and JSON of strangers, where the tests of the formats that hold them do not reach."""

from __future__ import annotations

import json

import pytest

from tests.convert.hostile import refused
from vlscale.untrusted import is_file_name, shown, strict_json, unique_keys


@pytest.mark.parametrize("name", ["a", "word_embedding", "@LR@", "a b", "é", "a" * 255])
def test_file_names(name):
    assert is_file_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "/a", "a\\b", "c:a", "a\0", "a\n", "é" * 128, "a" * 256])
def test_no_file_names(name):
    assert not is_file_name(name)


def test_shown_is_one_short_line():
    assert shown("a\n\x1b\ud800é") == r"'a\n\x1b\ud800\xe9'"
    assert len(shown("\x00" * 5000)) < 500
    assert shown(b"\xff\0") == r"'\xff\x00'"


def test_json_is_counted_while_it_is_parsed():
    assert strict_json("x", b'{"a": {"b": [1, 2]}}', 2) == {"a": {"b": [1, 2]}}
    with refused("more than 1 objects"):
        strict_json("x", b'{"a": {"b": [1, 2]}}', 1)
    for text in (b'{"a": Infinity}', b'{"a": -Infinity}', b"[NaN]"):
        with refused("which is no JSON"):
            strict_json("x", text, 9)


def test_a_key_that_stands_twice_is_refused_at_any_depth():
    text = '{"a": 1, "b": [{"c": 1, "c": 1}]}'
    with refused("x: key 'c' stands twice"):
        strict_json("x", text.encode(), 9)
    with refused("key 'c' stands twice"):
        json.loads(text, object_pairs_hook=unique_keys)
    once = '{"a": 1, "b": [{"c": 1}, {"c": 2}]}'
    assert strict_json("x", once.encode(), 9) == json.loads(once, object_pairs_hook=unique_keys) == json.loads(once)
