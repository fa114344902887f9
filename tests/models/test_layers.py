"""Layers that initialise themselves, and LayerNorm in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlscale.models.layers import Embedding, FeedForward, Initializer, Linear, SelfAttention

NORMAL = Initializer("normal", 0.02)


def test_layers_are_complete_when_constructed():
    torch.manual_seed(0)
    first = Linear(64, 128, NORMAL)
    torch.manual_seed(0)
    assert torch.equal(Linear(64, 128, NORMAL).weight, first.weight)
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.bias.eq(0).all()
    assert Linear(64, 128, Initializer("fan_in", 0.02)).weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert Embedding(300, 64, Initializer("fan_in", 0.02)).weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    first.reset_parameters()
    assert first.bias.eq(0).all()


def test_feed_forward_uses_the_exact_gelu():
    layer = FeedForward(1, 1, NORMAL).double()
    with torch.no_grad():
        for linear in (layer.up, layer.down):
            linear.weight.fill_(1.0)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    assert torch.allclose(layer(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)), atol=1e-12)


def test_self_attention_splits_heads_as_separate_projections_would():
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, 0.0, "padded", Initializer("fan_in", 0.02)).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    q, k, v = (x @ weight.T for weight in layer.qkv.weight.chunk(3))
    heads = [(q[:, part] @ k[:, part].T / 2.0).softmax(-1) @ v[:, part] for part in (slice(0, 4), slice(4, 8))]
    expected = torch.cat(heads, 1) @ layer.out.weight.T
    assert torch.allclose(layer(x, torch.tensor([0, 5], dtype=torch.int32), 5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_takes_its_statistics_in_float32(dtype):
    """A mean of 100 beside a deviation of 1: sums of 768 such numbers do not fit half precision."""
    torch.manual_seed(0)
    x = (100 + torch.randn(4, 768)).to(dtype)
    norm = nn.LayerNorm(768, 1e-12)
    exact = norm.double()(x.double())
    found = norm.to(dtype)(x).double()
    assert (found - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
