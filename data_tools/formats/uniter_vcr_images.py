"""UNITER's image databases of VCR: of each image the ground-truth boxes, followed by the detected ones, as one image.

The two lie in two databases, and the texts name a file of each. Joined once, when the store is built, an image is one
row like any other: plan, loader and objectives need to know nothing of it, and the texts of
:mod:`data_tools.formats.uniter_vcr_texts` refer to it by :func:`joined_id`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import BoxRule, FieldError, add_box_arguments, box_rule
from data_tools.formats.lmdb_files import lmdb_parts, read_range, read_value
from data_tools.formats.uniter_images import KEYS, PART_IMAGES, UniterImages, find_lmdb, where_of
from data_tools.formats.uniter_texts import UniterTexts
from data_tools.records import BadRow, ImageLayout, ImageRecord
from vlscale.errors import VlscaleError

KIND = "images"
HELP = "UNITER's image LMDBs of VCR, sources GT DETECTED [GT DETECTED ...]: both sets of boxes as one image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    parser.add_argument(
        "--texts",
        type=Path,
        action="append",
        required=True,
        metavar="TXT_DB",
        help="text database that says which files belong together; images that it does not name are left out",
    )
    parser.add_argument("--gt-variant", help="sub-folder of GT to read where there are several, e.g. feat_numbb100")
    parser.add_argument("--variant", help="sub-folder of DETECTED, e.g. feat_th0.2_max100_min10")
    add_box_arguments(parser)


def open_source(options: argparse.Namespace) -> VcrImages:
    """Open the databases of ``options.sources``, two by two.

    Raises:
        VlscaleError: a source is missing, or confidences are to choose regions.
    """
    sources = options.sources
    if len(sources) % 2:
        raise VlscaleError(f"{len(sources)} sources, expected pairs: ground-truth boxes, then detected ones of a split")
    if options.min_confidence is not None:
        raise VlscaleError(
            "--min-confidence would count ground-truth boxes too: choose detected ones by --variant, for example "
            "--variant feat_th0.2_max100_min10"
        )
    truth = tuple(find_lmdb(path, options.gt_variant, "--gt-variant") for path in sources[::2])
    detected = tuple(find_lmdb(path, options.variant) for path in sources[1::2])
    return VcrImages(truth, detected, tuple(options.texts), box_rule(options))


def joined_id(truth: str, detected: str) -> str:
    """Name of the image that is joined of two files."""
    return f"{truth}+{detected}"


@dataclass(frozen=True)
class VcrImages:
    """See the module.

    Attributes:
        truth: LMDBs of ground-truth boxes.
        detected: LMDBs of detected boxes, one for each of ``truth``.
        texts: text databases that name the files that belong together.
        rule: how boxes are checked.
    """

    truth: tuple[Path, ...]
    detected: tuple[Path, ...]
    texts: tuple[Path, ...]
    rule: BoxRule

    description = (
        "UNITER image databases of VCR, ground-truth boxes followed by detected ones (bottom-up attention: Faster "
        "R-CNN ResNet-101, Visual Genome)"
    )

    def layout(self) -> ImageLayout:
        """See :class:`~data_tools.records.ImageSource`.

        Raises:
            VlscaleError: the features or classes of the databases differ.
        """
        first, second = (UniterImages(folders, None, self.rule).layout() for folders in (self.truth, self.detected))
        if first != second:
            raise VlscaleError(
                f"{self.truth[0]} and {self.detected[0]} cannot be joined: {_spelt(first)} against {_spelt(second)}; "
                f"give databases of one detector"
            )
        return first

    def parts(self) -> list[dict[str, Any]]:
        """Ranges of keys of the ground-truth databases."""
        return lmdb_parts(self.truth, PART_IMAGES, "folder")

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """Yield the joined images of a range, in the order of the ground truth's keys."""
        truth, detected = self.truth[part["folder"]], self.detected[part["folder"]]
        for key, value in read_range(part, truth):
            if key == KEYS:
                continue
            for other in self._partners.get(key.decode("utf-8", "replace"), ()):
                try:
                    yield self._joined(truth, key, value, detected, other)
                except FieldError as error:
                    yield error.at(where_of(truth, key))

    def _joined(self, truth: Path, key: bytes, value: bytes, detected: Path, other: str) -> ImageRecord:
        source = self._databases
        found = read_value(detected, other.encode())
        if found is None:
            raise FieldError("img_fname", f"a text pairs it with {other!r}, which {detected} does not have")
        first = source.record(truth, key, value)
        try:
            second = source.record(detected, other.encode(), found)
        except FieldError as error:
            raise FieldError(error.field, f"of {other!r}: {error.why}") from None
        count = len(first.features)
        return replace(
            first,
            id=joined_id(first.id, second.id),
            features=_rows("features", first.features, second.features),
            boxes=np.concatenate([first.boxes, second.boxes]),
            conf=np.concatenate([_confidences(first), _confidences(second)]),
            class_probs=_probabilities(first.class_probs, second.class_probs),
            extra={"ground_truth": count},
        )

    @cached_property
    def _databases(self) -> UniterImages:
        return UniterImages((*self.truth, *self.detected), None, self.rule)

    @cached_property
    def _partners(self) -> dict[str, tuple[str, ...]]:
        """File of ground-truth boxes -> files of detected boxes that texts name with it, mostly one."""
        found: dict[str, dict[str, None]] = {}
        texts = UniterTexts(self.texts)
        for part in texts.parts():
            for record in texts.read(part):
                if not isinstance(record, BadRow) and len(record.images) == 2:  # what is bad, the texts' import tells
                    found.setdefault(record.images[0], {})[record.images[1]] = None
        if not found:
            raise VlscaleError(f"{self.texts[0]}: no text names files of ground-truth and detected boxes; is it VCR's?")
        return {truth: tuple(detected) for truth, detected in found.items()}


def _spelt(layout: ImageLayout) -> str:
    classes = "no classes" if layout.num_classes is None else f"{layout.num_classes} classes {layout.class_dtype}"
    return f"{layout.feature_dtype} [{layout.feature_dim}], {classes}"


def _rows(field: str, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """All rows of two arrays, which may differ in nothing but their number."""
    if one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
        raise FieldError(
            field, f"{one.dtype} {list(one.shape)} against {other.dtype} {list(other.shape)} detected ones"
        )
    return np.concatenate([one, other])


def _confidences(record: ImageRecord) -> NDArray[np.float32]:
    return np.ones(len(record.features), np.float32) if record.conf is None else record.conf


def _probabilities(one: NDArray[Any] | None, other: NDArray[Any] | None) -> NDArray[Any] | None:
    """Class probabilities of all regions; None, which the builder refuses where it wants them, if some lack them."""
    return None if one is None or other is None else _rows("soft_labels", one, other)
