"""HeldOut: a dataset with its ground truth (which word means which region), cut into batches for a model to answer.

Ground truth stands in the stores' ``extra`` columns, as the demo corpus writes them: texts have ``kind`` and ``spans``,
``[token_start, token_end, region]`` per named thing, images have ``things``, the name (or null) of what each region
shows. A dataset without them still has matching and retrieval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from vlscale.data.collate import collate
from vlscale.data.dataset import Dataset
from vlscale.data.deal import MicroBatch
from vlscale.data.random import Draws
from vlscale.errors import VlscaleError
from vlscale.ragged import RaggedBatch
from vlscale.report.outcome import UnmeasurableError

BATCH_TOKENS = 8192
"""Tokens and regions of one batch: some 400 pairs of the demo, few enough for the caches of a CPU."""

_TRIALS = 1000


@dataclass(frozen=True, eq=False)
class Mentions:
    """K places where a text names a thing that a region of its image shows.

    Attributes:
        text, image: int64 [K], rows of the stores.
        start, end: int64 [K], word pieces [start, end) of the text, without [CLS].
        region: int64 [K], number of the region in its image.
        thing: int64 [K], index into ``HeldOut.things``.
    """

    text: NDArray[np.int64]
    image: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    region: NDArray[np.int64]
    thing: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of mentions K."""
        return len(self.text)

    def where(self, chosen: NDArray[Any]) -> Mentions:
        """Return the mentions that ``chosen`` (a mask or indices) picks."""
        parts = (self.text, self.image, self.start, self.end, self.region, self.thing)
        return Mentions(*(part[chosen] for part in parts))


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One held-out dataset, opened for evaluation; made by :func:`open_heldout`.

    Attributes:
        dataset: the dataset.
        texts: int64, rows of the texts that take part: not over-long, and with an image.
        kinds: kind of every row of the texts store, ``""`` where none is recorded.
        things: names of the things.
        contains: bool [M, things], which image shows which thing.
        mentions: all mentions of ``texts`` whose region is among the first ``max_regions``.
        seed: of every draw.
        max_regions: the first n regions of an image are used.
        device: where batches go.
    """

    dataset: Dataset
    texts: NDArray[np.int64]
    kinds: tuple[str, ...]
    things: tuple[str, ...]
    contains: NDArray[np.bool_]
    mentions: Mentions
    seed: int
    max_regions: int
    device: str

    @property
    def draws(self) -> Draws:
        """Random numbers of this evaluation."""
        return Draws(self.seed, self.dataset.name)

    @property
    def first_image(self) -> NDArray[np.int64]:
        """int64 [N], the image of each text."""
        lengths = self.dataset.lengths
        return lengths.first_image(np.arange(len(lengths)))

    def captions(self) -> NDArray[np.int64]:
        """Rows of the texts that say all of their image: those of kind ``list``, or where no kind is recorded, all."""
        listed = np.array([self.kinds[row] == "list" for row in self.texts], bool)
        if listed.any():
            return self.texts[listed]
        return self.texts[[not self.kinds[row] for row in self.texts]]

    def spelt_mentions(self) -> Mentions:
        """Return the mentions that the vocabulary can spell, that is, without [UNK].

        Raises:
            UnmeasurableError: there is none.
        """
        mentions, unknown = self.mentions, self.dataset.texts.meta.vocabulary.unk
        if not len(mentions):
            raise UnmeasurableError("no text has spans that point at regions")
        texts, which = np.unique(mentions.text, return_inverse=True)
        ids, lengths = self.dataset.texts.input_ids(texts)
        unknowns = np.concatenate([[0], np.cumsum(ids == unknown)])
        begin = (np.cumsum(lengths) - lengths)[which]
        good = unknowns[begin + mentions.end] == unknowns[begin + mentions.start]
        if not good.any():
            raise UnmeasurableError("every thing that the texts name is [UNK] in the vocabulary")
        return mentions.where(good)

    def named(self, texts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [B, things], which things each text names."""
        table = np.zeros((len(self.dataset), len(self.things)), bool)
        table[self.mentions.text, self.mentions.thing] = True
        return table[texts]

    def wrong_images(
        self,
        purpose: str,
        texts: NDArray[np.int64],
        wrong: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]],
    ) -> NDArray[np.int64]:
        """Draw for each of B texts an image row that is not its own and that ``wrong`` accepts.

        Args:
            purpose: keys the draws.
            texts: int64 [B].
            wrong: (places int64 [P] into ``texts``, image rows int64 [P]) -> bool [P].

        Raises:
            UnmeasurableError: there seems to be no such image.
        """
        chosen = np.full(len(texts), -1, np.int64)
        open_ = np.arange(len(texts))
        for trial in range(_TRIALS):
            drawn = self.draws.below(purpose, len(self.dataset.images), 0, open_, trial)
            good = ~self.dataset.lengths.refers_to(texts[open_], drawn) & wrong(open_, drawn)
            chosen[open_[good]] = drawn[good]
            open_ = open_[~good]
            if not len(open_):
                return chosen
        raise UnmeasurableError(f"no wrong image for text row {texts[open_[0]]} in {_TRIALS} draws")

    def batches(
        self,
        task: str,
        texts: NDArray[np.int64],
        images: NDArray[np.int64],
        doing: str = "",
        progress: Progress | None = None,
    ) -> Iterator[tuple[slice, RaggedBatch]]:
        """Cut B pairs, in order, into batches of at most ``BATCH_TOKENS``; nothing is masked.

        Args:
            task: name of the objective.
            texts, images: int64 [B].
            doing: shown by ``progress``.
            progress: advanced by the pairs of each batch when the caller asks for the next.

        Yields:
            The places in ``texts`` and the batch, on ``device``.
        """
        bar = None if progress is None else progress.add_task(doing, total=len(texts))
        total = np.cumsum(self.dataset.lengths.costs(texts, images, self.max_regions), dtype=np.int64)
        begin = 0
        while begin < len(texts):
            before = total[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(total, before + BATCH_TOKENS, side="right")))
            yield slice(begin, end), self._batch(task, texts[begin:end], images[begin:end]).to(self.device)
            if progress is not None and bar is not None:
                progress.advance(bar, end - begin)
            begin = end
        if progress is not None and bar is not None:
            progress.remove_task(bar)

    def _batch(self, task: str, texts: NDArray[np.int64], images: NDArray[np.int64]) -> RaggedBatch:
        count, vocabulary = len(texts), self.dataset.texts.meta.vocabulary
        micro = MicroBatch(
            step=0,
            micro=0,
            task=task,
            dataset=self.dataset.name,
            texts=texts,
            images=images,
            passes=np.zeros(count, np.int64),
            examples=texts,
            labels=np.ones(count, np.int8),
            group=np.arange(count, dtype=np.int32),
            weight=1.0,
            tokens=0,
        )
        return collate(self.dataset, micro, self.max_regions, vocabulary.cls, vocabulary.sep)


@contextmanager
def answering(model: object) -> Iterator[None]:
    """Dropout off and no gradients inside the block; the model's mode is put back afterwards."""
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


def open_heldout(dataset: Dataset, seed: int, max_text_tokens: int, max_regions: int, device: str = "cpu") -> HeldOut:
    """Read the ground truth of a dataset.

    Args:
        dataset: the dataset.
        seed: of every draw: wrong images, candidates.
        max_text_tokens: longer texts do not take part.
        max_regions: the first n regions of an image are used.
        device: where batches go.

    Raises:
        VlscaleError: ``extra`` of a row is not what the module says; the row is named.
    """
    lengths = dataset.lengths
    first_image = lengths.first_image(np.arange(len(lengths)))
    usable = (np.asarray(lengths.tokens) <= max_text_tokens) & (first_image >= 0)
    things_of = [_things(dataset, row) for row in range(len(dataset.images))]
    number: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int, int]] = []
    kinds = []
    for text in range(len(dataset)):
        row = dataset.texts.row(text)
        extra = row["extra"] if isinstance(row["extra"], dict) else {}
        kinds.append(extra["kind"] if isinstance(extra.get("kind"), str) else "")
        image = int(first_image[text])
        for start, end, region in _spans(dataset, text, image, extra.get("spans", [])):
            name = things_of[image][region] if things_of[image] else _spell(dataset, row["input_ids"][start:end])
            if name is None:
                raise _points_nowhere(dataset, text, image, region)
            thing = number.setdefault(name, len(number))
            if usable[text] and region < max_regions:
                rows.append((text, image, start, end, region, thing))
    for shown in things_of:
        for name in filter(None, shown):
            number.setdefault(name, len(number))
    table = np.array(rows, np.int64).reshape(-1, 6)
    contains = np.zeros((len(dataset.images), len(number)), bool)
    contains[table[:, 1], table[:, 5]] = True
    for image, shown in enumerate(things_of):
        contains[image, [number[name] for name in shown if name]] = True
    return HeldOut(
        dataset=dataset,
        texts=np.flatnonzero(usable),
        kinds=tuple(kinds),
        things=tuple(number),
        contains=contains,
        mentions=Mentions(*table.T.copy()),
        seed=seed,
        max_regions=max_regions,
        device=device,
    )


def _things(dataset: Dataset, row: int) -> Sequence[str | None]:
    """Names of what the regions of an image show; empty where nothing is recorded."""
    extra = dataset.images.row(row)["extra"]
    found = extra.get("things") if isinstance(extra, dict) else None
    if found is None:
        return ()
    regions = int(dataset.images.lengths[row])
    if not isinstance(found, list) or len(found) != regions or not all(isinstance(n, str | None) for n in found):
        raise VlscaleError(
            f"{dataset.root / 'images'}: row {row}: extra.things is not a list of {regions} names or nulls, one per "
            f"region; build the store again"
        )
    return found


def _spans(dataset: Dataset, text: int, image: int, found: Any) -> list[list[int]]:
    tokens = int(dataset.texts.lengths[text])
    regions = int(dataset.images.lengths[image]) if image >= 0 else 0
    if isinstance(found, list) and all(_is_span(span, tokens, regions) for span in found):
        return found
    raise VlscaleError(
        f"{dataset.root / 'texts'}: row {text}: extra.spans is not a list of [token_start, token_end, region] within "
        f"{tokens} tokens and {regions} regions; build the store again"
    )


def _points_nowhere(dataset: Dataset, text: int, image: int, region: int) -> VlscaleError:
    return VlscaleError(
        f"{dataset.root / 'texts'}: row {text}: a span points at region {region} of image row {image}, which shows no "
        f"thing by extra.things of the image; build both stores again"
    )


def _is_span(span: Any, tokens: int, regions: int) -> bool:
    if not isinstance(span, list) or len(span) != 3 or not all(type(part) is int for part in span):
        return False
    start, end, region = span
    return 0 <= start < end <= tokens and 0 <= region < regions


def _spell(dataset: Dataset, ids: NDArray[np.int32]) -> str:
    """The word that word pieces spell."""
    return "".join(dataset.texts.meta.vocabulary.tokens[i].removeprefix("##") for i in ids)
