"""Does the model look? Masked words, masked regions, and matching, on held-out scenes.

Masks are not drawn here: each question hides one thing, so that accuracies mean something to a person. A gain in
masked words alone proves nothing (language has habits); the same question with a wrong image tells how much of the
answer came from the image.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.objectives.base import PretrainingModel
from vlscale.objectives.masking import mask_regions
from vlscale.ragged import RaggedBatch
from vlscale.report.heldout import HeldOut, Mentions, answering
from vlscale.report.outcome import Outcome, UnmeasurableError


def masked_words(model: PretrainingModel, heldout: HeldOut, progress: Progress | None = None) -> dict[str, Outcome]:
    """Hide one named thing at a time (all its word pieces) and ask for it, with the right and with a wrong image.

    The wrong image does not show the thing. A word counts as right if every piece is the most probable one. Mentions
    that the vocabulary spells with [UNK] are not asked for.

    Returns:
        ``mlm_accuracy``, ``mlm_accuracy_wrong_image`` and their difference ``grounding``. Chance is the share of the
        most frequent thing, which is at least one in the number of things. ``ceiling`` is what someone gets who knows
        every thing in the image and guesses among those that the text does not name elsewhere.

    Raises:
        UnmeasurableError: no mention can be asked for.
    """
    mentions = heldout.spelt_mentions()
    wrong = heldout.wrong_images(
        "report_mlm", mentions.text, lambda at, images: ~heldout.contains[images, mentions.thing[at]]
    )
    right_K, wrong_K = np.zeros(len(mentions)), np.zeros(len(mentions))
    with answering(model):
        for images, answer, doing in (
            (mentions.image, right_K, "masked words, right image"),
            (wrong, wrong_K, "masked words, wrong image"),
        ):
            for part, batch in heldout.batches("mlm", mentions.text, images, doing, progress):
                hidden, positions, owner = _hide_words(batch, mentions.where(np.arange(part.start, part.stop)), heldout)
                labels = batch.input_ids[positions]
                miss = model.mlm_logits(model.encode(hidden), positions).argmax(1) != labels
                answer[part] = np.bincount(owner, miss.cpu().numpy(), part.stop - part.start) == 0
    chance = float(np.bincount(mentions.thing).max() / len(mentions))
    extra = {"ceiling": _ceiling(heldout, mentions), "by_kind": _by_kind(heldout, mentions, right_K)}
    return {
        "mlm_accuracy": Outcome(right_K, mentions.image, chance, extra=extra),
        "mlm_accuracy_wrong_image": Outcome(wrong_K, mentions.image, chance),
        "grounding": Outcome(right_K - wrong_K, mentions.image, 0.0),
    }


def masked_regions(
    model: PretrainingModel,
    heldout: HeldOut,
    background_class: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Hide one region at a time that the caption names, and ask for its class and its feature.

    Returns:
        ``mrc_accuracy`` (the class is the detector's most probable one; chance is the share of the most frequent class)
        if there is a classes store, and ``mrfr_relative_error``: the squared error over that of predicting the mean
        feature of these regions, so that 1 is the best constant and less is better.

    Raises:
        UnmeasurableError: no caption names a region.
    """
    mentions = heldout.mentions.where(np.isin(heldout.mentions.text, heldout.captions()))
    if not len(mentions):
        raise UnmeasurableError("no caption has spans that point at regions")
    classes = heldout.dataset.classes
    right_K, error_K = np.zeros(len(mentions)), np.zeros(len(mentions))
    labels_K = np.zeros(len(mentions), np.int64)
    features = np.zeros((len(mentions), heldout.dataset.images.meta.feature_dim), np.float32)
    with answering(model):
        for part, batch in heldout.batches("mrc", mentions.text, mentions.image, "masked regions", progress):
            positions = batch.cu_regions[:-1].long() + torch.from_numpy(mentions.region[part]).to(batch.boxes.device)
            target_KD = batch.features[positions]
            chosen = torch.zeros(batch.boxes.shape[0], dtype=torch.bool, device=batch.boxes.device)
            chosen[positions] = True
            encoded = model.encode(mask_regions(batch, chosen))
            error_K[part] = (model.predict_features(encoded, positions).float() - target_KD).square().mean(1).cpu()
            features[part] = target_KD.cpu()
            if classes is not None:
                probs = classes.probs(batch.region_rows[positions].cpu().numpy())
                labels_K[part] = _labels(probs, background_class)
                right_K[part] = model.classify_regions(encoded, positions).argmax(1).cpu().numpy() == labels_K[part]
    mean_error = np.square(features - features.mean(0), dtype=np.float64).mean(1)
    found = {"mrfr_relative_error": Outcome(error_K, mentions.image, 1.0, weights=mean_error)}
    if classes is not None:
        found["mrc_accuracy"] = Outcome(right_K, mentions.image, float(np.bincount(labels_K).max() / len(mentions)))
    return found


def matching(model: PretrainingModel, heldout: HeldOut, progress: Progress | None = None) -> dict[str, Outcome]:
    """Ask whether caption and image match: each caption once with its image and once with a wrong one.

    The wrong image lacks at least one of the things that the caption names, so the caption is false of it. Where no
    things are recorded it is any other image.

    Returns:
        ``itm_accuracy``, by the larger of the two logits (a tie counts one half); chance is one half.

    Raises:
        UnmeasurableError: there is no caption, or no wrong image.
    """
    captions = heldout.captions()
    if not len(captions) or len(heldout.dataset.images) < 2:
        raise UnmeasurableError("fewer than two images, or no caption")
    named = heldout.named(captions)

    def lacks_one(at: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (named[at] & ~heldout.contains[images]).any(1) | ~named[at].any(1)

    own = heldout.first_image[captions]
    images = np.concatenate([own, heldout.wrong_images("report_itm", captions, lacks_one)])
    score = match_scores(model, heldout, np.tile(captions, 2), images, "matching", progress)
    sign = np.repeat([1.0, -1.0], len(captions))
    return {"itm_accuracy": Outcome((np.sign(score * sign) + 1) / 2, np.tile(own, 2), 0.5)}


def match_scores(
    model: PretrainingModel,
    heldout: HeldOut,
    texts: NDArray[np.int64],
    images: NDArray[np.int64],
    doing: str,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Return float64 [B], the matching logit of each (text, image) pair: logit of a match minus that of none.

    Raises:
        VlscaleError: a score is not finite.
    """
    scores = np.zeros(len(texts))
    with answering(model):
        for part, batch in heldout.batches("itm", texts, images, doing, progress):
            logits_B2 = model.itm_logits(model.encode(batch)).double()
            scores[part] = (logits_B2[:, 1] - logits_B2[:, 0]).cpu().numpy()
    if not np.isfinite(scores).all():
        raise VlscaleError(
            f"dataset {heldout.dataset.name}: the model's matching scores are not finite; its weights are damaged or "
            f"training diverged: evaluate an earlier checkpoint"
        )
    return scores


def _hide_words(
    batch: RaggedBatch, mentions: Mentions, heldout: HeldOut
) -> tuple[RaggedBatch, Tensor, NDArray[np.int64]]:
    """Mask mention i in text i; return the batch, positions int64 [P] into Nt, and the mention each belongs to."""
    pieces = mentions.end - mentions.start
    owner = np.repeat(np.arange(len(mentions)), pieces)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = batch.cu_text[:-1].cpu().numpy() + 1 + mentions.start
    positions = torch.from_numpy(begin[owner] + within).to(batch.input_ids.device)
    input_ids = batch.input_ids.index_fill(0, positions, heldout.dataset.texts.meta.vocabulary.mask)
    return dataclasses.replace(batch, input_ids=input_ids), positions, owner


def _ceiling(heldout: HeldOut, mentions: Mentions) -> float:
    """Mean of 1 over the number of things in the image that the text does not name (elsewhere, for the hidden one)."""
    unnamed = heldout.contains[mentions.image] & ~heldout.named(mentions.text)
    return float(np.mean(1 / (1 + unnamed.sum(1))))


def _by_kind(heldout: HeldOut, mentions: Mentions, right_K: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Accuracy and number of questions per kind of text."""
    kinds = np.array([heldout.kinds[text] for text in mentions.text])
    return {
        str(kind): {"value": float(right_K[kinds == kind].mean()), "n": int((kinds == kind).sum())}
        for kind in np.unique(kinds)
    }


def _labels(probs_KC: NDArray[np.float32], background_class: int | None) -> NDArray[np.int64]:
    if background_class is not None:
        probs_KC = probs_KC.copy()
        probs_KC[:, background_class] = -1.0
    return probs_KC.argmax(1)
