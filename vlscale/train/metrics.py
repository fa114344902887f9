"""What is measured while training: sums that every rank keeps by itself and adds up once per logging interval."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from vlscale.models.registry import ModelConfig
from vlscale.objectives import Term
from vlscale.ragged import RaggedBatch
from vlscale.train.engine import StepReport
from vlscale.train.flops import model_flops
from vlscale.train.loss_scale import TaskLossScales
from vlscale.train.processes import Processes

_PEAK_TERAFLOPS: dict[str, tuple[float, float]] = {
    # name of the GPU contains -> (half precision with tensor cores, float32), dense, from the vendor's data sheets
    "V100": (125.0, 15.7),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A10G": (70.0, 35.0),
    "A40": (149.7, 37.4),
    "L40S": (362.0, 91.6),
    "RTX 3090": (71.0, 35.6),
    "RTX 4090": (165.2, 82.6),
    "T4": (65.0, 8.1),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.4, 66.9),
    "H200": (989.4, 66.9),
    "B200": (2250.0, 80.0),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of the GPU in ``precision``; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, (half, single) in _PEAK_TERAFLOPS.items():
        if known in name:
            return 1e12 * (single if precision == "fp32" else half)
    return None


class TermSums:
    """Sums of named terms and of their counts, per key (a task, or a dataset and a task).

    Term sums stay on the device and are not looked at before :meth:`local`.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._weights: dict[tuple[str, str], tuple[str, float]] = {}
        self._counts: dict[tuple[str, str], float] = {}

    def add_counts(self, key: str, counts: Mapping[str, float]) -> None:
        """Add counts: of a step over all ranks, or of this rank if :meth:`reduce_counts` follows."""
        for name, count in counts.items():
            self._counts[key, name] = self._counts.get((key, name), 0.0) + count

    def reduce_counts(self, processes: Processes) -> None:
        """Replace this rank's counts by their totals over all ranks; all of them have to call it."""
        self._counts = dict(zip(self._counts, processes.total([*self._counts.values()]), strict=True))

    def add(self, key: str, terms: Mapping[str, Term]) -> None:
        """Add a micro-batch's terms of this rank."""
        for name, term in terms.items():
            value = term.sum.detach().double()
            self._sums[key, name] = self._sums[key, name] + value if (key, name) in self._sums else value
            self._weights[key, name] = (term.count, term.weight)

    def names(self) -> list[str]:
        """Return the terms' names, in the order of :meth:`local`."""
        return [name for _, name in self._sums]

    def local(self) -> list[float]:
        """Return this rank's sums, in the order that :meth:`means` takes their totals; waits for the device."""
        return torch.stack([*self._sums.values()]).tolist() if self._sums else []

    def means(self, totals: list[float]) -> dict[str, dict[str, float]]:
        """Return key -> {term: mean, "loss": weighted sum of the means}; terms without any target are left out.

        Args:
            totals: sums over all ranks of what :meth:`local` returned.
        """
        found: dict[str, dict[str, float]] = {}
        for ((key, name), (count, weight)), total in zip(self._weights.items(), totals, strict=True):
            number = self._counts.get((key, count), 0.0)
            if number == 0:
                continue
            means = found.setdefault(key, {"loss": 0.0})
            means[name] = total / number
            means["loss"] += weight * total / number
        return found


class Interval:
    """Everything measured since the last logged row."""

    def __init__(self, config: ModelConfig, capacity: int, peak: float | None) -> None:
        """``capacity``: tokens that one rank's window may hold; ``peak``: FLOP/s of the GPU, if known."""
        self._config, self._capacity, self._peak = config, capacity, peak
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.terms = TermSums()
        self._norms: dict[str, Any] = {}
        self._scales: dict[str, float] = {}
        self._began = time.perf_counter()
        self._sums = dict.fromkeys(("tokens", "examples", "slots", "filled", "wait", "flops", "capacity"), 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of a block: evaluation and checkpoints are not training."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def add_window(self, window: list[RaggedBatch], wait_s: float) -> None:
        """Note a window of this rank, while it is on the CPU."""
        sums = self._sums
        sums["wait"] += wait_s
        sums["capacity"] += self._capacity
        for batch in window:
            sums["slots"] += len(batch) * batch.longest
            sums["filled"] += batch.tokens
            if batch.weight:
                sums["tokens"] += batch.tokens
                sums["examples"] += len(batch)
                sums["flops"] += model_flops(self._config, batch)

    def add_step(self, task: str, report: StepReport, scales: TaskLossScales | None) -> None:
        """Note what an optimiser step reported; the norm is not looked at before :meth:`row`."""
        self._norms[task] = report.grad_norm
        if scales is not None:
            self._scales |= {f"{task}/loss_scale": report.loss_scale, f"{task}/skipped": scales.skipped[task]}

    def row(self, processes: Processes) -> dict[str, float]:
        """Add up over all ranks, once, and return the scalars by name; all ranks have to call it."""
        terms = self.terms.local()
        seconds = max(time.perf_counter() - self._began, 1e-9)
        totals = processes.total([*terms, *self._sums.values()])
        sums = dict(zip(self._sums, totals[len(terms) :], strict=True))
        row = {
            f"{task}/{name}": value
            for task, means in self.terms.means(totals[: len(terms)]).items()
            for name, value in means.items()
        }
        row |= {f"{task}/grad_norm": float(norm) for task, norm in self._norms.items() if norm is not None}
        row |= self._scales | {
            "speed/tokens_per_s": sums["tokens"] / seconds,
            "speed/samples_per_s": sums["examples"] / seconds,
            "speed/data_wait": sums["wait"] / (seconds * processes.world_size),
            "batch/fill": sums["tokens"] / sums["capacity"] if sums["capacity"] else 0.0,
            "batch/padding": 1.0 - sums["filled"] / sums["slots"] if sums["slots"] else 0.0,
        }
        if self._peak is not None:
            row["speed/mfu"] = sums["flops"] / (seconds * processes.world_size * self._peak)
        return row | memory(processes.device)


def memory(device: torch.device) -> dict[str, float]:
    """Return this process's memory in GiB: peak of the GPU's allocator, or resident set of the process."""
    if device.type == "cuda":
        return {
            "memory/allocated_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory/reserved_gib": torch.cuda.memory_reserved(device) / 2**30,
        }
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    return {"memory/resident_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}


class MetricsWriter:
    """Rows of scalars to ``metrics.jsonl`` and TensorBoard; the main process has one.

    Args:
        folder: the run's.
        from_step: rows of later steps, left by a run that was resumed from here, are dropped.
        tensorboard: write event files to ``folder/tensorboard`` too.
    """

    def __init__(self, folder: Path, from_step: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        _keep_rows(path, from_step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1 if from_step else None)

    def write(self, step: int, row: Mapping[str, float], **facts: Any) -> None:
        """Write one row; ``facts`` that are no scalars go to the JSON only."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **facts, **row}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _keep_rows(path: Path, last_step: int) -> None:
    """Drop rows beyond ``last_step``, and a last line that was not finished."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
