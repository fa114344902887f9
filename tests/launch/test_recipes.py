"""Every shipped recipe on every cluster: found by name, fits, full micro-batches, read by DeepSpeed, and documented."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench.bench_plan import load_lengths
from tests.launch.clusters import (
    CLUSTERS,
    DS_CONFIGS,
    MODELS,
    NAMES,
    RECIPES,
    SIZES,
    UNIMOS,
    UNITERS,
    Cluster,
    ds_config_of,
    model_of,
    planner_of,
    prediction_of,
    recipe_of,
    row_of,
    rows_of,
    straggler_of,
    vcr_texts,
)
from vlscale.data.deal import Rule, accumulation, deal
from vlscale.data.lengths import SPECIALS
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.reference import token_buckets
from vlscale.plan.assumed import AssumedViews, assumed_datasets
from vlscale.train.ds_config import check_machine, find_recipe, read_ds_config, resolve_ds_config

COMBINATIONS = [(name, cluster) for name in NAMES for cluster in CLUSTERS]
LABELS = [f"{name}-{cluster}" for name, cluster in COMBINATIONS]
CAPABILITY = {"v100-16": (7, 0), "v100-32": (7, 0), "a100-40": (8, 0), "a100-80": (8, 0), "h100": (9, 0)}
README = (DS_CONFIGS / "README.md").read_text(encoding="utf-8")
DEMOS = {"demo": "demo_cpu", "demo_unimo": "demo_unimo_cpu"}
FULL = {"unimo_base": 0.88, "unimo_large": 0.88}
"""How full micro-batches are at least; a pair with all its views may be a ninth of one, and is sure to fit."""


@pytest.mark.parametrize(("name", "cluster"), COMBINATIONS, ids=LABELS)
def test_every_recipe_runs_on_every_cluster(name: str, cluster: Cluster) -> None:
    """Read, resolve, plan and deal as at start; the memory is predicted to fit with a fifth to spare."""
    path, recipe, plan = ds_config_of(name, cluster), recipe_of(name), planner_of(name).plan
    assert find_recipe(path, RECIPES) == RECIPES / f"{name}.yaml"
    settings = read_ds_config(path)
    check_machine(settings, "cuda", CAPABILITY[cluster.gpu])
    gas = accumulation(plan, cluster.gpus)
    config = resolve_ds_config(settings, gas, cluster.gpus, recipe.batch.global_batch_examples)
    assert config["train_batch_size"] == gas * cluster.gpus
    ceiling, rule = recipe.batch.micro_batch_tokens, Rule(recipe.batch.mode, planner_of(name).source.config.hidden_size)
    step, _ = plan.step(plan.start())
    hands = deal(step, cluster.gpus, gas, ceiling, rule)
    assert sum(len(micro) for hand in hands for micro in hand if micro.weight) == len(step)
    assert all(micro.tokens <= ceiling for hand in hands for micro in hand)
    made = prediction_of(name, cluster)
    assert made.workload.accumulation == gas
    assert made.memory.peak <= 0.8 * made.memory.capacity
    assert made.cures == []


@pytest.mark.parametrize(("name", "cluster"), COMBINATIONS, ids=LABELS)
def test_no_gpu_waits_for_a_micro_batch_that_is_not_full(name: str, cluster: Cluster) -> None:
    """Where GPUs accumulate, micro-batches are at least 97 % full (UNIMO: 88 %); else the step is split evenly."""
    made = prediction_of(name, cluster)
    work = made.workload
    if work.accumulation > 1:
        assert work.fill >= FULL.get(name, 0.97)
    examples = work.mean("examples") / (cluster.gpus * work.accumulation)
    assert straggler_of(made) <= (1.03 if examples >= 10 else 1.06)  # few examples cannot be split evenly


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_fewer_gpus_accumulate_full_micro_batches(name: str, gpus: int) -> None:
    work = planner_of(name).deal(gpus)
    # VCR's longest text, 422 tokens with its regions, costs 4 % of a micro-batch whose size has to be sure to fit it.
    assert work.accumulation == 1 or work.fill >= (0.96 if name.endswith("_vcr") else FULL.get(name, 0.97))


@pytest.fixture
def deepspeed_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's own reader of its JSON."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_reads_every_json_as_it_is_meant(path: Path, deepspeed_config: Any) -> None:
    settings = read_ds_config(path)
    # Without processes DeepSpeed takes the world for one; nothing else depends on its size.
    found = deepspeed_config(resolve_ds_config(settings, 2, 1, None))
    zero = found.zero_config
    assert zero.stage == settings.stage
    assert found.gradient_clipping == settings.clip
    assert (found.float16_config.enabled, found.bfloat16_config.enabled) == (
        settings.precision == "fp16",
        settings.precision == "bf16",
    )
    raw = settings.raw["zero_optimization"]
    assert (zero.overlap_comm, zero.reduce_bucket_size) == (raw["overlap_comm"], raw["reduce_bucket_size"])
    assert zero.allgather_bucket_size == raw["allgather_bucket_size"]
    assert found.grad_accum_dtype == (None if settings.precision == "fp32" else "fp32")
    assert found.gradient_accumulation_steps == 2


def test_jsons_of_one_model_and_gpu_differ_in_the_clip_alone() -> None:
    for size in SIZES:
        for suffix in {cluster.suffix for cluster in CLUSTERS}:
            raws = [read_ds_config(path).raw for path in sorted(DS_CONFIGS.glob(f"uniter_{size}*_{suffix}.json"))]
            assert len(raws) == 3
            assert all({**raw, "gradient_clipping": 0} == {**raws[0], "gradient_clipping": 0} for raw in raws)


def test_bf16_never_takes_the_optimiser_without_buckets() -> None:
    """Stage 1 in bf16 with float32 accumulation is another optimiser of DeepSpeed, without buckets and overlap."""
    for path in DS_CONFIGS.glob("*.json"):
        settings = read_ds_config(path)
        assert settings.precision != "bf16" or settings.stage == 2


def test_clips_are_those_of_the_mean() -> None:
    """The published clip of 5 acted on a sum over accumulation; none in VCR's second stage."""
    micro_batches = {"uniter_base": 6, "uniter_base_indomain": 2, "uniter_large": 4, "uniter_large_indomain": 4 / 3}
    for name, cluster in ((name, cluster) for name, cluster in COMBINATIONS if name in UNITERS):
        clip = 0.0 if name.endswith("_vcr") else 5 / micro_batches[name]
        assert read_ds_config(ds_config_of(name, cluster)).clip == pytest.approx(clip, abs=0.004)


def real_tokens(counted: np.ndarray, budget: int) -> float:
    """Mean real tokens of a micro-batch of the published sampler, [CLS] and [SEP] included."""
    cut = token_buckets(counted.astype(np.int32), budget, random.Random(42))
    return float(counted[cut.rows].sum() + SPECIALS * len(cut.rows)) / len(cut.ends)


def test_global_batches_are_what_the_published_sampler_held() -> None:
    captions = load_lengths()
    counted = captions.tokens + captions.regions
    base, large = real_tokens(counted, 10_240), real_tokens(counted, 6_144)
    vcr = real_tokens(np.sum(vcr_texts(100_000), axis=0), 6_144)
    expected = {
        "uniter_base": 8 * 6 * base,
        "uniter_base_indomain": 8 * 2 * base,
        "uniter_base_vcr": 4 * 4 * vcr,
        "uniter_large": 16 * 4 * large,
        "uniter_large_indomain": 16 * 4 * large / 3,  # derived, not published
        "uniter_large_vcr": 4 * 4 * vcr,
    }
    for name, tokens in expected.items():
        found = recipe_of(name).batch.global_batch_tokens
        # VCR's lengths are assumed, and another draw of them moves the figure by some percent.
        assert found == pytest.approx(tokens, rel=0.04 if name.endswith("_vcr") else 1e-4), name


@pytest.mark.parametrize("model", MODELS)
def test_the_readme_has_a_row_for_every_combination_and_no_other(model: str) -> None:
    """After a change, ``python -m tests.launch.clusters`` prints the rows."""
    written = re.findall(rf"^\| `{model}[a-z_]*` \|.*\|$", README, re.MULTILINE)
    assert written == rows_of(model)
    for name, cluster in COMBINATIONS:
        if model_of(name) == model:
            assert row_of(name, cluster) in written


def test_the_readme_names_every_json_and_no_other() -> None:
    written = re.findall(r"^\| `([a-z0-9_]+)\.json`(?:, `([a-z0-9_]+)\.json`)? \|", README, re.MULTILINE)
    named = [stem for row in written for stem in row if stem]
    assert sorted(named) == sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    used = {ds_config_of(name, cluster).stem for name, cluster in COMBINATIONS} | {*DEMOS.values()}
    assert set(named) == used


def test_what_the_readme_says_about_a_json_is_in_it() -> None:
    rows = re.findall(r"^\| (`[^|]+\.json`) \| `([a-z_]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", README, re.MULTILINE)
    assert len(rows) == len(DEMOS) + 2 * len(NAMES)
    for files, recipe, stage, precision, clip in rows:
        for stem in re.findall(r"`([a-z0-9_]+)\.json`", files):
            settings = read_ds_config(DS_CONFIGS / f"{stem}.json")
            assert find_recipe(settings.path, RECIPES).stem == recipe
            assert (str(settings.stage), settings.precision) == (stage, precision)
            assert settings.clip == (0.0 if clip == "none" else float(clip))


def test_every_recipe_has_a_json() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*NAMES, *DEMOS}


@pytest.mark.parametrize("name", UNIMOS)
def test_unimo_is_trained_as_published(name: str) -> None:
    """What is known of the published run, and one unit of images and of texts to five of pairs."""
    recipe = recipe_of(name)
    assert (recipe.optimizer.lr, recipe.schedule.total_steps) == (5e-5, 500_000)
    assert (recipe.data.max_text_tokens, recipe.data.max_regions) == (510, 100)
    assert recipe.objectives.unified.visual.overlap == (0.4 if name == "unimo_base" else 0.3)
    assert str(recipe.model.init_from) == f"data/roberta-{name.removeprefix('unimo_')}"
    shares = {"images": 0.0, "texts": 0.0, "pairs": 0.0}
    for dataset in recipe.data.datasets:
        assert dataset.kind is not None
        shares[dataset.kind] += dataset.mix["unified"]
    assert shares == pytest.approx({"images": 1, "texts": 1, "pairs": 5})
    assert all(read_ds_config(ds_config_of(name, cluster)).clip == 1.0 for cluster in CLUSTERS)


def test_unimos_jsons_are_uniters_but_for_the_clip() -> None:
    for name in UNIMOS:
        for suffix in {cluster.suffix for cluster in CLUSTERS}:
            ours, theirs = (
                read_ds_config(DS_CONFIGS / f"{stem}_{suffix}.json").raw
                for stem in (name, name.replace("unimo", "uniter"))
            )
            assert {**ours, "gradient_clipping": 0} == {**theirs, "gradient_clipping": 0}


@pytest.mark.parametrize("name", UNIMOS)
def test_a_ceiling_holds_every_step_of_captions_as_long_as_its_comment_says(name: str) -> None:
    """A pair of the longest caption with the longest of all views and 100 regions, in 32 micro-batches and no more."""
    recipe, written = recipe_of(name), (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    said = re.search(r"at most (\d+) word pieces", written.split("global_batch_tokens")[1])
    assert said is not None
    counts = {length: [accumulation(worst_plan(name, length), gpus) for gpus in (1, 2, 4, 8, 16, 32)]
              for length in (int(said[1]), 2 * int(said[1]))}  # fmt: skip
    assert counts[int(said[1])] == [32, 16, 8, 4, 2, 1]
    assert counts[2 * int(said[1])][-1] == 2
    fill = (recipe.batch.global_batch_tokens or 0) / (32 * recipe.batch.micro_batch_tokens)
    assert f"{fill:.0%}".replace("%", " %") in written


def worst_plan(name: str, longest: int) -> Plan:
    """The recipe's plan where one caption of each dataset, and all its views, are so long, with 100 regions."""
    recipe, lengths = recipe_of(name), assumed_datasets(recipe_of(name))
    datasets = []
    for section in recipe.data.datasets:
        of = lengths[section.name]
        if of.kind == "pairs":
            tokens, regions, views = of.tokens.copy(), of.regions.copy(), of.beside.rewrites
            assert isinstance(views, AssumedViews)
            tokens[7], regions[7] = longest, 100
            rewritten = views.view_tokens.copy()
            rewritten[views.ptr[7] : views.ptr[8]] = longest
            beside = replace(of.beside, rewrites=replace(views, view_tokens=rewritten))
            of = replace(of, tokens=tokens, regions=regions, beside=beside)
        datasets.append((of, {str(task): share for task, share in section.mix.items()}))
    return Plan(datasets, PlanSettings.from_recipe(recipe))
