"""Retrieval by UNIMO's representations: images and captions are encoded alone, and compared afterwards."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.models.unimo import UnimoForPretraining
from vlscale.report.heldout import HeldOut, answering
from vlscale.report.outcome import Outcome, UnmeasurableError
from vlscale.report.retrieval import choose_candidates, recall
from vlscale.report.unimo_batches import device_of, images_alone, texts_alone

CANDIDATES = 1000
_RANKS = (1, 5, 10)

Similarity = Literal["mul_fc", "dot", "cosine"]


def retrieve_alone(
    model: UnimoForPretraining, heldout: HeldOut, similarity: Similarity, candidates: int = CANDIDATES
) -> dict[str, Outcome]:
    """Rank every candidate caption for every candidate image, and the other way round, by similarity.

    [IMG] of an image that is encoded without a text, and [CLS] of a caption without an image, are pooled and compared
    as in pre-training. Equal scores count as a random order would on average.

    Args:
        model: the model.
        heldout: the scenes; a caption that says everything stands for each.
        similarity: the recipe's ``objectives.unified.contrast.similarity``.
        candidates: scenes at most.

    Returns:
        ``i2t_rK`` (caption of an image) and ``t2i_rK`` (image of a caption) for K of 1, 5 and 10: share of queries
        whose partner is among the best K. Chance is K over the number of candidates, which ``extra`` states.

    Raises:
        UnmeasurableError: fewer than two candidates.
        VlscaleError: scores are not finite.
    """
    texts = choose_candidates(heldout, candidates)
    if len(texts) < 2:
        raise UnmeasurableError("fewer than two images with a caption")
    images = heldout.first_image[texts]
    device, dataset = device_of(model), heldout.dataset
    with answering(model):
        text_NH = torch.cat([model.pool_text(model.encode(batch)) for _, batch in texts_alone(dataset, texts, device)])
        shown = images_alone(dataset, images, heldout.max_regions, device)
        image_NH = torch.cat([model.pool_image(model.encode(batch)) for _, batch in shown])
        scores_TI = similarities(model, text_NH, image_NH, similarity).double().cpu().numpy()
    if not np.isfinite(scores_TI).all():
        raise VlscaleError(
            f"dataset {dataset.name}: similarities are not finite; the model's weights are damaged or training "
            f"diverged: evaluate an earlier checkpoint"
        )
    return recalls(scores_TI, images)


def recalls(scores_TI: NDArray[np.float64], images: NDArray[np.int64]) -> dict[str, Outcome]:
    """Recall at 1, 5 and 10 in both directions of square scores; the partner of text i is image i."""
    count = len(scores_TI)
    found = {}
    for name, scores in (("i2t", scores_TI.T), ("t2i", scores_TI)):
        for rank in _RANKS:
            hits = recall(scores, rank)
            found[f"{name}_r{rank}"] = Outcome(hits, images, min(1.0, rank / count), extra={"candidates": count})
    return found


def similarities(model: UnimoForPretraining, text_QH: Tensor, image_CH: Tensor, similarity: Similarity) -> Tensor:
    """Return [Q, C], the similarity of every pooled text with every pooled image, as CMCL compares them."""
    if similarity == "dot":
        return text_QH @ image_CH.T
    if similarity == "cosine":
        return F.normalize(text_QH, dim=1) @ F.normalize(image_CH, dim=1).T
    return model.match_all(text_QH, image_CH).T
