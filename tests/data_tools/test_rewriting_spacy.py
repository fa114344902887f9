"""A dependency parse gives the same kind of graph: hand-parsed documents of spaCy, no model needed."""

from __future__ import annotations

import pytest

from data_tools.rewriting.chunker import analyse
from data_tools.rewriting.graph import split_words
from data_tools.rewriting.spacy_parser import SpacyParser, analyse_document
from vlscale.errors import VlscaleError

spacy = pytest.importorskip("spacy")

# word, part of speech, Penn tag, head, dependency
PARSED = [
    ("a", "DET", "DT", 1, "det"), ("man", "NOUN", "NN", 1, "ROOT"), ("riding", "VERB", "VBG", 1, "acl"),
    ("a", "DET", "DT", 5, "det"), ("brown", "ADJ", "JJ", 5, "amod"), ("horse", "NOUN", "NN", 2, "dobj"),
    ("with", "ADP", "IN", 1, "prep"), ("a", "DET", "DT", 8, "det"), ("hat", "NOUN", "NN", 6, "pobj"),
]  # fmt: skip


def document(rows):
    from spacy.tokens import Doc

    words, pos, tags, heads, deps = zip(*rows, strict=True)
    return Doc(spacy.blank("en").vocab, words=words, pos=pos, tags=tags, heads=heads, deps=deps)


def test_the_parse_decides_to_whom_a_relation_belongs() -> None:
    text = " ".join(row[0] for row in PARSED)
    found, plain = analyse_document(split_words(text), document(PARSED)), analyse(text)
    assert found.objects == plain.objects
    assert found.attributes == plain.attributes
    assert found.units == plain.units
    assert [(r.lemma, r.kind, r.subject, r.object) for r in found.relations] == [
        ("ride", "verb", 0, 1),
        ("with", "preposition", 0, 2),
    ]
    assert plain.relations[1].subject == 1  # the lexicon takes the nearest noun


def test_a_small_trained_pipeline_is_read_from_its_folder(tmp_path) -> None:
    from spacy.training import Example

    words, pos, tags, heads, deps = zip(*PARSED, strict=True)
    nlp = spacy.blank("en")
    for name in ("tagger", "morphologizer"):
        nlp.add_pipe(name)
    nlp.add_pipe("parser", config={"min_action_freq": 1})
    truth = {"words": words, "pos": pos, "tags": tags, "heads": heads, "deps": deps}
    example = Example.from_dict(nlp.make_doc(" ".join(words)), truth)
    spacy.util.fix_random_seed(0)
    nlp.initialize(lambda: [example])
    for _ in range(60):
        nlp.update([example])
    nlp.to_disk(tmp_path / "model")
    text = " ".join(words)
    found, other, empty = SpacyParser(tmp_path / "model").analyse([text, "A man, a hat!", ""])
    assert found == analyse_document(split_words(text), document(PARSED))
    assert len(other.words) == 6
    assert empty.words == ()


def test_a_pipeline_without_a_parser_is_refused(tmp_path) -> None:
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(VlscaleError, match="no parser"):
        SpacyParser(tmp_path / "blank")
    with pytest.raises(VlscaleError, match="no pipeline"):
        SpacyParser(tmp_path / "nothing")
