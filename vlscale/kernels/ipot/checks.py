"""Checks of what callers hand to IPOT, before anything is launched."""

from __future__ import annotations

from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_LENGTH = 1 << 20
BETAS = (1e-6, 1e6)
"""Least and greatest proximal step: beyond, float32 has no room for cosine costs over beta times some iterations."""
MOST_ITERATIONS = (1 << 31) - 1
"""Kernels count in 32 bits."""


def nvidia_problem(device: torch.device, least: tuple[int, int]) -> str | None:
    """Why ``device`` is no NVIDIA GPU of at least the compute capability ``least``, or None."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, not for {device}"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, this PyTorch is for AMD's"
    if torch.cuda.get_device_capability(device) < least:
        return f"it needs sm_{least[0]}{least[1]} or later"
    return None


def check_settings(beta: float, iterations: int, inner_iterations: int) -> None:
    """Refuse settings that IPOT is not defined for.

    Raises:
        ValueError: ``beta`` is outside :data:`BETAS`, or a number of iterations is below 1 or above
            :data:`MOST_ITERATIONS`; also where they are of another type.
    """
    least, greatest = BETAS
    if not isinstance(beta, Real) or isinstance(beta, bool):
        raise ValueError(f"beta is {beta!r} of type {type(beta).__name__}, expected a number")
    if not least <= beta <= greatest:
        raise ValueError(f"beta is {beta}, expected a positive number in {least:g}..{greatest:g}")
    for name, value in (("iterations", iterations), ("inner_iterations", inner_iterations)):
        if not _is_whole(value) or not 1 <= value <= MOST_ITERATIONS:
            raise ValueError(
                f"{name} is {value!r}, expected a whole number of at least 1 and at most {MOST_ITERATIONS}"
            )


def check_packed(
    words: Tensor,
    regions: Tensor,
    cu_words: Tensor,
    cu_regions: Tensor,
    max_words: int | None,
    max_regions: int | None,
) -> None:
    """Refuse packed inputs whose shapes, dtypes, devices or lengths do not fit together.

    Lengths of tensors on a GPU are not looked at, because that would wait for it; ``max_words`` and ``max_regions`` are
    then the caller's word, and kernels never go beyond them. Where they are not given, :func:`packed_bounds` waits, and
    looks.

    Raises:
        ValueError: see above; the tensor, what was found and what was expected are named.
    """
    for name, rows, cu in (("words", words, cu_words), ("regions", regions, cu_regions)):
        _check_rows(name, rows)
        _check_tensor(f"cu_{name}", cu)
        if cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in INTEGERS:
            raise ValueError(f"cu_{name} is {cu.dtype} {list(cu.shape)}, expected int32 or int64 [B+1]")
        if cu.device != rows.device:
            raise ValueError(f"cu_{name} is on {cu.device}, {name} on {rows.device}")
    _check_pair(words, regions)
    if cu_words.numel() != cu_regions.numel():
        raise ValueError(f"cu_words is of {cu_words.numel() - 1} examples, cu_regions of {cu_regions.numel() - 1}")
    if (max_words is None) != (max_regions is None):
        raise ValueError("give both of max_words and max_regions, or neither")
    for name, cu, rows, bound in (
        ("words", cu_words, words, max_words),
        ("regions", cu_regions, regions, max_regions),
    ):
        if bound is not None and not (_is_whole(bound) and 0 <= bound <= MAX_LENGTH):
            raise ValueError(f"max_{name} is {bound!r}, expected a whole number in 0..{MAX_LENGTH}")
        if cu.device.type == "cpu":
            _check_cumulative(name, cu, rows.shape[0], bound)


def check_padded(words_BTH: Tensor, regions_BRH: Tensor, word_lengths: Tensor, region_counts: Tensor) -> None:
    """Refuse padded inputs that do not fit together.

    Raises:
        ValueError: see above.
    """
    for name, rows, lengths in (("words", words_BTH, word_lengths), ("regions", regions_BRH, region_counts)):
        _check_tensor(name, rows)
        if rows.dim() != 3 or rows.dtype not in FLOATS:
            raise ValueError(f"{name} is {rows.dtype} {list(rows.shape)}, expected a float tensor [B, length, H]")
        check_lengths(f"lengths of {name}", lengths, rows)
    _check_pair(words_BTH, regions_BRH)
    if words_BTH.shape[0] != regions_BRH.shape[0]:
        raise ValueError(f"words is of {words_BTH.shape[0]} examples, regions of {regions_BRH.shape[0]}")


def check_cost(cost_BTR: Tensor, word_lengths: Tensor, region_counts: Tensor) -> None:
    """Refuse a cost and lengths that do not fit together.

    Raises:
        ValueError: see above.
    """
    _check_tensor("cost", cost_BTR)
    if cost_BTR.dim() != 3 or cost_BTR.dtype not in FLOATS:
        raise ValueError(f"cost is {cost_BTR.dtype} {list(cost_BTR.shape)}, expected a float tensor [B, T, R]")
    check_lengths("word_lengths", word_lengths, cost_BTR)
    check_lengths("region_counts", region_counts, cost_BTR.transpose(1, 2))


def check_lengths(name: str, lengths: Tensor, rows: Tensor) -> None:
    """Refuse lengths that are no int [B] in 0..rows.shape[1].

    Raises:
        ValueError: see above.
    """
    _check_tensor(name, lengths)
    if lengths.dtype not in INTEGERS or lengths.shape != rows.shape[:1]:
        raise ValueError(f"{name} is {lengths.dtype} {list(lengths.shape)}, expected int32 or int64 [{rows.shape[0]}]")
    if lengths.device != rows.device:
        raise ValueError(f"{name} is on {lengths.device}, its rows on {rows.device}")
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = lengths.aminmax()
        _check_range(name, int(low), int(high), rows.shape[1])


def packed_bounds(words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor) -> tuple[int, int]:
    """Return the most words and the most regions of an example, 0 if there is none, and refuse lengths that do not fit.

    For tensors that passed :func:`check_packed` without bounds. Waits for a GPU once.

    Raises:
        ValueError: cumulative lengths do not go from 0 to the rows, or fall.
    """
    found = torch.stack([*_ends(cu_words), *_ends(cu_regions)]).tolist()
    for name, rows, (first, last, low, _) in (("words", words, found[:4]), ("regions", regions, found[4:])):
        _check_ends(name, first, last, rows.shape[0])
        if low < 0:
            raise ValueError(f"cu_{name} falls: an example has a negative length")
    return found[3], found[7]


def padded_counts(
    words_BTH: Tensor, regions_BRH: Tensor, word_lengths: Tensor, region_counts: Tensor
) -> tuple[int, int]:
    """Return how many words and regions there are in all, and refuse lengths beyond the tensors.

    For tensors that passed :func:`check_padded`. Waits for a GPU once;
    :func:`vlscale.kernels.ipot.function.packed_rows` then waits no more.

    Raises:
        ValueError: a length is negative or beyond the padded one.
    """
    if word_lengths.numel() == 0:
        return 0, 0
    sides = (word_lengths.long(), region_counts.long())
    found = torch.stack([part for side in sides for part in (*side.aminmax(), side.sum())]).tolist()
    _check_range("lengths of words", found[0], found[1], words_BTH.shape[1])
    _check_range("lengths of regions", found[3], found[4], regions_BRH.shape[1])
    return found[2], found[5]


def _ends(cu: Tensor) -> tuple[Tensor, ...]:
    """First and last entry, least and greatest length."""
    cu = cu.long()
    lengths = cu.diff() if cu.numel() > 1 else torch.zeros_like(cu)
    return cu[0], cu[-1], *lengths.aminmax()


def _check_range(name: str, low: int, high: int, most: int) -> None:
    if low < 0 or high > most:
        raise ValueError(f"{name} lie in {low}..{high}, expected 0..{most}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}, expected a tensor")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_rows(name: str, rows: Tensor) -> None:
    _check_tensor(name, rows)
    if rows.dim() != 2 or rows.dtype not in FLOATS:
        raise ValueError(f"{name} is {rows.dtype} {list(rows.shape)}, expected a float tensor [N, H]")
    if not rows.is_contiguous():  # kernels read it as it lies, and a copy unasked is a cost unseen
        raise ValueError(f"{name} is not contiguous (strides {list(rows.stride())}): hand over {name}.contiguous()")


def _check_pair(words: Tensor, regions: Tensor) -> None:
    if words.dtype != regions.dtype:
        raise ValueError(f"words is {words.dtype}, regions is {regions.dtype}: expected one dtype")
    if words.device != regions.device:
        raise ValueError(f"words is on {words.device}, regions on {regions.device}: expected one device")
    if words.shape[-1] != regions.shape[-1] or words.shape[-1] == 0:
        raise ValueError(f"words has width {words.shape[-1]}, regions {regions.shape[-1]}: expected one, above 0")


def _check_cumulative(name: str, cu: Tensor, rows: int, bound: int | None) -> None:
    ends = cu.tolist()
    lengths = [after - before for before, after in pairwise(ends)]
    _check_ends(name, ends[0], ends[-1], rows)
    if lengths and min(lengths) < 0:
        raise ValueError(f"cu_{name} falls after example {lengths.index(min(lengths))}: a negative length")
    if bound is not None and lengths and max(lengths) > bound:
        raise ValueError(f"cu_{name}: an example has {max(lengths)} {name}, max_{name} is {bound}")


def _check_ends(name: str, first: int, last: int, rows: int) -> None:
    if first != 0 or last != rows:
        raise ValueError(f"cu_{name} goes from {first} to {last}, expected 0 to {rows}, the rows of {name}")
