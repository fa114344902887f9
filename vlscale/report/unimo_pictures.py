"""One picture of what a UNIMO says: scenes with the captions that it generates for them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlscale.report.heldout import HeldOut
from vlscale.report.pictures import load_picture
from vlscale.report.unimo_captions import Captions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCENES = 6
_COLUMNS = 3
_WIDTH = 46
_LINES = 3


def draw_captions(heldout: HeldOut, captions: Captions, path: Path) -> Path:
    """Draw scenes with the generated caption and one of the dataset's own under each.

    The scenes lie evenly among all that were captioned; they are not chosen by how well the model does. They come from
    ``<dataset>/scenes/<image id>.webp``; without that file the regions' boxes stand on a blank canvas.

    Args:
        heldout: the dataset.
        captions: what was generated.
        path: PNG to write.

    Returns:
        ``path``.
    """
    from matplotlib.figure import Figure

    count = min(SCENES, len(captions.images))
    chosen = np.linspace(0, len(captions.images) - 1, count).round().astype(int).tolist()
    rows = -(-count // _COLUMNS)
    figure = Figure(figsize=(4.4 * _COLUMNS, 4.3 * rows), dpi=110)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.3 / rows, hspace=0.45, wspace=0.04)
    for place in axes:
        place.set_axis_off()
    for place, number in zip(axes, chosen, strict=False):
        _draw_scene(place, heldout, int(captions.images[number]))
        own = captions.references[number][0]
        _write(place, -0.03, captions.captions[number] or "(nothing)", "#111111", "bold")
        _write(place, -0.24, f"dataset: {own}", "#666666", "normal")
    figure.savefig(path, metadata={"Software": "vlscale"})
    return path


def _draw_scene(axes: Axes, heldout: HeldOut, image: int) -> None:
    from matplotlib.patches import Rectangle

    row = heldout.dataset.images.row(image)
    width, height = int(row["width"]), int(row["height"])
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    picture = load_picture(heldout.dataset.root / "scenes", row["id"])
    if picture is not None:
        axes.imshow(picture, extent=(0, width, height, 0))
        return
    axes.add_patch(Rectangle((0, 0), width, height, color="#f4f4f4"))
    for box in row["boxes"][: heldout.max_regions]:
        left, top, right, bottom = np.asarray(box, np.float64) * (width, height, width, height)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="#0072b2"))


def _write(axes: Axes, height: float, text: str, color: str, weight: str) -> None:
    """Put text under a scene; ``height`` counts in heights of the scene from its lower edge."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    lines = textwrap.wrap(text, _WIDTH, max_lines=_LINES, placeholder=" ...")
    axes.text(
        0.5, height, "\n".join(lines), transform=axes.transAxes, ha="center", va="top", fontsize=9, color=color,
        weight=weight, parse_math=False,
    )  # fmt: skip
