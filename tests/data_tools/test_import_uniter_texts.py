"""UNITER's text databases, as the facts sheet describes them."""

import json
from functools import partial

import pytest

from data_tools.formats import uniter_texts
from data_tools.import_images import run as run_images
from data_tools.parts import Run
from data_tools.records import BadRow
from data_tools.texts import import_texts
from tests.data_tools.toy_sources import ToyTokenizer
from tests.data_tools.uniter_files import (
    arrays_of,
    as_msgpack,
    lz4_frame,
    msgpack,
    write_images,
    write_lmdb,
    write_texts,
)
from vlscale.data.schema import Vocabulary
from vlscale.data.store import TextStore
from vlscale.errors import VlscaleError

TASKS = {
    "pretrain": {"input_ids": [5, 6], "img_fname": "a.npz"},
    "vqa": {"input_ids": [7], "img_fname": "b.npz", "question": "what is it?", "answers": {"yes": 1.0},
            "target": {"labels": [3, 8], "scores": [1.0, 0.3]}},
    "ve": {"input_ids": [7, 8], "img_fname": "c.npz", "target": {"labels": [1], "scores": [1.0]}},
    "nlvr2": {"input_ids": [9], "img_fname": ["a.npz", "b.npz"], "sentence": "two dogs", "target": 1},
    "vcr": {"input_ids": [5], "input_ids_as": [[5], [6], [7], [8]], "input_ids_rs": [[9], [9], [8], [7]],
            "qa_target": 2, "qar_target": -1, "img_fname": ["b.npz", "c.npz"]},
    "re": {"sent_id": 4, "sent": "the left one", "ref_id": 1, "ann_id": 77, "image_id": 12, "bbox": [1.5, 2.0, 30, 40],
           "input_ids": [6, 7, 8], "img_fname": "c.npz"},
}  # fmt: skip


def images_for_texts(root):
    values = {name: as_msgpack(arrays_of(1, 2)) for name in ("a.npz", "b.npz", "c.npz")}
    write_images(root / "db/all", values)
    run_images(["uniter_images", str(root / "db"), "--out", str(root / "out")])


def run_texts(root, source, **more):
    return import_texts(partial(uniter_texts.UniterTexts, source.folders), ToyTokenizer, {"format": "uniter_texts"},
                        Run(root / "out"), **more)  # fmt: skip


@pytest.mark.parametrize("key", ["bert", "toker", "tokenizer"])
def test_text_databases_of_all_tasks_round_trip(tmp_path, key):
    images_for_texts(tmp_path)
    meta = {"CLS": 2, "SEP": 3, "MASK": 4, "UNK": 1, "v_range": [5, 12], key: "toy"}
    folder = write_texts(tmp_path / "txt", TASKS, meta, id2len={name: 1 for name in TASKS})
    run_texts(tmp_path, uniter_texts.UniterTexts((folder,)))
    store = TextStore(tmp_path / "out/texts")
    found = {row["id"]: row for row in map(store.row, range(len(store)))}
    assert set(found) == set(TASKS)
    words = {"vqa": "question", "nlvr2": "sentence", "re": "sent"}
    for name, row in TASKS.items():
        images = row["img_fname"] if isinstance(row["img_fname"], list) else [row["img_fname"]]
        assert found[name]["images"] == images
        assert found[name]["input_ids"].tolist() == row["input_ids"]
        assert found[name]["text"] == row.get(words.get(name, ""), "")
        left_out = {"input_ids", "img_fname", words.get(name, "")}
        assert found[name]["extra"] == {field: value for field, value in row.items() if field not in left_out}


def test_the_command_line_imports_texts_with_a_vocabulary(tmp_path):
    pytest.importorskip("data_tools.tokenizers")
    from data_tools.import_texts import run

    images_for_texts(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]) + "\n")
    folder = write_texts(tmp_path / "txt", TASKS)
    arguments = [str(folder), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "vocab.txt")]
    assert run(["uniter-texts", *arguments])["rows"] == len(TASKS)
    assert TextStore(tmp_path / "out/texts").meta.vocabulary.tokens[5:] == tuple("abcdefg")


BERT = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused100]"]
LATER = [f"[unused{n}]" for n in range(101, 995)]
CASED = Vocabulary.from_tokens([*BERT, LATER[0], "!", *(f"Word{n}" for n in range(28_889))])
UNCASED = Vocabulary.from_tokens([*BERT, *LATER, "!", *(f"word{n}" for n in range(29_522))])


def test_berts_cased_and_uncased_vocabularies_are_told_apart_though_their_special_ids_are_equal(tmp_path):
    spans = {"cased": (CASED, [106, 28996]), "uncased": (UNCASED, [999, 30522])}
    for name, (vocabulary, span) in spans.items():
        assert [vocabulary.tokens.index("!"), vocabulary.size] == span
        meta = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": span, "bert": f"bert-base-{name}"}
        source = uniter_texts.UniterTexts((write_texts(tmp_path / name, {"x": {"input_ids": [200]}}, meta),))
        for other, (given, _) in spans.items():
            if other == name:
                source.check_vocabulary(given)
            else:
                with pytest.raises(VlscaleError, match=rf"v_range .* give the vocabulary of 'bert-base-{name}'"):
                    source.check_vocabulary(given)


@pytest.mark.parametrize(
    ("span", "why"),
    [
        ([106, 28990], "does not fit the 28996 word pieces"),
        ([106, 30000], "does not fit the 28996 word pieces"),
        ([105, 28996], "begins with '!' at 105, but --tokenizer has it at 106"),
        ([28996, 106], "does not fit"),
        ([-1, 28996], "does not fit"),
        ([106, 28996.0], "expected two integers"),
        ([False, 28996], "expected two integers"),
        ([0, 10**300], "does not fit"),
        ([106], "expected two integers"),
        (None, "expected two integers"),
    ],
)
def test_a_range_of_another_vocabulary_is_refused(tmp_path, span, why):
    meta = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": span, "toker": "bert-base-cased"}
    folder = write_texts(tmp_path / "txt", {"x": {"input_ids": [200]}}, meta)
    with pytest.raises(VlscaleError, match=r"meta\.json: v_range") as raised:
        uniter_texts.UniterTexts((folder,)).check_vocabulary(CASED)
    assert why in str(raised.value)
    assert len(str(raised.value)) < 400


def test_images_come_from_txt2img_where_a_record_has_none(tmp_path):
    rows = {"x": {"input_ids": [5]}, "y": {"input_ids": [6]}, "z": {"input_ids": [6]}}
    folder = write_texts(tmp_path / "txt", rows, txt2img={"x": "a.npz", "y": ["a.npz", "b.npz"]})
    source = uniter_texts.UniterTexts((folder,))
    x, y, z = source.read(source.parts()[0])
    assert x.images == ("a.npz",)
    assert y.images == ("a.npz", "b.npz")
    assert isinstance(z, BadRow)
    assert z.field == "img_fname"


def test_a_caption_without_its_image_is_an_error_or_listed(tmp_path):
    images_for_texts(tmp_path)
    rows = {"good": TASKS["pretrain"], "lost": {"input_ids": [5], "img_fname": "gone.npz"}}
    source = uniter_texts.UniterTexts((write_texts(tmp_path / "txt", rows),))
    with pytest.raises(VlscaleError, match=r"key lost: images: refers to image 'gone.npz'"):
        run_texts(tmp_path, source)
    report = run_texts(tmp_path, source, skip=True)
    assert (report["rows"], report["dropped"], report["images without texts"]) == (1, {"images": 1}, 2)


BAD_TEXTS = {
    "not lz4": (b"abc", "record"),
    "truncated lz4": (lz4_frame.compress(msgpack.packb(TASKS["vqa"]))[:-9], "record"),
    "a bomb": (lz4_frame.compress(msgpack.packb({"input_ids": [5], "img_fname": "a", "x": bytes(20 << 20)})), "record"),
    "not msgpack": (lz4_frame.compress(b"\xc1\xc1"), "record"),
    "a list": (lz4_frame.compress(msgpack.packb([1])), "record"),
    "no ids": (lz4_frame.compress(msgpack.packb({"img_fname": "a"})), "input_ids"),
    "a negative id": (lz4_frame.compress(msgpack.packb({"input_ids": [-1], "img_fname": "a"})), "input_ids"),
    "words as ids": (lz4_frame.compress(msgpack.packb({"input_ids": ["a"], "img_fname": "a"})), "input_ids"),
    "no image": (lz4_frame.compress(msgpack.packb({"input_ids": [5]})), "img_fname"),
    "not UTF-8": (lz4_frame.compress(msgpack.packb({"input_ids": [5], "img_fname": "a", "sent": b"\xff\xfe"})), "sent"),
    "an extension": (lz4_frame.compress(msgpack.packb({"input_ids": msgpack.ExtType(3, b"x")})), "record"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TEXTS)
def test_a_bad_text_record_names_key_and_field(tmp_path, fault):
    value, field = BAD_TEXTS[fault]
    folder = write_lmdb(tmp_path / "txt", {"k": value})
    source = uniter_texts.UniterTexts((folder,))
    (row,) = source.read(source.parts()[0])
    assert isinstance(row, BadRow)
    assert row.field.startswith(field)
    assert "txt: key k" in row.where


def test_the_vocabulary_has_to_be_the_one_of_the_database(tmp_path):
    good = {"CLS": 2, "SEP": 3, "MASK": 4, "UNK": 1, "v_range": [5, 12], "toker": "toy"}
    source = uniter_texts.UniterTexts((write_texts(tmp_path / "txt", {}, good),))
    vocabulary = ToyTokenizer().vocabulary
    source.check_vocabulary(vocabulary)
    other = Vocabulary.from_tokens(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"])
    with pytest.raises(VlscaleError, match=r"special ids .* give the vocabulary of toy"):
        source.check_vocabulary(other)
    (tmp_path / "txt/meta.json").write_text(json.dumps({**good, "v_range": [106, 28996]}))
    with pytest.raises(VlscaleError, match=r"v_range \[106, 28996\] does not fit the 12 word pieces"):
        source.check_vocabulary(vocabulary)
