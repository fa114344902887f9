"""Sources for ``bench_import``, written from their descriptions, and bare loops that only decode them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
from numpy.typing import NDArray

REGIONS, WIDTH, CLASSES = 36, 2048, 1601
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
VOCABULARY = 28_996


def write_tsv(path: Path, rows: int) -> int:
    """Write a bottom-up-attention TSV of ``rows`` images (64 different ones in turn) and return its bytes."""
    rng = np.random.default_rng(0)
    tails = []
    for _ in range(64):
        low = rng.uniform(0, 300, (REGIONS, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 150, (REGIONS, 2))], 1).astype("<f4")
        features = np.maximum(rng.standard_normal((REGIONS, WIDTH)), 0).astype("<f4")
        tails.append(f"\t640\t480\t{REGIONS}\t".encode() + base64.b64encode(boxes) + b"\t" + base64.b64encode(features))
    with path.open("wb") as file:
        for row in range(rows):
            file.write(str(row).encode() + tails[row % 64] + b"\n")
        return file.tell()


def decode_tsv(path: Path, decode: Callable[[bytes], bytes]) -> None:
    """Read a TSV line by line, split it, decode boxes and features."""
    with path.open("rb", buffering=1 << 20) as lines:
        for line in lines:
            fields = line.rstrip(b"\n").split(b"\t")
            count = int(fields[3])
            np.frombuffer(decode(fields[4]), "<f4").reshape(count, 4)
            np.frombuffer(decode(fields[5]), "<f4").reshape(count, -1)


def _arrays(rng: np.random.Generator) -> dict[str, NDArray[np.float16]]:
    low = rng.uniform(0, 0.4, (REGIONS, 2))
    sides = rng.uniform(0.1, 0.5, (REGIONS, 2))
    return {
        "features": np.maximum(rng.standard_normal((REGIONS, WIDTH)), 0).astype("<f2"),
        "norm_bb": np.concatenate([low, low + sides, sides], 1).astype("<f2"),
        "conf": np.linspace(0.95, 0.05, REGIONS).astype("<f2"),
        "soft_labels": rng.dirichlet(np.full(CLASSES, 0.01), REGIONS).astype("<f2"),
    }


def _as_msgpack(arrays: dict[str, NDArray[Any]]) -> bytes:
    """As msgpack-numpy encodes arrays."""
    packed = {
        name: {b"nd": True, b"type": each.dtype.str, b"kind": b"", b"shape": list(each.shape), b"data": each.tobytes()}
        for name, each in arrays.items()
    }
    return bytes(msgpack.packb(packed, use_bin_type=True))


def _as_npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def _write_lmdb(folder: Path, items: Iterator[tuple[str, bytes]]) -> int:
    folder.mkdir(parents=True)
    total = 0
    with lmdb.open(str(folder), map_size=4 << 30) as database, database.begin(write=True) as transaction:
        for key, value in items:
            transaction.put(key.encode(), value)
            total += len(value)
    return total


def write_images(folder: Path, rows: int, compressed: bool) -> int:
    """Write a UNITER image database of ``rows`` images (16 different ones) and return its values' bytes."""
    rng = np.random.default_rng(0)
    values = [(_as_npz if compressed else _as_msgpack)(_arrays(rng)) for _ in range(16)]
    return _write_lmdb(folder, ((f"vg_{row:012d}.npz", values[row % 16]) for row in range(rows)))


def write_texts(folder: Path, rows: int, images: int) -> int:
    """Write a UNITER text database of ``rows`` texts about ``images`` images and return its values' bytes."""
    rng = np.random.default_rng(0)

    def items() -> Iterator[tuple[str, bytes]]:
        for row in range(rows):
            ids = rng.integers(106, VOCABULARY, int(rng.integers(6, 24))).tolist()
            text = {"input_ids": ids, "img_fname": f"vg_{row % images:012d}.npz", "sent": "words of a caption " * 3}
            yield f"{row:09d}", lz4.frame.compress(msgpack.packb(text, use_bin_type=True))

    total = _write_lmdb(folder, items())
    meta = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [106, VOCABULARY], "bert": "bert-base-cased"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return total


def write_vocabulary(path: Path) -> None:
    """Write a ``vocab.txt`` with BERT's special tokens in their places."""
    words = {place: word for word, place in SPECIAL.items()} | {106: "!"}
    path.write_text("".join(f"{words.get(place, f'[unused{place}]')}\n" for place in range(VOCABULARY)))


def _values(folder: Path) -> Iterator[bytes]:
    with (
        lmdb.open(str(folder), readonly=True, lock=False) as database,
        database.begin(buffers=False) as transaction,
        transaction.cursor() as cursor,
    ):
        yield from cursor.iternext(keys=False)


def decode_npz(folder: Path) -> None:
    """Load every array of a database of compressed npz."""
    for value in _values(folder):
        with np.load(io.BytesIO(value), allow_pickle=False) as arrays:
            for name in arrays.files:
                _ = arrays[name]


def decode_msgpack(folder: Path) -> None:
    """Load every array of a database of msgpack."""
    for value in _values(folder):
        msgpack.unpackb(value, object_hook=_array, strict_map_key=False)


def _array(item: dict[Any, Any]) -> Any:
    nd = item.get("nd", item.get(b"nd"))
    if not nd:
        return item
    data, kind, shape = (item.get(name, item.get(name.encode())) for name in ("data", "type", "shape"))
    return np.frombuffer(data, kind).reshape(shape)


def decode_texts(folder: Path) -> None:
    """Unpack every record of a text database."""
    for value in _values(folder):
        msgpack.unpackb(lz4.frame.decompress(value))
