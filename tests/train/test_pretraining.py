from types import SimpleNamespace

import pytest

from tests.unified_data import write_texts
from vlscale.config import DataSection, DatasetSection, ObjectivesSection
from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.errors import VlscaleError
from vlscale.train.pretraining import check_background, data_facts, open_datasets, vocabulary_of

VISUAL = {"visual": {"labels": "hard", "background_class": 5}}


def dataset(root, words, **other):
    vocabulary = Vocabulary.from_tokens([*SPECIAL_TOKENS.values(), *words])
    facts = {"root": root, "vocabulary": vocabulary, "feature_dim": 8, "num_classes": None, "num_types": 1}
    return SimpleNamespace(**{**facts, **other})


def test_a_model_is_told_the_vocabularys_size_and_fingerprint_and_the_most_types():
    one = dataset("one", "ab")
    facts = data_facts([one, dataset("two", "ab", num_classes=5, num_types=4)])
    assert facts == {
        "vocab_size": 7,
        "feature_dim": 8,
        "num_classes": 5,
        "vocab_fingerprint": one.vocabulary.fingerprint,
        "num_types": 4,
    }


def test_texts_have_no_features_and_images_no_vocabulary():
    pairs, texts = dataset("pairs", "ab", num_classes=5), dataset("texts", "ab", feature_dim=None)
    images = dataset("images", "ab", vocabulary=None, num_classes=5)
    for opened in ([images, texts, pairs], [texts, images], [pairs, texts, images]):
        facts = data_facts(opened)
        assert (facts["vocab_size"], facts["feature_dim"], facts["num_classes"]) == (7, 8, 5)
        assert vocabulary_of(opened) is texts.vocabulary or vocabulary_of(opened) is pairs.vocabulary
    assert data_facts([texts])["feature_dim"] is None
    assert data_facts([images])["vocab_fingerprint"] is None
    with pytest.raises(VlscaleError, match="none has texts, so there is no vocabulary"):
        vocabulary_of([images])
    with pytest.raises(VlscaleError, match="datasets images and other do not go together: feature width 8 against 9"):
        data_facts([texts, images, dataset("other", "ab", feature_dim=9)])


@pytest.mark.parametrize(
    ("section", "key"),
    [({"mrm": {"background_class": 5}}, "mrm"), ({"unified": VISUAL}, "unified.visual")],
)
def test_a_background_class_is_one_of_the_classes(section, key):
    objectives = ObjectivesSection.model_validate(section)
    check_background(objectives, 6)
    check_background(objectives, None)
    with pytest.raises(VlscaleError, match=rf"objectives.{key}.background_class is 5, but .* classes 0 to 4"):
        check_background(objectives, 5)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (dataset("two", "ac"), "datasets one and two do not go together: vocabulary"),
        (dataset("two", "ab", feature_dim=9), "feature width 8 against 9"),
    ],
)
def test_datasets_of_another_vocabulary_of_equal_size_are_refused(other, why):
    with pytest.raises(VlscaleError, match=why):
        data_facts([dataset("one", "ab"), other])


def test_a_dataset_of_another_kind_than_the_recipe_says_is_refused(tmp_path):
    write_texts(tmp_path / "texts", 6)
    sections = [DatasetSection(name="t", root=tmp_path / "texts", kind=kind) for kind in ("texts", None, "pairs")]
    data = DataSection(datasets=(DatasetSection(name="t", root=tmp_path / "texts", mix={"unified": 1}),))
    for section in sections[:2]:
        assert open_datasets([section], data)["t"].kind == "texts"
    with pytest.raises(VlscaleError, match=r"dataset t: .* holds texts, the recipe says kind: pairs"):
        open_datasets(sections[2:], data)
