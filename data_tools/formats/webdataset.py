"""WebDataset: tar files in which ``000.jpg`` and ``000.txt`` (or ``000.json``) belong together (img2dataset's output).

A sample is what stands together and has the same name up to the first dot of its last part, its key. The caption is the
``.txt``, or a field of the ``.json`` (a text, or a list of texts). ``python -m data_tools.unpack_images`` puts the
pictures of the same files into a folder for ``extract_regions``, under the ids that the captions refer to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.formats.arrays import MAX_TEXT, FieldError, sentence, word
from data_tools.formats.captions import ImageNames, add_image_id_argument, caption, mapping, member
from data_tools.formats.lines import file_size
from data_tools.formats.tar_files import Member, read_member, read_members
from data_tools.records import BadRow, TextRecord
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "WebDataset tar files: captions in .txt or .json beside pictures"
FIELDS = ("key", "stem", "source")
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp")


@dataclass(frozen=True)
class Sample:
    """Members with one key; ``members`` maps a suffix (without its dot, lower case) to its member."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def picture(self) -> tuple[str, Member] | None:
        """Suffix and member of the picture, if there is one."""
        return next(((suffix, self.members[suffix]) for suffix in PICTURES if suffix in self.members), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_name_argument(parser)
    parser.add_argument("--field", default="caption", help="of the .json, where there is no .txt (default caption)")


def add_name_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--image-id``, which ``unpack_images`` has too."""
    add_image_id_argument(
        parser, "{key} (the sample's name), {stem} (its last part), {source} (the tar's name)", "{key}"
    )


def open_source(options: argparse.Namespace) -> WebDataset:
    """Open the files of ``options.sources``."""
    return WebDataset(options.sources, ImageNames(options.image_id, FIELDS), options.field)


def image_id(names: ImageNames, path: Path, sample: Sample) -> str:
    """The id of a sample's picture.

    Raises:
        FieldError: it has none.
    """
    values = {"key": sample.key, "stem": sample.key.rpartition("/")[2], "source": path.stem}
    return names.name("key", values)


def read_samples(path: Path, stream: BinaryIO) -> Iterator[Sample | BadRow]:
    """Yield the samples of an open tar file, and its bad members.

    Raises:
        VlscaleError: see :func:`data_tools.formats.tar_files.read_members`.
    """
    sample: Sample | None = None
    for found in read_members(path, stream):
        if isinstance(found, BadRow):
            yield found
            continue
        folder, _, last = found.name.rpartition("/")
        stem, _, suffix = last.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not stem or not suffix:
            continue
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if suffix.lower() in sample.members:
            yield BadRow(found.where, "name", "stands there twice")
            continue
        sample.members[suffix.lower()] = found
    if sample is not None:
        yield sample


class WebDataset:
    """See the module."""

    paired = True

    def __init__(self, paths: Sequence[Path], names: ImageNames, field: str = "caption") -> None:
        self.paths = list(paths)
        self.names = names
        self.field = field

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`: one per tar."""
        for path in self.paths:
            file_size(path)
        return [{"file": number} for number in range(len(self.paths))]

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        path = self.paths[part["file"]]
        try:
            with path.open("rb") as stream:
                for sample in read_samples(path, stream):
                    if isinstance(sample, BadRow):
                        yield sample
                    else:
                        yield from self._texts(path, stream, sample)
        except OSError as error:
            raise VlscaleError(f"{path}: cannot be read ({error.strerror})") from None

    def _texts(self, path: Path, stream: BinaryIO, sample: Sample) -> Iterator[TextRecord | BadRow]:
        where = f"{path}: sample {sample.key!r}"
        try:
            if sample.picture is None:
                raise FieldError("image", f"there is no picture with it ({', '.join(PICTURES)})")
            image = image_id(self.names, path, sample)
            name, captions = self._captions(stream, sample)
            for number, text in enumerate(captions):
                yield TextRecord(where, f"{image}-{number}", caption(name, text), (image,))
        except FieldError as error:
            yield error.at(where)

    def _captions(self, stream: BinaryIO, sample: Sample) -> tuple[str, list[Any]]:
        if "txt" in sample.members:
            return "txt", [sentence("txt", _content("txt", stream, sample.members["txt"]))]
        if "json" not in sample.members:
            raise FieldError("caption", "there is no .txt and no .json with it")
        content = sentence("json", _content("json", stream, sample.members["json"]))
        try:
            found = member(mapping("json", json.loads(content)), self.field)
        except (ValueError, RecursionError) as error:
            raise FieldError("json", f"is not JSON ({str(error)[:80]})") from None
        return self.field, found if isinstance(found, list) else [found]


def _content(name: str, stream: BinaryIO, found: Member) -> bytes:
    try:
        return read_member(stream, found, MAX_TEXT)
    except FieldError as error:
        raise FieldError(name, error.why) from None


def safe_name(name: str) -> str:
    """A picture's id as a path inside a folder.

    Raises:
        FieldError: it would leave the folder.
    """
    pieces = word("image id", name).split("/")
    if not all(pieces) or any(piece.startswith(".") for piece in pieces) or "\\" in name:
        raise FieldError("image id", f"{name!r} is not a plain path inside the folder")
    return "/".join(pieces)
