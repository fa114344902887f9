"""Every mistake that a user can make at launch/pretrain.py ends in one clear line and status 2, never a traceback."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.data.damage import patch
from tests.multiprocess.launcher import ROOT, launch
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe
from vlscale.data.dataset import open_dataset
from vlscale.train.engine import connect
from vlscale.train.environment import choose_accelerator

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    """launch/pretrain.py as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "launch/pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    """A process group of one, which the entry script finds and leaves alone."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.delenv(name, raising=False)
        environment.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        connect(choose_accelerator("cpu"), 60.0)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a recipe and a DeepSpeed JSON without a mistake."""
    root = tmp_path_factory.mktemp("whole")
    write_data(root)
    write_recipe(root / "recipe.yaml", recipe(root, schedule={"warmup_steps": 1, "total_steps": 3}))
    write_ds_config(root / "ds.json", 1)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy to make a mistake in."""
    shutil.copytree(whole, tmp_path / "copy")
    content = (tmp_path / "copy/recipe.yaml").read_text(encoding="utf-8")
    (tmp_path / "copy/recipe.yaml").write_text(content.replace(str(whole), str(tmp_path / "copy")), encoding="utf-8")
    return tmp_path / "copy"


def arguments(root: Path, *more: str) -> list[str]:
    """Command line of a run in ``root``."""
    files = ["--ds_config", str(root / "ds.json"), "--recipe", str(root / "recipe.yaml")]
    return [*files, "--run_dir", str(root / "run"), "--device", "cpu", *more]


def complaint(pretrain: ModuleType, capfd: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Run, expect status 2, and return the one line that was said about it."""
    with pytest.raises(SystemExit) as caught:
        pretrain.main(command)
    assert caught.value.code == 2
    _, said = capfd.readouterr()
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("pretrain: error: ")]
    assert len(lines) == 1, said
    return lines[0]


def test_without_a_mistake_it_trains(pretrain: ModuleType, root: Path) -> None:
    pretrain.main(arguments(root))
    assert (root / "run/model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optimizer.lerning_rate=1", "unknown key 'optimizer.lerning_rate'"),
        ("objectives.wra.los=off", r"objectives\.wra\.los'; did you mean 'loss'\?"),
        ("model.config.hiden_size=32", r"hiden_size.*hidden_size"),
        ("model.config.feature_dim=16", r"feature_dim is 16.* 8"),
        ("model.preset=uniter-bse", r"uniter-bse.*uniter-base"),
        ("objectives.mrm.background_class=999", r"background_class is 999.* 0 to 6"),
        ("model.init_from=/nowhere", "/nowhere"),
        ("data.datasets.0.root=/nowhere", "/nowhere"),
        ("data.max_text_tokens=1", "no text is left with data.max_text_tokens 1"),
        ("batch.micro_batch_tokens=20", r"micro_batch_tokens 20 is smaller than one (example|group)"),
        ("batch.global_batch_examples=6", "not a multiple of objectives.wra.group"),
        ("model.config.max_position_embeddings=8", "max_position_embeddings is 8"),
    ],
)
def test_settings(
    pretrain: ModuleType, capfd: pytest.CaptureFixture[str], root: Path, setting: str, expected: str
) -> None:
    line = complaint(pretrain, capfd, arguments(root, "--set", setting))
    assert re.search(expected, line), line
    assert not list(root.glob("run/checkpoints/step-*"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"zero_optimization": {"stagee": 1}}, "stage"),
        ({"gradient_accumulation_steps": 7, "zero_optimization": {"stage": 1}}, "gradient_accumulation_steps"),
        ({"train_batch_size": 7, "zero_optimization": {"stage": 1}}, "train_batch_size"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "fp16"),
        ({"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 1}}, "optimizer"),
    ],
)
def test_deepspeed_json(
    pretrain: ModuleType, capfd: pytest.CaptureFixture[str], root: Path, settings: dict[str, Any], expected: str
) -> None:
    (root / "ds.json").write_text(json.dumps(settings), encoding="utf-8")
    line = complaint(pretrain, capfd, arguments(root))
    assert "ds.json" in line
    assert expected in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_gpu_where_there_is_none(pretrain: ModuleType, capfd: pytest.CaptureFixture[str], root: Path) -> None:
    assert "a GPU is asked for" in complaint(pretrain, capfd, [*arguments(root), "--device", "gpu"])


def test_a_json_that_belongs_to_no_recipe(pretrain: ModuleType, capfd: pytest.CaptureFixture[str], root: Path) -> None:
    command = ["--ds_config", str(root / "ds.json"), "--run_dir", str(root / "run")]
    assert "uniter_base" in complaint(pretrain, capfd, command)


def drop_shard(root: Path) -> None:
    (root / "train/images/shard.00001.mds").unlink()


def rename_shard(root: Path) -> None:
    shard = root / "train/images/shard.00001.mds"
    shard.rename(shard.with_name("shard.99999.mds"))


def truncate_shard(root: Path) -> None:
    shard = root / "train/texts/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-7])


def flip_byte(root: Path) -> None:
    shard = root / "train/images/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)


def point_outside(root: Path) -> None:
    path = root / "train/images/index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["raw_data"]["basename"] = "../../secret"
    path.write_text(json.dumps(index))


def forget_lengths(root: Path) -> None:
    (root / "train/texts/lengths.npy").unlink()


def no_tokens(root: Path) -> None:
    path = root / "train/texts/lengths.npy"
    lengths = np.load(path)
    lengths[3] = 0
    np.save(path, lengths)


def no_regions(root: Path) -> None:
    path = root / "train/images/lengths.npy"
    counts = np.load(path)
    counts[2] = 0
    np.save(path, counts)


def every_image(root: Path, column: str, value: bytes) -> None:
    dataset = open_dataset("toy", root / "train")
    for row in range(len(dataset.images)):
        patch(root / "train/images", dataset.images._reader, row, column, -len(value), value)
        dataset = open_dataset("toy", root / "train")


def nan_features(root: Path) -> None:
    every_image(root, "features", np.float16("nan").tobytes())


def wild_boxes(root: Path) -> None:
    every_image(root, "boxes", np.float32(1.5).tobytes())


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_shard, "shard.00001.mds"),
        (rename_shard, "shard.00001.mds"),
        (truncate_shard, "shard.00000.mds"),
        (flip_byte, "shard.00000.mds"),
        (point_outside, "secret"),
        (forget_lengths, "lengths.npy"),
        (no_tokens, "text"),
        (no_regions, "image"),
        (nan_features, "row"),
        (wild_boxes, "row"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_stores(
    pretrain: ModuleType, capfd: pytest.CaptureFixture[str], root: Path, damage: Edit, expected: str
) -> None:
    damage(root)
    line = complaint(pretrain, capfd, arguments(root))
    assert expected in line
    assert str(root) in line or "dataset toy" in line


def test_a_changed_data_set_on_resume(pretrain: ModuleType, capfd: pytest.CaptureFixture[str], root: Path) -> None:
    pretrain.main(arguments(root))
    capfd.readouterr()
    assert "--resume auto" in complaint(pretrain, capfd, arguments(root))
    shutil.rmtree(root / "train")
    shutil.copytree(root / "val", root / "train")
    line = complaint(pretrain, capfd, arguments(root, "--resume", "auto", "--set", "schedule.total_steps=5"))
    assert "toy" in line


@pytest.mark.multiprocess
def test_more_processes_than_examples(root: Path) -> None:
    done = launch("launch/pretrain.py", *arguments(root, "--set", "batch.global_batch_examples=4"), processes=2)
    assert done.status != 0
    assert "more processes than examples in a step" in done.err, done.tail
    assert "Traceback" not in done.out + done.err, done.tail
