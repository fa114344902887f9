"""Ways to damage a store on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from vlscale.data.reader import MdsReader


def rewrite(folder: Path, number: int, edit: Callable[[bytearray], object]) -> None:
    """Edit the bytes of shard ``number`` and make size and hash in index.json agree, as an enemy would."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    file = index["shards"][number]["raw_data"]
    shard = folder / file["basename"]
    content = bytearray(shard.read_bytes())
    edit(content)
    shard.write_bytes(content)
    file["bytes"] = len(content)
    file["hashes"]["xxh64"] = xxhash.xxh64_hexdigest(bytes(content))
    path.write_text(json.dumps(index))


def patch(folder: Path, reader: MdsReader, row: int, column: str, at: int, value: bytes) -> None:
    """Overwrite bytes of one column of one row, ``at`` counted from the column's start (from its end if negative)."""
    number = int(np.searchsorted(reader.ends, row, side="right")) - 1
    ((start, size),) = reader.shard(number).spans(np.array([row - reader.ends[number]]), [column])
    begin = int(start[0]) + (at if at >= 0 else int(size[0]) + at)
    rewrite(folder, number, lambda content: content.__setitem__(slice(begin, begin + len(value)), value))
