from types import SimpleNamespace

import pytest

from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.errors import VlscaleError
from vlscale.train.pretraining import data_facts


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
