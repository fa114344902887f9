"""Sources for tests of the builder: deterministic records, and faults where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.records import BadRow, ImageLayout, ImageRecord, TextRecord
from vlscale.data.schema import Vocabulary

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "g")
DIM, CLASSES = 6, 5


def image(number: int, name: str | None = None, regions: int | None = None) -> ImageRecord:
    """The record of image ``number``."""
    rng = np.random.default_rng(number)
    count = regions or 1 + number % 4
    low = rng.uniform(0, 0.4, (count, 2))
    probs = rng.random((count, CLASSES)).astype(np.float16)
    return ImageRecord(
        where=f"toy: row {number}",
        id=name or f"img{number}",
        width=100 + number,
        height=50,
        features=rng.standard_normal((count, DIM)).astype(np.float32),
        boxes=np.concatenate([low, low + 0.5], 1).astype(np.float32),
        conf=np.linspace(0.9, 0.1, count).astype(np.float32),
        class_probs=probs / 2,
        extra={"objects": list(range(count)), "note": "x" * (number % 7)},
    )


@dataclass(frozen=True)
class ToyImages:
    """``parts`` parts of ``rows`` images; ``faults`` maps a row to a fault, or to ``id:NAME`` for another id."""

    count: int = 4
    rows: int = 6
    faults: tuple[tuple[int, str], ...] = ()
    classes: bool = True

    description = "toy"

    def layout(self) -> ImageLayout:
        """All images share this."""
        return ImageLayout(DIM, "float32", CLASSES if self.classes else None)

    def parts(self) -> list[dict[str, Any]]:
        """Equal parts."""
        return [{"begin": number * self.rows} for number in range(self.count)]

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """Yield the records."""
        for number in range(part["begin"], part["begin"] + self.rows):
            fault = dict(self.faults).get(number, "")
            if fault == "bad":
                yield BadRow(f"toy: row {number}", "features[3]", "has the wrong length")
            elif fault.startswith("id:"):
                yield image(number, fault[3:])
            elif fault == "width":
                good = image(number)
                yield ImageRecord(good.where, good.id, 1, 1, good.features[:, :3], good.boxes)
            else:
                yield image(number)


@dataclass(frozen=True)
class ToyTexts:
    """``count`` parts of ``rows`` texts, whose images jump about; ``faults`` as above."""

    count: int = 3
    rows: int = 8
    images: int = 24
    faults: tuple[tuple[int, str], ...] = ()
    paired: bool = True

    def parts(self) -> list[dict[str, Any]]:
        """Equal parts."""
        return [{"begin": number * self.rows} for number in range(self.count)]

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """Yield the records."""
        for number in range(part["begin"], part["begin"] + self.rows):
            fault = dict(self.faults).get(number, "")
            name = fault[3:] if fault.startswith("id:") else f"txt{number}"
            images: tuple[str, ...] = (f"img{number * 7 % self.images}",) if self.paired else ()
            if fault == "two" and self.paired:
                images += (f"img{(number * 7 + 1) % self.images}",)
            if fault == "none":
                images = ()
            if fault == "missing":
                images = ("nowhere",)
            text = "" if fault == "empty" else "abcdefg"[: 1 + number % 7]
            yield TextRecord(f"toy: line {number}", name, text, images, None, {"n": number})


@dataclass(frozen=True)
class ToyTokenizer:
    """One token per letter."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the letters."""
        return Vocabulary.from_tokens(WORDS)

    def encode(self, text: str) -> list[int]:
        """Ids of the letters."""
        return [WORDS.index(letter) for letter in text]

    def to_json(self) -> str | None:
        """No file."""
        return '{"toy": true}'


def tree(root: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
