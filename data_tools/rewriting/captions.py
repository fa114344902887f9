"""Rewriting the captions of one part: what is known of each image, the views, and their word pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.retrieval.detected import Detected, Detections
from data_tools.rewriting import lexicon
from data_tools.rewriting.back_translation import BackTranslator, Translation
from data_tools.rewriting.building import Neighbourhood, chunks, open_texts, rare_collections
from data_tools.rewriting.graph import Analysis
from data_tools.rewriting.meanings import may_be_same
from data_tools.rewriting.neighbours import TermIndex
from data_tools.rewriting.reading import decode_rows
from data_tools.rewriting.replacing import Known, Rewriter, known_of, normalised
from data_tools.rewriting.stores import RewriteWriter, analysis_of
from data_tools.rewriting.vocabulary import read_vocabulary
from data_tools.tokenizers import AnyTokenizer, load_tokenizer
from data_tools.under_way import counted
from vlscale.data.companion_schema import Rewrite
from vlscale.data.companions import UnitStore, require_same_texts
from vlscale.data.store import TextStore
from vlscale.errors import VlscaleError

_SPARE = 8
"""Neighbours looked at per one that is wanted: some are of the same image, or name nothing else."""

_AHEAD = 3
"""Neighbours per one that is wanted that are read together with those of other captions; most need no more."""

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
        regions: where the classes of the images' regions are looked for; None: not at all.
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
    regions: Detections | None = None


@dataclass(frozen=True, eq=False)
class _Caption:
    row: int
    name: str
    text: str
    ids: tuple[int, ...]
    analysis: Analysis

    @cached_property
    def normal(self) -> str:
        """The text without differences that do not count."""
        return normalised(self.text)


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
        self._names: dict[int, frozenset[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "wanted": self.wanted, "_read": {}, "_known": ((), known_of(())), "_names": {}}

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
        require_same_texts(store, self.texts)
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
    def detected(self) -> Detected | None:
        """Names of what a detector saw in the images; None where none are known."""
        where = self.wanted.regions
        if where is None or not (where.root / "images").is_dir():
            return None
        found = where.open()
        return found if found.named else None

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        """Which captions share an image."""
        return Neighbourhood(self.texts)

    def check(self) -> None:
        """Open everything, so that a mistake ends the command before hours of work.

        Raises:
            VlscaleError: something is missing or does not fit.
        """
        _ = self.units, self.rewriter, self.index, self.tokenizer, self.translator, self.detected

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write the part's ``rewrites`` into ``folder``."""
        made, told = Counter[str](), Counter[str]()
        rows = counted(range(part["begin"], part["end"]))
        with rare_collections(), RewriteWriter(folder, self.texts, self.wanted.seed) as writer:
            for chunk in chunks(part):
                captions = self._captions(chunk)
                self._look_at(captions, told)
                paraphrases, neighbours = self._paraphrases(captions), self._neighbours(captions)
                made_of = [self._views(*each, told) for each in zip(captions, paraphrases, neighbours, strict=True)]
                for caption, views in zip(captions, self._encoded(made_of, told), strict=True):
                    next(rows)
                    writer.write(caption.name, views)
                    made.update(f"{'positive' if view.positive else 'negative'} {view.kind}" for view, _ in views)
                    told["captions without any rewrite"] += not views
                    told["captions without objects, attributes and relations"] += caption.analysis.empty
        return {"rows": writer.rows_written, "rewrites": dict(made), "told": {k: n for k, n in told.items() if n}}

    def _captions(self, rows: Iterable[int]) -> list[_Caption]:
        """Captions by row; what has been read before is remembered."""
        rows = list(rows)
        new = [row for row in dict.fromkeys(rows) if row not in self._read]
        if not new:
            return [self._read[row] for row in rows]
        if len(self._read) + len(new) > _REMEMBERED:
            self._read, new = {}, list(dict.fromkeys(rows))
        texts, graphs = decode_rows(self.texts, new), decode_rows(self.units, new)
        for row, text, graph in zip(new, texts, graphs, strict=True):
            analysis = analysis_of(self.units, row, graph, text["id"], text["text"])
            self._read[row] = _Caption(row, text["id"], text["text"], tuple(text["input_ids"].tolist()), analysis)
        return [self._read[row] for row in rows]

    def _look_at(self, captions: Sequence[_Caption], told: Counter[str]) -> None:
        """Read the names of what was detected in the images of some captions."""
        if self.detected is None:
            return
        of = [self.neighbourhood.images_of(caption.row) for caption in captions]
        images = list(dict.fromkeys(image for several in of for image in several))
        named = self.detected.classes(images)
        self._names = {image: frozenset(lemmas_of(names)) for image, names in zip(images, named, strict=True)}
        told["captions whose regions have known classes"] += sum(
            any(self._names[image] for image in several) for several in of
        )

    def _siblings(self, row: int) -> list[int]:
        """The captions of its images, itself among them."""
        return self.neighbourhood.texts_of(self.neighbourhood.images_of(row)) or [row]

    def _neighbours(self, captions: Sequence[_Caption]) -> list[list[int]]:
        """Rows of the nearest captions of other images, best first."""
        siblings = [self._siblings(caption.row) for caption in captions]
        found: list[list[int]] = [[] for _ in captions]
        count = self.wanted.sentences
        if self.index is not None:
            for number, (caption, own) in enumerate(zip(captions, siblings, strict=True)):
                nearest = self.index.nearest(caption.text, _SPARE * count + len(own), caption.row)
                found[number] = [row for row, _ in nearest if row not in own]
        self._captions(row for own in siblings for row in own)
        self._captions(row for several in found for row in several[: _AHEAD * count])
        return found

    def _paraphrases(self, captions: Sequence[_Caption]) -> list[list[str]]:
        if self.translator is None:
            return [[] for _ in captions]
        return self.translator.paraphrase([caption.text for caption in captions])

    def _views(
        self, caption: _Caption, paraphrases: Sequence[str], neighbours: Sequence[int], told: Counter[str]
    ) -> _Views:
        """All views of a caption, and the word pieces of the captions of its image."""
        images = self.neighbourhood.images_of(caption.row)
        siblings = self._captions(self._siblings(caption.row))
        if not images or self._known[0] != images:  # the texts of an image lie together
            names = frozenset().union(*(self._names.get(image, frozenset()) for image in images))
            self._known = images, known_of(((one.text, one.analysis) for one in siblings), names)
        known = self._known[1]
        views = list(self._positives(caption, paraphrases, told))
        views += self.rewriter.rewrite(caption.name, caption.text, caption.analysis, known)
        views += self._sentences(neighbours, known, told)
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
                elif (normal := normalised(view.text)) not in texts:
                    texts.add(normal)
                    taken.add(tuple(ids))
                    kept.append((view, ids))
            yield kept

    def _positives(self, caption: _Caption, paraphrases: Sequence[str], told: Counter[str]) -> Iterator[Rewrite]:
        for text in paraphrases:
            if normalised(text) == normalised(caption.text):
                told["back-translations dropped: unchanged"] += 1
            else:
                yield Rewrite(text, True, "sentence", "", "back-translation")

    def _sentences(self, neighbours: Sequence[int], known: Known, told: Counter[str]) -> list[Rewrite]:
        """The nearest captions of other images that name something which nobody names in this one."""
        if self.index is None:
            return []
        count, taken = self.wanted.sentences, set(known.texts)
        found: list[Rewrite] = []
        for row in neighbours:
            if len(found) == count:
                break
            other = self._read.get(row) or self._captions([row])[0]
            if other.normal not in taken and names_something_else(other.analysis, known):
                taken.add(other.normal)
                found.append(Rewrite(other.text, False, "sentence", "", other.name))
        told["captions with fewer sentences than asked for"] += len(found) < count
        return found


def lemmas_of(names: Iterable[str]) -> Iterator[str]:
    """Base forms of the names of classes; "leaves" is "leaf", and "pot,pan" is both."""
    for name in names:
        for each in name.lower().split(","):
            head, space, last = each.strip().rpartition(" ")
            if last:
                yield head + space + lexicon.noun_lemma(last)[0]


def names_something_else(analysis: Analysis, known: Known) -> bool:
    """Whether a caption names a thing that cannot be one of those known of an image, so that it is false of it."""
    return any(
        not item.fixed and not any(may_be_same(item.lemma, other) for other in known.objects)
        for item in analysis.objects
    )
