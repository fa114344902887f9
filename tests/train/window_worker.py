"""Worker of test_window: both passes of a step with window negatives in the real engine, in one process.

Prints one JSON line: the largest difference between what the first pass returned of each pair and what the second pass
scores, with the passes seeded alike and not; and the gathered rows.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.unimo_batches import tiny_unimo
from tests.objectives.unified_batches import learning, prepared, rows_of, unit
from vlscale.objectives.cmcl import Contrast
from vlscale.train.engine import Engine, connect
from vlscale.train.pretraining import PretrainingModule
from vlscale.train.processes import Processes, run_and_exit
from vlscale.train.window import with_keys, with_window

DROPOUT: dict[str, Any] = {"hidden_dropout": 0.3, "attention_dropout": 0.3, "match_dropout": 0.3}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1},
}
KINDS = (["pair", "text", "pair"], ["image", "pair"])


def build(processes: Processes) -> tuple[Engine, Any]:
    """A model with dropout that computes its layers twice, and its objective, inside an engine."""
    objective = learning(contrast={"window": True, "temperature": 0.5})
    model = tiny_unimo(max_position_embeddings=64, **DROPOUT)
    model.set_activation_checkpointing("full")

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    return Engine(processes, PretrainingModule(model, {"unified": objective}), sgd, CONFIG, ("unified",)), objective


def seed(micro: int) -> None:
    """Seed what a micro-batch draws."""
    torch.manual_seed(micro)


def both_passes(processes: Processes, engine: Engine, objective: Any, second: int) -> float:
    """The largest difference; the second pass is seeded ``second`` higher than the first."""
    units = [[(kind, 3 * micro + place) for place, kind in enumerate(kinds)] for micro, kinds in enumerate(KINDS)]
    batches = [prepared(objective, [row for each in some for row in unit(*each)], torch.float32) for some in units]
    seen: list[Tensor] = []
    score = Contrast.score

    def scored(self: Contrast, *arguments: Any) -> Any:
        candidates = score(self, *arguments)
        seen.append(self.represent(candidates).detach())
        return candidates

    worst = 0.0
    engine.begin("unified", 0.0)
    window = with_window(engine, processes, objective, batches, seed)
    Contrast.score = scored  # type: ignore[assignment, method-assign]
    for micro, batch in enumerate(window):
        seed(micro + second)
        terms = engine.forward("unified", batch.to(processes.device))
        expected = batch.targets["window"][batch.targets["window_at"]]
        worst = max(worst, (seen[-1] - expected).abs().max().item())
        engine.backward(torch.stack([term.sum for term in terms.values() if term.weight]).sum())
    Contrast.score = score  # type: ignore[method-assign]
    engine.step()
    return worst


def main() -> None:
    """Run the step twice."""
    processes = connect("cpu", timeout_s=60)
    engine, objective = build(processes)
    alike, apart = (both_passes(processes, engine, objective, second) for second in (0, 100))
    keys = torch.arange(6).reshape(3, 2) << 40
    gathered = processes.gather_rows(keys)
    none = processes.gather_rows(keys[:0])
    _, counts = with_keys(processes, objective, [prepared(objective, rows_of(["text"]), torch.float32)])
    found = {
        "alike": alike,
        "apart": apart,
        "rows": gathered.rows.tolist(),
        "counts": gathered.counts,
        "none": [list(none.rows.shape), none.counts],
        "of_texts": counts,
    }
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    run_and_exit(main)
