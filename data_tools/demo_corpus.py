"""Builds the demo corpus: plan scenes, caption them, compute region features in worker processes, write the stores.

Everything is a pure function of :class:`Options`. Scenes go to the network one by one, each worker on one thread, so
that one worker and many give the same bytes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from data_tools.captions import TRAIN_PLAN, VALIDATION_PLAN, Caption, Kind, caption_scene, region_spans
from data_tools.demo_tokenizer import WordPieces, load_wordpieces, train_wordpieces
from data_tools.lite0 import WHEEL, weights_path
from data_tools.pictures import DEMO, Catalogue, as_array, class_names, load_catalogue
from data_tools.region_features import RegionExtractor
from data_tools.region_reduction import Reduction, fit_reduction, nearest_centroid
from data_tools.scenes import HEIGHT, WIDTH, Scene, combinations, plan_scenes, render
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.errors import VlscaleError

_CHUNK = 16
"""Scenes that a worker is handed at a time."""


@dataclass(frozen=True)
class Options:
    """What a corpus is made of; written to its manifest.

    Attributes:
        scenes: training scenes.
        val: validation scenes: pictures seen in training, combinations of things that training never shows.
        val_unseen: scenes of held-out pictures of known things.
        val_new_things: scenes of things that training never shows.
        things: how many nouns training knows.
        regions: regions per scene, objects and distractors.
        seed: of everything.
        vocab: ``train``, or the path of a Hugging Face vocabulary.
        texts: kinds of caption per training scene.
        features: name of the network.
        feature_dim: 0 for the network's own features, or the number of principal components to keep.
        classes: 0 for all classes, or the number of the likeliest to keep, the last of them "other".
        pictures: also write the rendered validation scenes.
    """

    scenes: int = 2400
    val: int = 300
    val_unseen: int = 100
    val_new_things: int = 100
    things: int = 32
    regions: int = 6
    seed: int = 1
    vocab: str = "train"
    texts: tuple[Kind, ...] = TRAIN_PLAN
    features: str = "efficientnet_lite0"
    feature_dim: int = 0
    classes: int = 0
    pictures: bool = True

    @property
    def splits(self) -> dict[str, int]:
        """Scenes per split, training first; empty splits are left out."""
        every = {
            "train": self.scenes,
            "val": self.val,
            "val_unseen": self.val_unseen,
            "val_new_things": self.val_new_things,
        }
        return {name: count for name, count in every.items() if count}


FIXTURE = Options(
    scenes=480,
    val=120,
    val_unseen=0,
    val_new_things=0,
    things=12,
    texts=("list", "list", "relation", "pair"),
    feature_dim=64,
    classes=32,
    pictures=False,
)
"""The corpus in tests/fixtures/demo: learnable, and small because its features are principal components."""


@dataclass(frozen=True)
class SplitReport:
    """Size of one split. ``identity``: share of its objects whose nearest training centroid is their thing's."""

    scenes: int
    texts: int
    regions: int
    bytes: int
    identity: float


@dataclass(frozen=True)
class Report:
    """What was built, and how long it took."""

    splits: dict[str, SplitReport]
    vocabulary: int
    things: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Computed:
    """Regions of all scenes of a split: features float32 [S, R, 1280], probs float16 [S, R, 1000], encoded pictures."""

    features: NDArray[np.float32]
    probs: NDArray[np.float16]
    pictures: list[bytes]


def build(options: Options, out: Path, workers: int, progress: Progress) -> Report:
    """Write the corpus into the new folder ``out`` (a dataset root per split, manifest.json, CREDITS.md).

    Args:
        options: what to build.
        out: a folder that does not exist; the caller renames it when all is well.
        workers: processes that render and compute features.
        progress: shows what is going on.

    Raises:
        VlscaleError: the wheel is missing, an option is out of range, or a file of the demo is damaged.
    """
    began = time.monotonic()
    weights_path()
    catalogue = load_catalogue(options.things)
    scenes = plan_splits(options, catalogue)
    captions = {
        split: [caption_scene(s, options.texts if split == "train" else VALIDATION_PLAN, options.seed) for s in planned]
        for split, planned in scenes.items()
    }
    pieces = _wordpieces(options.vocab, captions["train"])
    computed = _compute_splits(options, scenes, workers, progress)
    reduction = fit_reduction(
        computed["train"].features, computed["train"].probs, class_names(), options.feature_dim, options.classes
    )
    centroids: dict[str, NDArray[np.float64]] = {}
    reports = {}
    for split, planned in scenes.items():
        features = reduction.features(computed[split].features)
        probs = reduction.probs(computed[split].probs)
        writing = progress.add_task(f"writing {split}", total=len(planned))
        root = out / split
        _write_images(root, options, planned, features, probs, reduction)
        _write_classes(root, probs, reduction)
        texts = _write_texts(root, planned, captions[split], pieces)
        _write_pictures(root, planned, computed[split].pictures)
        progress.update(writing, completed=len(planned))
        identity = nearest_centroid(features, [_things(scene) for scene in planned], centroids)
        reports[split] = SplitReport(len(planned), texts, features.shape[0] * features.shape[1], _bytes(root), identity)
    np.save(out / "feature_statistics.npy", reduction.statistics)
    _write_credits(out, scenes)
    _write_manifest(out, options, catalogue, scenes, reports, pieces)
    return Report(reports, pieces.vocabulary.size, options.things, _bytes(out), time.monotonic() - began)


def plan_splits(options: Options, catalogue: Catalogue) -> dict[str, list[Scene]]:
    """Plan all splits, training first; its scenes avoid the combinations that the evaluation splits ask about."""
    evaluation: dict[str, list[Scene]] = {}
    for split, count in options.splits.items():
        if split != "train":
            evaluation[split] = plan_scenes(catalogue, split, count, options.seed, options.regions)
    asked: frozenset[frozenset[str]] = frozenset()
    for planned in evaluation.values():
        asked |= combinations(planned)
    train = plan_scenes(catalogue, "train", options.scenes, options.seed, options.regions, asked)
    return {"train": train, **evaluation}


def _wordpieces(vocab: str, captions: Sequence[Sequence[Caption]]) -> WordPieces:
    if vocab == "train":
        return train_wordpieces(caption.text for group in captions for caption in group)
    return load_wordpieces(Path(vocab))


# Computing


@dataclass(frozen=True)
class _Job:
    scenes: tuple[Scene, ...]
    encode: bool


_extractor: RegionExtractor | None = None


def _start_worker() -> None:
    global _extractor
    torch.set_num_threads(1)
    _extractor = RegionExtractor()


def _run_job(job: _Job) -> tuple[NDArray[np.float32], NDArray[np.float16], list[bytes]]:
    assert _extractor is not None
    images = [render(scene) for scene in job.scenes]
    boxes = [np.array([region.box for region in scene.regions], np.float32) for scene in job.scenes]
    found = [_extractor(as_array(image), corners) for image, corners in zip(images, boxes, strict=True)]
    pictures = []
    for image in images if job.encode else ():
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=85)
        pictures.append(stream.getvalue())
    return (
        np.stack([regions.features for regions in found]),
        np.stack([regions.probs for regions in found]).astype(np.float16),
        pictures,
    )


def _compute_splits(
    options: Options, scenes: Mapping[str, list[Scene]], workers: int, progress: Progress
) -> dict[str, _Computed]:
    """Render and compute everything in ``workers`` processes that are gone at the end, however it ends."""
    if not 1 <= workers <= 256:
        raise VlscaleError(f"--workers {workers}: expected 1 to 256 processes")
    shown = progress.add_task("rendering, region features", total=sum(map(len, scenes.values())))
    # "spawn": a forked copy of a process that has used torch's threads may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        with pool:
            computed = {}
            for split, planned in scenes.items():
                encode = options.pictures and split != "train"
                jobs = [_Job(tuple(planned[i : i + _CHUNK]), encode) for i in range(0, len(planned), _CHUNK)]
                features, probs, pictures = [], [], []
                for result in pool.map(_run_job, jobs):
                    features.append(result[0])
                    probs.append(result[1])
                    pictures += result[2]
                    progress.advance(shown, len(result[0]))
                computed[split] = _Computed(np.concatenate(features), np.concatenate(probs), pictures)
            return computed
    except BrokenProcessPool:
        raise VlscaleError(
            "a worker process ended before it had a result (its own message stands above, if it left one); "
            "try --workers 1, and see whether memory was short"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# Writing


def _things(scene: Scene) -> list[str | None]:
    return [None if region.object is None else scene.objects[region.object].noun for region in scene.regions]


def _normalised(box: Sequence[float]) -> list[float]:
    return [round(side / (HEIGHT if i % 2 else WIDTH), 5) for i, side in enumerate(box)]


def _scene_facts(scene: Scene) -> dict[str, object]:
    """The ground truth of a scene, per region; None stands for a distractor."""
    objects = [None if region.object is None else scene.objects[region.object] for region in scene.regions]
    return {
        "scene": scene.id,
        "things": _things(scene),
        "pictures": [None if placed is None else placed.picture.id for placed in objects],
        "boxes_true": [None if placed is None else _normalised(placed.box) for placed in objects],
        "background": "#{:02x}{:02x}{:02x}".format(*scene.color) if scene.photo is None else scene.photo.id,
    }


def _write_images(
    root: Path,
    options: Options,
    scenes: Sequence[Scene],
    features: NDArray[np.float16],
    probs: NDArray[np.float16],
    reduction: Reduction,
) -> None:
    scale = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)
    source = f"{options.features} ({WHEEL}), RoIAlign at stride 32, {reduction.description}"
    with ImageWriter(root, features.shape[-1], "float16", source=source) as writer:
        for scene, regions, scores in zip(scenes, features, probs, strict=True):
            boxes = np.array([region.box for region in scene.regions], np.float32) / scale
            # A detector's confidence is the probability of its best class.
            conf = scores.max(1).astype(np.float32)
            writer.write(scene.id, WIDTH, HEIGHT, regions, boxes, conf, _scene_facts(scene))


def _write_classes(root: Path, probs: NDArray[np.float16], reduction: Reduction) -> None:
    with ClassWriter(root, probs.shape[-1], "float16", reduction.class_names) as writer:
        for rows in probs:
            writer.write(rows)


def _write_texts(root: Path, scenes: Sequence[Scene], captions: Sequence[Sequence[Caption]], pieces: WordPieces) -> int:
    with TextWriter(root, pieces.vocabulary, {s.id: i for i, s in enumerate(scenes)}, pieces.json) as writer:
        for scene, group in zip(scenes, captions, strict=True):
            encoded = pieces.encode([caption.text for caption in group])
            for number, (caption, (ids, offsets)) in enumerate(zip(group, encoded, strict=True)):
                extra = {"kind": caption.kind, "spans": region_spans(caption, scene, offsets)}
                writer.write(f"{scene.id}-{number}", caption.text, ids, [scene.id], extra)
        return writer.rows_written


def _write_pictures(root: Path, scenes: Sequence[Scene], pictures: Sequence[bytes]) -> None:
    if not pictures:
        return
    folder = root / "scenes"
    folder.mkdir()
    for scene, encoded in zip(scenes, pictures, strict=True):
        (folder / f"{scene.id}.webp").write_bytes(encoded)


def _used_pictures(scenes: Sequence[Scene]) -> list[str]:
    used = {placed.picture.id for scene in scenes for placed in scene.objects}
    return sorted(used | {scene.photo.id for scene in scenes if scene.photo is not None})


def _write_credits(out: Path, scenes: Mapping[str, list[Scene]]) -> None:
    """Name author and licence of every picture that the scenes show, as CC-BY and CC-BY-SA ask."""
    used = {name for planned in scenes.values() for name in _used_pictures(planned)}
    lines = [
        "# Credits",
        "",
        "The scenes are composed of these pictures (scaled, and backgrounds cropped and paled); scenes that show a",
        "CC-BY-SA picture are under the same licence. Sources: `data_tools/demo/SOURCES.md`.",
        "",
        "| picture | author | licence |",
        "| --- | --- | --- |",
    ]
    for line in (DEMO / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["id"] in used:
            lines.append(f"| {record['id']} | {record['author'].replace('|', '/')} | {record['license']} |")
    (out / "CREDITS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_manifest(
    out: Path,
    options: Options,
    catalogue: Catalogue,
    scenes: Mapping[str, list[Scene]],
    reports: Mapping[str, SplitReport],
    pieces: WordPieces,
) -> None:
    vocab = options.vocab if options.vocab == "train" else Path(options.vocab).name
    manifest = {
        "corpus": MANIFEST_KIND,
        "options": asdict(replace(options, vocab=vocab)),
        "vocabulary": {"size": pieces.vocabulary.size, "fingerprint": pieces.vocabulary.fingerprint},
        "things": [thing.noun for thing in catalogue.known],
        "splits": {
            split: {
                "scenes": report.scenes,
                "texts": report.texts,
                "regions": report.regions,
                "pictures": _used_pictures(scenes[split]),
            }
            for split, report in reports.items()
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


MANIFEST_KIND = "vlscale-demo"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    for top, _, names in os.walk(folder):
        for name in names:
            yield Path(top) / name
