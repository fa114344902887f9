"""Worker: trains a module of odd sizes, tied, frozen and with buffers under each ZeRO stage, and saves it.

Usage: zero_worker.py FOLDER. For each case, in FOLDER/<case>: tag/, DeepSpeed's files; engine.safetensors, the master
weights as the engine gathers them; zero_to_fp32.safetensors, what DeepSpeed's own tool makes of the files;
buffers.safetensors, the module's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.multiprocess.recipes import SMALL_BUCKETS
from vlscale.train.engine import Engine, connect, construction
from vlscale.train.environment import choose_accelerator
from vlscale.train.processes import Processes, run_and_exit

CASES: dict[str, tuple[int, bool]] = {
    "zero0": (0, False),
    "zero1": (1, False),
    "zero1_bf16": (1, True),
    "zero2": (2, False),
    "zero2_bf16": (2, True),
    "zero3": (3, False),
    "zero3_bf16": (3, True),
}


class Odd(nn.Module):
    """Sizes that no number of ranks divides; a tied head; a frozen layer; a float and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(11, 5)
        self.fixed = nn.Linear(5, 5)
        self.middle = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.word.weight
        self.register_buffer("running", torch.randn(3))
        self.register_buffer("positions", torch.arange(4))
        self.fixed.requires_grad_(False)

    def forward(self, task: str, batch: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.fixed(self.word(batch)))) * self.scale
        return self.head(hidden).float().square().mean()


def config(stage: int, bf16: bool) -> dict[str, Any]:
    zero = {"stage": stage, **SMALL_BUCKETS}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 40}  # several vectors per group
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
    }


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [[each for each in trained if each.dim() > 1], [each for each in trained if each.dim() <= 1]]
    return torch.optim.AdamW([{"params": group} for group in groups if group], lr=0.05)


def train(processes: Processes, folder: Path, stage: int, bf16: bool) -> None:
    settings = config(stage, bf16)
    torch.manual_seed(0)
    with construction(settings):
        module = Odd()
    engine = Engine(processes, module, optimizer, settings, ("mlm",))
    for step in range(2):
        engine.begin("mlm", 0.05)
        torch.manual_seed(10 * step + processes.rank)
        engine.backward(engine.forward("mlm", torch.randint(11, (4, 3))))
        engine.step()
    engine.save(folder, "tag")
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    # Frozen parameters have no master weights that the engine could gather.
    weights = engine.weights(SimpleNamespace(named_parameters=lambda: trained))  # type: ignore[arg-type]
    if weights is not None:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "engine.safetensors")
        buffers = {name: each.detach().clone() for name, each in module.named_buffers()}
        save_file(buffers, folder / "buffers.safetensors")
    processes.barrier()
    engine.close()


def by_deepspeed(folder: Path) -> None:
    """Let DeepSpeed's own tool read it: our own files, just written, so its unpickling is of no concern."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="tag")
    save_file({name: each.clone().contiguous() for name, each in found.items()}, folder / "zero_to_fp32.safetensors")


def main(root: Path) -> None:
    processes = connect(choose_accelerator("cpu"), timeout_s=60)
    for name, (stage, bf16) in CASES.items():
        train(processes, root / name, stage, bf16)
        # It knows neither stage 0 nor the optimiser that bf16 has at stage 1.
        if processes.main and stage and name != "zero1_bf16":
            by_deepspeed(root / name)
        processes.barrier()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1])))
