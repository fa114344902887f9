"""``vlscale convert``: checkpoints of other systems in, and out."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from dataclasses import asdict
from pathlib import Path

from vlscale.convert.conversion import RefusedError, Wish, convert
from vlscale.convert.layouts import titles
from vlscale.convert.placing import check_apart
from vlscale.convert.report import Report
from vlscale.convert.targets import TARGETS
from vlscale.convert.verification import Comparison, verify
from vlscale.errors import VlscaleError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    known = {**titles(), "bert": "a Hugging Face folder", "roberta": "a Hugging Face folder"}
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join([
        "files that are read, known by content: torch.save's in both formats, safetensors, checkpoints of DeepSpeed's",
        "and universal ones, folders of Hugging Face and vlscale, Paddle fluid's (folder, tar, one file), .pdparams",
        "\nnames (--from):", *(f"  {name:11} {title}" for name, title in known.items()),
        "\nresults (--to):", *(f"  {name:11} {target.title}" for name, target in TARGETS.items()),
        "\nexit status: 0; 1 where --verify finds a difference; 2 for a mistake, or missing or unexpected tensors.",
    ])  # fmt: skip
    parser.add_argument("source", nargs="?", type=Path, metavar="SRC", help="file or folder to convert")
    parser.add_argument("target", nargs="?", type=Path, metavar="DST", help="file or folder to write")
    parser.add_argument("--from", dest="layout", metavar="FORMAT", help="of SRC's names, where they are ambiguous")
    parser.add_argument("--to", metavar="FORMAT", help="of DST; default: vlscale where it has the model")
    parser.add_argument("--dtype", default="fp32", metavar="DTYPE", help="fp32 (default), fp16, bf16, or keep")
    parser.add_argument("--model", metavar="NAME", help="preset or config.json, for what SRC does not say of itself")
    parser.add_argument("--allow-missing", action="append", default=[], metavar="PATTERN", help="may be repeated")
    parser.add_argument("--allow-unexpected", action="append", default=[], metavar="PATTERN", help="may be repeated")
    parser.add_argument("--no-hash", action="store_true", help="neither check nor tell hashes; for very large files")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="also write what was done with every tensor, as JSON"
    )
    parser.add_argument("--verify", type=Path, metavar="DST", help="compare DST with --against, write nothing")
    parser.add_argument("--against", type=Path, metavar="SRC")


def run(arguments: argparse.Namespace) -> int:
    """Convert or verify; the exit status is told by ``--help``."""
    verifying = bool(arguments.verify or arguments.against)
    if verifying:
        _check_verify(arguments)
    elif arguments.source is None or arguments.target is None:
        raise VlscaleError("give SRC and DST; see vlscale convert --help")
    _check_report(arguments)
    if threading.current_thread() is threading.main_thread():  # end as on Ctrl-C: nothing half-written stays
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return _verify(arguments) if verifying else _convert(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    wish = Wish(
        arguments.source, arguments.target, arguments.layout, arguments.to, arguments.dtype, arguments.model,
        arguments.allow_missing, arguments.allow_unexpected, arguments.overwrite, not arguments.no_hash,
    )  # fmt: skip
    try:
        report = convert(wish)
    except RefusedError as refused:
        print(refused.report.text())
        _write(arguments.report, _json(refused.report))
        raise
    print(report.text())
    _write(arguments.report, _json(report))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found = verify(arguments.verify, arguments.against, arguments.layout, arguments.to, arguments.allow_unexpected)
    print(found.text())
    _write(arguments.report, _json(found))
    return 0 if found.same else 1


def _check_verify(arguments: argparse.Namespace) -> None:
    others = arguments.model, arguments.allow_missing, arguments.overwrite, arguments.no_hash, arguments.dtype != "fp32"
    if not (arguments.verify and arguments.against) or arguments.source or any(others):
        raise VlscaleError(
            "--verify DST --against SRC go together, with --from, --to, --allow-unexpected or --report alone"
        )


def _check_report(arguments: argparse.Namespace) -> None:
    """A report is a new file, or replaces a report: nothing else is lost for it."""
    path: Path | None = arguments.report
    if path is None:
        return
    places = [place for place in (arguments.source, arguments.target, arguments.verify, arguments.against) if place]
    check_apart(path, places)
    if not path.absolute().parent.is_dir():
        raise VlscaleError(f"--report {path}: {path.absolute().parent} is no folder; make it first")
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes()[:1] == b"{"):
        raise VlscaleError(f"--report {path}: exists and is no report; give another name")


def _json(told: Report | Comparison) -> str:
    return json.dumps(asdict(told), indent=1, default=str) + "\n"


def _write(path: Path | None, text: str) -> None:
    if path is None:
        return
    beside = path.with_name(f".vlscale-report-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise VlscaleError(f"--report {path}: cannot be written ({error.strerror}); the result stands") from None
