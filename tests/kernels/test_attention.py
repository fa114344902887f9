"""The two attention backends against each other and against a plain softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vlscale.errors import VlscaleError
from vlscale.kernels.attention import attention
from vlscale.ragged import cumulative

CASES = {
    "equal": ([5, 5, 5], [5, 5, 5]),
    "ragged": ([3, 7, 1, 4], [3, 7, 1, 4]),
    "cross": ([2, 6, 3], [5, 1, 4]),
    "empty in the middle": ([3, 0, 2], [3, 0, 2]),
    "empty at the ends": ([0, 4, 0], [0, 4, 0]),
    "queries without keys": ([3, 2, 1], [0, 4, 2]),
    "keys without queries": ([0, 2, 1], [3, 4, 2]),
    "more queries than keys": ([6, 4], [2, 3]),
}


def _inputs(lengths_q: list[int], lengths_k: list[int], dtype=torch.float64, heads: int = 2, width: int = 8):
    draw = torch.Generator().manual_seed(sum(lengths_q) * 31 + sum(lengths_k))

    def rows(lengths: list[int]) -> Tensor:
        drawn = torch.randn(sum(lengths), heads, width, generator=draw, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    q, k, v = rows(lengths_q), rows(lengths_k), rows(lengths_k)
    cu_q, cu_k = cumulative(torch.tensor(lengths_q)), cumulative(torch.tensor(lengths_k))
    return (q, k, v), (cu_q, cu_q if lengths_q == lengths_k else cu_k, max(lengths_q), max(lengths_k))


def _by_hand(q, k, v, cu_q, cu_k, max_q, max_k, causal: bool) -> Tensor:
    """Row by row, from the definition."""
    rows = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        for i in range(b - a):
            seen = min(d - c, i + 1 + (d - c) - (b - a)) if causal else d - c
            if seen <= 0:
                rows.append(q[a + i] * 0)
                continue
            scores = torch.einsum("hd,khd->hk", q[a + i], k[c : c + seen]) / q.shape[-1] ** 0.5
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[c : c + seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["padded", "packed", "auto"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_follow_the_definition(case, causal, backend):
    tensors, layout = _inputs(*CASES[case])
    found = attention(*tensors, *layout, causal=causal, backend=backend)
    expected = _by_hand(*tensors, *layout, causal)
    assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        assert gradient.isfinite().all()
        assert_close(gradient, wanted)


@pytest.mark.parametrize("backend", ["padded", "packed"])
def test_decoding_token_by_token_over_cached_keys_is_causal_attention(backend):
    lengths = [5, 2, 7]
    (q, k, v), (cu, _, longest, _) = _inputs(lengths, lengths)
    whole = attention(q, k, v, cu, cu, longest, longest, causal=True, backend=backend).split(lengths)
    parts = [x.split(lengths) for x in (q, k, v)]
    for step in range(longest):
        alive = [row for row, length in enumerate(lengths) if step < length]
        query = torch.cat([parts[0][row][step : step + 1] for row in alive])
        keys, values = (torch.cat([part[row][: step + 1] for row in alive]) for part in parts[1:])
        cu_q, cu_k = (cumulative(torch.full((len(alive),), count)) for count in (1, step + 1))
        found = attention(query, keys, values, cu_q, cu_k, 1, step + 1, causal=True, backend=backend)
        assert_close(found, torch.stack([whole[row][step] for row in alive]))


@pytest.mark.parametrize("backend", ["padded", "packed"])
def test_a_prefix_is_two_calls(backend):
    """Sequence to sequence: the source sees itself, the target sees the source and what it has said."""
    source, target = [4, 1, 3], [2, 5, 3]
    (q, k, v), _ = _inputs([a + b for a, b in zip(source, target, strict=True)], [7, 6, 6], heads=2)
    k, v = q * 0.5, q + 1
    both = [a + b for a, b in zip(source, target, strict=True)]
    is_source = torch.cat([torch.arange(a + b) < a for a, b in zip(source, target, strict=True)])
    cu_s, cu_t, cu_b = (cumulative(torch.tensor(counts)) for counts in (source, target, both))
    found = torch.zeros_like(q)
    seen = [x[is_source] for x in (q, k, v)]
    found[is_source] = attention(*seen, cu_s, cu_s, max(source), max(source), backend=backend)
    found[~is_source] = attention(q[~is_source], k, v, cu_t, cu_b, max(target), max(both), causal=True, backend=backend)
    begin = 0
    for first, second in zip(source, target, strict=True):
        rows = slice(begin, begin + first + second)
        allowed = torch.ones(first + second, first + second, dtype=torch.bool).tril()
        allowed[:first, :first] = True
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        assert_close(found[rows], torch.einsum("hqk,khd->qhd", weights, v[rows]))
        begin += first + second


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5), st.booleans())
def test_backends_agree_for_any_lengths(lengths, causal):
    tensors, layout = _inputs([q for q, _ in lengths], [k for _, k in lengths])
    padded, packed = (attention(*tensors, *layout, causal=causal, backend=name) for name in ("padded", "packed"))
    assert padded.isfinite().all()
    assert_close(padded, packed)


@pytest.mark.parametrize("backend", ["padded", "packed"])
def test_order_of_examples_does_not_matter(backend):
    lengths = [3, 5, 2]
    (q, k, v), layout = _inputs(lengths, lengths)
    plain = attention(q, k, v, *layout, backend=backend).split(lengths)
    order = [2, 0, 1]
    shuffled = [torch.cat([x.split(lengths)[i] for i in order]) for x in (q, k, v)]
    cu = cumulative(torch.tensor(lengths)[order])
    found = attention(*shuffled, cu, cu, 5, 5, backend=backend)
    assert_close(found, torch.cat([plain[i] for i in order]))


@pytest.mark.parametrize("backend", ["padded", "packed"])
def test_examples_do_not_see_each_other(backend):
    lengths = [4, 6]
    (q, k, v), layout = _inputs(lengths, lengths)
    before = attention(q, k, v, *layout, backend=backend)[:4]
    changed = [torch.cat([x[:4], x[4:] + 100.0]) for x in (q, k, v)]
    assert torch.equal(attention(*changed, *layout, backend=backend)[:4], before)


@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("lengths", [[64] * 40, [64, 32] * 20])
def test_dropout_keeps_the_mean_and_follows_the_seed(backend, lengths):
    (q, k, _), layout = _inputs(lengths, lengths, torch.float32)
    v = torch.ones_like(k)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(q, k, v, *layout, dropout_p=0.25, backend=backend)

    first = run(0)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))
    assert first.std() > 0.01
    assert abs(first.mean().item() - 1.0) < 0.01


@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[32, 32], [32, 17]])
def test_softmax_is_taken_in_float32(backend, dtype, lengths):
    """Scores near 60 differ by less than half precision resolves at that size; only their differences count."""
    draw = torch.Generator().manual_seed(0)
    base = torch.full((sum(lengths), 1, 16), 4.0)
    q, k = base.to(dtype), (base + 0.05 * torch.randn(base.shape, generator=draw)).to(dtype)
    v = torch.randn(base.shape, generator=draw).to(dtype)
    cu = cumulative(torch.tensor(lengths))
    found = attention(q, k, v, cu, cu, 32, 32, backend=backend)
    assert found.dtype == dtype
    exact = attention(q.double(), k.double(), v.double(), cu, cu, 32, 32, backend="packed")
    assert (found.double() - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backend", ["padded", "packed"])
def test_nothing_to_do(backend):
    cu = torch.zeros(3, dtype=torch.int32)
    empty = torch.zeros(0, 2, 8, requires_grad=True)
    attention(empty, empty, empty, cu, cu, 0, 0, backend=backend).sum().backward()
    some = torch.ones(3, 2, 8)
    assert attention(some, empty, empty, torch.tensor([0, 1, 3]), cu, 2, 0, backend=backend).eq(0).all()


def test_unknown_backend_names_the_nearest():
    tensors, layout = _inputs([2], [2])
    with pytest.raises(VlscaleError, match="did you mean 'packed'"):
        attention(*tensors, *layout, backend="paked")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_varlen_kernels_equal_padded_on_cuda(case, causal, dtype):
    tensors, (cu_q, cu_k, max_q, max_k) = _inputs(*CASES[case], width=64)
    cu_q, same = cu_q.cuda(), cu_q is cu_k
    layout = (cu_q, cu_q if same else cu_k.cuda(), max_q, max_k)
    on_device = [x.detach().to("cuda", dtype).requires_grad_() for x in tensors]
    expected = _by_hand(*tensors, *layout, causal)
    found = attention(*on_device, *layout, causal=causal, backend="packed")
    tolerance = {"rtol": 1e-2, "atol": 5e-3} if dtype == torch.float16 else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(found.double().cpu(), expected, **tolerance)
    gradients = torch.autograd.grad(found.float().square().sum(), on_device)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
        assert_close(gradient.double().cpu(), wanted, rtol=5e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_varlen_dropout_on_cuda(dtype):
    lengths = [64, 32] * 20
    (q, k, _), (cu, _, longest, _) = _inputs(lengths, lengths, dtype, width=64)
    q, k, cu = q.cuda(), k.cuda(), cu.cuda()
    torch.manual_seed(0)
    out = attention(q, k, torch.ones_like(k), cu, cu, longest, longest, dropout_p=0.25, backend="packed")
    assert out.std() > 0.01
    assert abs(out.float().mean().item() - 1.0) < 0.02
