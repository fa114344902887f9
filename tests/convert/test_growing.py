"""A run may start from weights with fewer words and types: what is kept, what is new, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.models.batches import tiny_model
from vlscale.convert.initial import initial_state, load_initial_weights
from vlscale.data.schema import grown_fingerprint
from vlscale.errors import VlscaleError

OLD = "a" * 64
BIGGER = {"vocab_size": 53, "type_vocab_size": 4}
WORDS, TYPES = "text_embedder.word.weight", "type_embedding.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a model of 50 words and 2 types, and its weights."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model(seed=4, vocab_fingerprint=OLD)
    torch.nn.init.normal_(model.word_head.bias)
    model.save_pretrained(folder)
    return folder, model.state_dict()


def test_old_rows_stay_and_new_types_are_as_type_0(saved):
    folder, old = saved
    model = tiny_model(seed=5, **BIGGER, vocab_fingerprint=grown_fingerprint(OLD, 3))
    report = load_initial_weights(model, folder, "grow")
    new = model.state_dict()
    assert torch.equal(new[WORDS][:50], old[WORDS])
    assert torch.equal(new[TYPES][:2], old[TYPES])
    assert torch.equal(new[TYPES][2:], old[TYPES][[0, 0]])
    assert torch.equal(new["word_head.bias"][:50], old["word_head.bias"])
    assert not new["word_head.bias"][50:].any()
    for name in old.keys() - {WORDS, TYPES, "word_head.bias"}:
        assert torch.equal(new[name], old[name]), name
    assert report.fresh == report.ignored == ()
    assert "3 words added, random" in str(report)
    assert "2 types added, as type 0" in str(report)
    assert "word head kept (model.init_tables=reference would leave it out, as published)" in str(report)


def test_new_words_are_random_as_the_models_are_and_equal_on_all_processes(saved):
    folder, _ = saved
    config = tiny_model(**{**BIGGER, "vocab_size": 2050}).config
    torch.manual_seed(1)
    first = initial_state(folder, config, "grow")[WORDS]
    torch.manual_seed(2)
    assert torch.equal(initial_state(folder, config, "grow")[WORDS], first)
    rows = first[50:]
    assert abs(float(rows.std()) - config.weights.of(config.hidden_size)) < 0.005
    assert abs(float(rows.mean())) < 0.005
    assert not torch.equal(rows[0], rows[1])


def test_reference_throws_the_word_head_away_as_published(saved):
    folder, old = saved
    model = tiny_model(seed=5, **BIGGER)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, folder, "reference")
    head = {name for name in before if name.startswith("word_head.")}
    assert set(report.fresh) == head
    for name in head:
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert torch.equal(model.state_dict()[WORDS][:50], old[WORDS])
    assert "word head left out, as published" in str(report)


def test_types_alone_leave_the_words_alone(saved):
    folder, old = saved
    for tables in ("grow", "reference"):
        state = initial_state(folder, tiny_model(type_vocab_size=3, vocab_fingerprint=OLD).config, tables)
        assert torch.equal(state[WORDS], old[WORDS])
        assert torch.equal(state["word_head.bias"], old["word_head.bias"])
        assert torch.equal(state[TYPES][2], old[TYPES][0])


def test_nothing_changes_where_nothing_is_added(saved):
    folder, old = saved
    for tables in ("exact", "grow", "reference"):
        state = initial_state(folder, tiny_model(vocab_fingerprint=OLD).config, tables)
        assert all(torch.equal(state[name], old[name]) for name in old)


@pytest.mark.parametrize(
    ("changes", "tables", "why"),
    [
        (
            {"vocab_size": 53},
            "exact",
            "vocab_size is 50, the model's is 53; if its first 50 words mean the same, set mod",
        ),
        ({"type_vocab_size": 4}, "exact", "type_vocab_size is 2, the model's is 4; .* model.init_tables=grow"),
        ({"vocab_size": 49}, "grow", "tables cannot shrink: set model.config.vocab_size=50"),
        (
            {"vocab_size": 53, "vocab_fingerprint": "b" * 64},
            "grow",
            "vocabulary aaaaaaaaaaaa, the texts have bbbbbbbbbbbb, which is not the same with 3 added tokens; import "
            "the texts with the tokenizer that the weights were trained with and --added-tokens 3",
        ),
        (
            {"vocab_size": 53, "vocab_fingerprint": grown_fingerprint(OLD, 4)},
            "grow",
            "not the same with 3 added tokens",
        ),
        ({"vocab_fingerprint": "b" * 64}, "grow", "the texts have bbbbbbbbbbbb; import"),
        ({"hidden_size": 16, **BIGGER}, "grow", "of another shape"),
    ],
)
def test_what_cannot_be_grown_is_refused_in_one_line(saved, changes, tables, why):
    with pytest.raises(VlscaleError, match=why) as caught:
        initial_state(saved[0], tiny_model(**changes).config, tables)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_word_head_grows_too(tmp_path):
    tiny_model(seed=4, heads=("matching",)).save_pretrained(tmp_path)
    report = load_initial_weights(tiny_model(**BIGGER), tmp_path, "grow")
    assert "word head" not in str(report).replace("word_head", "")
    assert {name.split(".")[0] for name in report.fresh} == {"word_head", "feature_head", "region_classifier"}
