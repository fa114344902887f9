"""Images that a store must not hold, because models are evaluated on them.

UNITER takes COCO's validation and test images of Karpathy's split, and every Flickr30k image, out of pre-training: also
where Visual Genome and COCO hold the same photographs, which their Flickr ids tell. An image is recognised by the
spellings of its id in public feature sets, whatever folders stand before it (``val2014/COCO_val2014_000000000042``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlscale.errors import VlscaleError

MAX_LIST_BYTES = 1 << 30
MAX_JSON_BYTES = 2 << 30
_EVALUATION = ("val", "test")
_COCO_FOLDERS = ("train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017")


def excluded_ids(
    lists: Sequence[Path], karpathy: Sequence[Path] = (), vg: Path | None = None, coco: Sequence[Path] = ()
) -> frozenset[str]:
    """Ids of all images to leave out, in every spelling that is known.

    Args:
        lists: files of image ids, one a line, taken literally; one without folders holds in every folder.
        karpathy: ``dataset_coco.json`` (its images of the splits val and test), ``dataset_flickr30k.json`` (all of its
            images).
        vg: Visual Genome's ``image_data.json``: the source's images are Visual Genome's, of which those are left out
            whose ``coco_id`` or ``flickr_id`` belongs to one of those images.
        coco: COCO's annotation files, whose ``flickr_url`` tells which COCO images are in Flickr30k.

    Raises:
        VlscaleError: a file is missing, too large, or not what it should be; or ``vg`` or ``coco`` stand alone.
    """
    found: set[str] = set()
    for path in lists:
        found.update(_lines(path))
    if (vg or coco) and not karpathy:
        raise VlscaleError(
            "--vg-image-data and --coco-images tell which images are copies; add --exclude-karpathy FILE"
        )
    coco_ids: set[int] = set()
    flickr_ids: set[int] = set()
    for path in karpathy:
        ids, photos = _karpathy(path)
        coco_ids |= ids
        flickr_ids |= photos
    for path in coco:
        coco_ids |= {number for number, photo in _coco_photos(path) if photo in flickr_ids}
    if vg is not None:
        for number in _vg_copies(vg, coco_ids, flickr_ids):
            found.update(vg_spellings(number))
        return frozenset(found)  # bare numbers are Visual Genome's here
    for number in coco_ids:
        found.update(coco_spellings(number))
    for number in flickr_ids:
        found.update(flickr_spellings(number))
    return frozenset(found)


def is_excluded(image: str, excluded: frozenset[str]) -> bool:
    """Whether an image is to be left out: its id, or the last piece of it if it is a path, is among ``excluded``.

    Ids from folders of pictures are paths; a file that is an evaluation image is one in any folder.
    """
    return image in excluded or image.rpartition("/")[2] in excluded


def coco_spellings(number: int) -> Iterator[str]:
    """Spellings of a COCO image's id: bare, padded, as file name, and as UNITER's feature files."""
    yield str(number)
    padded = f"{number:012d}"
    yield from _files(padded)
    for folder in _COCO_FOLDERS:
        yield from _files(f"COCO_{folder}_{padded}")
        yield from _files(f"coco_{folder}_{padded}")


def vg_spellings(number: int) -> Iterator[str]:
    """Spellings of a Visual Genome image's id."""
    yield from _files(str(number))
    yield from _files(f"vg_{number}")
    yield from _files(f"{number:012d}")
    yield from _files(f"vg_{number:012d}")


def flickr_spellings(number: int) -> Iterator[str]:
    """Spellings of a Flickr photograph's id, as Flickr30k's files have it."""
    yield from _files(str(number))
    yield from _files(f"{number:012d}")
    yield from _files(f"flickr30k_{number}")
    yield from _files(f"flickr30k_{number:012d}")


def _files(stem: str) -> tuple[str, ...]:
    return stem, f"{stem}.jpg", f"{stem}.npz"


def _lines(path: Path) -> Iterable[str]:
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise VlscaleError(f"--exclude {path}: larger than {MAX_LIST_BYTES} bytes; that is no list of image ids")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VlscaleError(f"--exclude {path}: cannot be read ({error}); give a text file, one id a line") from None
    return [line for line in (line.strip() for line in text.split("\n")) if line]


def _karpathy(path: Path) -> tuple[set[int], set[int]]:
    """COCO ids and Flickr ids that a file of Karpathy's names for evaluation."""
    option = f"--exclude-karpathy {path}"
    data = _json(path, option)
    name = data.get("dataset") if isinstance(data, dict) else None
    if name not in ("coco", "flickr30k"):
        raise VlscaleError(f"{option}: dataset is {name!r}, expected 'coco' or 'flickr30k'; give Karpathy's file")
    coco_ids: set[int] = set()
    photos: set[int] = set()
    for place, image in enumerate(_list(option, data.get("images"), "images")):
        try:
            if name == "coco" and image["split"] in _EVALUATION:
                coco_ids.add(int(image["cocoid"]))
            elif name == "flickr30k":
                photos.add(int(str(image["filename"]).partition(".")[0]))
        except (KeyError, TypeError, ValueError) as error:
            raise _bad(option, f"images[{place}]", error) from None
    return coco_ids, photos


def _coco_photos(path: Path) -> Iterator[tuple[int, int]]:
    """(COCO id, Flickr id) of the images of a COCO annotation file."""
    option = f"--coco-images {path}"
    data = _json(path, option)
    images = data.get("images") if isinstance(data, dict) else None
    for place, image in enumerate(_list(option, images, "images")):
        try:
            name = urlsplit(str(image["flickr_url"])).path.rpartition("/")[2]
            yield int(image["id"]), int(name.partition("_")[0])
        except (KeyError, TypeError, ValueError) as error:
            raise _bad(option, f"images[{place}]", error) from None


def _vg_copies(path: Path, coco_ids: set[int], photos: set[int]) -> Iterator[int]:
    option = f"--vg-image-data {path}"
    for place, image in enumerate(_list(option, _json(path, option), "the file")):
        try:
            number, same, photo = image.get("image_id", image.get("id")), image.get("coco_id"), image.get("flickr_id")
            if (same is not None and int(same) in coco_ids) or (photo is not None and int(photo) in photos):
                yield int(number)
        except (AttributeError, TypeError, ValueError) as error:
            raise _bad(option, f"[{place}]", error) from None


def _json(path: Path, option: str) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise VlscaleError(f"{option}: larger than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise VlscaleError(f"{option}: cannot be read as JSON ({error})") from None


def _list(option: str, value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise VlscaleError(f"{option}: {name} is no list of images; give the published file")
    return value


def _bad(option: str, place: str, error: Exception) -> VlscaleError:
    return VlscaleError(f"{option}: {place}: {type(error).__name__} {error}; give the published file")
