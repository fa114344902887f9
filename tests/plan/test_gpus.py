"""The table of GPUs, and a user's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlscale.errors import VlscaleError
from vlscale.plan.gpus import Gpu, gpu_names, load_gpu
from vlscale.train.metrics import _PEAK_TERAFLOPS

OWN = {
    "memory_gib": 24, "fp16_tflops": 71.0, "bf16_tflops": 71.0, "fp32_tflops": 35.6, "memory_gb_s": 936,
    "link_gb_s": 28, "gpus_per_node": 4, "network_gb_s": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", ["v100-16", "v100-32", "a100-40", "a100-80", "h100", "h200"])
def test_every_figure_has_a_source_and_the_peaks_are_those_of_the_trainer(name: str) -> None:
    gpu = load_gpu(name)
    assert set(gpu.sources) == set(Gpu.model_fields) - {"sources", "gpus_per_node"}
    half, single = _PEAK_TERAFLOPS[name.partition("-")[0].upper()]
    assert (gpu.fp16_tflops, gpu.fp32_tflops) == (half, single)
    assert gpu.bf16_tflops == (None if name.startswith("v100") else half)


def test_the_table_is_complete() -> None:
    assert gpu_names() == ["v100-16", "v100-32", "a100-40", "a100-80", "h100", "h200"]
    assert load_gpu("V100-32").memory_gib == 31.74
    assert load_gpu("v100-16").peak("bf16") is None
    assert load_gpu("h100").peak("bf16") == 989.4e12


def test_an_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(OWN))
    assert load_gpu(str(path)).peak("fp16") == 71e12


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            yaml.safe_dump({**OWN, "memory_gbi": 3}),
            "memory_gbi: Extra inputs are not permitted; did you mean 'memory_gib'",
        ),
        (yaml.safe_dump({**OWN, "memory_gib": -1}), "memory_gib: Input should be greater than 0"),
        (yaml.safe_dump({**OWN, "gpus_per_node": 0}), "gpus_per_node"),
        (yaml.safe_dump({k: v for k, v in OWN.items() if k != "link_gb_s"}), "link_gb_s: Field required"),
        ("memory_gib: .inf\n", "memory_gib"),
        ("- a\n", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("", "expected a mapping"),
        ("#" * (1 << 17), "describes no GPU"),
    ],
)
def test_a_wrong_file_is_told_by_its_field(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(VlscaleError) as caught:
        load_gpu(str(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(VlscaleError, match="did you mean 'v100-32'"):
        load_gpu("v100-23")
    with pytest.raises(VlscaleError, match="cannot be read"):
        load_gpu("no/such.yaml")
