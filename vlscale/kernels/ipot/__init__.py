"""Optimal transport between the words and the regions of each example (IPOT), behind one signature.

Backends are chosen by name; ``"auto"`` picks the fastest that the machine can run (see ``vlscale doctor``). All of them
take float32, float16 and bfloat16 as they are, compute in float32, and let the gradient flow through the cost only.
``reference`` and ``cpu`` take float64 too and compute it in float64; on a GPU that leaves the reference.

| backend | where | largest example |
| --- | --- | --- |
| ``reference`` | anywhere: plain PyTorch, which the others are measured against | any |
| ``cpu`` | CPUs with a C++ compiler, which is asked once | any |
| ``triton`` | NVIDIA GPUs from sm_80 on; float32 only on sm_10x and sm_11x | 64 words x 128 regions, 128 x 64 |
| ``cuda`` | NVIDIA GPUs from sm_70 on (V100), compiled by NVRTC at first use | 1,024 words x 512 regions |
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from vlscale.kernels.ipot import backends, checks, reference
from vlscale.kernels.ipot.backends import BACKENDS, resolve_backend
from vlscale.kernels.ipot.function import Settings, packed_rows, run
from vlscale.kernels.ipot.reference import cosine_cost
from vlscale.ragged import cumulative

__all__ = ["BACKENDS", "cosine_cost", "ipot_distance", "ipot_distance_padded", "resolve_backend", "transport_plan"]


@overload
def ipot_distance(
    words: Tensor,
    regions: Tensor,
    cu_words: Tensor,
    cu_regions: Tensor,
    beta: float = ...,
    iterations: int = ...,
    inner_iterations: int = ...,
    backend: str = ...,
    return_plan: Literal[False] = ...,
    *,
    max_words: int | None = ...,
    max_regions: int | None = ...,
) -> Tensor: ...
@overload
def ipot_distance(
    words: Tensor,
    regions: Tensor,
    cu_words: Tensor,
    cu_regions: Tensor,
    beta: float = ...,
    iterations: int = ...,
    inner_iterations: int = ...,
    backend: str = ...,
    *,
    return_plan: Literal[True],
    max_words: int | None = ...,
    max_regions: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def ipot_distance(
    words: Tensor,
    regions: Tensor,
    cu_words: Tensor,
    cu_regions: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
    backend: str = "auto",
    return_plan: bool = False,
    *,
    max_words: int | None = None,
    max_regions: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the transport distance between the words and the regions of each example.

    The cost of a word and a region is one minus their cosine; the distance is the sum of cost times plan. Which tokens
    count as words is the caller's choice. An example without words or without regions has distance 0 and gradient 0.

    Args:
        words: float [Nw, H], packed; half precision is taken as it is.
        regions: float [Nr, H], packed.
        cu_words: int [B+1], cumulative word counts.
        cu_regions: int [B+1], cumulative region counts.
        beta: proximal step of IPOT (UNITER: 0.5).
        iterations: outer iterations (UNITER: 50).
        inner_iterations: k of the paper (UNITER: 1).
        backend: a name in ``BACKENDS``, or ``"auto"``.
        return_plan: return ``(distance, plan)`` with the plan padded to [B, R, T]; it carries no gradient.
        max_words: a bound on the words of any example; spares a device synchronisation.
        max_regions: a bound on the regions of any example; both or neither.

    Returns:
        float32 [B] (float64 for float64 inputs), and the plan where asked for.

    Raises:
        ValueError: shapes, dtypes, devices, lengths or settings that do not fit, or examples larger than the backend of
            this name takes, before anything is launched.
        VlscaleError: unknown backend, or one that does not run here.
    """
    checks.check_settings(beta, iterations, inner_iterations)
    checks.check_packed(words, regions, cu_words, cu_regions, max_words, max_regions)
    if max_words is None or max_regions is None:
        resolve_backend(backend, words.device, words.dtype)  # what cannot run is refused without waiting for lengths
        max_words, max_regions = checks.packed_bounds(words, regions, cu_words, cu_regions)
    name = resolve_backend(backend, words.device, words.dtype, max_words, max_regions)
    settings = Settings(float(beta), iterations, inner_iterations, max(max_words, 1), max(max_regions, 1))
    if name == "reference":
        distance, plan = reference.ipot_packed(words, regions, cu_words, cu_regions, settings)
    else:
        distance, plan = run(backends.kernel(name), words, regions, cu_words, cu_regions, settings)
    return (distance, plan) if return_plan else distance


def ipot_distance_padded(
    words: Tensor,
    regions: Tensor,
    word_lengths: Tensor,
    region_counts: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
    backend: str = "auto",
    return_plan: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the distances of padded words [B, T, H] and regions [B, R, H]; padding may hold anything, even NaN.

    ``word_lengths`` and ``region_counts`` are int [B]. The rest is as in :func:`ipot_distance`. Compiled backends take
    packed rows, and counting them waits for a GPU once: prefer packed inputs there.
    """
    checks.check_settings(beta, iterations, inner_iterations)
    checks.check_padded(words, regions, word_lengths, region_counts)
    if resolve_backend(backend, words.device, words.dtype, words.shape[1], regions.shape[1]) == "reference":
        settings = Settings(float(beta), iterations, inner_iterations, max(words.shape[1], 1), max(regions.shape[1], 1))
        distance, plan = reference.ipot_padded(words, regions, word_lengths, region_counts, settings)
        return (distance, plan) if return_plan else distance
    in_words, in_regions = checks.padded_counts(words, regions, word_lengths, region_counts)
    found = ipot_distance(
        packed_rows(words, word_lengths, in_words),
        packed_rows(regions, region_counts, in_regions),
        cumulative(word_lengths),
        cumulative(region_counts),
        beta,
        iterations,
        inner_iterations,
        backend,
        return_plan=True,
        max_words=words.shape[1],
        max_regions=regions.shape[1],
    )
    return found if return_plan else found[0]


def transport_plan(
    cost_BTR: Tensor,
    word_lengths: Tensor,
    region_counts: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return the transport plans [B, R, T] of given costs, detached; zero at padding and in examples without a side.

    Each word's column sums to 1/m exactly; each region's row sums to 1/n only approximately at a finite number of
    iterations. Where (max cost - min cost) / beta is wide, the log form is used: nothing under- or overflows.

    Args:
        cost_BTR: [B, T, R] cost of moving a word to a region; padding may hold anything.
        word_lengths: int [B], m of each example.
        region_counts: int [B], n of each example.
        beta: proximal step; smaller is sharper.
        iterations: outer iterations.
        inner_iterations: updates of (delta, sigma) per outer iteration (k in the paper).
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``; on a GPU without Triton, or of large costs, it is the
            reference, which waits for the GPU to look at the costs.

    Raises:
        ValueError: shapes, dtypes, devices, lengths or settings that do not fit, or more than the backend of this name
            takes.
        VlscaleError: unknown backend, or one that does not run here or takes no costs.
    """
    checks.check_settings(beta, iterations, inner_iterations)
    checks.check_cost(cost_BTR, word_lengths, region_counts)
    plan_of = backends.plan_function(backend, cost_BTR.device, cost_BTR.dtype, *cost_BTR.shape[1:])
    return plan_of(cost_BTR, word_lengths, region_counts, float(beta), iterations, inner_iterations)
