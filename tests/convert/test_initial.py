"""Starting weights: a vlscale folder, and Hugging Face BERT folders in all the ways they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.batches import TINY, tiny_model
from vlscale.convert.initial import initial_state, load_initial_weights
from vlscale.convert.uniter import to_official
from vlscale.errors import VlscaleError

BERT = {
    **{key: TINY[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{key: TINY[key] for key in ("intermediate_size", "max_position_embeddings")},
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "model_type": "bert",
}


def _bert_state(prefix: str = "bert.", old_names: bool = False, head: bool = True) -> dict[str, Tensor]:
    """The weights of a BERT, cut out of a UNITER with other random weights."""
    official = to_official(tiny_model(seed=9).state_dict())
    state = {}
    for name, tensor in official.items():
        if name.startswith("uniter.") and "img_embeddings" not in name:
            state[name.replace("uniter.", prefix)] = tensor + 0.1
        elif name.startswith("cls.") and head:
            state[name] = tensor + 0.1
    if head:
        state["cls.seq_relationship.weight"] = torch.zeros(2, 32)
        state["cls.seq_relationship.bias"] = torch.zeros(2)
    if old_names:
        state = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
            for name, tensor in state.items()
        }
    return {name: tensor.clone() for name, tensor in state.items()}


def _folder(path: Path, state: dict[str, Tensor], pickled: bool = False, **config) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**BERT, **config}))
    if pickled:
        torch.save(state, path / "pytorch_model.bin")
    else:
        save_file(state, path / "model.safetensors")
    return path


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("old_names", [False, True])
def test_bert_folder(tmp_path, prefix, old_names, pickled):
    state = _bert_state(prefix, old_names)
    state[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, _folder(tmp_path / "bert", state, pickled))
    after = model.state_dict()
    reference = {name: tensor + 0.1 for name, tensor in tiny_model(seed=9).state_dict().items()}
    for name in report.loaded:
        assert torch.equal(after[name], reference[name]), name
    for name in report.fresh:
        assert torch.equal(after[name], before[name]), name
    assert {*report.loaded, *report.fresh} == set(after)
    groups = {name.split(".")[0] for name in report.fresh}
    assert groups == {"image_embedder", "feature_head", "region_classifier", "itm_head"}
    assert len(report.ignored) == 3
    assert "image_embedder" in str(report)
    assert "cls.seq_relationship.bias" in str(report)


def test_bert_without_heads(tmp_path):
    state = {name: t for name, t in _bert_state("", head=False).items() if "pooler" not in name}
    report = load_initial_weights(tiny_model(), _folder(tmp_path / "bert", state))
    assert {name.split(".")[0] for name in report.fresh} >= {"word_head", "pooler"}


def test_decoder_bias_of_newer_files(tmp_path):
    state = _bert_state()
    state["cls.predictions.decoder.bias"] = state.pop("cls.predictions.bias")
    assert "word_head.bias" in initial_state(_folder(tmp_path / "bert", state), tiny_model().config)


def test_vlscale_folder(tmp_path):
    source = tiny_model(seed=4)
    source.save_pretrained(tmp_path / "saved")
    model = tiny_model(seed=5)
    report = load_initial_weights(model, tmp_path / "saved")
    assert report.fresh == report.ignored == ()
    for a, b in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(a, b)
    for change, message in (
        ({"num_classes": 8}, "of another shape"),
        ({"norm": "pre"}, "norm: post"),
        ({"num_attention_heads": 2}, "num_attention_heads is 4, the model's is 2"),
    ):
        with pytest.raises(VlscaleError, match=message):
            initial_state(tmp_path / "saved", tiny_model(**change).config)


def test_weights_of_another_vocabulary_of_equal_size_are_refused(tmp_path):
    tiny_model(vocab_fingerprint="a" * 64).save_pretrained(tmp_path / "saved")
    with pytest.raises(VlscaleError, match=r"trained with the vocabulary aaaaaaaaaaaa, the texts have bbbbbbbbbbbb"):
        initial_state(tmp_path / "saved", tiny_model(vocab_fingerprint="b" * 64).config)
    for known in ("a" * 64, None):  # a model from before fingerprints were kept, or data that are not known
        assert initial_state(tmp_path / "saved", tiny_model(vocab_fingerprint=known).config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, the model's is 32"),
        ({"vocab_size": 51}, "vocabulary"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"model_type": "roberta"}, "neither a vlscale model nor a BERT"),
    ],
)
def test_another_kind_of_bert(tmp_path, config, message):
    with pytest.raises(VlscaleError, match=message):
        initial_state(_folder(tmp_path / "bert", _bert_state(), **config), tiny_model().config)


def test_bert_is_post_norm(tmp_path):
    with pytest.raises(VlscaleError, match="norm: post"):
        initial_state(_folder(tmp_path / "bert", _bert_state()), tiny_model(norm="pre").config)


def test_what_is_missing_or_unknown_is_named(tmp_path):
    state = _bert_state()
    fewer = {name: t for name, t in state.items() if name != "bert.encoder.layer.2.output.dense.weight"}
    with pytest.raises(VlscaleError, match=r"1 weights of a BERT are missing: encoder\.layers\.2\.ffn\.down\.weight"):
        initial_state(_folder(tmp_path / "fewer", fewer), tiny_model().config)
    more = {**state, "bert.adapter.weight": torch.zeros(1)}
    with pytest.raises(VlscaleError, match=r"1 unexpected: bert\.adapter\.weight"):
        initial_state(_folder(tmp_path / "more", more), tiny_model().config)
    twice = {**state, "pooler.dense.bias": torch.zeros(32)}
    with pytest.raises(VlscaleError, match="stands twice"):
        initial_state(_folder(tmp_path / "twice", twice), tiny_model().config)
    wide = {**state, "bert.pooler.dense.bias": torch.zeros(33)}
    with pytest.raises(VlscaleError, match=r"pooler\.dense\.bias is \[33\]"):
        initial_state(_folder(tmp_path / "wide", wide), tiny_model().config)
    with pytest.raises(VlscaleError, match="no such folder"):
        initial_state(tmp_path / "nothing", tiny_model().config)


class _Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_with_code_is_refused(tmp_path):
    folder = _folder(tmp_path / "bert", _bert_state(), pickled=True)
    torch.save({"bert.pooler.dense.bias": _Trap(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(VlscaleError, match=r"pytorch_model\.bin.* nothing was run"):
        initial_state(folder, tiny_model().config)
    assert not (tmp_path / "ran").exists()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(VlscaleError, match="neither"):
        initial_state(folder, tiny_model().config)


@pytest.mark.parametrize("content", [b"", b"\x80", b".", b"hello world", b"\x80\x02}q"])
def test_a_damaged_pickle_is_one_line(tmp_path, content):
    folder = _folder(tmp_path / "bert", _bert_state(), pickled=True)
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(VlscaleError, match=r"pytorch_model\.bin: is no file of torch\.save"):
        initial_state(folder, tiny_model().config)
