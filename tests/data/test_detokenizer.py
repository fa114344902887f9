"""From ids back to text, against the libraries that made the ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders

from data_tools.tokenizers import load_tokenizer
from data_tools.train_tokenizer import train_bpe, train_sentencepiece, train_wordpiece
from vlscale.data.dataset import open_dataset
from vlscale.data.detokenizer import Detokenizer
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError

TEXTS = [
    "a brown dog runs over the green grass, and a child looks on.",
    "two dogs run; three children are running after them!",
    "the café near the river has naïve paintings and 12 chairs",
    "a dog, a cat and a horse stand on the grass beside the river",
] * 3
FOREIGN = ["снег лежит на крыше дома", "собака бежит по снегу", "дом стоит за рекой и снег идёт"] * 6


def _load(folder, name: str, content: str | bytes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return load_tokenizer(folder)


def test_byte_level_bpe_comes_back_exactly(tmp_path):
    tokenizer = _load(tmp_path, "tokenizer.json", train_bpe(TEXTS, 330))
    back = Detokenizer(tokenizer.vocabulary)
    library = Tokenizer.from_str(tokenizer.to_json())
    assert back.kind == "bytes"
    for text in [*TEXTS, "emoji \U0001f600 and \u4e2d\u6587", "  many   blanks\n\there "]:
        ids = tokenizer.encode(text)
        assert back.text(ids) == " ".join(text.split()) == " ".join(library.decode(ids).split())
    broken = tokenizer.encode("\u4e2d")[:-1]  # a character whose last byte is missing
    assert back.text(broken) == library.decode(broken) == "\ufffd"


def test_wordpiece_comes_back_but_for_blanks_beside_punctuation(tmp_path):
    tokenizer = _load(tmp_path, "tokenizer.json", train_wordpiece(TEXTS, 160))
    back = Detokenizer(tokenizer.vocabulary)
    library = Tokenizer.from_str(tokenizer.to_json())
    library.decoder = decoders.WordPiece(cleanup=False)
    assert back.kind == "wordpiece"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert back.text(ids) == library.decode(ids)
    assert back.text(tokenizer.encode("a dog, a cat")) == "a dog , a cat"


def test_sentencepiece_of_another_language_comes_back(tmp_path):
    tokenizer = _load(tmp_path, "tokenizer.model", train_sentencepiece(FOREIGN, 30))
    back = Detokenizer(tokenizer.vocabulary)
    assert back.kind == "sentencepiece"
    for text in FOREIGN:
        assert back.text(tokenizer.encode(text)) == text


def _vocabulary(*pieces: str) -> Vocabulary:
    return Vocabulary.from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])


def test_whole_words_without_marks_are_set_apart():
    """A vocabulary that cuts no word has no mark at all, as that of the committed fixture."""
    dataset = open_dataset("demo", Path(__file__).parents[1] / "fixtures/demo/val")
    back = Detokenizer(dataset.texts.meta.vocabulary)
    assert back.kind == "wordpiece"
    assert back.word_starts().sum() == len(back.vocabulary.tokens) - 5
    row = dataset.texts.row(0)
    assert " " in row["text"]
    assert back.text(row["input_ids"]) == row["text"].lower().replace(",", " ,")


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_tensors_and_arrays_are_read_as_lists_are(kind):
    back = Detokenizer(_vocabulary("dog", "##s"))
    rows = [[2, 5, 6, 3], [2, 5, 3, 0]]
    assert back.texts(kind(rows)) == back.texts(rows) == ["dogs", "dog"]
    assert back.text(kind(rows[1]), keep=kind([3])) == back.text(rows[1], keep=[3]) == "dog [SEP]"
    with pytest.raises(VlscaleError, match="is no id; give a row of whole numbers"):
        back.text(kind([5.5]))
    with pytest.raises(VlscaleError, match="is no id; give a row of whole numbers") as raised:
        back.text(kind(rows))
    assert "\n" not in str(raised.value)


def test_chinese_is_written_without_blanks():
    back = Detokenizer(_vocabulary("\u4e2d", "##\u6587", "\u5c0f", "abc", "##d", "\uff0c"), "wordpiece")
    assert back.text([2, 5, 6, 10, 7, 8, 9, 8, 3]) == "\u4e2d\u6587\uff0c\u5c0fabcd abc"


def test_bytes_of_sentencepiece_join_to_characters():
    back = Detokenizer(_vocabulary("\u2581a", "<0xE4>", "<0xB8>", "<0xAD>", "\u2581b"))
    assert back.text([5, 6, 7, 8, 9]) == "a\u4e2d b"


def test_special_tokens_are_left_out_unless_they_are_to_be_kept():
    back = Detokenizer(_vocabulary("dog", "##s"))
    assert back.text([2, 5, 6, 4, 3, 0]) == "dogs"
    assert back.text([2, 5, 4, 3], keep=[4]) == "dog [MASK]"
    assert back.texts([[5], [5, 6], []]) == ["dog", "dogs", ""]


@pytest.mark.parametrize(
    ("pieces", "starts"),
    [
        (("\u0120dog", "s", "\u0120"), [True, False, True]),
        (("dog", "##s", "cat"), [True, False, True]),
        (("\u2581dog", "s", "\u2581"), [True, False, True]),
    ],
)
def test_which_pieces_begin_a_word(pieces, starts):
    found = Detokenizer(_vocabulary(*pieces)).word_starts()
    assert found.dtype == np.bool_
    assert found.tolist() == [False] * 5 + starts


def test_ids_of_another_vocabulary_and_unknown_kinds_are_errors():
    back = Detokenizer(_vocabulary("dog"))
    for index in (-1, 6):
        with pytest.raises(VlscaleError, match=f"id {index} is outside the vocabulary of 6"):
            back.text([index])
    with pytest.raises(VlscaleError, match="'unigram' is unknown"):
        Detokenizer(_vocabulary("dog"), "unigram")
