"""The two attention backends against each other and against a plain softmax.

What is checked stands in functions of a device, a dtype and a backend: tests on the CPU and tests on a GPU, which
machines without one skip, call the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vlscale.errors import VlscaleError
from vlscale.kernels import attention as attention_module
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

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
VALUES = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-7},
    torch.float32: {"rtol": 1e-3, "atol": 1e-4},
    torch.float16: {"rtol": 1e-2, "atol": 5e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 3e-2},
}
GRADIENTS = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-7},
    torch.float32: {"rtol": 1e-3, "atol": 1e-3},
    torch.float16: {"rtol": 2e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 6e-2},
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


def _check_definition(case: str, causal: bool, backend: str, dtype=torch.float64, device="cpu", long_cu=False) -> None:
    drawn, (cu_q, cu_k, max_q, max_k) = _inputs(*CASES[case], dtype, width=8 if device == "cpu" else 64)
    tensors = [x.detach().to(device).requires_grad_() for x in drawn]
    exact = [x.detach().double().requires_grad_() for x in drawn]  # of the rounded numbers
    on_device = cu_q.to(device, torch.int64 if long_cu else torch.int32)
    layout = (on_device, on_device if cu_q is cu_k else cu_k.to(on_device), max_q, max_k)
    found = attention(*tensors, *layout, causal=causal, backend=backend)
    assert found.dtype == dtype
    expected = _by_hand(*exact, cu_q, cu_k, max_q, max_k, causal)
    assert_close(found.double().cpu(), expected, **VALUES[dtype])
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found.double() * weights.to(device)).sum(), tensors)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert gradient.isfinite().all()
        assert_close(gradient.double().cpu(), wanted, **GRADIENTS[dtype])


def _check_decoding(backend: str, dtype=torch.float64, device="cpu") -> None:
    """Token by token over cached keys."""
    lengths = [5, 2, 7]
    drawn, (cu, _, longest, _) = _inputs(lengths, lengths, dtype)
    whole = _by_hand(*(x.detach().double() for x in drawn), cu, cu, longest, longest, True).split(lengths)
    parts = [x.detach().to(device).split(lengths) for x in drawn]
    for step in range(longest):
        alive = [row for row, length in enumerate(lengths) if step < length]
        query = torch.cat([parts[0][row][step : step + 1] for row in alive])
        keys, values = (torch.cat([part[row][: step + 1] for row in alive]) for part in parts[1:])
        cu_q, cu_k = (cumulative(torch.full((len(alive),), count)).to(device) for count in (1, step + 1))
        found = attention(query, keys, values, cu_q, cu_k, 1, step + 1, causal=True, backend=backend)
        assert_close(found.double().cpu(), torch.stack([whole[row][step] for row in alive]), **VALUES[dtype])


def _check_prefix(backend: str, dtype=torch.float64, device="cpu") -> None:
    """Sequence to sequence: the source sees itself, the target sees the source and what it has said."""
    source, target = [4, 1, 3], [2, 5, 3]
    both = [a + b for a, b in zip(source, target, strict=True)]
    q, k, v = (x.detach().to(device) for x in _inputs(both, both, dtype)[0])
    is_source = torch.cat([torch.arange(a + b) < a for a, b in zip(source, target, strict=True)]).to(device)
    cu_s, cu_t, cu_b = (cumulative(torch.tensor(counts)).to(device) for counts in (source, target, both))
    found = torch.zeros_like(q)
    seen = [x[is_source] for x in (q, k, v)]
    found[is_source] = attention(*seen, cu_s, cu_s, max(source), max(source), backend=backend)
    found[~is_source] = attention(q[~is_source], k, v, cu_t, cu_b, max(target), max(both), causal=True, backend=backend)
    begin = 0
    for first, second in zip(source, target, strict=True):
        rows = slice(begin, begin + first + second)
        allowed = torch.ones(first + second, first + second, dtype=torch.bool, device=device).tril()
        allowed[:first, :first] = True
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k[rows].double()) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        assert_close(found[rows].double(), torch.einsum("hqk,khd->qhd", weights, v[rows].double()), **VALUES[dtype])
        begin += first + second


@pytest.mark.parametrize("backend", ["padded", "packed", "auto"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_follow_the_definition(case, causal, backend):
    _check_definition(case, causal, backend)


@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_values_and_of_counts(dtype, backend):
    for case in CASES:
        _check_definition(case, True, backend, dtype, long_cu=True)


@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_token_by_token_over_cached_keys_is_causal_attention(backend, dtype):
    _check_decoding(backend, dtype)


@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefix_is_two_calls(backend, dtype):
    _check_prefix(backend, dtype)


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


def _check_dropout(lengths: list[int], backend: str, dtype=torch.float32, device="cpu") -> None:
    drawn, (cu, _, longest, _) = _inputs(lengths, lengths, dtype, width=8 if device == "cpu" else 64)
    q, k = (x.detach().to(device) for x in drawn[:2])
    v, cu = torch.ones_like(k), cu.to(device)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(q, k, v, cu, cu, longest, longest, dropout_p=0.25, backend=backend)

    first = run(0)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))
    assert first.float().std() > 0.01
    assert abs(first.double().mean().item() - 1.0) < (0.01 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("lengths", [[64] * 40, [64, 32] * 20])
def test_dropout_keeps_the_mean_and_follows_the_seed(backend, lengths):
    _check_dropout(lengths, backend)


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


CU = torch.tensor([0, 2, 5], dtype=torch.int32)
MISFITS = {
    "q, k and v of one dtype": ({"k": torch.ones(5, 2, 8, dtype=torch.float64)}, "k is torch.float64 on cpu, q is"),
    "whole numbers": ({"q": torch.ones(5, 2, 8, dtype=torch.int64)}, "q is torch.int64"),
    "no heads": ({"v": torch.ones(5, 16)}, r"v is torch.float32 \[5, 16\], expected a float tensor"),
    "one head for all": ({"v": torch.ones(5, 1, 8)}, r"v is \[5, 1, 8\], expected \[5, 2, 8\]"),
    "another width": ({"k": torch.ones(5, 2, 4), "v": torch.ones(5, 2, 4)}, r"k is \[5, 2, 4\], expected \[5, 2, 8\]"),
    "fewer values than keys": ({"v": torch.ones(4, 2, 8)}, r"v is \[4, 2, 8\]"),
    "another device": ({"k": torch.ones(5, 2, 8, device="meta")}, "on meta"),
    "float counts": ({"cu_q": CU.float()}, "cu_q is torch.float32"),
    "lengths for cumulative lengths": ({"cu_k": torch.tensor([2, 3, 3])}, "cu_k goes from 2 to 3, expected 0 to 5"),
    "counts on another device": ({"cu_k": CU.to("meta")}, "cu_k is on meta, k on cpu"),
    "counts that start late": ({"cu_q": CU - 1}, "cu_q goes from -1 to 4"),
    "counts that fall": ({"cu_k": torch.tensor([0, 6, 5])}, "cu_k falls after example 1"),
    "another number of examples": ({"cu_k": torch.tensor([0, 1, 3, 5])}, "cu_q is of 2 examples, cu_k of 3"),
    "longest query one too small": ({"max_q": 2}, "max_q is 2"),
    "longest key one too small": ({"max_k": 2}, "max_k is 2"),
    "negative": ({"max_k": -1}, "max_k is -1"),
    "no probability": ({"dropout_p": 1.5}, "dropout_p is 1.5"),
}


@pytest.mark.parametrize("backend", ["padded", "packed", "auto"])
@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_before_anything_runs(case, backend):
    changes, message = MISFITS[case]
    rows = torch.ones(5, 2, 8)
    arguments = {"q": rows, "k": rows, "v": rows, "cu_q": CU, "cu_k": CU, "max_q": 3, "max_k": 3, **changes}
    with pytest.raises(ValueError, match=message):
        attention(**arguments, backend=backend)


def test_a_longest_length_too_small_is_refused_where_counts_are_not_looked_at(monkeypatch):
    """What can be known of tensors on a GPU; one that is compiled, on a CPU, shall not be waited for either."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    rows = torch.ones(5, 2, 8)
    with pytest.raises(ValueError, match="max_q is 2, too small for 5 rows of 2 examples"):
        attention(rows, rows, rows, CU, CU, 2, 3)


def test_a_v100_has_no_kernel_for_bfloat16(monkeypatch):
    rows = torch.ones(5, 2, 64)
    half, brain, double = (rows.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64))
    problem, takes_flash = attention_module._varlen_problem, attention_module._takes_flash
    monkeypatch.setattr(attention_module, "_capability", lambda device: (7, 0))
    assert "bfloat16 needs sm_80 or later" in problem(brain, brain, brain)
    assert problem(half, half, half) is None
    assert not takes_flash(half)
    monkeypatch.setattr(attention_module, "_capability", lambda device: (8, 0))
    assert problem(brain, brain, brain) is None
    assert takes_flash(brain)
    assert not takes_flash(rows)
    assert "float64" in problem(double, double, double)
    assert "multiple of 8" in problem(*[half[..., :60]] * 3)
    assert "side by side" in problem(half, half, half.transpose(1, 2).contiguous().transpose(1, 2))


class _Calls(TorchDispatchMode):
    """Notes the operators called, with their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        self.found[func._schema.name] = dict(zip(names, args, strict=False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("capability", "dtype", "kernel", "bound"),
    [
        ((8, 0), torch.bfloat16, "_flash_attention_forward", "cum_seq_q"),
        ((8, 0), torch.float32, "_efficient_attention_forward", "cu_seqlens_q"),
        ((7, 0), torch.float16, "_efficient_attention_forward", "cu_seqlens_q"),
        ((7, 0), torch.bfloat16, None, None),  # padded
    ],
)
def test_what_a_gpu_would_run(monkeypatch, capability, dtype, kernel, bound, counts):
    """Without a GPU: tensors that have a device and shapes, but no numbers."""
    monkeypatch.setattr(attention_module, "_capability", lambda device: capability)
    with FakeTensorMode(), _Calls() as calls:
        q, k, v = (torch.empty(rows, 2, 64, device="cuda:0", dtype=dtype) for rows in (8, 10, 10))
        cu_q, cu_k = (torch.empty(4, device="cuda:0", dtype=counts) for _ in range(2))
        out = attention(q, k, v, cu_q, cu_k, 3, 5, causal=True, dropout_p=0.125)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    varlen = {name: given for name, given in calls.found.items() if name.endswith("_attention_forward")}
    assert [*varlen] == ([f"aten::{kernel}"] if kernel else [])
    if kernel:
        (given,) = varlen.values()
        assert given[bound].dtype == torch.int32
        assert given["dropout_p"] == 0.125
        assert given.get("is_causal", given.get("custom_mask_type")) in (True, 2)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_CUDA = [
    ("flash", torch.float16), ("flash", torch.bfloat16),
    ("memory-efficient", torch.float16), ("memory-efficient", torch.bfloat16), ("memory-efficient", torch.float32),
    ("padded", torch.float16), ("padded", torch.bfloat16), ("padded", torch.float32),
]  # fmt: skip


@pytest.fixture
def _cuda_kernel(request, monkeypatch):
    """Make ``packed`` run the kernel named; memory-efficient in float16 is what a V100 runs, on any GPU."""
    name, dtype = request.getfixturevalue("kernel"), request.getfixturevalue("dtype")
    if torch.cuda.get_device_capability() < (8, 0) and (name == "flash" or dtype == torch.bfloat16):
        pytest.skip("needs sm_80")
    if name == "memory-efficient":
        monkeypatch.setattr(attention_module, "_takes_flash", lambda q: False)
    elif name == "flash":
        assert attention_module._takes_flash(torch.ones(1, 1, 64, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.usefixtures("_cuda_kernel")
@pytest.mark.parametrize(("kernel", "dtype"), ON_CUDA)
class TestOnCuda:
    """The checks above in each kernel of a GPU."""

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients_follow_the_definition(self, case, causal, kernel, dtype):
        _check_definition(case, causal, _backend(kernel), dtype, "cuda")

    def test_counts_may_be_int64(self, kernel, dtype):
        _check_definition("cross", True, _backend(kernel), dtype, "cuda", long_cu=True)

    def test_decoding_token_by_token_over_cached_keys_is_causal_attention(self, kernel, dtype):
        _check_decoding(_backend(kernel), dtype, "cuda")

    def test_a_prefix_is_two_calls(self, kernel, dtype):
        _check_prefix(_backend(kernel), dtype, "cuda")

    def test_dropout_keeps_the_mean_and_follows_the_seed(self, kernel, dtype):
        _check_dropout([64, 32] * 20, _backend(kernel), dtype, "cuda")


def _backend(kernel: str) -> str:
    return "padded" if kernel == "padded" else "packed"
