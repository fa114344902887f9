"""Optimal transport between the words and the regions of each example (IPOT), behind one signature.

Backends are chosen by name; ``"auto"`` picks the best that the machine can run. All of them compute in float32
(float64 for float64 inputs), take half-precision inputs, and let the gradient flow through the cost only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from vlscale.errors import VlscaleError, nearest
from vlscale.kernels.ipot import reference
from vlscale.kernels.ipot.reference import cosine_cost, transport_plan

__all__ = ["BACKENDS", "cosine_cost", "ipot_distance", "ipot_distance_padded", "resolve_backend", "transport_plan"]

Backend = Callable[..., tuple[Tensor, Tensor]]

BACKENDS: dict[str, Backend] = {"reference": reference.ipot_packed}
"""Name -> function of the packed signature, returning distances [B] and padded plans [B, R, T]."""


def resolve_backend(name: str, device: torch.device | None = None) -> str:
    """Return the backend that ``name`` stands for on ``device``; ``"auto"`` picks the fastest one that runs there.

    Raises:
        VlscaleError: no backend has this name.
    """
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        known = ("auto", *BACKENDS)
        raise VlscaleError(
            f"objectives.wra.backend: no IPOT backend {name!r}{nearest(name, known)} (known: {', '.join(known)})"
        )
    return name


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
        VlscaleError: unknown backend.
    """
    run = BACKENDS[resolve_backend(backend, words.device)]
    distance, plan = run(
        words, regions, cu_words, cu_regions, beta, iterations, inner_iterations, max_words, max_regions
    )
    return (distance, plan) if return_plan else distance


def ipot_distance_padded(
    words: Tensor,
    regions: Tensor,
    word_lengths: Tensor,
    region_counts: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
    return_plan: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the distances of padded words [B, T, H] and regions [B, R, H]; padding may hold anything, even NaN.

    ``word_lengths`` and ``region_counts`` are int [B]. The rest is as in :func:`ipot_distance`, reference backend.
    """
    distance, plan = reference.ipot_padded(
        words, regions, word_lengths, region_counts, beta, iterations, inner_iterations
    )
    return (distance, plan) if return_plan else distance
