"""Sums become exact means; FLOPs, fill and padding are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models.batches import TINY, random_batch
from tests.train.test_checkpoint import Alone
from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.objectives import Term
from vlscale.train.engine import StepReport
from vlscale.train.flops import model_flops
from vlscale.train.metrics import Interval, MetricsWriter, TermSums, peak_flops


def term(total: float, count: str = "n", weight: float = 1.0) -> Term:
    return Term(torch.tensor(total), count, weight)


def test_means_are_over_everything_that_was_added() -> None:
    sums = TermSums()
    for total, count in ((3.0, 2.0), (5.0, 6.0)):
        sums.add_counts("itm", {"n": count, "pairs": 0.0})
        terms = {"itm": term(total), "accuracy": term(1.0, weight=0.0), "wra": term(0.0, "pairs", 0.1)}
        sums.add("itm", terms)
    sums.add_counts("mlm", {"n": 4.0})
    sums.add("mlm", {"mlm": term(8.0, weight=0.5)})
    assert sums.names() == ["itm", "accuracy", "wra", "mlm"]
    found = sums.means(sums.local())
    assert found == {"itm": {"loss": 1.0, "itm": 1.0, "accuracy": 0.25}, "mlm": {"loss": 1.0, "mlm": 2.0}}


def test_nothing_added_is_nothing() -> None:
    assert TermSums().means(TermSums().local()) == {}


def test_flops_are_those_of_the_matrix_products() -> None:
    """Against PyTorch's own counter, on a layout without padding; only the narrow box projection is not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    config = UniterConfig(**TINY, attention_backend="packed")
    batch = random_batch([5, 9], [4, 7])
    batch.targets["token_positions"] = torch.tensor([1, 3, 6])
    model = UniterForPretraining(config)
    with FlopCounterMode(display=False) as counter:
        encoded = model.encode(batch)
        model.mlm_logits(encoded, batch.targets["token_positions"]).sum().backward()
    boxes_forward_and_weight = 2 * (2 * batch.boxes.shape[0] * 7 * config.hidden_size)
    assert model_flops(config, batch) == counter.get_total_flops() - boxes_forward_and_weight


def test_no_peak_is_claimed_for_a_cpu() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_a_row_has_everything_and_time_outs_do_not_count() -> None:
    interval = Interval(UniterConfig(**TINY), 100, None)
    batch, empty = random_batch([4, 8], [2, 2]), random_batch([4], [2])
    batch.task = empty.task = "mlm"
    empty.weight = 0.0
    interval.add_window([batch, empty], 0.0)
    interval.terms.add_counts("mlm", {"n": 4.0})
    interval.terms.add("mlm", {"mlm": term(8.0)})
    interval.add_step("mlm", StepReport(True, torch.tensor(0.5)), None)
    row = interval.row(Alone())
    assert row["mlm/loss"] == 2.0
    assert row["mlm/grad_norm"] == 0.5
    assert row["batch/fill"] == pytest.approx(16 / 100)
    assert row["batch/padding"] == pytest.approx(1 - (16 + 6) / (20 + 6))
    assert row["speed/samples_per_s"] * 8 == pytest.approx(row["speed/tokens_per_s"])
    assert 0 <= row["speed/data_wait"] <= 1
    assert "speed/mfu" not in row
    assert row["memory/resident_gib"] > 0


def test_mfu_is_flops_over_peak() -> None:
    interval = Interval(UniterConfig(**TINY), 100, 1e12)
    interval.add_window([random_batch([4, 8], [2, 2])], 0.0)
    row = interval.row(Alone())
    per_token = model_flops(UniterConfig(**TINY), random_batch([4, 8], [2, 2])) / 16
    assert row["speed/mfu"] == pytest.approx(row["speed/tokens_per_s"] * per_token / 1e12)


def test_rows_after_the_step_that_is_resumed_from_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        writer.write(step, {"mlm/loss": float(step)}, task="mlm")
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "broken')
    writer = MetricsWriter(tmp_path, 2, tensorboard=True)
    writer.write(3, {"mlm/loss": 9.0})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["mlm/loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert rows[0]["task"] == "mlm"
    assert list((tmp_path / "tensorboard").iterdir())
