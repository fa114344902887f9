"""Which images and captions of a step are known to match, though they stand in different groups.

Datasets hold several captions of one image, and captions that many images have; a pair's retrieved images and texts
may be in the step as other pairs' own. None of these is a negative. Keys say so: equal keys are the same image, or the
same caption. They are made on the CPU, where rows and word pieces are known, and travel beside the window's floats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.data.views import Role, parted
from vlscale.errors import VlscaleError
from vlscale.objectives.row_draws import named_row
from vlscale.ragged import RaggedBatch

_NONE = -1
_RANKED, _IMAGE, _CAPTION, _VIEWS = range(4)  # columns
_CHUNK = 256


def group_keys(
    batch: RaggedBatch,
    images: NDArray[np.int64],
    captions: NDArray[np.int64],
    ranked: NDArray[np.bool_],
    width: tuple[int, int],
) -> NDArray[np.int64]:
    """Return int64 [G, 3 + I + T], what other groups have to know of G groups of a batch on the CPU.

    Columns: has the group a negative of its own; its image; its caption; its I retrieved images and T retrieved texts,
    -1 where it has fewer.

    Args:
        batch: unmasked, with ``targets["role"]`` and ``targets["source"]``.
        images: int64 [G], rows with the groups' images; captions: int64 [G], rows with their captions.
        ranked: bool [G].
        width: (I, T).

    Raises:
        VlscaleError: a group has more retrieved images or texts than that.
    """
    keys = np.full((len(images), _VIEWS + sum(width)), _NONE, np.int64)
    if not len(images):
        return keys
    keys[:, _RANKED] = ranked
    keys[:, _IMAGE], keys[:, _CAPTION] = _image_keys(batch, images), _caption_keys(batch, captions)
    role, group = batch.targets["role"].numpy(), batch.group.numpy()
    at = {number: place for place, number in enumerate(group[images].tolist())}
    for wanted, first, most, of in (
        (Role.RETRIEVED_IMAGE, _VIEWS, width[0], _image_keys),
        (Role.RETRIEVED_TEXT, _VIEWS + width[0], width[1], _caption_keys),
    ):
        rows = np.flatnonzero(role == wanted)
        used: dict[int, int] = {}
        for row, number, key in zip(rows.tolist(), group[rows].tolist(), of(batch, rows).tolist(), strict=True):
            place = used[number] = used.get(number, -1) + 1
            if place >= most:
                raise VlscaleError(
                    f"{named_row(batch, row)}: the group has more than {most} rows {wanted.name}; give it no more "
                    "views than objectives.unified.contrast asks for"
                )
            if number in at:
                keys[at[number], first + place] = key
    return keys


def known_matches(images_AK: Tensor, captions_BK: Tensor, images: int) -> Tensor:
    """Return bool [A, B]: is the image of a group known to go with the caption of another, or of the group itself.

    It is where image or caption are the same, or one is a retrieved view of the other's group.

    Args:
        images_AK: keys of the groups that the images are of.
        captions_BK: keys of the groups that the captions are of.
        images: how many columns are retrieved images.
    """
    image_A1, caption_1B = images_AK[:, _IMAGE, None], captions_BK[None, :, _CAPTION]
    known_AB = (image_A1 == captions_BK[None, :, _IMAGE]) | (images_AK[:, _CAPTION, None] == caption_1B)
    for column in range(_VIEWS, _VIEWS + images):
        known_AB |= image_A1 == captions_BK[None, :, column]
    for column in range(_VIEWS + images, images_AK.shape[1]):
        known_AB |= images_AK[:, column, None] == caption_1B
    return known_AB


def negatives_of(keys_GK: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Return bool [G] twice: has a group of the step any negative; has it one among the other groups."""
    apart_G = torch.zeros(len(keys_GK), dtype=torch.bool, device=keys_GK.device)
    for first in range(0, len(keys_GK), _CHUNK):
        left = (~apart_G).nonzero().squeeze(1)  # after the first chunk there is hardly one
        if not left.numel():
            break
        mine, others = keys_GK[left], keys_GK[first : first + _CHUNK]
        known = known_matches(mine, others, images) & known_matches(others, mine, images).t()
        apart_G[left] = (~known).any(1)
    return apart_G | (keys_GK[:, _RANKED] > 0), apart_G


def _image_keys(batch: RaggedBatch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    names, source, images = parted(batch.dataset), batch.targets["source"].numpy(), batch.images.numpy()
    return _hashed(
        f"{names[of]}\0{image}".encode()
        for of, image in zip(source[rows].tolist(), images[rows].tolist(), strict=True)
    )  # fmt: skip


def _caption_keys(batch: RaggedBatch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    ids, cu = batch.input_ids.numpy(), batch.cu_text.numpy()
    return _hashed(ids[cu[row] : cu[row + 1]].tobytes() for row in rows.tolist())


def _hashed(things: Iterable[bytes]) -> NDArray[np.int64]:
    """63 bits: never negative."""
    digests = b"".join(hashlib.blake2b(thing, digest_size=8).digest() for thing in things)
    return np.frombuffer(digests, "<u8").astype(np.uint64).view(np.int64) & np.iinfo(np.int64).max
