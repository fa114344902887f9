"""SBU's captioned photographs as published: two text files of equally many rows, or one JSON file.

``SBU_captioned_photo_dataset_captions.txt`` with ``SBU_captioned_photo_dataset_urls.txt`` beside it (give the first),
or ``sbu-captions-all.json``: ``{"image_urls": [...], "user_ids": [...], "captions": [...]}``. The text's id is the
file's name and the number of the row, from 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError
from data_tools.formats.captions import caption
from data_tools.formats.json_stream import read_elements
from data_tools.formats.lines import file_size, read_lines
from data_tools.formats.numbered_lines import MAX_ROW, ROWS_PER_PART, row_starts
from data_tools.formats.urls import UrlNames, add_url_arguments
from data_tools.records import BadRow, TextRecord
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "SBU: SBU_captioned_photo_dataset_captions.txt with ..._urls.txt beside it, or sbu-captions-all.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_url_arguments(parser)


def open_source(options: argparse.Namespace) -> Sbu:
    """Open the files of ``options.sources``."""
    return Sbu(options.sources, UrlNames(options.image_id, options.image_map, options.sources))


class Sbu:
    """See the module."""

    paired = True

    def __init__(self, paths: Sequence[Path], names: UrlNames, rows_per_part: int = ROWS_PER_PART) -> None:
        self.paths = list(paths)
        self.names = names
        self.rows_per_part = rows_per_part

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`.

        Raises:
            VlscaleError: a file is missing, or the two text files have not equally many rows.
        """
        parts: list[dict[str, Any]] = []
        for number, path in enumerate(self.paths):
            if path.suffix == ".json":
                file_size(path)
                parts.append({"file": number})
                continue
            both = [row_starts(each, self.rows_per_part) for each in (path, urls_beside(path))]
            if both[0][1] != both[1][1]:
                raise VlscaleError(
                    f"{path}: has {both[0][1]} rows, but {urls_beside(path)} has {both[1][1]}; give the published "
                    f"files, whose rows belong together"
                )
            ends = [[*starts[1:], None] for starts, _ in both]
            for place, begins in enumerate(zip(both[0][0], both[1][0], strict=True)):
                ranges = [[begin, each[place]] for begin, each in zip(begins, ends, strict=True)]
                parts.append({"file": number, "ranges": ranges, "row": 1 + place * self.rows_per_part})
        return parts

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        path = self.paths[part["file"]]
        rows = _from_lines(path, part) if "ranges" in part else _from_json(path)
        for where, row, text, url in rows:
            try:
                image = self.names.image(row, url, path.stem)
                yield TextRecord(where, f"{path.stem}-{row}", caption("caption", text), (image,))
            except FieldError as error:
                yield error.at(where)


def urls_beside(path: Path) -> Path:
    """The file of addresses that belongs to a file of captions.

    Raises:
        VlscaleError: the name does not tell.
    """
    if "captions" not in path.name:
        raise VlscaleError(f"{path}: expected ..._captions.txt with ..._urls.txt beside it, or a .json file")
    return path.with_name(path.name.replace("captions", "urls"))


def _from_lines(path: Path, part: Mapping[str, Any]) -> Iterator[tuple[str, int, Any, Any]]:
    pair = [path, urls_beside(path)]
    ranges = [
        {"file": file, "begin": begin, "end": end, "row": part["row"]}
        for file, (begin, end) in enumerate(part["ranges"])
    ]
    captions, urls = (_by_row(pair, each) for each in ranges)
    row = part["row"]
    text, url = next(captions, None), next(urls, None)
    while text is not None or url is not None:  # blank rows are passed over by read_lines, in either file
        found = []
        for each in (text, url):
            found.append(each[1] if each is not None and each[0] == row else b"")
        if found != [b"", b""]:
            yield f"{path}: row {row}", row - 1, *found
        text = next(captions, None) if text is not None and text[0] == row else text
        url = next(urls, None) if url is not None and url[0] == row else url
        row += 1


def _by_row(paths: Sequence[Path], part: Mapping[str, Any]) -> Iterator[tuple[int, bytes]]:
    for line in read_lines(paths, part, MAX_ROW):
        if isinstance(line, BadRow):
            raise VlscaleError(f"{line}; rows of the two files would no longer belong together")
        assert line.row is not None
        yield line.row, line.data.rstrip(b"\r\n")


def _from_json(path: Path) -> Iterator[tuple[str, int, Any, Any]]:
    """Captions and addresses stand far apart in the file, which is therefore read twice at a time."""
    lists = [_entries(path, name) for name in ("captions", "image_urls")]
    nothing = object()
    row = -1
    for row, (text, url) in enumerate(zip_longest(*lists, fillvalue=nothing)):
        if text is nothing or url is nothing:
            raise VlscaleError(f"{path}: captions and image_urls have not equally many entries; the shorter has {row}")
        yield f"{path}: row {row + 1}", row, text, url
    if row < 0:
        raise VlscaleError(f"{path}: has no lists captions and image_urls; give SBU's sbu-captions-all.json")


def _entries(path: Path, name: str) -> Iterator[Any]:
    return (element for key, _, element in read_elements(path) if key == name)
