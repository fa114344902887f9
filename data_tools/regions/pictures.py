"""Finding and decoding pictures: hostile until decoded."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_tools.records import BadRow
from vlscale.errors import VlscaleError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 256 << 20
MAX_PIXELS = 100_000_000
MAX_RATIO = 50


def find(folder: Path, follow_links: bool = False) -> dict[str, str]:
    """Find the pictures below a folder: name relative to it -> why it is not used (empty if it is), sorted.

    Links to pictures inside the folder are pictures. Other links are not used, and neither are linked folders, whose
    names stand there themselves, unless ``follow_links``; nothing is passed over without a word.

    Raises:
        VlscaleError: it is no folder, cannot be read, or there is no picture in it.
    """
    if not folder.is_dir():
        raise VlscaleError(f"{folder}: no such folder; give the folder of the pictures")
    try:
        found = dict(_walk(folder, follow_links))
    except OSError as error:
        raise VlscaleError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not found:
        raise VlscaleError(f"{folder}: no pictures ({', '.join(SUFFIXES)}) in it or below")
    return dict(sorted(found.items()))


def _walk(folder: Path, follow_links: bool) -> Iterator[tuple[str, str]]:
    root = os.path.realpath(folder)

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, followlinks=follow_links, onerror=fail):
        below = os.path.relpath(place, folder)
        for name in [name for name in folders if os.path.islink(os.path.join(place, name))]:
            why = "is a linked folder; --follow-links reads it"
            if follow_links:
                target, here = os.path.realpath(os.path.join(place, name)), os.path.realpath(place)
                if os.path.commonpath([target, here]) != target:
                    continue
                why = "is a link to a folder that it lies in"
            folders.remove(name)
            yield os.path.normpath(os.path.join(below, name)), why
        for name in files:
            if name.lower().endswith(SUFFIXES):
                why = _problem(os.path.join(place, name), root, follow_links)
                yield os.path.normpath(os.path.join(below, name)), why


def _problem(path: str, root: str, follow_links: bool) -> str:
    """Why a file is not read; empty if it is."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISLNK(mode):
        return "" if stat.S_ISREG(mode) else "is not a file"
    target = os.path.realpath(path)
    if not os.path.isfile(target):
        return "is a link that leads to no file"
    if not follow_links and os.path.commonpath([target, root]) != root:
        return "is a link that leads out of the folder; --follow-links reads it"
    return ""


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
    except Exception as error:  # PIL's readers fail in any way: struct.error, KeyError, TypeError, zlib.error
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return BadRow(str(path), "", f"not a picture that can be decoded ({detail})")
