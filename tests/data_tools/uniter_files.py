"""Writes UNITER's databases as the facts sheet says: with lmdb, msgpack and lz4 directly."""

import io
import json

import numpy as np
import pytest

lmdb = pytest.importorskip("lmdb")
lz4_frame = pytest.importorskip("lz4.frame")
msgpack = pytest.importorskip("msgpack")

WIDTH, CLASSES = 8, 5


def arrays_of(number, regions, dtype=np.float16):
    """The arrays of an image, equal for equal numbers."""
    rng = np.random.default_rng(number)
    low = rng.uniform(0, 0.4, (regions, 2))
    size = rng.uniform(0.1, 0.5, (regions, 2))
    return {
        "features": rng.standard_normal((regions, WIDTH)).astype(dtype),
        "norm_bb": np.concatenate([low, low + size, size], 1).astype(dtype),
        "conf": np.linspace(0.95, 0.05, regions).astype(dtype),
        "soft_labels": (rng.random((regions, CLASSES)) / 2).astype(dtype),
    }


def as_msgpack(arrays):
    """msgpack-numpy's encoding: nd, type, kind, shape and data, keys as bytes."""
    encoded = {
        name: {
            b"nd": True,
            b"type": array.dtype.str,
            b"kind": b"",
            b"shape": list(array.shape),
            b"data": array.tobytes(),
        }
        for name, array in arrays.items()
    }
    return msgpack.packb(encoded, use_bin_type=True)


def as_npz(arrays):
    """The public script's compressed npz."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays, allow_pickle=np.asarray(False))  # the public script's stray entry
    return stream.getvalue()


def write_lmdb(folder, items):
    """Write a database."""
    folder.mkdir(parents=True)
    env = lmdb.open(str(folder), map_size=1 << 26)
    with env.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key.encode(), value)
    env.close()
    return folder


def write_images(folder, values):
    """Write an image database, with its list of keys."""
    return write_lmdb(folder, {**values, "__keys__": json.dumps(list(values)).encode()})


def write_texts(folder, rows, meta=None, **side):
    """Write a text database and its side files."""
    values = {name: lz4_frame.compress(msgpack.packb(row, use_bin_type=True)) for name, row in rows.items()}
    write_lmdb(folder, values)
    meta = meta or {"CLS": 2, "SEP": 3, "MASK": 4, "UNK": 1, "v_range": [5, 12], "bert": "toy"}
    (folder / "meta.json").write_text(json.dumps(meta))
    for name, value in side.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
