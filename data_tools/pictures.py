"""The demo's pictures: which depict which thing, which are shown in training, and which are held out.

``demo/records.jsonl`` holds one record per picture (licence, author, size); ``demo/pictures.json`` lists, chosen by
eye, the pictures of each one-word thing and the photographs that serve as backgrounds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from vlscale.errors import VlscaleError

DEMO = Path(__file__).parent / "demo"
HELD_OUT_SHARE = 3


@dataclass(frozen=True)
class Picture:
    """One picture file. ``size`` is (width, height) in pixels; ``cutout`` means that it has an alpha channel."""

    id: str
    file: str
    size: tuple[int, int]
    cutout: bool


@dataclass(frozen=True)
class Thing:
    """Something that a caption can name.

    Attributes:
        noun: one word.
        article: "a" or "an".
        seen: pictures that training scenes show, at least one.
        unseen: held-out pictures, a third of all (rounded down, but one of two); empty for things with one picture.
    """

    noun: str
    article: str
    seen: tuple[Picture, ...]
    unseen: tuple[Picture, ...]


@dataclass(frozen=True)
class Catalogue:
    """The things of a corpus: ``known`` ones occur in training, ``new`` ones never do; and the background photos."""

    known: tuple[Thing, ...]
    new: tuple[Thing, ...]
    backgrounds: tuple[Picture, ...]


def load_catalogue(things: int = 32, folder: Path = DEMO) -> Catalogue:
    """Read the pictures and take the first ``things`` as known, the others as new.

    Raises:
        VlscaleError: a file is missing or broken, a picture has no record or is not free, or there are too few things.
    """
    records = _read_records(folder / "records.jsonl")
    listed = _read_json(folder / "pictures.json")
    every = []
    for entry in listed["things"]:
        pictures = sorted((_picture(records, name) for name in entry["pictures"]), key=_shuffle_key)
        held = max(1, len(pictures) // HELD_OUT_SHARE) if len(pictures) > 1 else 0
        shown = len(pictures) - held
        every.append(Thing(entry["noun"], entry["article"], tuple(pictures[:shown]), tuple(pictures[shown:])))
    if not 5 <= things <= len(every) - 8:
        raise VlscaleError(f"--things {things}: {folder} lists {len(every)} things; take 5 to {len(every) - 8}")
    backgrounds = tuple(_picture(records, name) for name in listed["backgrounds"])
    return Catalogue(tuple(every[:things]), tuple(every[things:]), backgrounds)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VlscaleError(f"{path}: {error}; restore the file from the repository") from None


def _read_records(path: Path) -> dict[str, dict]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise VlscaleError(f"{path}: {error}; restore the file from the repository") from None
    return {row["id"]: row for row in rows}


def _picture(records: dict[str, dict], name: str) -> Picture:
    record = records.get(name)
    if record is None or record["license"].startswith("GPL"):
        found = "no record" if record is None else f"licence {record['license']}"
        raise VlscaleError(
            f"demo picture {name!r} has {found}; pictures.json may list only free pictures with a record"
        )
    return Picture(name, record["file"], (record["width"], record["height"]), record["alpha"])


def _shuffle_key(picture: Picture) -> bytes:
    """Order that has nothing to do with the source, so that held-out pictures are not all from one artist."""
    return hashlib.blake2b(picture.id.encode(), digest_size=8).digest()


@lru_cache(maxsize=512)
def load_picture(file: str, folder: Path = DEMO) -> Image.Image:
    """Return a picture as RGBA.

    Raises:
        VlscaleError: the file is missing or is no image.
    """
    path = folder / file
    try:
        with Image.open(path) as image:
            return image.convert("RGBA")
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read as a picture ({error}); restore it from the repository") from None


def class_names(folder: Path = DEMO) -> list[str]:
    """Return the names of the 1,000 ImageNet classes in the order of the classifier.

    Raises:
        VlscaleError: the file is missing or unreadable.
    """
    path = folder / "imagenet1k_classes.txt"
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise VlscaleError(f"{path}: {error}; restore the file from the repository") from None


def as_array(image: Image.Image) -> np.ndarray:
    """Return uint8 [height, width, 3], a writable copy."""
    return np.array(image.convert("RGB"))
