"""IPOT in Triton: cost, iterations and distance of an example in one program, the backward pass in another, and plans
of given costs in a third.

See ``reference.py`` for the algorithm and its names; the backward pass is spelled out in ``function.py``. A tile is
[BLOCK_N regions, BLOCK_M words], chosen to hold the longest example, and lies in registers; no other memory is used.
Rows and columns outside an example are selected away, never multiplied by zero, so nothing leaks from neighbours.

Triton compiles a kernel anew for every whole number that is 1 or a multiple of 16 at one launch and not at the next.
``wide`` and ``tall`` change with every batch, so they are exempted, and so are the iterations; ``inner`` is not,
because an inner loop of one step costs nothing when that is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="untyped-decorator, no-untyped-def"


@triton.jit
def _cosines(
    x, y, m, n, hidden, floor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, EXACT: tl.constexpr
):
    """Cosines [BLOCK_N, BLOCK_M] of regions and words, inverse norms of both, and where norms were not clamped."""
    word, region, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    dots = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    word_square, region_square = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, hidden, BLOCK_H):
        inside = begin + column < hidden
        x_MH = tl.load(
            x + word[:, None].to(tl.int64) * hidden + begin + column[None, :],
            mask=(word < m)[:, None] & inside[None, :],
            other=0.0,
        )
        y_NH = tl.load(
            y + region[:, None].to(tl.int64) * hidden + begin + column[None, :],
            mask=(region < n)[:, None] & inside[None, :],
            other=0.0,
        )
        # Half precision has exact products in float32; float32 must not become TensorFloat-32.
        if EXACT:
            dots = tl.dot(y_NH.to(tl.float32), tl.trans(x_MH.to(tl.float32)), dots, input_precision="ieee")
        else:
            dots = tl.dot(y_NH, tl.trans(x_MH), dots)
        wide_x, wide_y = x_MH.to(tl.float32), y_NH.to(tl.float32)
        word_square += tl.sum(wide_x * wide_x, 1)
        region_square += tl.sum(wide_y * wide_y, 1)
    word_norm, region_norm = tl.sqrt(word_square), tl.sqrt(region_square)
    inverse_word, inverse_region = 1.0 / tl.maximum(word_norm, floor), 1.0 / tl.maximum(region_norm, floor)
    cosine = dots * inverse_region[:, None] * inverse_word[None, :]
    return cosine, inverse_word, inverse_region, word_norm >= floor, region_norm >= floor


@triton.jit
def _plan_form(logits, m, n, iterations, inner, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    word, region = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    words, regions = m.to(tl.float32), n.to(tl.float32)
    kernel = tl.exp(logits)  # 0 where there is no word or no region
    plan = tl.full([BLOCK_N, BLOCK_M], 1.0, tl.float32)
    sigma = tl.where(word < m, 1.0 / words, 0.0)
    delta = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(iterations):
        plan = plan * kernel
        for _ in range(inner):
            delta = tl.where(region < n, 1.0 / (regions * tl.sum(plan * sigma[None, :], 1)), 0.0)
            sigma = tl.where(word < m, 1.0 / (words * tl.sum(plan * delta[:, None], 0)), 0.0)
        plan = plan * delta[:, None] * sigma[None, :]
    return plan


@triton.jit
def _log_form(logits, m, n, iterations, inner, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    word, region = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    nothing = float("-inf")
    log_m, log_n = tl.log(m.to(tl.float32)), tl.log(n.to(tl.float32))
    potential = tl.where(word < m, 0.0, nothing)
    sigma = tl.where(word < m, -log_m, 0.0)
    ahead = potential
    of_region = tl.zeros([BLOCK_N], tl.float32)
    for step in range(iterations):
        scaled = logits * (step + 1.0)
        ahead = potential + sigma
        for _ in range(inner):
            sums = scaled + ahead[None, :]
            top = tl.max(sums, 1)
            top = tl.where(region < n, top, 0.0)
            of_region = -log_n - (top + tl.log(tl.sum(tl.exp(sums - top[:, None]), 1)))
            of_region = tl.where(region < n, of_region, nothing)
            sums = scaled + of_region[:, None]
            high = tl.max(sums, 0)
            high = tl.where(word < m, high, 0.0)
            ahead = -log_m - (high + tl.log(tl.sum(tl.exp(sums - high[None, :]), 0)))
            ahead = tl.where(word < m, ahead, nothing)
        sigma = tl.where(word < m, ahead - potential, 0.0)
        potential = ahead
    # Times 1.0, and not .to(): a caller's number that is known when compiling has no such method.
    plan = tl.exp(of_region[:, None] + potential[None, :] + logits * (iterations * 1.0))
    # Potentials grow with the iterations, and their rounding with them: restore the words' marginal, which is exact.
    mass = tl.sum(plan, 0) * m.to(tl.float32)
    return tl.where((word < m)[None, :], plan / mass[None, :], 0.0)


@triton.jit(do_not_specialize=["iterations", "wide", "tall"])
def forward(
    words,
    regions,
    cu_words,
    cu_regions,
    hidden,
    beta,
    iterations,
    inner,
    floor,
    wide,
    tall,
    plan,
    distance,
    inverse_word,
    inverse_region,
    share_word,
    share_region,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LOG: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program per example; ``plan`` is [B, tall, wide] with tall <= BLOCK_N and wide <= BLOCK_M."""
    example = tl.program_id(0)
    first_word, first_region = tl.load(cu_words + example), tl.load(cu_regions + example)
    m = tl.minimum(tl.load(cu_words + example + 1) - first_word, wide).to(tl.int32)
    n = tl.minimum(tl.load(cu_regions + example + 1) - first_region, tall).to(tl.int32)
    word, region = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cosine, word_inverse, region_inverse, word_free, region_free = _cosines(
        words + first_word * hidden, regions + first_region * hidden, m, n, hidden, floor,
        BLOCK_M, BLOCK_N, BLOCK_H, EXACT,
    )  # fmt: skip
    valid = (region < n)[:, None] & (word < m)[None, :]
    # A constant per region does not change the plan, and its least puts a 1 into every row of the kernel.
    best = tl.max(tl.where(valid, cosine, -2.0), 1)
    logits = tl.where(valid, (cosine - best[:, None]) / beta, float("-inf"))
    if LOG:
        found = _log_form(logits, m, n, iterations, inner, BLOCK_M, BLOCK_N)
    else:
        found = _plan_form(logits, m, n, iterations, inner, BLOCK_M, BLOCK_N)
    found = tl.where(valid, found, 0.0)
    part = tl.where(valid, found * cosine, 0.0)
    tl.store(distance + example, tl.sum(tl.sum(tl.where(valid, found * (1.0 - cosine), 0.0), 1), 0))
    tl.store(inverse_word + first_word + word, word_inverse, mask=word < m)
    tl.store(inverse_region + first_region + region, region_inverse, mask=region < n)
    tl.store(share_word + first_word + word, tl.where(word_free, tl.sum(part, 0), 0.0), mask=word < m)
    tl.store(share_region + first_region + region, tl.where(region_free, tl.sum(part, 1), 0.0), mask=region < n)
    tl.store(
        plan + example.to(tl.int64) * tall * wide + region[:, None] * wide + word[None, :],
        found,
        mask=(region < tall)[:, None] & (word < wide)[None, :],
    )


@triton.jit
def _clear(gradient, begin, end, hidden, column, ROWS: tl.constexpr):
    """Zero rows begin..end of a gradient at ``column``."""
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        place = gradient + row[:, None].to(tl.int64) * hidden + column[None, :]
        tl.store(place, 0.0, mask=(row < end)[:, None] & (column < hidden)[None, :])


@triton.jit(do_not_specialize=["wide", "tall"])
def backward(
    words,
    regions,
    cu_words,
    cu_regions,
    hidden,
    wide,
    tall,
    plan,
    gradient,
    inverse_word,
    inverse_region,
    share_word,
    share_region,
    grad_words,
    grad_regions,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program per example and BLOCK_H columns; gradients of rows beyond ``wide`` and ``tall`` are 0."""
    example = tl.program_id(0)
    first_word, first_region = tl.load(cu_words + example), tl.load(cu_regions + example)
    m = tl.minimum(tl.load(cu_words + example + 1) - first_word, wide).to(tl.int32)
    n = tl.minimum(tl.load(cu_regions + example + 1) - first_region, tall).to(tl.int32)
    word, region = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden
    valid = (region < n)[:, None] & (word < m)[None, :]
    found = tl.load(
        plan + example.to(tl.int64) * tall * wide + region[:, None] * wide + word[None, :], mask=valid, other=0.0
    )
    slope = tl.load(gradient + example)
    word_inverse = tl.load(inverse_word + first_word + word, mask=word < m, other=0.0)
    region_inverse = tl.load(inverse_region + first_region + region, mask=region < n, other=0.0)
    weight = slope * found * region_inverse[:, None] * word_inverse[None, :]
    word_own = slope * word_inverse * word_inverse * tl.load(share_word + first_word + word, mask=word < m, other=0.0)
    region_share = tl.load(share_region + first_region + region, mask=region < n, other=0.0)
    region_own = slope * region_inverse * region_inverse * region_share
    x_place = (first_word + word[:, None]).to(tl.int64) * hidden + column[None, :]
    y_place = (first_region + region[:, None]).to(tl.int64) * hidden + column[None, :]
    x_mask, y_mask = (word < m)[:, None] & inside[None, :], (region < n)[:, None] & inside[None, :]
    x_MH = tl.load(words + x_place, mask=x_mask, other=0.0).to(tl.float32)
    y_NH = tl.load(regions + y_place, mask=y_mask, other=0.0).to(tl.float32)
    if EXACT:
        # Three TensorFloat-32 products are as exact as one in float32, which would leave the registers.
        to_x = tl.dot(tl.trans(weight), y_NH, input_precision="tf32x3")
        to_y = tl.dot(weight, x_MH, input_precision="tf32x3")
    else:  # gradients are rounded to half precision in the end: ten bits of the weights are enough
        to_x = tl.dot(tl.trans(weight), y_NH, input_precision="tf32")
        to_y = tl.dot(weight, x_MH, input_precision="tf32")
    tl.store(grad_words + x_place, (word_own[:, None] * x_MH - to_x).to(grad_words.dtype.element_ty), mask=x_mask)
    tl.store(grad_regions + y_place, (region_own[:, None] * y_NH - to_y).to(grad_regions.dtype.element_ty), mask=y_mask)
    # Nothing, unless a caller's bounds are too small.
    all_words = (tl.load(cu_words + example + 1) - first_word).to(tl.int32)
    all_regions = (tl.load(cu_regions + example + 1) - first_region).to(tl.int32)
    _clear(grad_words + first_word * hidden, wide, all_words, hidden, column, 16)
    _clear(grad_regions + first_region * hidden, tall, all_regions, hidden, column, 16)


@triton.jit(do_not_specialize=["iterations", "wide", "tall"])
def plan_of_cost(
    cost,
    word_lengths,
    region_counts,
    beta,
    iterations,
    inner,
    limit,
    wide,
    tall,
    plan,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per example; ``cost`` is [B, wide, tall], ``plan`` [B, tall, wide], as in ``forward``.

    Each program looks at its own costs and takes the log form where their logits spread beyond ``limit``: nobody else
    need look, and wait for the GPU.
    """
    example = tl.program_id(0)
    m = tl.minimum(tl.load(word_lengths + example), wide).to(tl.int32)
    n = tl.minimum(tl.load(region_counts + example), tall).to(tl.int32)
    word, region = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    valid = (region < n)[:, None] & (word < m)[None, :]
    first = example.to(tl.int64) * tall * wide
    costs = tl.load(cost + first + word[None, :] * tall + region[:, None], mask=valid, other=0.0).to(tl.float32)
    least = tl.min(tl.where(valid, costs, float("inf")), 1)
    spread = tl.max(tl.max(tl.where(valid, costs, float("-inf")), 1), 0) - tl.min(least, 0)
    logits = tl.where(valid, (least[:, None] - costs) / beta, float("-inf"))
    if spread / beta + tl.log(m.to(tl.float32) * n.to(tl.float32)) >= limit:
        found = _log_form(logits, m, n, iterations, inner, BLOCK_M, BLOCK_N)
    else:
        found = _plan_form(logits, m, n, iterations, inner, BLOCK_M, BLOCK_N)
    tl.store(
        plan + first + region[:, None] * wide + word[None, :],
        tl.where(valid, found, 0.0),
        mask=(region < tall)[:, None] & (word < wide)[None, :],
    )
