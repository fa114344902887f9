"""All metrics of one model on one held-out dataset, and of one run on its held-out datasets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlscale.config import DatasetSection, ObjectivesSection, Recipe, load_recipe
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.remote import CacheSettings
from vlscale.errors import VlscaleError
from vlscale.models.registry import MODELS
from vlscale.models.uniter import UniterForPretraining
from vlscale.objectives.base import PretrainingModel
from vlscale.report.alignment import alignment
from vlscale.report.grounding import masked_regions, masked_words, matching
from vlscale.report.heldout import HeldOut, open_heldout
from vlscale.report.outcome import Outcome, UnmeasurableError
from vlscale.report.pictures import draw_grounding
from vlscale.report.retrieval import retrieval
from vlscale.report.table import Split, show, write_summary

UNSEEN = "val_unseen"
"""Folder of the split whose pictures training never shows."""

_NAMES = {
    "masked words": ("mlm_accuracy", "mlm_accuracy_wrong_image", "grounding"),
    "masked regions": ("mrc_accuracy", "mrfr_relative_error"),
    "matching": ("itm_accuracy",),
    "alignment": ("alignment_accuracy",),
    "retrieval": ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"),
}


@dataclass(frozen=True)
class Measured:
    """What one model does on one dataset.

    Attributes:
        outcomes: metric -> outcome.
        left_out: metric -> why it does not apply.
    """

    outcomes: Mapping[str, Outcome]
    left_out: Mapping[str, str]


def evaluate(
    model: PretrainingModel, heldout: HeldOut, objectives: ObjectivesSection, progress: Progress | None = None
) -> Measured:
    """Measure everything that the dataset allows.

    Args:
        model: in any mode; it is put into evaluation mode and back.
        heldout: the dataset.
        objectives: of the recipe: which tokens the transport plan is taken over, and the background class.
        progress: shows what is going on.

    Raises:
        VlscaleError: a store is damaged, or the model's outputs are not finite.
    """
    background = objectives.mrm.background_class
    measures: dict[str, Callable[[], dict[str, Outcome]]] = {
        "masked words": lambda: masked_words(model, heldout, progress),
        "masked regions": lambda: masked_regions(model, heldout, background, progress),
        "matching": lambda: matching(model, heldout, progress),
        "alignment": lambda: alignment(model, heldout, objectives.wra, progress),
        "retrieval": lambda: retrieval(model, heldout, progress=progress),
    }
    outcomes: dict[str, Outcome] = {}
    left_out: dict[str, str] = {}
    for measure, run in measures.items():
        try:
            found, reason = run(), "the dataset has no classes store"
        except UnmeasurableError as error:
            found, reason = {}, str(error)
        outcomes |= found
        left_out |= {name: reason for name in _NAMES[measure] if name not in found}
    return Measured(outcomes, left_out)


def evaluate_run(run: Path, overrides: tuple[str, ...], console: Console) -> Path:
    """Evaluate the model of a run, print the table, and write ``summary.json`` and ``grounding.png`` into the run.

    Args:
        run: folder with ``recipe.yaml`` and ``model/``, as training leaves it.
        overrides: ``key.key=value``, laid over the run's recipe.
        console: where bars and the table go.

    Returns:
        Path of ``summary.json``.

    Raises:
        VlscaleError: the run, its model or its validation data is missing or damaged, or they do not fit together.
    """
    recipe = _read_recipe(run, overrides)
    if not recipe.data.validation:
        raise VlscaleError(
            f"{run / 'recipe.yaml'}: data.validation is empty; --set data.validation='[{{name: val, root: FOLDER}}]'"
        )
    trained, untrained = load_models(run, recipe)
    splits: dict[str, Split] = {}
    picture = None
    for key, section in _sections(recipe).items():
        cache = CacheSettings.from_section(recipe.data)
        dataset = open_dataset(section.name, section.root, recipe.data.verify, cache)
        _check_fits(trained, dataset, run)
        device = str(next(trained.parameters()).device)
        heldout = open_heldout(dataset, recipe.seed, recipe.data.max_text_tokens, recipe.data.max_regions, device)
        measured = {}
        for name, model in (("trained", trained), ("untrained", untrained)):
            measured[name] = _measure(name, model, heldout, recipe.objectives, console)
        splits[key] = Split(
            dataset=section.name,
            fingerprint=dataset.fingerprint,
            images=len(dataset.images),
            texts=len(heldout.texts),
            trained=measured["trained"].outcomes,
            untrained=measured["untrained"].outcomes,
            left_out=measured["trained"].left_out,
        )
        if key == "metrics":
            picture = draw_grounding(trained, heldout, recipe.objectives.wra, run / "grounding.png")
    summary = write_summary(run / "summary.json", splits, recipe.seed)
    show(splits, recipe.seed, console)
    drawn = f" and {picture}" if picture else " (no picture: no text has spans)"
    console.print(f"written: {summary}{drawn}", highlight=False, soft_wrap=True)
    return summary


def load_models(run: Path, recipe: Recipe) -> tuple[UniterForPretraining, UniterForPretraining]:
    """Return the trained model of a run, and one of the same configuration with fresh weights of the recipe's seed.

    Raises:
        VlscaleError: there is no model, or it is damaged.
    """
    folder = run / "model"
    if not folder.is_dir():
        raise VlscaleError(f"{folder}: no such folder; the run has no model yet: train it to the end first")
    if recipe.model.name not in MODELS:
        raise VlscaleError(f"{run / 'recipe.yaml'}: model.name {recipe.model.name!r} is unknown (known: {[*MODELS]})")
    kind = MODELS[recipe.model.name]
    trained = kind.from_pretrained(folder)
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return trained.to(device), kind(trained.config).eval().to(device)


def _read_recipe(run: Path, overrides: tuple[str, ...]) -> Recipe:
    if not run.is_dir():
        raise VlscaleError(f"{run}: no such folder; give --run the folder that training wrote")
    if not (run / "recipe.yaml").is_file():
        raise VlscaleError(f"{run}: holds no recipe.yaml, so it is no run folder; give --run the folder training wrote")
    return load_recipe(run / "recipe.yaml", overrides)


def _sections(recipe: Recipe) -> dict[str, DatasetSection]:
    """The first validation dataset; and the unseen pictures, as listed in the recipe or found beside it."""
    main, *others = recipe.data.validation
    if isinstance(main.root, str):  # nobody can look around at a remote
        return {"metrics": main}
    beside = DatasetSection(name=UNSEEN, root=main.root.parent / UNSEEN)
    unseen = next((section for section in others if Path(section.root).name == UNSEEN), beside)
    has_unseen = unseen is not beside or (main.root.name != UNSEEN and (main.root.parent / UNSEEN / "texts").is_dir())
    return {"metrics": main, "unseen_pictures": unseen} if has_unseen else {"metrics": main}


def _check_fits(model: UniterForPretraining, dataset: Dataset, run: Path) -> None:
    config = model.config
    for what, of_model, of_data in (
        ("vocabulary", config.vocab_size, dataset.vocabulary.size),
        ("feature width", config.feature_dim, dataset.feature_dim),
        ("number of classes", config.num_classes, dataset.num_classes),
    ):
        if of_data is not None and of_model != of_data:
            raise VlscaleError(
                f"dataset {dataset.name} ({dataset.root}): {what} {of_data}, but the model in {run / 'model'} has "
                f"{of_model}; set data.validation to data built as the training data were"
            )
    if dataset.num_types > config.type_vocab_size:
        raise VlscaleError(
            f"dataset {dataset.name} ({dataset.root}): its segments have {dataset.num_types} types, but the model in "
            f"{run / 'model'} has {config.type_vocab_size}; set data.validation to data built as the training data were"
        )
    known, found = config.vocab_fingerprint, dataset.vocabulary.fingerprint
    if known is not None and known != found:
        raise VlscaleError(
            f"dataset {dataset.name} ({dataset.root}): its vocabulary is {found[:12]}, but the model in "
            f"{run / 'model'} was trained with {known[:12]}; import the texts with the tokenizer of the training data"
        )


def _measure(
    name: str, model: PretrainingModel, heldout: HeldOut, objectives: ObjectivesSection, console: Console
) -> Measured:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        measured = evaluate(model, heldout, objectives, progress)
    seconds = time.perf_counter() - began
    console.print(f"{name} model on {heldout.dataset.name}: {seconds:.0f} s", highlight=False)
    return measured
