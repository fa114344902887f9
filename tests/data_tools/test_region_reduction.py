"""Standardisation and reduction of region features."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.region_reduction import fit_reduction, nearest_centroid
from vlscale.errors import VlscaleError

RNG = np.random.default_rng(0)
FEATURES = (RNG.normal(size=(40, 6, 20)) @ RNG.normal(size=(20, 20)) + 3).astype(np.float32)
PROBS = RNG.dirichlet(np.linspace(0.1, 2, 10), size=(40, 6)).astype(np.float16)
NAMES = [f"class {i}" for i in range(10)]


def test_standardised_with_training_statistics() -> None:
    reduction = fit_reduction(FEATURES, PROBS, NAMES)
    stored = reduction.features(FEATURES)
    assert stored.dtype == np.float16
    flat = stored.reshape(-1, 20).astype(np.float64)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(flat.std(0), 1, atol=1e-3)
    mean, std = reduction.statistics
    np.testing.assert_allclose(stored.astype(np.float32) * std + mean, FEATURES, atol=0.02)
    assert reduction.probs(PROBS) is PROBS
    assert reduction.class_names == NAMES


def test_a_dimension_that_never_fires_is_not_blown_up() -> None:
    features = FEATURES.copy()
    features[..., 3] = 0
    reduction = fit_reduction(features, PROBS, NAMES)
    features[0, 0, 3] = 0.5
    assert np.isfinite(reduction.features(features)).all()


def test_principal_components_are_uncorrelated_and_the_largest() -> None:
    reduction = fit_reduction(FEATURES, PROBS, NAMES, feature_dim=5)
    stored = reduction.features(FEATURES).reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(np.corrcoef(stored.T), np.eye(5), atol=0.01)
    assert (np.diff(reduction.std) < 0).all()
    total = FEATURES.reshape(-1, 20).var(0).sum()
    best = np.sort(np.linalg.eigvalsh(np.cov(FEATURES.reshape(-1, 20).T, bias=True)))[-5:].sum()
    np.testing.assert_allclose((reduction.std**2).sum() / total, best / total, rtol=1e-3)


def test_rare_classes_are_summed_into_other() -> None:
    reduction = fit_reduction(FEATURES, PROBS, NAMES, classes=4)
    stored = reduction.probs(PROBS)
    assert stored.shape == (40, 6, 4)
    assert reduction.class_names == ["class 7", "class 8", "class 9", "other"]
    np.testing.assert_array_equal(stored[..., :3], PROBS[..., 7:])
    np.testing.assert_allclose(stored.astype(np.float32).sum(-1), 1, atol=2e-3)


@pytest.mark.parametrize(("dim", "classes"), [(21, 0), (-1, 0), (0, 1), (0, 11)])
def test_impossible_reductions_are_refused(dim, classes) -> None:
    with pytest.raises(VlscaleError, match="cannot reduce"):
        fit_reduction(FEATURES, PROBS, NAMES, dim, classes)


def test_nearest_centroid_counts_known_objects_only() -> None:
    centroids: dict[str, np.ndarray] = {}
    training = np.array([[[0.0], [1.0], [9.0]], [[0.2], [1.2], [8.0]]], np.float16)
    things = [["cat", "dog", None], ["cat", "dog", None]]
    assert nearest_centroid(training, things, centroids) == 1.0
    assert set(centroids) == {"cat", "dog"}
    other = np.array([[[0.1], [0.3], [1.0]]], np.float16)
    assert nearest_centroid(other, [["cat", "dog", "emu"]], centroids) == 0.5
    assert np.isnan(nearest_centroid(other, [["emu", None, None]], centroids))
