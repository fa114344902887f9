"""Whole words where there are no units: what begins one, told by how a vocabulary spells its pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_tools.rewriting.units import piece_units
from tests.objectives.unified_batches import VOCABULARY, Row, pack
from vlscale.config_unified import LanguageSection
from vlscale.data.random import Draws
from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.data.views import Role
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.fragments import FragmentRule
from vlscale.objectives.row_draws import RowDraws
from vlscale.objectives.runs import TextUnits, word_starts
from vlscale.objectives.spans import SpanMasking

ROBERTA = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
SPELT = {
    "wordpiece": ([*SPECIAL_TOKENS.values(), "play", "##ing", "ball", "##s", ",", "un", "##do"], SPECIAL_TOKENS),
    "byte-level": ([*ROBERTA.values(), "Ġplay", "ing", "Ġball", "s", ",", "Ġun", "do"], ROBERTA),
    "sentencepiece": ([*ROBERTA.values(), "▁play", "ing", "▁ball", "s", ",", "▁un", "do"], ROBERTA),
}
TEXT = [5, 6, 7, 8, 10, 11, 1, 7]
DRAWS = [Draws(7, name) for name in ("images", "texts", "pairs")]


def vocabulary_of(spelling):
    tokens, special = SPELT[spelling]
    return Vocabulary.from_tokens(tokens, special=special)


@pytest.mark.parametrize("spelling", SPELT)
def test_words_are_those_that_find_units_tells_by_the_spelling(spelling):
    vocabulary = vocabulary_of(spelling)
    begins = word_starts(vocabulary)
    assert begins.dtype == bool
    units = TextUnits.of(pack([Row(Role.BIDIRECTIONAL, 1, 0, tuple(TEXT))]), np.array([0]), begins)
    expected = piece_units([vocabulary.tokens[each] for each in TEXT], spelling != "wordpiece")
    assert units.ends[1:].tolist() == expected[:, 1].tolist() == [2, 4, 6, 7, 8]


def test_scripts_without_blanks_are_not_one_word():
    begins = word_starts(Vocabulary.from_tokens([*ROBERTA.values(), "▁他", "们", "在", "▁a", "b"], special=ROBERTA))
    assert begins.tolist() == [True] * 9 + [False]


def test_a_vocabulary_that_does_not_tell_has_single_pieces():
    assert word_starts(VOCABULARY) is None
    units = TextUnits.of(pack([Row(Role.BIDIRECTIONAL, 1, 0, (6, 7, 8))]), np.array([0]))
    assert units.ends.tolist() == [0, 1, 2, 3]


def test_known_units_come_before_words_and_texts_may_be_empty():
    begins = word_starts(vocabulary_of("wordpiece"))
    rows = [Row(Role.BIDIRECTIONAL, 1, 0, tuple(TEXT), ends=(3, 8)), Row(Role.BIDIRECTIONAL, 1, 1, ()),
            Row(Role.BIDIRECTIONAL, 1, 2, tuple(TEXT)), Row(Role.BIDIRECTIONAL, 1, 3, (6, 6))]  # fmt: skip
    units = TextUnits.of(pack(rows), np.arange(4), begins)
    assert units.cu_units.tolist() == [0, 2, 2, 7, 8]
    assert units.ends.tolist() == [0, 3, 8, 10, 12, 14, 15, 16, 18]


@pytest.mark.parametrize("spelling", SPELT)
def test_no_word_is_split(spelling):
    vocabulary = vocabulary_of(spelling)
    draw, section = np.random.default_rng(0), LanguageSection(shortest_fragment=2, longest_fragment=5)
    rows = [Row(Role.BIDIRECTIONAL, 1, n, tuple(draw.integers(5, 12, 12).tolist())) for n in range(200)]
    begins = word_starts(vocabulary)
    batch = pack(rows)
    at = np.arange(len(rows))
    of = TextUnits.of(batch, at, begins)
    word = of.spread(np.arange(len(of.owner)))

    def whole(chosen):
        """No word is chosen in part, and single pieces would have split some."""
        share = np.bincount(word, chosen) / np.bincount(word)
        return bool(((share == 0) | (share == 1)).all())

    rule = SpanMasking.build(section, vocabulary)
    pieces = of.positions()
    found = []
    for each in (rule, SpanMasking(rule.probability, rule.geometric, rule.longest, rule.mask, rule.random_range)):
        masked = torch.zeros(batch.input_ids.numel())
        masked[each.draw(batch, RowDraws.of(batch, DRAWS), at).positions] = 1
        found.append(whole(masked.numpy()[pieces]))
    assert found == [True, False]
    fragments, found = FragmentRule.build(section, vocabulary), []
    bare = FragmentRule(fragments.probability, fragments.shortest, fragments.longest, fragments.cls, fragments.sep)
    for each in (fragments, bare):
        made = each.take_out(UnimoBatch.of(batch), RowDraws.of(batch, DRAWS), at)
        within = made.moved - made.batch.cu_text[:-1].long()[batch.text_owner()]
        generated = within >= made.batch.prefix_len[batch.text_owner()]
        found.append(whole(generated.numpy()[pieces]))
    assert found == [True, False]
