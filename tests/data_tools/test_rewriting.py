"""Words, graphs and replacements of a written list of captions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from data_tools.rewriting import lexicon
from data_tools.rewriting.chunker import analyse
from data_tools.rewriting.graph import NOUN_PHRASE, VERB_PHRASE, from_json, split_words
from data_tools.rewriting.meanings import contradicting_prepositions, excludes_attribute, may_be_same
from data_tools.rewriting.replacing import Rewriter, known_of, normalised
from data_tools.rewriting.units import piece_units, token_units
from data_tools.rewriting.vocabulary import Vocabulary, count_corpus, parse_vocabulary
from tests.data_tools.rewriting_captions import CAPTIONS
from vlscale.errors import VlscaleError

ANALYSES = [analyse(text) for text in CAPTIONS]
VOCABULARY = Vocabulary(parse_vocabulary(count_corpus(ANALYSES), "captions"))
REWRITTEN = [
    Rewriter(VOCABULARY, 8, seed=1).rewrite(text, text, analysis, known_of([(text, analysis)]))
    for text, analysis in zip(CAPTIONS, ANALYSES, strict=True)
]
ALL = [(text, rewrite) for text, several in zip(CAPTIONS, REWRITTEN, strict=True) for rewrite in several]
A_THOUGH_VOWEL = ("university",)


def graph(text):
    found = analyse(text)
    relations = {
        (r.subject >= 0 and found.objects[r.subject].lemma, r.lemma, r.object >= 0 and found.objects[r.object].lemma)
        for r in found.relations
    }
    attributes = {(found.objects[a.object].lemma, a.lemma) for a in found.attributes}
    return {item.lemma: item.form for item in found.objects}, attributes, relations


def test_the_list_is_long_enough_and_nearly_every_caption_is_rewritten() -> None:
    assert len(CAPTIONS) >= 60
    assert all(several for several in REWRITTEN)
    kinds = [{rewrite.kind for rewrite in several} for several in REWRITTEN]
    assert sum("object" in kind for kind in kinds) == len(CAPTIONS)
    assert sum("relation" in kind for kind in kinds) >= 0.6 * len(CAPTIONS)
    assert sum("attribute" in kind for kind in kinds) >= 20


def test_no_negative_is_unchanged_or_given_twice() -> None:
    for text, several in zip(CAPTIONS, REWRITTEN, strict=True):
        new = [normalised(rewrite.text) for rewrite in several]
        assert normalised(text) not in new
        assert len(set(new)) == len(new)
        assert not any(rewrite.positive for rewrite in several)


def test_articles_agree_with_the_word_behind_them() -> None:
    for _, rewrite in ALL:
        for article, word in re.findall(r"\b(an?) ([a-z]+)", rewrite.text, re.IGNORECASE):
            vowel = (word[0].lower() in "aeiou" and word.lower() not in A_THOUGH_VOWEL) or word.lower() == "hour"
            assert (article.lower() == "an") == vowel, rewrite.text


def test_number_agrees() -> None:
    plurals = {lexicon.plural(lemma) for lemma in VOCABULARY.objects["counted"]} | {"people"}
    for text, rewrite in ALL:
        assert not re.search(r"\b[Aa]n? (people|scissors|clothes|drinks|rice|snow)\b", rewrite.text), rewrite.text
        counted = re.match(r"(two|three|four|five|six|several) ((?:young )?)([a-z ]+)", rewrite.text, re.IGNORECASE)
        if counted and rewrite.kind == "object":
            noun = counted[3]
            assert any(noun.startswith(plural) for plural in plurals) or noun.startswith("sheep"), (text, rewrite.text)


def test_only_the_replaced_words_and_their_article_differ() -> None:
    for text, rewrite in ALL:
        assert rewrite.old.lower() in text.lower()
        assert rewrite.new.lower() in rewrite.text.lower()
        shared = [word for word in text.split() if word.lower() not in ("a", "an")]
        kept = [word for word in rewrite.text.split() if word.lower() not in ("a", "an")]
        common = sum(word in kept for word in shared)
        assert common >= len(shared) - len(rewrite.old.split()), rewrite.text
        assert rewrite.text[-1:].isalpha() == text[-1:].isalpha()


def test_replacements_come_from_the_corpus_and_are_not_synonyms() -> None:
    for text, rewrite in ALL:
        if rewrite.kind == "object":
            new = rewrite.new.lower()
            lemma = next(o for form in VOCABULARY.objects.values() for o in form if new in (o, lexicon.plural(o)))
            assert not any(may_be_same(lemma, item.lemma) for item in analyse(text).objects)
        if rewrite.kind == "attribute":
            assert excludes_attribute(rewrite.old.lower(), rewrite.new.lower())


def test_what_is_known_of_the_image_is_never_offered() -> None:
    text, other = "a dog on a chair", "a red bus, an apple, a woman and a cat"
    known = known_of([(text, analyse(text)), (other, analyse(other))])
    found = Rewriter(VOCABULARY, 200, 0).rewrite("x", text, analyse(text), known)
    objects = {rewrite.new for rewrite in found if rewrite.kind == "object"}
    assert len(objects) > 20
    assert not objects & {"bus", "apple", "woman", "man and woman", "cat", "dog", "chair", "kitten"}


def test_draws_depend_on_the_seed_and_the_id_alone() -> None:
    text = CAPTIONS[1]
    known = known_of([(text, analyse(text))])
    one = Rewriter(VOCABULARY, 4, 3)
    assert one.rewrite("a", text, analyse(text), known) == Rewriter(VOCABULARY, 4, 3).rewrite(
        "a", text, analyse(text), known
    )
    assert one.rewrite("a", text, analyse(text), known) != one.rewrite("b", text, analyse(text), known)


@pytest.mark.parametrize(
    ("text", "objects", "attributes", "relations"),
    [
        (
            "A man riding a wave on top of a surfboard.",
            {"man": "a", "wave": "a", "surfboard": "a"},
            set(),
            {("man", "ride", "wave"), ("wave", "on top of", "surfboard")},
        ),
        (
            "A black and white cat is sitting on the wooden bench.",
            {"cat": "a", "bench": "the"},
            {("cat", "black"), ("cat", "white"), ("bench", "wooden")},
            {("cat", "sit on", "bench")},
        ),
        ("Three sheep stand in the grass.", {"sheep": "counted", "grass": "the"}, {("sheep", "three")},
         {("sheep", "stand in", "grass")}),
        (
            "A man and woman ride bikes",
            {"man": "a", "woman": "the", "bike": "plural"},
            set(),
            {("woman", "ride", "bike")},
        ),
        ("The bus is red and white.", {"bus": "the"}, {("bus", "red"), ("bus", "white")}, set()),
        ("A parked car covered in snow", {"car": "a", "snow": "bare"}, {("car", "parked")},
         {("car", "cover in", "snow")}),
        (
            "there is an apple to the left of a dog and next to a bear",
            {"apple": "a", "dog": "a", "bear": "a"},
            set(),
            {("apple", "to the left of", "dog"), ("apple", "next to", "bear")},
        ),
    ],
)  # fmt: skip
def test_scene_graphs(text, objects, attributes, relations) -> None:
    assert graph(text) == (objects, attributes, relations)


def test_a_denial_is_not_rewritten() -> None:
    found = analyse("A man is not wearing shoes")
    assert all(item.fixed for item in found.objects)
    assert not found.relations
    without = analyse("A dog without a collar")
    assert [item.fixed for item in without.objects] == [False, True]


@pytest.mark.parametrize("text", ["", "  ", "...", "and of the", "!?", "日本", "a" * 3000, "1 2 3"])
def test_texts_without_a_unit_or_of_no_english_are_no_error(text) -> None:
    found = analyse(text)
    assert from_json(text, found.to_json()).objects == found.objects
    covered = [place for unit in found.units for place in range(unit.start, unit.end)]
    assert covered == list(range(len(found.words)))


def test_units_cover_all_words_once_and_hold_phrases_together() -> None:
    for text, analysis in zip(CAPTIONS, ANALYSES, strict=True):
        covered = [place for unit in analysis.units for place in range(unit.start, unit.end)]
        assert covered == list(range(len(split_words(text))))
    found = analyse("A woman is holding a big red fire hydrant")
    words = [word.text for word in found.words]
    phrases = {(" ".join(words[u.start : u.end]), u.kind) for u in found.units if u.kind}
    assert phrases == {("woman", NOUN_PHRASE), ("is holding", VERB_PHRASE), ("big red fire hydrant", NOUN_PHRASE)}


def test_token_units_never_split_words_and_cover_all_tokens() -> None:
    found = analyse("a fire hydrant runs")
    offsets = [(0, 1), (1, 6), (6, 10), (10, 14), (14, 19)]  # " fire", " hyd"... as byte-level BPE cuts them
    units = token_units(found, offsets)
    assert units[:, 0].tolist() == [0, 1, 4] and units[:, 1].tolist() == [1, 4, 5]  # noqa: PT018
    assert token_units(analyse("..."), [(0, 3)]).tolist() == [[0, 1, 0]]
    assert piece_units(["play", "##ing", "a"], False).tolist() == [[0, 2, 0], [2, 3, 0]]
    assert piece_units(["play", "ing", "Ġa"], True).tolist() == [[0, 2, 0], [2, 3, 0]]
    assert piece_units([], True).shape == (0, 3)


def test_prepositions_that_may_both_hold_are_no_replacements() -> None:
    assert "to the right of" in contradicting_prepositions("to the left of")
    assert not contradicting_prepositions("next to") & {"to the left of", "beside", "behind"}
    assert not contradicting_prepositions("above") & {"over", "above"}
    assert contradicting_prepositions("during") == frozenset()


def test_a_vocabulary_that_holds_no_counts_is_refused() -> None:
    with pytest.raises(VlscaleError, match="find_units"):
        parse_vocabulary({"objects": {"dog": {"a": 0}}, "attributes": {}, "relations": {}}, "file")
    with pytest.raises(ValueError, match="graph"):
        from_json("a dog", {"objects": [["dog", 1, 9, "a", False]], "attributes": [], "relations": []})


@pytest.mark.parametrize(
    ("word", "expected"), [("hour", "an"), ("uniform", "a"), ("apple", "an"), ("8", "an"), ("18", "an"), ("80", "an"),
                           ("1", "a"), ("european", "a")]
)  # fmt: skip
def test_article(word, expected) -> None:
    assert lexicon.article(word) == expected


def test_inflection() -> None:
    nouns = ["knife", "child", "fire hydrant", "sheep", "bus", "scissors"]
    assert [lexicon.plural(noun) for noun in nouns] == [
        "knives", "children", "fire hydrants", "sheep", "buses", "scissors"
    ]  # fmt: skip
    assert lexicon.conjugate("sit on", "VBG") == "sitting on"
    assert lexicon.conjugate("ride", "VBZ") == "rides"
    assert np.all([lexicon.noun_lemma(word)[1] for word in ("men", "leaves", "people", "boxes")])
