"""The one exception that means "the user can mend this".

Entry points print it as a single line and exit with status 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class VlscaleError(Exception):
    """A mistake in a file, a setting or an input. The message names the place, what was found and the cure.

    Attributes:
        reported: the user has been told already (by another process of the same run).
    """

    reported = False


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def report_error(program: str, error: VlscaleError) -> None:
    """Print an error as one line on stderr, unless the user has been told already."""
    if not error.reported:
        error.reported = True
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a :class:`VlscaleError` inside the block into one line on stderr and exit status 2."""
    try:
        yield
    except VlscaleError as error:
        report_error(program, error)
        raise SystemExit(2) from None
