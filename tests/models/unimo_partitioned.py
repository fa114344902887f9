"""Worker of test_unimo_partitioned: a few steps under ZeRO-3 with partitioned construction, against plain PyTorch.

The steps see different kinds of input, so that heads, and the image side, are idle in some of them. Prints one JSON
line: the largest differences of losses (relative) and weights, and how far idle parameters moved.
"""

from __future__ import annotations

import json

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters, Init, register_external_parameter
from torch import Tensor, nn

from tests.models.batches import TINY
from tests.models.partitioned import SETTINGS
from tests.models.unimo_batches import KINDS, tiny_unimo, unimo_batch
from vlscale.models.unimo import UnimoBatch, UnimoConfig, UnimoForPretraining

STEPS = ([*KINDS], ["text", "text to text"], ["image"], ["caption", "text"])
"""Kinds of input of each step."""
IDLE = {
    1: ("image_embedder", "region_classifier", "feature_head", "match_head"),
    2: ("word_head.transform", "match_head"),
}
"""Step -> what must not move in it."""
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "match_dropout": 0.0}


class Training(nn.Module):
    """The model inside a module, as the trainer wraps it."""

    def __init__(self, model: UnimoForPretraining) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: UnimoBatch) -> Tensor:
        """A scalar of all heads; those without input see zero rows."""
        model = self.model
        encoded = model.encode(batch)
        pairs = ((batch.text_lengths > 0) & (batch.region_counts > 0)).nonzero()[:, 0]
        outputs = (
            model.mlm_logits(encoded, torch.arange(batch.input_ids.numel())),
            model.predict_features(encoded, torch.arange(batch.boxes.shape[0])),
            model.classify_regions(encoded, torch.arange(batch.boxes.shape[0])),
            model.match_scores(encoded, pairs),
        )
        return sum(((output - 1.0).square().sum() / 100 for output in outputs), torch.zeros(()))


def main() -> None:
    """Train the two side by side."""
    batches = [unimo_batch(kinds, seed=step) for step, kinds in enumerate(STEPS)]
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    with Init(config_dict_or_path=SETTINGS):
        model = UnimoForPretraining(UnimoConfig(**TINY, **NO_DROPOUT))
    plain = Training(tiny_unimo(**NO_DROPOUT))
    with GatheredParameters(list(model.parameters())):
        same_start = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.set_activation_checkpointing("every 2")
    for module, parameter in model.external_parameters():
        register_external_parameter(module, parameter)
    wrapped = Training(model)
    engine, *_ = deepspeed.initialize(
        model=wrapped, optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.05), config=SETTINGS
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    worst_loss = drift = 0.0
    for step, batch in enumerate(batches):
        before = _weights(model)
        loss, reference = engine(batch), plain(batch)
        worst_loss = max(worst_loss, abs(loss.item() / reference.item() - 1))
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        reference.backward()
        optimizer.step()
        for name, value in _weights(model).items():
            if name.startswith(IDLE.get(step, ())) and step in IDLE:
                drift = max(drift, (value - before[name]).abs().max().item())
    ours, theirs = _weights(model), dict(plain.model.named_parameters())
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    found = {"loss": worst_loss, "weights": worst, "same_start": same_start, "drift": drift}
    print("FOUND " + json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    with GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    main()
