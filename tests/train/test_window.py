"""Window negatives in the real engine: both passes see the same dropout, also where layers are computed twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.batches import random_batch
from tests.multiprocess.launcher import run_alone
from vlscale.config import ObjectivesSection
from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.errors import VlscaleError
from vlscale.objectives import build_objectives
from vlscale.train.pretraining import PretrainingModule
from vlscale.train.processes import Processes
from vlscale.train.window import with_keys, with_window

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = run_alone(Path(__file__).with_name("window_worker.py"))
    lines = [line for line in done.out.splitlines() if line.startswith("FOUND ")]
    assert lines, done.tail
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.multiprocess
def test_the_second_pass_scores_what_the_first_returned(found: dict[str, Any]) -> None:
    assert found["alike"] < 1e-6
    assert found["apart"] > 1e-2  # dropout is there


@pytest.mark.multiprocess
def test_rows_are_gathered_also_where_there_are_none(found: dict[str, Any]) -> None:
    assert found["rows"] == [[0, 1 << 40], [2 << 40, 3 << 40], [4 << 40, 5 << 40]]
    assert found["counts"] == [3]
    assert found["none"] == [[0, 2], [0]]
    assert found["of_texts"] == {"contrast_pairs": 0, "contrast_window": 0}


def test_tasks_without_a_window_are_left_alone_and_have_nothing_to_represent() -> None:
    vocabulary = Vocabulary.from_tokens([*SPECIAL_TOKENS.values(), "word"])
    objectives = build_objectives(ObjectivesSection(), ["mlm", "mrfr", "mrc", "mrckl", "itm"], vocabulary)
    engine: Any = SimpleNamespace()
    model: Any = torch.nn.Linear(1, 1)
    for task, objective in objectives.items():
        batch = random_batch([3], [2])
        batch.task = task
        assert with_window(engine, ALONE, objective, [batch]) == [batch]
        assert with_keys(ALONE, objective, [batch]) == ([batch], {})
        with pytest.raises(VlscaleError, match=f"task {task}: .* has no window"):
            PretrainingModule(model, objectives)(task, batch, represent=True)
