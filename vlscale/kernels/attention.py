"""Scaled dot-product attention over packed sequences.

One function serves self-, co- and cross-attention, cached decoding and sequence-to-sequence training: queries and keys
are packed one example after the other, and may differ in length. Two backends compute the same numbers:

* ``padded``: queries and keys are laid out as [B, heads, L, d], PyTorch's fused attention runs under a boolean mask,
  and the rows are packed again. Runs anywhere.
* ``packed``: no padding. On CUDA the variable-length kernels inside PyTorch (FlashAttention for half precision from
  sm_80 on, otherwise the memory-efficient kernel, which is what a V100 uses in float16 and float32), both with
  dropout; on the CPU one call per example.

The softmax is taken in float32 by every one of these kernels, also for float16 and bfloat16 inputs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vlscale.errors import VlscaleError, nearest
from vlscale.ragged import owners

Backend = Literal["auto", "padded", "packed"]
BACKENDS: tuple[str, ...] = get_args(Backend)
PER_EXAMPLE_FROM = 32
"""Keys from which ``auto`` packs on a CPU; below, calls cost more than padding (one thread, widths 128 and 768)."""
_BOTTOM_RIGHT = 2  # custom_mask_type of the memory-efficient kernel
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_AMPERE = (8, 0)
"""From here on GPUs have FlashAttention, and attention kernels for bfloat16 at all."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attend within each example: ``softmax(q k^T / sqrt(d)) v``.

    A query that sees no key (its example has none, or ``causal`` hides them all) gets zeros.

    Args:
        q: float [Nq, heads, d], the queries of all examples, one example after the other.
        k: float [Nk, heads, d], of the dtype and on the device of ``q``.
        v: float [Nk, heads, d], likewise.
        cu_q: int32 or int64 [B+1], cumulative query counts. Pass the same tensor as ``cu_k`` for self-attention.
        cu_k: int32 or int64 [B+1], cumulative key counts.
        max_q: largest query count of an example, as a Python number so that no device has to be waited for. On a GPU
            it and ``cu_q`` are the caller's word: looking at the counts would wait.
        max_k: largest key count of an example.
        causal: query i of an example sees keys j <= i + (keys - queries): the last query sees all keys.
        dropout_p: probability of dropping an attention weight; the caller passes 0 in evaluation.
        backend: ``padded``, ``packed``, or ``auto``: packed where CUDA's kernels take these tensors, and on a CPU from
            32 keys on (shorter examples are faster padded); else padded.

    Returns:
        float [Nq, heads, d], of the dtype of ``q``.

    Raises:
        VlscaleError: unknown backend, or ``packed`` where no kernel takes these tensors.
        ValueError: shapes, dtypes, devices or lengths do not fit together; raised before anything runs.
    """
    if backend not in BACKENDS:
        raise VlscaleError(f"attention backend {backend!r} is unknown{nearest(backend, BACKENDS)} (known: {BACKENDS})")
    _check(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p)
    if q.shape[0] == 0:
        return q
    if k.shape[0] == 0:
        return torch.zeros_like(q)
    if backend == "auto":
        packs = _varlen_problem(q, k, v) is None if q.is_cuda else max_k >= PER_EXAMPLE_FROM
        backend = "packed" if packs else "padded"
    if backend == "padded":
        return _padded(q, k, v, cu_q, cu_k, max_q, max_k, causal, dropout_p)
    if q.is_cuda:
        return _varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, dropout_p)
    return _per_example(q, k, v, cu_q, cu_k, causal, dropout_p)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
) -> None:
    for name, rows in (("q", q), ("k", k), ("v", v)):
        if rows.dim() != 3 or rows.dtype not in _FLOATS:
            raise ValueError(f"{name} is {rows.dtype} {list(rows.shape)}, expected a float tensor [N, heads, d]")
        if rows.dtype != q.dtype or rows.device != q.device:
            raise ValueError(
                f"{name} is {rows.dtype} on {rows.device}, q is {q.dtype} on {q.device}: expected the same"
            )
    heads, width = q.shape[1:]
    if not heads or not width:
        raise ValueError(f"q is {list(q.shape)}: expected at least one head of width 1")
    for name, rows in (("k", k), ("v", v)):
        if rows.shape != (k.shape[0], heads, width):
            expected = [k.shape[0], heads, width]
            raise ValueError(f"{name} is {list(rows.shape)}, expected {expected} (q is {list(q.shape)})")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0..1")
    if cu_q.numel() != cu_k.numel():
        raise ValueError(f"cu_q is of {cu_q.numel() - 1} examples, cu_k of {cu_k.numel() - 1}")
    _check_lengths("q", q.shape[0], cu_q, max_q, q.device)
    if cu_k is not cu_q or k.shape[0] != q.shape[0] or max_k != max_q:  # else a layer of self-attention looks once
        _check_lengths("k", k.shape[0], cu_k, max_k, q.device)


def _check_lengths(name: str, rows: int, cu: Tensor, longest: int, device: torch.device) -> None:
    if cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in _INTEGERS:
        raise ValueError(f"cu_{name} is {cu.dtype} {list(cu.shape)}, expected int32 or int64 [B+1]")
    if cu.device != device:
        raise ValueError(f"cu_{name} is on {cu.device}, {name} on {device}")
    if longest < 0:
        raise ValueError(f"max_{name} is {longest}, expected 0 or more")
    # A GPU would have to be waited for; a compiler does not know the values.
    if cu.device.type != "cpu" or torch.compiler.is_compiling():
        if rows > (cu.numel() - 1) * longest:
            raise ValueError(f"max_{name} is {longest}, too small for {rows} rows of {cu.numel() - 1} examples")
        return
    ends = cu.tolist()
    if ends[0] != 0 or ends[-1] != rows:
        raise ValueError(f"cu_{name} goes from {ends[0]} to {ends[-1]}, expected 0 to {rows}, the rows of {name}")
    lengths = [after - before for before, after in pairwise(ends)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"cu_{name} falls after example {lengths.index(min(lengths))}: a negative length")
    if lengths and max(lengths) > longest:
        raise ValueError(f"max_{name} is {longest}, an example has {max(lengths)} rows of {name}")


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    batch = cu_q.numel() - 1
    slots_q = _slots(cu_q, q.shape[0], max_q)
    slots_k = slots_q if cu_q is cu_k else _slots(cu_k, k.shape[0], max_k)
    q_BHLD = _pad(q, slots_q, batch, max_q)
    k_BHLD, v_BHLD = (_pad(x, slots_k, batch, max_k) for x in (k, v))
    visible = blind = None
    if causal or k.shape[0] != batch * max_k:
        visible = _visible(cu_q, cu_k, max_q, max_k, causal)
        # A row without any visible key would be 0/0: let it see everything, and blank it afterwards.
        blind = ~visible.any(-1, keepdim=True)
        visible = visible | blind
    out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=visible, dropout_p=dropout_p)
    if blind is not None and cu_q is not cu_k:  # in self-attention every query sees itself
        out_BHLD = out_BHLD.masked_fill(blind, 0.0)
    return out_BHLD.transpose(1, 2).reshape(batch * max_q, *q.shape[1:]).index_select(0, slots_q)


def _slots(cu: Tensor, total: int, longest: int) -> Tensor:
    """int64 [total], row of each packed position in the flattened [B * longest] layout."""
    owner = owners(cu, total)
    return torch.arange(total, device=cu.device) + owner * longest - cu.long().index_select(0, owner)


def _pad(packed_NHD: Tensor, slots: Tensor, batch: int, longest: int) -> Tensor:
    """Return [B, heads, longest, d], zero where an example has no position."""
    flat = packed_NHD.new_zeros(batch * longest, *packed_NHD.shape[1:]).index_copy(0, slots, packed_NHD)
    return flat.view(batch, longest, *packed_NHD.shape[1:]).transpose(1, 2)


def _visible(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> Tensor:
    """bool [B, 1, 1 or Lq, Lk], True where a query may look."""
    queries, keys = cu_q.diff()[:, None, None], cu_k.diff()[:, None, None]
    key = torch.arange(max_k, device=cu_k.device)
    visible = key < keys
    if causal:
        query = torch.arange(max_q, device=cu_q.device)[:, None]
        visible = visible & (key - query <= keys - queries)
    return visible[:, None]


def _per_example(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, dropout_p: float) -> Tensor:
    """The packed layout on a CPU: no padding, one attention call per example."""
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    outputs = []
    for q_i, k_i, v_i in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        queries, keys = q_i.shape[0], k_i.shape[0]
        if queries == 0 or keys == 0:
            outputs.append(torch.zeros_like(q_i))
            continue
        hidden = max(queries - keys, 0) if causal else 0  # queries that lie before the first key
        mask = q_i.new_ones(queries - hidden, keys, dtype=torch.bool).tril(keys - queries + hidden) if causal else None
        q_HLD, k_HLD, v_HLD = (x.transpose(0, 1)[None] for x in (q_i[hidden:], k_i, v_i))
        seen = F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD, mask, dropout_p)[0].transpose(0, 1)
        outputs.append(F.pad(seen, (0, 0, 0, 0, hidden, 0)))
    return torch.cat(outputs)


def _varlen_problem(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the CUDA kernels cannot take these tensors, or None."""
    if not hasattr(torch.ops.aten, "_efficient_attention_forward"):
        return "this PyTorch has no variable-length attention"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype} is not supported"
    if q.dtype == torch.bfloat16 and (found := _capability(q.device)) < _AMPERE:
        return f"bfloat16 needs sm_80 or later, {q.device} is sm_{found[0]}{found[1]}: take float16"
    if q.shape[-1] % 8:
        return f"head width {q.shape[-1]} is not a multiple of 8"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the numbers of a head do not lie side by side (hand over contiguous tensors)"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; a function so that tests can be another one."""
    return torch.cuda.get_device_capability(device)


def _takes_flash(q: Tensor) -> bool:
    """Whether FlashAttention runs rather than the memory-efficient kernel; tests switch it off here."""
    return q.dtype != torch.float32 and q.shape[-1] <= 256 and _capability(q.device) >= _AMPERE


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    problem = _varlen_problem(q, k, v)
    if problem:
        raise VlscaleError(f"attention backend 'packed': {problem}; use attention_backend: padded")
    bounds = (cu_q.to(torch.int32), cu_k.to(torch.int32), max_q, max_k)  # the kernels know no int64
    # The public torch.nn.attention.varlen has no dropout, so the operators underneath are called directly.
    if _takes_flash(q):
        out = torch.ops.aten._flash_attention_forward(q, k, v, *bounds, dropout_p, causal, False, scale=None)[0]
    else:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        mask = _BOTTOM_RIGHT if causal else 0
        out = torch.ops.aten._efficient_attention_forward(
            q[None], k[None], v[None], None, *bounds, dropout_p, mask, needs_grad
        )[0][0]
    if cu_q is cu_k:
        return out
    # Kernels differ in what they leave in rows that see no key.
    owner = owners(cu_q, q.shape[0])
    queries, keys = cu_q.diff().index_select(0, owner), cu_k.diff().index_select(0, owner)
    blind = keys == 0
    if causal:
        within = torch.arange(q.shape[0], device=q.device) - cu_q.index_select(0, owner)
        blind = blind | (within + keys - queries < 0)
    return out.masked_fill(blind[:, None, None], 0.0)
