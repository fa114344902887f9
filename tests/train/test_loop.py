"""The loop's parts that need no process group: agreement about a step, and seeds."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.batches import random_batch
from vlscale.data.plan import Position
from vlscale.errors import VlscaleError
from vlscale.train.loop import _summary, next_window, seed_micro_batch
from vlscale.train.processes import Processes
from vlscale.train.resilience import STOP, hold_stop, stop_asked


class TwoRanks(Processes):
    """One of two ranks; the other's message is computed by ``answer`` from this one's."""

    def __init__(self, answer: Any, failure: str | None = None) -> None:
        super().__init__(0, 2, torch.device("cpu"))
        self.answer, self.failure = answer, failure
        self.sent: list[float] = []

    def total(self, values: Any) -> list[float]:
        self.sent = list(values)
        return [mine + other for mine, other in zip(self.sent, self.answer(self.sent), strict=True)]

    def gather(self, item: Any) -> list[Any]:
        return [item, self.failure]


def window(task: str = "mlm", micro_batches: int = 2) -> Any:
    step = SimpleNamespace(index=7, task=task, dataset="toy")
    return step, Position(8, {}), [random_batch([3, 4], [2, 2]) for _ in range(micro_batches)]


def run(processes: Processes) -> Any:
    objective = SimpleNamespace(counts=lambda batch: {"words": len(batch), "none": 0.0}, needs_window=False)
    objectives = {"mlm": objective, "itm": objective}
    return SimpleNamespace(processes=processes, objectives=objectives, plan=SimpleNamespace(fingerprint="seed=1"))


def message(task: str, micro_batches: int) -> list[float]:
    """What a rank sends that is about to run this window."""
    processes = TwoRanks(lambda mine: mine)
    next_window(run(processes), iter([window(task, micro_batches)]))  # type: ignore[arg-type]
    return processes.sent


def test_counts_are_added_up_over_micro_batches_and_ranks() -> None:
    processes = TwoRanks(lambda mine: mine)
    found, counts, stop = next_window(run(processes), iter([window()]))  # type: ignore[arg-type]
    assert found[0].index == 7
    assert counts == {"words": 8.0, "none": 0.0}
    assert not stop


def test_one_process_that_is_asked_to_stop_stops_all() -> None:
    hold_stop()
    there = message("mlm", 2)
    signal.pthread_kill(threading.get_ident(), STOP)
    processes = TwoRanks(lambda mine: there)
    assert next_window(run(processes), iter([window()]))[2]  # type: ignore[arg-type]
    asked = processes.sent
    assert not stop_asked()
    assert next_window(run(TwoRanks(lambda mine: asked)), iter([window()]))[2]  # type: ignore[arg-type]


@pytest.mark.parametrize(("task", "micro_batches"), [("itm", 2), ("mlm", 3)])
def test_ranks_that_would_run_something_else_are_noticed(task: str, micro_batches: int) -> None:
    processes = TwoRanks(lambda mine: message(task, micro_batches))
    with pytest.raises(VlscaleError, match=r"step 7: the processes are about to run different steps"):
        next_window(run(processes), iter([window()]))  # type: ignore[arg-type]


def test_every_message_has_the_same_length() -> None:
    assert len(message("mlm", 2)) == len(message("itm", 5)) == 32


def test_a_bad_row_in_one_process_stops_all(capsys: pytest.CaptureFixture[str]) -> None:
    failed = TwoRanks(lambda mine: [1.0] + [0.0] * (len(mine) - 1), "images/: row 3: features contain NaN")
    with pytest.raises(VlscaleError, match=r"\[rank 1\] images/: row 3"):
        next_window(run(failed), iter([window()]))  # type: ignore[arg-type]

    def bad_row() -> Any:
        raise VlscaleError("texts/: row 5: damaged")
        yield

    with pytest.raises(VlscaleError, match=r"\[rank 0\] texts/: row 5"):
        next_window(run(TwoRanks(lambda mine: message("mlm", 2))), bad_row())
    assert capsys.readouterr().err.count("\n") == 2


def test_dropout_is_seeded_by_what_runs() -> None:
    def draw(*place: int) -> tuple[float, ...]:
        seed_micro_batch(*place)
        return tuple(torch.rand(4).tolist())

    first = draw(1, 2, 3, 4)
    torch.rand(100)
    assert draw(1, 2, 3, 4) == first
    others = {draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5), draw(1, 23, 4, 0)}
    assert len(others | {first}) == 6


def test_summary_names_set_and_terms() -> None:
    found = {"eval/a/mlm/loss": 2.0, "eval/a/mlm/mlm": 2.0, "eval/a/itm/wra": 0.5, "eval/b/mlm/mlm": 1.0}
    assert _summary(found) == "a: mlm 2.000 wra 0.500; b: mlm 1.000"
