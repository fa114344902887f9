"""Image-text retrieval among held-out candidates, scored by the matching head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from vlscale.objectives.base import PretrainingModel
from vlscale.report.grounding import match_scores
from vlscale.report.heldout import HeldOut
from vlscale.report.outcome import Outcome, UnmeasurableError

CANDIDATES = 100


def retrieval(
    model: PretrainingModel, heldout: HeldOut, candidates: int = CANDIDATES, progress: Progress | None = None
) -> dict[str, Outcome]:
    """Rank every candidate caption for every candidate image, and the other way round.

    All pairs go through the model; the score of a pair is its matching logit. Equal scores count as a random order
    would on average, so that a model that cannot tell is at chance.

    Returns:
        ``i2t_r1``, ``i2t_r5`` (caption of an image) and ``t2i_r1``, ``t2i_r5`` (image of a caption): share of queries
        whose partner is among the best k. Chance is k over the number of candidates, which ``extra`` states.

    Raises:
        UnmeasurableError: fewer than two candidates.
    """
    texts = choose_candidates(heldout, candidates)
    count = len(texts)
    if count < 2:
        raise UnmeasurableError("fewer than two images with a caption")
    images = heldout.first_image[texts]
    pairs_texts, pairs_images = np.repeat(texts, count), np.tile(images, count)
    scores_TI = match_scores(model, heldout, pairs_texts, pairs_images, "retrieval", progress).reshape(count, count)
    found = {}
    for k in (1, 5):
        for name, scores in (("i2t", scores_TI.T), ("t2i", scores_TI)):
            chance = min(1.0, k / count)
            extra = {"candidates": count}
            found[f"{name}_r{k}"] = Outcome(recall(scores, k), images, chance, extra=extra)
    return dict(sorted(found.items()))


def recall(scores_QC: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Chance that the partner of query i, candidate i, is among the best ``k``, ties in random order.

    Args:
        scores_QC: float [Q, Q].
        k: at least 1.

    Returns:
        float64 [Q].
    """
    own = np.diagonal(scores_QC)[:, None]
    better = (scores_QC > own).sum(1)
    equal = (scores_QC == own).sum(1)
    return np.clip((k - better) / equal, 0.0, 1.0)


def choose_candidates(heldout: HeldOut, count: int) -> NDArray[np.int64]:
    """Return int64 [<= count] caption rows of different images, in a seeded order.

    Images that show the same things as an earlier one come last, because their captions are true of both.
    """
    captions = heldout.captions()
    order = captions[np.argsort(heldout.draws.uniform("report_candidates", 0, captions)[:, 0], kind="stable")]
    images = heldout.first_image[order]
    first = np.sort(np.unique(images, return_index=True)[1])
    order, images = order[first], images[first]
    shown = np.packbits(heldout.contains[images], axis=1)
    repeats = np.ones(len(order), bool)
    repeats[np.unique(shown, axis=0, return_index=True)[1] if shown.shape[1] else slice(None)] = False
    return order[np.argsort(repeats, kind="stable")][:count]
