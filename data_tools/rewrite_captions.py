"""Rewrite captions for contrastive learning: ``python -m data_tools.rewrite_captions ROOT``.

Writes ``ROOT/rewrites`` beside ``ROOT/texts`` and ``ROOT/units`` (``find_units`` first). See ``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.options import number
from data_tools.parts import Work
from data_tools.report import folder_bytes, sum_up
from data_tools.retrieval.detected import CLASS_OPTIONS, Detections, add_classes
from data_tools.rewriting.back_translation import Translation
from data_tools.rewriting.building import build_beside, parse_command, refuse_useless
from data_tools.rewriting.captions import RewriteBuilder, Wanted
from data_tools.rewriting.stores import merge_companion
from vlscale.data.companion_schema import REWRITE_COLUMNS
from vlscale.errors import VlscaleError, one_line_errors

_MOST = 1000


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    count = number(0, _MOST)
    parser.add_argument(
        "--per-kind",
        type=count,
        default=8,
        metavar="N",
        help="object, attribute and relation rewrites per caption, each at most (default 8)",
    )
    parser.add_argument(
        "--sentences", type=count, default=4, metavar="N", help="captions of other images as negatives (default 4)"
    )
    parser.add_argument("--seed", type=number(0, 1 << 31), default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument(
        "--min-count", type=number(1, 1 << 31), default=1, metavar="N", help="least count of a replacement (default 1)"
    )
    parser.add_argument(
        "--most",
        type=number(1, 1 << 20),
        default=5000,
        metavar="N",
        help="the most frequent replacements of each kind that are drawn from (default 5000)",
    )
    parser.add_argument(
        "--any-attribute",
        action="store_true",
        help="also replace attributes of no known kind; such a rewrite may still be true",
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="FILE",
        help="vocabulary.json of another dataset (default: its own, in units)",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: the one kept with the texts")
    regions = parser.add_argument_group("known regions: no negative names what a detector saw in the image")
    add_classes(regions)
    regions.add_argument("--ignore-regions", action="store_true", help="only the captions tell what an image shows")
    _add_translation(parser.add_argument_group("paraphrases by back-translation"))


def _add_translation(group: Any) -> None:
    group.add_argument("--translator", type=Path, metavar="FOLDER", help="a Hugging Face seq2seq model, there")
    group.add_argument("--back-translator", type=Path, metavar="FOLDER", help="and one back")
    group.add_argument(
        "--paraphrases", type=number(1, 64), default=3, metavar="N", help="at most, per caption (default 3)"
    )
    group.add_argument("--device", default="cpu", help="of the models (default cpu)")
    group.add_argument("--batch", type=number(1, 1 << 16), default=32, metavar="N", help="captions at a time")


def _check_command(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Refuse options that contradict each other or have no effect."""
    if options.translator is None and options.back_translator is None:
        of_models = ("--paraphrases", "--device", "--batch")
        refuse_useless(arguments, of_models, "without --translator and --back-translator")
    if not options.per_kind:
        of_kinds = ("--min-count", "--most", "--any-attribute", "--vocabulary")
        refuse_useless(arguments, of_kinds, "with --per-kind 0, where nothing is replaced")
    if options.ignore_regions:
        refuse_useless(arguments, CLASS_OPTIONS, "with --ignore-regions")


def _wanted(options: argparse.Namespace) -> Wanted:
    translation = None
    if (options.translator is None) != (options.back_translator is None):
        raise VlscaleError("--translator and --back-translator belong together; give both or neither")
    if options.translator is not None:
        translation = Translation(
            options.translator, options.back_translator, options.paraphrases, options.batch, options.device
        )
    elif not options.per_kind and not options.sentences:
        raise VlscaleError("--per-kind 0 --sentences 0 without --translator: nothing would be rewritten")
    return Wanted(
        options.per_kind,
        options.sentences,
        options.seed,
        options.min_count,
        options.most,
        options.any_attribute,
        options.vocabulary,
        options.tokenizer,
        translation,
        None if options.ignore_regions else Detections(options.out, options.classes_from, options.class_probability),
    )


def _classes_told(builder: RewriteBuilder, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, str]:
    """Where the classes of the regions come from, for the report.

    Raises:
        VlscaleError: options name classes that cannot be used.
    """
    found = builder.detected
    if found is None:
        refuse_useless(arguments, CLASS_OPTIONS, "where no classes of the images are known by name")
        return {"classes of regions": "ignored" if options.ignore_regions else "no names are known"}
    if not found.in_classes:
        refuse_useless(arguments, ("--class-probability",), "where no classes come from classes/")
    return {"classes of regions": found.source}


def fill_rewrites(
    work: Work, results: list[dict[str, Any]], folder: Path, told_first: Mapping[str, str]
) -> dict[str, Any]:
    """Put ``rewrites`` together; ``told_first`` begins the report."""
    parts = [work.part(part) / "rewrites" for part in range(len(results))]
    merge_companion("rewrites", REWRITE_COLUMNS, parts, folder / "rewrites")
    return {**told_first, **sum_up(results), "bytes_rewrites": folder_bytes(folder / "rewrites")}


def run(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Rewrite what the command line says and return the report.

    Raises:
        VlscaleError: see :func:`data_tools.rewriting.building.build_beside`.
    """
    options = parse_command("rewrite_captions", "Rewrite captions.", arguments, _add_arguments)
    _check_command(options, arguments)
    builder = RewriteBuilder(options.out, _wanted(options))
    builder.check()
    fill = partial(fill_rewrites, told_first=_classes_told(builder, options, arguments))
    others = [options.out / "units" / "index.json"]
    if builder.detected is not None:
        stores = (options.out / name / "index.json" for name in ("images", "classes"))
        others += [path for path in stores if path.exists()]
    return build_beside("rewrites", options, builder, fill, others)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("rewrite_captions"):
        run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
