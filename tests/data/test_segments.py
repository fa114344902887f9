"""Texts of several segments: types from the writer to the batch, and nothing new where there are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.data.test_packing import equal
from tests.helpers import make_dataset, make_vocabulary
from vlscale.cli import main
from vlscale.config import ObjectivesSection
from vlscale.data.collate import collate
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import deal
from vlscale.data.index import record_side_files
from vlscale.data.inspection import open_stores
from vlscale.data.loader import Loader
from vlscale.data.packing import Block
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.rows import decoded_rows, segments
from vlscale.data.schema import ADDED, TextsMeta, Vocabulary, grown_fingerprint, text_columns
from vlscale.data.store import TextStore
from vlscale.data.store_writer import ImageWriter, TextWriter
from vlscale.data.verification import verify
from vlscale.errors import VlscaleError
from vlscale.objectives import build_objectives

TYPES = 4
VOCABULARY = make_vocabulary(40)


def write_segments(root, texts=40, seed=0, images=8, num_types=TYPES):
    """A dataset of texts with one to three segments; returns the types of each."""
    rng = np.random.default_rng(seed)
    with ImageWriter(root, 6, shard_bytes=1 << 11) as writer:
        for row in range(images):
            writer.write(f"i{row}", 1, 1, rng.standard_normal((3, 6)), np.tile([0, 0, 0.5, 0.5], (3, 1)))
    every = []
    with TextWriter(root, VOCABULARY, writer.rows, shard_bytes=1 << 11, num_types=num_types) as texts_writer:
        for row in range(texts):
            lengths = rng.integers(1, 6, 1 + row % 3)
            types = np.repeat([0, 2, 3][: len(lengths)], lengths)
            ids = rng.integers(5, 40, len(types))
            texts_writer.write(f"t{row}", "", ids, [f"i{row * images // texts}"], type_ids=types)
            every.append(types)
    return every


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    root = tmp_path_factory.mktemp("typed") / "toy"
    types = write_segments(root)
    return root, types


def micro_of(dataset, task="mlm"):
    settings = PlanSettings(seed=3, global_batch_examples=24, itm_replace="both")
    plan = Plan([(dataset.lengths, {task: 1})], settings)
    return deal(plan.step(plan.start())[0], 1, 1, 10_000)[0][0]


@pytest.mark.parametrize("task", ["mlm", "itm"])
def test_a_batch_carries_the_types_of_its_texts(typed, task):
    root, types = typed
    dataset = open_dataset("toy", root)
    micro = micro_of(dataset, task)
    batch = collate(dataset, micro, 8, 2, 3)
    assert batch.text_types.dtype == torch.int64
    for place, row in enumerate(micro.texts):
        begin, end = batch.cu_text[place : place + 2].tolist()
        expected = types[row]  # [CLS] goes with the first word piece, the last [SEP] with the last
        assert batch.text_types[begin:end].tolist() == [expected[0], *expected, expected[-1]]
        assert batch.input_ids[begin + 1 : end - 1].tolist() == dataset.texts.row(row)["input_ids"].tolist()
    assert batch.tokens == micro.tokens  # what was planned is what runs


@pytest.mark.parametrize("size", [1 << 14, 800, 0])
def test_types_go_into_a_block_like_the_rest(typed, size):
    dataset = open_dataset("toy", typed[0])
    micro = micro_of(dataset)
    memory = torch.full((size,), 255, dtype=torch.uint8)
    equal(collate(dataset, micro, 8, 2, 3, Block(memory)), collate(dataset, micro, 8, 2, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_types_come_through_the_loader(typed, workers):
    dataset = open_dataset("toy", typed[0])
    plan = Plan([(dataset.lengths, {"mlm": 1})], PlanSettings(seed=3, global_batch_examples=24))
    objectives = build_objectives(ObjectivesSection(), ("mlm",), dataset.vocabulary)
    with Loader({"toy": dataset}, objectives, plan, plan.start(), 0, 1, 1, 10_000, seed=3, workers=workers) as loader:
        step, _, (batch,) = next(iter(loader))
    (micro,) = deal(step, 1, 1, 10_000)[0]
    assert torch.equal(batch.text_types, collate(dataset, micro, 8, 2, 3).text_types)


def test_texts_without_segments_are_stored_and_read_as_before(tmp_path):
    root = make_dataset(tmp_path / "toy")
    meta = json.loads((root / "texts/meta.json").read_bytes())
    assert set(meta) == {"kind", "version", "vocabulary"}
    dataset = open_dataset("toy", root)
    assert dataset.num_types == 1
    assert "type_ids" not in dataset.texts.row(0)
    assert "type_ids" not in text_columns(dataset.texts.meta)
    assert collate(dataset, micro_of(dataset), 8, 2, 3).text_types is None
    assert "segments" not in decoded_rows(open_stores(root), "0", 1)[0]


def test_meta_json_tells_the_number_of_types(typed):
    text = (typed[0] / "texts/meta.json").read_text()
    assert json.loads(text)["num_types"] == TYPES
    assert TextsMeta.model_validate_json(text).num_types == TYPES
    assert TextsMeta(vocabulary=VOCABULARY).model_dump() == {
        "kind": "texts",
        "version": 1,
        "vocabulary": VOCABULARY.model_dump(),
    }


@pytest.mark.parametrize(
    ("num_types", "types", "why"),
    [
        (4, [0, 4], r"type_ids span 0\.\.4, expected 0\.\.3"),
        (4, [-1, 0], r"type_ids span -1\.\.0"),
        (4, [0], r"type_ids have shape \[1\], expected \[2\]"),
        (4, [0.0, 1.0], "type_ids have the dtype float64"),
        (4, [[0], [1]], "type_ids have shape"),
        (1, [0, 0], "has type_ids, but the store was begun without; set num_types"),
        (0, None, "num_types"),
        (1 << 17, None, "num_types"),
    ],
)
def test_types_that_do_not_fit_are_refused(tmp_path, num_types, types, why):
    def write():
        with TextWriter(tmp_path, VOCABULARY, {}, num_types=num_types) as writer:
            writer.write("t", "", [5, 6], type_ids=types)

    with pytest.raises(VlscaleError, match=why) as caught:
        write()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "texts").exists()


def test_texts_without_types_among_others_are_of_type_0(tmp_path):
    with TextWriter(tmp_path, VOCABULARY, {}, num_types=2) as writer:
        writer.write("t", "", [5, 6])
    assert TextStore(tmp_path / "texts").row(0)["type_ids"].tolist() == [0, 0]


def test_damaged_types_are_named_with_their_row(tmp_path):
    write_segments(tmp_path / "toy")
    assert verify(tmp_path / "toy", rows=True).found == 0
    meta = tmp_path / "toy/texts/meta.json"
    meta.write_text(meta.read_text().replace('"num_types": 4', '"num_types": 3'))
    record_side_files(meta.parent)
    dataset = open_dataset("toy", tmp_path / "toy")
    ids, types = np.zeros(99, np.int64), np.zeros(99, np.int64)
    with pytest.raises(VlscaleError, match=r"texts: row 2: type id 3 is outside 0\.\.2 of meta.json"):
        dataset.texts.write_ids(np.array([0, 1, 2]), ids, np.array([0, 30, 60]), types)
    problems = verify(tmp_path / "toy", rows=True).problems
    assert any("row 2: type_ids" in problem for problem in problems)
    assert not any("row 1: " in problem for problem in problems)


def test_inspect_tells_segments(typed):
    root, types = typed
    (row,) = decoded_rows(open_stores(root), "5", 1)
    assert row["segments"] == segments(types[5])
    assert sum(size for _, size in row["segments"]) == len(types[5]) == len(row["input_ids"])
    assert segments(np.array([0, 0, 2, 3, 3, 0])) == [[0, 2], [2, 1], [3, 2], [0, 1]]
    assert segments(np.array([1])) == [[1, 1]]


def test_a_grown_vocabulary_keeps_the_ids_and_tells_what_it_was():
    grown = VOCABULARY.grown(81)
    assert grown.size == 121
    assert grown.tokens[:40] == VOCABULARY.tokens
    assert grown.tokens[40] == ADDED.format(0)
    assert grown.random_range == VOCABULARY.random_range
    assert grown.fingerprint == grown_fingerprint(VOCABULARY.fingerprint, 81)
    assert len({VOCABULARY.grown(count).fingerprint for count in range(5)}) == 5
    assert VOCABULARY.grown(0) == VOCABULARY
    assert Vocabulary.model_validate_json(grown.model_dump_json()) == grown
    with pytest.raises(VlscaleError, match="vocabulary of 121 grown by 1: a token stands twice"):
        grown.grown(1)


def test_inspect_prints_segments_beside_the_word_pieces(typed, capsys):
    root, types = typed
    assert main(["inspect", str(root), "--rows", "5"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    each = ", ".join(f"type {kind}: {size} word pieces" for kind, size in segments(types[5]))
    assert f"{len(segments(types[5]))} segments: {each}" in told
