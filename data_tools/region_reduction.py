"""What happens to raw region features before they are stored: statistics of the training split, applied to all.

By default each dimension is standardised. For a small fixture the features are first projected on the leading principal
components of the training regions, and all but the likeliest classes are summed into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.errors import VlscaleError

_SMALLEST_STD = 1e-2
"""Dimensions that hardly ever fire in training are not blown up."""


@dataclass(frozen=True)
class Reduction:
    """Fitted on the training split.

    Attributes:
        mean: float32 [D], of the (projected) training regions.
        std: float32 [D].
        center: float32 [1280] subtracted before projecting, or None without a projection.
        basis: float32 [1280, D], or None.
        kept: int64 [C - 1] classes that keep their own probability, or None for all.
        class_names: names of the stored classes.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    center: NDArray[np.float32] | None
    basis: NDArray[np.float32] | None
    kept: NDArray[np.int64] | None
    class_names: list[str]

    @property
    def statistics(self) -> NDArray[np.float32]:
        """Mean and standard deviation, float32 [2, D]."""
        return np.stack([self.mean, self.std])

    @property
    def description(self) -> str:
        """A few words for the store's meta.json."""
        projected = "" if self.basis is None else f"{self.basis.shape[1]} principal components, "
        return f"{projected}standardised per dimension with training statistics"

    def features(self, raw: NDArray[np.float32]) -> NDArray[np.float16]:
        """Map raw float32 [..., 1280] to the stored float16 [..., D]."""
        return ((_project(raw, self.center, self.basis) - self.mean) / self.std).astype(np.float16)

    def probs(self, raw: NDArray[np.float16]) -> NDArray[np.float16]:
        """Map probabilities [..., 1000] to the stored float16 [..., C], which still sum to one."""
        if self.kept is None:
            return raw
        chosen = raw[..., self.kept].astype(np.float32)
        other = np.clip(1.0 - chosen.sum(-1, keepdims=True), 0.0, 1.0)
        return np.concatenate([chosen, other], -1).astype(np.float16)


def fit_reduction(
    features: NDArray[np.float32],
    probs: NDArray[np.float16],
    names: Sequence[str],
    feature_dim: int = 0,
    classes: int = 0,
) -> Reduction:
    """Fit on training regions.

    Args:
        features: raw [S, R, 1280].
        probs: [S, R, 1000].
        names: of the classes.
        feature_dim: principal components to keep, 0 for the features themselves.
        classes: classes to keep including "other", 0 for all.

    Raises:
        VlscaleError: a number is out of range.
    """
    width, total = features.shape[-1], probs.shape[-1]
    if not 0 <= feature_dim <= width or classes == 1 or not 0 <= classes <= total:
        raise VlscaleError(
            f"cannot reduce to {feature_dim} features and {classes} classes: "
            f"expected 0 (all) or at most {width} features, and 0 or 2 to {total} classes"
        )
    flat = features.reshape(-1, width)
    center = basis = None
    if feature_dim:
        center = flat.mean(0, dtype=np.float64).astype(np.float32)
        centred = flat.astype(np.float64) - center
        _, vectors = np.linalg.eigh(centred.T @ centred)
        top = vectors[:, ::-1][:, :feature_dim]
        # An eigenvector's sign is arbitrary: make its largest component positive.
        largest = np.abs(top).argmax(0)
        basis = (top * np.sign(top[largest, np.arange(feature_dim)])).astype(np.float32)
    projected = _project(flat, center, basis).astype(np.float64)
    kept = None
    stored = list(names)
    if classes:
        mass = probs.reshape(-1, total).sum(0, dtype=np.float64)
        kept = np.sort(np.argsort(-mass, kind="stable")[: classes - 1])
        stored = [names[i] for i in kept] + ["other"]
    std = np.maximum(projected.std(0), _SMALLEST_STD)
    return Reduction(projected.mean(0).astype(np.float32), std.astype(np.float32), center, basis, kept, stored)


def _project(
    raw: NDArray[np.float32], center: NDArray[np.float32] | None, basis: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    return raw if center is None or basis is None else (raw - center) @ basis


def nearest_centroid(
    features: NDArray[np.float16], things: Sequence[Sequence[str | None]], centroids: dict[str, NDArray[np.float64]]
) -> float:
    """Say how well the features tell the things apart.

    Args:
        features: stored [S, R, D].
        things: noun of each region, None for distractors.
        centroids: mean feature of each noun; filled by the first call (training), used by later ones.

    Returns:
        Share of the objects with a known noun whose nearest centroid is that of their noun; NaN if there are none.
    """
    names = np.array([noun or "" for row in things for noun in row])
    flat = features.reshape(len(names), -1).astype(np.float64)
    if not centroids:
        centroids.update({noun: flat[names == noun].mean(0) for noun in sorted(set(names.tolist()) - {""})})
    nouns = sorted(centroids)
    known = np.isin(names, nouns)
    if not known.any():
        return float("nan")
    centres = np.stack([centroids[noun] for noun in nouns])
    rows = flat[known]
    distance = (rows**2).sum(1)[:, None] - 2 * rows @ centres.T + (centres**2).sum(1)[None]
    return float((np.array(nouns)[distance.argmin(1)] == names[known]).mean())
