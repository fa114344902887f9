"""Layers that a checkpoint's names are of: whole, and not absurdly many."""

from __future__ import annotations

import pytest

from vlscale.convert.layer_names import MOST_LAYERS, layer_count
from vlscale.convert.unimo_model import import_plans
from vlscale.errors import VlscaleError

PATTERN = r"layer\.(\d+)\."


@pytest.mark.parametrize("layers", [0, 1, 24, MOST_LAYERS])
def test_whole_layers_are_counted(layers):
    names = [f"layer.{layer}.{part}" for layer in reversed(range(layers)) for part in ("weight", "bias")]
    assert layer_count([*names, "embeddings.weight"], PATTERN, "checkpoint") == layers


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["0", "2"], r"has 'layer\.2\.weight', but nothing of layer 1; give the whole checkpoint, layers 0 to 2$"),
        (["1"], "nothing of layer 0"),
        (["1000"], "'layer.1000.weight' is of a layer beyond 1000"),
        (["1000000"], "is of a layer beyond 1000"),
        (["9" * 5000], "is of a layer beyond 1000"),
        (["\u0661"], "is of a layer beyond 1000"),
    ],
)
def test_gaps_and_absurd_numbers_are_refused(layers, message):
    with pytest.raises(VlscaleError, match=message):
        layer_count([f"layer.{layer}.weight" for layer in layers], PATTERN, "checkpoint")


@pytest.mark.parametrize(
    ("layout", "name"),
    [("unimo", "encoder_layer_1000000_ffn_fc_0.w_0"), ("unimo-text", "encoder.layers.1000000.linear1.weight")],
)
def test_one_name_of_a_distant_layer_does_not_make_a_million_rules(layout, name):
    with pytest.raises(VlscaleError, match=rf"{layout} checkpoint: .* is of a layer beyond 1000"):
        import_plans([name], layout, partial=True)
