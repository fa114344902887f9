"""Recipe: one frozen model read from YAML. Unknown keys are errors that name the nearest key.

The recipe owns model, data, objectives, global batch, optimiser rule, schedule, activation checkpointing, evaluation,
checkpoints and logging. The DeepSpeed JSON owns ZeRO, precision, communication and clipping. Nothing stands in both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from vlscale.config_unified import UnifiedSection
from vlscale.config_uniter import ItmSection, MlmSection, MrmSection, WraSection
from vlscale.config_values import Beta, Bytes, Folder, Positive, Root, Section
from vlscale.config_yaml import RecipeLoader
from vlscale.errors import VlscaleError, nearest

TaskName = Literal["mlm", "mrfr", "mrc", "mrckl", "itm", "unified"]
InitTables = Literal["exact", "grow", "reference"]
TASKS: tuple[str, ...] = get_args(TaskName)
MODEL_TASKS: dict[str, tuple[str, ...]] = {"uniter": TASKS[:-1], "unimo": ("unified",)}
"""Name of a model -> the tasks that it is trained on."""
MAX_RECIPE_BYTES = 1 << 20


class ModelSection(Section):
    """Which model: a registered name, a preset, and fields of the model's own configuration laid over it."""

    name: str = Field("uniter", description="uniter or unimo")
    preset: str | None = Field(None, description="file in vlscale/models/presets, without .yaml")
    config: dict[str, Any] = Field(default_factory=dict, description="fields of the model's configuration")
    init_from: Path | None = Field(
        None,
        description="what to start from: a vlscale folder, a Hugging Face BERT (uniter) or RoBERTa (unimo) folder, or "
        "UNIMO's published variables",
    )
    init_tables: InitTables = Field(
        "exact",
        description="grow: init_from may lack the last words and types, which start random and as type 0; "
        "reference: the same with a new word head (UNITER's second stage on VCR)",
    )


class DatasetSection(Section):
    """One dataset: a folder or URL with images/, texts/ and (for mrc, mrckl) classes/, and its steps' share per task.

    A URL is one that mosaicml-streaming downloads from: s3, gs, azure, oci, hf, sftp, dbfs and others.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    root: Root
    kind: Literal["pairs", "texts", "images"] | None = Field(None, description="null: as its stores say; else compared")
    mix: dict[TaskName, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    repeat: Positive | None = Field(None, description="it counts with so many times its texts; mix divides among tasks")
    choose: int | None = Field(None, ge=1, description="it counts with so many texts; mix divides them among tasks")

    @model_validator(mode="after")
    def _one_size(self) -> DatasetSection:
        if self.repeat is not None and self.choose is not None:
            raise ValueError(f"dataset {self.name}: repeat and choose exclude each other: drop one")
        return self

    @property
    def size(self) -> tuple[str, float] | None:
        """``("repeat", r)`` or ``("choose", n)``, if the dataset is weighed by its texts."""
        if self.repeat is not None:
            return "repeat", self.repeat
        return None if self.choose is None else ("choose", float(self.choose))


class DataSection(Section):
    """Where the examples come from and how they are read."""

    datasets: tuple[DatasetSection, ...] = Field(min_length=1)
    validation: tuple[DatasetSection, ...] = ()
    mix_unit: Literal["steps", "samples"] = Field("steps", description="what the shares of datasets[].mix count")
    max_text_tokens: int = Field(60, ge=1, description="word pieces without [CLS] and [SEP]; longer texts are left out")
    max_regions: int = Field(100, ge=1, description="the first n regions of each image are used")
    window_shards: int = Field(16, ge=1, description="examples are shuffled within a window of so many shards")
    workers: int = Field(2, ge=0, description="reader processes per rank")
    prefetch: int = Field(4, ge=1, description="micro-batches that each worker holds ready")
    verify: bool = Field(True, description="check the hash of each shard when it is first touched")
    cache: Folder | None = Field(None, description="folder on a local disk that all roots are fetched into, bit by bit")
    cache_limit: Bytes | None = Field(None, description="most bytes of shards in the cache, e.g. 64gb; null: no limit")
    download_retries: int = Field(2, ge=0, le=100, description="further attempts after a download has failed")
    download_timeout_s: float = Field(60, gt=0, description="seconds without any byte after which one has failed")

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataSection:
        for group in (self.datasets, self.validation):
            names = [dataset.name for dataset in group]
            if len(set(names)) != len(names):
                raise ValueError(f"dataset names repeat: {names}")
        for dataset in (*self.datasets, *self.validation):
            if isinstance(dataset.root, str) and self.cache is None:
                raise ValueError(
                    f"dataset {dataset.name}: its root is a remote; set data.cache to a folder for what is downloaded"
                )
        for dataset in self.datasets:
            if not any(share > 0 for share in dataset.mix.values()):
                raise ValueError(
                    f"dataset {dataset.name}: no task has a positive share, so nothing would be trained on it: set its "
                    f"mix, e.g. {{mlm: 2, itm: 1}} ({{unified: 0.001}} where it is only retrieved from), or take it out"
                )
        if self.cache is None:
            for key in ("cache_limit", "download_retries", "download_timeout_s"):
                if getattr(self, key) != DataSection.model_fields[key].default:
                    raise ValueError(f"{key} has no effect without data.cache: set it, or drop {key}")
        return self


class BatchSection(Section):
    """The global batch of one optimiser step, and the ceiling of what one GPU holds at a time.

    Neither the number of GPUs nor the ceiling changes what is learnt: gradient accumulation is derived from them. Only
    mode ``reference`` is different: its batches are what UNITER's sampler makes of the ceiling.
    """

    mode: Literal["packed", "padded", "reference"] = Field(
        "packed",
        description="packed: the ceiling counts real tokens; padded: longest example x examples; reference: UNITER's "
        "sampler, for repeating a published run",
    )
    global_batch_tokens: int | None = Field(None, ge=1, description="real tokens (text and regions) per step")
    global_batch_examples: int | None = Field(None, ge=1, description="examples per step")
    reference_batches: int | None = Field(
        None, ge=1, description="mode reference: batches per step (the published run's GPUs x accumulation)"
    )
    micro_batch_tokens: int = Field(10240, ge=1, description="most tokens per GPU and micro-step; see mode")

    @model_validator(mode="after")
    def _one_unit(self) -> BatchSection:
        counted = (self.global_batch_tokens, self.global_batch_examples)
        if self.mode == "reference":
            if self.reference_batches is None or counted != (None, None):
                raise ValueError(
                    "batch.mode reference counts a step in batch.reference_batches: set it, and neither "
                    "global_batch_tokens nor global_batch_examples"
                )
        elif (counted[0] is None) == (counted[1] is None):
            raise ValueError("set exactly one of batch.global_batch_tokens and batch.global_batch_examples")
        elif self.reference_batches is not None:
            raise ValueError("batch.reference_batches has an effect with batch.mode reference only: drop it")
        return self


class ObjectivesSection(Section):
    """Settings of the objectives: the first five sections of UNITER's, ``unified`` of UNIMO's."""

    masking: Literal["conditional", "joint"] = Field(
        "conditional", description="conditional: one modality is masked at a time; joint: both (the paper's ablation)"
    )
    mlm: MlmSection = MlmSection()
    mrm: MrmSection = MrmSection()
    itm: ItmSection = ItmSection()
    wra: WraSection = WraSection()
    unified: UnifiedSection = UnifiedSection()


class OptimizerSection(Section):
    """The optimiser rule."""

    rule: Literal["adamw", "reference", "paddle"] = Field(
        "adamw",
        description="reference: UNITER's AdamW (eps outside the bias correction, decay after the update); paddle: "
        "UNIMO's (the same eps, decay of the value before the update)",
    )
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    decay_groups: Literal["correct", "reference"] = Field(
        "correct",
        description="correct: no decay for gains and biases; reference: by published names (UNIMO's: the same)",
    )


class ScheduleSection(Section):
    """Linear warm-up, then linear decay to zero, over optimiser steps that were taken."""

    kind: Literal["linear", "paddle"] = Field(
        "linear",
        description="paddle: UNIMO's, from 0; its way down counts from step 0, so the rate drops as the warm-up ends",
    )
    warmup_steps: int = Field(ge=0)
    total_steps: int = Field(ge=1)

    @model_validator(mode="after")
    def _warmup_fits(self) -> ScheduleSection:
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds total_steps {self.total_steps}")
        return self


class EvaluationSection(Section):
    """Periodic evaluation on data.validation."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    examples: int = Field(1024, ge=1, description="examples per validation dataset and task")


class CheckpointSection(Section):
    """Checkpoints in <run>/checkpoints/step-N."""

    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


class LoggingSection(Section):
    """What is written while training."""

    every: int = Field(10, ge=1, description="steps between rows of TensorBoard and metrics.jsonl")
    tensorboard: bool = True


class Recipe(Section):
    """Everything that decides what is learnt."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    seed: int = Field(42, ge=0)
    model: ModelSection
    data: DataSection
    batch: BatchSection
    objectives: ObjectivesSection = ObjectivesSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection
    loss_normalization: Literal["exact", "reference"] = Field(
        "exact", description="exact: means over the global batch; reference: means over each micro-batch, then averaged"
    )
    activation_checkpointing: str = Field("none", pattern=r"^(none|full|every [1-9][0-9]*)$")
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _model_fits_tasks(self) -> Recipe:
        name = self.model.name
        known = MODEL_TASKS.get(name, TASKS)
        for task in self.tasks:
            if task not in known:
                other = next(each for each, tasks in MODEL_TASKS.items() if task in tasks)
                raise ValueError(
                    f"model.name {name} does not train task {task} (it trains {', '.join(known)}): set model.name to "
                    f"{other}, or mend data.datasets[].mix"
                )
        if "unified" not in self.tasks:
            return self
        if self.batch.mode != "packed":
            raise ValueError(f"batch.mode {self.batch.mode} does not go with task unified: set it to packed")
        self.objectives.unified.check_learnable()
        contrast = self.objectives.unified.contrast
        if contrast.window and contrast.weight and self.loss_normalization == "reference":
            raise ValueError(
                "loss_normalization reference does not go with objectives.unified.contrast.window, whose gradient is "
                "that of the whole step's mean: set it to exact, or window to false"
            )
        return self

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that some dataset trains, in a fixed order."""
        wanted = {task for dataset in self.data.datasets for task, share in dataset.mix.items() if share > 0}
        return tuple(task for task in TASKS if task in wanted)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe from YAML and lay ``a.b=value`` overrides over it (values are parsed as YAML).

    Raises:
        VlscaleError: the file is missing, not YAML, has an unknown key (the nearest is named) or a value out of range.
    """
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise VlscaleError(f"recipe {path}: {size} bytes, more than {MAX_RECIPE_BYTES}: this is not a recipe")
        raw = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise VlscaleError(f"recipe {path}: cannot be read ({error}); give --recipe FILE.yaml") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-13-45
        raise VlscaleError(f"recipe {path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise VlscaleError(f"recipe {path}: expected a mapping of sections, found {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    """Validate ``raw`` as a recipe; ``origin`` is named in errors.

    Raises:
        VlscaleError: see :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise VlscaleError(f"recipe {origin}: {_first_problem(error)}") from None


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON types, every default filled in (written to the run folder)."""
    return json.loads(recipe.model_dump_json())


def _apply(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise VlscaleError(f"--set {override!r}: expected KEY.KEY=VALUE, for example --set optimizer.lr=1e-4")
    try:
        value = yaml.load(text, RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise VlscaleError(f"--set {override!r}: the value is not valid YAML") from None
    *parents, last = path.split(".")
    node: Any = raw
    for depth, key in enumerate(parents):
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise VlscaleError(f"--set {override!r}: {'.'.join(parents[:depth])} is not a section")
    if isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise VlscaleError(f"--set {override!r}: {'.'.join(parents)} is not a section")


def _first_problem(error: ValidationError) -> str:
    """One line for the first problem: where, what was found, and the nearest known key for an unknown one."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        return f"unknown key {where!r}{nearest(str(problem['loc'][-1]), known)} (known here: {', '.join(known)}){more}"
    if problem["type"] == "literal_error" and isinstance(problem.get("input"), str):
        hint = nearest(problem["input"], re.findall(r"'([^']+)'", problem["msg"]))
        return f"{where.removesuffix('.[key]')}: {problem['msg']}, found {problem['input']!r}{hint}{more}"
    found = problem.get("input")
    shown = "" if isinstance(found, (dict, BaseModel)) or problem["type"] == "missing" else f", found {found!r}"
    prefix = f"{where}: " if where else ""
    return f"{prefix}{problem['msg'].removeprefix('Value error, ')}{shown}{more}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section at ``location`` of the recipe."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = next((kind for kind in (annotation, *get_args(annotation)) if _is_section(kind)), Section)
    return list(section.model_fields)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
