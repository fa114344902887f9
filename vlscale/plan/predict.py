"""From a recipe, a DeepSpeed JSON and GPUs to memory, time and cost. Every assumption has a name and is reported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vlscale.config import Recipe
from vlscale.errors import VlscaleError
from vlscale.models.registry import ModelConfig
from vlscale.plan.activations import checkpointed, layer_bytes
from vlscale.plan.assumed import assumed_text
from vlscale.plan.calibration import Calibration
from vlscale.plan.costs import Costs, first_passes
from vlscale.plan.gpus import Gpu
from vlscale.plan.memory import (
    CONTEXT_GIB,
    FRAGMENTATION,
    GIB,
    MemoryBytes,
    Zero,
    cures,
    memory_bytes,
)
from vlscale.plan.model import model_sizes
from vlscale.plan.traffic import Links, Traffic, traffic_of
from vlscale.plan.workload import Planner, Workload

PUBLISHED = {"uniter_base": ("V100", 882.0, 4.5), "uniter_large": ("V100", 3645.0, 10.0)}
"""Recipe -> GPU, its hours, and days that the authors state for their run of its schedule, on padded batches."""

TRANSPORT_FLOPS = 7
"""Of an iteration, per word and region: one product, two sums of products, and a row's and a column's factor."""


@dataclass(frozen=True)
class Assumptions:
    """What is assumed, not measured; nothing else in the prediction of time is.

    Attributes:
        matmul_efficiency: share of the peak that matrix products reach.
        elementwise_passes: times that every saved activation goes through the GPU's memory, forward and backward.
        memory_efficiency: share of the memory's bandwidth that elementwise kernels reach.
        transport_efficiency: share of the float32 peak that optimal transport reaches on its small plans.
        kernels_per_layer: kernels of a layer, forward and backward; kernel_launch_s: least seconds of one.
        zero3_fetch_s: seconds by which stage 3 delays a layer, in each pass, to fetch and release its weights.
        optimizer_bytes: memory traffic of the optimiser per parameter it owns, bytes.
        links: of communication.
        measured: costs of the operations on this machine; they take the place of all of the above but stage 3's delay
            and communication.
    """

    matmul_efficiency: float = 0.6
    elementwise_passes: float = 5.0
    memory_efficiency: float = 0.8
    transport_efficiency: float = 0.1
    kernels_per_layer: int = 60
    kernel_launch_s: float = 6e-6
    zero3_fetch_s: float = 2e-4
    optimizer_bytes: float = 32.0
    links: Links = field(default_factory=Links)
    measured: Calibration | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU was measured, and so is what is planned for."""
        return self.measured is not None and self.measured.machine.kind == "cpu"

    def describe(self, assumed_lengths: str, several: bool = True) -> list[str]:
        """Return one line per assumption.

        Args:
            assumed_lengths: what is assumed of the data, if they are not here; several: there is more than one GPU.
        """
        lines = [
            *self._speeds(),
            f"ZeRO stage 3 delays each layer by {self.zero3_fetch_s * 1e6:g} microseconds per pass, for its hooks",
            *(self._communication() if several else []),
            *([] if self.on_cpu else self._of_cuda()),
            "data are always ready; evaluation, checkpoints and skipped steps take no time",
        ]
        return [*lines, assumed_lengths] if assumed_lengths else lines

    def _communication(self) -> list[str]:
        links = self.links
        return [
            f"transfers reach {links.link_efficiency:.0%} of NVLink and {links.network_efficiency:.0%} of the network, "
            f"a hop takes {links.link_latency_s * 1e6:g} and {links.network_latency_s * 1e6:g} microseconds",
        ]

    def _of_cuda(self) -> list[str]:
        """What is assumed of a GPU's memory."""
        return [
            f"{CONTEXT_GIB:g} GiB for CUDA context, cuBLAS and NCCL, and {FRAGMENTATION:.0%} of activations lost to "
            f"fragmentation",
            "activations on CUDA: measured on a CPU, with dropout masks of one byte and without the CPU's copy of the "
            "attention's output",
        ]

    def _speeds(self) -> list[str]:
        """How fast the operations are, where that is not measured."""
        if self.measured is not None:
            return []
        return [
            f"matrix products reach {self.matmul_efficiency:.0%} of the peak",
            f"every saved activation passes through memory {self.elementwise_passes:g} times, at "
            f"{self.memory_efficiency:.0%} of the bandwidth",
            f"optimal transport reaches {self.transport_efficiency:.0%} of the float32 peak",
            f"{self.kernels_per_layer} kernels per layer and micro-step, each at least "
            f"{self.kernel_launch_s * 1e6:g} microseconds",
            f"the optimiser moves {self.optimizer_bytes:g} bytes per parameter that a GPU owns",
        ]


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        recipe, zero, gpu, gpus: recipe, DeepSpeed JSON, GPU type and number of GPUs.
        gpu_name: as the user named it.
        policy: activation checkpointing; None: the recipe's.
    """

    recipe: Recipe
    zero: Zero
    gpu: Gpu
    gpu_name: str
    gpus: int
    policy: str | None = None

    @property
    def checkpointing(self) -> str:
        """Activation checkpointing in force."""
        return self.policy or self.recipe.activation_checkpointing


@dataclass(frozen=True)
class Prediction:
    """What a job is predicted to need; seconds, bytes and FLOPs, nothing rounded.

    Attributes:
        job: what was asked; parameters: of the model.
        workload: its steps; memory: of one GPU; traffic: of one step.
        flops_per_step: forward and backward, nothing computed twice; flops_per_token: of those.
        compute_s: of a step on a GPU with the mean load; recompute_s: of that, for activation checkpointing.
        straggler_s: waiting for the busiest GPU; optimizer_s: the update; step_s: all of a step.
        mfu: FLOPs of a step / (step_s x GPUs x peak).
        cures: what to change where it does not fit.
        assumptions: one line each; measured: likewise, what a calibration has measured.
    """

    job: Job
    parameters: int
    workload: Workload
    memory: MemoryBytes
    traffic: Traffic
    flops_per_step: float
    flops_per_token: float
    compute_s: float
    recompute_s: float
    straggler_s: float
    optimizer_s: float
    step_s: float
    mfu: float
    cures: list[str]
    assumptions: list[str]
    measured: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all GPUs per second."""
        return self.workload.mean("tokens") / self.step_s

    @property
    def peak_flops(self) -> float:
        """FLOP/s of one GPU that the MFU is a share of."""
        peak = self.job.gpu.peak(self.job.zero.precision)  # type: ignore[arg-type]
        assert peak is not None, "predict() refuses a precision that the GPU lacks"
        return peak

    @property
    def days(self) -> float:
        """Days for the recipe's schedule."""
        return self.step_s * self.job.recipe.schedule.total_steps / 86400

    @property
    def gpu_hours(self) -> float:
        """GPU-hours for the recipe's schedule."""
        return self.days * 24 * self.job.gpus

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON types; bytes, seconds and FLOPs."""
        job, workload = self.job, self.workload
        published = PUBLISHED.get(job.recipe.name)
        return {
            "recipe": job.recipe.name,
            "gpu": job.gpu_name,
            "gpus": job.gpus,
            "gpu_sources": job.gpu.sources,
            "zero": asdict(job.zero),
            "activation_checkpointing": job.checkpointing,
            "parameters": self.parameters,
            "memory": self.memory.to_json(),
            "flops": {"per_token": self.flops_per_token, "per_step": self.flops_per_step},
            "batch": {
                "tokens_per_step": workload.mean("tokens"),
                "examples_per_step": workload.mean("examples"),
                "accumulation": workload.accumulation,
                "fill": workload.fill,
                "most_tokens": workload.most,
                "straggler_per_step": workload.straggler_step,
                "straggler_per_micro_step": workload.straggler_micro,
                "lengths": "assumed" if workload.assumed else "data",
            },
            "traffic": asdict(self.traffic) | {"exposed_s": self.traffic.exposed_s},
            "time": {
                "compute_s": self.compute_s,
                "recompute_s": self.recompute_s,
                "straggler_s": self.straggler_s,
                "optimizer_s": self.optimizer_s,
                "step_s": self.step_s,
                "tokens_per_s": self.tokens_per_s,
                "mfu": self.mfu,
                "peak_flops": self.peak_flops,
                "days": self.days,
                "gpu_hours": self.gpu_hours,
            },
            "published": None if published is None else dict(zip(("gpu", "hours", "days"), published, strict=True)),
            "cures": self.cures,
            "measured": self.measured,
            "assumptions": self.assumptions,
        }


def predict(job: Job, planner: Planner, assumptions: Assumptions | None = None) -> Prediction:
    """Predict a job.

    Args:
        job: what is asked for.
        planner: the recipe's steps, which several jobs may share.
        assumptions: efficiencies; None: the defaults.

    Raises:
        VlscaleError: the GPU lacks the precision, or the steps cannot be dealt to so many GPUs.
    """
    assumptions = assumptions or Assumptions()
    zero, gpu, config = job.zero, job.gpu, planner.source.config
    peak = gpu.peak(zero.precision)  # type: ignore[arg-type]
    if peak is None:
        raise VlscaleError(
            f"--gpu {job.gpu_name} has no {zero.precision}, which the DeepSpeed JSON enables; enable fp16 there, or "
            f"take another GPU"
        )
    workload = planner.deal(job.gpus)
    sizes = model_sizes(config)

    def memory_of(changed: Zero, policy: str, tokens: float) -> MemoryBytes:
        loads = [task.load(tokens) for task in workload.tasks]
        capacity = gpu.memory_gib * GIB
        return memory_bytes(changed, config, sizes, job.gpus, loads, policy, capacity, assumptions.on_cpu)

    memory = memory_of(zero, job.checkpointing, workload.most)
    compute, recompute = compute_seconds(config, workload, job, peak, assumptions)
    straggler = workload.straggler_micro if zero.stage >= 2 else workload.straggler_step
    busiest, _ = compute_seconds(config, workload, job, peak, assumptions, straggler)
    micro = busiest / workload.accumulation
    traffic = traffic_of(
        zero, sizes[0], job.gpus, workload.accumulation, (micro * 2 / 3, micro / 3), config.num_hidden_layers, gpu,
        assumptions.links,
    )  # fmt: skip
    owned = sizes[0] / (job.gpus if zero.stage else 1)
    update = update_seconds(config, owned, job, assumptions)
    step = busiest + traffic.exposed_s + update
    flops, tokens = workload.mean("flops"), workload.mean("tokens")
    return Prediction(
        job, sizes[0], workload, memory, traffic, flops, flops / tokens, compute, recompute, busiest - compute, update,
        step, flops / (step * job.gpus * peak),
        cures(memory_of, zero, job.checkpointing, job.gpus, workload.most),
        assumptions.describe(assumed_text(job.recipe) if workload.assumed else "", job.gpus > 1),
        [] if assumptions.measured is None else assumptions.measured.describe(),
    )  # fmt: skip


def compute_seconds(
    config: ModelConfig, workload: Workload, job: Job, peak: float, assumptions: Assumptions, load: float = 1.0
) -> tuple[float, float]:
    """Return seconds of a step's passes on one GPU, and of those the seconds of recomputation.

    Matrix products run at their share of the peak, elementwise kernels at their share of the memory's bandwidth; all of
    it takes no less than the launches of the kernels.

    Args:
        config: the model; workload: its steps; job: GPU, precision and checkpointing.
        peak: of the GPU in the job's precision, FLOP/s.
        assumptions: efficiencies.
        load: tokens of the GPU / mean over GPUs.
    """
    if assumptions.measured is not None:
        return measured_seconds(config, workload, job, assumptions, load)
    share = load / job.gpus
    tokens = workload.mean("tokens") * share
    layers = config.num_hidden_layers
    again = (sum(checkpointed(job.checkpointing, layers)) + first_passes(job.recipe, config)) / layers
    moved = layer_bytes(config, job.zero.precision) * layers * tokens * assumptions.elementwise_passes
    elementwise = moved / (job.gpu.memory_gb_s * 1e9 * assumptions.memory_efficiency)
    products = workload.mean("flops") * share / (peak * assumptions.matmul_efficiency)
    encoder = workload.mean("encoder_flops") * share / (peak * assumptions.matmul_efficiency)
    forward = (encoder + elementwise) / 3
    launches = workload.accumulation * assumptions.kernels_per_layer * assumptions.kernel_launch_s * layers
    transport = transport_flops(config, workload, job.recipe) * share
    once = max(products + elementwise, launches)
    once += transport / (job.gpu.fp32_tflops * 1e12 * assumptions.transport_efficiency)
    recompute = again * max(forward, launches / 3)
    hooks = 2 * assumptions.zero3_fetch_s * layers * workload.accumulation if job.zero.stage == 3 else 0.0
    return once + recompute + hooks, recompute


def measured_seconds(
    config: ModelConfig, workload: Workload, job: Job, assumptions: Assumptions, load: float
) -> tuple[float, float]:
    """Return what :func:`compute_seconds` does, from the measured costs of the operations."""
    assert assumptions.measured is not None
    costs, parameters = Costs(assumptions.measured, config, job.recipe), model_sizes(config)[0]
    total = recomputed = 0.0
    for task in workload.tasks:
        tokens = task.tokens * load / (job.gpus * workload.accumulation)
        step = costs.micro_step(task.load(tokens), job.checkpointing, parameters)
        total += task.share * workload.accumulation * step.total
        recomputed += task.share * workload.accumulation * step.recomputed
    hooks = 2 * assumptions.zero3_fetch_s * config.num_hidden_layers * workload.accumulation
    return total + (hooks if job.zero.stage == 3 else 0.0), recomputed


def update_seconds(config: ModelConfig, owned: float, job: Job, assumptions: Assumptions) -> float:
    """Return seconds of the optimiser on the parameters that one GPU owns."""
    if assumptions.measured is not None:
        return Costs(assumptions.measured, config, job.recipe).update(owned)
    return owned * assumptions.optimizer_bytes / (job.gpu.memory_gb_s * 1e9 * assumptions.memory_efficiency)


def transport_flops(config: ModelConfig, workload: Workload, recipe: Recipe) -> float:
    """Return the FLOPs of optimal transport in a mean step: the costs and their gradients, and the iterations."""
    cells = sum(task.share * task.load(task.tokens).cells for task in workload.tasks)
    return float(cells * (6 * config.hidden_size + TRANSPORT_FLOPS * recipe.objectives.wra.iterations))
