"""What an evaluation starts from: the folder of a run, its two models, and data that fit them."""

from __future__ import annotations

from pathlib import Path

import torch

from vlscale.config import Recipe, load_recipe
from vlscale.data.dataset import Dataset
from vlscale.errors import VlscaleError
from vlscale.models.base import PretrainingModel
from vlscale.models.registry import MODELS


def read_recipe(run: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read the recipe that a run was trained with.

    Args:
        run: folder with ``recipe.yaml``, as training leaves it.
        overrides: ``key.key=value``, laid over the recipe.

    Raises:
        VlscaleError: there is no such folder or recipe, its model is unknown, or it names no validation data.
    """
    if not run.is_dir():
        raise VlscaleError(f"{run}: no such folder; give --run the folder that training wrote")
    path = run / "recipe.yaml"
    if not path.is_file():
        raise VlscaleError(f"{run}: holds no recipe.yaml, so it is no run folder; give --run the folder training wrote")
    recipe = load_recipe(path, overrides)
    if recipe.model.name not in MODELS:
        raise VlscaleError(f"{path}: model.name {recipe.model.name!r} is unknown (known: {[*MODELS]})")
    if not recipe.data.validation:
        raise VlscaleError(f"{path}: data.validation is empty; --set data.validation='[{{name: val, root: FOLDER}}]'")
    return recipe


def load_models(run: Path, recipe: Recipe) -> tuple[PretrainingModel, PretrainingModel]:
    """Return the trained model of a run, and one of the same configuration with fresh weights of the recipe's seed.

    Raises:
        VlscaleError: there is no model, or it is damaged.
    """
    folder = run / "model"
    if not folder.is_dir():
        raise VlscaleError(f"{folder}: no such folder; the run has no model yet: train it to the end first")
    kind = MODELS[recipe.model.name]
    trained = kind.from_pretrained(folder)
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return trained.to(device), kind(trained.config).eval().to(device)


def check_fits(model: PretrainingModel, dataset: Dataset, run: Path) -> None:
    """Compare the model of a run with a dataset of any kind.

    Raises:
        VlscaleError: vocabulary, feature width, classes or types differ.
    """
    config, vocabulary = model.config, dataset.vocabulary
    where = f"dataset {dataset.name} ({dataset.root})"
    cure = "set data.validation to data built as the training data were"
    for what, of_model, of_data in (
        ("vocabulary", config.vocab_size, None if vocabulary is None else vocabulary.size),
        ("feature width", config.feature_dim, dataset.feature_dim),
        ("number of classes", config.num_classes, dataset.num_classes),
    ):
        if of_data is not None and of_model != of_data:
            raise VlscaleError(f"{where}: {what} {of_data}, but the model in {run / 'model'} has {of_model}; {cure}")
    if dataset.num_types > max(config.type_vocab_size, 1):
        raise VlscaleError(
            f"{where}: its segments have {dataset.num_types} types, but the model in {run / 'model'} has "
            f"{config.type_vocab_size}; {cure}"
        )
    known, found = config.vocab_fingerprint, None if vocabulary is None else vocabulary.fingerprint
    if known is not None and found is not None and known != found:
        raise VlscaleError(
            f"{where}: its vocabulary is {found[:12]}, but the model in {run / 'model'} was trained with {known[:12]}; "
            f"import the texts with the tokenizer of the training data"
        )
