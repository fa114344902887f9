"""A small grammar of captions for composed scenes, and the alignment of their nouns with regions.

Every word other than a noun is a function word of English ("there is", "to the left of"), so the only way to tell a
masked noun is to look at the picture, or to know which nouns go together, which scenes give no hint of. A caption names
each thing at most once for the same reason: a second mention would give the first away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from data_tools.scenes import Box, Placed, Scene

Kind = Literal["list", "relation", "pair", "single"]
TRAIN_PLAN: tuple[Kind, ...] = ("list", "list", "relation", "relation", "relation", "relation") + ("pair", "single") * 2
VALIDATION_PLAN: tuple[Kind, ...] = ("list", "relation", "pair", "single")

_OPENERS = (
    "",
    "",
    "there is ",
    "a photo of ",
    "a picture of ",
    "here is ",
    "this is a photo of ",
    "in this picture is ",
)
_NEAR = 45.0


@dataclass(frozen=True)
class Mention:
    """Characters [start, end) of a caption name the object ``object`` of the scene; the article is not part of it."""

    start: int
    end: int
    object: int


@dataclass(frozen=True)
class Caption:
    """A caption in lower case.

    ``kind`` is ``list`` (names all things), ``relation`` (says where things are; the first of a scene names all),
    ``pair`` ("a cat and a dog") or ``single`` (one thing).
    """

    text: str
    kind: Kind
    mentions: tuple[Mention, ...]


class _Sentence:
    """Collects words and remembers where the nouns stand."""

    def __init__(self, objects: Sequence[Placed]) -> None:
        self.objects = objects
        self.text = ""
        self.mentions: list[Mention] = []

    def say(self, words: str) -> _Sentence:
        self.text += words
        return self

    def name(self, which: int) -> _Sentence:
        placed = self.objects[which]
        start = len(self.text) + len(placed.article) + 1
        self.text += f"{placed.article} {placed.noun}"
        self.mentions.append(Mention(start, len(self.text), which))
        return self

    def caption(self, kind: Kind) -> Caption:
        return Caption(self.text, kind, tuple(self.mentions))


def relation(rng: random.Random, a: Box, b: Box) -> str:
    """Say where box ``a`` is, seen from box ``b``: along the axis on which their centres are farther apart."""
    dx = (a[0] + a[2] - b[0] - b[2]) / 2
    dy = (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) < abs(dy):
        return rng.choice(("above", "over") if dy < 0 else ("below", "under"))
    gap = max(a[0], b[0]) - min(a[2], b[2])
    if gap < _NEAR and rng.random() < 0.3:
        return "next to"
    return "to the left of" if dx < 0 else "to the right of"


def _list(rng: random.Random, sentence: _Sentence, which: Sequence[int]) -> None:
    sentence.say(rng.choice(_OPENERS))
    # "a, b and c" or "a and b and c"
    middle = rng.choice((", ", " and "))
    for position, index in enumerate(which):
        if position:
            sentence.say(" and " if position == len(which) - 1 else middle)
        sentence.name(index)


def _relations(rng: random.Random, sentence: _Sentence, which: Sequence[int]) -> None:
    """Two things: "a above b"; three: "a above b and next to c" (both of a); four: "a above b and c below d"."""
    boxes = [sentence.objects[index].box for index in which]
    opener = rng.choice(("", "", "there is ", "here is "))
    verb = "is " if not opener and rng.random() < 0.5 else ""
    sentence.say(opener).name(which[0]).say(f" {verb}{relation(rng, boxes[0], boxes[1])} ").name(which[1])
    if len(which) == 3:
        sentence.say(f" and {relation(rng, boxes[0], boxes[2])} ").name(which[2])
    elif len(which) == 4:
        sentence.say(" and ").name(which[2]).say(f" {verb}{relation(rng, boxes[2], boxes[3])} ").name(which[3])


def _pair(rng: random.Random, sentence: _Sentence, which: Sequence[int]) -> None:
    sentence.say(rng.choice(_OPENERS)).name(which[0]).say(" and ").name(which[1])


def _single(rng: random.Random, sentence: _Sentence, which: Sequence[int]) -> None:
    sentence.say(rng.choice(_OPENERS)).name(which[0])


_Rule = Callable[[random.Random, _Sentence, Sequence[int]], None]
_RULES: dict[Kind, _Rule] = {"list": _list, "relation": _relations, "pair": _pair, "single": _single}
_ARITY: dict[Kind, int] = {"relation": 2, "pair": 2, "single": 1}


def caption_scene(scene: Scene, plan: Sequence[Kind] = TRAIN_PLAN, seed: int = 0) -> list[Caption]:
    """Write the captions of a scene: one per entry of ``plan``, no two alike where the grammar allows it.

    The first ``relation`` of the plan names all things of the scene, further ones name two.
    """
    rng = random.Random(f"vlscale-demo-captions/{seed}/{scene.id}")
    captions: list[Caption] = []
    for number, kind in enumerate(plan):
        everything = kind == "list" or (kind == "relation" and kind not in plan[:number])
        arity = len(scene.objects) if everything else _ARITY[kind]
        for _ in range(20):
            sentence = _Sentence(scene.objects)
            _RULES[kind](rng, sentence, rng.sample(range(len(scene.objects)), arity))
            caption = sentence.caption(kind)
            if all(caption.text != other.text for other in captions):
                break
        captions.append(caption)
    return captions


def region_spans(caption: Caption, scene: Scene, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Translate the mentions of a caption into ``(token_start, token_end, region)``, tokens [start, end).

    Args:
        caption: the caption.
        scene: its scene; ``region`` counts the scene's regions.
        offsets: characters [start, end) of each token, without special tokens.
    """
    region_of = {region.object: i for i, region in enumerate(scene.regions) if region.object is not None}
    spans = []
    for mention in caption.mentions:
        inside = [t for t, (start, end) in enumerate(offsets) if start < mention.end and end > mention.start]
        if inside:
            spans.append((inside[0], inside[-1] + 1, region_of[mention.object]))
    return spans
