"""Classes and heads from spaCy's dependency parse; the graph is then made as with the lexicon.

So the output is of one kind. The parse decides two things better: what a word is, and which noun a relation belongs to
("a man on a horse with a hat").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.rewriting.chunker import build
from data_tools.rewriting.graph import Analysis, Word, split_words
from data_tools.rewriting.tagging import Tag, Token, long_preposition, quantity
from data_tools.rewriting.wordlists import DETERMINERS, POSSESSIVES
from vlscale.errors import VlscaleError

_TAGS: dict[str, Tag] = {
    "DET": "DET",
    "NUM": "NUM",
    "ADJ": "ADJ",
    "NOUN": "NOUN",
    "PROPN": "NOUN",
    "VERB": "VERB",
    "AUX": "AUX",
    "ADV": "ADV",
    "ADP": "PREP",
    "CCONJ": "CONJ",
    "SCONJ": "CONJ",
    "PRON": "PRON",
    "PUNCT": "PUNCT",
}
_NAMES = frozenset(("PERSON", "NORP", "FAC", "ORG", "GPE", "LOC", "PRODUCT", "EVENT", "WORK_OF_ART", "LANGUAGE"))


class SpacyParser:
    """A spaCy pipeline with tagger and parser.

    Args:
        model: its folder.

    Raises:
        VlscaleError: spaCy is not installed, or the folder holds no pipeline with a tagger and a parser.
    """

    def __init__(self, model: Path) -> None:
        try:
            import spacy
        except ImportError:
            raise VlscaleError("--spacy-model: spaCy is not installed; pip install spacy, or leave it out") from None
        try:
            self._nlp: Any = spacy.load(model)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise VlscaleError(f"--spacy-model {model}: no pipeline of this spaCy ({reason})") from None
        missing = [name for name in ("parser",) if name not in self._nlp.pipe_names]
        if missing:
            raise VlscaleError(f"--spacy-model {model}: has {self._nlp.pipe_names}, but no {missing[0]}")
        self.name = f"spacy {self._nlp.meta.get('name')} {self._nlp.meta.get('version')}"

    def analyse(self, texts: Sequence[str]) -> list[Analysis]:
        """Analyse some texts."""
        split = [split_words(text) for text in texts]
        documents = [as_document(self._nlp.vocab, text, words) for text, words in zip(texts, split, strict=True)]
        parsed = self._nlp.pipe(documents)
        return [analyse_document(words, document) for words, document in zip(split, parsed, strict=True)]


def as_document(vocab: Any, text: str, words: Sequence[Word]) -> Any:
    """A spaCy ``Doc`` whose tokens are our words."""
    from spacy.tokens import Doc

    spaces = [text[word.end : word.end + 1].isspace() for word in words]
    return Doc(vocab, words=[word.text for word in words], spaces=spaces)


def analyse_document(words: tuple[Word, ...], document: Any) -> Analysis:
    """Make graph and units of a parsed ``Doc`` whose tokens are ``words``."""
    lower = [word.text.lower() for word in words]
    tokens: list[Token] = []
    place = 0
    while place < len(words):
        item = document[place]
        length = long_preposition(lower, place)
        if length:
            tokens.append(Token(place, place + length, "PREP", "", _subject(item)))
        elif quantity(lower, place):
            length = quantity(lower, place)
            tokens.append(Token(place, place + length, "QUANT"))
        else:
            length = 1
            tokens.append(_token(place, lower[place], item))
        place += length
    return build(words, tokens)


def _token(place: int, word: str, item: Any) -> Token:
    tag = _TAGS.get(item.pos_, "X")
    if word in DETERMINERS and tag in ("PRON", "DET", "ADJ"):
        tag = "DET"
    elif word.endswith(POSSESSIVES) and tag in ("NOUN", "ADJ", "X"):
        tag = "POSS"
    elif word in ("there", "not", "never", "to"):
        tag = "PREP" if word == "to" and tag == "PREP" else "X"
    elif tag == "VERB" and item.dep_ == "amod":
        tag = "ADJ"
    elif item.dep_ == "prt":
        tag = "ADV"
    name = tag in ("NOUN", "ADJ") and (item.pos_ == "PROPN" or item.ent_type_ in _NAMES)
    if tag == "VERB":
        return Token(place, place + 1, tag, item.tag_ or "VBG", _subject(item))
    return Token(place, place + 1, tag, "", _subject(item) if tag == "PREP" else None, name)


def _subject(item: Any) -> int | None:
    """Word of the noun that a verb or preposition says something about; None where the parse does not tell."""
    for _ in range(len(item.doc)):
        found = next((child.i for child in item.children if child.dep_ in ("nsubj", "nsubjpass")), None)
        if found is not None:
            return int(found)
        if item.dep_ == "ROOT" or item.head is item:
            return None
        item = item.head
        if item.pos_ in ("NOUN", "PROPN", "PRON"):
            return int(item.i)
    return None
