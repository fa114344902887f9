"""Word classes of a caption by rules: function words from lists, the others from a dictionary and their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_tools.rewriting import lexicon
from data_tools.rewriting.graph import Word
from data_tools.rewriting.wordlists import (
    ADJECTIVES,
    ADVERBS,
    AUXILIARIES,
    CONJUNCTIONS,
    DETERMINERS,
    ING_NOUNS,
    INVARIANT,
    IRREGULAR_PARTICIPLES,
    LONG_PREPOSITIONS,
    NUMBERS,
    PARTICLES,
    PLURAL_ONLY,
    POSSESSIVES,
    PREPOSITIONS,
    PRONOUNS,
    QUANTITIES,
    VERBS,
    VIEWS,
)

Tag = Literal["DET", "POSS", "NUM", "QUANT", "ADJ", "NOUN", "VERB", "AUX", "ADV", "PREP", "CONJ", "PRON", "PUNCT", "X"]
"""``POSS`` is "man's", ``QUANT`` "group of" and "photo of", ``X`` everything else ("to", "not", marks)."""

_QUANTITIES = QUANTITIES | VIEWS
_BY_LIST: tuple[tuple[frozenset[str], Tag], ...] = (
    (AUXILIARIES, "AUX"),
    (DETERMINERS, "DET"),
    (NUMBERS, "NUM"),
    (PRONOUNS - {"her", "there", "here"}, "PRON"),
    (CONJUNCTIONS, "CONJ"),
    (frozenset(("not", "never", "there", "here")), "X"),
)


@dataclass(frozen=True)
class Token:
    """Words [start, end) of one class; only prepositions and quantities have more than one.

    Attributes:
        tag: see :data:`Tag`.
        penn: for verbs, which form it is (``VBG``, ``VBZ``, ``VBP``, ``VBD``, ``VBN``, ``VB``).
        head: for verbs and prepositions, index of the word that this one depends on; None if no parser was asked.
        name: part of a named entity.
    """

    start: int
    end: int
    tag: Tag
    penn: str = ""
    head: int | None = None
    name: bool = False


def tag_words(words: Sequence[Word]) -> list[Token]:
    """Give each word of a caption a class."""
    lower = [word.text.lower() for word in words]
    tokens: list[Token] = []
    place = 0
    while place < len(words):
        length = long_preposition(lower, place)
        if length:
            tokens.append(Token(place, place + length, "PREP"))
        elif quantity(lower, place):
            length = quantity(lower, place)
            tokens.append(Token(place, place + length, "QUANT"))
        else:
            length = 1
            tag, penn = _tag(lower, place, tokens)
            shown = words[place].text
            name = tag in ("NOUN", "ADJ") and place > 0 and shown[0].isupper() and not shown.isupper()
            tokens.append(Token(place, place + 1, tag, penn, None, name))
        place += length
    return tokens


def long_preposition(lower: Sequence[str], place: int) -> int:
    """Number of words of the preposition of several words that begins here; 0 if none does."""
    for phrase in LONG_PREPOSITIONS:
        if lower[place] == phrase[0] and tuple(lower[place : place + len(phrase)]) == phrase:
            return len(phrase)
    return 0


def quantity(lower: Sequence[str], place: int) -> int:
    """Number of words of the "group of", "photo of" or "close up of" that begins here; 0 if none does."""
    if tuple(lower[place : place + 3]) == ("close", "up", "of"):
        return 3
    return 2 if lower[place] in _QUANTITIES and lower[place + 1 : place + 2] == ["of"] else 0


def _tag(lower: Sequence[str], place: int, before: Sequence[Token]) -> tuple[Tag, str]:
    """Class and, for verbs, form of one word."""
    word = lower[place]
    if not word[0].isalnum():
        return "PUNCT", ""
    if word[0].isdigit():
        return "NUM", ""
    if word.endswith(POSSESSIVES) and word not in AUXILIARIES:
        return "POSS", ""
    last = before[-1].tag if before else "X"
    for known, tag in _BY_LIST:
        if word in known and not (word == "while" and last == "DET"):
            return tag, ""
    following = _following(lower, place + 1)
    if word in PREPOSITIONS and not (word in PARTICLES and following != "NP"):
        if word == "to" and _is_base_verb(lower, place + 1):
            return "X", ""
        if word != "like" or last != "X":
            return ("ADV", "") if word == "past" and last == "X" else ("PREP", "")
    if word in PARTICLES or word in ADVERBS:
        return "ADV", ""
    if last == "X" and before and lower[before[-1].start] == "to":
        return "VERB", "VB"
    return _open_class(lower, place, last, before, following)


def _open_class(
    lower: Sequence[str], place: int, last: Tag, before: Sequence[Token], following: str
) -> tuple[Tag, str]:
    word, known = lower[place], lexicon.classes(lower[place])
    inside = last in ("DET", "POSS", "NUM", "QUANT", "ADJ")
    noun_next = _could_be_noun(lower, place + 1)
    if word.endswith("ing") and "VERB" in known:
        return _ing(word, inside, noun_next, last)
    if word in ADJECTIVES and _coordinated(lower, place, before):
        return "ADJ", ""
    if word in ADJECTIVES and (noun_next or last == "AUX" or not known.get("NOUN")):
        passive = word.endswith("ed") and not inside and "VERB" in known
        return ("VERB", "VBN") if passive and not noun_next else ("ADJ", "")
    past = "VERB" in known and (word in IRREGULAR_PARTICIPLES or (word not in known["VERB"] and not word.endswith("s")))
    if past and not known.get("NOUN"):
        if inside and noun_next:
            return "ADJ", ""
        return "VERB", "VBD" if following == "NP" and last in ("NOUN", "PRON") else "VBN"
    if known.get("VERB") and last in ("NOUN", "PRON", "CONJ") and known["VERB"][0] in VERBS:
        penn = _finite(lower, place, before, following)
        if penn:
            return "VERB", penn
    if known.get("ADJ") and (noun_next or not known.get("NOUN")) and not (known.get("NOUN") and word not in ADJECTIVES):
        return "ADJ", ""
    if known.get("NOUN") or word in PLURAL_ONLY or word in INVARIANT:
        return "NOUN", ""
    if known.get("ADV") or word.endswith("ly"):
        return "ADV", ""
    if known.get("VERB"):
        return "VERB", "VBZ" if word not in known["VERB"] and word.endswith("s") else "VBP"
    return "NOUN", ""


def _coordinated(lower: Sequence[str], place: int, before: Sequence[Token]) -> bool:
    """One of "black and white" or of "red, white and blue"."""
    if lower[place + 1 : place + 2] in (["and"], [","], ["-"]) and lower[place + 2 : place + 3]:
        return lower[place + 2] in ADJECTIVES
    joined = len(before) > 1 and lower[before[-1].start] in ("and", ",", "-")
    return joined and before[-2].tag == "ADJ"


def _ing(word: str, inside: bool, noun_next: bool, last: Tag) -> tuple[Tag, str]:
    if word in ING_NOUNS and (inside or last not in ("NOUN", "AUX", "PRON")):
        return "NOUN", ""
    if inside:
        return ("ADJ", "") if noun_next else ("NOUN", "")
    return "VERB", "VBG"


def _finite(lower: Sequence[str], place: int, before: Sequence[Token], following: str) -> str:
    """Form of a word that may be a finite verb after a noun; empty if it is none."""
    word, subject = lower[place], before[-1]
    if following not in ("NP", "PREP", "END", "ADV"):
        return ""
    base = lexicon.classes(word)["VERB"][0]
    noun = lower[subject.start]
    if word != base and word.endswith("s"):
        coordinated = subject.tag == "CONJ"
        return "VBZ" if (_verb_before(before) if coordinated else not lexicon.noun_lemma(noun)[1]) else ""
    joined = any(lower[token.start] == "and" for token in before[-3:-1])  # "a man and a woman ride"
    several = subject.tag != "CONJ" and (lexicon.noun_lemma(noun)[1] or noun in INVARIANT or joined)
    return "VBP" if word == base and several else ""


def _verb_before(before: Sequence[Token]) -> bool:
    return any(token.penn == "VBZ" or token.tag == "AUX" for token in before)


def _following(lower: Sequence[str], place: int) -> str:
    """What comes next: ``END``, ``NP``, ``PREP``, ``ADV`` or ``""``."""
    if place >= len(lower) or not lower[place][0].isalnum():
        return "END"
    word = lower[place]
    if word in DETERMINERS or word in NUMBERS or word[0].isdigit() or word in ADJECTIVES:
        return "NP"
    if word in PREPOSITIONS:
        return "PREP"
    if word in ADVERBS:
        return "ADV"
    if word in CONJUNCTIONS:
        return "END"
    return "NP" if _could_be_noun(lower, place) else ""


def _could_be_noun(lower: Sequence[str], place: int) -> bool:
    """Whether a noun phrase goes on here."""
    if place >= len(lower):
        return False
    word = lower[place]
    if not word[0].isalpha() or any(word in known for known, _ in _BY_LIST) or word in PREPOSITIONS or word in ADVERBS:
        return False
    known = lexicon.classes(word)
    if word.endswith("ing") and "VERB" in known and word not in ING_NOUNS:
        return False
    return not known or "NOUN" in known or "ADJ" in known or word in PLURAL_ONLY


def _is_base_verb(lower: Sequence[str], place: int) -> bool:
    if place >= len(lower) or lower[place] in DETERMINERS:
        return False
    known = lexicon.classes(lower[place])
    return lower[place] in known.get("VERB", ()) and (lower[place] in VERBS or "NOUN" not in known)
