"""Model folders: round trip, and one clear line for whatever does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.batches import random_batch, tiny_model
from vlscale.errors import VlscaleError
from vlscale.models.uniter import UniterForPretraining


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
