"""Scenes: the plan is the truth, the pixels follow it, and the splits ask different questions."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.demo_corpus import Options, plan_splits
from data_tools.pictures import load_catalogue
from data_tools.scenes import HEIGHT, WIDTH, combinations, iou, overlap, plan_scenes, render
from vlscale.errors import VlscaleError

CATALOGUE = load_catalogue(32)


@pytest.fixture(scope="module")
def scenes():
    return plan_scenes(CATALOGUE, "train", 200, seed=3)


def test_plans_are_a_function_of_the_seed(scenes) -> None:
    assert plan_scenes(CATALOGUE, "train", 200, seed=3) == scenes
    assert plan_scenes(CATALOGUE, "train", 200, seed=4) != scenes
    # A longer run begins with the same scenes.
    assert plan_scenes(CATALOGUE, "train", 210, seed=3)[:200] == scenes


def test_objects_lie_inside_and_apart(scenes) -> None:
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4}
    for scene in scenes:
        assert len({placed.noun for placed in scene.objects}) == len(scene.objects)
        for i, placed in enumerate(scene.objects):
            x1, y1, x2, y2 = placed.box
            assert 0 <= x1 < x2 <= WIDTH
            assert 0 <= y1 < y2 <= HEIGHT
            assert 74 <= max(x2 - x1, y2 - y1) <= 131
            for other in scene.objects[:i]:
                smaller = min((x2 - x1) * (y2 - y1), overlap(other.box, other.box))
                assert overlap(placed.box, other.box) <= 0.05 * smaller + 1e-9


def test_regions_are_jittered_objects_and_distractors_in_no_order(scenes) -> None:
    places = []
    for scene in scenes:
        assert len(scene.regions) == 6
        found = [region.object for region in scene.regions if region.object is not None]
        assert sorted(found) == list(range(len(scene.objects)))
        places.append(next(i for i, region in enumerate(scene.regions) if region.object == 0))
        for region in scene.regions:
            x1, y1, x2, y2 = region.box
            assert 0 <= x1 < x2 <= WIDTH
            assert 0 <= y1 < y2 <= HEIGHT
            ious = [iou(region.box, placed.box) for placed in scene.objects]
            if region.object is None:
                assert max(ious) < 0.4
            else:
                assert 0.6 < ious[region.object] < 1
    assert np.bincount(places, minlength=6).min() > 10


def test_more_regions_are_more_distractors() -> None:
    (scene,) = plan_scenes(CATALOGUE, "train", 1, seed=0, regions=11)
    assert len(scene.regions) == 11
    with pytest.raises(VlscaleError, match="--regions 5"):
        plan_scenes(CATALOGUE, "train", 1, seed=0, regions=5)


def test_half_of_the_backgrounds_are_photographs(scenes) -> None:
    assert 70 < sum(scene.photo is not None for scene in scenes) < 130


def test_splits_show_what_they_say() -> None:
    planned = plan_splits(Options(scenes=300, val=60, val_unseen=20, val_new_things=20), CATALOGUE)
    assert list(planned) == ["train", "val", "val_unseen", "val_new_things"]
    used = {split: {p.picture.id for s in scenes for p in s.objects} for split, scenes in planned.items()}
    nouns = {split: {p.noun for s in scenes for p in s.objects} for split, scenes in planned.items()}
    assert used["val"] <= {picture.id for thing in CATALOGUE.known for picture in thing.seen}
    assert not used["train"] & used["val_unseen"]
    assert nouns["val_unseen"] <= nouns["train"]
    assert not nouns["val_new_things"] & nouns["train"]
    for split in ("val", "val_unseen", "val_new_things"):
        assert not combinations(planned[split]) & combinations(planned["train"])
        assert len(combinations(planned[split])) == len(planned[split])


def test_more_scenes_than_combinations_is_one_clear_error() -> None:
    with pytest.raises(VlscaleError, match="fewer scenes"):
        plan_scenes(load_catalogue(5), "val", 100, seed=0)


def test_pixels_follow_the_plan(scenes) -> None:
    plain = next(scene for scene in scenes if scene.photo is None)
    pixels = np.asarray(render(plain))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(pixels, np.asarray(render(plain)))
    painted = (pixels != np.array(plain.color)).any(-1)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    for placed in plain.objects:
        x1, y1, x2, y2 = (int(side) for side in placed.box)
        inside[y1:y2, x1:x2] = True
        assert painted[y1:y2, x1:x2].mean() > 0.15
    assert not painted[~inside].any()


def test_photographs_are_paled(scenes) -> None:
    photo = next(scene for scene in scenes if scene.photo is not None)
    assert np.asarray(render(photo)).shape == (HEIGHT, WIDTH, 3)
    empty = type(photo)(photo.id, (), (), photo.color, photo.photo)
    assert np.asarray(render(empty)).min() >= round(0.4 * 255) - 1
