"""Worker of test_uniter_partitioned: a few steps under ZeRO-3 with partitioned construction, against plain PyTorch.

Prints one JSON line: the largest relative difference of the losses and of the weights.
"""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters, Init, register_external_parameter
from torch import nn

from tests.models.batches import TINY, all_head_loss, random_batch, tiny_model
from vlscale.models.uniter import UniterConfig, UniterForPretraining

STEPS = 4
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # left out, DeepSpeed 0.19 clips at 1.0
    # every parameter is partitioned, none is kept whole because it is small
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Training(nn.Module):
    """The model inside a module, as the trainer wraps it."""

    def __init__(self, model: UniterForPretraining) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        return all_head_loss(self.model, batch)


def main(policy: str) -> None:
    """Train the two side by side."""
    batches = [random_batch([4, 6, 3], [5, 2, 6], seed=step) for step in range(STEPS)]
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    with Init(config_dict_or_path=SETTINGS):
        model = UniterForPretraining(UniterConfig(**TINY, hidden_dropout=0.0, attention_dropout=0.0))
    plain = tiny_model(hidden_dropout=0.0, attention_dropout=0.0)
    partitioned_from_start = all(parameter.numel() == 0 for parameter in model.parameters())
    with GatheredParameters(list(model.parameters())):
        same_start = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.set_activation_checkpointing(policy)
    for module, parameter in model.external_parameters():
        register_external_parameter(module, parameter)
    wrapped = Training(model)
    # SGD: Adam would turn the rounding noise of gradients that are zero (key biases) into whole steps.
    engine, *_ = deepspeed.initialize(
        model=wrapped, optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.05), config=SETTINGS
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    worst_loss = 0.0
    for batch in batches:
        loss, reference = engine(batch), all_head_loss(plain, batch)
        worst_loss = max(worst_loss, abs(loss.item() / reference.item() - 1))
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        reference.backward()
        optimizer.step()
    with GatheredParameters(list(model.parameters())):
        worst = max((a - b).abs().max().item() for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    found = {"loss": worst_loss, "weights": worst, "same_start": same_start, "partitioned": partitioned_from_start}
    print("FOUND " + json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
