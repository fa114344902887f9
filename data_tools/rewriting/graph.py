"""What a parser finds in a caption: its words, a scene graph over them, and the units that are masked whole.

All ranges are word ranges [start, end); words carry their places in the text, so a replacement leaves everything else,
blanks and punctuation too, as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["a", "the", "plural", "counted", "bare"]
"""How a noun stands: ``a dog``, ``the dog`` (or his, the man's), ``dogs``, ``two dogs``, ``grass`` (no article)."""

RelationKind = Literal["preposition", "verb", "passive", "action"]
"""``on``, ``riding`` or ``sitting on``, ``parked on``, and verbs without an object (``sleeping``)."""

WORD, NOUN_PHRASE, VERB_PHRASE, ENTITY = 0, 1, 2, 3
"""Kinds of units."""

_WORD = re.compile(r"[^\W\d_]+(?:[\'\u2019\-][^\W\d_]+)*|\d+(?:[.,:]\d+)*|[^\w\s]|_+")


@dataclass(frozen=True)
class Word:
    """Characters [start, end) of the text."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Object:
    """A thing that is named.

    Attributes:
        lemma: singular, lower case; compounds are one (``fire hydrant``).
        start, end: the noun, without what stands before it.
        form: how it stands.
        fixed: is not replaced: it is denied ("without a hat"), a name, or the first half of "edge of the table".
    """

    lemma: str
    start: int
    end: int
    form: Form
    fixed: bool = False


@dataclass(frozen=True)
class Attribute:
    """An adjective or number of the object with the index ``object``; -1 where the parser has not found it."""

    lemma: str
    start: int
    end: int
    object: int


@dataclass(frozen=True)
class Relation:
    """Something between two objects, or something that one does.

    Attributes:
        lemma: ``to the left of``, ``ride``, ``sit on``.
        start, end: its words, without auxiliaries.
        kind: see :data:`RelationKind`.
        tag: Penn tag of its verb (``VBG``); empty for prepositions.
        subject, object: indices of objects; -1 where there is none.
    """

    lemma: str
    start: int
    end: int
    kind: RelationKind
    tag: str
    subject: int
    object: int


@dataclass(frozen=True)
class Unit:
    """Words that are masked together; ``kind`` is :data:`WORD` or one of the others."""

    start: int
    end: int
    kind: int


@dataclass(frozen=True)
class Analysis:
    """One caption: its words, graph and units; units cover all words, in order."""

    words: tuple[Word, ...]
    objects: tuple[Object, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    relations: tuple[Relation, ...] = ()
    units: tuple[Unit, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing in it can be replaced."""
        return not (self.objects or self.attributes or self.relations)

    def to_json(self) -> dict[str, Any]:
        """The graph as JSON types, without the words, which :func:`split_words` finds again."""
        return {
            "objects": [[o.lemma, o.start, o.end, o.form, o.fixed] for o in self.objects],
            "attributes": [[a.lemma, a.start, a.end, a.object] for a in self.attributes],
            "relations": [[r.lemma, r.start, r.end, r.kind, r.tag, r.subject, r.object] for r in self.relations],
        }


def from_json(text: str, graph: Mapping[str, Any]) -> Analysis:
    """Put a text and its stored graph together again; units are left out.

    Raises:
        ValueError: the graph is not one of this text.
    """
    words = split_words(text)
    try:
        objects = tuple(Object(*item) for item in graph["objects"])
        attributes = tuple(Attribute(*item) for item in graph["attributes"])
        relations = tuple(Relation(*item) for item in graph["relations"])
        every: tuple[Object | Attribute | Relation, ...] = (*objects, *attributes, *relations)
        good = all(0 <= item.start < item.end <= len(words) and isinstance(item.lemma, str) for item in every)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a scene graph ({error})") from None
    if not good:
        raise ValueError(f"a scene graph of another text, which has {len(words)} words")
    return Analysis(words, objects, attributes, relations)


def split_words(text: str) -> tuple[Word, ...]:
    """Words, numbers and single marks of punctuation; every character that is not blank belongs to one."""
    return tuple(Word(found.group(), found.start(), found.end()) for found in _WORD.finditer(text))
