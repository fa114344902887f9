"""The command line: ``vlscale COMMAND ...``. Each command stands in a module of its own, imported when it is chosen.

A command's module has ``add_arguments(parser)`` and ``run(arguments) -> int``, which returns the exit status: 0, or 1
where it found what it was asked to look for (damage). 2 means a mistake, told in one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import vlscale
from vlscale.errors import VlscaleError, nearest, one_line_errors

COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("vlscale.convert.command", "checkpoints of UNITER, BERT, DeepSpeed and others, in and out"),
    "doctor": ("vlscale.doctor", "is this host, or every host of a run, fit to train; what to do where not"),
    "launch": ("vlscale.cluster.command", "run a script on the hosts of a hostfile: checked first, watched to the end"),
    "plan": ("vlscale.plan.command", "memory, time and cost of a recipe on so many GPUs, before it is run"),
    "inspect": ("vlscale.report.inspect", "what a dataset or a store holds; damage; what a plan makes of it"),
}
"""Name -> (module, one line of help)."""


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line, as everything else that a user can mend."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`VlscaleError`."""
        raise VlscaleError(f"{message}; see {self.prog} --help")


def parser_of(command: str) -> Parser:
    """Return the parser of one command."""
    module, summary = COMMANDS[command]
    parser = Parser(prog=f"vlscale {command}", description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
    import_module(module).add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Raises:
        SystemExit: after ``--help`` and ``--version`` (0), or after a mistake (2).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else None
    if command in (None, "-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"vlscale {vlscale.__version__}")
        return 0
    _replace_what_cannot_be_printed()
    try:
        with one_line_errors(f"vlscale {command}" if command in COMMANDS else "vlscale"):
            if command not in COMMANDS:
                raise VlscaleError(f"unknown command {command!r}{nearest(str(command), COMMANDS)}; see vlscale --help")
            status: int = import_module(COMMANDS[command][0]).run(parser_of(command).parse_args(words[1:]))
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # `vlscale ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: vlscale COMMAND ...", "", *lines, "", "vlscale COMMAND --help tells a command's options."]
    )


def _replace_what_cannot_be_printed() -> None:
    """Print words that the terminal's encoding lacks as escapes rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    raise SystemExit(main())
