"""Memory of one GPU: what DeepSpeed 0.19's ZeRO keeps of the model, and the activations beside it.

The bytes follow DeepSpeed's source (stage_1_and_2.py, stage3.py, engine.py of 0.19.8), not the papers: for instance,
stage 1 with float32 accumulation keeps a whole float32 gradient on every GPU, and stage 3 keeps gathered weights from
the forward to the backward pass where the model is smaller than ``stage3_max_reuse_distance``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vlscale.models.registry import ModelConfig
from vlscale.plan.activations import WIDTH_BYTES, ActivationBytes, Load, activation_bytes
from vlscale.train.ds_config import BUCKET_ELEMENTS, DeepSpeedSettings

GIB = 2**30
CONTEXT_GIB = 0.6
"""Assumed: CUDA context, cuBLAS workspaces and NCCL's buffers of one process."""
NCCL_GIB = 0.3
"""Assumed: NCCL's share of that, where a process has others to talk to."""
FRAGMENTATION = 0.05
"""Assumed: share of all activations that the allocator loses to fragmentation."""
_LIVE, _REUSE, _PREFETCH = 1_000_000_000, 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of stage3_max_live_parameters, stage3_max_reuse_distance and stage3_prefetch_bucket_size."""
_ACCUMULATION_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Zero:
    """What the DeepSpeed JSON says about memory and traffic.

    Attributes:
        stage: ZeRO stage; precision: of weights and activations.
        accumulation_bytes: per element of an accumulated gradient.
        communication_bytes: per element of a reduced gradient.
        bucket: elements per reduction; gather_bucket: per all-gather.
        overlap: reductions run beside the backward pass.
        contiguous: gradients are copied into a bucket before they are reduced.
        max_live, reuse_distance, prefetch: stage 3, elements.
    """

    stage: int
    precision: str
    accumulation_bytes: int
    communication_bytes: int
    bucket: int = BUCKET_ELEMENTS
    gather_bucket: int = BUCKET_ELEMENTS
    overlap: bool = False
    contiguous: bool = True
    max_live: int = _LIVE
    reuse_distance: int = _REUSE
    prefetch: int = _PREFETCH

    @classmethod
    def from_settings(cls, settings: DeepSpeedSettings) -> Zero:
        """Read a DeepSpeed JSON, with what the trainer fills in (float32 accumulation, bucket sizes)."""
        raw: dict[str, Any] = settings.raw.get("zero_optimization", {})
        width = WIDTH_BYTES[settings.precision]
        accumulation = settings.raw.get("data_types", {}).get("grad_accum_dtype") or "fp32"
        communication = settings.raw.get("communication_data_type")
        return cls(
            settings.stage,
            settings.precision,
            _ACCUMULATION_BYTES.get(accumulation, 4),
            _ACCUMULATION_BYTES.get(communication, width) if communication else width,
            int(raw.get("reduce_bucket_size", BUCKET_ELEMENTS)),
            int(raw.get("allgather_bucket_size", BUCKET_ELEMENTS)),
            bool(raw.get("overlap_comm", settings.stage == 3)),
            bool(raw.get("contiguous_gradients", True)),
            int(raw.get("stage3_max_live_parameters", _LIVE)),
            int(raw.get("stage3_max_reuse_distance", _REUSE)),
            int(raw.get("stage3_prefetch_bucket_size", _PREFETCH)),
        )

    @property
    def whole_bf16(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer: stage 1, bf16, accumulated in float32.

        That keeps the bf16 gradient beside the whole float32 one, has no buckets, and reduces after the backward pass.
        """
        return self.stage == 1 and self.precision == "bf16" and self.accumulation_bytes == 4

    def keeps_gathered(self, parameters: int) -> bool:
        """Stage 3: whether weights stay gathered between a layer's forward and its backward pass."""
        return 2 * parameters <= self.reuse_distance and parameters <= self.max_live


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model states on one GPU.

    Attributes:
        weights: as the layers read them (stage 3: this GPU's part).
        gathered: stage 3: weights of other GPUs that are present while layers run.
        gradients: accumulated over micro-steps.
        step_copy: a float32 copy of the gradient, there only while the optimiser steps.
        optimizer: float32 master weights (half precision, or any stage above 0) and Adam's two moments.
        buckets: buffers of reductions, and of the all-gather after the step.
    """

    weights: float
    gathered: float
    gradients: float
    step_copy: float
    optimizer: float
    buckets: float

    @property
    def model_states(self) -> float:
        """Weights, gradients and optimiser states: what DeepSpeed's estimators count."""
        return self.weights + self.gradients + self.step_copy + self.optimizer


def state_bytes(zero: Zero, parameters: int, largest: int, gpus: int) -> StateBytes:
    """Return the bytes of model states.

    Args:
        zero: the JSON.
        parameters: of the model, tied weights once.
        largest: parameters of its largest single module.
        gpus: GPUs that share the states.
    """
    width, stage = WIDTH_BYTES[zero.precision], zero.stage
    part = parameters / gpus
    weights = width * (part if stage == 3 else parameters)
    gradients = zero.accumulation_bytes * (part if stage >= 2 else parameters)
    if stage == 0:
        return StateBytes(weights, 0.0, width * parameters, 0.0, 8.0 * parameters, 0.0)
    if zero.whole_bf16:
        return StateBytes(weights, 0.0, (4.0 + width) * parameters, 0.0, 12 * part, 0.0)
    step_copy = 4 * part if _copies_to_step(zero) else 0.0
    gathered = 0.0
    if stage == 3:
        live = parameters if zero.keeps_gathered(parameters) else min(parameters, largest + zero.prefetch)
        gathered = width * (live - live / gpus)
    bucket = min(zero.bucket, parameters)
    staged = zero.accumulation_bytes if stage == 1 else width
    buckets = staged * bucket * (2 if zero.overlap else 1) if zero.contiguous else 0
    return StateBytes(weights, gathered, gradients, step_copy, 12 * part, float(buckets))


def _copies_to_step(zero: Zero) -> bool:
    """Whether the gradient is copied to float32 while the optimiser steps.

    Stages 1 and 2 hand a float32 accumulator over as it is, but stage 1 first makes the owned part of the whole one
    flat; stage 3 copies whatever the dtype is.
    """
    if zero.stage == 1 and zero.accumulation_bytes > WIDTH_BYTES[zero.precision]:
        return True
    return zero.stage == 3 or zero.accumulation_bytes < 4 or zero.precision == "fp32"


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes on one GPU, part by part, and whether they fit.

    Attributes:
        states: see :class:`StateBytes`.
        activations: of the heaviest task's fullest micro-batch; task: that task.
        inputs: the micro-batches that lie on the GPU.
        reserve: assumed, see ``CONTEXT_GIB`` and ``FRAGMENTATION``.
        peak: most that is alive at one time: in the backward pass, or while the optimiser steps.
        capacity: of the GPU.
    """

    states: StateBytes
    activations: ActivationBytes
    task: str
    inputs: float
    reserve: float
    peak: float
    capacity: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within the capacity."""
        return self.peak <= self.capacity

    def to_json(self) -> dict[str, Any]:
        """Return the parts in bytes."""
        states, activations = vars(self.states), vars(self.activations)
        return {
            **states,
            "model_states": self.states.model_states,
            "activations": {**activations, "task": self.task},
            "inputs": self.inputs,
            "reserve": self.reserve,
            "peak": self.peak,
            "capacity": self.capacity,
            "fits": self.fits,
        }


def memory_bytes(
    zero: Zero,
    config: ModelConfig,
    sizes: tuple[int, int],
    gpus: int,
    loads: list[Load],
    policy: str,
    capacity: float,
    cpu: bool = False,
) -> MemoryBytes:
    """Predict the memory of one GPU.

    Args:
        zero: the JSON.
        config: the model; sizes: its parameters, and those of its largest module.
        gpus: number of GPUs.
        loads: the fullest micro-batch of each task.
        policy: the recipe's activation checkpointing.
        capacity: bytes of the GPU.
        cpu: the "GPU" is a CPU, where nothing is reserved.
    """
    states = state_bytes(zero, *sizes, gpus)
    found = [(activation_bytes(config, load, zero.precision, policy, cpu), load) for load in loads]
    activations, load = max(found, key=lambda pair: pair[0].peak)
    inputs = load.regions * (WIDTH_BYTES["fp32"] * (config.feature_dim + 4)) + 8.0 * load.text
    reserve = 0.0 if cpu else CONTEXT_GIB * GIB + FRAGMENTATION * activations.peak
    always = states.weights + states.gradients + states.optimizer + states.buckets
    peak = always + reserve + inputs + max(states.gathered + activations.peak, states.step_copy)
    return MemoryBytes(states, activations, load.task, inputs, reserve, peak, capacity)


@dataclass(frozen=True)
class Withheld:
    """Bytes of a real run that a trial in one process does not take, and that it must therefore leave.

    Attributes:
        buckets: buffers of reductions and of the all-gather.
        gradients: in bf16, which DeepSpeed's BF16_Optimizer keeps beside the accumulated ones.
        nccl: of communication, assumed; fragmentation: of the allocator, assumed.
    """

    buckets: float = 0.0
    gradients: float = 0.0
    nccl: float = 0.0
    fragmentation: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.buckets + self.gradients + self.nccl + self.fragmentation

    def describe(self) -> str:
        """Return its parts in words, GiB; those of nothing are left out."""
        words = {
            "buckets": "reduction buckets", "gradients": "bf16 gradients", "nccl": "NCCL (assumed)",
            "fragmentation": "fragmentation (assumed)",
        }  # fmt: skip
        parts = [f"{value / GIB:.3f} for {words[name]}" for name, value in vars(self).items() if value]
        return " + ".join(parts)


def withheld_bytes(zero: Zero, sizes: tuple[int, int], gpus: int, limit: float, cpu: bool) -> Withheld:
    """Return what one process of a probe has to leave of ``limit`` bytes; see :func:`memory_bytes`."""
    states = state_bytes(zero, *sizes, gpus)
    gradients = float(WIDTH_BYTES[zero.precision] * sizes[0]) if zero.whole_bf16 else 0.0
    if cpu:
        return Withheld(states.buckets, gradients)
    nccl = NCCL_GIB * GIB if gpus > 1 else 0.0
    left = limit - states.model_states - states.buckets - nccl
    return Withheld(states.buckets, gradients, nccl, max(0.0, left) * FRAGMENTATION / (1 + FRAGMENTATION))


MemoryOf = Callable[[Zero, str, float], MemoryBytes]
"""(JSON, checkpointing policy, tokens of the fullest micro-batch) -> memory."""


def cures(memory_of: MemoryOf, zero: Zero, policy: str, gpus: int, tokens: float) -> list[str]:
    """Return settings that lower the peak, each with the peak it leads to; those that cost least speed come first.

    Args:
        memory_of: predicts a change of the job.
        zero: the JSON as it is; policy: activation checkpointing as it is; gpus: number of GPUs.
        tokens: of the fullest micro-batch as it is.

    Returns:
        Nothing if the job fits as it is.
    """
    if memory_of(zero, policy, tokens).fits:
        return []
    found = []
    fewer = _most_tokens(memory_of, zero, policy, tokens)
    if fewer:
        found.append(
            f"batch.micro_batch_tokens {fewer} (micro-batches hold up to {tokens:.0f} now; more accumulation, the same "
            f"result; no less than the longest example): fits"
        )
    changes: list[tuple[str, Zero, str]] = []
    if zero.stage < 2 and gpus > 1:
        changes.append((f"zero_optimization.stage 2 instead of {zero.stage}", replace(zero, stage=2), policy))
    if policy == "none":
        changes.append(("activation_checkpointing: every 2", zero, "every 2"))
    if policy != "full":
        changes.append(("activation_checkpointing: full", zero, "full"))
    if zero.stage < 3 and gpus > 1:
        released = replace(zero, stage=3, reuse_distance=0)
        changes.append(("zero_optimization.stage 3 with stage3_max_reuse_distance 0", released, policy))
        if policy != "full":
            changes.append(("both: stage 3 as above, and activation_checkpointing: full", released, "full"))
    for name, changed, with_policy in changes:
        memory = memory_of(changed, with_policy, tokens)
        verdict = "fits" if memory.fits else "does not fit yet"
        found.append(f"{name}: {memory.peak / GIB:.2f} GiB, {verdict}")
    if zero.precision == "fp32":
        found.append("fp16 (V100) or bf16 (A100 and later) instead of fp32")
    return [*found, "a GPU with more memory, or more GPUs"]


def _most_tokens(memory_of: MemoryOf, zero: Zero, policy: str, tokens: float) -> int:
    """Most tokens of a micro-batch that fits; 0 if none does."""
    low, high = 0, math.floor(tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory_of(zero, policy, middle).fits else (low, middle - 1)
    return low
