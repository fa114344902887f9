"""Companions and lists that do not belong: of other texts, of no known collection, or holding the original."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.data.unified_data import toy_images, toy_pairs, toy_texts, write_all, write_retrieved, write_texts
from vlscale.cli import main
from vlscale.data.dataset import open_dataset
from vlscale.data.expansion import own_candidates
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.verification import verify
from vlscale.data.views import UNIFIED, ViewSettings
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("unified"))


@pytest.fixture(scope="module")
def bad(folders, tmp_path_factory):
    """Pairs whose every list holds the original and nothing else."""
    root = tmp_path_factory.mktemp("bad") / "pairs"
    shutil.copytree(folders["pairs"], root)
    shutil.rmtree(root / "retrieved")
    write_retrieved(root, root, root, original=True)
    return root


@pytest.mark.parametrize(("views", "kind"), [({"texts": 0}, "images"), ({"images": 0}, "texts")])
def test_a_list_that_holds_the_original_is_refused(bad, views, kind):
    settings = PlanSettings(seed=3, global_batch_tokens=1500, views=ViewSettings(**views))
    plan = Plan([(open_dataset("pairs", bad).lengths, {UNIFIED: 1.0})], settings)
    with pytest.raises(VlscaleError, match=rf"retrieved: row \d+: {kind} name row \d+, which is the original"):
        plan.step(plan.start())


def test_verification_finds_every_list_that_holds_the_original(bad, folders, capsys):
    texts = len(open_dataset("pairs", bad))
    assert not verify(bad).found
    report = verify(bad, rows=True)
    assert report.found == 2 * texts
    for kind in ("images", "texts"):
        told = [problem for problem in report.problems if f": {kind} name row" in problem]
        assert [problem.split(": row ")[1].split(":")[0] for problem in told] == [str(row) for row in range(texts)]
        assert all("which is the original; remove the folder and run" in problem for problem in told)
    assert main(["inspect", str(bad), "--verify", "rows"]) != 0
    assert "which is the original" in "".join(capsys.readouterr())
    assert not verify(folders["pairs"], rows=True).found  # lists of other datasets' rows


def test_a_texts_own_are_its_images_itself_and_the_other_texts_of_its_image():
    pairs = toy_pairs(toy_images(), toy_texts(), without_image=3)
    rng = np.random.default_rng(0)
    texts, images, others = (rng.integers(0, size, 3000) for size in (len(pairs), len(pairs.regions), len(pairs)))
    own = {
        "images": own_candidates(pairs, "images", texts, images),
        "texts": own_candidates(pairs, "texts", texts, others),
    }
    for place, (text, image, other) in enumerate(zip(texts.tolist(), images.tolist(), others.tolist(), strict=True)):
        refs, theirs = (pairs.image_refs[pairs.image_ptr[row] : pairs.image_ptr[row + 1]] for row in (text, other))
        assert own["images"][place] == (image in refs)
        assert own["texts"][place] == (text == other or (len(refs) > 0 and refs[0] in theirs))
    assert own["images"].any()
    assert (own["texts"] & (texts != others)).any()


def test_a_collection_that_no_dataset_of_the_recipe_has_is_named_with_its_cure(folders, tmp_path):
    root = tmp_path / "pairs"
    shutil.copytree(folders["pairs"], root)
    shutil.rmtree(root / "retrieved")
    write_retrieved(root, folders["images"], folders["texts"])
    with pytest.raises(
        VlscaleError, match=r"that no dataset of the recipe has; add that dataset .* with a positive share"
    ):
        Plan([(open_dataset("pairs", root).lengths, {UNIFIED: 1.0})], PlanSettings(seed=3, global_batch_tokens=1500))


def test_companions_of_other_texts_are_refused(folders, tmp_path):
    root = write_texts(tmp_path / "texts", count=20)
    shutil.copytree(folders["texts"] / "units", root / "units")
    with pytest.raises(VlscaleError, match=r"units: 30 rows .* has 20 of"):
        open_dataset("texts", root)
