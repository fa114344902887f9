"""A training step of the recipe in one process, as DeepSpeed would run it on one of N GPUs, without DeepSpeed.

The real model, objectives and optimiser run on the device. What the engine adds is done by hand with the same tensors:
float32 accumulation, a flat float32 copy of the weights, Adam on the part that one of N GPUs owns, the norm, and the
copy back. Communication and its buffers are left out, see :class:`vlscale.plan.memory.Withheld`. Stage 3 keeps whole
weights here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlscale.config import Recipe
from vlscale.models.registry import ModelConfig, model_of
from vlscale.objectives import Objective
from vlscale.objectives.unified import share_window
from vlscale.plan.measure import LiveBytes
from vlscale.plan.memory import Zero
from vlscale.ragged import RaggedBatch
from vlscale.train.optim import build_optimizer, build_param_groups

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trial:
    """Model, gradients and optimiser states of one GPU of ``gpus``.

    Args:
        recipe: model, optimiser and activation checkpointing are read.
        config: of the model.
        objectives: task -> objective.
        zero: the DeepSpeed JSON.
        gpus: GPUs that share the states.
        device: where it runs.

    Raises:
        RuntimeError: not even the states fit, see :func:`ran_out`.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: ModelConfig,
        objectives: dict[str, Objective],
        zero: Zero,
        gpus: int,
        device: torch.device,
    ) -> None:
        self.device, self._objectives, self._zero = device, objectives, zero
        with torch.device(device):
            model = model_of(config)
        self.model = model.to(DTYPES[zero.precision])
        self.model.set_activation_checkpointing(recipe.activation_checkpointing)
        self.model.train()
        self._flat = FlatStates(self.model, recipe, zero, gpus) if zero.stage else None
        self._optimizer = None
        if self._flat is None:
            groups = build_param_groups(self.model, recipe.optimizer.decay_groups)
            self._optimizer = build_optimizer(groups, recipe.optimizer, fused=device.type == "cuda")

    def micro_step(self, batch: RaggedBatch) -> None:
        """Forward and backward of a batch that lies on the device, added to the gradients of the step."""
        model: Any = self.model  # has the heads that the recipe's objectives ask for
        objective = self._objectives[batch.task]
        if objective.needs_window:
            (batch,) = share_window(objective, model, [batch])
        terms = objective.terms(model, batch)
        losses = [term.sum * (term.weight / max(1, len(batch))) for term in terms.values() if term.weight]
        torch.stack(losses).sum().backward()
        if self._flat is not None:
            self._flat.accumulate()

    def step(self) -> None:
        """Clip, update the weights, and clear the gradients."""
        if self._flat is not None:
            self._flat.step()
        elif self._optimizer is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=False)

    def clear(self) -> None:
        """Forget gradients of the parameters, as after a micro-step that ran out of memory."""
        if self._flat is not None:
            for parameter in self.model.parameters():
                parameter.grad = None

    def state_tensors(self) -> Iterator[Tensor]:
        """All tensors that stay from one step to the next."""
        for parameter in self.model.parameters():
            yield parameter
            if self._flat is None and parameter.grad is not None:
                yield parameter.grad
        if self._flat is not None:
            yield from self._flat.tensors()


class FlatStates:
    """What ZeRO keeps in flat buffers: accumulated gradients, float32 weights and Adam's moments.

    Args:
        model: whose gradients are accumulated.
        recipe: the optimiser; zero, gpus: how much of everything one GPU owns.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, zero: Zero, gpus: int) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in self._parameters)
        device, width = self._parameters[0].device, {2: self._parameters[0].dtype, 4: torch.float32}
        self._part = -(-count // gpus)
        kept = self._part if zero.stage >= 2 else count
        self._gradient = torch.zeros(kept, dtype=width[zero.accumulation_bytes], device=device)
        self._master = nn.Parameter(torch.zeros(self._part, device=device))
        groups = [{"params": [self._master], "decay": True, "names": ["flat"]}]
        self._optimizer = build_optimizer(groups, recipe.optimizer, fused=device.type == "cuda")
        self._copy_weights(to_flat=True)

    def accumulate(self) -> None:
        """Add the gradients of a micro-step to the accumulator, and free them."""
        place = 0
        for parameter in self._parameters:
            size = min(parameter.numel(), self._gradient.numel() - place)
            if parameter.grad is not None and size > 0:
                self._gradient[place : place + size] += parameter.grad.view(-1)[:size]
            place += max(size, 0)
            parameter.grad = None

    def step(self) -> None:
        """Take the norm, clip, run Adam on the owned part, write the weights back."""
        own = self._gradient[: self._part].float()
        own *= (1.0 / (torch.linalg.vector_norm(own) + 1e-6)).clamp(max=1.0)
        self._master.grad = own
        self._optimizer.step()
        self._master.grad = None
        self._gradient.zero_()
        self._copy_weights(to_flat=False)

    def tensors(self) -> Iterator[Tensor]:
        """The buffers."""
        yield self._gradient
        yield self._master
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    @torch.no_grad()
    def _copy_weights(self, to_flat: bool) -> None:
        place = 0
        for parameter in self._parameters:
            size = min(parameter.numel(), self._part - place)
            if size <= 0:
                return
            ours, theirs = self._master[place : place + size], parameter.data.view(-1)[:size]
            ours.copy_(theirs) if to_flat else theirs.copy_(ours)
            place += size


@contextmanager
def peak_of(trial: Trial, inputs: list[RaggedBatch]) -> Iterator[list[int]]:
    """Append, at the end of the block, the most bytes that lived in it, states and inputs included.

    On CUDA the allocator is asked for what it had reserved, on a CPU all storages are counted.
    """
    found: list[int] = []
    if trial.device.type == "cuda":
        torch.cuda.synchronize(trial.device)
        torch.cuda.reset_peak_memory_stats(trial.device)
        yield found
        torch.cuda.synchronize(trial.device)
        found.append(torch.cuda.max_memory_reserved(trial.device))
        return
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in trial.state_tensors()}
    for batch in inputs:
        batch.map(lambda t: held.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t)
    live = LiveBytes()
    live.know(trial.state_tensors())
    with live:
        yield found
    found.append(sum(held.values()) + live.peak)


def ran_out(error: RuntimeError) -> bool:
    """Whether ``error`` says that memory ran out: PyTorch's own, or the plain ones of cuBLAS, cuDNN and a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("STATUS_ALLOC_FAILED", "out of memory", "can't allocate memory"))
