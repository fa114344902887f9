"""Decoded rows for people: what a text says in words and word pieces, and what its image's regions hold."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.inspection import AnyStore, Stores
from vlscale.data.schema import ClassesMeta
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.errors import VlscaleError

MOST_ROWS = 64
"""Most rows that are decoded at a time: this is for looking, not for exporting."""

TOP_CLASSES = 5
MOST_RETRIEVED = 10
_RANGE = re.compile(r"([0-9]{1,18})?(?:(:)([0-9]{1,18})?)?", re.ASCII)


def parse_rows(asked: str, total: int, where: str) -> range:
    """Read ``A``, ``A:B``, ``A:`` or ``:B`` (rows A to B-1, counted from 0) against a store of ``total`` rows.

    Raises:
        VlscaleError: it is none of these, names rows that are not there, or more than 64 rows.
    """
    match = _RANGE.fullmatch(asked)
    if not match or not asked.strip(":"):
        raise VlscaleError(f"--rows {asked!r}: expected A, A:B, A: or :B, rows counted from 0, for example --rows 0:3")
    first = int(match[1] or 0)
    last = int(match[3]) if match[3] else (total if match[2] else first + 1)
    if not 0 <= first < last <= total:
        raise VlscaleError(f"--rows {asked}: {where} has {total} rows, numbered 0 to {total - 1}; name some of these")
    if last - first > MOST_ROWS:
        raise VlscaleError(
            f"--rows {asked}: {last - first} rows, more than {MOST_ROWS}; name fewer, as {first}:{first + 4}"
        )
    return range(first, last)


def decoded_rows(stores: Stores, asked: str, max_regions: int) -> list[dict[str, Any]]:
    """Decode rows: of the texts, each with its images, if there are texts; otherwise of the images or the classes.

    Args:
        stores: what was opened.
        asked: see :func:`parse_rows`.
        max_regions: regions of each image that are described; 0 or more.

    Returns:
        One mapping of plain JSON types per row; see :func:`text_row`, :func:`image_row` and :func:`class_row`.

    Raises:
        VlscaleError: there are no such rows, or one is damaged.
    """
    main: AnyStore | None = stores.texts or stores.images or stores.classes
    if main is None:
        raise VlscaleError(f"{stores.path}: its rows are shown with their texts; name the dataset's folder")
    rows = parse_rows(asked, len(main), f"{main.folder}")
    if stores.texts is not None:
        return [text_row(stores, stores.texts, row, max_regions) for row in rows]
    if stores.images is not None:
        return [image_row(stores.images, stores.classes, row, max_regions) for row in rows]
    assert stores.classes is not None
    return [class_row(stores.classes, row) for row in rows]


def text_row(stores: Stores, texts: TextStore, row: int, max_regions: int) -> dict[str, Any]:
    """Return ``row, id, text, tokens`` (in words), ``input_ids, images, extra`` of a text.

    Where the texts have segments, also ``segments``: the type and the number of word pieces of each. Where there are
    stores beside the texts, also ``units`` (the word pieces of each), ``rewrites`` ([text, does it say the same]) and
    ``retrieved`` (rows of ``images`` and ``texts`` of their collections, best first).

    ``images`` are :func:`image_row` where the images are at hand, otherwise only ``{"id": ..}``.

    Raises:
        VlscaleError: the row is damaged.
    """
    found = texts.row(row)
    ids = [int(index) for index in np.ravel(found["input_ids"])]
    tokens, size = texts.meta.vocabulary.tokens, texts.meta.vocabulary.size
    bad = next((index for index in ids if not 0 <= index < size), None)
    if bad is not None:
        raise VlscaleError(
            f"{texts.folder}: row {row}: token id {bad} is outside the vocabulary of {size}; build it again"
        )
    refs = texts.image_refs[texts.image_ptr[row] : texts.image_ptr[row + 1]].tolist()
    if stores.images is None:
        images: list[dict[str, Any]] = [{"id": name} for name in found["images"]]
    else:
        images = [image_row(stores.images, stores.classes, ref, max_regions) for ref in refs]
    return {
        "row": row,
        "id": found["id"],
        "text": found["text"],
        "tokens": [tokens[index] for index in ids],
        "input_ids": ids,
        **({"segments": segments(found["type_ids"])} if texts.num_types > 1 else {}),
        "images": images,
        "extra": found["extra"],
        **_beside(stores, row, [tokens[index] for index in ids]),
    }


def _beside(stores: Stores, row: int, tokens: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if stores.units is not None:
        (units,) = stores.units.units_of(np.array([row]))
        found["units"] = [tokens[begin:end] for begin, end, _ in units.tolist()]
    if stores.rewrites is not None:
        found["rewrites"] = [[rewrite.text, rewrite.positive] for rewrite, _ in stores.rewrites.rewrites(row)]
    if stores.retrieved is not None:
        lists = {"images": stores.retrieved.images_of(row), "texts": stores.retrieved.texts_of(row)}
        found["retrieved"] = {kind: rows[:MOST_RETRIEVED].tolist() for kind, rows in lists.items()}
    return found


def segments(type_ids: NDArray[np.int32]) -> list[list[int]]:
    """Return [type, word pieces] of each run of equal types of int32 [t] ``type_ids``."""
    found = np.ravel(type_ids)
    starts = np.flatnonzero(np.diff(found, prepend=found[:1] - 1))
    return [[int(found[at]), int(size)] for at, size in zip(starts, np.diff([*starts, len(found)]), strict=True)]


def image_row(images: ImageStore, classes: ClassStore | None, row: int, max_regions: int) -> dict[str, Any]:
    """Return ``row, id, width, height, count`` (of regions), ``regions, extra`` of an image.

    Each region has ``box`` (x1, y1, x2, y2 in 0..1), ``conf``, ``features`` (see :func:`feature_summary`) and, with a
    classes store, ``classes``, the most probable ones as [number, name or None, probability].

    Raises:
        VlscaleError: the row is damaged.
    """
    found = images.row(row)
    problem = image_problem(found, int(images.lengths[row]), images.meta.feature_dim)
    if problem:
        raise VlscaleError(f"{images.folder}: row {row}: {problem}; build the store again")
    count = len(found["features"])
    shown = min(count, max_regions)
    regions: list[dict[str, Any]] = [
        {
            "box": [round(float(side), 6) for side in found["boxes"][number]],
            "conf": round(float(found["conf"][number]), 6),
            "features": feature_summary(found["features"][number]),
        }
        for number in range(shown)
    ]
    if classes is not None and shown:
        probs = classes.probs(images.region_ptr[row] + np.arange(shown))
        for region, row_of_probs in zip(regions, probs, strict=True):
            region["classes"] = top_classes(row_of_probs, classes.meta)
    kept = {key: found[key] for key in ("id", "width", "height", "extra")}
    return {"row": row, **kept, "count": count, "regions": regions}


def image_problem(row: dict[str, Any], count: int, width: int) -> str | None:
    """Say what is wrong with a decoded row of the images store; None if nothing is.

    Args:
        row: as ``ImageStore.row`` gives it.
        count: regions by lengths.npy.
        width: ``feature_dim`` by meta.json.
    """
    features, boxes, conf = row["features"], row["boxes"], row["conf"]
    for name, array, shape in (
        ("features", features, (count, width)),
        ("boxes", boxes, (count, 4)),
        ("conf", conf, (count,)),
    ):
        if array.shape != shape:
            return f"{name} {list(array.shape)}, expected {list(shape)} by lengths.npy and meta.json"
        if not np.isfinite(array).all():
            return f"{name} contain NaN or infinity"
    low, high = boxes[:, :2], boxes[:, 2:]
    good = ((low >= 0) & (high <= 1) & (low < high)).all(1)
    if not good.all():
        return f"box {boxes[int(np.argmin(good))].tolist()} is not x1 < x2, y1 < y2 inside 0..1"
    return None


def feature_summary(features: NDArray[Any]) -> dict[str, float]:
    """Return ``mean, std, least, most`` and ``zeros`` (share of exact zeros) of one region's features [D]."""
    values = features.astype(np.float64)
    numbers = {"mean": values.mean(), "std": values.std(), "least": values.min(), "most": values.max()}
    return {name: round(float(number), 6) for name, number in (numbers | {"zeros": (values == 0).mean()}).items()}


def class_row(classes: ClassStore, row: int) -> dict[str, Any]:
    """Return ``row, sum`` and ``classes`` (the most probable ones) of one region.

    Raises:
        VlscaleError: the row is damaged.
    """
    (probs,) = classes.probs(np.array([row]))
    total = float(probs.sum(dtype=np.float64))
    return {"row": row, "sum": round(total, 6), "classes": top_classes(probs, classes.meta)}


def top_classes(probs: NDArray[np.float32], meta: ClassesMeta) -> list[list[Any]]:
    """Return [number, name or None, probability] of the most probable classes of [C] ``probs``."""
    best = np.argsort(-probs, kind="stable")[:TOP_CLASSES].tolist()
    return [[i, None if meta.class_names is None else meta.class_names[i], round(float(probs[i]), 6)] for i in best]
