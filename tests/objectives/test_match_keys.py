"""What is known to match is nobody's negative: the same image, the same caption, a pair's retrieved views."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.objectives.unified_batches import learning, model_of, pack, prepared, unit
from vlscale.data.views import Role
from vlscale.errors import VlscaleError
from vlscale.objectives.cmcl import Contrast
from vlscale.objectives.match_keys import known_matches, negatives_of
from vlscale.objectives.unified import share_window

EXACT = {"rtol": 1e-9, "atol": 1e-11}
LOSSES = pytest.mark.parametrize("loss", ["shared", "own"])
SIMILARITIES = pytest.mark.parametrize("similarity", ["mul_fc", "dot", "cosine"])


def contrast(similarity="mul_fc", loss="shared", **section):
    return learning(
        contrast={"similarity": similarity, "temperature": 0.5, "window": True, "window_loss": loss} | section
    )


def pair(number, image=None, words=None, retrieved_image=None, retrieved_words=None):
    """A pair's rows, with another pair's image or words in some places."""
    rows = unit("pair", number)
    own = rows[1].words
    for at, row in enumerate(rows):
        if row.role == Role.RETRIEVED_IMAGE:
            if retrieved_image is not None:
                rows[at] = replace(row, image=retrieved_image, source=2, regions=3 + retrieved_image % 4)
        elif row.role == Role.RETRIEVED_TEXT:
            rows[at] = replace(row, words=retrieved_words or row.words)
        else:
            if image is not None and row.image == number:
                rows[at] = replace(row, image=image, regions=3 + image % 4)
            if words is not None and row.words == own:
                rows[at] = replace(rows[at], words=words, ends=None)
    return rows


def words_of(number):
    return unit("pair", number)[1].words


RELATED = (
    pair(0),
    pair(1, image=0),  # the first one's image
    pair(2, words=words_of(0)),  # the first one's caption
    pair(3, retrieved_image=0),
    pair(4, retrieved_words=words_of(3)),
    pair(5),
)
KNOWN = {(0, 1), (1, 0), (0, 2), (2, 0), (0, 3), (1, 3), (4, 3)} | {(each, each) for each in range(6)}
"""(image of a pair, caption of a pair) that match."""


def known_of(units):
    objective = contrast()
    keys = objective.window_keys(prepared(objective, [row for rows in units for row in rows]))
    return keys, known_matches(keys, keys, objective.contrast.images)


def test_the_same_image_the_same_caption_and_retrieved_views_match():
    keys, known = known_of(RELATED)
    assert {(i, c) for i in range(6) for c in range(6) if known[i, c]} == KNOWN
    assert keys.dtype == torch.int64
    assert keys.shape == (6, 5)


def test_an_images_row_in_another_dataset_is_another_image():
    other = [replace(row, source=0) if row.source == 2 else row for row in pair(6, image=0)]
    _, known = known_of((pair(0), other))
    assert known.tolist() == [[True, False], [False, True]]


def test_keys_do_not_depend_on_the_batch_or_its_masks():
    together, _ = known_of(RELATED)
    assert torch.equal(together, torch.cat([known_of([rows])[0] for rows in RELATED]))


def test_more_views_than_the_recipe_asks_for_are_refused():
    objective = Contrast(window=True)
    with pytest.raises(
        VlscaleError, match="dataset images, pass 0, example 1: the group has more than 1 rows RETRIEVED_IM"
    ):
        objective.targets(pack(unit("pair", 0, views=2)))
    assert not Contrast().targets(pack(unit("pair", 0, views=2)))["contrast_keys"].numel()
    assert Contrast(window=True, images=3, texts=2).targets(pack(unit("pair", 0, views=2)))["contrast_keys"].shape == (
        1,
        8,
    )


@SIMILARITIES
@LOSSES
def test_the_same_pair_twice_has_the_loss_of_one_alone_twice(similarity, loss):
    objective, model = contrast(similarity, loss), model_of()
    twice = [*unit("pair", 0), *(replace(row, group=1) for row in unit("pair", 0))]
    found = []
    for rows in (unit("pair", 0), twice):
        [batch] = share_window(objective, model, [prepared(objective, rows)])
        terms = objective.terms(model, batch)
        model.zero_grad()
        terms["contrast"].sum.backward()
        grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        found.append((terms["contrast"].sum.detach(), grads))
        counts = objective.counts(batch)
        assert counts["contrast_window"] == 0
        assert counts["contrast_pairs"] == counts["contrast_ranked"] == len(rows) / len(twice) * 2
        assert float(terms["contrast_window_gap"].sum) == 0
    (alone, grads), (both, of_both) = found
    # Views of the two draws are equal, and so are the losses.
    assert_close(both, 2 * alone, **EXACT)
    for name, grad in grads.items():
        assert_close(of_both[name], 2 * grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@SIMILARITIES
@LOSSES
@pytest.mark.parametrize("split", [[0, 6], [0, 2, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_losses_and_gradients_of_any_split_are_those_of_the_formula_without_what_matches(similarity, loss, split):
    objective, model = contrast(similarity, loss), model_of()
    whole = prepared(objective, [row for rows in RELATED for row in rows])
    candidates = objective.contrast.score(model, model.encode(whole), whole.targets)
    cross = objective.contrast._compare(model, candidates.images, candidates.texts, True) / 0.5
    expected = (candidates.all - candidates.positive).sum()
    for pair_ in range(6):
        others = [cross[pair_, c] for c in range(6) if (pair_, c) not in KNOWN]
        others += [cross[i, pair_] for i in range(6) if (i, pair_) not in KNOWN]
        start = cross[pair_, pair_] if loss == "own" else candidates.all[pair_]
        expected = expected + torch.stack([start, *others]).logsumexp(0) - start
    model.zero_grad()
    expected.backward()
    theirs = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    parts = [prepared(objective, [row for rows in RELATED[a:b] for row in rows]) for a, b in pairwise(split)]
    total = sum(objective.terms(model, batch)["contrast"].sum for batch in share_window(objective, model, parts))
    model.zero_grad()
    total.backward()
    assert_close(total, expected, **EXACT)
    for name, grad in theirs.items():
        assert_close(dict(model.named_parameters())[name].grad, grad, **EXACT, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("chunk", [2, 256])
def test_who_has_a_negative(monkeypatch, chunk):
    monkeypatch.setattr("vlscale.objectives.match_keys._CHUNK", chunk)
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        groups = int(draw.integers(1, 6))
        keys = torch.from_numpy(draw.integers(0, 2, (groups, 5)))
        keys[:, 3:] = torch.from_numpy(draw.integers(-1, 2, (groups, 2)))
        known = known_matches(keys, keys, 1)
        apart = (~known).any(1) | (~known).any(0)
        any_negative, among_others = negatives_of(keys, 1)
        assert torch.equal(among_others, apart)
        assert torch.equal(any_negative, apart | (keys[:, 0] == 1))
        seen |= {*apart.tolist()}
    assert seen == {True, False}


def test_counts_of_the_step_are_those_of_its_micro_batches():
    objective = contrast(negatives=1)
    units = [unit("pair", 0, negatives=0), pair(1, image=0, words=words_of(0)), unit("text", 2)]
    batches = [prepared(objective, rows) for rows in units]
    keys = torch.cat([objective.window_keys(batch) for batch in batches])
    given, counts = objective.share_keys(batches, keys, 0)
    assert counts == {"contrast_pairs": 1, "contrast_window": 0}  # the second has rewritten captions
    for name, count in counts.items():
        assert sum(objective.counts(batch)[name] for batch in given) == count
    assert [objective.counts(batch)["contrast_pairs"] for batch in batches] == [1, 1, 0]
    empty = replace(batches[1], weight=0.0)
    assert len(objective.window_keys(empty)) == 0
