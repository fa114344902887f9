"""Word classes, base forms and inflections, from the dictionaries of lemminflect and inflect."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from data_tools.rewriting.wordlists import ING_NOUNS, INVARIANT, PLURAL_ONLY
from vlscale.errors import VlscaleError

_CACHE = 1 << 17
VOWELS = "aeiou"
IRREGULAR_NOUNS = {"leaves": "leaf", "selfies": "selfie", "tvs": "tv", "cookies": "cookie", "movies": "movie"}
"""Plurals that the dictionaries lead to another word, or to none."""


@lru_cache(maxsize=1)
def _lemminflect() -> ModuleType:
    try:
        import lemminflect
    except ImportError:
        raise VlscaleError("lemminflect is missing; pip install 'vlscale[rewrite]'") from None
    return lemminflect


@lru_cache(maxsize=1)
def _inflect() -> Any:
    try:
        import inflect
    except ImportError:
        raise VlscaleError("inflect is missing; pip install 'vlscale[rewrite]'") from None
    return inflect.engine()


def require_packages() -> None:
    """Raise if a package is missing; inflect takes seconds to import, and few captions need it to be parsed.

    Raises:
        VlscaleError: it is.
    """
    for name in ("lemminflect", "inflect"):
        if find_spec(name) is None:
            raise VlscaleError(f"{name} is missing; pip install 'vlscale[rewrite]'")


@lru_cache(maxsize=_CACHE)
def classes(word: str) -> dict[str, tuple[str, ...]]:
    """Base forms of a lower-case word by class (``NOUN``, ``VERB``, ``ADJ``, ``ADV``); empty for unknown words."""
    found: dict[str, tuple[str, ...]] = _lemminflect().getAllLemmas(word)
    return found


@lru_cache(maxsize=_CACHE)
def verb_lemma(word: str) -> str:
    """Base form of a verb."""
    known = classes(word).get("VERB")
    if known:
        return known[0]
    guessed = _lemminflect().getAllLemmasOOV(word, "VERB").get("VERB") or (word,)
    return str(guessed[0])


@lru_cache(maxsize=_CACHE)
def noun_lemma(word: str) -> tuple[str, bool]:
    """Base form of a noun, and whether the word is a plural; :data:`INVARIANT` ones count as singular."""
    if word in PLURAL_ONLY:
        return word, True
    if word in IRREGULAR_NOUNS:
        return IRREGULAR_NOUNS[word], True
    if word in INVARIANT or (word in ING_NOUNS and not word.endswith("s")):
        return word, False
    known = classes(word).get("NOUN", ())
    if word in known and not word.endswith("es"):
        return word, False
    if known:
        return known[0], known[0] != word
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        singular = _inflect().singular_noun(word)
        return (str(singular), True) if singular else (word, False)
    return word, False


@lru_cache(maxsize=_CACHE)
def plural(lemma: str) -> str:
    """Plural of a noun; of a compound, of its last word."""
    head, last = lemma.rpartition(" ")[::2]
    if last in PLURAL_ONLY or last in INVARIANT:
        return lemma
    known = _lemminflect().getInflection(last, "NNS", inflect_oov=False)
    form = known[0] if known else str(_inflect().plural_noun(last))
    return f"{head} {form}" if head else str(form)


@lru_cache(maxsize=_CACHE)
def conjugate(lemma: str, tag: str) -> str:
    """A form of a verb, or of the first word of a longer one (``sit on`` -> ``sitting on``)."""
    verb, space, rest = lemma.partition(" ")
    forms = _lemminflect().getInflection(verb, tag)
    return f"{forms[0] if forms else verb}{space}{rest}"


@lru_cache(maxsize=_CACHE)
def article(word: str) -> str:
    """``a`` or ``an``, as the sound of the next word asks."""
    if word[:1].isdigit():
        return "an" if word[0] == "8" or word[:2] in ("11", "18") else "a"
    found = str(_inflect().a(word.lower())).split(" ", 1)[0]
    return found if found in ("a", "an") else "an" if word[:1].lower() in VOWELS else "a"
