"""Karpathy's splits: ``dataset_coco.json``, ``dataset_flickr30k.json``, ``dataset_flickr8k.json``.

``{"images": [{"filename", "split", "sentences": [{"raw", "sentid"}], "cocoid", "filepath", ...}], "dataset"}``. The
text's id is its ``sentid``; ``extra`` gets ``split``. Read piece by piece, one part per file.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, show, word
from data_tools.formats.captions import ImageNames, add_image_id_argument, caption, mapping, member, stem
from data_tools.formats.json_stream import read_elements
from data_tools.formats.lines import file_size
from data_tools.records import BadRow, TextRecord
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "Karpathy's splits: dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json"
FIELDS = ("id", "file", "stem", "folder", "source")
SPLITS = ("train", "restval", "val", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_image_id_argument(
        parser, "{id} (COCO's number, else the file's stem), {file}, {stem}, {folder} (train2014), {source}"
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        action="append",
        default=[],
        help="take this split (may be repeated; default: all; UNITER pre-trains on train and restval)",
    )


def open_source(options: argparse.Namespace) -> Karpathy:
    """Open the files of ``options.sources``."""
    return Karpathy(options.sources, ImageNames(options.image_id, FIELDS), options.split)


class Karpathy:
    """See the module; no ``splits`` means all."""

    paired = True

    def __init__(self, paths: Sequence[Path], names: ImageNames, splits: Collection[str] = ()) -> None:
        self.paths = list(paths)
        self.names = names
        self.splits = frozenset(splits or SPLITS)

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`: one per file."""
        for path in self.paths:
            file_size(path)
        return [{"file": number} for number in range(len(self.paths))]

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        path = self.paths[part["file"]]
        found = False
        for key, index, element in read_elements(path):
            if key == "images":
                found = True
                yield from self._image(path, f"{path}: images[{index}]", element)
        if not found:
            raise VlscaleError(f"{path}: has no list of images; give Karpathy's dataset_*.json")

    def _image(self, path: Path, where: str, element: Any) -> Iterator[TextRecord | BadRow]:
        try:
            row = mapping("", element)
            split = member(row, "split")
            if split not in SPLITS:
                raise FieldError("split", f"{show(split)} is none of {', '.join(SPLITS)}")
            if split not in self.splits:
                return
            file = word("filename", member(row, "filename"))
            values = {
                "id": row.get("cocoid", stem(file)),
                "file": file,
                "stem": stem(file),
                "folder": row.get("filepath"),
                "source": path.stem,
            }
            image = self.names.name("cocoid" if "cocoid" in row else "filename", values)
            sentences = member(row, "sentences")
            if not isinstance(sentences, list):
                raise FieldError("sentences", f"{show(sentences)} is not a list")
        except FieldError as error:
            yield error.at(where)
            return
        for index, sentence in enumerate(sentences):
            place = f"{where}.sentences[{index}]"
            try:
                text = mapping("", sentence)
                name = word("sentid", member(text, "sentid"))
                yield TextRecord(place, name, caption("raw", member(text, "raw")), (image,), None, {"split": split})
            except FieldError as error:
                yield error.at(place)
