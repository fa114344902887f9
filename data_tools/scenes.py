"""Deterministic scenes: two to four things on a plain colour or a pale photograph, with known boxes.

A scene is planned as plain numbers first (:class:`Scene`), from the sizes of the pictures alone, and rendered later by
any process: the plan is the ground truth, and the pixels are a pure function of it. Python's ``random.Random`` seeded
with a string gives the same plan on any machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from data_tools.pictures import Catalogue, Picture, Thing, load_picture
from vlscale.errors import VlscaleError

WIDTH, HEIGHT = 384, 256
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""

_MIN_SIDE, _MAX_SIDE = 75, 130
_COUNTS = (2, 3, 3, 4)
_OVERLAP = 0.05
_WHITE = 0.4


@dataclass(frozen=True)
class Placed:
    """A thing in a scene: its noun and article, the picture, and its true box in pixels."""

    noun: str
    article: str
    picture: Picture
    box: Box


@dataclass(frozen=True)
class Region:
    """What the detector reports: a box in pixels, and the object it is about (None for a distractor)."""

    box: Box
    object: int | None


@dataclass(frozen=True)
class Scene:
    """A planned scene.

    Attributes:
        id: unique in the corpus.
        objects: the things, in order of placement.
        regions: jittered boxes of all objects and distractors, shuffled.
        color: RGB of a plain background, and what a transparent photograph would show.
        photo: background photograph, or None for a plain one.
    """

    id: str
    objects: tuple[Placed, ...]
    regions: tuple[Region, ...]
    color: tuple[int, int, int]
    photo: Picture | None


def area(box: Box) -> float:
    """Area of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a: Box, b: Box) -> float:
    """Area of the intersection of two boxes."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    shared = overlap(a, b)
    return shared / (area(a) + area(b) - shared)


def plan_scenes(
    catalogue: Catalogue,
    split: str,
    count: int,
    seed: int,
    regions: int = 6,
    forbidden: frozenset[frozenset[str]] = frozenset(),
) -> list[Scene]:
    """Plan ``count`` scenes of a split.

    Evaluation splits show each combination of things once, so that a caption belongs to one image; ``train`` may
    repeat its own but keeps away from ``forbidden``, the combinations that evaluation asks about.

    Args:
        catalogue: things and backgrounds.
        split: ``train`` and ``val`` (seen pictures), ``val_unseen`` (held-out pictures of known things) or
            ``val_new_things`` (things that never occur in training).
        count: number of scenes.
        seed: with the split, decides everything.
        regions: regions per scene, at least 6: two more than there can be objects.
        forbidden: sets of nouns that no scene may consist of.

    Raises:
        VlscaleError: too few regions, or more scenes than there are combinations.
    """
    if not 6 <= regions <= 64:
        raise VlscaleError(f"--regions {regions}: a scene needs 6 to 64 (up to 4 objects, the others are distractors)")
    things, pictures_of = _pool(catalogue, split)
    rng = random.Random(f"vlscale-demo/{seed}/{split}")
    taken, scenes = set(forbidden), []
    for index in range(count):
        for _ in range(1000):
            chosen = rng.sample(things, rng.choice(_COUNTS))
            names = frozenset(thing.noun for thing in chosen)
            if names not in taken:
                break
        else:
            raise VlscaleError(f"split {split}: no unused combination left after {index} scenes; ask for fewer scenes")
        if split != "train":
            taken.add(names)
        scenes.append(_plan_scene(rng, f"{split}-{index:05d}", chosen, pictures_of, catalogue.backgrounds, regions))
    return scenes


def combinations(scenes: Sequence[Scene]) -> frozenset[frozenset[str]]:
    """Return the sets of nouns that the scenes consist of."""
    return frozenset(frozenset(placed.noun for placed in scene.objects) for scene in scenes)


def _pool(catalogue: Catalogue, split: str) -> tuple[list[Thing], Callable[[Thing], tuple[Picture, ...]]]:
    if split in ("train", "val"):
        return list(catalogue.known), lambda thing: thing.seen
    if split == "val_unseen":
        return [thing for thing in catalogue.known if thing.unseen], lambda thing: thing.unseen
    if split == "val_new_things":
        return list(catalogue.new), lambda thing: thing.seen + thing.unseen
    raise VlscaleError(f"unknown split {split!r}; known: train, val, val_unseen, val_new_things")


def _plan_scene(
    rng: random.Random,
    name: str,
    things: Sequence[Thing],
    pictures_of: Callable[[Thing], tuple[Picture, ...]],
    backgrounds: Sequence[Picture],
    regions: int,
) -> Scene:
    pictures = [rng.choice(pictures_of(thing)) for thing in things]
    boxes = _place(rng, pictures)
    objects = tuple(
        Placed(thing.noun, thing.article, picture, box)
        for thing, picture, box in zip(things, pictures, boxes, strict=True)
    )
    found = [Region(_jitter(rng, box), i) for i, box in enumerate(boxes)]
    while len(found) < regions:
        found.append(Region(_distractor(rng, boxes), None))
    rng.shuffle(found)
    color = (rng.randint(165, 255), rng.randint(165, 255), rng.randint(165, 255))
    photo = rng.choice(backgrounds) if rng.random() < 0.5 else None
    return Scene(name, objects, tuple(found), color, photo)


def _place(rng: random.Random, pictures: Sequence[Picture]) -> list[Box]:
    """Place the pictures with hardly any overlap; a layout that does not fit is thrown away and tried smaller."""
    limit = float(_MAX_SIDE)
    while True:
        boxes: list[Box] = []
        for picture in pictures:
            scale = rng.uniform(_MIN_SIDE, limit) / max(picture.size)
            width, height = (max(8, round(side * scale)) for side in picture.size)
            for _ in range(40):
                x, y = rng.randint(0, WIDTH - width), rng.randint(0, HEIGHT - height)
                box = (float(x), float(y), float(x + width), float(y + height))
                if all(overlap(box, other) <= _OVERLAP * min(area(box), area(other)) for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(pictures):
            return boxes
        limit = max(float(_MIN_SIDE), limit * 0.95)


def _jitter(rng: random.Random, box: Box) -> Box:
    """Move each side by up to 15 % and clip to the scene, keeping an IoU above 0.6 with the true box."""
    width, height = box[2] - box[0], box[3] - box[1]
    while True:
        x1, y1, x2, y2 = (side + rng.uniform(-0.15, 0.15) * (height if i % 2 else width) for i, side in enumerate(box))
        moved = (max(0.0, x1), max(0.0, y1), min(float(WIDTH), x2), min(float(HEIGHT), y2))
        if iou(moved, box) > 0.6:
            return moved


def _distractor(rng: random.Random, objects: Sequence[Box]) -> Box:
    """A random box that covers little of any object: the best of up to 60 tries, the first that is good enough."""
    best, least = None, 2.0
    for _ in range(60):
        width, height = rng.uniform(40, 110), rng.uniform(40, 110)
        x, y = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
        box = (x, y, x + width, y + height)
        worst = max(overlap(box, other) / min(area(box), area(other)) for other in objects)
        if worst < least:
            best, least = box, worst
        if least < 0.1:
            break
    assert best is not None
    return best


def render(scene: Scene) -> Image.Image:
    """Return the scene as an RGB image of 384x256 pixels."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), scene.color)
    if scene.photo is not None:
        photo = _cover(load_picture(scene.photo.file).convert("RGB"))
        canvas = Image.blend(photo, Image.new("RGB", (WIDTH, HEIGHT), "white"), _WHITE)
    for placed in scene.objects:
        x1, y1, x2, y2 = (round(side) for side in placed.box)
        picture = load_picture(placed.picture.file).resize((x2 - x1, y2 - y1), Image.Resampling.LANCZOS)
        canvas.paste(picture, (x1, y1), picture)
    return canvas


def _cover(photo: Image.Image) -> Image.Image:
    """Scale a photograph until it covers the scene, and cut out its middle."""
    scale = max(WIDTH / photo.width, HEIGHT / photo.height)
    size = (max(WIDTH, round(photo.width * scale)), max(HEIGHT, round(photo.height * scale)))
    left, top = (size[0] - WIDTH) // 2, (size[1] - HEIGHT) // 2
    return photo.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + WIDTH, top + HEIGHT))
