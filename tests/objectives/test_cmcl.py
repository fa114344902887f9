"""The contrastive objective: which candidates a group has, and window negatives against one large batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.objectives.unified_batches import learning, model_of, pack, prepared, rows_of, unit
from vlscale.config_unified import ContrastSection
from vlscale.data.views import Role
from vlscale.errors import VlscaleError
from vlscale.objectives.cmcl import Contrast, group_scores
from vlscale.objectives.unified import share_window

EXACT = {"rtol": 1e-9, "atol": 1e-11}
KINDS = ["pair", "text", "pair", "image", "pair", "pair", "pair"]
SIMILARITIES = pytest.mark.parametrize("similarity", ["mul_fc", "dot", "cosine"])
TEMPERATURE = 0.7


def contrast(similarity="mul_fc", window=False, loss="shared"):
    section = {"similarity": similarity, "temperature": TEMPERATURE, "window": window, "window_loss": loss}
    return learning(contrast={**section, "weight": 1})


def score(model, similarity, text, image):
    """[K], of pooled texts and images."""
    if similarity == "mul_fc":
        return F.linear(text * image, model.match_head.weight, model.match_head.bias).squeeze(1)
    if similarity == "dot":
        return (text * image).sum(1)
    return (F.normalize(text, dim=1) * F.normalize(image, dim=1)).sum(1)


def expected_loss(model, batch, similarity, window, loss="shared"):
    """The sum of all groups' losses, written out group by group."""
    encoded = model.encode(batch)
    role, group = batch.targets["role"].tolist(), batch.group.tolist()

    def d(image_row, text_row):
        text = model.pool_text(encoded, torch.tensor([text_row]))
        image = model.pool_image(encoded, torch.tensor([image_row]))
        return (score(model, similarity, text, image) / TEMPERATURE).exp()

    def rows(number, wanted):
        return [row for row, (r, g) in enumerate(zip(role, group, strict=True)) if r == wanted and g == number]

    pairs = sorted({g for r, g in zip(role, group, strict=True) if r == Role.PAIR})
    total = torch.zeros(())
    for number in pairs:
        [image], [text] = rows(number, Role.IMAGE), rows(number, Role.TEXT)
        positive = [d(row, row) for kind in (Role.PAIR, Role.POSITIVE) for row in rows(number, kind)]
        positive += [d(image, text)] + [d(row, text) for row in rows(number, Role.RETRIEVED_IMAGE)]
        positive += [d(image, row) for row in rows(number, Role.RETRIEVED_TEXT)]
        negative, others = [d(row, row) for row in rows(number, Role.NEGATIVE)], []
        for other in pairs if window else []:
            if other != number:
                others += [d(image, *rows(other, Role.TEXT)), d(*rows(other, Role.IMAGE), text)]
        if loss == "own":
            total = total - (d(image, text) / (d(image, text) + sum(others))).log().sum()
        else:
            negative += others
        total = total - (sum(positive) / (sum(positive) + sum(negative))).log().sum()
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_candidates_of_a_group():
    batch = pack(unit("pair", 0, views=2, negatives=3))
    #  0 masked, 1 pair, 2 3 positive, 4 5 6 negative, 7 image, 8 text, 9 10 retrieved images, 11 12 retrieved texts
    found = Contrast(window=True, images=2, texts=2).targets(batch)
    pairs = [*zip(found["contrast_images"].tolist(), found["contrast_texts"].tolist(), strict=True)]
    assert pairs == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 8), (9, 8), (10, 8), (7, 11), (7, 12)]
    assert found["contrast_positive"].tolist() == [True] * 3 + [False] * 3 + [True] * 5
    assert found["contrast_cu"].tolist() == [0, 11]
    window = ("window_images", "window_texts", "window_groups")
    assert [found[name].tolist() for name in window] == [[7], [8], [0]]
    assert not any(Contrast().targets(batch)[name].numel() for name in window)


def test_groups_without_contrast_have_no_candidates_wherever_they_stand():
    batch = pack(rows_of(["text", "pair", "image", "pair"]))
    found = Contrast(window=True).targets(batch)
    assert found["contrast_cu"].tolist() == [0, 7, 14]
    assert found["window_groups"].tolist() == [0, 1]
    nothing = Contrast(window=True).targets(pack(rows_of(["text", "image"])))
    assert nothing["contrast_cu"].tolist() == [0]
    assert not nothing["contrast_images"].numel()


def test_a_pair_whose_image_has_no_region_is_not_compared():
    empty = [replace(row, regions=0) for row in unit("pair", 0) if row.role != Role.RETRIEVED_IMAGE]
    found = Contrast(window=True).targets(pack([*empty, *unit("pair", 1)]))
    assert found["contrast_cu"].tolist() == [0, 7]
    assert found["window_images"].numel() == 1
    assert int(found["contrast_images"].min()) >= len(empty)


@pytest.mark.parametrize("missing", [Role.IMAGE, Role.TEXT])
def test_retrieved_views_without_their_counterpart_are_refused(missing):
    rows = [row for row in unit("pair", 0) if row.role != missing]
    with pytest.raises(
        VlscaleError, match=rf"dataset \w+, pass 0, example 1: a \w+ row, and its group has no {missing.name} row"
    ):
        Contrast().targets(pack(rows))


@SIMILARITIES
def test_loss_and_gradient_are_the_formula(similarity):
    objective, model = contrast(similarity), model_of()
    batch = prepared(objective, rows_of(KINDS))
    term = objective.terms(model, batch)["contrast"]
    expected = expected_loss(model, batch, similarity, False)
    assert_close(term.sum, expected, **EXACT)
    ours, theirs = gradients(model, term.sum), gradients(model, expected)
    for name, grad in theirs.items():
        assert_close(ours[name], grad, **EXACT)
    assert objective.counts(batch)["contrast_ranked"] == 5
    assert term.weight == 1


@SIMILARITIES
@pytest.mark.parametrize("loss", ["shared", "own"])
@pytest.mark.parametrize("split", [[0, 7], [0, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_window_of_any_split_is_that_of_one_large_batch(similarity, loss, split):
    objective, model = contrast(similarity, True, loss), model_of()
    units = [unit(kind, number) for number, kind in enumerate(KINDS)]
    whole = prepared(objective, [row for rows in units for row in rows])
    expected = expected_loss(model, whole, similarity, True, loss)
    theirs = gradients(model, expected)
    parts = []
    for begin, end in pairwise(split):
        parts.append(prepared(objective, [row for rows in units[begin:end] for row in rows]))
    terms = [objective.terms(model, batch)["contrast"] for batch in share_window(objective, model, parts)]
    total = sum(term.sum for term in terms)
    assert_close(total, expected, **EXACT)
    ours = gradients(model, total)
    assert any(grad.abs().max() > 1e-3 for grad in theirs.values())
    for name, grad in theirs.items():
        assert_close(ours[name], grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_window_is_exact_with_dropout_if_both_passes_draw_alike():
    objective = contrast(window=True)
    model = model_of(hidden_dropout=0.3, attention_dropout=0.2, match_dropout=0.4).train()
    parts = [prepared(objective, unit("pair", number)) for number in range(3)]

    def loss():
        """Losses of all groups at once, with each micro-batch's own dropout."""
        sums, candidates = [], []
        for number, batch in enumerate(parts):
            torch.manual_seed(number)
            candidates.append(objective.contrast.score(model, model.encode(batch), batch.targets))
        images, texts = (torch.cat([getattr(each, kind) for each in candidates]) for kind in ("images", "texts"))
        cross = model.match_all(texts, images) / TEMPERATURE
        hidden = torch.eye(3, dtype=torch.bool)
        for number, each in enumerate(candidates):
            others = torch.cat([cross[number][~hidden[number]], cross[:, number][~hidden[number]]])
            sums.append(torch.cat([each.all, others]).logsumexp(0) - each.positive.sum())
        return sum(sums)

    theirs = gradients(model, loss())
    parts, _ = objective.share_keys(parts, torch.cat([objective.window_keys(batch) for batch in parts]), 0)
    with torch.no_grad():
        found = []
        for number, batch in enumerate(parts):
            torch.manual_seed(number)
            found.append(objective.represent(model, batch))
    total = 0
    for number, batch in enumerate(parts):
        torch.manual_seed(number)
        targets = batch.targets | {"window": torch.cat(found)}
        total = total + objective.terms(model, replace(batch, targets=targets))["contrast"].sum
    ours = gradients(model, total)
    for name, grad in theirs.items():
        assert_close(ours[name], grad, **EXACT)


def test_window_in_chunks_is_the_same(monkeypatch):
    objective, model = contrast(window=True), model_of()
    batches = [prepared(objective, unit("pair", number)) for number in range(4)]
    shared = share_window(objective, model, batches)
    whole = gradients(model, objective.terms(model, shared[0])["contrast"].sum)
    monkeypatch.setattr("vlscale.objectives.cmcl._CHUNK", 3)
    for name, grad in gradients(model, objective.terms(model, shared[0])["contrast"].sum).items():
        assert_close(grad, whole[name], **EXACT)


@pytest.mark.parametrize("loss", ["shared", "own"])
def test_a_group_alone_in_its_window_has_the_loss_without_one(loss):
    plain, objective, model = contrast(), contrast(window=True, loss=loss), model_of()
    rows = unit("pair", 0)
    [batch] = share_window(objective, model, [prepared(objective, rows)])
    terms = objective.terms(model, batch)
    without = plain.terms(model, prepared(plain, rows))["contrast"].sum
    assert_close(terms["contrast"].sum, without, **EXACT)
    for name, grad in gradients(model, without).items():
        assert_close(gradients(model, objective.terms(model, batch)["contrast"].sum)[name], grad, **EXACT)
    assert float(terms["contrast_window_gap"].sum) == 0


def test_window_metrics():
    objective, model = contrast(window=True), model_of()
    batches = share_window(
        objective, model, [prepared(objective, rows_of(KINDS[:3])), prepared(objective, unit("pair", 5))]
    )
    right, gap, count = 0.0, 0.0, 0.0
    for batch in batches:
        terms = objective.terms(model, batch)
        assert {term.count for term in terms.values()} <= set(objective.counts(batch))
        right += float(terms["contrast_window_accuracy"].sum)
        gap += float(terms["contrast_window_gap"].sum)
        count += objective.counts(batch)["contrast_window"]
    width = model.config.hidden_size
    images, texts, _ = batches[0].targets["window"].split([width, width, 1], 1)
    scores = model.match_all(texts, images).detach()
    own, hidden = scores.diagonal(), torch.eye(3, dtype=torch.bool)
    best = torch.cat([scores.masked_fill(hidden, -99), scores.t().masked_fill(hidden, -99)], 1).amax(1)
    assert count == 3
    assert right == int((own > best).sum())
    mean = (scores.masked_fill(hidden, 0).sum(1) + scores.masked_fill(hidden, 0).sum(0)) / 4
    assert gap == pytest.approx(float((own - mean).sum()))


def test_accuracy_and_gap_of_groups_with_negatives():
    scores = torch.tensor([2.0, 1.0, 3.0, 5.0, 1.0, 0.5, 7.0, 0.0])
    positive = torch.tensor([True, True, False, True, True, False, True, True])
    joint = torch.tensor([True, True, True, False, True, True, True, True])
    ranked, right, gap = group_scores(scores, positive, joint, torch.tensor([0, 3, 6, 8], dtype=torch.int32))
    assert ranked.tolist() == [True, True, False]
    assert right.tolist() == [False, True, False]
    assert gap.tolist() == [1.5 - 3.0, 1.0 - 0.5, 0.0]


def test_a_batch_needs_its_window():
    objective, model = contrast(window=True), model_of()
    batch = prepared(objective, unit("pair", 0))
    with pytest.raises(VlscaleError, match=r"contrast\.window: the batch has no window"):
        objective.terms(model, batch)
    [keyed], _ = objective.share_keys([batch], objective.window_keys(batch), 0)
    with pytest.raises(VlscaleError, match=r"contrast\.window: the batch has no window"):
        objective.terms(model, keyed)
    wrong = keyed.targets | {"window": torch.zeros(3, 5)}
    with pytest.raises(VlscaleError, match=r"the window is \[3, 5\] with 1 groups"):
        objective.terms(model, replace(batch, targets=wrong))


def test_scores_of_all_pairs_are_those_of_each():
    for fusion in ("mul", "sum"):
        model = model_of(match_fusion=fusion)
        texts, images = (torch.randn(count, model.config.hidden_size).double() for count in (3, 4))
        torch.nn.init.normal_(model.match_head.bias)
        every = model.match_all(texts, images)
        for i in range(4):
            for t in range(3):
                assert_close(every[i, t], model.match_pooled(texts[t : t + 1], images[i : i + 1])[0], **EXACT)
        model.match_all(texts.requires_grad_(), images, learn=False).sum().backward()
        assert model.match_head.weight.grad is None
        assert texts.grad is not None
        assert model.half().match_all(texts.half(), images.half()).dtype == torch.float32


def test_weight_zero_of_contrast_has_no_window():
    assert not learning(contrast={"weight": 0, "window": True}).needs_window


def test_a_sum_of_its_own_needs_a_window():
    assert ContrastSection(window=True, window_loss="own").window_loss == "own"
    with pytest.raises(ValueError, match="window_loss has an effect with window: true only"):
        ContrastSection(window_loss="own")


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-9, 1e-15])
def test_cosine_is_one_of_what_is_alike_down_to_tiny_norms(scale):
    cosine = Contrast(similarity="cosine")
    pooled = (torch.relu(torch.randn(3, 64, generator=torch.Generator().manual_seed(0))) * scale).requires_grad_()
    directed = cosine._directed(pooled)
    assert_close((directed * directed).sum(1), torch.ones(3), rtol=1e-5, atol=0)
    (directed[0] * directed[1]).sum().backward()
    assert torch.isfinite(pooled.grad).all()
    assert pooled.grad[:2].abs().max() > 1e-3


def test_zero_pools_have_cosine_and_gradient_zero():
    pooled = torch.zeros(2, 64, requires_grad=True)
    directed = Contrast(similarity="cosine")._directed(pooled)
    assert not directed.any()
    directed.sum().backward()
    assert not pooled.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_own_and_cross_scores_round_alike_in_half_precision(dtype):
    model = model_of().to(dtype)
    draw = torch.Generator().manual_seed(0)
    texts, images = (torch.rand(3, model.config.hidden_size, generator=draw).mul(900).to(dtype) for _ in range(2))
    own, cross = model.match_pooled(texts, images), model.match_all(texts, images)
    assert own.dtype == cross.dtype == torch.float32
    assert torch.isfinite(own).all()  # the products exceed float16
    assert_close(own, cross.diagonal(), rtol=1e-4, atol=1e-3)
