"""Which region does a word mean? The transport plan's answer against the ground truth."""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from vlscale.config import WraSection
from vlscale.objectives.base import PretrainingModel
from vlscale.objectives.wra import WordRegionAlignment
from vlscale.report.heldout import HeldOut, Mentions, answering
from vlscale.report.outcome import Outcome, share_of_best


def alignment(
    model: PretrainingModel, heldout: HeldOut, section: WraSection, progress: Progress | None = None
) -> dict[str, Outcome]:
    """Ask for the region of every named thing: the one that gets most of the word's mass in the transport plan.

    The plan is taken as in training: last hidden states, and the tokens that ``section`` lets take part (a plan can be
    taken of a model that was trained without alignment, too). Nothing is masked.

    Returns:
        ``alignment_accuracy``. Chance is the mean of 1 over the number of regions. The baseline needs no training: the
        region whose classes, by name, contain the word (see :func:`detector_names`).

    Raises:
        UnmeasurableError: no text has spans.
    """
    mentions = heldout.spelt_mentions()
    texts, which = np.unique(mentions.text, return_inverse=True)
    images = heldout.first_image[texts]
    aligner = WordRegionAlignment.build(section, heldout.dataset.texts.meta.vocabulary)
    offset = 1 if section.tokens == "all" else 0
    right = np.zeros(len(mentions))
    with answering(model):
        for part, batch in heldout.batches("itm", texts, images, "alignment", progress):
            _, plan_BRT = aligner.align(model.encode(batch), batch)
            asked = np.flatnonzero((which >= part.start) & (which < part.stop))
            chosen, owner = mentions.where(asked), which[asked] - part.start
            place_T = np.arange(plan_BRT.shape[2])
            word_KT = (place_T >= chosen.start[:, None] + offset) & (place_T < chosen.end[:, None] + offset)
            mass_KR = (plan_BRT.double().cpu().numpy()[owner] * word_KT[:, None]).sum(2)
            counts_K = batch.region_counts.cpu().numpy()[owner]
            right[asked] = share_of_best(mass_KR, np.arange(mass_KR.shape[1]) < counts_K[:, None], chosen.region)
    regions = np.minimum(heldout.dataset.images.lengths[mentions.image], heldout.max_regions)
    names = detector_names(heldout, mentions)
    baseline = None if names is None else float(names.mean())
    return {"alignment_accuracy": Outcome(right, mentions.image, float(np.mean(1 / regions)), baseline=baseline)}


def detector_names(heldout: HeldOut, mentions: Mentions) -> NDArray[np.float64] | None:
    """Match words with the detector's class names: the score of a region is the sum of its matching probabilities.

    A class matches if the thing's name occurs in its name as whole words, regardless of case. Where regions tie, as
    they do when no class matches, the expectation over a random choice counts.

    Returns:
        float64 [K], or None if there is no classes store, or no names of classes.
    """
    classes = heldout.dataset.classes
    if classes is None or classes.meta.class_names is None:
        return None
    patterns = [re.compile(rf"(?<!\w){re.escape(thing)}(?!\w)", re.IGNORECASE) for thing in heldout.things]
    names = classes.meta.class_names
    matches_TC = np.array([[bool(pattern.search(name)) for name in names] for pattern in patterns], np.float64)
    images, which = np.unique(mentions.image, return_inverse=True)
    counts = np.minimum(heldout.dataset.images.lengths[images], heldout.max_regions).astype(np.int64)
    allowed_IR = np.arange(counts.max()) < counts[:, None]
    rows_IR = heldout.dataset.images.region_ptr[images][:, None] + np.arange(counts.max())
    scores_IRT = np.zeros((*allowed_IR.shape, len(heldout.things)))
    scores_IRT[allowed_IR] = classes.probs(rows_IR[allowed_IR]) @ matches_TC.T
    return share_of_best(scores_IRT[which, :, mentions.thing], allowed_IR[which], mentions.region)


def transport_plan_of(
    model: PretrainingModel, heldout: HeldOut, text: int, section: WraSection
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the transport plan of one text and its image, for a picture.

    Returns:
        float64 [T, R], the share of each word piece's mass that every region gets (rows sum to 1 where the plan has
        converged), and int64 [T], the position of each row in the text without [CLS] (-1 is [CLS]).
    """
    texts = np.array([text], np.int64)
    aligner = WordRegionAlignment.build(section, heldout.dataset.texts.meta.vocabulary)
    with answering(model):
        for _, batch in heldout.batches("itm", texts, heldout.first_image[texts]):
            _, plan_BRT = aligner.align(model.encode(batch), batch)
            plan_TR = plan_BRT[0].double().T
            shares = (plan_TR / plan_TR.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).cpu().numpy()
    first = -1 if section.tokens == "all" else 0
    return shares, np.arange(first, first + len(shares))
