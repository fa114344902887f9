"""What an importer hands to the builder: images and texts, however the source spells them, and rows that are bad.

A source is divided into parts by itself, so that parts can be read side by side, by several machines, and again after a
kill: the same source always gives the same parts, and a part always the same records in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image of R regions, best regions first.

    Attributes:
        where: file and row, line or key that it comes from; errors begin with it.
        id: unique name of the image.
        width, height: of the image in pixels; 1 and 1 where the source does not say.
        features: float16 or float32 [R, D], in the source's dtype.
        boxes: float32 [R, 4], (x1, y1, x2, y2) in 0..1 of width and height.
        conf: float32 [R], detection confidences, or None.
        class_probs: float16 or float32 [R, C], class probabilities, or None.
        extra: task fields, JSON types (for example ``objects`` and ``attributes``, one per region).
    """

    where: str
    id: str
    width: int
    height: int
    features: NDArray[Any]
    boxes: NDArray[np.float32]
    conf: NDArray[np.float32] | None = None
    class_probs: NDArray[Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TextRecord:
    """One text that refers to 0..k images.

    Attributes:
        where: file and row, line or key that it comes from; errors begin with it.
        id: unique name of the text.
        text: as people read it; may be empty if ``input_ids`` is given and the source has no words.
        images: ids of the images it refers to.
        input_ids: word pieces without [CLS] and [SEP], where the source has tokenized already; else None. A text of
            several segments has a [SEP] between them.
        extra: task fields, JSON types.
        type_ids: type of each of ``input_ids``, from a source that :class:`HasTypes`; None: all 0.
    """

    where: str
    id: str
    text: str
    images: tuple[str, ...] = ()
    input_ids: Sequence[int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    type_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: ``--on-error stop`` ends with it, ``--on-error skip`` counts and lists it.

    Attributes:
        where: file and row, line or key.
        field: the field that is wrong, or ``""``.
        why: what was found and what was expected.
    """

    where: str
    field: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field + ': ' if self.field else ''}{self.why}"


@dataclass(frozen=True)
class ImageLayout:
    """What all images of a source share: width D and dtype of the features; classes C, their names and dtype if any."""

    feature_dim: int
    feature_dtype: str
    num_classes: int | None = None
    class_dtype: str = "float16"
    class_names: tuple[str, ...] | None = None


class ImageSource(Protocol):
    """A foreign set of image features."""

    description: str
    """Free text for images/meta.json: what computed the features."""

    def layout(self) -> ImageLayout:
        """Look at the source's beginning and say what all its images share."""
        ...

    def parts(self) -> list[dict[str, Any]]:
        """Divide the source into parts of some thousand images: plain JSON, enough for :meth:`read` to find them."""
        ...

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """Yield the records of a part; memory does not grow with the part."""
        ...


class TextSource(Protocol):
    """A foreign set of texts."""

    paired: bool
    """Texts refer to images, and are therefore sorted by them; a corpus of texts alone is streamed."""

    def parts(self) -> list[dict[str, Any]]:
        """See :meth:`ImageSource.parts`."""
        ...

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :meth:`ImageSource.read`."""
        ...


@runtime_checkable
class HasTypes(Protocol):
    """A source of texts with segments, whose types are 0..num_types-1."""

    num_types: int


def num_types_of(source: TextSource) -> int:
    """Kinds of segments that a source's texts have; 1: none."""
    return source.num_types if isinstance(source, HasTypes) else 1
