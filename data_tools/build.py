"""Importing images: parts are built side by side and put together; see ``parts.py`` and ``merge.py``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import vlscale
from data_tools.build_images import Choice, ImageBuilder, find_repeated
from data_tools.fingerprint import bytes_of
from data_tools.merge import load_hashes, merge_stores, publish, refuse_existing, require_complete
from data_tools.parts import PartBuilder, Run, Work
from data_tools.records import ImageLayout, ImageSource
from data_tools.report import collect_dropped, folder_bytes, progress_bar, show_report, sum_up, write_report
from vlscale.data.index import read_meta
from vlscale.data.schema import ClassesMeta, ImagesMeta, class_columns, image_columns
from vlscale.errors import VlscaleError

NOTHING_EXCLUDED = (
    "images were to be left out (--exclude, --exclude-karpathy), but NOT ONE image of the source is among them: are "
    "the ids spelled otherwise? Evaluation images may be in this store"
)


def import_images(
    open_source: Callable[[], ImageSource],
    described: Mapping[str, Any],
    run: Run,
    choice: Choice | None = None,
    excluded: frozenset[str] = frozenset(),
    skip: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Build ``ROOT/images`` and, where the source has class probabilities, ``ROOT/classes``.

    A run that was killed is continued by an equal call; what comes out does not depend on kills, on ``run`` or on the
    number of processes.

    Args:
        open_source: opens the source; pickled into worker processes, for example a ``functools.partial``.
        described: what the build is begun with, JSON types, from :func:`data_tools.fingerprint.describe_options`;
            a call that differs does not continue it.
        run: where, with how many processes, which share of the parts.
        choice: which regions are kept, and how they are stored.
        excluded: ids of images to leave out; see :mod:`data_tools.exclusion`.
        skip: count and list rows that cannot be used, instead of ending with the first.
        console: for progress and the report; default stderr.

    Returns:
        The report; None if there is still something to build or to merge.

    Raises:
        VlscaleError: a row or the source is bad, ids repeat, the stores exist, or the build was begun otherwise.
    """
    console = console or Console(stderr=True)
    work = Work(run.root, "images")
    if not work.merged.exists():
        refuse_existing(run.root / "images")
    source = open_source()
    layout = _layout(work, source, run)
    names = ["images"] if layout.num_classes is None else ["images", "classes"]
    if not work.merged.exists():
        refuse_existing(run.root / names[-1])
    parts = source.parts()
    manifest = {"vlscale": vlscale.__version__, "build": dict(described), "parts": parts, "layout": asdict(layout)}
    work.begin(manifest)
    choice = _with_excluded(work, choice or Choice(), excluded)
    builder = ImageBuilder(open_source, layout, choice, skip, work.folder / "images-repeated.json")
    if not work.merged.exists():
        with work.lock("merge", exclusive=False):
            build_parts(work, parts, run, builder, console)
    if run.shard is not None:
        console.print(f"built parts {run.shard[0]} of every {run.shard[1]}; give --merge when all are built")
        return None
    with work.lock("merge"):
        if not work.merged.exists():
            require_complete(work, len(parts))
            _settle_repeated(work, parts, replace(run, merge=False, shard=None), builder, skip, console)
        publish(work, lambda folder: _fill(work, parts, names, skip, described, bool(excluded), folder))
    show_report(run.root, "images", console)
    report: dict[str, Any] = json.loads((run.root / "report-images.json").read_bytes())
    return report


def _layout(work: Work, source: ImageSource, run: Run) -> ImageLayout:
    """What the images share: as recorded where nothing is read any more, because a source may need a GPU to tell it."""
    if not run.merge:
        return source.layout()
    found = work.recorded()
    if found is None:
        raise VlscaleError(
            f"{work.folder}: nothing is built here yet; give the command with --shard i/n before --merge"
        )
    try:
        names = found["layout"]["class_names"]
        return ImageLayout(**{**found["layout"], "class_names": None if names is None else tuple(names)})
    except (KeyError, TypeError) as error:
        raise VlscaleError(f"{work.manifest}: {error} is not as it was written; remove {work.folder}") from None


def _with_excluded(work: Work, choice: Choice, excluded: frozenset[str]) -> Choice:
    return replace(choice, excluded=write_excluded(work, excluded)) if excluded else choice


def write_excluded(work: Work, excluded: frozenset[str]) -> Path:
    """Write the ids to leave out where the worker processes read them, and return the file."""
    path = work.folder / f"{work.kind}-excluded.txt"
    replace_file(path, "\n".join(sorted(excluded)))
    return path


def replace_file(path: Path, text: str) -> None:
    """Write a file so that other processes see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def build_parts(
    work: Work, parts: Sequence[Mapping[str, Any]], run: Run, builder: PartBuilder, console: Console
) -> None:
    """Build the parts that are this run's, and show how far it is."""
    numbers = run.numbers(len(parts))
    with progress_bar(console, work.kind, len(numbers)) as advance:
        work.build_all(parts, numbers, builder, run.workers, lambda _, result: advance(1, result["rows"]))


def _settle_repeated(
    work: Work,
    parts: Sequence[Mapping[str, Any]],
    run: Run,
    builder: ImageBuilder,
    skip: bool,
    console: Console,
) -> None:
    """Find ids that stand in two parts; with ``skip``, build the later parts again without these rows."""
    path = work.folder / "images-repeated.json"
    if not path.exists():
        found: dict[int, dict[int, str]] = {}
        for part, row, name, where, first in find_repeated(load_hashes(work, len(parts)), lambda *of: _rows(work, *of)):
            if not skip:
                raise VlscaleError(
                    f"{where}: id: {name!r} is also that of {first}; --on-error skip keeps the first and lists the rest"
                )
            found.setdefault(part, {})[row] = first
        replace_file(path, json.dumps(found))
    repeated = {int(part): sorted(map(int, rows)) for part, rows in json.loads(path.read_bytes()).items()}
    for number, rows in repeated.items():
        result = work.result(number)
        if result is not None and result["repeated"] != rows:
            work.rebuild_later(number)
    if repeated:
        build_parts(work, parts, run, builder, console)


def _rows(work: Work, part: int, rows: Sequence[int]) -> list[tuple[str, str]]:
    """(id, where) of some rows of a part; ``rows`` ascend."""
    wanted = set(rows)
    with (work.part(part) / "rows.jsonl").open(encoding="utf-8") as lines:
        return [tuple(json.loads(line)) for number, line in enumerate(lines) if number in wanted]


def _fill(
    work: Work,
    parts: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    skip: bool,
    described: Mapping[str, Any],
    excluding: bool,
    folder: Path,
) -> None:
    """Put stores, report and list of dropped rows together."""
    folders = [work.part(number) for number in range(len(parts))]
    results = require_complete(work, len(parts))
    total = sum_up(results)
    if not total.get("rows"):
        raise VlscaleError(f"{work.root}: no images are left of the source (dropped: {total.get('dropped', {})})")
    columns = image_columns(read_meta(ImagesMeta, folders[0] / "images/meta.json"))
    merge_stores([part / "images" for part in folders], columns, folder / "images")
    if "classes" in names:
        columns = class_columns(read_meta(ClassesMeta, folders[0] / "classes/meta.json"))
        merge_stores([part / "classes" for part in folders], columns, folder / "classes")
    collect_dropped(work, len(parts), folder / "dropped-images.jsonl", skip)
    report = {
        "format": described.get("format"),
        "rows": total["rows"],
        "regions": total["regions"],
        "excluded": total["excluded"],
        "dropped": total["dropped"],
        "regions histogram": total["histogram"],
        "bytes_in": bytes_of(described),
        **_codec_error([result["codec_error"] for result in results]),
        **{f"bytes_{name}": folder_bytes(folder / name) for name in names},
    }
    if not total["excluded"] and (excluding or described.get("exclude") or described.get("exclude_karpathy")):
        report["warning"] = NOTHING_EXCLUDED
    write_report(folder, "images", report)


def _codec_error(parts: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and largest error of the sampled images of all parts; nothing for a lossless store."""
    sampled = sum(part[0] for part in parts)
    if not sampled:
        return {}
    mean = sum(part[1] for part in parts) / sampled
    return {"codec_mean_error": mean, "codec_largest_error": max(part[2] for part in parts)}
