"""Corpora of texts alone: what plain text, JSON lines and Parquet have in common.

Documents are packed into rows part by part, so that a row never spans two parts. ``--dedup exact`` first reads the
whole source once (in ``--workers`` processes) and notes which documents were there before; this takes about 24 bytes of
memory per document, and the notes lie in ``ROOT/.parts`` until the store is complete.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from data_tools.fingerprint import describe_options
from data_tools.options import number
from data_tools.packing_texts import PACKINGS, DocumentHash, Packer, Piece
from data_tools.parts import worker_pool
from data_tools.records import BadRow, TextRecord
from data_tools.report import progress_bar
from data_tools.tokenizers import load_tokenizer
from data_tools.under_way import counted
from vlscale.errors import VlscaleError

PART_BYTES = 64 << 20
MAX_DOCUMENT = 16 << 20
"""Bytes of a line, a record or a cell: several books."""


@dataclass(frozen=True)
class Packing:
    """How a corpus becomes rows.

    Attributes:
        tokenizer: path of the tokenizer that counts word pieces.
        mode: one of :data:`data_tools.packing_texts.PACKINGS`.
        max_tokens: word pieces of a row, without [CLS] and [SEP].
        repeated: file of ``--dedup``; None keeps repeated documents.
        workers: processes that look for repeated documents.
        reopen: opens the same corpus in another process.
    """

    tokenizer: Path
    mode: str = "sentence"
    max_tokens: int = 510
    repeated: Path | None = None
    workers: int = 1
    reopen: Callable[[], Corpus] | None = None


def add_packing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of all corpora; :func:`packing_of` reads them."""
    parser.add_argument(
        "--pack",
        choices=PACKINGS,
        default="sentence",
        help="fill rows with whole sentences across documents, [SEP] between these (default), or within each document; "
        "or make each line or record a row of its own. What is longer than a row is cut",
    )
    parser.add_argument(
        "--max-tokens",
        type=number(8, 1 << 16),
        default=510,
        metavar="N",
        help="word pieces of a row (default 510: 512 with [CLS] and [SEP])",
    )
    parser.add_argument(
        "--dedup",
        choices=("none", "exact"),
        default="none",
        help="exact: of documents that differ in nothing but case, blanks and Unicode composition, keep the first",
    )


def packing_of(options: argparse.Namespace, open_source: Callable[[argparse.Namespace], Corpus]) -> Packing:
    """Read the options.

    Raises:
        VlscaleError: a file that they name cannot be read.
    """
    repeated = None
    if options.dedup == "exact":
        told = json.dumps(describe_options(options), sort_keys=True).encode()
        repeated = options.out / ".parts" / f"texts-repeated-{hashlib.sha256(told).hexdigest()[:16]}.npy"
    reopen = partial(open_source, options)
    return Packing(options.tokenizer, options.pack, options.max_tokens, repeated, options.workers, reopen)


class Corpus:
    """Base of the corpora.

    Args:
        paths: the source's files.
        packing: how they become rows.
    """

    paired = False

    def __init__(self, paths: Sequence[Path], packing: Packing) -> None:
        self.paths = list(paths)
        self.packing = packing

    @abstractmethod
    def divide(self) -> list[dict[str, Any]]:
        """Divide the source into parts.

        Raises:
            VlscaleError: a file is missing, empty or damaged.
        """

    @abstractmethod
    def pieces(self, part: Mapping[str, Any]) -> Iterator[Piece | BadRow]:
        """Yield the pieces of a part's documents, in order; the first one begins a document."""

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`; looks for repeated documents, if that was asked for."""
        parts = [{**part, "number": place} for place, part in enumerate(self.divide())]
        if self.packing.repeated is not None:
            with _locked(self.packing.repeated):
                if not self.packing.repeated.exists():
                    self._find_repeated(parts, self.packing.repeated)
        return parts

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        packer = Packer(load_tokenizer(self.packing.tokenizer), self.packing.mode, self.packing.max_tokens)
        pieces = self.pieces(part)
        if self.packing.repeated is not None:
            pieces = _without(pieces, self._repeated[self._repeated[:, 0] == part["number"], 1])
        yield from packer.pack(pieces)

    def hashes(self, part: Mapping[str, Any]) -> NDArray[np.uint64]:
        """uint64 [n], a hash of each document of a part."""
        found: list[int] = []
        state: DocumentHash | None = None
        for piece in counted(self.pieces(part)):
            if isinstance(piece, BadRow):
                continue
            if state is None or piece.begins:
                if state is not None:
                    found.append(state.digest())
                state = DocumentHash()
            state.add(piece.text)
        if state is not None:
            found.append(state.digest())
        return np.array(found, np.uint64)

    @cached_property
    def _repeated(self) -> NDArray[np.int64]:
        assert self.packing.repeated is not None
        try:
            found: NDArray[np.int64] = np.load(self.packing.repeated, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise VlscaleError(
                f"{self.packing.repeated}: cannot be read ({error}); remove it and begin again"
            ) from None
        return found

    def _hashes_of(self, parts: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[np.uint64]]:
        """Yield the hashes of each part, in their order.

        Raises:
            VlscaleError: the source is damaged, or a worker process has died.
        """
        reopen, workers = self.packing.reopen, min(self.packing.workers, len(parts))
        if reopen is None or workers < 2:
            yield from map(self.hashes, parts)
            return
        with worker_pool(workers, f"{self.paths[0]}: --dedup", _open, reopen) as pool:
            yield from pool.map(_hashes, parts)

    def _find_repeated(self, parts: Sequence[Mapping[str, Any]], target: Path) -> None:
        """Write int64 [n, 2], part and place in it of each document that an earlier one equals."""
        hashes: list[NDArray[np.uint64]] = []
        with progress_bar(Console(stderr=True), "--dedup: pieces", len(parts)) as advance:
            for found in self._hashes_of(parts):
                hashes.append(found)
                advance(1, len(found))
        every = np.concatenate([np.empty(0, np.uint64), *hashes])
        order = np.argsort(every, kind="stable")
        again = np.zeros(len(every), np.bool_)
        again[order[1:]] = every[order[1:]] == every[order[:-1]]
        places = np.flatnonzero(again)
        begins = np.cumsum([0, *(len(each) for each in hashes)])
        owners = np.searchsorted(begins, places, side="right") - 1
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        with temporary.open("wb") as file:
            np.save(file, np.stack([owners, places - begins[owners]], 1).astype(np.int64))
        os.replace(temporary, target)
        print(f"--dedup: {len(places)} of {len(every)} documents repeat earlier ones", file=sys.stderr, flush=True)


_worker: dict[str, Corpus] = {}
"""The corpus that a worker process reads."""


def _open(reopen: Callable[[], Corpus]) -> None:
    _worker["corpus"] = reopen()


def _hashes(part: Mapping[str, Any]) -> NDArray[np.uint64]:
    return _worker["corpus"].hashes(part)


def _without(pieces: Iterator[Piece | BadRow], repeated: NDArray[np.int64]) -> Iterator[Piece | BadRow]:
    """Leave out the documents with these places."""
    wanted = iter(repeated.tolist())
    following = next(wanted, -1)
    place, drop = -1, False
    for piece in pieces:
        if isinstance(piece, Piece) and (piece.begins or place < 0):
            place += 1
            drop = place == following
            if drop:
                following = next(wanted, -1)
        if isinstance(piece, BadRow) or not drop:
            yield piece


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of a machine (or cluster, where its file system has locks) prepare a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("wb") as file:
            with suppress(OSError):  # a file system without locks: all prepare the same file
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be written ({error})") from None
