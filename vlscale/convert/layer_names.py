"""How many layers a checkpoint's names are of: they come from outside, and each layer is many names to look for."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vlscale.errors import VlscaleError
from vlscale.untrusted import shown

MOST_LAYERS = 1000
_DIGITS = len(str(MOST_LAYERS))


def layer_count(names: Iterable[str], pattern: str, origin: str) -> int:
    """Return the number of layers.

    Args:
        names: of a checkpoint.
        pattern: what a name of a layer begins with; its first group is the layer's number.
        origin: named in errors.

    Raises:
        VlscaleError: a layer between others is missing, or a number is absurd.
    """
    found: dict[int, str] = {}
    for name in names:
        match = re.match(pattern, name)
        if match is None:
            continue
        digits = match[1]
        if not digits.isascii() or len(digits) > _DIGITS or int(digits) >= MOST_LAYERS:
            raise VlscaleError(
                f"{origin}: {shown(name)} is of a layer beyond {MOST_LAYERS}; this is no checkpoint of such a model"
            )
        found.setdefault(int(digits), name)
    absent = next((layer for layer in range(len(found)) if layer not in found), None)
    if absent is not None:
        last = max(found)
        raise VlscaleError(
            f"{origin}: has {shown(found[last])}, but nothing of layer {absent}; give the whole checkpoint, layers 0 "
            f"to {last}"
        )
    return len(found)
