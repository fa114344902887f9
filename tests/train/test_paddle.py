"""UNIMO's optimiser step and schedule, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from vlscale.train.paddle import PaddleAdamW, linear_warmup_decay


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_three_steps_are_those_of_the_formula(weight_decay):
    draw = torch.Generator().manual_seed(0)
    start, grads = torch.randn(4, generator=draw), [torch.randn(4, generator=draw) * 1e-5 for _ in range(3)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = PaddleAdamW([parameter], lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay)
    value, first, second = start.double(), torch.zeros(4).double(), torch.zeros(4).double()
    for step, grad in enumerate(grads, 1):
        parameter.grad = grad.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * grad.double()
        second = 0.98 * second + 0.02 * grad.double() ** 2
        rate = 0.1 * math.sqrt(1 - 0.98**step) / (1 - 0.9**step)
        value = value - rate * first / (second.sqrt() + 1e-6) - 0.1 * weight_decay * value
        assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)
    plain = torch.nn.Parameter(start.clone())
    torchs = torch.optim.AdamW([plain], lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay)
    for grad in grads:
        plain.grad = grad.clone()
        torchs.step()
    assert (plain.detach() - value).abs().max() > 1e-2  # gradients as small as epsilon tell the rules apart


def test_the_rate_starts_at_zero_and_jumps_after_the_warm_up():
    rates = [linear_warmup_decay(step, 1.0, 4, 10) for step in range(12)]
    assert rates[:4] == [0.0, 0.25, 0.5, 0.75]
    assert rates[4:] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    assert linear_warmup_decay(0, 1.0, 0, 10) == 1.0
