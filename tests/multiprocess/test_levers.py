"""The benchmark of the three levers, tiny: all eight ways run, and padding is work that is not counted."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.bench_levers import SMOKE, ceiling_of, dynamic, fixed, make_micro, run, speed
from tests.bench.bench_plan import load_lengths
from tests.helpers import make_vocabulary
from vlscale.config import ObjectivesSection
from vlscale.objectives import build_objectives


def test_both_batchings_stay_under_one_ceiling_and_count_real_tokens() -> None:
    lengths = load_lengths()
    objective = build_objectives(ObjectivesSection(), ("mlm",), make_vocabulary(SMOKE.vocabulary))["mlm"]
    ceiling = ceiling_of(lengths, SMOKE.examples)
    for cut, padded in ((fixed, True), (dynamic, False)):
        for part in cut(lengths, SMOKE, 0, 2, 4):
            micro = make_micro(part, padded, SMOKE, objective, 0, "cpu")
            text, regions = part
            assert micro.real == text.sum() + regions.sum()
            assert micro.batch.tokens <= ceiling
            joint = micro.batch.cu_joint.diff().numpy()
            assert (joint == (np.full_like(joint, (text + regions).max()) if padded else text + regions)).all()


def test_ranks_get_different_examples() -> None:
    lengths = load_lengths()
    for cut in (fixed, dynamic):
        one, two = (cut(lengths, SMOKE, rank, 2, 4) for rank in range(2))
        assert any(not np.array_equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


@pytest.mark.multiprocess
def test_all_eight_ways_run() -> None:
    found = run(SMOKE, processes=2)
    ways = [(row["batching"], row["accumulation"], row["mixed"]) for row in found["rows"]]
    assert len(set(ways)) == 8
    assert found["half"] == "bf16"
    lengths = load_lengths()
    for row in found["rows"]:
        assert speed(row) > 0
        (tokens,), (positions,) = row["tokens"], row["positions"]
        cut = dynamic if row["batching"] else fixed
        parts = [part for rank in range(2) for part in cut(lengths, SMOKE, rank, 2, 4)[SMOKE.window :]]
        assert tokens == sum(int(text.sum() + regions.sum()) for text, regions in parts)
        assert (positions > tokens) is not row["batching"]
