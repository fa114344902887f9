"""WordPiece: trained small and deterministic, or read from a Hugging Face folder."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from data_tools.demo_tokenizer import load_wordpieces, train_wordpieces
from vlscale.errors import VlscaleError

TEXTS = ["a cat to the left of a dog", "there is an apple, a pear and a dog", "a photo of a cat"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_training_keeps_whole_words_in_alphabetical_order() -> None:
    pieces = train_wordpieces(TEXTS)
    words = sorted({word for text in TEXTS for word in text.replace(",", " ,").split()})
    assert list(pieces.vocabulary.tokens) == SPECIAL + words
    assert pieces.vocabulary.random_range == (5, 5 + len(words))
    assert train_wordpieces(reversed(TEXTS)).json == pieces.json


def test_encoding_has_no_special_tokens_and_keeps_offsets() -> None:
    pieces = train_wordpieces(TEXTS)
    ((ids, offsets),) = pieces.encode(["A cat, a zebra"])
    assert [pieces.vocabulary.tokens[i] for i in ids] == ["a", "cat", ",", "a", "[UNK]"]
    assert offsets == [(0, 1), (2, 5), (5, 6), (7, 8), (9, 14)]


def test_the_saved_json_is_the_same_tokenizer(tmp_path) -> None:
    pieces = train_wordpieces(TEXTS)
    (tmp_path / "tokenizer.json").write_text(pieces.json, encoding="utf-8")
    again = load_wordpieces(tmp_path)
    assert again.vocabulary == pieces.vocabulary
    assert again.encode(TEXTS) == pieces.encode(TEXTS)
    assert Tokenizer.from_str(pieces.json).encode("a [MASK] dog").tokens == ["a", "[MASK]", "dog"]


def bert(tmp_path, words: list[str]):
    # The layout of bert-base-cased: padding, unused slots, special tokens, then real pieces.
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(1, 9)), *SPECIAL[1:], "[unused100]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return tokens


def test_vocab_txt_of_a_cased_model(tmp_path) -> None:
    tokens = bert(tmp_path, ["A", "a", "cat", "do", "##g", "Dog"])
    pieces = load_wordpieces(tmp_path)
    assert pieces.vocabulary.tokens == tuple(tokens)
    assert pieces.vocabulary.random_range == (14, 20)
    assert load_wordpieces(tmp_path / "vocab.txt").vocabulary == pieces.vocabulary
    (lower, capital) = pieces.encode(["a dog", "A Dog"])
    assert [tokens[i] for i in lower[0]] == ["a", "do", "##g"]
    assert [tokens[i] for i in capital[0]] == ["A", "Dog"]


def test_lower_casing_follows_the_configuration_or_the_words(tmp_path) -> None:
    tokens = bert(tmp_path, ["a", "cat"])
    assert [tokens[i] for i in load_wordpieces(tmp_path).encode(["A Cat"])[0][0]] == ["a", "cat"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert [tokens[i] for i in load_wordpieces(tmp_path).encode(["A cat"])[0][0]] == ["[UNK]", "cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[PAD]\n[UNK]\na\n", r"no \[CLS\], \[SEP\], \[MASK\]"),
        ("vocab.txt", "\n".join([*SPECIAL, "a", "a"]), "two lines"),
        ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
        ("vocab.txt", "\udc80", "cannot be read as a tokenizer"),
        ("readme.md", "", "neither tokenizer.json nor vocab.txt"),
    ],
)
def test_bad_vocabularies_are_one_clear_error(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(VlscaleError, match=message):
        load_wordpieces(tmp_path)
