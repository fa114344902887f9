"""Writes checkpoints in DeepSpeed's layout without DeepSpeed, of any stage and number of ranks, small or large."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PADDING = -777.0
"""Stands in every element that is no parameter's, so that a reader that is off by one is seen."""


class ZeroStageEnum(int, Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale, self.dynamic, self.dtype = 1.0, False, torch.float32


class fragment_address:  # noqa: N801
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


_HOMES = {
    "deepspeed.runtime.zero.config": ZeroStageEnum,
    "deepspeed.runtime.fp16.loss_scaler": LossScaler,
    "deepspeed.utils.tensor_fragment": fragment_address,
}


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """Pickle the classes above under DeepSpeed's names, whether or not it has been imported."""
    before = {name: sys.modules.get(name) for name in ("deepspeed", *_HOMES)}
    for name, kind in _HOMES.items():
        kind.__module__, kind.__qualname__ = name, kind.__name__
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], kind.__name__, kind)
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@dataclass
class Zero:
    """A checkpoint to write.

    Attributes:
        groups: the optimiser's groups of master weights.
        stage, ranks: of the run.
        dtype: of the module's own copy.
        padded: whether the last rank saves the padding (DeepSpeed's BF16_Optimizer does).
        gaps: elements between parameters, for each group.
        buffers, frozen, shared: what else the module has.
        moments: write the optimiser's two moments too.
        step: optimiser step.
        model, rank: entries that replace others of the files.
    """

    groups: Sequence[Mapping[str, Tensor]]
    stage: int = 2
    ranks: int = 2
    dtype: torch.dtype = torch.float32
    padded: bool = False
    gaps: Sequence[Sequence[int]] | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    moments: bool = True
    step: int = 3
    model: Mapping[str, Any] = field(default_factory=dict)
    rank: Mapping[str, Any] = field(default_factory=dict)

    def part(self, group: int, rank: int) -> Tensor:
        """What a rank holds of a group's vector."""
        tensors = self.groups[group].values()
        if self.stage == 3:
            return torch.cat([self.share(tensor, rank) for tensor in tensors])
        gaps = self.gaps[group] if self.gaps else [0] * len(tensors)
        needed = sum(tensor.numel() for tensor in tensors) + sum(gaps)
        size = -(-needed // (2 * self.ranks)) * 2
        first, last = rank * size, (rank + 1) * size
        # Only what lies in this part is copied: the vector may be large.
        found, place = torch.full((size,), PADDING, dtype=next(iter(tensors)).dtype), 0
        for tensor, gap in zip(tensors, gaps, strict=True):
            begin, end = max(first, place), min(last, place + tensor.numel())
            if begin < end:
                found[begin - first : end - first] = tensor.reshape(-1)[begin - place : end - place]
            place += tensor.numel() + gap
        if rank == self.ranks - 1 and not self.padded:
            # DeepSpeed's own slice, which leaves padding where that is longer than the part.
            found = found[: size - (size * self.ranks - needed)].clone()
        return found

    def share(self, tensor: Tensor, rank: int) -> Tensor:
        """What a rank holds of one parameter at stage 3."""
        size = -(-tensor.numel() // self.ranks)
        part = tensor.reshape(-1)[rank * size : (rank + 1) * size]
        return torch.cat([part, torch.full((size - part.numel(),), PADDING, dtype=tensor.dtype)])

    def model_state(self, rank: int) -> dict[str, Any]:
        """The content of a ``*_model_states.pt``."""
        every = {**{name: tensor for group in self.groups for name, tensor in group.items()}, **self.frozen}
        every |= {alias: every[name] for alias, name in self.shared.items()}
        if self.stage == 3:
            module = {name: torch.empty(0, dtype=self.dtype) for name in every}
        else:
            kept = {id(tensor) for tensor in self.frozen.values()}
            copies = {id(t): t if id(t) in kept else t.to(self.dtype) for t in every.values()}  # tied ones stay tied
            module = {name: copies[id(tensor)] for name, tensor in every.items()}
        plain = self.stage == 0
        fragments = {
            name: self.share(tensor, rank) if self.stage == 3 else tensor for name, tensor in self.frozen.items()
        }
        return {
            "module": OrderedDict({**module, **self.buffers}),
            "buffer_names": list(self.buffers),
            "optimizer": None,
            "param_shapes": None
            if plain
            else [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in self.groups],
            "frozen_param_shapes": None if plain else OrderedDict((name, t.shape) for name, t in self.frozen.items()),
            "frozen_param_fragments": None if plain else OrderedDict(fragments),
            "shared_params": None if plain else dict(self.shared),
            "global_steps": self.step,
            "dp_world_size": self.ranks,
            "ds_config": {"zero_optimization": {"stage": self.stage}},
            "ds_version": "0.19.8",
            **self.model,
        }

    def rank_state(self, rank: int) -> dict[str, Any]:
        """The content of an ``*_optim_states.pt``."""
        parts = [self.part(group, rank) for group in range(len(self.groups))]
        states: dict[int, Any] = {index: {"step": torch.tensor(float(self.step))} for index in range(len(parts))}
        if self.moments:
            for index, part in enumerate(parts):
                states[index] |= {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.ones_like(part)}
        base = {"state": states, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.98)} for _ in parts]}
        state: dict[str, Any] = {
            "loss_scaler": LossScaler(),
            "overflow": False,
            "zero_stage": ZeroStageEnum(self.stage),
        }
        if self.stage == 3:
            state |= {"optimizer_state_dict": base, "fp32_flat_groups": parts, "partition_count": self.ranks}
        else:
            counts = [self.ranks for _ in parts]
            state |= {"base_optimizer_state": base, "single_partition_of_fp32_groups": parts, "partition_count": counts}
            state |= {"param_slice_mappings": [OrderedDict(x=fragment_address(1, 2)) for _ in parts]}
            if self.gaps is not None:
                state["param_alignment_paddings"] = [list(each) for each in self.gaps]
        return {"optimizer_state_dict": {**state, **self.rank}, "ds_version": "0.19.8"}

    def write(self, folder: Path) -> Path:
        """Write the files as DeepSpeed names them; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with deepspeed_names():
            for rank in range(self.ranks if self.stage == 3 else 1):
                prefix = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
                torch.save(self.model_state(rank), folder / f"{prefix}mp_rank_00_model_states.pt")
            for rank in range(self.ranks if self.stage else 0):
                prefix = "bf16_" if self.padded else ""
                torch.save(self.rank_state(rank), folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        return folder

    def write_manifest(self, folder: Path, hashes: bool = True, model: Mapping[str, Any] | None = None) -> Path:
        """Add vlscale's manifest; returns the folder."""
        files = {
            path.name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest() if hashes else "0" * 64]
            for path in sorted(folder.glob("*.pt"))
        }
        facts = {"version": 1, "step": self.step, "world_size": self.ranks, "zero_stage": self.stage, "files": files}
        texts = {
            "precision": "fp32",
            "fingerprint": "f",
            "trainer": {},
            "recipe": {},
            "model": model or {"hidden_size": 4},
        }
        (folder / "manifest.json").write_text(
            json.dumps(facts | texts | {"model": model or {"hidden_size": 4}}), encoding="utf-8"
        )
        return folder
