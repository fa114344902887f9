import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.packing_texts import DocumentHash, Packer, Piece, split_sentences
from data_tools.records import BadRow
from data_tools.tokenizers import load_tokenizer
from tests.data_tools.text_sources import ENGLISH, small_tokenizer


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(small_tokenizer(tmp_path_factory.mktemp(request.param), request.param))


DOCUMENTS = [ENGLISH[:3], ENGLISH[3:4], ENGLISH[4:]]


def pieces(documents=DOCUMENTS):
    return [
        Piece(f"f: row {n}-{k}", f"{n}-{k}", text, k == 0)
        for n, texts in enumerate(documents)
        for k, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("Mr. Smith met Dr. J. Brown. They spoke.", ["Mr. Smith met Dr. J. Brown.", "They spoke."]),
        ("It cost $3.50 in the U.S. Army shop. Fine.", ["It cost $3.50 in the U.S. Army shop.", "Fine."]),
        ("see e.g. Anna. and so on.", ["see e.g. Anna. and so on."]),
        ("a line\nanother  \t line\n\n", ["a line", "another line"]),
        ("Wait... What?! Yes.", ["Wait...", "What?!", "Yes."]),
        ("今天很好。明天呢\uff1f好", ["今天很好。", "明天呢\uff1f", "好"]),
        ("Ende. Über uns.", ["Ende.", "Über uns."]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_splitting_loses_nothing_but_blanks(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("packing", ["sentence", "document", "none"])
@pytest.mark.parametrize("limit", [8, 20, 40, 510])
def test_rows_never_have_more_word_pieces_and_lose_no_words(tokenizer, packing, limit):
    rows = list(Packer(tokenizer, packing, limit).pack(pieces()))
    assert max(len(row.input_ids) for row in rows) <= limit
    words = " ".join(row.text for row in rows).split()
    if limit >= 20:
        assert words == " ".join(ENGLISH).split()
    assert "".join(words) == "".join("".join(ENGLISH).split())
    assert len({row.id for row in rows}) == len(rows)


@pytest.mark.parametrize("packing", ["document", "none"])
def test_ids_are_those_of_the_rows_text(tokenizer, packing):
    for row in Packer(tokenizer, packing, 60).pack(pieces()):
        assert row.input_ids == tokenizer.encode(row.text)


def test_documents_do_not_share_rows_unless_asked_for(tokenizer):
    rows = list(Packer(tokenizer, "document", 510).pack(pieces()))
    assert [row.text for row in rows] == [" ".join(texts) for texts in DOCUMENTS]
    assert [row.id for row in rows] == ["0-0", "1-0", "2-0"]
    rows = list(Packer(tokenizer, "none", 510).pack(pieces()))
    assert [row.text for row in rows] == ENGLISH


def test_rows_across_documents_have_separators_between_them(tokenizer):
    (row,) = Packer(tokenizer, "sentence", 510).pack(pieces())
    expected = []
    for texts in DOCUMENTS:
        expected += [tokenizer.vocabulary.sep] * bool(expected) + tokenizer.encode(" ".join(texts))
    assert row.input_ids == expected
    assert row.text == "\n".join(" ".join(texts) for texts in DOCUMENTS)


def test_rows_are_filled_greedily(tokenizer):
    rows = list(Packer(tokenizer, "sentence", 60).pack(pieces([ENGLISH * 5])))
    for row, following in itertools.pairwise(rows):
        first = split_sentences(following.text)[0]
        assert len(row.input_ids) + len(tokenizer.encode_many([first], following=True)[0]) > 60


def test_a_word_longer_than_a_row_is_cut(tokenizer):
    rows = list(Packer(tokenizer, "sentence", 8).pack(pieces([["ab" * 99 + " x"]])))
    assert "".join(row.text for row in rows).replace(" ", "") == "ab" * 99 + "x"
    assert max(len(row.input_ids) for row in rows) <= 8


def test_bad_rows_go_through(tokenizer):
    bad = BadRow("f: row 9", "text", "is bad")
    rows = list(Packer(tokenizer, "sentence", 510).pack([*pieces()[:3], bad, *pieces()[3:]]))
    assert bad in rows
    assert len(rows) == 2


def hashed(*texts):
    state = DocumentHash()
    for text in texts:
        state.add(text)
    return state.digest()


def test_documents_are_equal_but_for_case_blanks_and_composition():
    assert hashed("A dog\nruns.") == hashed("a  DOG", " runs. ")
    assert hashed("caf\u00e9") == hashed("cafe\u0301")
    assert len({hashed("a dog"), hashed("ad og"), hashed("a dog."), hashed("")}) == 4
