"""Captions: they say what is there, and their spans point at it."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml

from data_tools.captions import TRAIN_PLAN, VALIDATION_PLAN, Mention, caption_scene, region_spans
from data_tools.demo_tokenizer import train_wordpieces
from data_tools.pictures import DEMO, load_catalogue
from data_tools.scenes import plan_scenes

CATALOGUE = load_catalogue(32)
NOUNS = {thing.noun for thing in CATALOGUE.known}
SCENES = plan_scenes(CATALOGUE, "train", 300, seed=5)
CAPTIONS = [caption_scene(scene, seed=5) for scene in SCENES]


def test_each_scene_gets_its_ten_captions() -> None:
    for scene, captions in zip(SCENES, CAPTIONS, strict=True):
        assert tuple(caption.kind for caption in captions) == TRAIN_PLAN
        sizes = [len(caption.mentions) for caption in captions]
        everything = len(scene.objects)
        assert sizes == [everything] * 3 + [2, 2, 2, 2, 1, 2, 1]
    assert len(TRAIN_PLAN) == 10
    assert {"list", "relation"} <= set(VALIDATION_PLAN)


def test_captions_are_deterministic_and_hardly_ever_repeat() -> None:
    assert caption_scene(SCENES[7], seed=5) == CAPTIONS[7]
    assert caption_scene(SCENES[7], seed=6) != CAPTIONS[7]
    repeats = sum(len(group) - len({caption.text for caption in group}) for group in CAPTIONS)
    assert repeats < 0.01 * sum(map(len, CAPTIONS))


def test_mentions_cover_exactly_the_nouns_each_once() -> None:
    for scene, captions in zip(SCENES, CAPTIONS, strict=True):
        for caption in captions:
            named = [caption.text[mention.start : mention.end] for mention in caption.mentions]
            assert named == [scene.objects[mention.object].noun for mention in caption.mentions]
            words = Counter(caption.text.replace(",", "").split())
            assert {word: count for word, count in words.items() if word in NOUNS} == dict.fromkeys(named, 1)
            for mention, noun in zip(caption.mentions, named, strict=True):
                before = caption.text[: mention.start].split()[-1]
                assert before == ("an" if noun[0] in "aeiou" else "a")


def test_relations_are_true() -> None:
    seen = Counter()
    for scene, captions in zip(SCENES, CAPTIONS, strict=True):
        for caption in captions:
            if caption.kind != "relation" or len(caption.mentions) != 2:
                continue
            a, b = (scene.objects[mention.object].box for mention in caption.mentions)
            dx, dy = a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]
            between = caption.text[caption.mentions[0].end : caption.mentions[1].start]
            phrase = next(p for p in ("left", "right", "above", "over", "below", "under", "next") if p in between)
            seen[phrase] += 1
            truth = {
                "left": dx < 0 and abs(dx) >= abs(dy),
                "right": dx >= 0 and abs(dx) >= abs(dy),
                "above": dy < 0 and abs(dy) > abs(dx),
                "below": dy >= 0 and abs(dy) > abs(dx),
                "next": abs(dx) >= abs(dy) and max(a[0], b[0]) - min(a[2], b[2]) < 45,
            }
            assert truth[{"over": "above", "under": "below"}.get(phrase, phrase)], caption.text
    assert len(seen) == 7
    assert min(seen.values()) > 20


def test_vocabulary_is_nouns_and_the_recipe_s_function_words() -> None:
    recipe = yaml.safe_load((DEMO.parents[1] / "launch/recipes/demo.yaml").read_text(encoding="utf-8"))
    function_words = set(recipe["objectives"]["mlm"]["function_words"])
    words = {w for group in CAPTIONS for caption in group for w in caption.text.replace(",", " ,").split()}
    assert words - function_words == NOUNS
    assert 15 <= len(words & function_words) <= 30


def test_spans_name_the_tokens_and_the_region_of_each_noun() -> None:
    pieces = train_wordpieces(caption.text for group in CAPTIONS for caption in group)
    for scene, captions in zip(SCENES[:50], CAPTIONS[:50], strict=True):
        encoded = pieces.encode([caption.text for caption in captions])
        for caption, (ids, offsets) in zip(captions, encoded, strict=True):
            spans = region_spans(caption, scene, offsets)
            assert len(spans) == len(caption.mentions)
            for start, end, region in spans:
                (token,) = ids[start:end]
                index = scene.regions[region].object
                assert index is not None
                assert pieces.vocabulary.tokens[token] == scene.objects[index].noun


@pytest.mark.parametrize(
    ("offsets", "expected"), [([(0, 1), (2, 4), (4, 6), (7, 9)], (1, 3)), ([(0, 6), (7, 9)], (0, 1))]
)
def test_spans_cover_words_cut_into_several_pieces(offsets, expected) -> None:
    scene = SCENES[0]
    caption = type(CAPTIONS[0][0])("a abcd ef", "single", (Mention(2, 6, 0),))
    ((start, end, region),) = region_spans(caption, scene, offsets)
    assert (start, end) == expected
    assert scene.regions[region].object == 0
