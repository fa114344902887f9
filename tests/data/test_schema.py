"""meta.json models: what they take, and that each mistake is named."""

from __future__ import annotations

import hashlib

import pytest
from pydantic import ValidationError

from tests.helpers import make_vocabulary
from vlscale.data.index import Column, read_meta
from vlscale.data.schema import (
    ClassesMeta,
    ImagesMeta,
    TextsMeta,
    Vocabulary,
    class_columns,
    image_columns,
    text_columns,
)
from vlscale.errors import VlscaleError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_special_ids_and_the_random_range_are_found_by_name() -> None:
    vocabulary = Vocabulary.from_tokens(["a", *SPECIAL, "b", "c"])
    assert (vocabulary.pad, vocabulary.unk, vocabulary.cls, vocabulary.sep, vocabulary.mask) == (1, 2, 3, 4, 5)
    assert vocabulary.random_range == (6, 8)
    assert vocabulary.size == 8
    assert Vocabulary.from_tokens(["a", *SPECIAL, "b"], random_range=(0, 7)).random_range == (0, 7)


def test_the_fingerprint_follows_the_tokens_or_is_given() -> None:
    first, second = (Vocabulary.from_tokens([*SPECIAL, *words]) for words in (["ab", "c"], ["a", "bc"]))
    assert first.fingerprint != second.fingerprint
    given = hashlib.sha256(b"tokenizer.json").hexdigest()
    assert Vocabulary.from_tokens([*SPECIAL, "a"], fingerprint=given).fingerprint == given


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        (["[PAD]", "a", "b"], {}, r"special tokens \['\[UNK\]', '\[CLS\]', '\[SEP\]', '\[MASK\]'\] are missing"),
        ([*SPECIAL, "a", "a"], {}, "a token stands twice"),
        (SPECIAL, {}, "size"),
        ([*SPECIAL, "a"], {"random_range": (6, 6)}, r"random_range \(6, 6\) is not an interval"),
        ([*SPECIAL, "a"], {"random_range": (0, 7)}, r"random_range \(0, 7\) is not an interval inside 0..6"),
        ([*SPECIAL, "a"], {"fingerprint": "abc"}, "fingerprint"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tokens, arguments, message) -> None:
    with pytest.raises(VlscaleError, match=message):
        Vocabulary.from_tokens(tokens, **arguments)


def test_a_vocabulary_is_frozen_and_strict() -> None:
    vocabulary = make_vocabulary()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(vocabulary, "size", 3)  # noqa: B010
    values = vocabulary.model_dump()
    for change in ({"size": 63}, {"mask": values["pad"]}, {"sep": 64}, {"cls": -1}, {"pad": "0"}, {"more": 1}):
        with pytest.raises(ValidationError):
            Vocabulary(**{**values, **change})


def test_meta_reads_back_what_was_written(tmp_path) -> None:
    path = tmp_path / "meta.json"
    for meta in (
        ImagesMeta(feature_dim=2048, feature_dtype="float16", source="detector"),
        TextsMeta(vocabulary=make_vocabulary()),
        ClassesMeta(num_classes=2, dtype="float32", class_names=["a", "b"]),
    ):
        path.write_text(meta.model_dump_json())
        assert read_meta(type(meta), path) == meta


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b"[]", "object"),
        (b'{"kind": "texts", "version": 1, "feature_dim": 4, "feature_dtype": "float16"}', "kind"),
        (b'{"kind": "images", "version": 2, "feature_dim": 4, "feature_dtype": "float16"}', "version"),
        (b'{"kind": "images", "version": 1, "feature_dim": 0, "feature_dtype": "float16"}', "feature_dim"),
        (b'{"kind": "images", "version": 1, "feature_dim": 1e99, "feature_dtype": "float16"}', "feature_dim"),
        (b'{"kind": "images", "version": 1, "feature_dim": 4, "feature_dtype": "object"}', "feature_dtype"),
        (b'{"kind": "images", "version": 1, "feature_dim": 4, "feature_dtype": "float16", "x": 1}', "x"),
    ],
)
def test_bad_meta_is_one_line_that_names_file_and_key(tmp_path, content, message) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(VlscaleError, match=message) as caught:
        read_meta(ImagesMeta, path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_class_names_must_be_as_many_as_classes() -> None:
    with pytest.raises(ValidationError, match="num_classes is 3, but there are 2 class_names"):
        ClassesMeta(num_classes=3, dtype="float16", class_names=["a", "b"])


def test_every_column_of_the_schema_has_an_encoding_that_the_reader_knows() -> None:
    stores = (
        image_columns(ImagesMeta(feature_dim=4, feature_dtype="float16")),
        text_columns(TextsMeta(vocabulary=make_vocabulary())),
        class_columns(ClassesMeta(num_classes=5, dtype="float32")),
    )
    sizes = {name: Column.parse(name, encoding).size for columns in stores for name, encoding in columns.items()}
    assert {name: size for name, size in sizes.items() if size is not None} == {"width": 8, "height": 8, "probs": 20}
