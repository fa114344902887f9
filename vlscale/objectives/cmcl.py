"""Cross-modal contrastive learning (UNIMO, section 2.1): a pair against its views, and against other pairs.

A group's candidates are an image with a text each. Encoded together: the pair itself, and the image with rewritten
captions. Encoded apart: retrieved images with the caption, retrieved texts with the image, and the pair's own two.
Negatives are the rewritten captions that are not true, and with ``window`` the images and captions of all other groups
of the step, encoded apart; but not what is known to match (:mod:`vlscale.objectives.match_keys`). A group whose image
has no region, or whose caption no word piece, has no candidate.

With ``window_loss: shared`` all of them stand in one sum, as the formula has it. A model can tell what was encoded
together from what was not, so that a pair encoded together, once it scores high, answers for all the window. With
``own`` the window's negatives compete with the pair's own image and caption encoded apart, in a sum of their own.

**Window.** The step's groups are in many micro-batches, on many ranks. A first pass without gradients gives what others
need of a group: pooled image, pooled caption, and the logarithm of the sum that they join (D). In the second,
a micro-batch has the gradients of its own groups' losses, in which other groups' representations are constants, and
those that its representations get from other groups' losses, ``exp(s) / (D + W)`` each, in which the head is a constant
(its gradient is with the group's own loss). Summed over micro-batches that is the gradient of the one loss. The first
pass must see the second's dropout: seed both alike. Scores across groups are without the head's dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.config_unified import ContrastSection
from vlscale.data.lengths import SPECIALS
from vlscale.data.views import Role
from vlscale.errors import VlscaleError
from vlscale.objectives.base import full_precision
from vlscale.objectives.contrastive import candidate_sums
from vlscale.objectives.match_keys import group_keys, known_matches
from vlscale.objectives.row_draws import named_row
from vlscale.ragged import RaggedBatch, cumulative, owners

_CHUNK = 1024
_EMPTY_TEXT = SPECIALS
"""Tokens of a caption that says nothing: [CLS] and [SEP] alone."""


class ContrastModel(Protocol):
    """What contrast asks of a model; examples are int64 indices of rows, K = 0 is allowed."""

    def pool_text(self, encoded: Any, examples: Tensor) -> Tensor:
        """Return [K, H], the pooled [CLS]."""

    def pool_image(self, encoded: Any, examples: Tensor) -> Tensor:
        """Return [K, H], the pooled [IMG]."""

    def match_pooled(self, text_KH: Tensor, image_KH: Tensor) -> Tensor:
        """Return [K], scores of pooled texts and images; fused in float32 at least, as :meth:`match_all` does."""

    def match_all(self, text_TH: Tensor, image_IH: Tensor, learn: bool = True) -> Tensor:
        """Return [I, T], scores of all pooled images with all pooled texts, without dropout."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The scored candidates of a batch's G groups, and of the Gw of them that are in the window.

    Attributes:
        scores: [M], in float32 at least, not divided by the temperature.
        all, positive: [G], logarithms of the sums of ``exp(score / temperature)``.
        images, texts: [Gw, H], pooled image and caption, encoded apart.
        beside: [Gw], logarithms of the sums that the window's negatives are added to.
    """

    scores: Tensor
    all: Tensor
    positive: Tensor
    images: Tensor
    texts: Tensor
    beside: Tensor


@dataclass(frozen=True)
class Contrast:
    """How groups are contrasted.

    Attributes:
        similarity: ``mul_fc``: the match head on the product of the pooled two; ``dot``: their product; ``cosine``.
        temperature: what scores are divided by.
        window: other groups of the step are negatives too.
        own: they compete with the pair's own image and caption encoded apart alone, and not with all its candidates.
        images, texts: most retrieved images and texts of a pair.
    """

    similarity: Literal["mul_fc", "dot", "cosine"] = "mul_fc"
    temperature: float = 1.0
    window: bool = False
    own: bool = False
    images: int = 1
    texts: int = 1

    @classmethod
    def build(cls, section: ContrastSection) -> Contrast:
        """Take the settings from the recipe's section."""
        window = section.window and section.weight > 0
        own = section.window_loss == "own"
        return cls(section.similarity, section.temperature, window, own, section.images, section.texts)

    def targets(self, batch: RaggedBatch) -> dict[str, Tensor]:
        """Return which rows are compared, of a batch on the CPU.

        ``contrast_images``, ``contrast_texts`` int64 [M], the rows of each candidate's image and text;
        ``contrast_positive`` bool [M]; ``contrast_cu`` int32 [G+1], candidates of the groups; ``contrast_empty`` bool,
        for each pair whether it takes no part; ``window_images``, ``window_texts`` int64 [Gw], the rows of the groups'
        images and captions alone, ``window_groups`` int64 [Gw], which of the G groups they are, and ``contrast_keys``
        int64 [Gw, K], see :func:`~vlscale.objectives.match_keys.group_keys`.

        Raises:
            VlscaleError: a retrieved image or text has no caption or image to go with, or there are too many.
        """
        role, group = batch.targets["role"].numpy(), _numbered(batch.group.numpy())
        images, texts = _compared(batch, role, group)
        there = (images >= 0) & (texts >= 0)
        whole = there & (batch.region_counts.numpy()[images] > 0) & (batch.text_lengths.numpy()[texts] > _EMPTY_TEXT)
        pairs, groups = np.unique(group[role == Role.PAIR]), np.unique(group[(role == Role.PAIR) & whole])
        taken = (role >= Role.PAIR) & (role != Role.TEXT) & whole & np.isin(group, groups)
        members = np.flatnonzero(taken)
        members = members[np.argsort(group[members], kind="stable")]
        positive = role[members] != Role.NEGATIVE
        apart = members[role[members] == Role.IMAGE] if self.window else members[:0]
        ranked = np.isin(group[apart], group[members[~positive]])
        found = {
            "contrast_images": images[members],
            "contrast_texts": texts[members],
            "contrast_positive": positive,
            "contrast_empty": ~np.isin(pairs, groups),
            "window_images": apart,
            "window_texts": texts[apart],
            "window_groups": np.searchsorted(groups, group[apart]),
            "contrast_keys": group_keys(batch, apart, texts[apart], ranked, (self.images, self.texts)),
        }
        counts = torch.from_numpy(np.bincount(np.searchsorted(groups, group[members]), minlength=len(groups)))
        return {name: torch.from_numpy(rows) for name, rows in found.items()} | {"contrast_cu": cumulative(counts)}

    def score(self, model: ContrastModel, encoded: Any, targets: dict[str, Tensor]) -> Candidates:
        """Score a batch's own candidates; the heads are called, in this order, if there are none too."""
        text_MH = model.pool_text(encoded, targets["contrast_texts"])
        image_MH = model.pool_image(encoded, targets["contrast_images"])
        if self.similarity == "mul_fc":
            scores_M = full_precision(model.match_pooled(text_MH, image_MH))
        else:
            scores_M = (self._directed(text_MH) * self._directed(image_MH)).sum(1)
        all_G, positive_G = candidate_sums(
            scores_M, targets["contrast_positive"], targets["contrast_cu"], self.temperature
        )
        texts_WH = full_precision(model.pool_text(encoded, targets["window_texts"]))
        images_WH = full_precision(model.pool_image(encoded, targets["window_images"]))
        if self.window and self.own:
            beside_W = self._compare(model, images_WH, texts_WH, True).diagonal() / self.temperature
        else:
            beside_W = all_G.index_select(0, targets["window_groups"])
        return Candidates(scores_M, all_G, positive_G, images_WH, texts_WH, beside_W)

    def represent(self, candidates: Candidates) -> Tensor:
        """Return [Gw, 2 H + 1], what other micro-batches need of this one's groups."""
        return torch.cat([candidates.images, candidates.texts, candidates.beside[:, None]], 1)

    def losses(self, model: ContrastModel, candidates: Candidates, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sum of the groups' losses, and how the groups in the window score.

        Returns:
            total: scalar; with a window its gradient is also that of other groups' losses, by this batch.
            apart: [Gw, 3], scores of image and caption encoded apart: the pair's own, and the best and the mean with
                another group's image or caption (the pair's own where none is a negative); [0, 3] without a window.
        """
        if not self.window:
            return (candidates.all - candidates.positive).sum(), candidates.images.new_zeros(0, 3)
        all_W = candidates.beside
        window = _Window.of(candidates, targets)
        scores_WG2, known_WG2 = self._cross(model, window) / self.temperature, self._known(window)
        others_WN = scores_WG2.masked_fill(known_WG2, _low(scores_WG2)).flatten(1)
        widened_W = torch.logaddexp(all_W, others_WN.logsumexp(1))
        lent = self._lent(model, window, known_WG2)
        total = (candidates.all - candidates.positive).sum() + (widened_W - all_W).sum() + (lent - lent.detach())
        scores_WG2 = scores_WG2.detach()
        own_W = scores_WG2[:, :, 0].masked_fill(~window.itself, 0.0).sum(1)
        negatives_W = (~known_WG2).flatten(1).sum(1)
        mean_W = scores_WG2.masked_fill(known_WG2, 0.0).flatten(1).sum(1) / negatives_W.clamp(min=1)
        apart_W3 = torch.stack([own_W, others_WN.detach().amax(1) if len(own_W) else own_W, mean_W], 1)
        apart_W3 = torch.where(negatives_W[:, None] > 0, apart_W3, own_W[:, None])
        return total, apart_W3 * self.temperature

    def _cross(self, model: ContrastModel, window: _Window) -> Tensor:
        """[Gw, G, 2], scores of the batch's images with all captions, and of its captions with all images."""
        texts_GH = window.all_texts.index_copy(0, window.at, window.texts)
        images_GH = window.all_images.index_copy(0, window.at, window.images)
        to_texts = self._compare(model, window.images, texts_GH, True)
        to_images = self._compare(model, images_GH, window.texts, True).t()
        return torch.stack([to_texts, to_images], 2)

    def _known(self, window: _Window) -> Tensor:
        """bool [Gw, G, 2], which scores of :meth:`_cross` are of what is known to match, the pair itself included."""
        to_texts = known_matches(window.keys, window.all_keys, self.images)
        return torch.stack([to_texts, known_matches(window.all_keys, window.keys, self.images).t()], 2)

    def _lent(self, model: ContrastModel, window: _Window, known_WG2: Tensor) -> Tensor:
        """A scalar whose gradient is that of the other groups' losses by this batch's images and captions."""
        with torch.no_grad():
            total_G = torch.logaddexp(window.all_sums, self._sums_of_others(model, window))
        as_images = self._compare(model, window.images, window.all_texts, False)
        as_texts = self._compare(model, window.all_images, window.texts, False).t()
        scaled_WG2 = torch.stack([as_images, as_texts], 2) / self.temperature
        share_WG2 = (scaled_WG2.detach() - total_G[:, None]).exp()
        share_WG2 = share_WG2.masked_fill(known_WG2 | window.mine[:, None], 0.0)
        return (share_WG2 * scaled_WG2).sum()

    def _sums_of_others(self, model: ContrastModel, window: _Window) -> Tensor:
        """[G], for each group of the step the logarithm of the sum over other groups' images and captions."""
        size, low = len(window.all_sums), _low(window.all_sums)
        by_caption = window.all_sums.new_full((size,), low)
        by_image = []
        for first in range(0, size, _CHUNK):  # not all scores at once
            here = slice(first, first + _CHUNK)
            scores_CG = self._compare(model, window.all_images[here], window.all_texts, False) / self.temperature
            known_CG = known_matches(window.all_keys[here], window.all_keys, self.images)
            scores_CG = scores_CG.masked_fill(known_CG, low)
            by_image.append(scores_CG.logsumexp(1))
            by_caption = torch.logaddexp(by_caption, scores_CG.logsumexp(0))
        return torch.logaddexp(by_caption, torch.cat([*by_image, by_caption[:0]]))

    def _compare(self, model: ContrastModel, images_IH: Tensor, texts_TH: Tensor, learn: bool) -> Tensor:
        """[I, T], in float32 at least."""
        if self.similarity == "mul_fc":
            return full_precision(model.match_all(texts_TH, images_IH, learn))
        return self._directed(images_IH) @ self._directed(texts_TH).t()

    def _directed(self, pooled_KH: Tensor) -> Tensor:
        pooled_KH = full_precision(pooled_KH)
        if self.similarity == "dot":
            return pooled_KH
        most_K1 = pooled_KH.detach().abs().amax(1, keepdim=True)  # divided by it, no square underflows
        some_K1 = most_K1 > 0
        scaled_KH = pooled_KH / most_K1.where(some_K1, 1.0)
        # Pools may be zero, where a norm has no gradient.
        return scaled_KH * (scaled_KH.square().sum(1, keepdim=True).where(some_K1, 1.0).rsqrt() * some_K1)


@dataclass(frozen=True, eq=False)
class _Window:
    """The representations and keys of the step's G groups, and which of them are this batch's Gw."""

    images: Tensor
    texts: Tensor
    keys: Tensor
    all_images: Tensor
    all_texts: Tensor
    all_sums: Tensor
    all_keys: Tensor
    at: Tensor
    itself: Tensor
    mine: Tensor

    @classmethod
    def of(cls, candidates: Candidates, targets: dict[str, Tensor]) -> _Window:
        window, at, keys = targets["window"], targets["window_at"], targets["window_keys"]
        width = candidates.images.shape[1]
        if at.numel() != len(candidates.images) or window.shape != (len(keys), 2 * width + 1):
            raise VlscaleError(
                f"contrast: the window is {list(window.shape)} with {at.numel()} groups of this micro-batch, expected "
                f"[{len(keys)}, {2 * width + 1}] with {len(candidates.images)}; make it with UnifiedLearning.represent"
            )
        images_GH, texts_GH, sums_G1 = window.detach().to(candidates.images.dtype).split([width, width, 1], 1)
        itself = at[:, None] == torch.arange(len(window), device=at.device)
        return cls(
            candidates.images, candidates.texts, keys.index_select(0, at), images_GH, texts_GH, sums_G1.squeeze(1),
            keys, at, itself, itself.any(0),
        )  # fmt: skip


def group_scores(scores_M: Tensor, positive_M: Tensor, joint_M: Tensor, cu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each group [G]: has it a negative, is its best candidate a positive, and the gap of its means.

    The gap is between what is encoded together: the pair and its true captions, and the captions that are not true.
    Both are 0 for a group without a negative.
    """
    owner, size = owners(cu, scores_M.numel()), cu.numel() - 1

    def best(members: Tensor) -> Tensor:
        low = scores_M.new_full((size,), -torch.inf)
        return low.scatter_reduce(0, owner, scores_M.masked_fill(~members, -torch.inf), "amax")

    def mean(members: Tensor) -> Tensor:
        sums = scores_M.new_zeros(size).index_add(0, owner, scores_M * members)
        return sums / scores_M.new_zeros(size).index_add(0, owner, members.to(scores_M.dtype)).clamp(min=1)

    ranked_G = torch.zeros_like(cu[1:]).index_add(0, owner, (~positive_M).to(cu.dtype)) > 0
    right_G = ranked_G & (best(positive_M) > best(~positive_M))
    return ranked_G, right_G, (mean(positive_M & joint_M) - mean(~positive_M)) * ranked_G


def _numbered(group: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.unique(group, return_inverse=True)[1].astype(np.int64).reshape(-1)


def _row_of(role: NDArray[np.int64], group: NDArray[np.int64], wanted: Role) -> NDArray[np.int64]:
    """int64 [groups], the row of each group that has a role, or -1."""
    rows = np.full(int(group.max(initial=-1)) + 1, -1, np.int64)
    found = np.flatnonzero(role == wanted)
    rows[group[found]] = found
    return rows


def _compared(
    batch: RaggedBatch, role: NDArray[np.int64], group: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """int64 [B] twice, the rows of the image and of the text that each row is compared by; -1: there is none."""
    image_of, text_of = _row_of(role, group, Role.IMAGE), _row_of(role, group, Role.TEXT)
    images, texts = np.arange(role.size), np.arange(role.size)
    with_caption, with_image = (role == Role.RETRIEVED_IMAGE) | (role == Role.IMAGE), role == Role.RETRIEVED_TEXT
    texts[with_caption], images[with_image] = text_of[group[with_caption]], image_of[group[with_image]]
    lonely = np.flatnonzero(((images < 0) | (texts < 0)) & (role != Role.IMAGE))
    if lonely.size:
        row = int(lonely[0])
        lacking = Role.IMAGE if images[row] < 0 else Role.TEXT
        raise VlscaleError(
            f"{named_row(batch, row)}: a {Role(role[row]).name} row, and its group has no {lacking.name} row to "
            "compare it with; plan the step anew with vlscale.data.plan, which gives it one"
        )
    return images, texts


def _low(scores: Tensor) -> float:
    """A logarithm that adds nothing to any sum, and is finite: so are its gradients."""
    return torch.finfo(scores.dtype).min / 4
