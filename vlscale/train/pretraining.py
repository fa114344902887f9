"""From a recipe to what is trained: datasets that fit together, and a model with its objectives inside an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from vlscale.config import DataSection, DatasetSection, ObjectivesSection, Recipe
from vlscale.convert.initial import read_initial
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.remote import CacheSettings
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError
from vlscale.models.base import PretrainingModel
from vlscale.models.registry import build_model
from vlscale.objectives import Objective, Term
from vlscale.ragged import RaggedBatch
from vlscale.train.engine import Engine, construction, is_partitioned, load_weights, share_parameters
from vlscale.train.optim import build_optimizer, build_param_groups
from vlscale.train.processes import Processes


class DataFacts(TypedDict):
    """What a model has to know of the datasets that it reads; see :func:`vlscale.models.registry.resolve_config`.

    None: no dataset has texts, images or classes.
    """

    vocab_size: int | None
    feature_dim: int | None
    num_classes: int | None
    vocab_fingerprint: str | None
    num_types: int


class PretrainingModule(nn.Module):
    """A model with its objectives: one forward per micro-batch, so that DeepSpeed's hooks see all of it."""

    def __init__(self, model: PretrainingModel, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = dict(objectives)

    def forward(self, task: str, batch: RaggedBatch, represent: bool = False) -> dict[str, Term] | Tensor:
        """Return the named terms of ``task`` on ``batch``, or what its window is to know of it.

        Raises:
            VlscaleError: the task has no window.
        """
        objective = self.objectives[task]
        model: Any = self.model  # has the heads that the objectives ask for: a recipe's tasks are its model's
        return objective.represent(model, batch) if represent else objective.terms(model, batch)


def open_datasets(sections: Sequence[DatasetSection], data: DataSection) -> dict[str, Dataset]:
    """Open datasets by name; ``data`` says how they are read.

    Raises:
        VlscaleError: a store is missing or damaged, holds another kind of data than the recipe says, or a remote does
            not answer.
    """
    cache = CacheSettings.from_section(data)
    opened = {section.name: open_dataset(section.name, section.root, data.verify, cache) for section in sections}
    for section in sections:
        found = opened[section.name].kind
        if section.kind not in (None, found):
            raise VlscaleError(
                f"dataset {section.name}: {section.root} holds {found}, the recipe says kind: {section.kind}; give "
                f"another folder, or drop kind"
            )
    return opened


def data_facts(datasets: Iterable[Dataset]) -> DataFacts:
    """Return what a model has to know of the datasets that it reads; they have to agree on it.

    Texts alone have no feature width, images alone no vocabulary.

    Raises:
        VlscaleError: vocabularies, feature widths or class counts differ; two datasets are named that do.
    """
    opened = [*datasets]
    known = [(dataset, dataset.vocabulary) for dataset in opened]
    _agree("vocabulary", [(dataset, found and found.fingerprint[:12]) for dataset, found in known])
    vocabulary = next((found for _, found in known if found is not None), None)
    return {
        "vocab_size": None if vocabulary is None else vocabulary.size,
        "feature_dim": _agree("feature width", [(dataset, dataset.feature_dim) for dataset in opened]),
        "num_classes": _agree("number of classes", [(dataset, dataset.num_classes) for dataset in opened]),
        "vocab_fingerprint": None if vocabulary is None else vocabulary.fingerprint,
        "num_types": max(dataset.num_types for dataset in opened),
    }


def vocabulary_of(datasets: Iterable[Dataset]) -> Vocabulary:
    """Return the vocabulary that the texts have; see :func:`data_facts`.

    Raises:
        VlscaleError: no dataset has texts.
    """
    found = next((dataset.vocabulary for dataset in datasets if dataset.vocabulary is not None), None)
    if found is None:
        raise VlscaleError(
            "data.datasets: none has texts, so there is no vocabulary; add a dataset with a texts/ store"
        )
    return found


def _agree(what: str, values: Iterable[tuple[Dataset, Any]]) -> Any:
    """The value that all datasets have that have one; None: none has."""
    known = [(dataset, value) for dataset, value in values if value is not None]
    for other, value in known:
        first, expected = known[0]
        if value != expected:
            raise VlscaleError(
                f"datasets {first.root} and {other.root} do not go together: {what} {expected} against {value}; build "
                f"them with the same tokenizer and features"
            )
    return known[0][1] if known else None


def build_engine(
    processes: Processes,
    recipe: Recipe,
    objectives: Mapping[str, Objective],
    facts: DataFacts,
    config: dict[str, Any],
) -> tuple[Engine, str]:
    """Build the model with its initial weights, and the engine around it.

    Args:
        processes: the processes of this run.
        recipe: model, optimiser and activation checkpointing are read.
        objectives: task -> objective.
        facts: see :func:`data_facts`.
        config: resolved DeepSpeed configuration.

    Returns:
        The engine, and one line about the initial weights.

    Raises:
        VlscaleError: the model's configuration, the data and ``model.init_from`` do not go together.
    """

    def seeded_model() -> PretrainingModel:
        torch.manual_seed(recipe.seed)
        return build_model(recipe.model, max_text_tokens=recipe.data.max_text_tokens, **facts)

    with processes.agreed(), construction(config):
        check_background(recipe.objectives, facts["num_classes"])
        model = seeded_model()
        for objective in objectives.values():
            objective.check_model(model.config)
    if is_partitioned(model):
        # These were drawn in half precision or on a GPU: start from what the other stages start from.
        load_weights(model, dict(seeded_model().named_parameters()))
    started = f"random weights, seed {recipe.seed}"
    if recipe.model.init_from is not None:
        with processes.agreed():
            state, report = read_initial(recipe.model.init_from, model.config, recipe.model.init_tables)
        load_weights(model, state)
        started = str(report)
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    share_parameters(model.external_parameters())

    def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        groups = build_param_groups(module, recipe.optimizer.decay_groups)
        return build_optimizer(groups, recipe.optimizer, fused=processes.device.type == "cuda")

    module = PretrainingModule(model, objectives)
    return Engine(processes, module, make_optimizer, config, recipe.tasks), started


def check_background(objectives: ObjectivesSection, num_classes: int | None) -> None:
    """Look whether a background class is one of the classes; None: there are no classes.

    Raises:
        VlscaleError: it is not.
    """
    for key, found in (
        ("mrm", objectives.mrm.background_class),
        ("unified.visual", objectives.unified.visual.background_class),
    ):
        if found is not None and num_classes is not None and found >= num_classes:
            raise VlscaleError(
                f"objectives.{key}.background_class is {found}, but the classes stores have classes 0 to "
                f"{num_classes - 1}; set it to one of them, or to null if there is no background"
            )


def inner_model(engine: Engine) -> PretrainingModel:
    """Return the model inside an engine built by :func:`build_engine`."""
    return engine.module.model  # type: ignore[return-value]
