"""Checkpoints in DeepSpeed's layout come back bit by bit, lazily; damage and mixtures are told in one line.

Those that DeepSpeed itself writes are read in tests/multiprocess/test_convert_zero.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.convert.hostile import damaged, read_all, refused
from tests.convert.zero_writer import Zero
from vlscale.convert import deepspeed_zero
from vlscale.convert.deepspeed_zero import open_source, recognise
from vlscale.errors import VlscaleError

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


def groups(*sizes: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Two groups, of matrices and of vectors."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {f"layer{i}.weight": torch.randn(n, 3, generator=generator) for i, n in enumerate(sizes)}
    return [matrices, {f"layer{i}.bias": torch.randn(n, generator=generator) for i, n in enumerate(sizes)}]


def merged(zero: Zero) -> dict[str, Tensor]:
    return {name: tensor for group in zero.groups for name, tensor in group.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@st.composite
def checkpoints(draw: st.DrawFn) -> Zero:
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes = draw(st.lists(st.lists(shapes, min_size=1, max_size=5), min_size=1, max_size=3))
    made = [
        {f"g{index}.p{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(group)}
        for index, group in enumerate(sizes)
    ]
    stage = draw(st.sampled_from([1, 2, 3]))
    gaps = [[draw(st.integers(0, 3)) for _ in group] for group in made] if stage < 3 and draw(st.booleans()) else None
    frozen = {
        f"frozen{i}": torch.randn(draw(shapes), generator=generator).half() for i in range(draw(st.integers(0, 2)))
    }
    padded = draw(st.booleans())
    return Zero(made, stage, draw(st.integers(1, 6)), torch.bfloat16, padded, gaps, frozen=frozen)


@given(checkpoints())
@SETTINGS
def test_every_element_comes_back(tmp_path: Path, zero: Zero) -> None:
    folder = tmp_path / "step-1"
    shutil.rmtree(folder, ignore_errors=True)
    zero.write(folder)
    assert recognise(folder)
    source = open_source(folder)
    assert source.extra["world_size"] == zero.ranks
    assert_equal(read_all(source), {**merged(zero), **zero.frozen})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_order_ties_buffers_and_frozen(tmp_path: Path, stage: int) -> None:
    made = groups(5, 4, 3)
    frozen = {"frozen": torch.randn(7, 3).bfloat16()}
    buffers = {"positions": torch.arange(5), "running.mean": torch.randn(3).half()}
    tied = {"head.weight": "layer0.weight", "head.frozen": "frozen"}
    zero = Zero(made, stage, 3, frozen=frozen, buffers=buffers, shared=tied)
    folder = zero.write_manifest(zero.write(tmp_path / "step-3"))
    source = open_source(folder)
    assert list(source.tensors) == [*merged(zero), *frozen, *tied, *buffers]
    assert dict(source.aliases) == tied
    assert source.format == "deepspeed"
    assert source.extra["zero_stage"] == stage
    assert source.extra["global_steps"] == 3
    assert source.extra["manifest"]["model"] == {"hidden_size": 4}
    assert {path.name for path in source.files} == {path.name for path in folder.glob("*.pt")}
    assert set(source.digests) == set(source.files)
    expected = {**merged(zero), **frozen, **buffers}
    assert_equal(read_all(source), expected | {alias: expected[name] for alias, name in tied.items()})


def test_frozen_parameters_that_only_the_module_has(tmp_path: Path) -> None:
    """Stage 1 tells no frozen parameters apart; zero_to_fp32 loses them."""
    frozen = {"frozen": torch.randn(3, 2)}
    zero = Zero(groups(2), 1, 2, frozen=frozen, model={"frozen_param_shapes": None, "frozen_param_fragments": None})
    assert_equal(read_all(open_source(zero.write(tmp_path))), merged(zero) | frozen)


def test_a_run_folder_gives_its_newest_valid_checkpoint(tmp_path: Path) -> None:
    parent = tmp_path / "run" / "checkpoints"
    made = {step: Zero(groups(4, 5, seed=step), step=step) for step in (9, 10, 11)}
    for step, zero in made.items():
        zero.write_manifest(zero.write(parent / f"step-{step}"))
    (parent / "latest").write_text("step-9\n", encoding="utf-8")
    for path in (parent, parent.parent):
        assert recognise(path)
        assert open_source(path).folder == parent / "step-11"
    flip(parent / "step-11" / RANK_1)
    source = open_source(tmp_path / "run")
    assert source.folder == parent / "step-10"
    assert "its sha256 is not the manifest's" in source.extra["skipped"][0]
    assert_equal(read_all(source), merged(made[10]))
    assert open_source(tmp_path / "run", verify=False).folder == parent / "step-11"
    with refused("step-11", RANK_1, "sha256", "convert another"):
        open_source(parent / "step-11")
    (parent / "step-10" / "manifest.json").unlink()  # as resume does, a folder that lost it is not trusted
    assert open_source(parent).folder == parent / "step-9"
    (parent / "step-9" / RANK_1).unlink()
    with refused("none of its 2 checkpoints is valid", "step-11"):
        open_source(parent)


def test_deepspeeds_own_folders(tmp_path: Path) -> None:
    for step in (5, 20):
        Zero(groups(3, seed=step), step=step).write(tmp_path / f"global_step{step}")
    assert not recognise(tmp_path), "nothing says which"
    (tmp_path / "latest").write_text("global_step5", encoding="utf-8")
    assert recognise(tmp_path)
    assert open_source(tmp_path).folder == tmp_path / "global_step5"
    (tmp_path / "latest").write_text(f"../{tmp_path.name}/global_step5", encoding="utf-8")
    assert not recognise(tmp_path)


def test_recognise_looks_at_content(tmp_path: Path) -> None:
    assert not recognise(tmp_path / "nothing")
    assert not recognise(tmp_path)
    (tmp_path / MODEL).write_text("not a checkpoint", encoding="utf-8")
    assert not recognise(tmp_path)
    assert not recognise(tmp_path / MODEL)
    with refused(tmp_path, "no checkpoint of DeepSpeed's", "step-N"):
        open_source(tmp_path)


@pytest.mark.parametrize(("flat", "ranks"), [(False, 1), (True, 2)])
def test_universal(tmp_path: Path, flat: bool, ranks: int) -> None:
    buffers, tied = {"buffer": torch.arange(3)}, {"head.weight": "layer0.weight"}
    zero = Zero(groups(4, 3), 3 if flat else 2, ranks, buffers=buffers, shared=tied)
    folder = zero.write(tmp_path / "step-3")
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    for name, tensor in merged(zero).items():
        (folder / "zero" / name).mkdir(parents=True)
        content = tensor.reshape(-1).clone() if flat else {"param": tensor, "cat_dim": 0}
        torch.save(content, folder / "zero" / name / "fp32.pt")
        torch.save(torch.zeros_like(tensor), folder / "zero" / name / "exp_avg.pt")
    (tmp_path / "latest_universal").write_text("step-3", encoding="utf-8")
    assert recognise(tmp_path)
    source = open_source(tmp_path)
    assert source.extra["universal"]
    expected = merged(zero) | buffers
    assert_equal(read_all(source), expected | {"head.weight": expected["layer0.weight"]})
    torch.save(torch.zeros(5), folder / "zero" / "layer1.bias" / "fp32.pt")
    with refused("layer1.bias", "is [5]", "says [3]"):
        open_source(folder)
    shutil.rmtree(folder / "zero" / "layer1.bias")
    with refused("layer1.bias", "is missing", "convert to universal again"):
        open_source(folder)


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(folder: Path, name: str, **changes: Any) -> None:
    """Write one file of another run over that of ``folder``."""
    other = folder.with_name("other")
    given = {"groups": groups(4, 5, 6), "stage": 2, "ranks": 3}
    Zero(**(given | changes)).write(other)
    shutil.copy(other / name, folder / name)
    shutil.rmtree(other)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing rank": (lambda f: (f / RANK_1).unlink(), ("rank 1 is missing", "2 of 3")),
    "missing last": (lambda f: next(f.glob("*rank_2_*")).unlink(), ("rank 2 is missing", "2 of 3")),
    "missing ranks": (lambda f: [p.unlink() for p in f.glob("*optim*")], ("all *_optim_states.pt are missing",)),
    "missing model": (lambda f: (f / MODEL).unlink(), (MODEL, "missing")),
    "truncated": (lambda f: truncate(f / RANK_1), (RANK_1,)),
    "empty": (lambda f: (f / RANK_1).write_bytes(b""), (RANK_1,)),
    "another step": (lambda f: replace(f, RANK_1, step=4), (RANK_1, "different steps")),
    "another number": (lambda f: replace(f, RANK_1, ranks=2), (RANK_1, "written by 2 ranks")),
    "another number in the model": (lambda f: replace(f, MODEL, ranks=4), ("rank 3 is missing", "3 of 4")),
    "fewer in the model": (lambda f: replace(f, MODEL, ranks=2), ("the checkpoint has 2 ranks",)),
    "another model": (lambda f: replace(f, RANK_1, groups=groups(4, 5, 9)), (RANK_1, "elements of group 0")),
    "another model's shapes": (lambda f: replace(f, MODEL, groups=groups(4, 5, 9)), ("elements of group 0",)),
    "smaller model": (lambda f: replace(f, MODEL, groups=groups(4, 5, 2)), ("elements of group 0", "expected")),
    "another precision": (
        lambda f: replace(f, RANK_1, groups=[{k: v.double() for k, v in g.items()} for g in groups(4, 5, 6)]),
        (RANK_1, "precision"),
    ),
    "one group": (lambda f: replace(f, MODEL, groups=groups(4, 5, 6)[:1]), ("2 groups", "has 1")),
    "another stage": (lambda f: replace(f, RANK_1, stage=3), (RANK_1, "another ZeRO stage")),
    "stage 0": (lambda f: replace(f, MODEL, stage=0), (MODEL, "has no param_shapes")),
    "tensor parallel": (lambda f: shutil.copy(f / MODEL, f / MODEL.replace("00", "01")), ("parallel",)),
    "pipeline": (lambda f: shutil.copy(f / MODEL, f / "layer_01-model_00-model_states.pt"), ("parallel",)),
    "twice": (lambda f: shutil.copy(f / RANK_1, f / f"bf16_{RANK_1}"), ("the same rank",)),
    "two groups": (
        lambda f: replace(f, MODEL, groups=[groups(4, 5, 6)[0], groups(4, 5, 6)[0]]),
        ("stands in two groups",),
    ),
    "lost tie": (lambda f: replace(f, MODEL, model={"shared_params": {"a": "b"}}), ("shared_params", "'b'")),
    "circular tie": (lambda f: replace(f, MODEL, model={"shared_params": {"a": "b", "b": "a"}}), ("shared_params",)),
    "no names": (lambda f: replace(f, MODEL, model={"buffer_names": [1]}), ("buffer_names",)),
    "line end": (lambda f: replace(f, MODEL, model={"module": {"a\nb": torch.ones(1)}}), (r"a\nb",)),
    "no module": (lambda f: replace(f, MODEL, model={"module": None}), ("module", "expected a dict")),
    "no dict": (lambda f: torch.save([1], f / MODEL), (MODEL, "holds a list")),
    "no shape": (lambda f: replace(f, MODEL, model={"param_shapes": [{"a": [1.5]}]}), ("param_shapes", "no shape")),
    "absurd shape": (
        lambda f: replace(f, MODEL, model={"param_shapes": [{"a": torch.Size([1 << 40, 4])}]}),
        ("param_shapes", "expected at most"),
    ),
    "negative shape": (
        lambda f: replace(f, MODEL, model={"param_shapes": [{"a": (-4, 4)}]}),
        ("param_shapes", "expected at most"),
    ),
    "frozen": (
        lambda f: replace(f, MODEL, model={"frozen_param_shapes": {"a": torch.Size([4])}}),
        ("frozen 'a'", "lacks"),
    ),
    "small frozen": (
        lambda f: replace(
            f, MODEL, model={"frozen_param_shapes": {"a": (4,)}, "frozen_param_fragments": {"a": torch.ones(3)}}
        ),
        ("frozen 'a'", "lacks 1"),
    ),
    "no vectors": (lambda f: replace(f, RANK_1, rank={"single_partition_of_fp32_groups": [1]}), (RANK_1, "vectors")),
    "matrix": (
        lambda f: replace(f, RANK_1, rank={"single_partition_of_fp32_groups": [torch.ones(4, 4)]}),
        (RANK_1, "vectors"),
    ),
    "no count": (lambda f: replace(f, RANK_1, rank={"partition_count": "3"}), (RANK_1, "partition_count")),
    "gaps": (lambda f: replace(f, RANK_1, rank={"param_alignment_paddings": [[1], [-1]]}), (RANK_1, "paddings")),
    "experts": (lambda f: replace(f, RANK_1, rank={"ds_zero_partition_groups": [{}]}), (RANK_1, "experts")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    change, words = DAMAGE[case]
    folder = Zero(groups(4, 5, 6), 2, 3).write(tmp_path / "step-3")
    read_all(open_source(folder))
    change(folder)
    with refused(*words):
        open_source(folder)


def test_stage_3_damage(tmp_path: Path) -> None:
    folder = Zero(groups(4, 5, 6), 3, 3).write(tmp_path / "step-3")
    read_all(open_source(folder))
    replace(folder, RANK_1, stage=3, groups=groups(4, 5, 9))
    with refused(RANK_1, "elements", "different runs"):
        open_source(folder)
    replace(folder, RANK_1, stage=3)
    replace(folder, f"zero_pp_rank_1_{MODEL}", stage=3, step=4)
    with refused(f"zero_pp_rank_1_{MODEL}", "another step"):
        open_source(folder)
    (folder / f"zero_pp_rank_1_{MODEL}").unlink()
    with refused("rank 1 is missing"):
        open_source(folder)
    (folder / f"zero_pp_rank_2_{MODEL}").unlink()
    with refused("1 *_model_states.pt for 3 ranks"):
        open_source(folder)


def test_the_manifest_is_believed(tmp_path: Path) -> None:
    zero = Zero(groups(4, 5, 6), 2, 3)
    folder = zero.write_manifest(zero.write(tmp_path / "step-3"))
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    for old, new, words in (
        ('"world_size": 3', '"world_size": 4', "world_size 4, the files say 3"),
        ('"zero_stage": 2', '"zero_stage": 1', "zero_stage 1, the files say 2"),
        (f'"{RANK_1}"', '"another.pt"', "missing or not"),
        ("{", "[", "not valid JSON"),
    ):
        (folder / "manifest.json").write_text(text.replace(old, new), encoding="utf-8")
        assert recognise(folder)
        with refused(words, "step-3"):
            open_source(folder)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    truncate(folder / RANK_1)
    for verify in (True, False):
        with refused(RANK_1, "missing or not"):
            open_source(folder, verify)


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    folder = Zero(groups(40, 5, 6), 2, 2).write(tmp_path)
    with open_source(folder) as source:
        source.read("layer0.weight")
        content = (folder / RANK_1).read_bytes()
        (folder / RANK_1).write_bytes(content[: len(content) // 2])
        with refused("changed"):
            for name in source.tensors:
                source.read(name)


def test_more_ranks_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_zero, "_OPEN_FILES", 2)
    zero = Zero(groups(4, 5, 6), 3, 5)
    folder = zero.write(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with open_source(folder) as source:
        assert_equal({name: source.read(name) for name in source.tensors}, merged(zero))
        assert before == 0 or len(os.listdir("/proc/self/fd")) <= before + 2
        path = folder / RANK_1
        path.write_bytes(path.read_bytes())  # of the same bytes, but who knows that
        os.utime(path, ns=(1, 1))
        with refused(RANK_1, "changed"):
            source.read("layer0.weight")


def test_nothing_is_executed(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    for where in ("model", "rank"):
        folder = Zero(groups(3), 2, 2, **{where: {"loss_scaler": Program()}}).write(tmp_path / where)
        with refused("system", "nothing was run"):
            open_source(folder)
    assert not (tmp_path / "executed").exists()


@given(st.data())
@SETTINGS
def test_damaged_bytes_are_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    zero = Zero(groups(3, 4), 2, 2, buffers={"b": torch.arange(4)}, moments=False)
    folder = zero.write(tmp_path / "step-3")
    name = data.draw(st.sampled_from([MODEL, RANK_1]))
    (folder / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    found: dict[str, Tensor] = {}
    with suppress(VlscaleError):
        found = read_all(open_source(folder))
    assert sum(tensor.numel() for tensor in found.values()) <= 1000


READ = """
import sys
from pathlib import Path
class Block:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "deepspeed":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from vlscale.convert.deepspeed_zero import open_source
def count():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
def memory(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) * 1024
for folder in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start, before = count(), memory("VmRSS")
    with open_source(Path(folder), verify=False) as source:
        opened = count() - start
        for name in source.tensors:
            source.read(name)
    print(opened, count() - start, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux and its own /proc")
def test_only_the_weights_bytes_are_read_and_one_tensor_is_held(tmp_path: Path) -> None:
    """The requirement of tests/bench/bench_convert.py in small, and in a process without deepspeed."""
    made = [{f"layer{i}.weight": torch.randn(512, 1024) for i in range(24)}, {"bias": torch.randn(999)}]
    zeros = [Zero(made, stage, 4, torch.bfloat16) for stage in (2, 3)]
    folders = [zero.write_manifest(zero.write(tmp_path / f"stage-{zero.stage}"), hashes=False) for zero in zeros]
    command = [sys.executable, "-c", READ, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    largest, weights = 512 * 1024 * 4, sum(tensor.numel() * 4 for tensor in merged(zeros[0]).values())
    for line in done.stdout.splitlines():
        opened, read, peak = map(int, line.split())
        assert opened < 1 << 20
        assert weights <= read <= weights + (1 << 20)
        # The allocator keeps what one tensor leaves for the next; all weights are 24 times as much.
        assert peak < 2 * largest + (8 << 20) < weights / 4
