"""Many rows of a store at once: byte ranges are resolved together, which row by row costs more than the decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.shard import Shard
from vlscale.data.store_base import Store


def decode_rows(store: Store, rows: Sequence[int], names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """What ``store.row`` gives for each of ``rows``; arrays are those of one dimension or two, and are copied.

    Args:
        store: any store.
        rows: in any order.
        names: columns; default all.

    Raises:
        VlscaleError: a row is damaged.
        IndexError: there is no such row.
    """
    wanted = np.asarray(rows, np.int64)
    found: list[dict[str, Any]] = [{}] * len(wanted)
    for shard, places, local in store.reader.by_shard(wanted):
        try:
            decoded = _decode(shard, local, names)
        except (ValueError, RecursionError):
            whole = [store.row(int(row)) for row in wanted[places]]  # says which row, and what is wrong
            decoded = [{name: row[name] for name in names or row} for row in whole]
        for place, row in zip(places.tolist(), decoded, strict=True):
            found[place] = row
    return found


def _decode(shard: Shard, local: NDArray[np.int64], names: Sequence[str] | None) -> list[dict[str, Any]]:
    wanted = [column for column in shard.columns if names is None or column.name in names]
    names = [column.name for column in wanted]
    columns = []
    for column, (starts, sizes) in zip(wanted, shard.spans(local, names), strict=True):
        raw = [
            shard.bytes[start : start + size].tobytes()
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
        columns.append([_value(column.kind, column.dtype, column.shape, one) for one in raw])
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(kind: str, dtype: Any, shape: tuple[int, ...] | None, raw: bytes) -> Any:
    """One decoded value.

    Raises:
        ValueError: it is not what its encoding says, or of a kind that is not decoded here.
    """
    if kind == "str":
        return raw.decode("utf-8")
    if kind == "json":
        return json.loads(raw)
    if kind == "int":
        return int.from_bytes(raw, "little", signed=True)
    if kind != "ndarray":
        raise ValueError(kind)
    if shape is not None:
        return np.frombuffer(raw, dtype).reshape(shape).copy()
    if not raw or raw[0] >> 2 not in (1, 2):
        raise ValueError("not an array of one dimension or two")
    ndim, width = raw[0] >> 2, 1 << (raw[0] & 3)
    head = 1 + ndim * width
    lengths = [int.from_bytes(raw[at : at + width], "little") for at in range(1, head, width)]
    return np.frombuffer(raw, dtype, offset=head).reshape(lengths).copy()
