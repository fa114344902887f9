"""What a corpus names: objects, attributes and relations with their counts; replacements are drawn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from data_tools.rewriting.graph import Analysis, Form, RelationKind
from data_tools.rewriting.meanings import attribute_kinds
from data_tools.rewriting.wordlists import INVARIANT, LIGHT_VERBS, PLURAL_ONLY, VIEWS
from vlscale.data.schema import Meta, first_problem
from vlscale.errors import VlscaleError

MAX_BYTES = 1 << 30
_Count = Annotated[int, Field(ge=1)]
_NO_OBJECTS = VIEWS | {"background", "foreground", "way", "something", "one", "ones", "other", "others", "be", "thing"}


class VocabularyFile(Meta):
    """``vocabulary.json``: lemma -> form -> count, attribute -> count, kind -> lemma -> count."""

    objects: dict[str, dict[str, _Count]]
    attributes: dict[str, _Count]
    relations: dict[str, dict[str, _Count]]


def count_corpus(analyses: Iterable[Analysis]) -> dict[str, Any]:
    """Count what analyses name, as :class:`VocabularyFile` spells it."""
    counter = Counting()
    for analysis in analyses:
        counter.add(analysis)
    return counter.to_json()


class Counting:
    """Counts of a part of a corpus."""

    def __init__(self) -> None:
        self._objects: Counter[tuple[str, str]] = Counter()
        self._attributes: Counter[str] = Counter()
        self._relations: Counter[tuple[str, str]] = Counter()

    def add(self, analysis: Analysis) -> None:
        """Count one text."""
        self._objects.update((item.lemma, item.form) for item in analysis.objects if not item.fixed)
        self._attributes.update(item.lemma for item in analysis.attributes)
        self._relations.update((item.kind, item.lemma) for item in analysis.relations)

    def merge(self, found: Mapping[str, Any]) -> None:
        """Add the counts of another part, as :meth:`to_json` spells them."""
        for lemma, forms in found["objects"].items():
            for form, count in forms.items():
                self._objects[lemma, form] += count
        self._attributes.update(found["attributes"])
        for kind, lemmas in found["relations"].items():
            for lemma, count in lemmas.items():
                self._relations[kind, lemma] += count

    def to_json(self) -> dict[str, Any]:
        """As JSON types, sorted."""
        objects: dict[str, dict[str, int]] = {}
        for (lemma, form), count in sorted(self._objects.items()):
            objects.setdefault(lemma, {})[form] = count
        relations: dict[str, dict[str, int]] = {}
        for (kind, lemma), count in sorted(self._relations.items()):
            relations.setdefault(kind, {})[lemma] = count
        return {"objects": objects, "attributes": dict(sorted(self._attributes.items())), "relations": relations}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Replacements a corpus offers; each list is sorted, so that draws depend on the seed alone.

    Attributes:
        file: the counts.
        min_count: rarer entries are not offered.
        most: of each list, the most frequent ones that are offered.
    """

    file: VocabularyFile
    min_count: int = 1
    most: int = 5000

    @cached_property
    def objects(self) -> dict[Form, tuple[str, ...]]:
        """Lemmas that can stand in each form."""
        forms: tuple[Form, ...] = ("a", "the", "plural", "counted", "bare")
        counted = {form: self._best({lemma: _fits(lemma, of, form) for lemma, of in self._nouns()}) for form in forms}
        return counted

    def _nouns(self) -> Iterable[tuple[str, Mapping[str, int]]]:
        for lemma, of in self.file.objects.items():
            if lemma not in _NO_OBJECTS and all(part.isalpha() for part in lemma.replace("-", " ").split()):
                yield lemma, of

    @cached_property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """Attributes by kind; those of no known kind under ``""``."""
        kinds: dict[str, dict[str, int]] = {}
        for word, count in self.file.attributes.items():
            for kind in attribute_kinds(word) or ("",) * word.isalpha():
                kinds.setdefault(kind, {})[word] = count
        return {kind: self._best(words) for kind, words in kinds.items()}

    @cached_property
    def relations(self) -> dict[RelationKind, tuple[str, ...]]:
        """Relations by kind; verbs that say too little to be false are left out."""
        kinds: tuple[RelationKind, ...] = ("preposition", "verb", "passive", "action")
        return {
            kind: self._best(
                {
                    lemma: count
                    for lemma, count in self.file.relations.get(kind, {}).items()
                    if kind == "preposition" or lemma.partition(" ")[0] not in LIGHT_VERBS
                }
            )
            for kind in kinds
        }

    def _best(self, counts: Mapping[str, int]) -> tuple[str, ...]:
        kept = [lemma for lemma, count in counts.items() if count >= self.min_count]
        kept.sort(key=lambda lemma: (-counts[lemma], lemma))
        return tuple(sorted(kept[: self.most]))


def _fits(lemma: str, of: Mapping[str, int], form: Form) -> int:
    """How often the corpus shows that a noun can stand in a form; 0: it cannot, or that is not known."""
    last = lemma.rpartition(" ")[2]
    several = of.get("plural", 0) + of.get("counted", 0)
    single, mass = of.get("a", 0), of.get("bare", 0)
    if last in PLURAL_ONLY:
        return several * (form == "plural" or (form == "counted" and last == "people"))
    countable = single + several
    if mass > countable:
        return sum(of.values()) if form in ("bare", "the") else 0
    if form == "bare":
        return 0
    if last in INVARIANT or form == "the":
        return sum(of.values())
    return countable


def parse_vocabulary(found: Mapping[str, Any], where: str) -> VocabularyFile:
    """Check counts that were read from a file.

    Raises:
        VlscaleError: they are not counts.
    """
    try:
        return VocabularyFile.model_validate(dict(found))
    except ValidationError as error:
        raise VlscaleError(f"{where}: {first_problem(error)}; run find_units again") from None


def read_vocabulary(path: Path, min_count: int, most: int) -> Vocabulary:
    """Read ``vocabulary.json``.

    Raises:
        VlscaleError: it is missing or damaged.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise VlscaleError(f"{path}: larger than {MAX_BYTES} bytes; run find_units again")
        file = VocabularyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); run find_units first") from None
    except ValidationError as error:
        raise VlscaleError(f"{path}: {first_problem(error)}; run find_units again") from None
    return Vocabulary(file, min_count, most)


def merge_counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the counts of parts."""
    counter = Counting()
    for part in parts:
        counter.merge(part)
    return counter.to_json()
