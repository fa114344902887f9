"""A plan's memory does not grow with the number of texts."""

from __future__ import annotations

from tests.bench.bench_billion import measured


def test_planning_holds_a_window_and_not_the_pass():
    """Ten times the texts, the same memory: one number per shard is all that grows (`make bench`: a billion texts)."""
    few, many = measured(4_000_000, 400_000), measured(40_000_000, 4_000_000)
    # 36 million texts more; a byte for each would be 34 MiB.
    assert many["mib"] < few["mib"] + 20, (few, many)
    assert few["mib"] < 200
