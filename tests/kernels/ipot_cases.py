"""What the tests of IPOT share: pairs of words and regions, a float64 oracle, and the backends that run on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlscale.kernels import ipot
from vlscale.kernels.ipot import backends
from vlscale.ragged import cumulative

CPU = torch.device("cpu")
_backend = "reference"


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def each_backend(request, monkeypatch):
    """Import it, and every test of the file runs with each backend that a CPU has."""
    why = backends.problem(request.param, CPU)
    if why:
        pytest.skip(why)
    monkeypatch.setitem(globals(), "_backend", request.param)


def chosen() -> str:
    """The backend that the test at hand runs with."""
    return _backend


def ipot_distance(*arguments, **options):
    return ipot.ipot_distance(*arguments, **{"backend": _backend, **options})


def ipot_distance_padded(*arguments, **options):
    return ipot.ipot_distance_padded(*arguments, **{"backend": _backend, **options})


def transport_plan(*arguments, **options):
    return ipot.transport_plan(*arguments, **{"backend": _backend, **options})


def oracle_plan(cost_TR: np.ndarray, beta: float, iterations: int, inner_iterations: int = 1) -> np.ndarray:
    """The definition, in float64 and one example at a time: plan [R, T] of cost [T, R]."""
    words, regions = cost_TR.shape
    kernel = np.exp(-(cost_TR.T.astype(np.float64)) / beta)
    plan, sigma = np.ones((regions, words)), np.full(words, 1 / words)
    for _ in range(iterations):
        q = kernel * plan
        for _ in range(inner_iterations):
            delta = 1 / (regions * (q @ sigma))
            sigma = 1 / (words * (q.T @ delta))
        plan = delta[:, None] * q * sigma[None]
    return plan


def oracle_potentials(cost_TR: np.ndarray, beta: float, iterations: int) -> np.ndarray:
    """The same plan [R, T] through extrapolated potentials, for steps too small for the plan itself."""
    words, regions = cost_TR.shape
    scaled = cost_TR.T.astype(np.float64) / beta
    before, last = np.zeros(words), np.zeros(words)
    for t in range(1, iterations + 1):
        ahead = np.full(words, -np.log(words)) if t == 1 else 2 * last - before
        f = -np.log(regions) - np.logaddexp.reduce(ahead[None] - t * scaled, axis=1)
        before, last = last, -np.log(words) - np.logaddexp.reduce(f[:, None] - t * scaled, axis=0)
    return np.exp(f[:, None] + last[None] - iterations * scaled)


def make_pairs(sizes: list[tuple[int, int]], hidden: int, seed: int, dtype=torch.float32, themes: float = 1.0):
    """Packed words and regions; themes > 0 gives them shared components, so that costs spread as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    words, regions = zip(*sizes, strict=True)
    cu_words, cu_regions = cumulative(torch.tensor(words)), cumulative(torch.tensor(regions))
    shared = themes * torch.randn(8, hidden, generator=generator)

    def draw(count: int) -> Tensor:
        pick = torch.randint(8, (count,), generator=generator)
        return (shared[pick] + torch.randn(count, hidden, generator=generator)).to(dtype)

    return draw(sum(words)), draw(sum(regions)), cu_words, cu_regions


def oracle_cost(words: Tensor, regions: Tensor) -> np.ndarray:
    x, y = words.double().numpy(), regions.double().numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-5)
    y = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-5)
    return 1 - x @ y.T


def per_example(words, regions, cu_words, cu_regions):
    for i in range(cu_words.numel() - 1):
        yield words[cu_words[i] : cu_words[i + 1]], regions[cu_regions[i] : cu_regions[i + 1]]


SIZES = [(16, 36), (1, 5), (7, 1), (1, 1), (33, 20), (60, 100)]
