"""What the caption formats have in common: captions, and how an annotation's image is called in the images store."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from string import Formatter
from typing import Any

from data_tools.formats.arrays import FieldError, sentence, show, whole_number, word
from vlscale.errors import VlscaleError

_SPEC = re.compile("(0?[1-9][0-9]?d)?")
_ESCAPED = re.compile("[\udc80-\udcff]")


def caption(field: str, value: Any) -> str:
    """Read a caption: UTF-8, and something besides blanks; blanks around it are taken off."""
    if isinstance(value, str) and (found := _ESCAPED.search(value)):
        raise FieldError(field, f"is not UTF-8 at character {found.start()} (byte {ord(found[0]) & 0xFF:#x})")
    text = sentence(field, value).strip()
    if not text:
        raise FieldError(field, "is empty")
    return text


def mapping(field: str, value: Any) -> Mapping[str, Any]:
    """Read a JSON object."""
    if not isinstance(value, dict):
        raise FieldError(field, f"{show(value)} is not a JSON object")
    return value


def member(row: Mapping[str, Any], field: str) -> Any:
    """Return a field of a JSON object, which must have it."""
    if field not in row:
        raise FieldError(field, "is missing")
    return row[field]


class ImageNames:
    """Turns what an annotation says of its image into the image's id in the images store.

    Args:
        template: text with ``{name}`` or ``{name:012d}`` for the names in ``fields``.
        fields: names that may be used.
        option: where the template comes from, for errors.

    Raises:
        VlscaleError: the template uses another name, or another way to spell a number.
    """

    def __init__(self, template: str, fields: Sequence[str], option: str = "--image-id") -> None:
        expected = f"use {', '.join('{' + each + '}' for each in fields)}, numbers also as {{id:012d}}"
        try:
            self._pieces = list(Formatter().parse(template))
        except ValueError as error:
            raise VlscaleError(f"{option} {template!r}: {error}; {expected}") from None
        for _, name, spec, conversion in self._pieces:
            if name is not None and (name not in fields or conversion or not _SPEC.fullmatch(spec or "")):
                raise VlscaleError(f"{option} {template!r}: {{{name}}} is not known; {expected}")
        self.uses = frozenset(name for _, name, _, _ in self._pieces if name)
        if not self.uses:
            raise VlscaleError(f"{option} {template!r}: names the same image for every caption; {expected}")

    def name(self, field: str, values: Mapping[str, Any]) -> str:
        """Return the image's id.

        Args:
            field: of the annotation, for errors.
            values: by name; a name that is missing makes a bad row.
        """
        found = []
        for literal, name, spec, _ in self._pieces:
            found.append(literal)
            if name is None:
                continue
            value = values.get(name)
            if value is None:
                raise FieldError(field, f"{{{name}}} is not known for this image")
            if spec:
                found.append(format(whole_number(field, value, 0, (1 << 62) - 1), spec))
            else:
                found.append(word(field, value))
        return word(field, "".join(found))


def add_image_id_argument(parser: argparse.ArgumentParser, fields: str, default: str = "{id}") -> None:
    """Add ``--image-id``; ``fields`` describes the names that it may use."""
    parser.add_argument(
        "--image-id",
        default=default,
        metavar="TEMPLATE",
        help=f"the image's id in the images store (default {default}), from {fields}; "
        "for example coco_train2014_{id:012d}.npz",
    )


def stem(name: str) -> str:
    """A file's name without folders and suffix."""
    return PurePosixPath(name).stem
