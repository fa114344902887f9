"""The compiled CPU kernel is worth its compiler: a ratio in one process, interleaved, medians."""

from __future__ import annotations

import pytest
import torch

from tests.bench.bench_ipot import ratio
from vlscale.kernels.ipot import backends


@pytest.mark.slow
def test_forward_and_backward_on_one_thread_against_the_eager_loop():
    why = backends.problem("cpu", torch.device("cpu"))
    if why:
        pytest.skip(why)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = ratio(96, 20, 36, 768, runs=5)
    finally:
        torch.set_num_threads(before)
    assert found >= 2.5
