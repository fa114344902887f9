"""Rewriting the captions of one part: what is known of each image, the views, and their word pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.rewriting.back_translation import BackTranslator, Translation
from data_tools.rewriting.building import Neighbourhood, chunks, open_texts
from data_tools.rewriting.graph import Analysis
from data_tools.rewriting.meanings import may_be_same
from data_tools.rewriting.neighbours import TermIndex
from data_tools.rewriting.replacing import Known, Rewrite, Rewriter, known_of, normalised
from data_tools.rewriting.stores import RewriteWriter, UnitStore, require_same_texts
from data_tools.rewriting.vocabulary import read_vocabulary
from data_tools.tokenizers import AnyTokenizer, load_tokenizer
from data_tools.under_way import counted
from vlscale.data.store import TextStore
from vlscale.errors import VlscaleError

_SPARE = 8
"""Neighbours looked at per one that is wanted: some are of the same image, or name nothing else."""


_REMEMBERED = 30_000
"""Captions that a process keeps in memory."""


@dataclass(frozen=True)
class Wanted:
    """What is made of each caption.

    Attributes:
        per_kind: object, attribute and relation rewrites, each at most.
        sentences: captions of other images.
        seed: of the draws.
        min_count: least count of a replacement in the corpus.
        most: replacements of each kind that are offered.
        any_attribute: see :class:`data_tools.rewriting.replacing.Rewriter`.
        vocabulary: ``vocabulary.json``; None for the one in ``units``.
        tokenizer: None for the one in ``texts``.
        translation: back-translation; None for none.
    """

    per_kind: int = 8
    sentences: int = 4
    seed: int = 0
    min_count: int = 1
    most: int = 5000
    any_attribute: bool = False
    vocabulary: Path | None = None
    tokenizer: Path | None = None
    translation: Translation | None = None


@dataclass(frozen=True, eq=False)
class _Caption:
    row: int
    name: str
    text: str
    ids: tuple[int, ...]
    analysis: Analysis


_Views = tuple[list[Rewrite], set[tuple[int, ...]]]


class RewriteBuilder:
    """Builds parts of ``rewrites``; see :class:`data_tools.parts.PartBuilder`.

    Args:
        root: the dataset's folder.
        wanted: what is made.
    """

    def __init__(self, root: Path, wanted: Wanted) -> None:
        self.root = root
        self.wanted = wanted
        self._read: dict[int, _Caption] = {}
        self._known: tuple[tuple[int, ...], Known] = (), known_of(())

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "wanted": self.wanted, "_read": {}, "_known": ((), known_of(()))}

    @cached_property
    def texts(self) -> TextStore:
        """The captions."""
        return open_texts(self.root)

    @cached_property
    def units(self) -> UnitStore:
        """Their scene graphs."""
        if not (self.root / "units").is_dir():
            raise VlscaleError(f"{self.root / 'units'}: is missing; run python -m data_tools.find_units first")
        store = UnitStore(self.root / "units")
        require_same_texts(store, self.texts, self.texts.meta.vocabulary.fingerprint)
        return store

    @cached_property
    def rewriter(self) -> Rewriter:
        """Phrases and words."""
        wanted = self.wanted
        path = wanted.vocabulary or self.root / "units" / "vocabulary.json"
        vocabulary = read_vocabulary(path, wanted.min_count, wanted.most)
        return Rewriter(vocabulary, wanted.per_kind, wanted.seed, wanted.any_attribute)

    @cached_property
    def index(self) -> TermIndex | None:
        """Captions of other images."""
        return TermIndex(self.root / "units", len(self.texts)) if self.wanted.sentences else None

    @cached_property
    def translator(self) -> BackTranslator | None:
        """Paraphrases."""
        return self.wanted.translation.load() if self.wanted.translation else None

    @cached_property
    def tokenizer(self) -> AnyTokenizer:
        """What makes the word pieces; of the texts' own vocabulary."""
        path = self.wanted.tokenizer or self.texts.tokenizer_path
        if path is None:
            raise VlscaleError(f"{self.texts.folder}: keeps no tokenizer.json; give --tokenizer")
        tokenizer, vocabulary = load_tokenizer(path), self.texts.meta.vocabulary
        if tokenizer.vocabulary.tokens != vocabulary.tokens:
            raise VlscaleError(
                f"{path}: {tokenizer.vocabulary.size} word pieces, not the {vocabulary.size} of the texts; give "
                f"--tokenizer, the one that {self.texts.folder} was made with"
            )
        return tokenizer

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        """Which captions share an image."""
        return Neighbourhood(self.texts)

    def check(self) -> None:
        """Open everything, so that a mistake ends the command before hours of work.

        Raises:
            VlscaleError: something is missing or does not fit.
        """
        _ = self.units, self.rewriter, self.index, self.tokenizer, self.translator

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write the part's ``rewrites`` into ``folder``."""
        made, told = Counter[str](), Counter[str]()
        rows = counted(range(part["begin"], part["end"]))
        with RewriteWriter(folder, self.texts.meta.vocabulary.fingerprint, self.wanted.seed) as writer:
            for chunk in chunks(part):
                if len(self._read) > _REMEMBERED:
                    self._read.clear()
                captions = [self._caption(row) for row in chunk]
                paraphrases = zip(captions, self._paraphrases(captions), strict=True)
                made_of = [self._views(caption, others, told) for caption, others in paraphrases]
                for caption, views in zip(captions, self._encoded(made_of, told), strict=True):
                    next(rows)
                    writer.write(caption.name, views)
                    made.update(f"{'positive' if view.positive else 'negative'} {view.kind}" for view, _ in views)
                    told["captions without any rewrite"] += not views
                    told["captions without objects, attributes and relations"] += caption.analysis.empty
        self._read = {}
        return {"rows": writer.rows_written, "rewrites": dict(made), "told": {k: n for k, n in told.items() if n}}

    def _caption(self, row: int) -> _Caption:
        found = self._read.get(row)
        if found is None:
            text = self.texts.row(row)
            analysis = self.units.analysis(row, text["id"], text["text"])
            found = _Caption(row, text["id"], text["text"], tuple(text["input_ids"].tolist()), analysis)
            self._read[row] = found
        return found

    def _paraphrases(self, captions: Sequence[_Caption]) -> list[list[str]]:
        if self.translator is None:
            return [[] for _ in captions]
        return self.translator.paraphrase([caption.text for caption in captions])

    def _views(self, caption: _Caption, paraphrases: Sequence[str], told: Counter[str]) -> _Views:
        """All views of a caption, and the word pieces of the captions of its image."""
        images = self.neighbourhood.images_of(caption.row)
        siblings = [self._caption(row) for row in self.neighbourhood.texts_of(images)] or [caption]
        if not images or self._known[0] != images:  # the texts of an image lie together
            self._known = images, known_of((one.text, one.analysis) for one in siblings)
        known = self._known[1]
        views = list(self._positives(caption, paraphrases, told))
        views += self.rewriter.rewrite(caption.name, caption.text, caption.analysis, known)
        views += self._sentences(caption, {one.row for one in siblings}, known, told)
        return views, {one.ids for one in siblings}

    def _encoded(self, views: Sequence[_Views], told: Counter[str]) -> Iterator[list[tuple[Rewrite, list[int]]]]:
        """Views with their word pieces; without those that equal a caption of the image, or each other."""
        encoded = iter(self.tokenizer.encode_many([view.text for several, _ in views for view in several]))
        for several, pieces in views:
            kept, texts, taken = [], set(), set(pieces)
            for view in several:
                ids = next(encoded)
                if not ids or tuple(ids) in taken:
                    told["rewrites dropped: word pieces of another caption, or none"] += 1
                elif normalised(view.text) not in texts:
                    texts.add(normalised(view.text))
                    taken.add(tuple(ids))
                    kept.append((view, ids))
            yield kept

    def _positives(self, caption: _Caption, paraphrases: Sequence[str], told: Counter[str]) -> Iterator[Rewrite]:
        for text in paraphrases:
            if normalised(text) == normalised(caption.text):
                told["back-translations dropped: unchanged"] += 1
            else:
                yield Rewrite(text, True, "sentence", "", "back-translation")

    def _sentences(self, caption: _Caption, siblings: set[int], known: Known, told: Counter[str]) -> list[Rewrite]:
        """The nearest captions of other images that name something which nobody names in this one."""
        if self.index is None:
            return []
        count = self.wanted.sentences
        found: list[Rewrite] = []
        for row, _ in self.index.nearest(caption.text, _SPARE * count + len(siblings), caption.row):
            if row in siblings or len(found) == count:
                continue
            other = self._caption(row)
            fresh = normalised(other.text) not in known.texts | {normalised(view.text) for view in found}
            if fresh and names_something_else(other.analysis, known):
                found.append(Rewrite(other.text, False, "sentence", "", other.name))
        told["captions with fewer sentences than asked for"] += len(found) < count
        return found


def names_something_else(analysis: Analysis, known: Known) -> bool:
    """Whether a caption names a thing that cannot be one of those known of an image, so that it is false of it."""
    return any(
        not item.fixed and not any(may_be_same(item.lemma, other) for other in known.objects)
        for item in analysis.objects
    )
