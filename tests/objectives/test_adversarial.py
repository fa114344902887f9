"""Adversarial training: how shifts begin, climb and are bounded, and that they are constants of the gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.models.unimo_batches import tiny_unimo, unimo_batch
from vlscale.models.unimo_batch import JointLayout
from vlscale.objectives import adversarial
from vlscale.objectives.adversarial import Villa, climb, symmetric_kl, villa_loss
from vlscale.objectives.generation import next_tokens, smoothed_cross_entropy
from vlscale.ragged import cumulative

CU = cumulative(torch.tensor([2, 0, 3]))


def _norms(rows: torch.Tensor) -> list[float]:
    return [float(rows[:2].norm()), float(rows[2:].norm())]


def _rows(seed: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


def test_a_climb_has_the_same_length_for_every_example():
    shift = climb(Villa(learning_rate=0.05), torch.zeros(5, 4), _rows(0) * torch.tensor([9.0, 9, 1, 1, 1])[:, None], CU)
    assert _norms(shift) == pytest.approx([0.05, 0.05], rel=1e-5)
    assert torch.equal(climb(Villa(), torch.zeros(5, 4), torch.zeros(5, 4), CU), torch.zeros(5, 4))


def test_the_proper_projection_bounds_the_shift():
    settings, start = Villa(learning_rate=0.2, max_norm=0.4), _rows(1)
    bounded = climb(settings, start, _rows(0), CU)
    assert _norms(bounded) == pytest.approx([0.4, 0.4], rel=1e-5)
    inside = climb(settings, start * 1e-3, _rows(0), CU)
    assert_close(inside, climb(Villa(learning_rate=0.2), start * 1e-3, _rows(0), CU))


def test_the_reference_projection_looks_at_the_gradient():
    settings, gradient = Villa(learning_rate=0.2, max_norm=0.4, projection="reference"), _rows(0)
    free = climb(Villa(learning_rate=0.2), _rows(1), gradient, CU)
    shift = climb(settings, _rows(1), gradient, CU)
    of_gradient = _norms(gradient)
    assert_close(shift[:2], free[:2] * 0.4 / of_gradient[0])
    assert_close(shift[2:], free[2:] * 0.4 / of_gradient[1])
    assert_close(climb(settings, _rows(1), gradient * 1e-3, CU), free)  # a gentle slope: nothing is bounded


def test_symmetric_kl_is_that_of_torch():
    one, other = _rows(0), _rows(1)
    p, q = one.log_softmax(1), other.log_softmax(1)
    expected = F.kl_div(p, q, reduction="sum", log_target=True) + F.kl_div(q, p, reduction="sum", log_target=True)
    assert_close(symmetric_kl(one, other), expected)


def _task(kinds=("caption", "pair to text", "text to text"), **settings):
    model, batch = tiny_unimo().eval(), unimo_batch([*kinds])
    positions, labels = next_tokens(batch)
    seen = []

    def forward(text_delta, image_delta):
        seen.append((text_delta, image_delta))
        return model.mlm_logits(model.encode(batch, text_delta=text_delta, image_delta=image_delta), positions)

    def task_loss(logits):
        return smoothed_cross_entropy(logits, labels, 0.1)

    def run():
        layout, draw = JointLayout(batch, batch.measured), torch.Generator().manual_seed(5)
        widths = model.config.hidden_size, model.config.feature_dim
        return villa_loss(Villa(**settings), layout, widths, forward, task_loss, draw)

    return model, run, seen, forward, task_loss


def test_without_shifts_it_is_three_times_the_loss():
    _, run, seen, forward, task_loss = _task(steps=1, initial_magnitude=0.0)
    assert_close(run(), 3 * task_loss(forward(None, None)))
    assert [tuple(part is not None for part in each) for each in seen[:3]] == [
        (False, False),
        (True, False),
        (False, True),
    ]


def test_first_shifts_are_small_and_reproducible():
    _, run, seen, *_ = _task(steps=1, initial_magnitude=0.4)
    assert_close(run(), run(), rtol=0, atol=0)
    text = seen[1][0]
    assert 0 < float(text.detach().abs().max()) <= 0.4 / (5 * text.shape[1]) ** 0.5


def test_climbing_raises_the_loss_and_shifts_stay_bounded():
    _, run, seen, forward, task_loss = _task(
        steps=6, initial_magnitude=0.0, learning_rate=0.2, max_norm=0.6, kl_weight=0.0
    )
    run()
    text, image = seen[-2][0], seen[-1][1]
    clean = float(task_loss(forward(None, None)).detach())
    assert float(task_loss(forward(text, None)).detach()) > clean
    assert float(task_loss(forward(None, image)).detach()) > clean
    for cu, rows in ((cumulative(torch.tensor([5, 7, 9])), text), (cumulative(torch.tensor([4, 4, 0])), image)):
        norms = adversarial._norms(rows.detach(), cu)
        assert bool((norms <= 0.6 * 1.0001).all())
    assert float(norms[2]) == 0.0


def test_shifts_are_constants_of_the_gradient():
    model, run, seen, forward, task_loss = _task(steps=2, initial_magnitude=0.0, learning_rate=0.2)
    run().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    shifts = [(text, image) for (_, _), (text, _), (_, image) in (seen[:3], seen[3:6])]
    total = torch.zeros(())
    for text, image in shifts:
        clean, by_text, by_image = forward(None, None), forward(text.detach(), None), forward(None, image.detach())
        total = total + (task_loss(clean) + task_loss(by_text) + task_loss(by_image)) / 2
        total = total + symmetric_kl(clean, by_text) + symmetric_kl(clean, by_image)
    total.backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(grads, again, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_texts_without_any_image_are_trained_too():
    _, run, *_ = _task(kinds=("text to text",), steps=2)
    loss = run()
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"max_norm": -1.0}, {"learning_rate": -0.1}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        Villa(**wrong)
