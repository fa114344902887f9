"""From word classes to a scene graph and units: noun phrases, what lies between them, and runs of verbs.

The classes come from :mod:`data_tools.rewriting.tagging` or from a dependency parser; the output is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.rewriting import lexicon
from data_tools.rewriting.graph import (
    ENTITY,
    NOUN_PHRASE,
    VERB_PHRASE,
    WORD,
    Analysis,
    Attribute,
    Form,
    Object,
    Relation,
    RelationKind,
    Unit,
    Word,
    split_words,
)
from data_tools.rewriting.tagging import Token, tag_words
from data_tools.rewriting.wordlists import (
    COUNTING_DETERMINERS,
    DEFINITE_DETERMINERS,
    NEGATIONS,
    PICTURES,
    SINGULAR_DETERMINERS,
)

_DENIALS = NEGATIONS - {"no", "without"}
"""Deny a whole clause; "no" and "without" only deny the noun behind them."""

_MODIFIERS = ("DET", "POSS", "NUM", "QUANT", "ADJ")


@dataclass(frozen=True)
class _Phrase:
    """Tokens [start, end) of a noun phrase whose noun begins at token ``head``."""

    start: int
    head: int
    end: int


def analyse(text: str) -> Analysis:
    """Analyse a text with the lexicon alone."""
    words = split_words(text)
    return build(words, tag_words(words))


def build(words: tuple[Word, ...], tokens: Sequence[Token]) -> Analysis:
    """Make graph and units of tagged words.

    Args:
        words: of the text.
        tokens: covering all words, in order.
    """
    phrases = _phrases(words, tokens)
    denied = any(word.text.lower() in _DENIALS for word in words)
    objects = [_object(words, tokens, phrases, number) for number in range(len(phrases))]
    attributes = [] if denied else _attributes(words, tokens, phrases)
    relations = [] if denied else _relations(words, tokens, phrases)
    relations = [item for item in relations if item.object < 0 or objects[item.object].lemma not in PICTURES]
    if denied:
        objects = [Object(o.lemma, o.start, o.end, o.form, True) for o in objects]
    units = _units(tokens, phrases)
    return Analysis(words, tuple(objects), tuple(attributes), tuple(relations), tuple(units))


def _phrases(words: Sequence[Word], tokens: Sequence[Token]) -> list[_Phrase]:
    found, place = [], 0
    while place < len(tokens):
        start = place
        while place < len(tokens) and (tokens[place].tag in _MODIFIERS or _joins_adjectives(words, tokens, place)):
            if tokens[place].tag == "DET" and place > start and tokens[place - 1].tag not in ("DET",):
                start = place  # "a photo of" before "a cat"
            place += 1
        head = place
        while place < len(tokens) and tokens[place].tag == "NOUN":
            place += 1
        if place > head:
            found.append(_Phrase(start, head, place))
        elif place == start:
            place += 1
    return found


def _joins_adjectives(words: Sequence[Word], tokens: Sequence[Token], place: int) -> bool:
    """Is this the "and" or the comma of "black and white cat"?"""
    token = tokens[place]
    if token.tag not in ("CONJ", "PUNCT") or words[token.start].text.lower() not in ("and", ",", "&", "-"):
        return False
    if not 0 < place < len(tokens) - 1 or tokens[place - 1].tag != "ADJ" or tokens[place + 1].tag != "ADJ":
        return False
    following = next((t.tag for t in tokens[place + 1 :] if t.tag != "ADJ"), "")
    return following == "NOUN"


def _object(words: Sequence[Word], tokens: Sequence[Token], phrases: Sequence[_Phrase], number: int) -> Object:
    phrase = phrases[number]
    nouns = [words[token.start].text.lower() for token in tokens[phrase.head : phrase.end]]
    base, is_plural = lexicon.noun_lemma(nouns[-1])
    form = _form(words, tokens, phrases, number, is_plural)
    before = words[tokens[phrase.start - 1].start].text.lower() if phrase.start else ""
    denied = before in NEGATIONS or words[tokens[phrase.start].start].text.lower() in NEGATIONS
    names = any(token.name for token in tokens[phrase.start : phrase.end])
    after = tokens[phrase.end] if phrase.end < len(tokens) else None
    half = after is not None and after.tag == "PREP" and words[after.start].text.lower() == "of"
    start, end = tokens[phrase.head].start, tokens[phrase.end - 1].end
    itself = nouns[:-1] == [] and base in PICTURES
    return Object(" ".join([*nouns[:-1], base]), start, end, form, denied or names or half or itself)


def _form(
    words: Sequence[Word], tokens: Sequence[Token], phrases: Sequence[_Phrase], number: int, is_plural: bool
) -> Form:
    phrase = phrases[number]
    before = [token for token in tokens[phrase.start : phrase.head] if token.tag in ("DET", "POSS", "NUM", "QUANT")]
    last = words[before[-1].start].text.lower() if before else ""
    tag = before[-1].tag if before else ""
    counting = tag == "NUM" or last in COUNTING_DETERMINERS
    if is_plural or (counting and last not in ("1", "one")):
        return "counted" if counting else "plural"
    if tag == "POSS" or last in DEFINITE_DETERMINERS:
        return "the"
    if tag != "QUANT" and (last in SINGULAR_DETERMINERS or tag == "NUM"):
        return "a"
    joined = phrase.start > 0 and tokens[phrase.start - 1].tag in ("CONJ", "PUNCT") and number > 0
    if not before and joined and phrases[number - 1].end == phrase.start - 1:
        return "the" if _form(words, tokens, phrases, number - 1, False) in ("a", "the") else "bare"
    return "bare"


def _attributes(words: Sequence[Word], tokens: Sequence[Token], phrases: Sequence[_Phrase]) -> list[Attribute]:
    found = []
    for number, phrase in enumerate(phrases):
        if any(token.name for token in tokens[phrase.start : phrase.end]):
            continue
        for token in tokens[phrase.start : phrase.head]:
            if token.tag in ("ADJ", "NUM"):
                found.append(Attribute(words[token.start].text.lower(), token.start, token.end, number))
        for token in _predicates(words, tokens, phrases, phrase.end):
            found.append(Attribute(words[token.start].text.lower(), token.start, token.end, number))
    return found


def _predicates(words: Sequence[Word], tokens: Sequence[Token], phrases: Sequence[_Phrase], place: int) -> list[Token]:
    """Adjectives of "is red and white" at a place behind a noun."""
    tags = [token.tag for token in tokens[place : place + 2]]
    if tags[:1] != ["AUX"]:
        return []
    place += 2 if tags[1:] == ["ADV"] else 1
    found = []
    while place < len(tokens) and not any(phrase.start <= place < phrase.end for phrase in phrases):
        if tokens[place].tag == "ADJ":
            found.append(tokens[place])
        elif words[tokens[place].start].text.lower() not in ("and", ",", "&"):
            break
        place += 1
    return found


def _relations(words: Sequence[Word], tokens: Sequence[Token], phrases: Sequence[_Phrase]) -> list[Relation]:
    """What lies between two noun phrases, before the first and behind the last."""
    found: list[Relation] = []
    ends = [0, *(phrase.end for phrase in phrases)]
    begins = [*(phrase.start for phrase in phrases), len(tokens)]
    for number, (begin, end) in enumerate(zip(ends, begins, strict=True)):
        subject, target = number - 1, number if number < len(phrases) else -1
        gap = tokens[begin:end]
        if gap and gap[0].tag == "CONJ" and found and len(gap) > 1:
            subject = found[-1].subject  # "a cat above a dog and next to a cup"
        relation = _relation(words, gap, subject, target)
        if relation is not None:
            found.append(_attach(relation, gap, tokens, phrases))
    return found


def _relation(words: Sequence[Word], gap: Sequence[Token], subject: int, target: int) -> Relation | None:
    verb = max((place for place, token in enumerate(gap) if token.tag == "VERB"), default=-1)
    tail = gap[verb + 1 :]
    if verb < 0:
        prepositions = [token for token in gap if token.tag == "PREP"]
        if not prepositions or target < 0:
            return None
        start, end = prepositions[0].start, prepositions[-1].end
        lemma = _joined(words, start, end)
        apart = any(token.tag in ("CONJ", "PUNCT") for token in gap if start < token.start < end)
        return None if lemma == "of" or apart else Relation(lemma, start, end, "preposition", "", subject, target)
    token = gap[verb]
    base = lexicon.verb_lemma(words[token.start].text.lower())
    broken = any(other.tag in ("CONJ", "PUNCT", "PRON", "AUX") for other in tail)
    if target < 0 or broken:
        return (
            None if token.penn == "VBN" else Relation(base, token.start, token.end, "action", token.penn, subject, -1)
        )
    end = tail[-1].end if tail else token.end
    rest = _joined(words, token.end, end)
    passive = token.penn == "VBN"
    if passive and not any(other.tag == "PREP" for other in tail):
        return None
    kind: RelationKind = "passive" if passive else "verb"
    return Relation(f"{base} {rest}".strip(), token.start, end, kind, token.penn, subject, target)


def _attach(relation: Relation, gap: Sequence[Token], tokens: Sequence[Token], phrases: Sequence[_Phrase]) -> Relation:
    """Take the subject from the parser, where one was asked: "a man on a horse with a hat"."""
    token = next(token for token in gap if token.start == relation.start)
    if token.head is None:
        return relation
    for number, phrase in enumerate(phrases):
        if tokens[phrase.start].start <= token.head < tokens[phrase.end - 1].end:
            return Relation(
                relation.lemma, relation.start, relation.end, relation.kind, relation.tag, number, relation.object
            )
    return relation


def _joined(words: Sequence[Word], start: int, end: int) -> str:
    return " ".join(word.text.lower() for word in words[start:end])


def _units(tokens: Sequence[Token], phrases: Sequence[_Phrase]) -> list[Unit]:
    """Noun phrases without articles, names, runs of verbs with their particles; each other word by itself."""
    found: list[Unit] = []
    phrase_at = {phrase.start: phrase for phrase in phrases}
    place = 0
    while place < len(tokens):
        phrase = phrase_at.get(place)
        if phrase is not None:
            found.extend(_phrase_units(tokens, phrase))
            place = phrase.end
            continue
        end = _verb_end(tokens, place)
        if end > place:
            found.append(Unit(tokens[place].start, tokens[end - 1].end, VERB_PHRASE))
            place = end
            continue
        found.extend(Unit(word, word + 1, WORD) for word in range(tokens[place].start, tokens[place].end))
        place += 1
    return found


def _phrase_units(tokens: Sequence[Token], phrase: _Phrase) -> list[Unit]:
    start = phrase.start
    while tokens[start].tag in ("DET", "QUANT"):
        start += 1
    words = [Unit(word, word + 1, WORD) for word in range(tokens[phrase.start].start, tokens[start].start)]
    named = all(token.name for token in tokens[phrase.head : phrase.end])
    kind = ENTITY if named else NOUN_PHRASE
    return [*words, Unit(tokens[start].start, tokens[phrase.end - 1].end, kind)]


def _verb_end(tokens: Sequence[Token], place: int) -> int:
    """End of the run of auxiliaries, adverbs and verbs that begins here; ``place`` if it has no verb."""
    end, last_verb = place, -1
    while end < len(tokens) and tokens[end].tag in ("AUX", "VERB", "ADV"):
        if tokens[end].tag == "VERB":
            last_verb = end
        end += 1
    if last_verb < 0 or tokens[place].tag == "ADV":
        return place
    return last_verb + 2 if last_verb + 1 < end else last_verb + 1
