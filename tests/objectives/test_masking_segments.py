"""Texts of several segments (VCR's question, answer, rationale): each has a masked word, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.objectives.batches import make_batch, make_vocabulary, segments, take
from vlscale.config import MlmSection
from vlscale.data.random import Draws
from vlscale.objectives.masking import TokenMasking
from vlscale.objectives.mlm import MaskedLanguageModeling
from vlscale.ragged import RaggedBatch

DRAWS = Draws(7, "pairs")
VOCABULARY = make_vocabulary()
TYPES = (0, 2, 3)

Texts = list[list[int]]
texts_of_segments = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6)


def typed_batch(texts: Texts, seed: int = 0) -> RaggedBatch:
    """Texts whose segments have so many words, each but the last followed by a [SEP] of its type."""
    batch = make_batch([sum(words) + len(words) - 1 for words in texts], [1] * len(texts), seed=seed)
    types, place = [], 0
    for words in texts:
        place += 1
        for number, count in enumerate(words):
            place += count
            batch.input_ids[place] = VOCABULARY.sep
            place += 1
            types += [TYPES[number]] * (count + 1 + (number == 0))  # the first [CLS] goes with the first segment
    return replace(batch, text_types=torch.tensor(types))


def masking(probability: float) -> TokenMasking:
    return TokenMasking.build(MlmSection(probability=probability), VOCABULARY)


def words_of(batch: RaggedBatch) -> list[Tensor]:
    """Positions of the words of each segment, in order."""
    found = []
    for begin, end in zip(batch.cu_text[:-1].tolist(), batch.cu_text[1:].tolist(), strict=True):
        place = torch.arange(begin, end)
        special = (batch.input_ids[place] == VOCABULARY.sep) | (batch.input_ids[place] == VOCABULARY.cls)
        for kind in batch.text_types[place].unique().tolist():
            found.append(place[(batch.text_types[place] == kind) & ~special])
    return found


@settings(max_examples=60, deadline=None)
@given(texts_of_segments, st.integers(0, 99), st.sampled_from([0.0, 0.15, 0.6, 1.0]))
def test_every_segment_has_a_target_and_no_separator_has(texts: Texts, seed: int, probability: float):
    batch = typed_batch(texts, seed)
    masked = masking(probability).draw(batch, DRAWS, "p")
    chosen = set(masked.positions.tolist())
    every = words_of(batch)
    assert len(every) == sum(map(len, texts))
    for words in every:
        assert chosen & set(words.tolist())
    assert chosen <= {place for words in every for place in words.tolist()}
    assert torch.equal(masked.labels, batch.input_ids[masked.positions])


@settings(max_examples=60, deadline=None)
@given(texts_of_segments, st.integers(0, 99))
def test_what_is_chosen_by_chance_does_not_depend_on_segments(texts: Texts, seed: int):
    batch = typed_batch(texts, seed)
    rule = masking(0.15)
    free = rule.draw(batch, DRAWS, "p", at_least_one=False)
    bare = rule.draw(replace(batch, text_types=None), DRAWS, "p", at_least_one=False)
    assert torch.equal(free.positions, bare.positions)
    assert torch.equal(free.input_ids, bare.input_ids)
    full = rule.draw(batch, DRAWS, "p")
    chosen = set(free.positions.tolist())
    # Published: a segment of which no word was chosen has its first word masked.
    extra = [int(words[0]) for words in words_of(batch) if not chosen & set(words.tolist())]
    assert sorted(chosen | set(extra)) == full.positions.tolist()
    assert (full.input_ids[extra] == VOCABULARY.mask).all()


@settings(max_examples=40, deadline=None)
@given(texts_of_segments, st.integers(0, 99))
def test_an_example_is_masked_alike_in_any_batch(texts: Texts, seed: int):
    batch = typed_batch(texts, seed)
    whole = masking(0.15).draw(batch, DRAWS, "p").input_ids
    order = torch.arange(len(batch)).flip(0)
    index, _ = segments(batch.cu_text, order)
    part = replace(take(batch, order.tolist()), text_types=batch.text_types[index])
    assert torch.equal(masking(0.15).draw(part, DRAWS, "p").input_ids, whole[index])


def test_types_of_one_segment_mask_as_no_types_do():
    batch = make_batch([4, 7, 1], [1, 1, 1])
    zeros = replace(batch, text_types=torch.zeros_like(batch.input_ids))
    for probability in (0.0, 0.15):
        one, other = (masking(probability).draw(each, DRAWS, "p") for each in (batch, zeros))
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.positions, other.positions)


def test_content_words_fall_back_within_their_segment():
    section = MlmSection(probability=0, content_probability=0, function_words=(VOCABULARY.tokens[5],))
    batch = typed_batch([[3, 4, 2]] * 50)
    every = words_of(batch)
    for words in every:
        batch.input_ids[words[:-1]] = 5  # one content word, the last; a text's first would be in the question
        batch.input_ids[words[-1]] = 6
    masked = TokenMasking.build(section, VOCABULARY).draw(batch, DRAWS, "p")
    assert masked.positions.tolist() == [int(words[-1]) for words in every]


def test_the_objective_keeps_the_types():
    batch = typed_batch([[3, 4], [2]])
    prepared = MaskedLanguageModeling(masking(0.15)).prepare(batch, DRAWS)
    assert torch.equal(prepared.text_types, batch.text_types)
    assert prepared.targets["token_positions"].numel() >= 3
