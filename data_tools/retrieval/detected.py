"""What a detector saw in an image: the classes of its regions, from ``extra`` or from ``classes/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.options import fraction
from data_tools.rewriting.reading import decode_rows
from vlscale.data.store import ClassStore, ImageStore
from vlscale.errors import VlscaleError

OBJECTS = "objects"
"""Field of ``extra`` in which the import tools keep a class, or its name, per region."""

CLASS_OPTIONS = ("--classes-from", "--class-probability")
"""What :func:`add_classes` adds."""

PROBABILITY = 0.2
_IMAGES = 64


def add_classes(group: Any) -> None:
    """Add the options of where classes are looked for."""
    group.add_argument(
        "--classes-from",
        metavar="FIELD",
        help="field of extra with a class per region (default: objects where images have it, or the best classes of "
        "classes/)",
    )
    group.add_argument(
        "--class-probability",
        type=fraction,
        default=PROBABILITY,
        metavar="P",
        help=f"least one of a best class in classes/ (default {PROBABILITY})",
    )


@dataclass(frozen=True)
class Detections:
    """Where classes are looked for; pickled into worker processes.

    Attributes:
        root: the dataset's folder.
        field: of ``extra``, which must be there; None: ``objects`` if it is there, otherwise ``classes/``.
        probability: least one of a region's best class in ``classes/``.
    """

    root: Path
    field: str | None = None
    probability: float = PROBABILITY

    def open(self) -> Detected:
        """Open the stores.

        Raises:
            VlscaleError: one is missing or damaged, or no image has the field.
        """
        return Detected(self)


class Detected:
    """The classes of the regions of images. The first images tell whether ``extra`` has them.

    Args:
        where: to look.

    Attributes:
        images: the images.
    """

    def __init__(self, where: Detections) -> None:
        folder = where.root / "images"
        if not folder.is_dir():
            raise VlscaleError(f"{folder}: is missing; import images into {where.root} first, or name another folder")
        self.images = ImageStore(folder)
        self._where = where
        self._classes = ClassStore(where.root / "classes") if (where.root / "classes").is_dir() else None
        if self._classes is not None and len(self._classes) != self.images.region_ptr.total:
            raise VlscaleError(
                f"{self._classes.folder}: {len(self._classes)} rows, but the images have "
                f"{self.images.region_ptr.total} regions; build it again"
            )
        first = self._of_extra(range(min(_IMAGES, len(self.images))))
        there = any(items is not None for items in first)
        if where.field is not None and first and not there:
            raise VlscaleError(
                f"{folder}: none of the first {len(first)} images has a list extra.{where.field}; name the field that "
                f"has a class per region with --classes-from, or leave it out"
            )
        self._spelled = any(isinstance(item, str) for items in first for item in items or [])
        # How the numbers of extra count is the detector's own affair; names in classes/ go with classes/.
        self._in_extra = there and (self._spelled or where.field is not None or self._names is None)

    @property
    def in_classes(self) -> bool:
        """They are the best classes of ``classes/``."""
        return self._classes is not None and not self._in_extra

    @property
    def known(self) -> bool:
        """Classes are known at all."""
        return self._in_extra or self._classes is not None

    @property
    def named(self) -> bool:
        """Classes have names, not only numbers."""
        return self._spelled if self._in_extra else self._names is not None

    @property
    def source(self) -> str:
        """Where the classes come from, for people."""
        what = "names" if self.named else "numbers"
        if self._in_extra:
            return f"{what} in extra.{self._field}"
        return "nowhere" if self._classes is None else f"{what} of the {self._classes.meta.num_classes} in classes/"

    def require_comparable(self, other: Detected) -> None:
        """Raise unless an equal class of both images means the same thing.

        Raises:
            VlscaleError: names here and numbers there, numbers of different places, or other classes.
        """
        same = self.named == other.named
        if self.in_classes and other.in_classes:
            assert self._classes is not None
            assert other._classes is not None
            mine, theirs = self._classes.meta, other._classes.meta
            same = (mine.num_classes, mine.class_names) == (theirs.num_classes, theirs.class_names)
        elif not self.named:
            same = same and self.in_classes == other.in_classes
        if not same:
            both = " (of other names)" if self.source == other.source else ""
            raise VlscaleError(
                f"{self.images.folder}: its classes are {self.source}, those of {other.images.folder} are "
                f"{other.source}{both}, and cannot be compared with them; name a field that both have with "
                f"--classes-from, or give --overlap 0"
            )

    @property
    def _field(self) -> str:
        return self._where.field or OBJECTS

    @property
    def _names(self) -> list[str] | None:
        return None if self._classes is None else self._classes.meta.class_names

    def classes(self, rows: Sequence[int]) -> list[list[str]]:
        """The different classes of each image, by name where that is known, otherwise by number; sorted.

        Raises:
            VlscaleError: a row is damaged.
        """
        found: list[list[str]] = []
        for begin in range(0, len(rows), _IMAGES):
            some = rows[begin : begin + _IMAGES]
            found += [sorted(set(each)) for each in (self._extra(some) if self._in_extra else self._best(some))]
        return found

    def _extra(self, rows: Sequence[int]) -> list[list[str]]:
        """By ``extra``; null is a region of no class."""
        return [
            [str(item) for item in items or [] if isinstance(item, (int, str)) and not isinstance(item, bool)]
            for items in self._of_extra(rows)
        ]

    def _of_extra(self, rows: Sequence[int]) -> list[list[Any] | None]:
        extras = (row["extra"] for row in decode_rows(self.images, rows, ("extra",)))
        values = [extra.get(self._field) if isinstance(extra, dict) else None for extra in extras]
        return [value if isinstance(value, list) else None for value in values]

    def _best(self, rows: Sequence[int]) -> list[list[str]]:
        """By the best class of each region in ``classes/``, if it is probable enough."""
        if self._classes is None:
            return [[] for _ in rows]
        images = np.asarray(rows, np.int64)
        counts = np.asarray(self.images.lengths[images], np.int32)
        regions = self.images.region_rows(images, counts)
        probs = self._classes.probs(regions)
        best, names = probs.argmax(1), self._names
        sure: NDArray[np.bool_] = probs[np.arange(len(best)), best] >= self._where.probability
        found, place = [], 0
        for count in counts.tolist():
            some = best[place : place + count][sure[place : place + count]].tolist()
            found.append([names[one] if names else str(one) for one in some])
            place += count
        return found
