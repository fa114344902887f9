"""Captions whose images have only an address: what Conceptual Captions and SBU have in common.

Such an image is named by the number of its row, by the file in its address, or by a map from addresses to image ids,
which whoever downloaded the images can write.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from data_tools.formats.arrays import FieldError, sentence, show
from data_tools.formats.captions import ImageNames, add_image_id_argument, stem
from data_tools.formats.numbered_lines import NameMap
from vlscale.errors import VlscaleError

FIELDS = ("id", "file", "stem", "source")
MAX_URL = 1 << 16


def add_url_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how images are called; :class:`UrlNames` reads them."""
    add_image_id_argument(
        parser,
        "{id} (number of the row, from 0; {id:09d} is what img2dataset names its files by), {file} and {stem} of the "
        "address, {source} (the file's name)",
    )
    parser.add_argument(
        "--image-map", type=Path, metavar="FILE", help="rows of address, tab, image id; instead of --image-id"
    )


class UrlNames:
    """Turns row and address into the image's id.

    Args:
        template: see :class:`data_tools.formats.captions.ImageNames`.
        image_map: file of :class:`data_tools.formats.numbered_lines.NameMap`, or None.
        sources: the files; more than one need a template that tells their rows apart.

    Raises:
        VlscaleError: the template is wrong, or does not tell several files apart.
    """

    def __init__(self, template: str, image_map: Path | None, sources: Sequence[Path]) -> None:
        self._names = ImageNames(template, FIELDS)
        self._map = image_map
        if image_map is None and len(sources) > 1 and not self._names.uses & {"source", "file", "stem"}:
            raise VlscaleError(
                f"--image-id {template!r}: rows of {len(sources)} files have the same numbers; use {{source}} in it, "
                f"or import the files one by one"
            )

    @cached_property
    def _mapped(self) -> NameMap:
        assert self._map is not None
        return NameMap(self._map)

    def image(self, row: int, url: bytes | str, source: str) -> str:
        """Return the id of the image in row ``row`` (from 0).

        Raises:
            FieldError: the address is none, or not in the map.
        """
        address = sentence("url", url, MAX_URL).strip()
        if not address_path(address):
            raise FieldError("url", f"{show(address)} is not an address")
        if self._map is not None:
            found = self._mapped.get(address)
            if found is None:
                raise FieldError("url", f"{show(address, 80)} is not in {self._map.name}")
            return found
        file = address_path(address).rpartition("/")[2]
        return self._names.name("url", {"id": row, "file": file, "stem": stem(file), "source": source})


def address_path(address: str) -> str:
    """The path of an http or https address (``/`` if it has none); empty if it is no such address."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return (parts.path or "/") if parts.scheme in ("http", "https") and parts.netloc else ""
