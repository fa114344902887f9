"""Negatives of a caption: one object, attribute or relation replaced, so that the caption is no longer true.

A replacement is drawn from the corpus vocabulary, never one that the captions of the same image (or what is known of
its regions) mention, and never one whose meaning may still hold; see :mod:`data_tools.rewriting.meanings`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from data_tools.rewriting import lexicon
from data_tools.rewriting.graph import Analysis, Attribute, Object, Relation, Word
from data_tools.rewriting.meanings import (
    attribute_kinds,
    contradicting_prepositions,
    excludes_attribute,
    may_be_doing,
    may_be_same,
)
from data_tools.rewriting.vocabulary import Vocabulary
from vlscale.data.companion_schema import Rewrite, RewriteKind

KINDS: tuple[RewriteKind, ...] = ("object", "attribute", "relation")
_TRIES = 12
_Slot = Object | Attribute | Relation
_Made = tuple[str, str, str]
"""The new caption, and what was replaced by what."""

_Make = Callable[[_Slot, str], _Made]


@dataclass(frozen=True)
class Known:
    """What is said of an image: by all its captions, and by the names of its regions.

    Attributes:
        objects: lemmas.
        attributes: ``(lemma of the object, attribute)``.
        relations: lemmas of verbs and prepositions.
        texts: the captions, normalised; none of them is a negative.
    """

    objects: frozenset[str]
    attributes: frozenset[tuple[str, str]]
    relations: frozenset[str]
    texts: frozenset[str]


def known_of(captions: Iterable[tuple[str, Analysis]], names: Iterable[str] = ()) -> Known:
    """Collect what the captions of one image say.

    Args:
        captions: all captions of the image, with their analyses.
        names: of its regions, where they are known.
    """
    objects, relations, texts = set(names), set[str](), set[str]()
    attributes = set[tuple[str, str]]()
    for text, analysis in captions:
        texts.add(normalised(text))
        objects.update(item.lemma for item in analysis.objects)
        relations.update(item.lemma for item in analysis.relations)
        for item in analysis.attributes:
            owner = analysis.objects[item.object].lemma if item.object >= 0 else ""
            attributes.add((owner, item.lemma))
    return Known(frozenset(objects), frozenset(attributes), frozenset(relations), frozenset(texts))


def normalised(text: str) -> str:
    """A text without differences of case, blanks and final marks."""
    return " ".join(text.lower().split()).rstrip(" .!")


class Rewriter:
    """Makes negatives of captions.

    Args:
        vocabulary: what is offered.
        per_kind: at most so many rewrites of each kind per caption.
        seed: with the id of a text, decides the draws.
        any_attribute: also replace attributes of no known kind, by others of none ("beautiful" by "fancy"); such a
            rewrite may still be true.
    """

    def __init__(self, vocabulary: Vocabulary, per_kind: int, seed: int, any_attribute: bool = False) -> None:
        self.vocabulary = vocabulary
        self.per_kind = per_kind
        self.seed = seed
        self.any_attribute = any_attribute

    def rewrite(self, name: str, text: str, analysis: Analysis, known: Known) -> list[Rewrite]:
        """Negatives of one caption, different from each other and from all captions of the image.

        Args:
            name: id of the text.
            text: the caption.
            analysis: of it.
            known: what is said of its image, by this caption too.
        """
        rng = random.Random(f"vlscale-rewrite/{self.seed}/{name}")

        @cache
        def made(slot: _Slot, new: str) -> _Made:
            return _with(text, analysis.words, slot, new)

        draw: dict[RewriteKind, Callable[[], Iterator[_Made]]] = {
            "object": lambda: self._objects(rng, made, analysis, known),
            "attribute": lambda: self._attributes(rng, made, analysis, known),
            "relation": lambda: self._relations(rng, made, analysis, known),
        }
        found, taken, seen = [], set(known.texts), set[str]()
        for kind in KINDS:
            count = 0
            for new_text, old, new in draw[kind]():
                if count == self.per_kind:
                    break
                if new_text in seen:
                    continue
                seen.add(new_text)
                normal = normalised(new_text)
                if normal not in taken:
                    taken.add(normal)
                    found.append(Rewrite(new_text, False, kind, old, new))
                    count += 1
        return found

    def _objects(self, rng: random.Random, made: _Make, analysis: Analysis, known: Known) -> Iterator[_Made]:
        slots = [item for item in analysis.objects if not item.fixed and self.vocabulary.objects[item.form]]
        for _ in range(_TRIES * self.per_kind if slots else 0):
            slot = rng.choice(slots)
            lemma = rng.choice(self.vocabulary.objects[slot.form])
            if not any(may_be_same(lemma, other) for other in known.objects):
                yield made(slot, _noun(lemma, slot))

    def _attributes(self, rng: random.Random, made: _Make, analysis: Analysis, known: Known) -> Iterator[_Made]:
        slots = [(item, self._attributes_instead(item)) for item in analysis.attributes if _replaceable(item, analysis)]
        slots = [(item, offered) for item, offered in slots if offered]
        for _ in range(_TRIES * self.per_kind if slots else 0):
            slot, offered = rng.choice(slots)
            new = rng.choice(offered)
            owner = analysis.objects[slot.object].lemma if slot.object >= 0 else ""
            if not any(
                may_be_same(owner, other) and not self._false(word, new)
                for other, word in known.attributes
                if not attribute_kinds(word) or set(attribute_kinds(word)) & set(attribute_kinds(new))
            ):
                yield made(slot, new)

    def _attributes_instead(self, item: Attribute) -> list[str]:
        kinds = attribute_kinds(item.lemma)
        if not kinds:
            others = self.vocabulary.attributes.get("", ()) if self.any_attribute else ()
            return [word for word in others if word != item.lemma]
        offered = [word for kind in kinds for word in self.vocabulary.attributes.get(kind, ())]
        return sorted({word for word in offered if excludes_attribute(item.lemma, word)})

    def _false(self, said: str, new: str) -> bool:
        """Whether ``new`` is false of what is ``said`` to be something else."""
        if not attribute_kinds(said):
            return said != new
        return excludes_attribute(said, new)

    def _relations(self, rng: random.Random, made: _Make, analysis: Analysis, known: Known) -> Iterator[_Made]:
        slots = [(item, self._relations_instead(item, known)) for item in analysis.relations]
        slots = [(item, offered) for item, offered in slots if offered]
        for _ in range(_TRIES * self.per_kind if slots else 0):
            slot, offered = rng.choice(slots)
            lemma = rng.choice(offered)
            yield made(slot, lexicon.conjugate(lemma, slot.tag) if slot.tag else lemma)

    def _relations_instead(self, item: Relation, known: Known) -> list[str]:
        prepositions = self.vocabulary.relations["preposition"]
        if item.kind == "preposition":
            contrary = contradicting_prepositions(item.lemma)
            return [word for word in prepositions if word in contrary]
        said = [lemma for lemma in known.relations if lemma.partition(" ")[0] in _verbs_of(known, item)]
        offered = [
            lemma
            for lemma in self.vocabulary.relations[item.kind]
            if not may_be_doing(lemma, item.lemma) and not any(may_be_doing(lemma, other) for other in said)
        ]
        verb, _, rest = item.lemma.partition(" ")
        contrary = contradicting_prepositions(rest)
        return offered + [f"{verb} {word}" for word in prepositions if word in contrary]


def _verbs_of(known: Known, item: Relation) -> set[str]:
    """All verbs that are said of the image: who does what is not known well enough to tell them apart."""
    return {lemma.partition(" ")[0] for lemma in known.relations} | {item.lemma.partition(" ")[0]}


def _replaceable(item: Attribute, analysis: Analysis) -> bool:
    """A number only where the noun stands in the plural; nothing of an object that is denied."""
    if item.object >= 0 and analysis.objects[item.object].fixed:
        return False
    if "number" in attribute_kinds(item.lemma):
        return item.object >= 0 and analysis.objects[item.object].form == "counted"
    return True


def _noun(lemma: str, slot: Object) -> str:
    return lexicon.plural(lemma) if slot.form in ("plural", "counted") else lemma


def _with(text: str, words: Sequence[Word], slot: _Slot, new: str) -> _Made:
    """The text with other words in a place, and the article before it set right; also the old and the new words."""
    first, last = words[slot.start], words[slot.end - 1]
    old = text[first.start : last.end]
    if old[:1].isupper() and (slot.start == 0 or old.isupper()):
        new = new[:1].upper() + new[1:]
    before = text[: first.start]
    if slot.start and words[slot.start - 1].text.lower() in ("a", "an"):
        mark = words[slot.start - 1]
        right = lexicon.article(new.split()[0])
        right = right[:1].upper() + right[1:] if mark.text[0].isupper() else right
        before = text[: mark.start] + right + text[mark.end : first.start]
    return before + new + text[last.end :], old, new
