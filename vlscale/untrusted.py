"""Names, counts and JSON out of files that strangers wrote: bounded and checked before anything is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlscale.errors import VlscaleError

MOST_TENSORS = 100_000
"""Of a checkpoint: the largest public ones of these models have a few thousand."""
MOST_NAME = 1024
"""Characters of a tensor's name or of a path in an archive."""
_MOST_COMMAS = 16 * MOST_TENSORS


def shown(name: str | bytes) -> str:
    """Return a name from a file as it may stand in a message: quoted, escaped, on one line, not endless."""
    text = name if isinstance(name, str) else name.decode("latin-1")
    return ascii(text if len(text) <= 120 else text[:120] + "...")


def is_sane_name(name: str) -> bool:
    """Say whether a tensor's name is printable Unicode of bounded length (so no lone surrogates, no line ends)."""
    return 0 < len(name) <= MOST_NAME and name.isprintable()


def is_file_name(name: str) -> bool:
    """Say whether a name stands for a file of the folder itself: no path, nothing hidden, at most 255 bytes."""
    plain = is_sane_name(name) and not set(name) & set("/\\:") and not name.startswith(".")
    return plain and len(name.encode()) <= 255


def check_count(path: Path, count: int) -> None:
    """Refuse a file of absurdly many tensors.

    Raises:
        VlscaleError: more than :data:`MOST_TENSORS`.
    """
    if count > MOST_TENSORS:
        raise VlscaleError(f"{path}: holds more than {MOST_TENSORS} tensors; this is no checkpoint of such a model")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of an object of JSON (``object_pairs_hook``), of which none of two equal keys is lost.

    Raises:
        VlscaleError: a key stands twice; names no file, which the caller knows.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise VlscaleError(f"key {shown(key)} stands twice; remove one, or fetch the file again")
        found[key] = value
    return found


def strict_json(where: str, raw: bytes, objects: int) -> Any:
    """Parse UTF-8 JSON of a stranger: no key twice, no NaN, and the number of its parts bounded before they are made.

    Args:
        where: named in errors.
        raw: the text, of a length that the caller has bounded.
        objects: how many ``{...}`` it may hold at most.

    Raises:
        VlscaleError: any of these, or no JSON.
    """
    # Lists have no hook that could count; a part of a list costs a comma.
    if raw.count(b",") > _MOST_COMMAS:
        raise VlscaleError(f"{where}: has more than {_MOST_COMMAS} parts; this is no checkpoint of such a model")
    made = 0

    def counted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal made
        made += 1
        if made > objects:
            raise VlscaleError(f"has more than {objects} objects; this is no checkpoint of such a model")
        return unique_keys(pairs)

    def constant(text: str) -> None:
        raise VlscaleError(f"holds {text}, which is no JSON; the file is damaged")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=counted, parse_constant=constant)
    except VlscaleError as error:
        raise VlscaleError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an integer of 5,000 digits
        raise VlscaleError(f"{where}: not valid JSON ({error}); the file is damaged, fetch it again") from None
