"""Fingerprint of a plan: what decides its steps, one short hash per part, so that a difference can be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vlscale.errors import VlscaleError

_BESIDE = {
    "units": "objectives.unified.language.units",
    "rewrites": "objectives.unified.contrast.positives and negatives",
    "retrieved": "objectives.unified.contrast.images and texts",
}
"""Store beside the texts -> what decides whether it is read."""


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """``part=hash,part=hash`` of plain JSON types."""
    return ",".join(f"{part}={_digest(value)}" for part, value in parts.items())


def check_same(known: str, present: str) -> None:
    """Refuse to go on with a plan that differs from the one a checkpoint was written under.

    Args:
        known: the fingerprint that the checkpoint holds.
        present: of the plan.

    Raises:
        VlscaleError: something differs; the message names what.
    """
    old = dict(part.partition("=")[::2] for part in str(known).split(","))
    new = dict(part.partition("=")[::2] for part in present.split(","))
    changed = [part for part in {**old, **new} if old.get(part) != new.get(part)]
    if changed:
        raise VlscaleError(
            f"resume: a changed {_plain(changed[0])}: {', '.join(changed)} of the plan differ from the "
            f"checkpoint's; restore what was changed, or start a new run in another folder"
        )


def _plain(part: str) -> str:
    """The user's words for a part of the fingerprint."""
    words = {
        "seed": "recipe (seed)",
        "mix": "recipe (data.datasets[].mix, repeat or choose, or data.mix_unit)",
        "data": "recipe (data.max_text_tokens, data.max_regions or data.window_shards)",
        "batch": "recipe (batch.global_batch_tokens or batch.global_batch_examples; mode reference: any of batch)",
        "itm": "recipe (objectives.itm or objectives.wra.group)",
        "unified": "recipe (objectives.unified)",
        "order": "order of examples (another version of vlscale)",
        "expansion": "expansion of units to rows (another version of vlscale)",
    }
    beside = part.rpartition(" ")[2]
    if part.count(" ") > 1 and beside in _BESIDE:  # dataset NAME STORE
        return f"{beside}/ beside a data set, or whether it is read ({_BESIDE[beside]})"
    return words.get(part, "data set on resume")


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
