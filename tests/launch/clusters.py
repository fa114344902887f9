"""The clusters that the shipped recipes and DeepSpeed JSONs are for, and what `vlscale plan` predicts on each.

``python -m tests.launch.clusters`` prints the tables of ds_configs/README.md, which a test compares with what stands
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlscale.config import Recipe, load_recipe
from vlscale.data.lengths import DatasetLengths
from vlscale.plan.assumed import ASSUMED_TEXTS
from vlscale.plan.gpus import load_gpu
from vlscale.plan.memory import GIB, Zero
from vlscale.plan.predict import Job, Prediction, predict
from vlscale.plan.workload import Planner, Source, read_source
from vlscale.train.ds_config import read_ds_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch/recipes"
DS_CONFIGS = ROOT / "ds_configs"
SIZES = ("base", "large")
VARIANTS = ("", "_indomain", "_vcr")


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        gpu: name in vlscale/plan/gpus.yaml; nodes: number of nodes; per_node: GPUs of each.
        suffix: end of the names of the JSONs for it.
        row: first words of its row in the README's tables; clusters that differ in time alone share one.
    """

    gpu: str
    nodes: int
    per_node: int
    suffix: str
    row: str

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}-{self.gpu}"


CLUSTERS = (
    Cluster("v100-32", 1, 8, "v100", "8 V100-32 (1x8)"),
    Cluster("v100-32", 4, 4, "v100", "16 V100-32 (4x4, 2x8)"),
    Cluster("v100-32", 2, 8, "v100", "16 V100-32 (4x4, 2x8)"),
    Cluster("v100-32", 4, 8, "v100", "32 V100-32 (4x8)"),
    Cluster("v100-32", 8, 8, "v100", "64 V100-32, V100-16 (8x8)"),
    Cluster("v100-16", 8, 8, "v100", "64 V100-32, V100-16 (8x8)"),
    Cluster("a100-40", 1, 8, "a100_h100", "8 A100-40, A100-80, H100 (1x8)"),
    Cluster("a100-80", 1, 8, "a100_h100", "8 A100-40, A100-80, H100 (1x8)"),
    Cluster("h100", 1, 8, "a100_h100", "8 A100-40, A100-80, H100 (1x8)"),
)
UNITERS = tuple(f"uniter_{size}{variant}" for size in SIZES for variant in VARIANTS)
UNIMOS = tuple(f"unimo_{size}" for size in SIZES)
NAMES = (*UNITERS, *UNIMOS)


def ds_config_of(name: str, cluster: Cluster) -> Path:
    """Path of the JSON for a recipe on a cluster."""
    return DS_CONFIGS / f"{name}_{cluster.suffix}.json"


@cache
def recipe_of(name: str) -> Recipe:
    """A shipped recipe."""
    return load_recipe(RECIPES / f"{name}.yaml")


def vcr_texts(count: int, seed: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """int32 [count] each: assumed word pieces (separators within the text included) and regions of VCR's texts.

    Log-normal, as the other assumed lengths: medians of 7.5 (question), 8 (answer), 17.5 (rationale), after the mean
    numbers of words that VCR's authors state (7.5 in an answer, 16 in a rationale); 9 ground-truth and 31 detected
    boxes.
    """
    draw = np.random.default_rng(seed)

    def lengths(median: float, sigma: float, low: int, high: int) -> NDArray[np.int32]:
        return np.exp(draw.normal(np.log(median), sigma, count)).round().clip(low, high).astype(np.int32)

    parts = lengths(7.5, 0.35, 3, 40), lengths(8, 0.5, 1, 60), lengths(17.5, 0.5, 3, 118)
    boxes = lengths(9, 0.6, 1, 100), lengths(31, 0.553, 10, 100)
    return np.sum(parts, axis=0, dtype=np.int32) + np.int32(2), np.sum(boxes, axis=0, dtype=np.int32)


@cache
def planner_of(name: str) -> Planner:
    """A recipe's steps over assumed lengths: those of `vlscale plan`, and VCR's own for VCR."""
    source = read_source(recipe_of(name))
    assert source.assumed, "the recipe's data are here; run the tests where they are not"
    if name.endswith("_vcr"):
        tokens, regions = vcr_texts(ASSUMED_TEXTS)
        rows, pointers = np.arange(ASSUMED_TEXTS), np.arange(ASSUMED_TEXTS + 1)
        shards = np.append(np.arange(0, ASSUMED_TEXTS, 2000), ASSUMED_TEXTS)
        source = Source({"vcr": DatasetLengths("vcr", tokens, pointers, rows, regions, shards)}, True, source.config)
    return Planner(recipe_of(name), source)


@cache
def prediction_of(name: str, cluster: Cluster, policy: str | None = None) -> Prediction:
    """What `vlscale plan` predicts; a node has as many GPUs as the cluster's."""
    gpu = load_gpu(cluster.gpu).model_copy(update={"gpus_per_node": cluster.per_node})
    zero = Zero.from_settings(read_ds_config(ds_config_of(name, cluster)))
    return predict(Job(recipe_of(name), zero, gpu, cluster.gpu, cluster.gpus, policy), planner_of(name))


def row_of(name: str, cluster: Cluster) -> str:
    """The row of the README's tables for a recipe on a cluster."""
    made = prediction_of(name, cluster)
    work = made.workload
    cells = (
        f"`{name}`",
        cluster.row,
        f"{work.accumulation}",
        f"{work.most:,.0f}",
        f"{work.fill:.1%}",
        f"{straggler_of(made):.3f}",
        f"{made.memory.peak / GIB:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def straggler_of(made: Prediction) -> float:
    """Tokens of the busiest GPU over the mean, where GPUs wait for each other: per micro-step from stage 2 on."""
    return made.workload.straggler_micro if made.job.zero.stage >= 2 else made.workload.straggler_step


def model_of(name: str) -> str:
    """Model and size of a recipe: ``uniter_base``, ``unimo_large`` and the like."""
    return "_".join(name.split("_")[:2])


MODELS = tuple(dict.fromkeys(model_of(name) for name in NAMES))


def rows_of(model: str) -> list[str]:
    """All rows of a model and size, in the README's order."""
    names = [name for name in NAMES if model_of(name) == model]
    return list(dict.fromkeys(row_of(name, cluster) for name in names for cluster in CLUSTERS))


if __name__ == "__main__":
    for every in MODELS:
        print(*rows_of(every), sep="\n", end="\n\n")
