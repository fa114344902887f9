"""IPOT's kernel and the packed encoder on a CPU beside their rivals: ratios in one process, interleaved, medians."""

from __future__ import annotations

import pytest
import torch

from tests.bench.bench_encoder import OURS, Setting, measure
from tests.bench.bench_ipot import ratio
from vlscale.kernels.ipot import backends

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ipot_forward_and_backward_against_the_eager_loop():
    why = backends.problem("cpu", torch.device("cpu"))
    if why:
        pytest.skip(why)
    assert ratio((96, 20, 36, 768)) >= 2.5


def test_encoder_step_on_adaptive_region_counts_against_padded_rows():
    pytest.importorskip("transformers")
    first, *others = measure(True, Setting(32, 2, 768), only="VisualBertModel")
    assert first["way"] == OURS
    assert len(others) == 2
    assert min(row["times"] for row in others) >= 1.5, others
