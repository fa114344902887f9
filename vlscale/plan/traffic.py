"""What ZeRO sends per optimiser step, and how long that takes: an alpha-beta model of NVLink and network.

A collective of S bytes among N GPUs takes ``alpha x hops + volume / bandwidth``. A ring moves 2 (N-1)/N S through every
GPU for an all-reduce, and (N-1)/N S for an all-gather or a reduce-scatter. Its bandwidth is that of its slowest link:
NVLink within a node, a node's network where the ring leaves the node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlscale.plan.activations import WIDTH_BYTES
from vlscale.plan.gpus import Gpu
from vlscale.plan.memory import Zero


@dataclass(frozen=True)
class Links:
    """Assumed quality of the links.

    Attributes:
        link_efficiency, network_efficiency: share of the peak that a large collective reaches.
        link_latency_s, network_latency_s: of one hop.
    """

    link_efficiency: float = 0.8
    network_efficiency: float = 0.7
    link_latency_s: float = 3e-6
    network_latency_s: float = 12e-6


@dataclass(frozen=True)
class Traffic:
    """Traffic of one optimiser step.

    Attributes:
        reduce_bytes: bytes that each GPU sends for gradients; gather_bytes: for weights.
        reduce_s, gather_s: seconds, were nothing to run beside them.
        exposed_reduce_s, exposed_gather_s: seconds during which the GPU waits.
    """

    reduce_bytes: float
    gather_bytes: float
    reduce_s: float
    gather_s: float
    exposed_reduce_s: float
    exposed_gather_s: float

    @property
    def exposed_s(self) -> float:
        """Seconds per step that communication adds."""
        return self.exposed_reduce_s + self.exposed_gather_s


def collective_seconds(volume: float, calls: float, gpus: int, gpu: Gpu, links: Links) -> float:
    """Seconds of ``calls`` collectives that together send ``volume`` bytes through each of ``gpus`` GPUs."""
    if gpus == 1:
        return 0.0
    inside = min(gpus, gpu.gpus_per_node)
    nodes = math.ceil(gpus / gpu.gpus_per_node)
    bandwidth = gpu.link_gb_s * 1e9 * links.link_efficiency
    latency = links.link_latency_s * (inside - 1)
    if nodes > 1:
        bandwidth = min(bandwidth, gpu.network_gb_s * 1e9 * links.network_efficiency)
        latency += links.network_latency_s * 2 * math.ceil(math.log2(nodes))  # a tree among nodes
    return calls * latency + volume / bandwidth


def traffic_of(
    zero: Zero,
    parameters: int,
    gpus: int,
    accumulation: int,
    passes_s: tuple[float, float],
    layers: int,
    gpu: Gpu,
    links: Links,
) -> Traffic:
    """Predict the traffic of one optimiser step.

    Stages 0 and 1 reduce once per step, 2 and 3 at every micro-step. Stages 1 and 2 all-reduce whole buckets (that is
    DeepSpeed's ``use_multi_rank_bucket_allreduce``) and gather the weights after the step; stage 3 scatters gradients
    and gathers weights in every micro-step: once, or once more for the backward pass where they are not kept.

    Args:
        zero: the JSON; parameters: of the model; gpus: number of GPUs; accumulation: micro-steps per step.
        passes_s: seconds of a micro-step's backward and forward pass, which communication can hide behind.
        layers: of the encoder: stage 3 gathers the weights of one at a time.
        gpu: the GPU; links: assumptions.
    """
    backward_s, forward_s = passes_s
    whole = (gpus - 1) / gpus * parameters
    times = accumulation if zero.stage >= 2 else 1
    factor = 1 if zero.stage == 3 else 2
    reduce_bytes = times * factor * whole * zero.communication_bytes
    width = WIDTH_BYTES[zero.precision]
    gathers = {0: 0, 1: 1, 2: 1, 3: accumulation * (1 if zero.keeps_gathered(parameters) else 2)}[zero.stage]
    gather_bytes = gathers * whole * width
    buckets = math.ceil(parameters / zero.bucket)
    reduce_s = collective_seconds(reduce_bytes, times * buckets, gpus, gpu, links)
    gather_calls = gathers * (layers if zero.stage == 3 else math.ceil(parameters / zero.gather_bucket))
    gather_s = collective_seconds(gather_bytes, gather_calls, gpus, gpu, links)
    exposed_reduce = reduce_s
    if zero.overlap and gpus > 1 and not zero.whole_bf16:
        # The first bucket is full only after its share of the backward pass, and the last one has nothing beside it.
        each = reduce_s / times
        exposed_reduce = times * max(each / buckets, each - backward_s * (1 - 1 / buckets))
    exposed_gather = gather_s
    if zero.stage == 3:  # prefetched while layers run, all but the first
        each = gather_s / accumulation
        exposed_gather = accumulation * max(each / layers, each - forward_s * (1 - 1 / layers))
    return Traffic(reduce_bytes, gather_bytes, reduce_s, gather_s, exposed_reduce, exposed_gather)
