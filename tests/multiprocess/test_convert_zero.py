"""Checkpoints that real DeepSpeed processes wrote are read bit by bit as the engine's own master weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.convert.hostile import read_all
from tests.multiprocess.launcher import ROOT, all_well, run_alone, run_many, run_together
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe
from tests.multiprocess.zero_worker import CASES as ODD
from vlscale.convert.conversion import Wish, convert
from vlscale.convert.deepspeed_zero import open_source, recognise
from vlscale.convert.verification import verify
from vlscale.models.uniter import UniterForPretraining

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

FP16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (0, {}),
    "zero1_bf16": (1, {"bf16": {"enabled": True}}),
    "zero2_fp16": (2, {"fp16": FP16}),
    "zero3": (3, {}),
}
UNIVERSAL = ("zero1_bf16", "zero2_fp16", "zero3")
CONVERT = """
import sys
from deepspeed.checkpoint import ds_to_universal as tool
for name in sys.argv[1:]:
    folders = ["--input_folder", f"{name}/checkpoints/step-3", "--output_folder", f"{name}/universal/step-3"]
    sys.argv[1:] = [*folders, "--num_extract_workers", "1", "--num_merge_workers", "1"]
    tool.main(tool.parse_arguments())
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of launch/pretrain.py after three steps, which write their weights to model/ as well.

    Beside them what DeepSpeed's own tool makes of their checkpoints: universal/.
    """
    root = tmp_path_factory.mktemp("runs")
    write_data(root)
    content = recipe(root, schedule={"warmup_steps": 1, "total_steps": 3})
    path = write_recipe(root / "small.yaml", content)
    lines = []
    for name, (stage, more) in RUNS.items():
        config = write_ds_config(root / f"small_{name}.json", stage, **more)
        lines.append(["--recipe", str(path), "--ds_config", str(config), "--run_dir", str(root / name)])
    all_well(run_many(lines, root / "todo.json", 2, VLSCALE_TEST_FP16="1"))
    (root / "convert.py").write_text(CONVERT, encoding="utf-8")
    done = run_alone(root / "convert.py", *(root / name for name in UNIVERSAL))
    assert done.status == 0, done.tail
    return root


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What zero_worker.py leaves, by number of processes."""
    root = tmp_path_factory.mktemp("odd")
    for processes in (1, 2):
        folder = root / str(processes)
        folder.mkdir()
        for done in run_together(ROOT / "tests/multiprocess/zero_worker.py", folder, processes=processes):
            assert done.status == 0, done.tail
    return root


def assert_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def exported(run: Path) -> dict[str, Tensor]:
    """The run's own weights, under the names of the trained module."""
    return {f"model.{name}": tensor for name, tensor in load_file(run / "model" / "model.safetensors").items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_read_as_what_it_exported(runs: Path, name: str) -> None:
    assert recognise(runs / name)
    source = open_source(runs / name)
    assert source.folder.name == "step-3"
    assert (source.extra["world_size"], source.extra["zero_stage"]) == (2, RUNS[name][0])
    assert source.extra["manifest"]["model"]["hidden_size"] == 32
    assert_weights(read_all(source), exported(runs / name))


@pytest.mark.parametrize("name", RUNS)
def test_the_tool_makes_the_same_folder_of_it(runs: Path, name: str, tmp_path: Path) -> None:
    report = convert(Wish(runs / name, tmp_path / "ours"))
    assert (report.kind, report.layout, report.to) == ("deepspeed", "vlscale", "vlscale")
    assert report.provenance["step"] == 3
    ours, theirs = (UniterForPretraining.from_pretrained(path) for path in (tmp_path / "ours", runs / name / "model"))
    assert ours.config == theirs.config
    assert_weights(ours.state_dict(), theirs.state_dict())
    convert(Wish(runs / name, tmp_path / "uniter.pt", to="state-dict"))
    assert verify(tmp_path / "ours", runs / name).same


@pytest.mark.parametrize("name", UNIVERSAL)
def test_what_ds_to_universal_makes_of_it(runs: Path, name: str) -> None:
    for path in (runs / name / "universal", runs / name / "universal" / "step-3"):
        assert recognise(path)
        source = open_source(path)
        assert source.extra["universal"]
        assert_weights(read_all(source), exported(runs / name))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ODD)
def test_ties_frozen_buffers_and_odd_sizes(odd: Path, name: str, processes: int) -> None:
    folder = odd / str(processes) / name
    source = open_source(folder / "tag")
    assert dict(source.aliases) == {"head.weight": "word.weight"}
    found = read_all(source)
    expected = load_file(folder / "engine.safetensors") | load_file(folder / "buffers.safetensors")
    frozen = {"fixed.weight", "fixed.bias"}
    assert found.keys() == {*expected, "head.weight", *frozen}
    assert torch.equal(found["head.weight"], found["word.weight"])
    # A frozen parameter has no master weights: it is as the module holds it.
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    assert {found[each].dtype for each in frozen} == {dtype}
    assert_weights({each: found[each] for each in expected}, expected)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", [name for name, (stage, _) in ODD.items() if stage and name != "zero1_bf16"])
def test_deepspeeds_own_tool_agrees(odd: Path, name: str, processes: int) -> None:
    folder = odd / str(processes) / name
    theirs = load_file(folder / "zero_to_fp32.safetensors")
    found = read_all(open_source(folder / "tag"))
    lost = found.keys() - theirs.keys()
    assert not theirs.keys() - found.keys()
    assert lost == ({"fixed.weight", "fixed.bias"} if name == "zero1" else set()), "it forgets frozen ones at stage 1"
    for each, tensor in theirs.items():  # it casts buffers to float32
        assert torch.equal(found[each].to(tensor.dtype), tensor), each
