"""UNITER's text databases: an LMDB with JSON side files.

key = the example's id; value = an lz4 frame around a msgpack map with ``input_ids`` (word pieces without [CLS] and
[SEP]), ``img_fname`` (one image's file name, or a pair), often the raw annotation, and ``target`` where supervised.
What is not ids, image or words goes into ``extra``: VQA's and SNLI-VE's ``target`` (labels and scores), NLVR2's
``target``, VCR's ``input_ids_as``, ``input_ids_rs``, ``qa_target`` and ``qar_target``, the fields of referring
expressions. ``meta.json`` names the special ids, ``txt2img.json`` the images of records without ``img_fname``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import MAX_TEXT, FieldError, sentence, show, unpack_msgpack, whole_number, word
from data_tools.formats.lmdb_files import lmdb_parts, read_range
from data_tools.records import BadRow, TextRecord
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "UNITER's text LMDBs (pre-training, VQA, SNLI-VE, NLVR2, VCR, retrieval, referring expressions)"

PART_TEXTS = 1 << 15
MAX_RECORD = 16 << 20
MAX_SIDE_FILE = 2 << 30
WORDS = ("caption", "text", "sentence", "sent", "question", "hypothesis", "question_orig", "sentence2")
"""Fields of raw annotations that hold the words, in the order in which they are looked for."""
_SPECIAL = {"CLS": "cls", "SEP": "sep", "MASK": "mask", "UNK": "unk"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    parser.add_argument("--text-field", help=f"field of the annotation with the words (default: {', '.join(WORDS)})")


def open_source(options: argparse.Namespace) -> UniterTexts:
    """Open the databases of ``options.sources``: folders with ``data.mdb`` and ``meta.json``."""
    words = (options.text_field,) if options.text_field else WORDS
    return UniterTexts(tuple(options.sources), words)


@dataclass(frozen=True)
class UniterTexts:
    """See the module.

    Attributes:
        folders: the databases.
        words: fields that may hold the words.
    """

    folders: tuple[Path, ...]
    words: tuple[str, ...] = WORDS

    paired = True

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Compare the special ids and the range of ids in meta.json with a vocabulary.

        BERT's cased and uncased vocabularies have the same special ids; their ``v_range`` differs.

        Raises:
            VlscaleError: they differ, or meta.json is missing or damaged.
        """
        for folder in self.folders:
            path = folder / "meta.json"
            meta = read_object(path)
            tokenizer = meta.get("bert", meta.get("toker", meta.get("tokenizer", "an unnamed one")))
            found = {key: meta[key] for key in _SPECIAL if key in meta}
            expected = {key: getattr(vocabulary, role) for key, role in _SPECIAL.items() if key in found}
            if not found or found != expected:
                raise VlscaleError(
                    f"{path}: special ids {found}, but --tokenizer has {expected}; give the vocabulary of {tokenizer}"
                )
            _check_range(path, meta.get("v_range"), vocabulary, tokenizer)

    def parts(self) -> list[dict[str, Any]]:
        """Ranges of 32,768 keys."""
        return lmdb_parts(self.folders, PART_TEXTS, "folder")

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """Yield the records of a range, in the order of their keys."""
        folder = self.folders[part["folder"]]
        for key, value in read_range(part, folder):
            if key == b"__keys__":
                continue
            where = f"{folder}: key {key.decode('utf-8', 'backslashreplace')[:512]}"
            try:
                yield self._record(where, folder, word("key", key), value)
            except FieldError as error:
                yield error.at(where)

    def _record(self, where: str, folder: Path, name: str, value: bytes) -> TextRecord:
        row = plain(unpack_msgpack("record", decompress(value), 1 << 20), "record")
        if not isinstance(row, dict):
            raise FieldError("record", f"{show(row)} is no map")
        ids = row.pop("input_ids", None)
        if not isinstance(ids, list):
            raise FieldError("input_ids", f"{show(ids)} is not a list of integers")
        ids = [whole_number(f"input_ids[{place}]", each, 0, (1 << 24) - 1) for place, each in enumerate(ids)]
        images = self._images(folder, name, row.pop("img_fname", None))
        text = next((row.pop(field) for field in self.words if isinstance(row.get(field), str)), "")
        return TextRecord(where, name, sentence("text", text, MAX_TEXT), images, ids, row)

    def _images(self, folder: Path, name: str, value: Any) -> tuple[str, ...]:
        if value is None:
            value = self._txt2img(folder).get(name)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not 1 <= len(names) <= 16:
            raise FieldError("img_fname", f"{show(value)} names no image, and txt2img.json neither")
        return tuple(dict.fromkeys(word("img_fname", each) for each in names if each is not None))

    def _txt2img(self, folder: Path) -> dict[str, Any]:
        path = folder / "txt2img.json"
        if path not in self._opened:
            self._opened[path] = read_object(path) if path.exists() else {}
        found: dict[str, Any] = self._opened[path]
        return found

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        return {}


def _check_range(path: Path, span: Any, vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Compare ``v_range``: UNITER's scripts write the id of ``!`` and the number of word pieces.

    Where the vocabulary has been grown, that may be the number before.
    """
    if not (isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)):
        raise VlscaleError(f"{path}: v_range is {show(span)}, expected two integers; download it again")
    cure = f"give the vocabulary of {show(tokenizer)}"
    if not 0 <= span[0] < span[1] or span[1] not in (vocabulary.size, vocabulary.random_range[1]):
        raise VlscaleError(
            f"{path}: v_range {show(span)} does not fit the {vocabulary.size} word pieces of --tokenizer; {cure}"
        )
    if "!" in vocabulary.tokens and vocabulary.tokens.index("!") != span[0]:
        found = vocabulary.tokens.index("!")
        raise VlscaleError(f"{path}: v_range begins with '!' at {span[0]}, but --tokenizer has it at {found}; {cure}")


def decompress(value: bytes) -> bytes:
    """Undo an lz4 frame; never allocates much more than :data:`MAX_RECORD`."""
    try:
        from lz4.frame import LZ4FrameDecompressor
    except ImportError as error:
        raise VlscaleError(f"UNITER's texts need a package ({error}); pip install 'vlscale[import]'") from None
    decompressor = LZ4FrameDecompressor()
    try:
        found: bytes = decompressor.decompress(value, max_length=MAX_RECORD + 1)
    except (RuntimeError, EOFError, ValueError) as error:
        raise FieldError("record", f"is no lz4 frame ({' '.join(str(error).split())[:100]})") from None
    if len(found) > MAX_RECORD:
        raise FieldError("record", f"unpacks to more than {MAX_RECORD} bytes")
    if not decompressor.eof:
        raise FieldError("record", "is a truncated lz4 frame")
    return found


def plain(value: Any, field: str) -> Any:
    """Turn the bytes of unpacked msgpack into str, in maps and lists."""
    if isinstance(value, bytes):
        return sentence(field, value)
    if isinstance(value, dict):
        return {str(plain(key, field)): plain(item, str(plain(key, field))) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, field) for item in value]
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a side file.

    Raises:
        VlscaleError: it is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > MAX_SIDE_FILE:
            raise VlscaleError(f"{path}: larger than {MAX_SIDE_FILE} bytes")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise VlscaleError(f"{path}: cannot be read as JSON ({error}); restore the database's side files") from None
    if not isinstance(found, dict):
        raise VlscaleError(f"{path}: holds no JSON object; restore the database's side files")
    return found
