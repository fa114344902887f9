"""What the benchmark of reading compares has the same content."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.bench import bench_reading, reading_paths
from tests.bench.reading_paths import make_stores, plan_micro_batches, read_lmdb, read_streaming, read_vlscale, take

CEILING = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    rng = np.random.default_rng(1)
    root = tmp_path_factory.mktemp("bench")
    make_stores(root, rng.integers(3, 20, 40), rng.integers(3, 12, 40), 32, classes=11)
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_all_three_paths_deliver_the_same_rows(root, workers):
    steps, micros = plan_micro_batches(root, CEILING)
    count = len(micros) + 2
    assert len(micros) > 1
    ours = take(read_vlscale(root, steps, workers, CEILING), count)
    for path in (read_lmdb, read_streaming):
        for batch, padded in zip(ours, take(path(root, micros, workers), count), strict=True):
            assert torch.equal(batch.text_lengths, padded["words"].int())
            assert torch.equal(batch.region_counts, padded["regions"].int())
            for name, cu in (("input_ids", batch.cu_text), ("features", batch.cu_regions), ("boxes", batch.cu_regions)):
                found, expected = padded[name], getattr(batch, name)
                real = torch.arange(found.shape[1])[None] < cu.diff()[:, None]
                assert found.dtype == expected.dtype
                assert torch.equal(found[real], expected)
                assert not found[~real].any()
            joint = batch.cu_joint.diff().long()
            assert torch.equal(padded["attention_mask"].sum(1), joint)


def test_bytes_of_the_published_mix_are_counted(root):
    """Every number of the benchmark's second table, on data whose sizes are known."""
    found = bench_reading.bytes_of_mix(root, 30, CEILING)
    dataset = reading_paths.open_dataset("bench", root)
    assert found.whole == found.features + found.regions * 11 * 2
    assert found.features == found.regions * (32 * 2 + 16)
    assert found.features < found.read < found.whole
    assert 0 < found.pages_read < found.pages_whole
    assert found.regions > dataset.lengths.regions.sum()
