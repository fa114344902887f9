"""Unified-modal learning: what is masked, the terms against their definitions, and sums that do not know of batches."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.models.unimo_batches import tiny_unimo
from tests.objectives.unified_batches import (
    DATASETS,
    DRAWS,
    KINDS,
    LOSSES,
    NO_DROPOUT,
    VOCABULARY,
    calls,
    learning,
    model_of,
    pack,
    prepared,
    rows_of,
    total_loss,
    unit,
)
from vlscale.config import ObjectivesSection
from vlscale.data.packing import PackedBatch
from vlscale.data.random import Draws
from vlscale.data.views import Role
from vlscale.errors import VlscaleError
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives import build_objectives
from vlscale.objectives.unified import UnifiedLearning, Weights, share_window

EXACT = {"rtol": 1e-9, "atol": 1e-10}
METRIC = {"rtol": 1e-5, "atol": 1e-5}  # metrics are float32
SPLITS = pytest.mark.parametrize("seed", range(4))
WINDOW = pytest.mark.parametrize("window", [False, True], ids=["groups", "window"])


def learning_with(window: bool = False, **section) -> UnifiedLearning:
    return learning(contrast={"window": window, "temperature": 0.5}, **section)


def test_the_recipe_builds_it():
    section = ObjectivesSection.model_validate(
        {
            "unified": {
                "contrast": {"similarity": "dot", "temperature": 0.07, "weight": 0.5, "window": True},
                "visual": {"class_weight": 0, "feature_weight": 2},
                "language": {"geometric": 0.3, "longest_span": 7, "shortest_fragment": 5, "seq2seq_weight": 3},
            }
        }
    )
    built = build_objectives(section, ["unified"], VOCABULARY)["unified"]
    assert isinstance(built, UnifiedLearning)
    assert (built.name, built.needs_class_probs, built.needs_window) == ("unified", False, True)
    assert (built.contrast.similarity, built.contrast.temperature) == ("dot", 0.07)
    assert (built.spans.geometric, built.spans.longest, built.spans.mask) == (0.3, 7, VOCABULARY.mask)
    assert (built.fragments.shortest, built.fragments.cls, built.fragments.sep) == (5, VOCABULARY.cls, VOCABULARY.sep)
    assert built.weights == Weights(0.5, 2, 0, 1, 3)
    assert learning().needs_class_probs
    assert learning().reads_units
    assert not learning(language={"units": False}).reads_units


def test_only_the_rows_that_are_masked_change():
    rows = rows_of(KINDS)
    before, batch = pack(rows), prepared(learning(), rows, torch.float32)
    assert isinstance(batch, UnimoBatch)
    assert not {"unit_ends", "cu_units"} & batch.targets.keys()
    for number, row in enumerate(rows):
        region = slice(*batch.cu_regions[number : number + 2].tolist())
        if row.role == Role.VISUAL:
            masked = batch.region_mask[region]
            assert masked.any()
            assert not batch.features[region][masked].any()
            assert torch.equal(batch.features[region][~masked], before.features[region][~masked])
        else:
            assert torch.equal(batch.features[region], before.features[region])
            assert not batch.region_mask[region].any()
        old, new = (
            each.input_ids[slice(*each.cu_text[number : number + 2].tolist())].tolist() for each in (before, batch)
        )
        prefix = int(batch.prefix_len[number])
        if row.role == Role.SEQ2SEQ:
            assert prefix < len(new) == len(old) + 2
        else:
            assert prefix == len(new) == len(old)
            differ = sum(one != other for one, other in zip(old, new, strict=True))
            assert differ == 0 or (row.role == Role.BIDIRECTIONAL and differ <= 5)
    assert torch.equal(batch.boxes, before.boxes)
    features = before.features[batch.targets["region_positions"]]
    assert torch.equal(batch.targets["region_features"], features)


def test_targets_point_at_what_was_there():
    rows = rows_of(KINDS)
    before, batch = pack(rows), prepared(learning(), rows)
    owner, role = batch.text_owner(), batch.targets["role"]
    positions, labels = batch.targets["bidirectional_positions"], batch.targets["bidirectional_labels"]
    assert (role[owner[positions]] == Role.BIDIRECTIONAL).all()
    within = positions - batch.cu_text[:-1].long()[owner[positions]]
    assert torch.equal(before.input_ids[before.cu_text[:-1].long()[owner[positions]] + within], labels)
    generated = batch.targets["seq2seq_positions"]
    assert (role[owner[generated]] == Role.SEQ2SEQ).all()
    assert torch.equal(batch.input_ids[generated + 1], batch.targets["seq2seq_labels"])
    for kind, where in (("bidirectional", positions), ("seq2seq", generated)):
        pictured = torch.tensor([row.regions > 0 for row in rows])[owner[where]]
        assert torch.equal(batch.targets[f"{kind}_image"], pictured)
        assert pictured.any()
        assert not pictured.all()


def test_terms_are_their_definitions():
    objective, model = learning(), model_of()
    batch = prepared(objective, rows_of(KINDS))
    terms, targets = objective.terms(model, batch), batch.targets
    assert {name for name, term in terms.items() if term.weight} == LOSSES
    positioned = replace(batch, text_positions=targets["text_offsets"] + model.config.first_position)
    encoded = model.encode(positioned)
    regions = targets["region_positions"]
    error = model.predict_features(encoded, regions) - targets["region_features"]
    assert_close(terms["visual_features"].sum, error.square().mean(1).sum(), **EXACT)
    zero = targets["region_features"].square().mean(1).sum()
    assert_close(terms["visual_zero"].sum, zero.float(), **METRIC)
    logits = model.classify_regions(encoded, regions)
    assert_close(terms["visual_classes"].sum, -(targets["class_probs"] * logits.log_softmax(1)).sum(), **EXACT)
    right = (logits.argmax(1) == targets["class_probs"].argmax(1)).sum()
    assert float(terms["visual_accuracy"].sum) == int(right)
    for kind in ("bidirectional", "seq2seq"):
        logits, labels = model.mlm_logits(encoded, targets[f"{kind}_positions"]), targets[f"{kind}_labels"]
        assert_close(terms[kind].sum, F.cross_entropy(logits, labels, reduction="sum"), **EXACT)
        right, pictured = logits.argmax(1) == labels, targets[f"{kind}_image"]
        assert float(terms[f"{kind}_accuracy"].sum) == int(right.sum())
        assert float(terms[f"{kind}_pair_accuracy"].sum) == int(right[pictured].sum())
        assert float(terms[f"{kind}_text_accuracy"].sum) == int(right[~pictured].sum())


def test_counts():
    objective = learning_with(True)
    batch = prepared(objective, rows_of(KINDS))
    counts, targets = objective.counts(batch), batch.targets
    assert counts["visual_regions"] == targets["region_positions"].numel() > 0
    assert counts["contrast_pairs"] == counts["contrast_ranked"] == counts["contrast_window"] == 3
    assert counts["seq2seq_texts"] == 2
    for kind in ("bidirectional", "seq2seq"):
        assert counts[f"{kind}_tokens"] == counts[f"{kind}_pair_tokens"] + counts[f"{kind}_text_tokens"]
        assert min(counts[f"{kind}_pair_tokens"], counts[f"{kind}_text_tokens"]) > 0
    assert "contrast_window" not in learning().counts(prepared(learning(), rows_of(KINDS)))


def test_groups_without_a_negative_are_not_counted_and_the_term_disappears():
    objective, model = learning(), model_of()
    batch = prepared(objective, unit("pair", 0, negatives=0) + unit("pair", 1))
    terms, counts = objective.terms(model, batch), objective.counts(batch)
    alone = prepared(objective, unit("pair", 1))
    assert counts[terms["contrast"].count] == 1
    assert_close(terms["contrast"].sum, objective.terms(model, alone)["contrast"].sum, **EXACT)
    lonely = prepared(objective, unit("pair", 0, negatives=0))
    terms = objective.terms(model, lonely)
    assert objective.counts(lonely)[terms["contrast"].count] == 0
    assert terms["contrast"].sum.item() == 0
    objective = learning_with(True)
    [lonely] = share_window(objective, model, [prepared(objective, unit("pair", 0, negatives=0))])
    assert objective.counts(lonely)[objective.terms(model, lonely)["contrast"].count] == 0
    both = [prepared(objective, unit("pair", number, negatives=0)) for number in (0, 1)]
    both = share_window(objective, model, both)
    assert [objective.counts(each)["contrast_pairs"] for each in both] == [1, 1]


def test_texts_generated_whole_are_counted():
    objective, model = learning(), model_of()
    texts = [unit("text", number, words=words, masked=Role.SEQ2SEQ) for number, words in enumerate((0, 2, 4, 20))]
    rows = [replace(row, ends=None) for [row] in texts]
    batch = prepared(objective, rows)
    assert objective.counts(batch)["seq2seq_texts"] == 4
    assert float(objective.terms(model, batch)["seq2seq_whole"].sum) == 2


@WINDOW
@SPLITS
def test_losses_and_gradients_do_not_depend_on_the_split(seed, window):
    objective, model = learning_with(window), model_of()
    units = [unit(kind, number) for number, kind in enumerate(KINDS)]
    order = random.Random(seed).sample(range(len(units)), len(units))
    cuts = [0, *sorted(random.Random(seed).sample(range(1, len(units)), seed + 1)), len(units)]
    parts = [[row for number in order[a:b] for row in units[number]] for a, b in pairwise(cuts)]
    found = []
    for batches in ([[row for rows in units for row in rows]], parts):
        ready = [prepared(objective, rows) for rows in batches]
        counts: dict[str, float] = {}
        for batch in ready:
            for name, count in objective.counts(batch).items():
                counts[name] = counts.get(name, 0) + count
        if window:
            ready = share_window(objective, model, ready)
        sums: dict[str, torch.Tensor] = {}
        model.zero_grad()
        for batch in ready:
            terms = objective.terms(model, batch)
            total_loss(terms, counts).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.sum.detach()
        grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found.append((counts, sums, grads))
    (counts, sums, grads), (other_counts, other_sums, other_grads) = found
    assert counts == other_counts
    for name in sums:
        tolerance = EXACT if name in LOSSES else METRIC
        assert_close(other_sums[name], sums[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for name in grads:
        assert_close(other_grads[name], grads[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if name != "match_head.bias")


@WINDOW
def test_micro_batches_of_one_step_call_the_same_modules(window):
    objective, model = learning_with(window), model_of()
    contents = (unit("pair", 0), unit("text", 1), [*unit("pair", 2), *unit("pair", 3)], unit("image", 4))
    batches = [prepared(objective, rows) for rows in contents]
    batches.append(replace(batches[0], weight=0.0))
    called, orders = calls(model), []
    for batch in share_window(objective, model, batches) if window else batches:
        called.clear()
        objective.terms(model, batch)
        orders.append([*called])
    assert all(order == orders[0] for order in orders)
    assert orders[0].count("match_head") == (6 if window else 1)


@WINDOW
@pytest.mark.parametrize("kinds", [["text"] * 3, ["image"] * 2, ["pair"] * 2, ["image", "text"]])
def test_every_head_is_in_the_graph_whatever_the_batch_holds(kinds, window):
    objective, model = learning_with(window), model_of()
    called, orders = calls(model), []
    for each in (kinds, KINDS):
        batch = prepared(objective, rows_of(each))
        if window:
            [batch] = share_window(objective, model, [batch])
        called.clear()
        terms = objective.terms(model, batch)
        orders.append([*called])
        model.zero_grad()
        total_loss(terms, objective.counts(batch)).backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        assert all(torch.isfinite(term.sum) for term in terms.values())
    # Nothing is compared where a step has no group: that is the same on all ranks.
    without = [[name for name in order if name != "match_head"] for order in orders]
    assert without[0] == without[1]
    if "pair" in kinds or not window:
        assert orders[0] == orders[1]


@WINDOW
def test_empty_slots_count_nothing_and_keep_a_graph(window):
    objective, model = learning_with(window), model_of()
    full, empty = prepared(objective, rows_of(KINDS)), replace(prepared(objective, rows_of(KINDS[:4])), weight=0.0)
    assert not any(objective.counts(empty).values())
    for batches in ([empty], [full, empty]):
        ready = share_window(objective, model, batches) if window else batches
        terms = objective.terms(model, ready[-1])
        assert all(term.sum.item() == 0 for term in terms.values())
        model.zero_grad()
        total_loss(terms, objective.counts(empty)).backward()
        assert all(not parameter.grad.any() for parameter in model.parameters())
    if window:
        assert len(objective.represent(model, empty)) == 0
        alone, together = (share_window(objective, model, each)[0] for each in ([full], [full, empty]))
        assert torch.equal(alone.targets["window"], together.targets["window"])


def test_masks_do_not_depend_on_the_batch_but_on_pass_dataset_and_seed():
    units = [unit(kind, number) for number, kind in enumerate(KINDS)]
    whole = prepared(learning(), [row for rows in units for row in rows])
    begin = 0
    for rows in units:
        end = begin + len(rows)
        part = prepared(learning(), rows)
        text, region = (slice(*cu[[begin, end]].tolist()) for cu in (whole.cu_text, whole.cu_regions))
        assert torch.equal(part.input_ids, whole.input_ids[text])
        assert torch.equal(part.features, whole.features[region])
        begin = end
    rows = rows_of(KINDS)
    for passes, draws in ((1, DRAWS), (0, [Draws(8, name) for name in DATASETS]), (0, DRAWS[::-1])):
        other = learning().prepare_views(pack(rows, passes), draws)
        assert not torch.equal(other.region_mask, whole.region_mask)
        assert not torch.equal(other.targets["bidirectional_positions"], whole.targets["bidirectional_positions"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@WINDOW
def test_half_precision_models_have_losses_in_float32(dtype, window):
    objective = learning_with(window)
    model = tiny_unimo(max_position_embeddings=64, **NO_DROPOUT)
    found = []
    for each, features in ((model, torch.float32), (model.to(dtype), torch.float16)):
        batch = prepared(objective, rows_of(KINDS), features)
        if window:
            [batch] = share_window(objective, each, [batch])
            assert batch.targets["window"].dtype == torch.float32
        found.append(objective.terms(each, batch))
    for name, term in found[1].items():
        assert term.sum.dtype == torch.float32, name
        if term.weight:
            assert_close(term.sum, found[0][name].sum, rtol=0.05, atol=0.05)


def test_one_batch_travels_packed_and_on_another_device():
    objective, model = learning(), model_of()
    batch = prepared(objective, rows_of(KINDS))
    moved = batch.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.targets.values())
    packed = PackedBatch.pack(batch).unpack()
    for name, tensor in batch.targets.items():
        assert torch.equal(packed.targets[name], tensor), name
    terms = objective.terms(model, batch.map(lambda tensor: tensor.clone()))
    assert_close(terms["seq2seq"].sum, objective.terms(model, batch)["seq2seq"].sum)


def test_positions_start_again_at_fragments():
    objective, model = learning(), model_of()
    batch = prepared(objective, unit("text", 2, words=30, masked=Role.SEQ2SEQ))
    offsets = batch.targets["text_offsets"]
    assert int((offsets == 0).sum()) >= 2
    counted = batch.targets | {"text_offsets": torch.arange(len(offsets))}
    shifted = objective.terms(model, replace(batch, targets=counted))
    assert (shifted["seq2seq"].sum - objective.terms(model, batch)["seq2seq"].sum).abs().item() > 1e-3


def test_the_image_helps_no_text_of_another_row():
    objective, model = learning(), model_of()
    batch = prepared(objective, rows_of(["image", "text"]))
    other = replace(batch, features=batch.features + 1)
    assert_close(objective.terms(model, other)["bidirectional"].sum, objective.terms(model, batch)["bidirectional"].sum)


@WINDOW
def test_empty_captions_and_images_take_no_part_and_are_counted(window):
    objective, model = learning_with(window), model_of()
    silent = [replace(row, words=() if row.words is not None else None, ends=None) for row in unit("pair", 3)]
    blind = [replace(row, regions=0) if row.image == 6 else row for row in unit("pair", 6)]
    rows = [*silent, *unit("pair", 0), *blind, replace(unit("image", 7)[0], regions=0)]
    found = []
    for each in (rows, unit("pair", 0)):
        batch = prepared(objective, each)
        if window:
            [batch] = share_window(objective, model, [batch])
        found.append((objective.terms(model, batch), objective.counts(batch)))
    (terms, counts), (alone, _) = found
    assert_close(terms["contrast"].sum, alone["contrast"].sum, **EXACT)
    assert counts["contrast_ranked"] == 1
    assert (float(terms["contrast_empty"].sum), counts["contrast_units"]) == (2, 3)
    assert (float(terms["visual_empty"].sum), counts["visual_images"]) == (2, 4)


def test_hard_labels_and_weights():
    batch = prepared(learning(), rows_of(KINDS))
    model = model_of()
    hard = learning(visual={"labels": "hard", "background_class": 0, "class_weight": 0.25, "feature_weight": 3})
    terms = hard.terms(model, batch)
    assert (terms["visual_classes"].weight, terms["visual_features"].weight) == (0.25, 3)
    encoded = model.encode(replace(batch, text_positions=batch.targets["text_offsets"] + model.config.first_position))
    logits = model.classify_regions(encoded, batch.targets["region_positions"])
    labels = batch.targets["class_probs"][:, 1:].argmax(1) + 1
    assert_close(terms["visual_classes"].sum, F.cross_entropy(logits, labels, reduction="sum"), **EXACT)
    without = learning(visual={"class_weight": 0})
    assert "visual_classes" not in without.terms(model, prepared(without, rows_of(KINDS)))


def test_what_does_not_fit_is_refused():
    objective, model = learning(), model_of()
    batch = prepared(objective, unit("image", 0))
    with pytest.raises(VlscaleError, match=r"dataset images: the masked regions have no class probabilities"):
        objective.terms(model, replace(batch, targets={k: v for k, v in batch.targets.items() if k != "class_probs"}))
    narrow = batch.targets | {"class_probs": batch.targets["class_probs"][:, 1:]}
    with pytest.raises(VlscaleError, match=r"the masked regions have 6 classes, the model 7 classes"):
        objective.terms(model, replace(batch, targets=narrow))
    bare = pack(unit("image", 0))
    with pytest.raises(VlscaleError, match="needs rows with roles"):
        objective.prepare(replace(bare, targets={}), DRAWS[0])
    assert isinstance(objective.prepare(bare, DRAWS[0]), UnimoBatch)
