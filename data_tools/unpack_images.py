"""Put the pictures of WebDataset tars into a folder: ``python -m data_tools.unpack_images TAR... --out FOLDER``.

``extract_regions`` then gives them the ids that ``import_texts webdataset`` refers to. The same command continues what
was interrupted; several processes may unpack different tars into one folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_tools.formats.arrays import FieldError
from data_tools.formats.captions import ImageNames
from data_tools.formats.tar_files import read_member
from data_tools.formats.webdataset import FIELDS, Sample, add_name_argument, image_id, read_samples, safe_name
from data_tools.options import OneLineParser
from data_tools.records import BadRow
from data_tools.report import progress_bar
from vlscale.errors import VlscaleError, one_line_errors

MAX_PICTURE = 256 << 20
_SHOWN = 20


def unpack(path: Path, out: Path, names: ImageNames) -> tuple[int, list[BadRow]]:
    """Write the pictures of one tar; returns how many it has, and the members that cannot be used.

    Raises:
        VlscaleError: the tar is damaged, or the folder cannot be written.
    """
    written, bad = 0, []
    try:
        with path.open("rb") as stream:
            for sample in read_samples(path, stream):
                if isinstance(sample, BadRow):
                    bad.append(sample)
                elif sample.picture is not None:
                    suffix, member = sample.picture
                    try:
                        target = out / f"{safe_name(image_id(names, path, sample))}.{suffix}"
                        _write(target, out, read_member(stream, member, MAX_PICTURE))
                        written += 1
                    except FieldError as error:
                        bad.append(error.at(_where(path, sample)))
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be unpacked to {out} ({error})") from None
    return written, bad


def _where(path: Path, sample: Sample) -> str:
    return f"{path.name}: sample {sample.key!r}"


def _write(target: Path, out: Path, content: bytes) -> None:
    """Write a file unless it is there already; never through a link that stands in the folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(out.resolve()):
        raise FieldError("image id", "leads out of the folder through a link")
    if target.is_symlink() or target.exists():
        if target.is_symlink() or target.stat().st_size != len(content) or target.read_bytes() != content:
            raise FieldError("image id", f"{target.name} is there already, with another picture")
        return
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, target)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(prog="python -m data_tools.unpack_images", description=(__doc__ or "").split(":")[0])
    parser.add_argument("sources", nargs="+", type=Path, metavar="TAR")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    add_name_argument(parser)
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a member that cannot be used")
    return parser.parse_args(list(arguments))


def run(arguments: Sequence[str], console: Console | None = None) -> int:
    """Unpack what the command line says; returns the number of pictures.

    Raises:
        VlscaleError: see :func:`unpack`; or a member cannot be used, and ``--on-error`` is not ``skip``.
    """
    console = console or Console(stderr=True)
    options = parse(arguments)
    names = ImageNames(options.image_id, FIELDS)
    missing = next((path for path in options.sources if not path.is_file()), None)
    if missing is not None:  # before hours of unpacking lead to it
        raise VlscaleError(f"{missing}: no such file; is the name mistyped?")
    total, dropped = 0, list[BadRow]()
    with progress_bar(console, "pictures", len(options.sources)) as advance:
        for path in options.sources:
            written, bad = unpack(path, options.out, names)
            if bad and options.on_error == "stop":
                raise VlscaleError(f"{bad[0]}; --on-error skip leaves such members out and lists them")
            total += written
            dropped += bad
            advance(1, written)
    for row in dropped[:_SHOWN]:
        console.print(f"left out: {row}", highlight=False, markup=False, soft_wrap=True)
    if len(dropped) > _SHOWN:
        console.print(f"... and {len(dropped) - _SHOWN} more")
    console.print(f"{total} pictures in {options.out}, {len(dropped)} left out", highlight=False, soft_wrap=True)
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("unpack_images"):
        run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
