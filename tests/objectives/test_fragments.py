"""Fragments that are taken out and generated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from tests.objectives.test_masking import assert_share
from tests.objectives.test_spans import text
from tests.objectives.unified_batches import DRAWS, VOCABULARY, Row, pack
from vlscale.config_unified import LanguageSection
from vlscale.data.views import Role, most_fragments
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.fragments import Fragmented, FragmentRule
from vlscale.objectives.row_draws import RowDraws

CLS, SEP = VOCABULARY.cls, VOCABULARY.sep


def rule(**settings) -> FragmentRule:
    return FragmentRule.build(LanguageSection(**settings), VOCABULARY)


def taken(rows, fragments=None, chosen=None) -> tuple[UnimoBatch, Fragmented]:
    batch = UnimoBatch.of(pack(rows))
    chosen = np.arange(len(rows)) if chosen is None else np.array(chosen)
    return batch, (fragments or rule()).take_out(batch, RowDraws.of(batch, DRAWS), chosen)


def parts(found: Fragmented, row: int) -> tuple[list[int], list[list[int]]]:
    """The source, and the fragments of a text, all without [CLS] and [SEP], which must stand where they belong."""
    begin, end = found.batch.cu_text[row : row + 2].tolist()
    ids, prefix = found.batch.input_ids[begin:end].tolist(), int(found.batch.prefix_len[row])
    assert (ids[0], ids[prefix - 1]) == (CLS, SEP)
    fragments: list[list[int]] = []
    for token in ids[prefix:]:
        if token == CLS:
            fragments.append([])
        fragments[-1].append(token)
    assert all(each[0] == CLS and each[-1] == SEP for each in fragments)
    return ids[1 : prefix - 1], [each[1:-1] for each in fragments]


def test_a_text_is_its_source_and_its_fragments():
    rows = [text(number, 4 + 13 * number, [None, 1, 3, 5][number % 4]) for number in range(24)]
    batch, found = taken(rows)
    for number, row in enumerate(rows):
        source, fragments = parts(found, number)
        assert Counter([*source, *chain(*fragments)]) == Counter(row.words)
        words, at = list(row.words), 0
        for fragment in fragments:  # in the order of the text, each in one piece
            at = next(k for k in range(at, len(words)) if words[k : k + len(fragment)] == fragment)
            bounds = (0, *row.ends) if row.ends else range(len(words) + 1)
            assert {at, at + len(fragment)} <= set(bounds)
            at += len(fragment)
    assert torch.equal(batch.input_ids, found.batch.input_ids[found.moved])


def test_the_share_the_lengths_and_the_number_of_fragments():
    lengths, fewer = [], 0
    rows = [text(number, 4 + number % 500) for number in range(1500)]
    _, found = taken(rows)
    for number, row in enumerate(rows):
        _, fragments = parts(found, number)
        total, wanted = sum(map(len, fragments)), int(np.ceil(len(row.words) * 0.25))
        bound = int(most_fragments(np.array([len(row.words)], np.int32), 0.25, 4)[0])
        assert 1 <= len(fragments) <= bound
        assert total < max(wanted, 1) + 4
        fewer += total < wanted
        assert all(len(each) <= 32 for each in fragments)
        lengths += [len(each) for each in fragments[:-1]] if len(fragments) > 3 else []
    assert fewer < 5
    assert min(lengths) == 4
    assert max(lengths) == 32


def test_lengths_are_uniform():
    numbers = (np.arange(29_000) + 0.5) / 29_000
    assert set(np.bincount(rule().lengths(numbers), minlength=33)[4:]) == {1000}
    assert rule().lengths(np.array([0.0, 1 - 2.0**-32])).tolist() == [4, 32]


def test_beginnings_are_uniform_where_a_fragment_fits():
    rows = [text(number, 12) for number in range(6000)]
    _, found = taken(rows, rule(shortest_fragment=4, longest_fragment=4))
    begins: Counter[int] = Counter()
    for number, row in enumerate(rows):
        _, [fragment] = parts(found, number)
        begins[next(k for k in range(9) if list(row.words[k : k + 4]) == fragment)] += 1
    for begin in range(9):
        assert_share(begins[begin], 6000, 1 / 9)


def test_every_token_of_a_fragment_is_predicted_but_its_first():
    rows = [text(0, 120), text(1, 40)]
    _, found = taken(rows)
    ids, expected = found.batch.input_ids.tolist(), []
    for row in range(2):
        prefix = found.batch.cu_text[row] + found.batch.prefix_len[row]
        expected += [k for k in range(int(prefix), int(found.batch.cu_text[row + 1])) if ids[k] != SEP]
    assert found.positions.tolist() == expected
    assert found.labels.tolist() == [ids[position + 1] for position in expected]
    assert CLS not in found.labels.tolist()
    assert len(expected) == sum(len(each) + 1 for row in range(2) for each in parts(found, row)[1])


def test_positions_start_again_at_every_cls():
    _, found = taken([text(0, 90), Row(Role.VISUAL, 0, 1, None, 3, 1), text(2, 9)], chosen=[0])
    offsets, ids = found.batch.targets["text_offsets"], found.batch.input_ids
    assert torch.equal(offsets == 0, ids == CLS)
    assert ((offsets.diff() == 1) | (offsets[1:] == 0)).all()
    assert found.batch.prefix_len.tolist() == [found.batch.prefix_len[0], 0, 11]
    assert offsets[-11:].tolist() == list(range(11))


@pytest.mark.parametrize(("words", "whole"), [(0, False), (1, True), (3, True), (4, True), (5, False)])
def test_short_texts_are_generated_whole_after_an_empty_source(words, whole):
    _, found = taken([text(number, words) for number in range(20)])
    assert found.whole.tolist() == [whole] * 20
    for number in range(20):
        source, fragments = parts(found, number)
        assert len(source) == (0 if whole or not words else 1)
        assert len(fragments) == min(words, 1)


def test_a_text_that_is_one_unit_is_generated_whole():
    _, found = taken([text(0, 20, 20), text(1, 20, 10)])
    assert found.whole.tolist() == [True, False]


def test_rows_that_are_not_generated_keep_their_texts_and_a_batch_without_any_has_no_target():
    rows = [text(0, 30), text(1, 30), text(2, 30)]
    batch, found = taken(rows, chosen=[1])
    assert torch.equal(found.batch.input_ids[:32], batch.input_ids[:32])
    assert found.batch.prefix_len.tolist() == [32, found.batch.prefix_len[1], 32]
    batch, nothing = taken(rows, chosen=np.array([], np.int64))
    assert nothing.batch is batch
    assert torch.equal(nothing.moved, torch.arange(96))
    assert nothing.positions.numel() == nothing.whole.numel() == 0


def test_types_go_with_their_tokens():
    batch = UnimoBatch.of(pack([text(0, 30)]))
    batch = replace(batch, text_types=torch.arange(32) // 8)
    found = rule().take_out(batch, RowDraws.of(batch, DRAWS), np.array([0]))
    assert torch.equal(found.batch.text_types[found.moved], batch.text_types)
    assert found.batch.text_types.shape == found.batch.input_ids.shape


def test_an_example_is_taken_apart_alike_in_any_batch():
    rows = [text(number, 12 + 9 * number, 1 + number % 3 if number % 2 else None) for number in range(9)]
    _, whole = taken(rows)
    cu = whole.batch.cu_text.tolist()
    for chosen in ([4, 0, 7], [8], [1, 2, 3]):
        _, part = taken([rows[number] for number in chosen])
        expected = torch.cat([whole.batch.input_ids[cu[number] : cu[number + 1]] for number in chosen])
        assert torch.equal(part.batch.input_ids, expected)
