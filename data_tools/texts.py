"""Importing texts: parts are tokenized side by side, and written in the order of the images they refer to.

Texts that refer to no images at all keep their order: each part becomes a store, and these are put together as the
images are. So a corpus of any size needs no memory.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import vlscale
from data_tools.build import build_parts, write_excluded
from data_tools.build_images import dropped_line, find_repeated
from data_tools.build_texts import TextBuilder, Tokenizer
from data_tools.fingerprint import bytes_of, describe_path
from data_tools.image_rows import index_images
from data_tools.merge import load_hashes, merge_stores, publish, refuse_existing, require_complete
from data_tools.parts import Run, Work
from data_tools.records import BadRow, TextSource, num_types_of
from data_tools.report import collect_dropped, folder_bytes, progress_bar, show_report, sum_up, write_report
from data_tools.spool import NO_IMAGE, SpoolReader, rows_of
from vlscale.data.index import read_meta
from vlscale.data.schema import TextsMeta, Vocabulary, text_columns
from vlscale.data.store_writer import TextWriter
from vlscale.errors import VlscaleError

MAX_OPEN_SPOOLS = 256


@runtime_checkable
class HasVocabulary(Protocol):
    """A source whose texts are tokenized already, and which says with which vocabulary."""

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Compare the source's vocabulary with the one that ``--tokenizer`` gives.

        Raises:
            VlscaleError: they differ.
        """
        ...


def import_texts(
    open_source: Callable[[], TextSource],
    load_tokenizer: Callable[[], Tokenizer],
    described: Mapping[str, Any],
    run: Run,
    excluded: frozenset[str] = frozenset(),
    skip: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Build ``ROOT/texts``, after ``ROOT/images`` if the texts refer to images.

    Args:
        open_source: opens the source; pickled into worker processes.
        load_tokenizer: loads the tokenizer; likewise.
        described: what the build is begun with; see :func:`data_tools.build.import_images`.
        run: where, with how many processes, which share of the parts.
        excluded: ids of images whose texts are left out without being listed.
        skip: count and list texts that cannot be used, instead of ending with the first.
        console: for progress and the report; default stderr.

    Returns:
        The report; None if there is still something to build or to merge.

    Raises:
        VlscaleError: a text or the source is bad, ids repeat, an image is missing, the store exists, or the build was
            begun otherwise.
    """
    console = console or Console(stderr=True)
    work = Work(run.root, "texts")
    if not work.merged.exists():
        refuse_existing(run.root / "texts")
    source, tokenizer = open_source(), load_tokenizer()
    if isinstance(source, HasVocabulary):
        source.check_vocabulary(tokenizer.vocabulary)
    parts = source.parts()
    work.begin(_manifest(described, source, parts, tokenizer.vocabulary, run.root))
    images = _index_images(work) if source.paired else None
    leave_out = write_excluded(work, excluded) if excluded else None
    builder = TextBuilder(open_source, load_tokenizer, images, skip, leave_out)
    if not work.merged.exists():
        with work.lock("merge", exclusive=False):
            build_parts(work, parts, run, builder, console)
    if run.shard is not None:
        console.print(f"built parts {run.shard[0]} of every {run.shard[1]}; give --merge when all are built")
        return None
    with work.lock("merge"):
        publish(work, lambda folder: _fill(work, len(parts), builder, skip, described, console, folder))
    show_report(run.root, "texts", console)
    report: dict[str, Any] = json.loads((run.root / "report-texts.json").read_bytes())
    return report


def _manifest(
    described: Mapping[str, Any], source: TextSource, parts: list[dict[str, Any]], vocabulary: Vocabulary, root: Path
) -> dict[str, Any]:
    return {
        "vlscale": vlscale.__version__,
        "build": dict(described),
        "parts": parts,
        "vocabulary": vocabulary.fingerprint,
        "images": _describe_images(root) if source.paired else None,
    }


def _describe_images(root: Path) -> dict[str, Any]:
    index = root / "images" / "index.json"
    if not index.exists():
        raise VlscaleError(f"{index}: is missing; import the images that the texts refer to first, with the same --out")
    return describe_path(index)


def _index_images(work: Work) -> Path:
    """Where the rows of the images can be looked up by the processes that build parts."""
    folder = work.folder / "texts-images"
    if not work.merged.exists():  # otherwise it may be half removed already
        index_images(work.root / "images", folder)
    return folder


def _fill(
    work: Work,
    parts: int,
    builder: TextBuilder,
    skip: bool,
    described: Mapping[str, Any],
    console: Console,
    folder: Path,
) -> None:
    """Put store, report and list of dropped rows together."""
    total = sum_up(require_complete(work, parts))
    if not total.get("rows"):
        raise VlscaleError(f"{work.root}: no texts are left of the source (dropped: {total.get('dropped', {})})")
    collect_dropped(work, parts, folder / "dropped-texts.jsonl", skip)
    report = {"format": described.get("format"), **total}
    if builder.image_rows is None:
        folders = [work.part(number) / "texts" for number in range(parts)]
        columns = text_columns(read_meta(TextsMeta, folders[0] / "meta.json"))
        merge_stores(folders, columns, folder / "texts")
    else:
        repeated = dict(_repeated(work, parts, skip))
        with (folder / "dropped-texts.jsonl").open("a", encoding="utf-8") as dropped:
            dropped.writelines(dropped_line(row) for row in repeated.values())
        written, tokens, unused = _write_sorted(work, parts, builder, set(repeated), console, folder)
        report["dropped"] = {**total["dropped"], **({"id": len(repeated)} if repeated else {})}
        report |= {"rows": written, "tokens": tokens, "images without texts": unused}
    report |= {
        "vocabulary": builder.tokenizer.vocabulary.fingerprint,
        "bytes_in": bytes_of(described),
        "bytes_texts": folder_bytes(folder / "texts"),
    }
    write_report(folder, "texts", report)


def _repeated(work: Work, parts: int, skip: bool) -> Iterator[tuple[int, BadRow]]:
    """Texts, counted over all parts, whose id an earlier text has."""
    hashes = load_hashes(work, parts)
    begins = np.cumsum([0, *(len(part) for part in hashes)])
    found = find_repeated(hashes, lambda part, rows: rows_of(work.part(part), rows))
    for part, row, name, where, first in found:
        bad = BadRow(where, "id", f"{name!r} is also that of {first}")
        if not skip:
            raise VlscaleError(f"{bad}; --on-error skip keeps the first and lists the rest")
        yield int(begins[part]) + row, bad


def _write_sorted(
    work: Work, parts: int, builder: TextBuilder, leave_out: set[int], console: Console, folder: Path
) -> tuple[int, int, int]:
    """Write all texts by their first image; returns the texts and tokens written and the images without any."""
    rows, tokenizer = builder.image_rows, builder.tokenizer
    assert rows is not None
    first = _concatenate([work.part(number) / "first.npy" for number in range(parts)])
    starts = _concatenate([work.part(number) / "starts.npy" for number in range(parts)])
    owners = _owners(work, parts)
    used = np.zeros(len(rows), np.bool_)
    readers = _Readers(work)
    written = tokens = 0
    types = num_types_of(builder.source)
    writer = TextWriter(folder, tokenizer.vocabulary, rows, tokenizer.to_json(), num_types=types)
    with writer, progress_bar(console, "sorted texts", len(first)) as advance:
        order = np.argsort(first, kind="stable")
        for begin in range(0, len(first), 4096):
            chunk = [place for place in order[begin : begin + 4096].tolist() if place not in leave_out]
            for place in chunk:
                text = readers.at(int(owners[place])).read(int(starts[place]))
                writer.write(text.id, text.text, text.input_ids, text.images, text.extra, text.type_ids)
                written += 1
                tokens += len(text.input_ids)
                if first[place] != NO_IMAGE:
                    used[[rows[image] for image in text.images]] = True
            advance(min(4096, len(first) - begin), len(chunk))
    readers.close()
    return written, tokens, int((~used).sum())


def _concatenate(files: Sequence[Path]) -> NDArray[np.int64]:
    arrays = [np.load(file, allow_pickle=False) for file in files]
    return np.concatenate([np.empty(0, np.int64), *arrays])


def _owners(work: Work, parts: int) -> NDArray[np.int32]:
    """int32 [N], the part of each text."""
    sizes = [len(np.load(work.part(number) / "first.npy", mmap_mode="r")) for number in range(parts)]
    return np.repeat(np.arange(parts, dtype=np.int32), sizes)


class _Readers:
    """Spools of many parts, of which a bounded number is open."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._open: OrderedDict[int, SpoolReader] = OrderedDict()

    def at(self, part: int) -> SpoolReader:
        """The spool of a part."""
        found = self._open.pop(part, None) or SpoolReader(self._work.part(part))
        self._open[part] = found
        if len(self._open) > MAX_OPEN_SPOOLS:
            self._open.popitem(last=False)[1].close()
        return found

    def close(self) -> None:
        """Close all."""
        while self._open:
            self._open.popitem()[1].close()
