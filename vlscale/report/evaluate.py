"""All metrics of one model on one held-out dataset, and of one run on its held-out datasets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlscale.config import DatasetSection, ObjectivesSection, Recipe
from vlscale.data.dataset import open_dataset
from vlscale.data.remote import CacheSettings
from vlscale.models.unimo import UnimoForPretraining
from vlscale.models.uniter import UniterForPretraining
from vlscale.objectives.base import PretrainingModel
from vlscale.report.alignment import alignment
from vlscale.report.grounding import masked_regions, masked_words, matching
from vlscale.report.heldout import HeldOut, open_heldout
from vlscale.report.outcome import Outcome, UnmeasurableError
from vlscale.report.pictures import draw_grounding
from vlscale.report.retrieval import retrieval
from vlscale.report.runs import check_fits, load_models, read_recipe
from vlscale.report.table import Split, show, write_summary
from vlscale.report.unimo_evaluate import evaluate_unimo_run

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
    """Evaluate the model of a run: print the table, and write ``summary.json`` and a picture into the run.

    Args:
        run: folder with ``recipe.yaml`` and ``model/``, as training leaves it.
        overrides: ``key.key=value``, laid over the run's recipe.
        console: where bars and the table go.

    Returns:
        Path of ``summary.json``.

    Raises:
        VlscaleError: the run, its model or its validation data is missing or damaged, or they do not fit together.
    """
    recipe = read_recipe(run, overrides)
    trained, untrained = load_models(run, recipe)
    if isinstance(trained, UnimoForPretraining) and isinstance(untrained, UnimoForPretraining):
        return evaluate_unimo_run(run, recipe, trained, untrained, console)
    assert isinstance(trained, UniterForPretraining)
    assert isinstance(untrained, UniterForPretraining)
    return _evaluate_uniter_run(run, recipe, trained, untrained, console)


def _evaluate_uniter_run(
    run: Path, recipe: Recipe, trained: UniterForPretraining, untrained: UniterForPretraining, console: Console
) -> Path:
    splits: dict[str, Split] = {}
    picture = None
    for key, section in _sections(recipe).items():
        cache = CacheSettings.from_section(recipe.data)
        dataset = open_dataset(section.name, section.root, recipe.data.verify, cache)
        check_fits(trained, dataset, run)
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


def _sections(recipe: Recipe) -> dict[str, DatasetSection]:
    """The first validation dataset; and the unseen pictures, as listed in the recipe or found beside it."""
    main, *others = recipe.data.validation
    if isinstance(main.root, str):  # nobody can look around at a remote
        return {"metrics": main}
    beside = DatasetSection(name=UNSEEN, root=main.root.parent / UNSEEN)
    unseen = next((section for section in others if Path(section.root).name == UNSEEN), beside)
    has_unseen = unseen is not beside or (main.root.name != UNSEEN and (main.root.parent / UNSEEN / "texts").is_dir())
    return {"metrics": main, "unseen_pictures": unseen} if has_unseen else {"metrics": main}


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
