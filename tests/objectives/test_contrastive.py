"""Circle loss and the contrastive loss with several positives, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from vlscale.errors import VlscaleError
from vlscale.objectives.contrastive import circle_loss, contrastive_loss
from vlscale.ragged import cumulative

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def _similarities(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("margin", "scale"), [(0.2, 1.0), (0.25, 32.0)])
def test_circle_loss_and_its_gradient(margin, scale):
    positive, negative = _similarities(3, 2).requires_grad_(), _similarities(3, 5, seed=1).requires_grad_()
    losses = circle_loss(positive, negative, margin, scale)
    losses.sum().backward()
    parts = (positive.detach(), negative.detach(), losses.detach(), positive.grad, negative.grad)
    for p, n, loss, grad_p, grad_n in zip(*parts, strict=True):
        of_p = [max(0.0, 1 + margin - float(s)) for s in p]
        of_n = [max(0.0, float(s) + margin) for s in n]
        sum_p = sum(math.exp(-scale * a * (float(s) - (1 - margin))) for a, s in zip(of_p, p, strict=True))
        sum_n = sum(math.exp(scale * a * (float(s) - margin)) for a, s in zip(of_n, n, strict=True))
        assert float(loss) == pytest.approx(math.log(1 + sum_p * sum_n), rel=1e-10)
        share = sum_p * sum_n / (1 + sum_p * sum_n)  # the weights are constants of the gradient
        for a, s, grad in zip(of_p, p, grad_p, strict=True):
            expected = -scale * a * share * math.exp(-scale * a * (float(s) - (1 - margin))) / sum_p
            assert float(grad) == pytest.approx(expected, rel=1e-9)
        for a, s, grad in zip(of_n, n, grad_n, strict=True):
            expected = scale * a * share * math.exp(scale * a * (float(s) - margin)) / sum_n
            assert float(grad) == pytest.approx(expected, rel=1e-9)


def test_circle_loss_does_not_overflow():
    losses = circle_loss(torch.zeros(1, 1), torch.ones(1, 4), scale=1000.0)
    assert torch.isfinite(losses).all()
    assert circle_loss(torch.zeros(1, 1).half(), torch.ones(1, 4).half()).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((2, 0), (2, 3)), ((2, 1), (2, 0)), ((2, 1), (3, 1)), ((2,), (2, 1))])
def test_circle_loss_wants_positives_and_negatives(shapes):
    with pytest.raises(VlscaleError, match="circle loss: "):
        circle_loss(*(torch.zeros(shape) for shape in shapes))


def test_contrastive_loss_of_groups_of_any_size():
    lengths = torch.tensor([4, 1, 6])
    scores = (_similarities(11) * 4 - 2).requires_grad_()
    positive = torch.tensor([True, False, True, False, True, False, False, True, False, False, False])
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    losses = contrastive_loss(scores, positive, cumulative(lengths), temperature)
    expected = [
        part.div(temperature).logsumexp(0) - part[chosen].div(temperature).logsumexp(0)
        for part, chosen in zip(scores.split(lengths.tolist()), positive.split(lengths.tolist()), strict=True)
    ]
    assert_close(losses, torch.stack(expected), **EXACT)
    ours = torch.autograd.grad(losses.sum(), [scores, temperature], retain_graph=True)
    theirs = torch.autograd.grad(torch.stack(expected).sum(), [scores, temperature])
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert float(losses[1].detach()) == 0.0  # nothing but a positive


def test_contrastive_loss_of_large_scores_and_of_nothing():
    scores = torch.tensor([1e4, -1e4, 9e3])
    losses = contrastive_loss(scores, torch.tensor([False, True, False]), cumulative(torch.tensor([3])), 1.0)
    assert_close(losses, torch.tensor([2e4]))
    nothing = contrastive_loss(scores[:0], torch.zeros(0, dtype=torch.bool), torch.zeros(1, dtype=torch.int32), 1.0)
    assert nothing.shape == (0,)


def test_contrastive_loss_wants_a_positive_in_each_group():
    with pytest.raises(VlscaleError, match="group 1 has no positive"):
        contrastive_loss(torch.zeros(3), torch.tensor([True, False, False]), cumulative(torch.tensor([1, 2])), 1.0)
