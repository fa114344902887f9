"""Losses, predictions, transport plans and gradients of UNITER's authors, through the objectives' public path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_batches import GRADIENT, OUTPUT, golden_batch, golden_meta, golden_model, load_golden
from vlscale.config import ObjectivesSection
from vlscale.convert.uniter import to_official
from vlscale.data.schema import Vocabulary
from vlscale.kernels.ipot import cosine_cost
from vlscale.objectives import Objective, Term, build_objectives
from vlscale.objectives.itm import ImageTextMatching
from vlscale.objectives.wra import WordRegionAlignment
from vlscale.ragged import RaggedBatch

pytestmark = pytest.mark.golden


def objective_of(task: str, wra: str = "reference") -> Objective:
    meta = golden_meta()
    tokens = [f"w{i}" for i in range(meta["model"]["vocab_size"])]
    for role in ("cls", "sep", "mask"):
        tokens[meta[role]] = f"[{role.upper()}]"
    free = [i for i, token in enumerate(tokens) if token.startswith("w")]
    tokens[free[0]], tokens[free[1]] = "[PAD]", "[UNK]"
    section = ObjectivesSection.model_validate(
        {"mrm": {"background_class": 0}, "wra": {"loss": wra, "weight": meta["itm_ot_lambda"]}}
    )
    return build_objectives(section, [task], Vocabulary.from_tokens(tokens))[task]


def mean(terms: dict[str, Term], counts: dict[str, float], names: tuple[str, ...]) -> Tensor:
    """The scalar that training would minimise: weighted means of the named terms."""
    return torch.stack([terms[name].weight * terms[name].sum / counts[terms[name].count] for name in names]).sum()


def check_gradients(model, loss: Tensor, golden: dict[str, Tensor], prefix: str) -> None:
    """Compare [L2 norm, sum] of every gradient under its published name; the others must have none, or zero."""
    expected = {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}
    assert expected
    model.zero_grad(set_to_none=True)
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    published = to_official(ours, partial=True, tied=False)
    assert set(expected) <= set(published)
    for name, gradient in published.items():
        if name in expected:
            measured = torch.stack([gradient.double().norm(), gradient.double().sum()])
            torch.testing.assert_close(measured, expected[name], **GRADIENT, msg=lambda text, at=name: f"{at}: {text}")
        else:
            assert not gradient.any(), name


def single_target_losses(model, objective: Objective, batch: RaggedBatch, per_target: tuple[str, ...]) -> Tensor:
    """The objective's loss for each target alone, the inputs staying as they are: float [K]."""
    losses = []
    for k in range(batch.targets[per_target[0]].shape[0]):
        one = {name: batch.targets[name][k : k + 1] for name in per_target}
        losses.append(objective.terms(model, replace(batch, targets=one))[objective.name].sum)
    return torch.stack(losses)


CASES = [
    ("mlm", "mlm", ("token_positions", "token_labels"), "out.loss", "gradnorm."),
    ("mrfr", "mrfr", ("region_positions", "region_features"), "out.loss", "gradnorm."),
    ("mrc", "mrc", ("region_positions", "class_probs"), "out.mrc_loss", "gradnorm.mrc."),
    ("mrckl", "mrc", ("region_positions", "class_probs"), "out.mrckl_loss", "gradnorm.mrckl."),
]


@pytest.mark.parametrize("attention_backend", ["padded", "packed"])
@pytest.mark.parametrize(("task", "file", "per_target", "loss", "gradients"), CASES, ids=[case[0] for case in CASES])
def test_masked_objectives(task, file, per_target, loss, gradients, attention_backend):
    golden, objective = load_golden(file), objective_of(task)
    model, batch = golden_model(attention_backend=attention_backend), golden_batch(golden, task)
    expected = golden[loss].flatten(1).mean(1) if golden[loss].dim() > 1 else golden[loss]
    torch.testing.assert_close(single_target_losses(model, objective, batch, per_target), expected, **OUTPUT)
    counts = objective.counts(batch)
    assert counts == {objective.terms(model, batch)[task].count: len(expected)}
    total = mean(objective.terms(model, batch), counts, (task,))
    torch.testing.assert_close(total, golden[loss].mean(), **OUTPUT)
    check_gradients(model, total, golden, gradients)


@torch.no_grad()
def test_predictions():
    model = golden_model()
    heads = {"mlm": ("mlm_logits", "token_positions"), "mrfr": ("predict_features", "region_positions")}
    heads["mrc"] = ("classify_regions", "region_positions")
    for task, (head, positions) in heads.items():
        golden = load_golden(task)
        batch = golden_batch(golden, task)
        got = getattr(model, head)(model.encode(batch), batch.targets[positions])
        torch.testing.assert_close(got, golden["out.pred" if task == "mrfr" else "out.logits"], **OUTPUT)


@torch.no_grad()
def test_matching_scores_and_transport():
    golden, model = load_golden("itm"), golden_model()
    objective = objective_of("itm")
    assert isinstance(objective, ImageTextMatching)
    assert isinstance(objective.alignment, WordRegionAlignment)
    batch = objective.prepare(golden_batch(golden, "itm"), draws=None)  # type: ignore[arg-type]
    encoded, labels = model.encode(batch), batch.targets["itm_labels"]
    scores = model.itm_logits(encoded)
    torch.testing.assert_close(scores, golden["out.scores"], **OUTPUT)
    torch.testing.assert_close(F.cross_entropy(scores, labels, reduction="none"), golden["out.loss"], **OUTPUT)
    distance, plan = objective.alignment.align(encoded, batch)
    torch.testing.assert_close(distance, golden["out.ot_dist"], **OUTPUT)
    torch.testing.assert_close(distance[labels == 1], golden["out.ot_pos"], **OUTPUT)
    torch.testing.assert_close(distance[labels == 0], golden["out.ot_neg"], **OUTPUT)
    torch.testing.assert_close(plan, golden["out.T"][:, : plan.shape[1], : plan.shape[2]], **OUTPUT)
    lengths, counts = batch.text_lengths, batch.region_counts
    padded = [torch.nn.utils.rnn.pad_sequence(part.split(sizes.tolist()), batch_first=True)
              for part, sizes in ((encoded.text, lengths), (encoded.regions, counts))]  # fmt: skip
    cost = cosine_cost(*padded, lengths, counts)
    torch.testing.assert_close(cost, golden["out.cost"][:, : cost.shape[1], : cost.shape[2]], **OUTPUT)


@pytest.mark.parametrize("attention_backend", ["padded", "packed"])
def test_matching_losses_and_gradients(attention_backend):
    golden, model = load_golden("itm"), golden_model(attention_backend=attention_backend)
    batch = golden_batch(golden, "itm")
    for wra, names, prefix in (("off", ("itm",), "itm_only"), ("reference", ("itm", "wra"), "itm_ot")):
        objective = objective_of("itm", wra)
        terms, counts = objective.terms(model, batch), objective.counts(batch)
        total = mean(terms, counts, names)
        if wra == "off":
            assert "wra" not in terms
            torch.testing.assert_close(total, golden["out.loss"].mean(), **OUTPUT)
        else:
            torch.testing.assert_close(
                mean(terms, counts, ("wra",)) / terms["wra"].weight, golden["out.ot_loss"], **OUTPUT
            )
            torch.testing.assert_close(total, golden["out.total_loss"], **OUTPUT)
        check_gradients(model, total, golden, f"gradnorm.{prefix}.")
