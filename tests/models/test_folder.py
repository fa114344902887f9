"""Model folders: round trip, and one clear line for whatever does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.batches import random_batch, tiny_model
from vlscale.errors import VlscaleError
from vlscale.models.folder import parse_config
from vlscale.models.uniter import UniterConfig, UniterForPretraining


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(norm="pre")
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def _change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(saved):
    model, folder = saved
    loaded = UniterForPretraining.from_pretrained(folder)
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    batch = random_batch([3, 4], [2, 1])
    assert torch.equal(loaded.encode(batch).hidden, model.eval().encode(batch).hidden)
    described = json.loads((folder / "config.json").read_text())
    assert described["norm"] == "pre"
    assert described["feature_dim"] == 12


def test_saving_twice_replaces(saved):
    _, folder = saved
    other = tiny_model(seed=5, hidden_size=16)
    other.save_pretrained(folder)
    assert UniterForPretraining.from_pretrained(str(folder)).config.hidden_size == 16
    assert not list(folder.glob(".*"))


def test_half_precision_is_widened(saved):
    model, folder = saved
    model.half().save_pretrained(folder)
    loaded = UniterForPretraining.from_pretrained(folder)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert torch.equal(loaded.itm_head.weight, model.itm_head.weight.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "hidden_size: .*found 'wide'"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"feature_dim": 13}, "of another shape: .*is \\[12\\], the model's is \\[13\\]"),
        ({"num_hidden_layers": 4}, "12 missing: encoder.layers.3"),
        ({"num_hidden_layers": 2}, "12 unexpected: encoder.layers.2"),
        ({"norm": "post"}, "2 unexpected: encoder.final_norm"),
    ],
)
def test_configuration_that_does_not_fit(saved, changes, message):
    _change_config(saved[1], **changes)
    with pytest.raises(VlscaleError, match=message) as caught:
        UniterForPretraining.from_pretrained(saved[1])
    assert "\n" not in str(caught.value)
    assert "config" in str(caught.value) or "safetensors" in str(caught.value)


def test_damaged_and_missing_files(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(VlscaleError, match="damaged"):
        UniterForPretraining.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(VlscaleError, match="no such file"):
        UniterForPretraining.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(VlscaleError, match="not valid JSON"):
        UniterForPretraining.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(VlscaleError, match="expected an object, found list"):
        UniterForPretraining.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(VlscaleError, match=r"config\.json: cannot be read"):
        UniterForPretraining.from_pretrained(folder)


def test_neither_folder_nor_repository(tmp_path):
    with pytest.raises(VlscaleError, match="no such folder"):
        UniterForPretraining.from_pretrained(tmp_path / "nothing" / "here")


def test_an_extra_tensor_is_refused(saved):
    _, folder = saved
    state = load_file(folder / "model.safetensors")
    save_file({**state, "extra.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(VlscaleError, match=r"1 unexpected: extra\.weight"):
        UniterForPretraining.from_pretrained(folder)


@pytest.fixture
def sharded(saved):
    """The saved folder with its weights in two shards; returns model, folder and file -> its tensors."""
    model, folder = saved
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {f"model-{i}.safetensors": {name: state[name] for name in names[i::2]} for i in range(2)}
    for file, part in parts.items():
        save_file(part, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model, folder, parts


def test_shards_are_read(sharded):
    model, folder, _ = sharded
    loaded = UniterForPretraining.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(sharded):
    """All names are there and fit, but the shards are not those of this index."""
    _, folder, parts = sharded
    (first, one), (second, other) = parts.items()
    moved = next(iter(one))
    save_file({**other, moved: one[moved] + 1}, folder / second)  # a stale copy, which would win
    with pytest.raises(VlscaleError, match=rf"{second}: holds '{moved}', which does not stand there by .*index\.json"):
        UniterForPretraining.from_pretrained(folder)
    save_file({name: tensor for name, tensor in one.items() if name != moved}, folder / first)
    with pytest.raises(VlscaleError, match=rf"{first}: lacks '{moved}', which stands there by .*index\.json"):
        UniterForPretraining.from_pretrained(folder)


def test_both_forms_of_weights_are_refused_and_saving_leaves_one(sharded):
    model, folder, _ = sharded
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(VlscaleError, match=r"holds both of model\.safetensors\.index\.json and model\.safetensors"):
        UniterForPretraining.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    other = tiny_model(seed=5, norm="pre")
    other.save_pretrained(folder)
    loaded = UniterForPretraining.from_pretrained(folder)
    assert torch.equal(loaded.pooler.dense.weight, other.pooler.dense.weight)


def test_a_bad_value_is_told_in_one_line() -> None:
    with pytest.raises(VlscaleError, match=r"hidden_size: .*found \[") as told:
        parse_config(UniterConfig, {"hidden_size": [list(range(9))] * 500}, "here")
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 300
