"""Codecs of region features: ``lossless``, and ``uint8``, which is half the size of float16 and says what it loses.

A coded array [R, D] is, all little-endian:

    uint8   version, 1
    uint8   codec: 1 lossless, 2 uint8
    uint8   bytes per element of the decoded array, 2 or 4
    uint8   lossless: flags, see below; uint8: 0
    uint32  R
    uint32  D
    ...     payload

``lossless``. Flag 1: the payload begins with a bitmap of R * D bits (low bit first), set where an element is not all
zero bits; the elements that follow are those. Without it all elements follow. They are stored byte by byte of the
element ("planes"), the lowest first, each ``uint32 size`` and that many bytes: a zstd frame if flag 2 << plane is set,
else the bytes themselves. So sign and exponent, which repeat, are compressed, and the low bits of the mantissa, which
do not, are only copied. The encoder takes what is smallest; where nothing helps, a coded array is 20 bytes longer than
the plain one and read as fast.

``uint8``. Per region float32 ``low`` and ``step``, then R * D bytes q: an element is low + q * step. The largest error
is half a step.

Ratio of sizes and decoding speed beside their rivals: ``make bench`` (``tests/bench/bench_codec.py``).
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

LOSSLESS, UINT8 = "lossless", "uint8"
CODECS = (LOSSLESS, UINT8)
LEVEL = 1
"""zstd's level: higher ones take longer and hardly find more in exponents."""

_HEADER = struct.Struct("<BBBBII")
_SIZE = struct.Struct("<I")
_NUMBERS = {LOSSLESS: 1, UINT8: 2}
_BITMAP = 1
_WORTH = 0.97
"""A plane is stored compressed if that makes it at least so much smaller: decompressing costs time."""


def encode(codec: str, features: NDArray[Any]) -> bytes:
    """Encode float16 or float32 [R, D].

    Raises:
        ValueError: another dtype or shape, or no such codec.
    """
    if features.ndim != 2 or features.dtype not in (np.dtype("<f2"), np.dtype("<f4")) or codec not in _NUMBERS:
        raise ValueError(f"codec {codec!r} does not take {features.dtype} {list(features.shape)}")
    features = np.ascontiguousarray(features)
    flags, payload = _encode_lossless(features) if codec == LOSSLESS else (0, _encode_uint8(features))
    return b"".join([_HEADER.pack(1, _NUMBERS[codec], features.itemsize, flags, *features.shape), *payload])


def shape_of(blob: NDArray[np.uint8]) -> tuple[int, int]:
    """Return (R, D) as a coded array claims them.

    Raises:
        ValueError: it is too short for its header.
    """
    if len(blob) < _HEADER.size:
        raise ValueError(f"{len(blob)} bytes, fewer than a header")
    rows, width = _HEADER.unpack_from(blob.data)[4:]
    return int(rows), int(width)


def decode_into(codec: str, blob: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Decode into ``out``; nothing in ``blob`` is believed, and nothing larger than ``out`` is allocated.

    Args:
        codec: ``lossless`` or ``uint8``.
        blob: uint8 [n], what :func:`encode` returned.
        out: float16 or float32 [R, D], C-contiguous.

    Raises:
        ValueError: the blob is damaged, or codes another array than ``out``.
    """
    shape = shape_of(blob)
    version, number, itemsize, flags = _HEADER.unpack_from(blob.data)[:4]
    if (version, number) != (1, _NUMBERS.get(codec)):
        raise ValueError(f"version {version} of codec number {number}, expected version 1 of {codec}")
    if (itemsize, shape) != (out.itemsize, out.shape):
        raise ValueError(f"codes {list(shape)} of {itemsize} bytes, expected {list(out.shape)} of {out.itemsize}")
    if not out.flags.c_contiguous:
        raise ValueError("the target is not contiguous")
    payload = blob[_HEADER.size :]
    if codec == LOSSLESS:
        _decode_lossless(payload, flags, out.reshape(-1))
    elif flags:
        raise ValueError(f"unknown flags {flags}")
    else:
        _decode_uint8(payload, out)


def _encode_lossless(features: NDArray[Any]) -> tuple[int, list[bytes]]:
    words = features.reshape(-1).view(f"<u{features.itemsize}")
    present = words != 0
    found: list[bytes] = []
    flags = 0
    if 8 * (words.size - np.count_nonzero(present)) * words.itemsize > words.size:  # more bits than the bitmap has
        flags = _BITMAP
        found.append(np.packbits(present, bitorder="little").tobytes())
        words = words.take(np.flatnonzero(present))  # twice as fast as words[present]
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    for place in range(words.itemsize):
        plain = (words >> (8 * place)).astype(np.uint8).tobytes()  # six times as fast as taking every n-th byte
        packed = compressor.compress(plain)
        if len(packed) < _WORTH * len(plain):
            flags |= 2 << place
            plain = packed
        found += [_SIZE.pack(len(plain)), plain]
    return flags, found


def _decode_lossless(payload: NDArray[np.uint8], flags: int, out: NDArray[Any]) -> None:
    itemsize, count = out.itemsize, out.size
    if flags >> (1 + itemsize):
        raise ValueError(f"unknown flags {flags}")
    words = out.view(f"u{itemsize}")
    if not flags & _BITMAP:
        _join_planes(payload, flags, words)
        return
    head = -(-count // 8)
    if len(payload) < head:
        raise ValueError(f"{len(payload)} bytes, fewer than the bitmap's {head}")
    present = np.unpackbits(payload[:head], count=count, bitorder="little")
    # Gathering, with a zero in front for the elements that are absent, is three times as fast as assigning by mask.
    place = np.cumsum(present, dtype=np.int32)
    values = np.empty((int(place[-1]) if count else 0) + 1, words.dtype)
    values[0] = 0
    _join_planes(payload[head:], flags, values[1:])
    place *= present
    np.take(values, place, out=words, mode="clip")  # "raise" would copy; all places are in range


def _join_planes(payload: NDArray[np.uint8], flags: int, words: NDArray[Any]) -> None:
    """Fill the unsigned ``words`` [n] from the planes, which must fill ``payload``."""
    at = 0
    for place in range(words.itemsize):
        if len(payload) < at + _SIZE.size:
            raise ValueError("ends before the planes do")
        (size,) = _SIZE.unpack_from(payload.data, at)
        at += _SIZE.size
        plane = payload[at : at + size]
        if len(plane) != size:
            raise ValueError(f"ends inside plane {place}")
        if flags & (2 << place):
            plane = _decompress(plane, len(words))
        if len(plane) != len(words):
            raise ValueError(f"plane {place} has {len(plane)} bytes, expected {len(words)}")
        if place == 0:
            words[:] = plane
        else:
            words |= np.left_shift(plane, 8 * place, dtype=words.dtype)
        at += size
    if at != len(payload):
        raise ValueError(f"{len(payload) - at} bytes too many")


def _decompress(plane: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    frame = plane.data
    try:
        # The decompressor allocates what the frame claims.
        claimed = zstandard.frame_content_size(frame)
        if claimed != size:
            raise ValueError(f"a zstd frame of {claimed} bytes, expected {size}")
        plain = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: {error}") from None
    return np.frombuffer(plain, np.uint8)


def _encode_uint8(features: NDArray[Any]) -> list[bytes]:
    values = features.astype(np.float32)
    low, high = values.min(1, initial=np.inf), values.max(1, initial=-np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        step = (high - low) / np.float32(255)
    if not np.isfinite(step).all():
        raise ValueError("codec uint8 does not take NaN, infinity, or a range beyond float32")
    safe = np.where(step > 0, step, np.float32(1))[:, None]
    quantised = np.rint((values - low[:, None]) / safe).clip(0, 255).astype(np.uint8)
    return [np.stack([low, step], 1).astype("<f4").tobytes(), quantised.tobytes()]


def _decode_uint8(payload: NDArray[np.uint8], out: NDArray[Any]) -> None:
    rows, width = out.shape
    if len(payload) != rows * (8 + width):
        raise ValueError(f"{len(payload)} bytes, expected {rows * (8 + width)}")
    scales = np.frombuffer(payload[: 8 * rows].tobytes(), "<f4").reshape(rows, 2)
    if not np.isfinite(scales).all():
        raise ValueError("a region's scale is NaN or infinite")
    quantised = torch.from_numpy(payload[8 * rows :].copy()).view(rows, width)
    values = torch.from_numpy(scales.copy())
    # NumPy 2.1 converts to float16 element by element; torch is ten times as fast.
    torch.from_numpy(out).copy_(quantised.float().mul_(values[:, 1:]).add_(values[:, :1]))
