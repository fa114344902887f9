"""From a recipe to what is trained: datasets that fit together, and a model with its objectives inside an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch
from torch import nn

from vlscale.config import DataSection, DatasetSection, Recipe
from vlscale.convert.initial import read_initial
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.remote import CacheSettings
from vlscale.errors import VlscaleError
from vlscale.models.registry import build_model
from vlscale.models.uniter import UniterForPretraining
from vlscale.objectives import Objective, Term
from vlscale.ragged import RaggedBatch
from vlscale.train.engine import Engine, construction, is_partitioned, load_weights, share_parameters
from vlscale.train.optim import build_optimizer, build_param_groups
from vlscale.train.processes import Processes


class DataFacts(TypedDict):
    """What a model has to know of the datasets that it reads; see :func:`vlscale.models.registry.resolve_config`."""

    vocab_size: int
    feature_dim: int
    num_classes: int | None
    vocab_fingerprint: str
    num_types: int


class PretrainingModule(nn.Module):
    """A model with its objectives: one forward per micro-batch, so that DeepSpeed's hooks see all of it."""

    def __init__(self, model: UniterForPretraining, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives = dict(objectives)

    def forward(self, task: str, batch: RaggedBatch) -> dict[str, Term]:
        """Return the named terms of ``task`` on ``batch``."""
        return self.objectives[task].terms(self.model, batch)


def open_datasets(sections: Iterable[DatasetSection], data: DataSection) -> dict[str, Dataset]:
    """Open datasets by name; ``data`` says how they are read.

    Raises:
        VlscaleError: a store is missing or damaged, or a remote does not answer.
    """
    cache = CacheSettings.from_section(data)
    return {section.name: open_dataset(section.name, section.root, data.verify, cache) for section in sections}


def data_facts(datasets: Iterable[Dataset]) -> DataFacts:
    """Return what a model has to know of the datasets that it reads; they have to agree on it.

    Raises:
        VlscaleError: vocabularies, feature widths or class counts differ; both datasets are named.
    """
    first, *others = datasets
    types = max(dataset.num_types for dataset in (first, *others))
    classes = first.num_classes
    for other in others:
        pairs: list[tuple[str, Any, Any]] = [
            ("vocabulary", first.vocabulary.fingerprint[:12], other.vocabulary.fingerprint[:12]),
            ("feature width", first.feature_dim, other.feature_dim),
        ]
        if classes is None:
            classes = other.num_classes
        elif other.num_classes is not None:
            pairs.append(("number of classes", classes, other.num_classes))
        for what, one, two in pairs:
            if one != two:
                raise VlscaleError(
                    f"datasets {first.root} and {other.root} do not go together: {what} {one} against {two}; build "
                    f"them with the same tokenizer and features"
                )
    return {
        "vocab_size": first.vocabulary.size,
        "feature_dim": first.feature_dim,
        "num_classes": classes,
        "vocab_fingerprint": first.vocabulary.fingerprint,
        "num_types": types,
    }


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

    def seeded_model() -> UniterForPretraining:
        torch.manual_seed(recipe.seed)
        return build_model(recipe.model, max_text_tokens=recipe.data.max_text_tokens, **facts)

    with processes.agreed(), construction(config):
        _check_background(recipe.objectives.mrm.background_class, facts["num_classes"])
        model = seeded_model()
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


def _check_background(background_class: int | None, num_classes: int | None) -> None:
    if background_class is not None and num_classes is not None and background_class >= num_classes:
        raise VlscaleError(
            f"objectives.mrm.background_class is {background_class}, but the classes stores have classes 0 to "
            f"{num_classes - 1}; set it to one of them, or to null if there is no background"
        )


def inner_model(engine: Engine) -> UniterForPretraining:
    """Return the model inside an engine built by :func:`build_engine`."""
    return engine.module.model  # type: ignore[return-value]
