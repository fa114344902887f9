"""Parquet: one document a row, in a column of strings (``text``). A part is a row group."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.formats.arrays import FieldError, sentence
from data_tools.formats.corpus import MAX_DOCUMENT, Corpus, Packing, add_packing_arguments, packing_of
from data_tools.formats.lines import file_size
from data_tools.packing_texts import Piece
from data_tools.records import BadRow
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "Parquet, a document a row"
MAX_GROUP = 8 << 30
"""Bytes that the column may have, unpacked, in one row group."""
_BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_packing_arguments(parser)
    parser.add_argument("--field", default="text", help="column that holds the text (default text)")


def open_source(options: argparse.Namespace) -> ParquetTexts:
    """Open the files of ``options.sources``."""
    return ParquetTexts(options.sources, packing_of(options, open_source), options.field)


class ParquetTexts(Corpus):
    """See the module."""

    def __init__(self, paths: Sequence[Path], packing: Packing, field: str = "text") -> None:
        super().__init__(paths, packing)
        self.field = field

    def divide(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.formats.corpus.Corpus`.

        Raises:
            VlscaleError: a file is not Parquet, has no such column of strings, or unpacks to too much.
        """
        parts: list[dict[str, Any]] = []
        for number, path in enumerate(self.paths):
            file_size(path)
            try:
                with pq.ParquetFile(path) as file:
                    self._check(path, file)
                    row = 0
                    for group in range(file.metadata.num_row_groups):
                        parts.append({"file": number, "group": group, "row": row})
                        row += file.metadata.row_group(group).num_rows
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _damaged(path, error) from None
        if not parts:
            raise VlscaleError(f"{self.paths[0]}: has no rows")
        return parts

    def _check(self, path: Path, file: pq.ParquetFile) -> None:
        schema = file.schema_arrow
        kind = schema.field(self.field).type if self.field in schema.names else None
        if kind is not None and pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()):
            raise VlscaleError(f"{path}: {self.field}: is {kind or 'missing'}, expected strings; has {schema.names}")
        for group in range(file.metadata.num_row_groups):
            columns = file.metadata.row_group(group)
            for index in range(columns.num_columns):
                column = columns.column(index)
                if column.path_in_schema == self.field and column.total_uncompressed_size > MAX_GROUP:
                    raise VlscaleError(f"{path}: row group {group} unpacks to more than {MAX_GROUP} bytes")

    def pieces(self, part: Mapping[str, Any]) -> Iterator[Piece | BadRow]:
        """See :class:`data_tools.formats.corpus.Corpus`."""
        path = self.paths[part["file"]]
        row = part["row"]
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                for batch in file.iter_batches(_BATCH, row_groups=[part["group"]], columns=[self.field]):
                    for cell in batch.column(0).cast(pa.large_binary()):
                        yield self._piece(path, part["file"], row, cell)
                        row += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, error) from None

    def _piece(self, path: Path, file: int, row: int, cell: Any) -> Piece | BadRow:
        where = f"{path}: row {row + 1}"
        try:
            if not cell.is_valid:
                raise FieldError(self.field, "is null")
            if cell.as_buffer().size > MAX_DOCUMENT:
                raise FieldError(self.field, f"has {cell.as_buffer().size} bytes, at most {MAX_DOCUMENT} are allowed")
            text = sentence(self.field, cell.as_py(), MAX_DOCUMENT)
            if not text.strip():
                raise FieldError(self.field, "is empty")
        except FieldError as error:
            return error.at(where)
        return Piece(where, f"{file}-{row}", text, True)


def _damaged(path: Path, error: Exception) -> VlscaleError:
    reason = " ".join(str(error).split())[:200]
    return VlscaleError(f"{path}: cannot be read as Parquet ({reason}); download it again")
