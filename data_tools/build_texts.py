"""One part of a text import: the source's texts, tokenized; spooled where they refer to images, else as a store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.build_images import MAX_ID, dropped_line, reason
from data_tools.exclusion import is_excluded
from data_tools.image_rows import ImageRows
from data_tools.records import BadRow, TextRecord, TextSource, num_types_of
from data_tools.spool import NO_IMAGE, SpooledText, SpoolWriter
from data_tools.under_way import counted
from vlscale.data.schema import Vocabulary
from vlscale.data.store_writer import TextWriter
from vlscale.errors import VlscaleError

MAX_TEXT = 1 << 20
_BINS = (0, 8, 16, 32, 64, 128, 256, 512)


class Tokenizer(Protocol):
    """What turns texts into word pieces."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ...

    def to_json(self) -> str | None:
        """Content of a ``tokenizer.json``, if it has one."""
        ...


@dataclass
class Counts:
    """What happened to the texts of a part."""

    rows: int = 0
    tokens: int = 0
    excluded: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    histogram: Counter[str] = field(default_factory=Counter)

    def add(self, tokens: int) -> None:
        """Count a text of this many tokens."""
        self.rows += 1
        self.tokens += tokens
        self.histogram[str(next((high for high in _BINS[1:] if tokens <= high), 1 << 20))] += 1

    def result(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "excluded": self.excluded,
            "dropped": dict(self.reasons),
            "token histogram": dict(self.histogram),
        }


class TextBuilder:
    """Builds parts of a text import; see :class:`data_tools.parts.PartBuilder`.

    Args:
        open_source: opens the source; called once in each process, and pickled into it.
        load_tokenizer: loads the tokenizer, in the same way.
        images: folder of :func:`data_tools.image_rows.index_images`; None where texts refer to no images.
        skip: count and list bad rows; otherwise the first one ends the build.
        excluded: file with one image id a line; texts of these images are left out without further notice.
    """

    def __init__(
        self,
        open_source: Callable[[], TextSource],
        load_tokenizer: Callable[[], Tokenizer],
        images: Path | None,
        skip: bool,
        excluded: Path | None = None,
    ) -> None:
        self.open_source = open_source
        self.load_tokenizer = load_tokenizer
        self.images = images
        self.skip = skip
        self.excluded_file = excluded

    def __getstate__(self) -> dict[str, Any]:
        opened = ("source", "tokenizer", "image_rows", "excluded")
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    @cached_property
    def source(self) -> TextSource:
        """The opened source."""
        return self.open_source()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The loaded tokenizer."""
        return self.load_tokenizer()

    @cached_property
    def image_rows(self) -> ImageRows | None:
        """Image id -> row."""
        return None if self.images is None else ImageRows(self.images)

    @cached_property
    def excluded(self) -> frozenset[str]:
        """Ids of images whose texts are left out."""
        if self.excluded_file is None:
            return frozenset()
        return frozenset(self.excluded_file.read_text(encoding="utf-8").split("\n"))

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write the part's texts and ``dropped.jsonl`` into ``folder``."""
        counts = Counts()
        with ExitStack() as stack:
            dropped = stack.enter_context((folder / "dropped.jsonl").open("w", encoding="utf-8"))
            write = self._spool(stack, folder) if self.images is not None else self._store(stack, folder)
            for record in counted(self.source.read(part)):
                found = record if isinstance(record, BadRow) else self._prepare(record, counts)
                if isinstance(found, SpooledText):
                    write(found)
                    counts.add(len(found.input_ids))
                elif isinstance(found, BadRow):
                    if not self.skip:
                        raise VlscaleError(f"{found}; --on-error skip leaves such rows out and lists them")
                    counts.reasons[reason(found)] += 1
                    dropped.write(dropped_line(found))
        return counts.result()

    def _spool(self, stack: ExitStack, folder: Path) -> Callable[[SpooledText], None]:
        spool = stack.enter_context(SpoolWriter(folder))
        rows = self.image_rows
        assert rows is not None
        return lambda text: spool.write(text, rows[text.images[0]] if text.images else NO_IMAGE)

    def _store(self, stack: ExitStack, folder: Path) -> Callable[[SpooledText], None]:
        tokenizer = self.tokenizer
        writer = stack.enter_context(
            TextWriter(folder, tokenizer.vocabulary, {}, tokenizer.to_json(), num_types=num_types_of(self.source))
        )
        return lambda text: _write(writer, text)

    def _prepare(self, record: TextRecord, counts: Counts) -> SpooledText | BadRow | None:
        """Tokenize a text and check it; None where its image is excluded."""
        if any(is_excluded(image, self.excluded) for image in record.images):
            counts.excluded += 1
            return None
        problem = self._problem(record)
        if problem:
            return BadRow(record.where, *problem)
        given = self.tokenizer.encode(record.text) if record.input_ids is None else record.input_ids
        ids = _as_ids(given)
        size = self.tokenizer.vocabulary.size
        name = "text" if record.input_ids is None else "input_ids"
        if ids is None or not len(ids):
            return BadRow(record.where, name, "no word pieces" if ids is not None else "not a list of integers")
        if ids.min() < 0 or ids.max() >= size:
            return BadRow(record.where, name, f"ids span {ids.min()}..{ids.max()}, the vocabulary has 0..{size - 1}")
        types = None
        if record.type_ids is not None:
            kinds, most = _as_ids(record.type_ids), num_types_of(self.source) - 1
            if kinds is None or len(kinds) != len(ids) or kinds.min() < 0 or kinds.max() > most:
                return BadRow(record.where, "type_ids", f"are not {len(ids)} integers in 0..{most}")
            types = kinds.astype(np.int32)
        images, pieces = tuple(record.images), ids.astype(np.int32)
        return SpooledText(record.where, record.id, record.text, images, pieces, record.extra, types)

    def _problem(self, record: TextRecord) -> tuple[str, str] | None:
        if not record.id or len(record.id) > MAX_ID:
            return "id", f"has {len(record.id)} characters, expected 1 to {MAX_ID}"
        if len(record.text) > MAX_TEXT:
            return "text", f"has {len(record.text)} characters, at most {MAX_TEXT} are allowed"
        if not _is_unicode((record.id, record.text, *record.images)):
            return "text", "is not Unicode (half a surrogate pair)"
        if len(set(record.images)) != len(record.images):
            return "images", f"{list(record.images)} names an image twice"
        rows = self.image_rows
        if rows is None:
            return ("images", "names an image, but the corpus is imported as texts alone") if record.images else None
        missing = next((image for image in record.images if image not in rows), None)
        if missing is not None:
            return "images", f"refers to image {missing!r}, which the images store does not have"
        try:
            json.dumps(dict(record.extra), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            return "extra", f"is not JSON ({error})"
        return None


def _write(writer: TextWriter, text: SpooledText) -> None:
    writer.write(text.id, text.text, text.input_ids, text.images, text.extra, text.type_ids)


def _as_ids(values: Any) -> NDArray[np.int64] | None:
    try:
        ids = np.asarray(values)
    except ValueError:
        return None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        return None
    return ids.astype(np.int64)


def _is_unicode(texts: Iterable[str]) -> bool:
    try:
        for text in texts:
            text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
