"""Three ways from the same rows on disk to the same micro-batches, for the benchmark of reading and its test.

- ``vlscale``: the loader, packed batches.
- ``lmdb``: what UNITER's authors publish and read: an LMDB of compressed npz per image and one of msgpack per text, a
  map-style dataset, PyTorch's loader, and a collation that pads texts and regions, builds the attention mask and the
  gather index. In its favour, records hold no class probabilities, and texts are not compressed.
- ``streaming``: a StreamingDataset of the very stores that vlscale reads, indexed row by row, PyTorch's loader, and the
  same padding collation.

All three get the same micro-batches in the same order, and keep the stored float16.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from vlscale.data.dataset import open_dataset
from vlscale.data.deal import MicroBatch, accumulation, deal_hand
from vlscale.data.loader import Loader
from vlscale.data.plan import FixedSteps, Plan, PlanSettings, Step
from vlscale.data.schema import Vocabulary
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter

CLS, SEP = 2, 3


class Unmasked:
    """Leaves the batch as it is: the rivals mask nothing either."""

    needs_class_probs = False

    def prepare(self, batch: Any, draws: Any) -> Any:
        """Return the batch."""
        return batch


def make_stores(
    root: Path, regions: Any, words: Any, width: int, codec: str = "none", classes: int | None = None
) -> None:
    """Write the stores (``root``) and the two LMDBs (``root/lmdb``): one image and one text per entry.

    Features are the positive half of a normal distribution, and zero elsewhere, as after a ReLU.
    """
    rng = np.random.default_rng(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = Vocabulary.from_tokens(special + [f"w{index}" for index in range(1000)])
    noise = rng.standard_normal((4096, width), np.float32)
    written = []
    with ImageWriter(root, width, "float16", codec=codec) as images:
        for row, count in enumerate(regions):
            features = np.maximum(noise[rng.integers(0, len(noise), count)], 0).astype(np.float16)
            low = rng.uniform(0, 0.6, (count, 2))
            boxes = np.concatenate([low, low + rng.uniform(0.05, 0.4, (count, 2))], 1).astype(np.float32)
            images.write(str(row), 640, 480, features, boxes, np.ones(count, np.float32))
            if codec == "none":
                written.append((features, boxes))
    with TextWriter(root, vocabulary, images.rows) as texts:
        ids = [rng.integers(5, 1005, count).astype(np.int32) for count in words]
        for row, text in enumerate(ids):
            texts.write(str(row), "", text, [str(row)])
    if classes is not None:
        with ClassWriter(root, classes) as writer:
            for count in regions:
                writer.write(rng.dirichlet(np.full(classes, 0.05), count))
    if codec == "none":
        _make_lmdb(root / "lmdb", written, ids)


def _make_lmdb(folder: Path, images: list[tuple[Any, Any]], texts: list[Any]) -> None:
    folder.mkdir()
    with (
        lmdb.open(str(folder / "images"), map_size=1 << 34) as image_db,
        lmdb.open(str(folder / "texts"), map_size=1 << 30) as text_db,
        image_db.begin(write=True) as image_rows,
        text_db.begin(write=True) as text_rows,
    ):
        for row, ((features, boxes), text) in enumerate(zip(images, texts, strict=True)):
            blob = io.BytesIO()
            np.savez_compressed(blob, features=features, norm_bb=boxes, conf=np.ones(len(boxes), np.float16))
            image_rows.put(str(row).encode(), blob.getvalue())
            text_rows.put(str(row).encode(), msgpack.packb({"input_ids": text.tolist(), "img_fname": str(row)}))


def plan_micro_batches(root: Path, ceiling: int) -> tuple[list[Step], list[MicroBatch]]:
    """Return steps of one pass, each one micro-batch of at most ``ceiling`` tokens, and these micro-batches."""
    dataset = open_dataset("bench", root)
    settings = PlanSettings(seed=1, global_batch_tokens=ceiling, micro_batch_tokens=ceiling)
    plan = Plan([(dataset.lengths, {"mlm": 1.0})], settings)
    assert accumulation(plan, 1) == 1
    steps, done = [], 0
    for step, _ in plan.steps(plan.start()):
        done += len(step)
        if done > len(dataset):
            break
        steps.append(step)
    return steps, [deal_hand(step, 0, 1, 1, ceiling)[0] for step in steps]


def read_vlscale(root: Path, steps: list[Step], workers: int, ceiling: int) -> Iterator[Any]:
    """Yield RaggedBatches; ``steps`` are gone through again and again."""
    plan = FixedSteps(steps * 50)
    dataset = open_dataset("bench", root)
    with Loader(
        {"bench": dataset}, {"mlm": Unmasked()}, plan, plan.start(), 0, 1, 1, ceiling, workers=workers
    ) as loader:
        for _, _, (batch,) in loader:
            yield batch


def read_lmdb(root: Path, micros: list[MicroBatch], workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches, on and on."""
    yield from _padded(LmdbRows(root / "lmdb"), micros, workers)


def read_streaming(root: Path, micros: list[MicroBatch], workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches, on and on."""
    yield from _padded(StreamingRows(root), micros, workers)


def _padded(rows: Dataset[Any], micros: list[MicroBatch], workers: int) -> Iterator[dict[str, torch.Tensor]]:
    batches = [list(zip(micro.texts.tolist(), micro.images.tolist(), strict=True)) for micro in micros] * 50
    options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    yield from DataLoader(rows, batch_sampler=batches, collate_fn=pad, num_workers=workers, **options)


class LmdbRows(Dataset[Any]):
    """Rows of the two LMDBs, decoded one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[Any, Any] | None = None

    def __getitem__(self, rows: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids with [CLS] and [SEP], features and boxes."""
        if self._open is None:  # in the worker: an environment does not survive a fork
            environments = [lmdb.open(str(self._folder / n), readonly=True, lock=False) for n in ("texts", "images")]
            self._open = (environments[0].begin(buffers=True), environments[1].begin(buffers=True))
        texts, images = self._open
        text = msgpack.unpackb(texts.get(str(rows[0]).encode()))
        with np.load(io.BytesIO(images.get(str(rows[1]).encode())), allow_pickle=False) as image:
            features, boxes = torch.from_numpy(image["features"]), torch.from_numpy(image["norm_bb"])
        return torch.tensor([CLS, *text["input_ids"], SEP]), features, boxes


class StreamingRows(Dataset[Any]):
    """Rows of the stores through mosaicml-streaming."""

    def __init__(self, root: Path) -> None:
        from streaming import StreamingDataset

        self._texts, self._images = (StreamingDataset(local=str(root / name), batch_size=1) for name in STORES)

    def __getitem__(self, rows: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids with [CLS] and [SEP], features and boxes."""
        text, image = self._texts[rows[0]], self._images[rows[1]]
        # streaming's arrays are read-only views; PyTorch wants its own.
        features, boxes = torch.tensor(image["features"]), torch.tensor(image["boxes"])
        return torch.tensor([CLS, *text["input_ids"].tolist(), SEP]), features, boxes


STORES = ("texts", "images")


def pad(rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """UNITER's collation: padded ids and features, lengths, attention mask [B, L] and gather index [B, L]."""
    ids, features, boxes = zip(*rows, strict=True)
    words, regions = torch.tensor([len(row) for row in ids]), torch.tensor([len(row) for row in features])
    most = int((words + regions).max())
    index = torch.arange(most).repeat(len(ids), 1)
    place = index - words[:, None]
    inside = (place >= 0) & (place < regions[:, None])
    gather = torch.where(inside, int(words.max()) + place, index)
    return {
        "input_ids": pad_sequence(list(ids), batch_first=True),
        "features": pad_sequence(list(features), batch_first=True),
        "boxes": pad_sequence(list(boxes), batch_first=True),
        "words": words,
        "regions": regions,
        "attention_mask": (index < (words + regions)[:, None]).long(),
        "gather_index": gather,
    }


def take(batches: Iterator[Any], count: int) -> list[Any]:
    """Return the first ``count`` batches, and end what makes them."""
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]
