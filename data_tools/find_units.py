"""Find masking units and scene graphs: ``python -m data_tools.find_units ROOT``.

Writes ``ROOT/units`` beside ``ROOT/texts``; ``rewrite_captions`` and UNIMO's span masking read it. See
``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_tools.merge import merge_stores
from data_tools.parts import Work, read_json
from data_tools.report import folder_bytes, sum_up
from data_tools.rewriting.building import build_beside, chunks, open_texts, parse_command, rare_collections
from data_tools.rewriting.graph import Analysis
from data_tools.rewriting.neighbours import hashes_of, merge_terms
from data_tools.rewriting.parsers import Parser, ParserChoice
from data_tools.rewriting.reading import decode_rows
from data_tools.rewriting.stores import UnitWriter
from data_tools.rewriting.units import piece_units, token_units
from data_tools.rewriting.vocabulary import Counting
from data_tools.under_way import counted
from vlscale.data.companion_schema import UNIT_COLUMNS
from vlscale.data.index import record_side_files
from vlscale.data.store import TextStore
from vlscale.errors import VlscaleError, one_line_errors

_KINDS = ("single words", "noun phrases", "verb phrases", "names")


class UnitBuilder:
    """Builds parts of ``units``; see :class:`data_tools.parts.PartBuilder`.

    Args:
        root: the dataset's folder.
        choice: which parser.
    """

    def __init__(self, root: Path, choice: ParserChoice) -> None:
        self.root = root
        self.choice = choice

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key in ("root", "choice")}

    @cached_property
    def texts(self) -> TextStore:
        """The texts."""
        return open_texts(self.root)

    @cached_property
    def parser(self) -> Parser:
        """The loaded parser."""
        return self.choice.load()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """What made the word pieces, if it was kept."""
        path = self.texts.tokenizer_path
        if path is None:
            return None
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise VlscaleError(f"{path}: cannot be read ({error}); restore it or import the texts again") from None

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write the part's ``units``, ``vocabulary.json`` and, of captions, ``terms.npy`` into ``folder``."""
        counting, kinds, counts = Counting(), np.zeros(len(_KINDS), np.int64), Counter[str]()
        paired, terms, per_row = len(self.texts.image_refs) > 0, [], []
        with rare_collections(), UnitWriter(folder, self.texts, self.parser.name) as writer:
            for rows in counted_chunks(part):
                found = decode_rows(self.texts, rows)
                analyses = self.parser.analyse([row["text"] for row in found])
                for row, analysis, units in zip(found, analyses, self._units(found, analyses, counts), strict=True):
                    writer.write(row["id"], units, analysis)
                    counting.add(analysis)
                    kinds += np.bincount(units[:, 2], minlength=len(_KINDS))
                    counts["without objects, attributes and relations"] += analysis.empty
                    if paired:
                        terms.append(hashes_of(row["text"]))
                        per_row.append(len(terms[-1]))
        (folder / "vocabulary.json").write_text(json.dumps(counting.to_json()), encoding="utf-8")
        if paired:
            np.save(folder / "terms.npy", np.concatenate(terms), allow_pickle=False)
            np.save(folder / "per_row.npy", np.asarray(per_row, np.int32), allow_pickle=False)
        return {
            "rows": writer.rows_written,
            "units": dict(zip(_KINDS, kinds.tolist(), strict=True)),
            "texts": {name: int(count) for name, count in counts.items()},
        }

    def _units(
        self, rows: Sequence[Mapping[str, Any]], analyses: Sequence[Analysis], counts: Counter[str]
    ) -> list[NDArray[np.int32]]:
        encodings = None
        if self.tokenizer is not None:
            encodings = self.tokenizer.encode_batch([row["text"] for row in rows], add_special_tokens=False)
        vocabulary = self.texts.meta.vocabulary
        found = []
        for number, (row, analysis) in enumerate(zip(rows, analyses, strict=True)):
            ids = row["input_ids"]
            if encodings is not None and encodings[number].ids[: len(ids)] == ids.tolist() and analysis.words:
                found.append(token_units(analysis, encodings[number].offsets[: len(ids)]))
            else:
                counts["not aligned with their word pieces: whole words instead"] += 1
                found.append(piece_units([vocabulary.tokens[one] for one in ids.tolist()], self._byte_level))
        return found

    @cached_property
    def _byte_level(self) -> bool:
        return any(token[:1] in ("Ġ", "▁") for token in self.texts.meta.vocabulary.tokens)


def counted_chunks(part: Mapping[str, Any]) -> Any:
    """Chunks of a part, whose rows the progress bar counts."""
    rows = counted(range(part["begin"], part["end"]))
    for chunk in chunks(part):
        for _ in chunk:
            next(rows)
        yield chunk
    rows.close()  # type: ignore[attr-defined]


def fill_units(work: Work, results: list[dict[str, Any]], folder: Path, paired: bool, choice: str) -> dict[str, Any]:
    """Put ``units`` together, with the corpus vocabulary and, of captions, the index of terms."""
    parts = [work.part(number) for number in range(len(results))]
    store = folder / "units"
    merge_stores([part / "units" for part in parts], UNIT_COLUMNS, store)
    counting = Counting()
    for part in parts:
        counting.merge(read_json(part / "vocabulary.json"))
    vocabulary = counting.to_json()
    (store / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    if paired:
        merge_terms(parts, store)
    record_side_files(store)
    return {
        "parser": choice,
        **sum_up(results),
        "vocabulary": {
            "objects": len(vocabulary["objects"]),
            "attributes": len(vocabulary["attributes"]),
            "relations": sum(map(len, vocabulary["relations"].values())),
        },
        "bytes_units": folder_bytes(store),
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--spacy-model",
        type=Path,
        metavar="FOLDER",
        help="parse with this spaCy pipeline (needs spaCy); default: a lexicon and rules that suffice for captions",
    )


def run(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Find what the command line says and return the report.

    Raises:
        VlscaleError: see :func:`data_tools.rewriting.building.build_beside`.
    """
    options = parse_command("find_units", "Find masking units and scene graphs of texts.", arguments, _add_arguments)
    choice = ParserChoice(options.spacy_model)
    name = choice.load().name  # a missing package or model ends it here
    paired = len(open_texts(options.out).image_refs) > 0
    builder = UnitBuilder(options.out, choice)
    return build_beside("units", options, builder, partial(fill_units, paired=paired, choice=name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("find_units"):
        run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
