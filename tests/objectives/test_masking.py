"""Statistics of the masks against the published rule, and their independence of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.objectives.batches import VOCAB_SIZE, make_batch, make_vocabulary, segments, take
from vlscale.config import MlmSection
from vlscale.data.random import Draws
from vlscale.errors import VlscaleError
from vlscale.objectives.masking import TokenMasking, draw_regions, mask_regions

DRAWS = Draws(7, "pairs")
LARGE = make_batch([4 + i % 17 for i in range(6000)], [1 + i % 12 for i in range(6000)])
VOCABULARY = make_vocabulary()


def rule(**settings) -> TokenMasking:
    return TokenMasking.build(MlmSection(**settings), VOCABULARY)


def assert_share(hits: int, trials: int, probability: float) -> None:
    """Within four standard deviations of a binomial share."""
    deviation = math.sqrt(probability * (1 - probability) / trials)
    assert abs(hits / trials - probability) < 4 * deviation, (hits / trials, probability, deviation)


def test_shares_of_chosen_masked_random_and_kept():
    masked = rule().draw(LARGE, DRAWS, "p", at_least_one=False)
    words = len(LARGE.input_ids) - 2 * len(LARGE)
    chosen = len(masked.positions)
    assert_share(chosen, words, 0.15)
    now = masked.input_ids[masked.positions]
    assert_share(int((now == VOCABULARY.mask).sum()), chosen, 0.8)
    low, high = VOCABULARY.random_range
    # A random replacement hits the original by chance once in (high - low).
    changed = int(((now != VOCABULARY.mask) & (now != masked.labels)).sum())
    assert_share(changed, chosen, 0.1 * (1 - 1 / (high - low)))


def test_choices_are_independent_between_positions():
    masked = rule(probability=0.5).draw(LARGE, DRAWS, "p", at_least_one=False)
    chosen = torch.zeros(len(LARGE.input_ids), dtype=torch.bool)
    chosen[masked.positions] = True
    first, second = LARGE.cu_text[:-1].long() + 1, LARGE.cu_text[:-1].long() + 2
    assert_share(int((chosen[first] & chosen[second]).sum()), len(LARGE), 0.25)
    assert_share(int((chosen[first][1:] & chosen[first][:-1]).sum()), len(LARGE) - 1, 0.25)


def test_random_replacements_are_uniform_over_the_range():
    masked = rule(probability=1.0).draw(LARGE, DRAWS, "p")
    now = masked.input_ids[masked.positions]
    random = now[(now != VOCABULARY.mask) & (now != masked.labels)].numpy()
    low, high = VOCABULARY.random_range
    assert random.min() == low
    assert random.max() == high - 1
    counts = np.bincount(random, minlength=VOCAB_SIZE)[low:high]
    expected = len(random) / (high - low)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    free = high - low - 1
    assert abs(chi2 - free) < 4 * math.sqrt(2 * free)


def test_labels_say_what_stood_there_and_the_rest_is_untouched():
    masked = rule().draw(LARGE, DRAWS, "p")
    assert torch.equal(masked.labels, LARGE.input_ids[masked.positions])
    untouched = torch.ones(len(LARGE.input_ids), dtype=torch.bool)
    untouched[masked.positions] = False
    assert torch.equal(masked.input_ids[untouched], LARGE.input_ids[untouched])
    assert not (masked.labels[:, None] == torch.tensor([VOCABULARY.cls, VOCABULARY.sep, VOCABULARY.pad])).any()
    assert masked.positions.dtype == masked.labels.dtype == masked.input_ids.dtype == torch.int64


def test_special_tokens_are_never_chosen_even_at_probability_one():
    masked = rule(probability=1.0).draw(LARGE, DRAWS, "p")
    assert len(masked.positions) == len(LARGE.input_ids) - 2 * len(LARGE)


def test_a_text_without_a_choice_masks_its_first_word():
    masked = rule(probability=0.0).draw(LARGE, DRAWS, "p")
    assert torch.equal(masked.positions, LARGE.cu_text[:-1].long() + 1)
    assert (masked.input_ids[masked.positions] == VOCABULARY.mask).all()
    some = rule(probability=0.05).draw(LARGE, DRAWS, "p")
    assert set(LARGE.text_owner()[some.positions].tolist()) == set(range(len(LARGE)))


def test_content_words_have_their_own_probability():
    vocabulary = make_vocabulary(["the", "on", "##on"])
    section = MlmSection(probability=0.1, content_probability=0.5, function_words=("The", "on"))
    masking = TokenMasking.build(section, vocabulary)
    content = torch.from_numpy(masking.content)[LARGE.input_ids]
    assert masking.content[vocabulary.tokens.index("##on")]
    assert not masking.content[[vocabulary.tokens.index("the"), vocabulary.tokens.index("on"), vocabulary.cls]].any()
    masked = masking.draw(LARGE, DRAWS, "p", at_least_one=False)
    chosen = torch.zeros(len(LARGE.input_ids), dtype=torch.bool)
    chosen[masked.positions] = True
    functional = torch.isin(LARGE.input_ids, torch.tensor([5, 6]))
    assert_share(int(chosen[content].sum()), int(content.sum()), 0.5)
    assert_share(int(chosen[functional].sum()), int(functional.sum()), 0.1)


def test_content_masking_falls_back_to_a_random_content_word():
    vocabulary = make_vocabulary(["the", "on"])
    section = MlmSection(probability=0, content_probability=0, function_words=("the", "on"))
    masking = TokenMasking.build(section, vocabulary)
    batch = make_batch([6] * 8000, [1] * 8000)
    ids = batch.input_ids.view(-1, 8)
    ids[:, 1], ids[:, 4] = 5, 6
    ids[0, 1:7] = 5
    masked = masking.draw(batch, DRAWS, "p")
    assert torch.equal(batch.text_owner()[masked.positions], torch.arange(8000))
    place = masked.positions % 8
    assert ids[0, place[0]] == 5
    for position in (2, 3, 5, 6):
        assert_share(int((place[1:] == position).sum()), 7999, 0.25)


def test_function_words_must_be_in_the_vocabulary():
    section = MlmSection(content_probability=0.5, function_words=("le", "la"))
    with pytest.raises(VlscaleError, match=r"function_words: none of le, la is a token"):
        TokenMasking.build(section, VOCABULARY)


def test_token_ids_outside_the_vocabulary_are_refused():
    batch = make_batch([3], [2])
    batch.input_ids[2] = VOCAB_SIZE
    with pytest.raises(VlscaleError, match=rf"dataset pairs: token id {VOCAB_SIZE} lies outside"):
        rule().draw(batch, DRAWS, "p")


def test_regions_are_chosen_with_their_probability_and_at_least_one():
    chosen = draw_regions(LARGE, DRAWS, "p", 0.15, at_least_one=False)
    assert_share(int(chosen.sum()), len(chosen), 0.15)
    chosen = draw_regions(LARGE, DRAWS, "p", 0.15)
    assert torch.unique(LARGE.region_owner()[chosen]).numel() == len(LARGE)


def test_the_only_region_of_a_mask_is_uniformly_random():
    batch = make_batch([3] * 8000, [5] * 8000)
    chosen = draw_regions(batch, DRAWS, "p", 0.0).view(-1, 5)
    assert (chosen.sum(1) == 1).all()
    for region in range(5):
        assert_share(int(chosen[:, region].sum()), 8000, 0.2)


def test_masked_regions_lose_their_features_and_nothing_else():
    batch = make_batch([3, 4], [3, 4])
    batch.features[1] = float("nan")
    before = batch.features.clone()
    chosen = torch.tensor([False, True, False, True, False, False, True])
    masked = mask_regions(batch, chosen)
    assert not masked.features[chosen].any()
    assert torch.equal(masked.features[~chosen], before[~chosen])
    assert torch.equal(masked.boxes, batch.boxes)
    assert torch.equal(masked.region_mask, chosen)
    torch.testing.assert_close(batch.features, before, equal_nan=True)
    assert batch.region_mask is None
    in_place = mask_regions(batch, chosen, in_place=True)
    assert in_place.features is batch.features
    torch.testing.assert_close(in_place.features, masked.features, equal_nan=True)


def test_features_are_set_by_the_numbers_of_their_rows():
    """By a bool mask, setting a fifth of the rows takes ten times as long, a third of what a reader does."""
    batch, chosen = make_batch([3, 4], [3, 4]), torch.tensor([False, True, False, True, False, False, True])
    with torch.profiler.profile(acc_events=True) as profile:
        mask_regions(batch, chosen, in_place=True)
    names = {event.name for event in profile.events()}
    assert "aten::index_fill_" in names
    assert not names & {"aten::index_put_", "aten::_index_put_impl_", "aten::masked_fill_"}


@pytest.mark.parametrize("settings", [{}, {"content_probability": 0.4}])
def test_an_example_is_masked_alike_in_any_batch(settings):
    batch = make_batch([5, 3, 9, 1, 7, 2], [3, 1, 6, 2, 4, 5])
    whole, regions = rule(**settings).draw(batch, DRAWS, "p"), draw_regions(batch, DRAWS, "p", 0.3)
    for group in ([5, 0, 3], [2], [4, 1], [1, 4]):
        part, index = take(batch, group), torch.tensor(group)
        text, _ = segments(batch.cu_text, index)
        rows, _ = segments(batch.cu_regions, index)
        assert torch.equal(rule(**settings).draw(part, DRAWS, "p").input_ids, whole.input_ids[text])
        assert torch.equal(draw_regions(part, DRAWS, "p", 0.3), regions[rows])


def test_another_pass_purpose_seed_or_dataset_gives_another_mask():
    masking, again = rule(probability=0.5), replace(LARGE, passes=LARGE.passes + 1)
    base = masking.draw(LARGE, DRAWS, "p").input_ids
    assert torch.equal(base, masking.draw(LARGE, Draws(7, "pairs"), "p").input_ids)
    others = [
        masking.draw(again, DRAWS, "p"),
        masking.draw(LARGE, DRAWS, "q"),
        masking.draw(LARGE, Draws(8, "pairs"), "p"),
        masking.draw(LARGE, Draws(7, "other"), "p"),
    ]
    words = len(LARGE.input_ids) - 2 * len(LARGE)
    hidden = [ids == VOCABULARY.mask for ids in (base, *(other.input_ids for other in others))]
    for other in hidden[1:]:
        assert_share(int((hidden[0] & other).sum()), words, 0.16)


def test_texts_and_images_that_are_missing():
    batch = make_batch([3, 2], [2, 0])
    assert draw_regions(batch, DRAWS, "p", 0.0).sum() == 1
    empty = replace(batch, input_ids=batch.input_ids[:0], cu_text=torch.zeros(3, dtype=torch.int32))
    masked = rule().draw(empty, DRAWS, "p")
    assert masked.positions.numel() == masked.input_ids.numel() == 0
    bare = replace(batch, input_ids=torch.tensor([2, 3, 2, 3]), cu_text=torch.tensor([0, 2, 4], dtype=torch.int32))
    assert rule(probability=1.0).draw(bare, DRAWS, "p").positions.numel() == 0
