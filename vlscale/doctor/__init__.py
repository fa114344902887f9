"""``vlscale doctor``: is this host fit to train, and what to do where it is not; ``--dist`` looks at all of them."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vlscale.errors import VlscaleError
from vlscale.train.options import JOIN_TIMEOUT_S, seconds

if TYPE_CHECKING:
    from vlscale.doctor.facts import Leftover


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    parser.add_argument(
        "--clean", action="store_true",
        help="first remove what killed runs of yours left in shared memory and no process has open",
    )  # fmt: skip
    parser.add_argument(
        "--dist", action="store_true",
        help="started on every rank by torchrun, srun or deepspeed: compare the hosts and measure an all-reduce",
    )  # fmt: skip
    parser.add_argument(
        "--join_timeout", type=seconds, default=JOIN_TIMEOUT_S, metavar="SECONDS",
        help="with --dist: how long the other ranks may take to start (%(default)g)",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from deepspeed's launcher


def run(arguments: argparse.Namespace) -> int:
    """Look and tell; 1 if something failed, 0 if all is well or there are only warnings.

    Raises:
        VlscaleError: with ``--dist``: the ranks do not come together.
    """
    if arguments.dist:
        if arguments.clean:
            raise VlscaleError("--clean and --dist exclude each other; run vlscale doctor --clean once on each host")
        from vlscale.doctor.dist import examine_together

        return examine_together(arguments.json, arguments.join_timeout)
    return _examine(arguments.json, arguments.clean)


def _examine(as_json: bool, clean_first: bool) -> int:
    from vlscale.doctor import examination, text
    from vlscale.doctor.findings import exit_status
    from vlscale.doctor.gather import gather

    removed, hiding = _clean() if clean_first else ([], [])
    facts = gather()
    findings = examination.judge(facts)
    if as_json:
        found = examination.as_json(facts, findings)
        if clean_first:
            found["removed"] = [item.path for item in removed]
        print(json.dumps(found, indent=2))
        return exit_status(findings)
    out = text.console()
    if clean_first:
        text.show_lines(_cleaning(removed, hiding), out)
    text.show_lines([facts.network.host], out)
    text.show(findings, out)
    return exit_status(findings)


def _clean() -> tuple[list[Leftover], list[str]]:
    from vlscale.doctor.leftovers import clean
    from vlscale.doctor.system import SHM

    return clean(SHM, Path(tempfile.gettempdir()))


def _cleaning(removed: list[Leftover], hiding: list[str]) -> list[str]:
    from vlscale.doctor.findings import counted, size, some

    if hiding:
        return [f"nothing removed: {some(hiding)} hide which files they use; end them first"]
    return [
        *(f"removed {item.path}" for item in removed),
        f"removed {counted(len(removed), 'file')}, {size(sum(item.bytes for item in removed))}",
    ]
