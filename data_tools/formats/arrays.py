"""Arrays, numbers and boxes out of foreign bytes: strict in dtype, shape and size, and never a pickle.

Every function names the field it reads; what is wrong with it is a :class:`FieldError`, which a reader turns into a
:class:`data_tools.records.BadRow`. Arrays may be read-only views of the bytes they came from.
"""

from __future__ import annotations

import argparse
import binascii
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.records import BadRow

MAX_REGIONS = 1024
"""Regions of one image."""
MAX_WIDTH = 1 << 16
"""Width D of the features, or number C of classes."""
MAX_SIDE = 1 << 20
"""Pixels of an image's side."""
MAX_LINE = 64 << 20
"""Bytes of a line or a record."""
MAX_TEXT = 1 << 20
"""Bytes of a text."""
MAX_ID = 512
"""Characters of an id."""
MAX_ARRAY_BYTES = 256 << 20
"""Bytes that the arrays of one record may unpack to."""
PIXEL_SLACK = 0.5
"""Boxes may leave the image by half a pixel (rounding of coordinates); they are then cut to it."""
FRACTION_SLACK = 2e-3
"""The same for boxes that are stored as fractions of the image, also in float16."""

_WHOLE = re.compile("-?[0-9]{1,19}")
DTYPES = {
    spelled: dtype
    for dtype in map(np.dtype, ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "bool"))
    for spelled in {dtype.str, dtype.str[1:]}
}
"""Plain numbers in this machine's byte order, as numpy and its pickles spell them. Numpy is not asked: it reads much
more than a dtype out of a text."""


class FieldError(Exception):
    """A field of a row that cannot be used.

    Attributes:
        field: its name.
        why: what was found and what was expected.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why

    def at(self, where: str) -> BadRow:
        """Return the bad row that this makes of the row at ``where``."""
        return BadRow(where, self.field, self.why)


def show(value: object, limit: int = 40) -> str:
    """Return the beginning of a value for an error message, on one line."""
    try:
        text = repr(value if not isinstance(value, (bytes, str)) else value[: limit + 1])
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists in lists
        return f"a {type(value).__name__}"
    return text if len(text) <= limit + 3 else text[:limit] + "..."


def whole_number(field: str, value: Any, low: int = 0, high: int = (1 << 31) - 1) -> int:
    """Read an integer in ``low..high``: decimal digits in bytes or str, an int, a numpy integer, or a whole float."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        text = value.strip()
        if not _WHOLE.fullmatch(text):
            raise FieldError(field, f"{show(value)} is not a whole number")
        found = int(text)
    elif isinstance(value, (int, float, np.integer, np.floating)) and _is_whole(value):
        found = _short(field, int(value))
    else:
        raise FieldError(field, f"{show(value)} is not a whole number")
    if not low <= found <= high:
        raise FieldError(field, f"{found} lies outside {low}..{high}")
    return found


def _short(field: str, number: int) -> int:
    """Refuse numbers so large that Python would not even spell them out in the error."""
    if number.bit_length() > 64:
        raise FieldError(field, f"is a number of {number.bit_length()} bits, which lies outside any range")
    return number


def _is_whole(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):  # an int may be too large for the float that isfinite() makes of it
        return not isinstance(value, bool)
    return math.isfinite(value) and value == int(value)


def image_size(field: str, value: Any) -> int:
    """Read a side of an image in pixels, which may be 1..:data:`MAX_SIDE`."""
    return whole_number(field, value, 1, MAX_SIDE)


def region_count(field: str, value: Any) -> int:
    """Read a number of regions, which may be 1..:data:`MAX_REGIONS`."""
    return whole_number(field, value, 1, MAX_REGIONS)


def word(field: str, value: Any, limit: int = MAX_ID) -> str:
    """Read a name (str, UTF-8 bytes, or an integer as such) of 1..``limit`` printable characters."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(_short(field, int(value)))
    text = sentence(field, value, 4 * limit).strip()
    if not 1 <= len(text) <= limit or not text.isprintable():
        raise FieldError(field, f"{show(text)} is not a name of 1..{limit} printable characters")
    return text


def sentence(field: str, value: Any, limit: int = MAX_TEXT) -> str:
    """Read a text (str or UTF-8 bytes) of at most ``limit`` bytes."""
    if not isinstance(value, (bytes, str)):
        raise FieldError(field, f"{show(value)} is not a text")
    if len(value) > limit:
        raise FieldError(field, f"has {len(value)} bytes, at most {limit} are allowed")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FieldError(field, f"is not UTF-8 at byte {error.start}: {show(value)}") from None
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise FieldError(field, f"holds half a surrogate pair: {show(value)}")
    return value


def integers(field: str, value: bytes | str, limit: int = 1 << 16, high: int = (1 << 24) - 1) -> list[int]:
    """Read integers in ``0..high`` separated by spaces; the empty text is the empty list."""
    found = value.split()
    if len(found) > limit:
        raise FieldError(field, f"has {len(found)} numbers, at most {limit} are allowed")
    return [whole_number(f"{field}[{index}]", each, 0, high) for index, each in enumerate(found)]


def from_base64(field: str, text: bytes, rows: int, width: int | None = None, dtype: str = "<f4") -> NDArray[Any]:
    """Decode base64 to [rows, width], or to [rows, W] for whatever W fits if ``width`` is None.

    Strict without a second pass over the text: a decoder that skips foreign characters yields fewer bytes than the
    text's length promises.
    """
    try:
        data = _decode_base64(text)
    except (binascii.Error, ValueError) as error:
        raise FieldError(field, f"is not base64 ({error})") from None
    if len(text) != 4 * ((len(data) + 2) // 3):
        raise FieldError(field, f"is not base64: {len(text)} characters hold only {len(data)} bytes")
    return from_bytes(field, data, rows, width, dtype)


def _decode_base64(text: bytes) -> bytes:
    """Decode with SIMD instructions where the package is installed (twenty times as fast), strictly either way."""
    try:
        from pybase64 import b64decode
    except ImportError:
        return binascii.a2b_base64(text)
    try:
        decoded: bytes = b64decode(text, validate=True)
    except binascii.Error:
        return binascii.a2b_base64(text)  # says what is wrong in the same words
    return decoded


def from_bytes(field: str, data: bytes, rows: int, width: int | None = None, dtype: str = "<f4") -> NDArray[Any]:
    """View raw bytes as [rows, width], or as [rows, W] for whatever W in 1..:data:`MAX_WIDTH` fits."""
    unit = rows * np.dtype(dtype).itemsize
    if width is None:
        width, rest = divmod(len(data), unit)
        if rest or not 1 <= width <= MAX_WIDTH:
            raise FieldError(field, f"has {len(data)} bytes, which are not {rows} rows of 1..{MAX_WIDTH} {dtype[1:]}")
    if len(data) != unit * width:
        raise FieldError(field, f"has {len(data)} bytes, expected {unit * width} ({rows} x {width} {dtype[1:]})")
    return np.frombuffer(data, dtype).reshape(rows, width)


def typed(field: str, array: Any, dtypes: Sequence[str], shape: Sequence[int | None]) -> NDArray[Any]:
    """Check an array's dtype and shape (None: any length of 1..:data:`MAX_WIDTH`) and return it, C-contiguous.

    Args:
        field: name for errors.
        array: the value; anything but an array is refused.
        dtypes: names of the dtypes that are allowed.
        shape: the expected shape.
    """
    if not isinstance(array, np.ndarray):
        raise FieldError(field, f"{show(array)} is not an array")
    if array.dtype.name not in dtypes or not array.dtype.isnative:
        raise FieldError(field, f"is {array.dtype.str}, expected {' or '.join(dtypes)}")
    wanted = tuple(shape)
    fits = array.ndim == len(wanted) and all(
        (1 <= found <= MAX_WIDTH) if want is None else found == want
        for found, want in zip(array.shape, wanted, strict=True)
    )
    if not fits:
        spelled = " x ".join("?" if want is None else str(want) for want in wanted)
        raise FieldError(field, f"has shape {' x '.join(map(str, array.shape)) or '()'}, expected {spelled}")
    return np.ascontiguousarray(array)


def finite(field: str, array: NDArray[Any]) -> NDArray[Any]:
    """Refuse NaN and infinite values; return the array."""
    if not _all_finite(array):
        place = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
        raise FieldError(field, f"has {array[place]} at {[int(index) for index in place]}")
    return array


def from_description(field: str, dtype: Any, shape: Any, data: Any) -> NDArray[Any]:
    """Build an array from its spelled parts: dtype string (``"<f4"``), shape (list of integers) and raw bytes."""
    kind = plain_dtype(field, dtype.decode("latin-1") if isinstance(dtype, bytes) else dtype)
    if not isinstance(shape, (list, tuple)) or len(shape) > 4:
        raise FieldError(field, f"has the shape {show(shape)}")
    sizes = [whole_number(f"{field}.shape", size, 0, 1 << 31) for size in shape]
    if not isinstance(data, (bytes, bytearray, memoryview)) or len(data) != kind.itemsize * math.prod(sizes):
        found = len(data) if isinstance(data, (bytes, bytearray, memoryview)) else "no"
        raise FieldError(field, f"has {found} bytes, expected {kind.itemsize * math.prod(sizes)} for {kind} {sizes}")
    return np.frombuffer(data, kind).reshape(sizes)


def _all_finite(array: NDArray[Any]) -> bool:
    """Look at float16's bits, ten times as fast as :func:`numpy.isfinite` (11 instead of 110 us for 36 x 2048):
    without the sign, those of finite numbers are below those of infinity."""
    if array.dtype != np.float16 or not array.flags.c_contiguous or not array.size:
        return bool(np.isfinite(array).all())
    bits = array.view(np.uint16)
    return bool(bits.max() < 0x7C00 or (bits & np.uint16(0x7FFF)).max() < 0x7C00)


def plain_dtype(field: str, spelled: object) -> np.dtype[Any]:
    """Return the dtype that a file spells, which must be one of plain numbers (:data:`DTYPES`)."""
    found = DTYPES.get(spelled) if isinstance(spelled, str) else None
    if found is None:
        raise FieldError(field, f"has the dtype {show(spelled)}, expected a plain number type")
    return found


def unpack_msgpack(field: str, blob: bytes, max_items: int = 1 << 16) -> Any:
    """Unpack one msgpack object of plain types; all strings are bytes, whether packed as ``str``, ``raw`` or ``bin``.

    Arrays (maps as msgpack-numpy writes them) stay maps: see :func:`from_msgpack`. Extension types are refused.
    """
    import msgpack

    def no_extension(code: int, _data: bytes) -> None:
        raise ValueError(f"extension type {code}")

    try:
        return msgpack.unpackb(
            blob,
            raw=True,
            strict_map_key=False,
            ext_hook=no_extension,
            max_array_len=max_items,
            max_map_len=max_items,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise FieldError(field, f"is not msgpack of plain types ({str(error) or type(error).__name__})") from None


def from_msgpack(field: str, value: Any) -> Any:
    """Turn the map that msgpack-numpy writes for an array or a numpy number into it; return anything else as it is.

    Its keys are ``nd``, ``type``, ``kind``, ``shape`` and ``data``; structured (``V``) and object (``O``) kinds, which
    msgpack-numpy would unpickle, are refused.
    """
    if not isinstance(value, dict) or b"nd" not in value:
        return value
    if value.get(b"kind", b"") not in (b"", ""):
        raise FieldError(field, f"is an array of kind {show(value[b'kind'])}, expected plain numbers")
    shape = value.get(b"shape") if value[b"nd"] is True else []
    array = from_description(field, value.get(b"type"), shape, value.get(b"data"))
    return array if value[b"nd"] is True else array[()]


@dataclass(frozen=True)
class BoxRule:
    """How a source spells its boxes; the default is what public files say, and nothing is guessed from the numbers.

    Attributes:
        order: ``xyxy`` (corners), ``xywh`` (corner and size) or ``yxyx`` (corners, y first).
        swap: put swapped corners in order instead of refusing them.
        clip: cut boxes to the image instead of refusing those that leave it.
    """

    order: str = "xyxy"
    swap: bool = False
    clip: bool = False

    def apply(
        self, field: str, boxes: NDArray[Any], width: float, height: float, slack: float = PIXEL_SLACK
    ) -> NDArray[np.float32]:
        """Turn [R, 4] boxes in the units of ``width`` and ``height`` into float32 corners in 0..1.

        Raises:
            FieldError: swapped or negative corners, boxes that leave the image or have no area.
        """
        boxes = finite(field, np.asarray(boxes, np.float32))
        if self.order == "yxyx":
            boxes = boxes[:, [1, 0, 3, 2]]
        elif self.order == "xywh":
            _refuse(field, boxes, (boxes[:, 2:] < 0).any(1), "has a negative size; is --boxes right?")
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        if self.swap:
            boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
        else:
            swapped = (boxes[:, 2:] < boxes[:, :2]).any(1)
            _refuse(field, boxes, swapped, "has swapped corners; --boxes xywh or --fix-boxes swap?")
        size = np.array([width, height, width, height], np.float32)
        if not self.clip:
            _refuse(field, boxes, (boxes < -slack).any(1), "has a negative corner; --fix-boxes clip cuts it")
            outside = (boxes > size + np.float32(slack)).any(1)
            _refuse(field, boxes, outside, f"leaves the image of {width:g} x {height:g}; --boxes or --fix-boxes clip?")
        unit = np.clip(boxes / size, np.float32(0), np.float32(1))
        _refuse(field, boxes, (unit[:, 2:] <= unit[:, :2]).any(1), "has no area inside the image; is --boxes right?")
        return unit


def _refuse(field: str, boxes: NDArray[Any], bad: NDArray[np.bool_], why: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise FieldError(f"{field}[{row}]", f"({', '.join(f'{number:g}' for number in boxes[row])}) {why}")


def add_box_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--boxes`` and ``--fix-boxes``; :func:`box_rule` reads them."""
    parser.add_argument(
        "--boxes",
        choices=("xyxy", "xywh", "yxyx"),
        default="xyxy",
        help="how the source spells a box: corners, corner and size, or corners with y first (default xyxy)",
    )
    parser.add_argument(
        "--fix-boxes",
        choices=("swap", "clip"),
        action="append",
        default=[],
        help="repair what is refused otherwise: swapped corners, boxes that leave the image (may be repeated)",
    )


def box_rule(options: argparse.Namespace) -> BoxRule:
    """Return the rule that the arguments of :func:`add_box_arguments` ask for."""
    return BoxRule(options.boxes, "swap" in options.fix_boxes, "clip" in options.fix_boxes)
