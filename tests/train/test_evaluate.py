"""What evaluation refuses when it is made, before a step is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.unified_data import write_all
from vlscale.config import Recipe, parse_recipe
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.errors import VlscaleError
from vlscale.objectives import build_objectives
from vlscale.train.evaluate import Evaluation


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("unified"))


def recipe_of(folders: dict[str, Path], task: str, ceiling: int, held_out: list[str], **unified: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "made",
            "model": {"name": "unimo" if task == "unified" else "uniter"},
            "data": {
                "datasets": [{"name": "train", "root": str(folders["pairs"]), "mix": {task: 1}}],
                "validation": [{"name": name, "root": str(folders[name])} for name in held_out],
            },
            "batch": {"global_batch_tokens": 4000, "micro_batch_tokens": ceiling},
            "objectives": {"unified": unified} if unified else {},
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 1, "total_steps": 10},
        },
        "made",
    )


def evaluation_of(recipe: Recipe, datasets: dict[str, Dataset]) -> Evaluation:
    vocabulary = datasets["pairs"].vocabulary
    assert vocabulary is not None
    return Evaluation(recipe, datasets, build_objectives(recipe.objectives, recipe.tasks, vocabulary))


def opened(folders: dict[str, Path]) -> dict[str, Dataset]:
    return {name: open_dataset(name, folder) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("task", "ceiling", "message"),
    [
        (
            "unified",
            60,
            r"micro_batch_tokens 60 is smaller than one unit with all its views of dataset pairs \(text row",
        ),
        ("mlm", 10, r"micro_batch_tokens 10 is smaller than one example of dataset pairs: \d+ tokens; raise"),
    ],
)
def test_a_validation_set_that_never_fits_is_refused_at_the_start(
    folders: dict[str, Path], task: str, ceiling: int, message: str
) -> None:
    datasets = opened(folders)
    assert evaluation_of(recipe_of(folders, task, 700, ["pairs"]), datasets)
    with pytest.raises(VlscaleError, match=message):
        evaluation_of(recipe_of(folders, task, ceiling, ["pairs"]), datasets)


def test_classes_are_asked_of_sets_whose_regions_are_masked(folders: dict[str, Path]) -> None:
    datasets = opened(folders)
    del datasets["pairs"].stores["classes"]
    with pytest.raises(VlscaleError, match=r"data\.validation pairs: task unified needs a classes/ store"):
        evaluation_of(recipe_of(folders, "unified", 700, ["pairs"]), datasets)
    assert evaluation_of(
        recipe_of(folders, "unified", 700, ["pairs", "images", "texts"], pair_visual_share=0), datasets
    )
    del datasets["images"].stores["classes"]
    with pytest.raises(VlscaleError, match=r"data\.validation images: task unified needs a classes/ store"):
        evaluation_of(recipe_of(folders, "unified", 700, ["pairs", "images"], pair_visual_share=0), datasets)
