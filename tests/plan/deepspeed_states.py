"""Prints the bytes per parameter that a DeepSpeed engine keeps between micro-steps: STAGE PRECISION ACCUMULATION."""

from __future__ import annotations

import gc
import json
import sys
import warnings

import torch
from torch import Tensor, nn

from vlscale.train.engine import Engine, connect, construction

WIDTH, LAYERS, BUCKET = 512, 8, 300_000
PARAMETERS = LAYERS * WIDTH * WIDTH


class Stack(nn.Module):
    """Square layers without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, task: str, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = layer(rows)
        return rows.float().sum()


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python can reach."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            for tensor in (thing, thing.grad):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def main(stage: int, precision: str, accumulation: str) -> None:
    """Take one step, then one micro-step, and print what is alive."""
    warnings.simplefilter("ignore")
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "train_batch_size": 2,
        "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 30,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "data_types": {"grad_accum_dtype": accumulation}, "bf16": {"enabled": precision == "bf16"},
    }  # fmt: skip
    processes = connect("cpu")
    before = live_bytes()
    with construction(config):
        module = Stack()
    engine = Engine(processes, module, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3), config, ("t",))
    rows = torch.randn(2, WIDTH, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    engine.begin("t", 1e-3)
    for _ in range(2):
        engine.backward(engine.forward("t", rows))
    engine.step()
    engine.begin("t", 1e-3)
    engine.backward(engine.forward("t", rows))
    print(json.dumps({"per_parameter": (live_bytes() - before) / PARAMETERS}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
