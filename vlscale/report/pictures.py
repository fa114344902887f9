"""One picture of what the model sees: a scene with its regions, and the transport plan over the caption's words."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlscale.config import WraSection
from vlscale.objectives.base import PretrainingModel
from vlscale.report.alignment import transport_plan_of
from vlscale.report.heldout import HeldOut, Mentions
from vlscale.report.outcome import UnmeasurableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3fa0", "#666666")
"""After Okabe and Ito, told apart by people with any colour vision; regions beyond the eighth start again."""

_TRUTH = "#d62728"
_MAX_PICTURE_BYTES = 1 << 24
_MAX_SIDE = 8192
_WANTED_THINGS = 3
_TITLE = 80
_MOST_LABELLED = 16


def draw_grounding(
    model: PretrainingModel, heldout: HeldOut, section: WraSection, path: Path, text: int | None = None
) -> Path | None:
    """Draw a scene with numbered regions beside the plan of its caption, with the ground truth outlined.

    The scene comes from ``<dataset>/scenes/<image id>.webp``; without that file the boxes stand on a blank canvas.

    Args:
        model: the model.
        heldout: the dataset.
        section: which tokens take part in the plan.
        path: PNG to write.
        text: row of the caption. Default: the first one that names at least three things, or the most there are. It is
            not chosen by how well the model does.

    Returns:
        ``path``, or None if no text has spans.
    """
    from matplotlib.figure import Figure

    try:
        mentions = heldout.spelt_mentions()
    except UnmeasurableError:
        return None
    text = choose_text(heldout, mentions) if text is None else text
    mentions = mentions.where(mentions.text == text)
    plan_TR, positions = transport_plan_of(model, heldout, text, section)
    caption = heldout.dataset.texts.row(text)
    words = _words(heldout, caption["input_ids"], positions)
    figure = Figure(figsize=(13, 5.2 + max(0, len(words) - 14) * 0.2), dpi=120, layout="constrained")
    scene, heat = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_scene(scene, heldout, int(heldout.first_image[text]))
    _draw_plan(heat, plan_TR, positions, words, mentions)
    right = _right(plan_TR, positions, mentions)
    title = textwrap.shorten(f"“{caption['text']}”", 3 * _TITLE, placeholder=" ...")
    scene.set_title(textwrap.fill(title, _TITLE), fontsize=12, parse_math=False)
    heat.set_title(f"transport plan: {right} of {len(mentions)} things on their region", fontsize=12)
    figure.savefig(path, metadata={"Software": "vlscale"})
    return path


def choose_text(heldout: HeldOut, mentions: Mentions) -> int:
    """Return the row of the first caption that names at least three things, or the most there are."""
    captions = heldout.captions()
    chosen = mentions.where(np.isin(mentions.text, captions)) if len(captions) else mentions
    named = np.bincount((chosen if len(chosen) else mentions).text)
    return int(np.argmax(np.minimum(named, _WANTED_THINGS)))


def _draw_scene(axes: Axes, heldout: HeldOut, image: int) -> None:
    from matplotlib.patches import Rectangle

    row = heldout.dataset.images.row(image)
    width, height = int(row["width"]), int(row["height"])
    picture = load_picture(heldout.dataset.root / "scenes", row["id"])
    if picture is None:
        axes.add_patch(Rectangle((0, 0), width, height, color="#f4f4f4", zorder=0))
    else:
        axes.imshow(picture, extent=(0, width, height, 0), zorder=0)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    for number, box in enumerate(row["boxes"][: heldout.max_regions]):
        left, top, right, bottom = np.asarray(box, np.float64) * (width, height, width, height)
        color = _color(number)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=2.5))
        label = {"facecolor": color, "edgecolor": "none", "boxstyle": "square,pad=0.2"}
        axes.text(
            left, top, str(number), color="white", weight="bold", fontsize=11, va="top", bbox=label, clip_on=True
        )  # fmt: skip


def _draw_plan(
    axes: Axes, plan_TR: NDArray[np.float64], positions: NDArray[np.int64], words: list[str], mentions: Mentions
) -> None:
    from matplotlib.patches import Rectangle

    shown = axes.imshow(plan_TR, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    size = 11 if plan_TR.shape[1] <= _MOST_LABELLED else 5
    axes.set_xticks(range(plan_TR.shape[1]), [str(region) for region in range(plan_TR.shape[1])], fontsize=size)
    for number, label in enumerate(axes.get_xticklabels()):
        label.set(color=_color(number), weight="bold")
    axes.set_yticks(range(len(words)), words, fontsize=11)
    axes.set_xlabel("region")
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(1, plan_TR.shape[1]) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(words)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    named: set[int] = set()
    for start, end, region in zip(mentions.start, mentions.end, mentions.region, strict=True):
        top = int(np.argmax(positions == start))
        axes.add_patch(
            Rectangle((region - 0.5, top - 0.5), 1, end - start, fill=False, edgecolor=_TRUTH, linewidth=2.5, zorder=3)
        )
        named.update(range(top, top + end - start))
    for row, label in enumerate(axes.get_yticklabels()):
        label.set(weight="bold" if row in named else "normal", color="black" if row in named else "#777777")
        label.set_parse_math(False)  # a word may be a dollar sign
    for (row, region), share in np.ndenumerate(plan_TR):
        if share >= 0.05 and plan_TR.shape[1] <= _MOST_LABELLED:
            axes.text(
                region, row, f"{share:.2f}", ha="center", va="center", fontsize=9,
                color="white" if share > 0.55 else "#1a1a1a",
            )  # fmt: skip
    axes.plot([], [], "s", markerfacecolor="none", markeredgecolor=_TRUTH, markeredgewidth=2, label="ground truth")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.08), frameon=False, fontsize=10)
    axes.figure.colorbar(shown, ax=axes, label="share of the word's mass", fraction=0.05)


def _right(plan_TR: NDArray[np.float64], positions: NDArray[np.int64], mentions: Mentions) -> int:
    right = 0
    for start, end, region in zip(mentions.start, mentions.end, mentions.region, strict=True):
        mass_R = plan_TR[(positions >= start) & (positions < end)].sum(0)
        right += int(mass_R.argmax() == region)
    return right


def _words(heldout: HeldOut, input_ids: NDArray[np.int32], positions: NDArray[np.int64]) -> list[str]:
    tokens = heldout.dataset.texts.meta.vocabulary.tokens
    outside = {-1: "[CLS]", len(input_ids): "[SEP]"}
    return [outside.get(int(at)) or tokens[input_ids[at]] for at in positions]


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def load_picture(folder: Path, name: Any) -> NDArray[np.uint8] | None:
    """The picture, or None if there is none that can be trusted: ids come from a file and must not leave the folder."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        return None
    path = folder / f"{name}.webp"
    try:
        if path.stat().st_size > _MAX_PICTURE_BYTES:
            return None
        with Image.open(path, formats=["WEBP"]) as opened:
            if max(opened.size) > _MAX_SIDE:
                return None
            return np.asarray(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
