"""Finding and decoding pictures: hostile until decoded."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data_tools.records import BadRow
from vlscale.errors import VlscaleError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 256 << 20
MAX_PIXELS = 100_000_000
MAX_RATIO = 50


def find(folder: Path) -> list[str]:
    """Names of the pictures below ``folder``, relative to it, sorted; links that leave the folder are left out.

    Raises:
        VlscaleError: it is no folder, or there is no picture in it.
    """
    if not folder.is_dir():
        raise VlscaleError(f"{folder}: no such folder; give the folder of the pictures")
    root = folder.resolve()
    names = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.resolve().is_relative_to(root)
    ]
    if not names:
        raise VlscaleError(f"{folder}: no pictures ({', '.join(SUFFIXES)}) in it or below")
    return sorted(names)


def decode(path: Path) -> NDArray[np.uint8] | BadRow:
    """Return uint8 [H, W, 3], RGB, turned as its EXIF says; a file that is no sane picture is a bad row."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            return BadRow(str(path), "", f"{size} bytes, more than {MAX_BYTES}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * max(1, min(width, height)):
                    return BadRow(str(path), "", f"{width} x {height} pixels, too large or too long a strip")
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        return BadRow(str(path), "", f"not a picture that can be decoded ({' '.join(str(error).split())[:120]})")
