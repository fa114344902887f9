"""ZeRO stages, process counts, token ceilings and backends change speed, not what is learnt.

All runs use fp32, dropout 0, and tasks that alternate. They are compared with a loop written here in plain PyTorch: a
whole step as one batch, no DeepSpeed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.multiprocess.launcher import all_well, run_many
from tests.multiprocess.plain import plain_optimizer, plain_update
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe
from vlscale.config import Recipe, parse_recipe
from vlscale.data.collate import collate
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.deal import deal
from vlscale.data.plan import Plan
from vlscale.data.random import Draws
from vlscale.models.registry import build_model
from vlscale.objectives import build_objectives
from vlscale.ragged import RaggedBatch

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 20
TOLERANCE = 1e-5
NO_DROPOUT = ["--set", "model.config.hidden_dropout=0", "--set", "model.config.attention_dropout=0"]
TWO_PROCESSES: dict[str, tuple[int, list[str]]] = {
    "zero0": (0, []),
    "zero1": (1, []),
    "zero2": (2, []),
    "zero3": (3, []),
    "small_micro_batches": (2, ["--set", "batch.micro_batch_tokens=100"]),
    "large_micro_batches": (2, ["--set", "batch.micro_batch_tokens=4000"]),
    "checkpointed": (2, ["--set", "activation_checkpointing=full"]),
    "checkpointed_zero3": (3, ["--set", "activation_checkpointing=every 2"]),
    "packed": (2, ["--set", "model.config.attention_backend=packed"]),
    "workers": (1, ["--set", "data.workers=1"]),
}
ONE_PROCESS: dict[str, tuple[int, list[str]]] = {"one_zero0": (0, []), "one_zero3": (3, [])}
FOUR_PROCESSES: dict[str, tuple[int, list[str]]] = {"four_zero2": (2, [])}
CASES = [*TWO_PROCESSES, *ONE_PROCESS, *FOUR_PROCESSES]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case once."""
    root = tmp_path_factory.mktemp("parity")
    write_data(root)
    write_recipe(root / "small.yaml", recipe(root))
    for processes, cases in ((2, TWO_PROCESSES), (1, ONE_PROCESS), (4, FOUR_PROCESSES)):
        lines = []
        for name, (stage, more) in cases.items():
            config = write_ds_config(root / f"small_{name}.json", stage)
            paths = ["--ds_config", str(config), "--recipe", str(root / "small.yaml"), "--run_dir", str(root / name)]
            lines.append([*paths, *NO_DROPOUT, *more])
        all_well(run_many(lines, root / f"{processes}.json", processes, VLSCALE_RECORD_BATCHES="1"))
    return root


@pytest.fixture(scope="module")
def plain(root: Path) -> tuple[list[tuple[str, float, float]], dict[str, torch.Tensor]]:
    """(task, loss, gradient norm) of each step, and the final weights, of the plain loop."""
    content = recipe(root)
    content["model"]["config"] |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return plain_loop(parse_recipe(content, "test"), open_dataset("toy", root / "train"))


def plain_loop(settings: Recipe, dataset: Dataset) -> tuple[list[tuple[str, float, float]], dict[str, torch.Tensor]]:
    """Train as a textbook would."""
    plan = Plan.from_recipe(settings, {"toy": dataset})
    objectives = build_objectives(settings.objectives, settings.tasks, dataset.vocabulary)
    torch.manual_seed(settings.seed)
    facts = {"vocab_size": dataset.vocabulary.size, "feature_dim": dataset.feature_dim}
    model = build_model(settings.model, num_classes=dataset.num_classes, **facts)
    optimizer = plain_optimizer(model, settings.optimizer)
    seen, position = [], plan.start()
    for index in range(STEPS):
        step, position = plan.step(position)
        batch = whole_step(step, dataset, objectives[step.task], settings)
        counts = objectives[step.task].counts(batch)
        terms = objectives[step.task].terms(model, batch)
        loss = sum(term.weight * term.sum / max(counts[term.count], 1) for term in terms.values())
        norm = plain_update(model, optimizer, loss, index, settings)
        seen.append((step.task, float(loss.detach()), norm))
    return seen, {name: tensor.detach() for name, tensor in model.named_parameters()}


def whole_step(step: Any, dataset: Dataset, objective: Any, settings: Recipe) -> RaggedBatch:
    """All examples of a step as one batch, masked and with its targets."""
    (micro,) = deal(step, 1, 1, 1 << 30)[0]
    words = dataset.vocabulary
    batch = collate(dataset, micro, settings.data.max_regions, words.cls, words.sep)
    batch = objective.prepare(batch, Draws(settings.seed, dataset.name))
    if objective.needs_class_probs:
        rows = batch.region_rows[batch.targets["region_positions"]].numpy()
        batch.targets["class_probs"] = torch.from_numpy(dataset.classes.probs(rows))  # type: ignore[union-attr]
    return batch


def rows(run: Path) -> list[dict[str, Any]]:
    """Rows of training steps."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in found if "lr" in row]


def evaluated(run: Path) -> dict[str, Any]:
    """What the last evaluation found."""
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {name: value for name, value in last.items() if name.startswith("eval/")}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_are_those_of_the_plain_loop(root: Path, plain: Any, case: str) -> None:
    found = rows(root / case)
    assert len(found) == STEPS
    assert len({task for task, *_ in plain[0]}) == 4
    for row, (task, loss, norm) in zip(found, plain[0], strict=True):
        assert row["task"] == task
        assert row[f"{task}/loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert row[f"{task}/grad_norm"] == pytest.approx(norm, rel=2 * TOLERANCE)
    assert any(norm > 0.5 for *_, norm in plain[0]), "nothing was clipped"


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_plain_loop(root: Path, plain: Any, case: str) -> None:
    found = load_file(root / case / "model" / "model.safetensors")
    assert found.keys() == plain[1].keys()
    for name, expected in plain[1].items():
        error = (observable(name, found[name]) - observable(name, expected)).norm() / expected.norm()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


def observable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the key biases: a softmax does not see them, their gradient is zero but for rounding, and Adam
    turns rounding into steps."""
    if not name.endswith("qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("case", CASES[1:])
def test_examples_masks_partners_and_tasks_are_identical(root: Path, case: str) -> None:
    first = (root / CASES[0] / "batches.jsonl").read_text(encoding="utf-8")
    assert len(first.splitlines()) == STEPS
    assert len({json.loads(line)["digest"] for line in first.splitlines()}) == STEPS
    assert (root / case / "batches.jsonl").read_text(encoding="utf-8") == first


@pytest.mark.parametrize("case", CASES[1:])
def test_evaluation_does_not_depend_on_how_it_is_dealt(root: Path, case: str) -> None:
    first = evaluated(root / CASES[0])
    assert len(first) >= 10
    assert evaluated(root / case) == pytest.approx(first, rel=1e-4, abs=1e-5)
