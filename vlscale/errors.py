"""The one exception that means "the user can mend this".

Entry points print it as a single line and exit with status 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class VlscaleError(Exception):
    """A mistake in a file, a setting or an input. The message names the place, what was found and the cure."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a :class:`VlscaleError` inside the block into one line on stderr and exit status 2."""
    try:
        yield
    except VlscaleError as error:
        line = " ".join(str(error).split())
        print(f"{program}: error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
