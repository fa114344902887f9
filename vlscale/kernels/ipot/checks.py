"""Checks of what callers hand to IPOT, before anything is launched."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_LENGTH = 1 << 20


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
        ValueError: ``beta`` is not positive and finite, or a number of iterations is below 1.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}, expected a positive number")
    for name, value in (("iterations", iterations), ("inner_iterations", inner_iterations)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}, expected a whole number of at least 1")


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
    then the caller's word, and kernels never go beyond them.

    Raises:
        ValueError: see above; the tensor, what was found and what was expected are named.
    """
    for name, rows, cu in (("words", words, cu_words), ("regions", regions, cu_regions)):
        _check_rows(name, rows)
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
        if bound is not None and not 0 <= bound <= MAX_LENGTH:
            raise ValueError(f"max_{name} is {bound}, expected 0..{MAX_LENGTH}")
        if cu.device.type == "cpu":
            _check_cumulative(name, cu, rows.shape[0], bound)


def check_padded(words_BTH: Tensor, regions_BRH: Tensor, word_lengths: Tensor, region_counts: Tensor) -> None:
    """Refuse padded inputs that do not fit together.

    Raises:
        ValueError: see above.
    """
    for name, rows, lengths in (("words", words_BTH, word_lengths), ("regions", regions_BRH, region_counts)):
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
    if cost_BTR.dim() != 3 or cost_BTR.dtype not in FLOATS:
        raise ValueError(f"cost is {cost_BTR.dtype} {list(cost_BTR.shape)}, expected a float tensor [B, T, R]")
    check_lengths("word_lengths", word_lengths, cost_BTR)
    check_lengths("region_counts", region_counts, cost_BTR.transpose(1, 2))


def check_lengths(name: str, lengths: Tensor, rows: Tensor) -> None:
    """Refuse lengths that are no int [B] in 0..rows.shape[1].

    Raises:
        ValueError: see above.
    """
    if lengths.dtype not in INTEGERS or lengths.shape != rows.shape[:1]:
        raise ValueError(f"{name} is {lengths.dtype} {list(lengths.shape)}, expected int32 or int64 [{rows.shape[0]}]")
    if lengths.device != rows.device:
        raise ValueError(f"{name} is on {lengths.device}, its rows on {rows.device}")
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(value) for value in lengths.aminmax())
        if low < 0 or high > rows.shape[1]:
            raise ValueError(f"{name} lie in {low}..{high}, expected 0..{rows.shape[1]}")


def _check_rows(name: str, rows: Tensor) -> None:
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
    if ends[0] != 0 or ends[-1] != rows:
        raise ValueError(f"cu_{name} goes from {ends[0]} to {ends[-1]}, expected 0 to {rows}, the rows of {name}")
    if lengths and min(lengths) < 0:
        raise ValueError(f"cu_{name} falls after example {lengths.index(min(lengths))}: a negative length")
    if bound is not None and lengths and max(lengths) > bound:
        raise ValueError(f"cu_{name}: an example has {max(lengths)} {name}, max_{name} is {bound}")
