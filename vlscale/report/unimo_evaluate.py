"""All questions to a UNIMO, trained and untrained, about held-out pairs and texts, and what a person sees of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vlscale.config import Recipe
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.remote import CacheSettings
from vlscale.errors import VlscaleError
from vlscale.models.unimo import UnimoForPretraining
from vlscale.report.heldout import HeldOut, open_heldout
from vlscale.report.outcome import Outcome, UnmeasurableError
from vlscale.report.runs import check_fits
from vlscale.report.unimo_batches import device_of
from vlscale.report.unimo_captions import Captions, caption_images, judge
from vlscale.report.unimo_pictures import draw_captions
from vlscale.report.unimo_retrieval import retrieve_alone
from vlscale.report.unimo_table import Both, show, write_summary
from vlscale.report.unimo_words import masked_pieces

_NAMES = {
    "retrieval": ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"),
    "captions": ("caption_bleu4", "caption_cider", "caption_precision", "caption_recall"),
    "texts": ("text_accuracy",),
}


@dataclass(frozen=True)
class UnimoHeldOut:
    """What a UNIMO is asked about.

    Attributes:
        pairs: scenes with captions, or None.
        texts: a dataset of texts, or None.
    """

    pairs: HeldOut | None
    texts: Dataset | None


@dataclass(frozen=True)
class UnimoMeasured:
    """What one model does.

    Attributes:
        outcomes: metric -> outcome.
        left_out: metric -> why it does not apply.
        captions: what it says of the images, if there are any.
    """

    outcomes: Mapping[str, Outcome]
    left_out: Mapping[str, str]
    captions: Captions | None


def open_unimo_heldout(recipe: Recipe, model: UnimoForPretraining, run: Path) -> UnimoHeldOut:
    """Open the first pairs and the first texts of ``data.validation``.

    Raises:
        VlscaleError: a dataset is missing or damaged, does not fit the model, or there are neither pairs nor texts.
    """
    opened: dict[str, Dataset] = {}
    for section in recipe.data.validation:
        dataset = open_dataset(section.name, section.root, recipe.data.verify, CacheSettings.from_section(recipe.data))
        check_fits(model, dataset, run)
        opened.setdefault(dataset.kind, dataset)
    if not {"pairs", "texts"} & set(opened):
        raise VlscaleError(
            f"{run / 'recipe.yaml'}: data.validation has neither images with captions nor texts, so nothing can be "
            "asked; add such a dataset"
        )
    pairs = None
    if "pairs" in opened:
        limits = recipe.data.max_text_tokens, recipe.data.max_regions
        pairs = open_heldout(opened["pairs"], recipe.seed, *limits, str(device_of(model)))
    return UnimoHeldOut(pairs, opened.get("texts"))


def evaluate_unimo(model: UnimoForPretraining, heldout: UnimoHeldOut, recipe: Recipe) -> UnimoMeasured:
    """Measure everything that the data allow.

    Raises:
        VlscaleError: a store is damaged, or the model's outputs are not finite.
    """
    said: list[Captions] = []
    outcomes: dict[str, Outcome] = {}
    left_out: dict[str, str] = {}
    for measure, run in _measures(model, heldout, recipe, said).items():
        try:
            found, reason = run(), "nothing of its kind is recorded"
        except UnmeasurableError as error:
            found, reason = {}, str(error)
        outcomes |= found
        left_out |= {name: reason for name in _NAMES[measure] if name not in found}
    return UnimoMeasured(outcomes, left_out, said[0] if said else None)


def _measures(
    model: UnimoForPretraining, heldout: UnimoHeldOut, recipe: Recipe, said: list[Captions]
) -> Mapping[str, Callable[[], dict[str, Outcome]]]:
    """The questions; what is generated goes into ``said``."""

    def pairs() -> HeldOut:
        if heldout.pairs is None:
            raise UnmeasurableError("no validation dataset has images with captions")
        return heldout.pairs

    def captions() -> dict[str, Outcome]:
        said.append(caption_images(model, pairs()))
        return judge(said[0], pairs())

    def texts() -> dict[str, Outcome]:
        if heldout.texts is None:
            raise UnmeasurableError("no validation dataset has texts alone")
        return masked_pieces(model, heldout.texts, recipe.seed, recipe.data.max_text_tokens)

    similarity = recipe.objectives.unified.contrast.similarity
    return {
        "retrieval": lambda: retrieve_alone(model, pairs(), similarity),
        "captions": captions,
        "texts": texts,
    }


def evaluate_unimo_run(
    run: Path, recipe: Recipe, trained: UnimoForPretraining, untrained: UnimoForPretraining, console: Console
) -> Path:
    """Evaluate both models of a run; write ``summary.json`` and ``captions.png`` into it and print the table.

    Args:
        run: the run's folder.
        recipe: its recipe.
        trained: its model.
        untrained: one of the same configuration, with fresh weights of the recipe's seed.
        console: where the table goes.

    Returns:
        Path of ``summary.json``.

    Raises:
        VlscaleError: validation data are missing or damaged, or do not fit the model.
    """
    heldout = open_unimo_heldout(recipe, trained, run)
    measured = {}
    for name, model in (("trained", trained), ("untrained", untrained)):
        began = time.perf_counter()
        measured[name] = evaluate_unimo(model, heldout, recipe)
        console.print(f"{name} model: {time.perf_counter() - began:.0f} s", highlight=False)
    both = Both(
        trained=measured["trained"].outcomes,
        untrained=measured["untrained"].outcomes,
        left_out=measured["trained"].left_out,
        datasets=_described(heldout),
    )
    summary = write_summary(run / "summary.json", both, recipe.seed)
    show(both, recipe.seed, console)
    picture = None
    if heldout.pairs is not None and measured["trained"].captions is not None:
        picture = draw_captions(heldout.pairs, measured["trained"].captions, run / "captions.png")
    drawn = f" and {picture}" if picture else " (no picture: no image has a caption)"
    console.print(f"written: {summary}{drawn}", highlight=False, soft_wrap=True)
    return summary


def _described(heldout: UnimoHeldOut) -> dict[str, dict[str, str | int]]:
    found: dict[str, dict[str, str | int]] = {}
    for kind, dataset in (("pairs", heldout.pairs.dataset if heldout.pairs else None), ("texts", heldout.texts)):
        if dataset is not None:
            images = len(dataset.images) if kind == "pairs" else 0
            sizes: dict[str, str | int] = {"images": images, "texts": len(dataset.texts)}
            found[kind] = {"name": dataset.name, "fingerprint": dataset.fingerprint, **sizes}
    return found
