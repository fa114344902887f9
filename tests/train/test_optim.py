from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.golden_batches import load_golden
from tests.models.unimo_batches import tiny_unimo
from vlscale.config import OptimizerSection
from vlscale.convert.unimo_model import export_plans
from vlscale.convert.uniter import to_official
from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.train.adamw import ReferenceAdamW
from vlscale.train.optim import build_optimizer, build_param_groups
from vlscale.train.paddle import PaddleAdamW


def tiny_model(**config) -> UniterForPretraining:
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return UniterForPretraining(UniterConfig(vocab_size=20, feature_dim=6, num_classes=5, **shape, **config))


def names(model: nn.Module, rule: str) -> dict[bool, set[str]]:
    return {group["decay"]: set(group["names"]) for group in build_param_groups(model, rule)}  # type: ignore[arg-type]


def test_correct_groups_follow_what_a_parameter_is():
    model = tiny_model(norm="pre")
    groups = names(model, "correct")
    gains = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert gains
    assert groups[False] == gains | biases
    assert groups[True] == {name for name, _ in model.named_parameters()} - gains - biases


def test_reference_groups_follow_the_published_names():
    model = tiny_model()
    groups = names(model, "reference")
    ours = [name for name, _ in model.named_parameters()]
    # Numbering the parameters tells which published tensors each of them became.
    numbered = {name: torch.full_like(p.detach(), i + 1.0) for i, (name, p) in enumerate(model.named_parameters())}
    for their, tensor in to_official(numbered, tied=False).items():
        name = ours[int(tensor.max()) - 1]
        assert ("bias" in their or "LayerNorm.weight" in their) == (name in groups[False]), (their, name)
    assert groups[True] - names(model, "correct")[True]


def test_reference_groups_through_a_wrapper():
    model = tiny_model()
    wrapped = nn.ModuleDict({"model": model})
    for rule in ("correct", "reference"):
        expected = {decay: {f"model.{name}" for name in group} for decay, group in names(model, rule).items()}
        assert names(wrapped, rule) == expected


def test_partitioned_parameters_are_judged_by_their_true_shape():
    model = tiny_model()
    expected = names(model, "correct")
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert names(model, "correct") == expected


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    (group,) = build_param_groups(model, "correct")
    assert group["names"] == ["weight"]


@pytest.mark.parametrize(
    ("rule", "kind"),
    [("adamw", torch.optim.AdamW), ("reference", ReferenceAdamW), ("paddle", PaddleAdamW)],
)
def test_build_optimizer(rule, kind):
    section = OptimizerSection(rule=rule, lr=0.1, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.03)
    optimizer = build_optimizer(build_param_groups(tiny_model(), "correct"), section)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.03, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-7)


def test_unimos_published_names_decay_what_ours_do():
    """Excluded there: names that contain layer_norm or end with _bias, _b or .b_0; its heads for regions have none."""
    model = tiny_unimo(heads=("words", "matching", "text_pooler", "image_pooler"))
    assert names(model, "reference") == names(model, "correct")
    first, second = export_plans(model.state_dict())
    ours = {step.target: step.sources[0] for step in first.steps}
    for step in second.steps:
        decays = not ("layer_norm" in step.target or step.target.endswith(("_bias", "_b", ".b_0")))
        (name,) = step.sources
        assert decays == (ours[name] in names(model, "reference")[True]), step.target


@pytest.mark.golden
def test_uniter_golden_steps():
    golden = load_golden("optim")
    lr, beta1, beta2, eps, decay = golden["hyper_lr_b1_b2_eps_wd"].tolist()
    parameter = nn.Parameter(golden["p0"].clone())
    optimizer = ReferenceAdamW([parameter], lr, (beta1, beta2), eps, decay)
    for gradient, expected in zip(golden["grads"], golden["params_after_each_step"], strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6)


def test_reference_rule_differs_from_torch_by_eps_and_decay_only():
    start, section = torch.randn(6, 4, dtype=torch.float64), {"lr": 0.01, "betas": (0.9, 0.98)}
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        ReferenceAdamW([ours], eps=0.0, **section),
        torch.optim.AdamW([theirs], eps=0, weight_decay=0, **section),
    )
    for _ in range(4):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_parameters_keep_their_own_step_counts():
    together, alone = [nn.Parameter(torch.ones(3)) for _ in range(2)], nn.Parameter(torch.ones(3))
    optimizer, single = ReferenceAdamW(together, lr=0.1), ReferenceAdamW([alone], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        gradients = torch.randn(2, 3, generator=generator)
        together[0].grad = gradients[0]
        together[1].grad = gradients[1] if step % 2 else None
        optimizer.step()
        if step % 2:
            alone.grad = gradients[1].clone()
            single.step()
    assert torch.equal(together[1], alone)
    assert [optimizer.state[p]["step"].item() for p in together] == [5, 2]


def test_state_survives_saving_and_partitioning():
    """The state has AdamW's keys and element-wise shapes: flat pieces (as ZeRO has them) give the same weights."""
    whole = nn.Parameter(torch.randn(12, generator=torch.Generator().manual_seed(1)))
    pieces = [nn.Parameter(part.clone()) for part in whole.detach().split(5)]
    settings = {"lr": 0.05, "weight_decay": 0.01}
    first, second = ReferenceAdamW([whole], **settings), ReferenceAdamW(pieces, **settings)
    for step in range(6):
        whole.grad = torch.sin(torch.arange(12.0) + step)
        for piece, gradient in zip(pieces, whole.grad.split(5), strict=True):
            piece.grad = gradient.clone()
        first.step()
        second.step()
        if step == 2:
            saved = copy.deepcopy(first.state_dict())
            first = ReferenceAdamW([whole], **settings)
            first.load_state_dict(saved)
            assert set(first.state[whole]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(torch.cat([piece.detach() for piece in pieces]), whole.detach(), rtol=0, atol=0)


def test_closure_and_settings():
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = ReferenceAdamW([parameter], lr=0.1)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert math.isclose(optimizer.step(closure).item(), 4.0)
    assert parameter.item() < 2
    with pytest.raises(ValueError, match="betas in"):
        ReferenceAdamW([parameter], betas=(0.9, 1.0))
