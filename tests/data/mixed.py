"""A store with every encoding, and what mosaicml-streaming reads from one."""

from __future__ import annotations

import json

import numpy as np
from streaming.base.format.mds import MDSReader

from vlscale.data.mds import open_writer

MIXED = {"a": "ndarray:float16", "b": "int", "c": "str", "d": "json", "e": "ndarray:float32:3", "f": "ndarray:int32"}


def write_mixed(folder):
    """Rows of every encoding, with dimensions on both sides of 2**8 and 2**16."""
    rng = np.random.default_rng(0)
    writer = open_writer(folder, MIXED, 1 << 18)
    for row, width in enumerate([1, 255, 256, 300, 65535, 65536, 3] * 3):
        writer.write(
            {
                "a": rng.standard_normal((2, width)).astype(np.float16),
                "b": row - 5,
                "c": "é" * (row % 3),
                "d": {"row": row, "list": [1.5, None]},
                "e": rng.standard_normal(3).astype(np.float32),
                "f": rng.integers(0, 9, width).astype(np.int32),
            }
        )
    writer.finish()
    return folder


def theirs(folder):
    """All rows of a store by streaming's own reader."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    readers = [MDSReader.from_json(str(folder), "", shard) for shard in shards]
    return [reader[row] for reader in readers for row in range(len(reader))]


def equal(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other
