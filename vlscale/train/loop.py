"""The training loop: from a window of micro-batches to an optimiser step, and what happens between steps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from vlscale.config import Recipe, resolved
from vlscale.data.dataset import Dataset
from vlscale.data.deal import Rule, fill_advice
from vlscale.data.loader import Loader, Preparer, Window
from vlscale.data.plan import Plan, Position, Step
from vlscale.data.prefetch import Prefetcher, class_tasks
from vlscale.errors import VlscaleError
from vlscale.models.base import PretrainingModel
from vlscale.models.folder import WEIGHTS_FILE, write_folder
from vlscale.objectives import Objective
from vlscale.ragged import RaggedBatch
from vlscale.train.checkpoint import Checkpoints, Manifest, recipe_changes
from vlscale.train.describe import data_lines
from vlscale.train.diagnosis import stop_with_diagnosis
from vlscale.train.engine import Engine, StepReport
from vlscale.train.evaluate import Evaluation
from vlscale.train.metrics import Interval, MetricsWriter, TermSums, peak_flops
from vlscale.train.processes import Processes
from vlscale.train.progress import Reporter
from vlscale.train.record import BatchRecord
from vlscale.train.resilience import PREEMPTED, stop_asked
from vlscale.train.run_folder import RunFolder
from vlscale.train.schedule import learning_rate
from vlscale.train.window import with_keys, with_window

_MOST_COUNTS = 28


@dataclass
class TrainState:
    """Where training stands: ``position`` in the plan, and optimiser steps ``taken`` (overflow skips excluded).

    ``saved`` is the step of the newest checkpoint, -1 if there is none.
    """

    position: Position
    taken: int = 0
    saved: int = -1


@dataclass
class Training:
    """Everything that the loop works with; built in ``launch/pretrain.py``."""

    processes: Processes
    recipe: Recipe
    precision: str
    plan: Plan
    datasets: Mapping[str, Dataset]
    objectives: Mapping[str, Objective]
    engine: Engine
    model: PretrainingModel
    evaluation: Evaluation
    folder: RunFolder
    checkpoints: Checkpoints
    reporter: Reporter

    def describe(self, recipe_path: Path, ds_config: Mapping[str, Any], started: str) -> None:
        """Say, and write to the run folder, what is about to be trained on what."""
        processes, engine, plan = self.processes, self.engine, self.plan
        size = sum(getattr(tensor, "ds_numel", tensor.numel()) for tensor in self.model.parameters())
        lines = [
            f"recipe {recipe_path} -> {self.folder.path}",
            f"model: {size / 1e6:.1f} M parameters; {started}",
            *data_lines(plan, self.evaluation.left_out),
            f"{processes.world_size} processes on {processes.device.type}, {self.precision}, ZeRO stage "
            f"{engine.stage}, {engine.accumulation} micro-batches of at most {self.recipe.batch.micro_batch_tokens} "
            "tokens per step",
            *filter(None, [fill_advice(plan, processes.world_size)]),
        ]
        for line in lines:
            self.reporter.line(line)
        if processes.main:
            facts = {
                "world_size": processes.world_size,
                "accumulation": engine.accumulation,
                "plan": plan.fingerprint,
                "left_out": plan.left_out,
                "left_out_views": plan.left_out_views,
                "dropped": plan.dropped,
                "weights": started,
            }
            self.folder.describe(self.recipe, ds_config, facts)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks, the bar and the log."""
        self.reporter.close()
        self.engine.close()

    @property
    def model_facts(self) -> dict[str, Any]:
        """The model's configuration as JSON types."""
        return self.model.config.model_dump(mode="json")


def train_step(
    run: Training, step: Step, window: list[RaggedBatch], counts: Mapping[str, float], lr: float, sums: TermSums
) -> StepReport:
    """One optimiser step: forward and backward of every micro-batch, then the update."""
    run.engine.begin(step.task, lr)
    forward_backward(run, step, window, counts, sums)
    return run.engine.step()


def forward_backward(
    run: Training, step: Step, window: list[RaggedBatch], counts: Mapping[str, float], sums: TermSums
) -> None:
    """Accumulate the gradient of every term's mean over the GLOBAL batch.

    DeepSpeed divides by the accumulation and by the number of processes: by the slots of the step. So each term's sum
    is multiplied by slots / count, where the count is the whole step's (``loss_normalization: exact``) or the
    micro-batch's own (``reference``: a mean of means, to which empty slots add zero).
    """
    processes, objective = run.processes, run.objectives[step.task]
    slots = processes.world_size * len(window)

    def seed(micro: int) -> None:
        seed_micro_batch(run.recipe.seed, step.index, processes.rank, micro)

    for micro, batch in enumerate(with_window(run.engine, processes, objective, window, seed)):
        seed(micro)
        terms = run.engine.forward(step.task, batch.to(processes.device))
        denominators = counts if run.recipe.loss_normalization == "exact" else objective.counts(batch)
        losses = [
            term.sum * (term.weight * slots / max(denominators[term.count], 1.0))
            for term in terms.values()
            if term.weight
        ]
        run.engine.backward(torch.stack(losses).sum())
        sums.add(step.task, terms)


def train(run: Training, state: TrainState) -> None:
    """Train from ``state`` until the schedule's steps are taken; log, evaluate and save on the way.

    Raises:
        VlscaleError: a bad row, or gradients that are not finite; the same in all processes.
        SystemExit: some process was asked to stop (see ``resilience.py``): saved, with status ``PREEMPTED``.
    """
    recipe, engine, processes = run.recipe, run.engine, run.processes
    total = recipe.schedule.total_steps
    if state.taken >= total:
        _already_complete(run, total)
        return
    interval = _interval(run)
    record = BatchRecord(run.folder.path, processes)
    writer = MetricsWriter(run.folder.path, state.position.step, recipe.logging.tensorboard) if processes.main else None
    run.reporter.start(state.taken, total)
    with _loader(run, state.position) as loader, nullcontext() if writer is None else closing(writer):
        while state.taken < total:
            (step, after, window), counts, stop = next_window(run, loader)
            if stop:
                _save_and_stop(run, state, total)
            interval.add_window(window, loader.last_wait_s)
            record.add(step.index, window)
            lr = learning_rate(recipe.schedule, recipe.optimizer.lr, state.taken)
            report = train_step(run, step, window, counts, lr, interval.terms)
            if not report.applied and (engine.loss_scales is None or report.collapsed):
                _explain(run, step, window, counts, report)
            interval.terms.add_counts(step.task, counts)
            interval.add_step(step.task, report, engine.loss_scales)
            state.position, state.taken = after, state.taken + report.applied
            run.reporter.step(state.taken, total, step.task)
            _between_steps(run, state, step, interval, writer, lr)


def _save_and_stop(run: Training, state: TrainState, total: int) -> NoReturn:
    if state.saved != state.position.step:
        save(run, state)
    run.reporter.line(f"asked to stop: saved after {state.taken} of {total} steps; go on with --resume auto")
    raise SystemExit(PREEMPTED)


def _already_complete(run: Training, total: int) -> None:
    run.reporter.line(f"all {total} steps have been taken; raise schedule.total_steps to go on")
    if run.processes.total([float(run.processes.main and not (run.folder.model / WEIGHTS_FILE).is_file())])[0]:
        export(run)


def _between_steps(
    run: Training, state: TrainState, step: Step, interval: Interval, writer: MetricsWriter | None, lr: float
) -> None:
    recipe, done = run.recipe, state.position.step
    last = state.taken >= recipe.schedule.total_steps
    if last or done % recipe.logging.every == 0:
        row = {"lr": lr, **interval.row(run.processes)}
        run.reporter.row(state.taken, recipe.schedule.total_steps, step.task, lr, row)
        if writer is not None:
            writer.write(done, row, task=step.task, taken=state.taken)
        interval.reset()
    if run.evaluation and (last or (recipe.evaluation.every and done % recipe.evaluation.every == 0)):
        with interval.paused():
            found = run.evaluation.run(run.engine, run.processes)
        run.reporter.line(f"step {state.taken} held out, {_summary(found)}")
        if writer is not None:
            writer.write(done, found, taken=state.taken)
    if last or (recipe.checkpoint.every and done % recipe.checkpoint.every == 0):
        with interval.paused():
            save(run, state)


def next_window(run: Training, loader: Loader) -> tuple[Window, dict[str, float], bool]:
    """Read the next window and add up its counts over all ranks: one message of fixed size per step.

    The same message carries whether reading failed anywhere, whether anybody was asked to stop, and a hash of what
    each rank is about to do. Ranks that disagree about the task, or about the number of micro-steps, would wait for
    each other for ever.

    Returns:
        The window, the counts of the step over all ranks, and whether to stop instead of running it.

    Raises:
        VlscaleError: reading failed in some process, or the processes do not run the same step.
    """
    window, failure, counts, tag = None, None, dict[str, float](), 0
    try:
        window = next(loader)
    except VlscaleError as error:
        failure = str(error)
    else:
        step, _, batches = window
        for batch in batches:
            for name, count in run.objectives[step.task].counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        what = (step.index, step.task, step.dataset, len(batches), sorted(counts), run.plan.fingerprint)
        tag = int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=2).digest(), "little")
    names = sorted(counts)
    padding = [0.0] * (_MOST_COUNTS - len(names))
    # Equal tags obey W * sum(tag^2) = (sum tag)^2 (Cauchy and Schwarz), and no others do.
    flags = [float(failure is not None), float(stop_asked())]
    message = [*flags, tag, tag * tag, *(counts[name] for name in names), *padding]
    failed, stop, tags, squares, *totals = run.processes.total(message)
    if failed:
        run.processes.fail_together(failure)
    assert window is not None
    if run.processes.world_size * int(squares) != int(tags) ** 2:
        run.processes.fail_together(
            f"step {window[0].index}: the processes are about to run different steps; do all nodes see the same recipe "
            f"and the same data sets?"
        )
    step, after, batches = window
    batches, of_keys = with_keys(run.processes, run.objectives[step.task], batches)
    return (step, after, batches), {**dict(zip(names, totals, strict=False)), **of_keys}, stop > 0


def seed_micro_batch(seed: int, step: int, rank: int, micro: int) -> None:
    """Seed torch's generators from what is about to run, so that dropout does not depend on what ran before."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{rank}\0{micro}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def restore(run: Training, found: tuple[Path, Manifest] | None) -> TrainState:
    """Load the checkpoint that :meth:`Checkpoints.find` found, or begin at the beginning.

    Raises:
        VlscaleError: see :meth:`Checkpoints.load`; or the plan has changed since.
    """
    if found is None:
        return TrainState(run.plan.start())
    folder, manifest = found
    with run.processes.agreed():
        run.plan.check_resume(manifest.fingerprint)
        position, taken = _read_trainer(folder, manifest.trainer)
    run.checkpoints.load(run.engine, folder, manifest, run.precision, run.model_facts)
    if run.engine.loss_scales is not None:
        run.engine.loss_scales.load(manifest.trainer.get("loss_scales") or {})
    run.reporter.line(f"resumed from {folder}: {taken} steps taken")
    changes = recipe_changes(manifest.recipe, resolved(run.recipe))
    if changes:
        run.reporter.line(f"the recipe has changed since: {'; '.join(changes)}")
    return TrainState(position, taken, position.step)


def save(run: Training, state: TrainState) -> None:
    """Write a checkpoint, and the weights to ``model/``; all processes have to call it."""
    scales = run.engine.loss_scales.state() if run.engine.loss_scales else None
    facts = {
        "precision": run.precision,
        "fingerprint": run.plan.fingerprint,
        "trainer": {"position": state.position.to_json(), "taken": state.taken, "loss_scales": scales},
        "recipe": resolved(run.recipe),
        "model": run.model_facts,
    }
    run.checkpoints.save(run.engine, state.position.step, facts)
    export(run)
    state.saved = state.position.step


def export(run: Training) -> None:
    """Write ``model/`` (config.json, model.safetensors, float32); all processes have to call it."""
    weights = run.engine.weights(run.model)
    with run.processes.agreed():
        if weights is not None:
            write_folder(run.folder.model, run.model.config, weights)


def _read_trainer(folder: Path, trainer: Mapping[str, Any]) -> tuple[Position, int]:
    taken = trainer.get("taken")
    if type(taken) is not int or taken < 0:
        raise VlscaleError(f"checkpoint {folder}: steps taken are {taken!r}; resume from another checkpoint")
    return Position.from_json(trainer.get("position")), taken


def _explain(
    run: Training, step: Step, window: list[RaggedBatch], counts: Mapping[str, float], report: StepReport
) -> None:
    def replay(sums: TermSums) -> None:
        run.engine.begin(step.task, 0.0)
        forward_backward(run, step, window, counts, sums)

    try:
        stop_with_diagnosis(run.engine, run.processes, f"step {step.index}", step.task, report, replay)
    except VlscaleError as error:
        run.processes.fail_together(str(error))


def _summary(found: Mapping[str, float]) -> str:
    """``set: mlm 2.1 mlm_accuracy 0.5; other: ...`` of ``eval/set/task/term``; losses are the sums of their terms."""
    shown: dict[str, list[str]] = {}
    for name, value in found.items():
        _, dataset, _, term = name.split("/")
        if term != "loss":
            shown.setdefault(dataset, []).append(f"{term} {value:.3f}")
    return "; ".join(f"{dataset}: {' '.join(terms)}" for dataset, terms in shown.items())


def _interval(run: Training) -> Interval:
    device = run.processes.device
    capacity = run.engine.accumulation * run.recipe.batch.micro_batch_tokens
    return Interval(run.model.config, capacity, peak_flops(device, run.precision))


def _loader(run: Training, position: Position) -> Loader:
    recipe, processes = run.recipe, run.processes
    prefetcher = None
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one process per node: the cache is the node's
        prefetcher = Prefetcher(run.datasets, run.plan, position, class_tasks(run.objectives))
    return Loader(
        run.datasets,
        cast("Mapping[str, Preparer]", run.objectives),
        run.plan,
        position,
        processes.rank,
        processes.world_size,
        run.engine.accumulation,
        recipe.batch.micro_batch_tokens,
        recipe.data.workers,
        recipe.data.prefetch,
        recipe.seed,
        recipe.data.max_regions,
        pin=processes.device.type == "cuda",
        prefetcher=prefetcher,
        rule=Rule(recipe.batch.mode, run.model.config.hidden_size),
    )
