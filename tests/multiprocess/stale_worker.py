"""Worker: two heads take turns under ZeRO-3 and SGD; prints how far the idle one moved, with the guard and without."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from tests.multiprocess.recipes import SMALL_BUCKETS
from vlscale.train.engine import Engine, connect, construction
from vlscale.train.environment import choose_accelerator
from vlscale.train.processes import Processes, run_and_exit

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **SMALL_BUCKETS},
}
TURNS = ("mlm", "itm", "itm", "mlm")


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 5)
        self.mlm, self.itm = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, task: str, batch: Tensor) -> Tensor:
        return getattr(self, task)(torch.tanh(self.trunk(batch)))


def movements(processes: Processes, guarded: bool) -> tuple[list[float], list[float]]:
    """How far the idle head, and the head in use, moved in each step."""
    torch.manual_seed(0)
    with construction(CONFIG):
        module = TwoHeads()
    engine = Engine(processes, module, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), CONFIG, ("mlm", "itm"))
    if not guarded:
        engine._stale = None
    before = engine.weights(module)
    idle, used = [], []
    for task in TURNS:
        engine.begin(task, 0.1)
        for micro in range(2):
            torch.manual_seed(10 + micro)
            engine.backward(engine.forward(task, torch.randn(4, 6)).square().sum())
        engine.step()
        after = engine.weights(module)
        if before is not None and after is not None:
            moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
            used.append(max(value for name, value in moved.items() if name.startswith(task)))
            idle.append(max(value for name, value in moved.items() if not name.startswith((task, "trunk"))))
        before = after
    engine.close()
    return idle, used


def main() -> None:
    """Print one line of JSON."""
    processes = connect(choose_accelerator("cpu"), timeout_s=60)
    found = {name: movements(processes, guarded) for name, guarded in (("guarded", True), ("unguarded", False))}
    if processes.main:
        print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    run_and_exit(main)
