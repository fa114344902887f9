"""What a conversion can write. Each writer streams tensor by tensor into a path of its own, which is renamed after."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlscale.convert import uniter
from vlscale.convert.fluid import write_fluid
from vlscale.convert.layouts import BACKBONES, STATE_DICT
from vlscale.convert.model_card import model_card
from vlscale.convert.report import Report
from vlscale.convert.safetensors_files import write_safetensors
from vlscale.convert.source import TensorSource
from vlscale.convert.task_heads import TASK_HEAD
from vlscale.convert.torch_writer import write_torch
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, PROVENANCE_FILE, TASK_HEAD_FILE, WEIGHTS_FILE, describe
from vlscale.models.registry import ModelConfig
from vlscale.models.unimo_config import UnimoConfig
from vlscale.models.uniter import UniterConfig

PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Target:
    """A form that weights are written in.

    Attributes:
        title: for people.
        layouts: of sources that can become it; empty: any.
        folder: it is always one.
        models: the models of vlscale that it is a form of; their names are checked against their configurations.
            Published names that are kept as they are may become it too, if ``layouts`` has theirs.
        write: (path that does not exist, tensors, configuration, report) -> None.
    """

    title: str
    layouts: tuple[str, ...]
    folder: bool
    models: tuple[str, ...]
    write: Callable[[Path, TensorSource, ModelConfig | None, Report], None]


def write_vlscale(path: Path, source: TensorSource, config: ModelConfig | None, report: Report) -> None:
    """A folder for ``from_pretrained``: config.json, model.safetensors (in shards above 5 GB), the task head apart."""
    assert config is not None
    names = [name for name in source.tensors if name not in source.aliases]
    head = [name for name in names if name.startswith(TASK_HEAD)]
    _write_safetensors(path, source, [name for name in names if name not in {*head}])
    if head:
        aside = path / ".head"
        _write_safetensors(aside, source, head)
        (aside / WEIGHTS_FILE).rename(path / TASK_HEAD_FILE)
        aside.rmdir()
    (path / CONFIG_FILE).write_text(describe(config), encoding="utf-8")
    told = {"source": Path(report.source).name, "files": report.source_files, **report.provenance}
    (path / PROVENANCE_FILE).write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")


def write_hub(path: Path, source: TensorSource, config: ModelConfig | None, report: Report) -> None:
    """The same with a model card, and what transformers' Auto classes look for."""
    assert config is not None
    write_vlscale(path, source, config, report)
    name = "UnimoForPretraining" if isinstance(config, UnimoConfig) else "UniterForPretraining"
    raw = json.loads(describe(config)) | {"architectures": [name]}
    (path / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    (path / "README.md").write_text(model_card(config, report), encoding="utf-8")


def write_uniter(path: Path, source: TensorSource, config: ModelConfig | None, report: Report) -> None:
    """The authors' flat ``.pt``; a folder (model.pt and config.json) where the name has no such ending."""
    assert isinstance(config, UniterConfig)
    if path.suffix in PICKLED:
        _write_torch(path, source)
        return
    path.mkdir()
    _write_torch(path / "model.pt", source)
    raw = uniter.config_to_official(config)
    (path / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_state_dict(path: Path, source: TensorSource, config: ModelConfig | None, report: Report) -> None:
    """One ``.pt`` or ``.safetensors`` file, by its ending; a folder of safetensors without one."""
    if path.suffix in PICKLED:
        _write_torch(path, source)
        return
    names = [name for name in source.tensors if name not in source.aliases]  # safetensors share nothing
    report.ignored |= {second: f"the same tensor as {first}" for second, first in source.aliases.items()}
    if path.suffix != ".safetensors":
        _write_safetensors(path, source, names)
        return
    aside = path.with_name(f"{path.name}.folder")
    _write_safetensors(aside, source, names, most=1 << 62)
    (aside / WEIGHTS_FILE).rename(path)
    aside.rmdir()


def write_unimo(path: Path, source: TensorSource, config: ModelConfig | None, report: Report) -> None:
    """A folder of Paddle fluid's variables, one file each."""
    names = [*source.tensors]
    write_fluid(path, ((name, source.tensors[name]) for name in names), source.read)


def write_paddle(path: Path, source: TensorSource, config: ModelConfig | None, report: Report) -> None:
    """PaddleNLP's one file, ``.pdparams``: a pickled dict of NumPy arrays. All of it is in memory at a time."""
    if path.suffix != ".pdparams":
        write_state_dict(path, source, config, report)
        return
    lacking = [name for name, info in source.tensors.items() if info.dtype == torch.bfloat16]
    if lacking:
        raise VlscaleError(f"{lacking[0]} is bf16, which NumPy has not; take --dtype fp32 or fp16")
    with path.open("wb") as file:
        pickle.dump({name: source.read(name).numpy() for name in source.tensors}, file, protocol=4)


BERTS = ("bert", "roberta")
UNIMOS = ("unimo", "unimo-text")
OURS = ("vlscale", "uniter", *UNIMOS, *BERTS)
_BOTH = ("uniter", "unimo")
TARGETS: dict[str, Target] = {
    "vlscale": Target("a folder for from_pretrained and init_from", OURS, True, _BOTH, write_vlscale),
    "hub": Target("the same with a model card, ready for the Hugging Face hub", OURS, True, _BOTH, write_hub),
    "uniter": Target("UNITER's published names, .pt", ("vlscale", "uniter", *BERTS), False, ("uniter",), write_uniter),
    "unimo": Target(
        "a folder of Paddle fluid's variables", ("vlscale", "unimo", *BERTS), True, ("unimo",), write_unimo
    ),
    "unimo-text": Target(
        "PaddleNLP's names for text models, .pdparams", ("vlscale", "unimo-text"), False, ("unimo",), write_paddle
    ),
    "vilbert": Target("ViLBERT's published names, .pt", ("vilbert", *BERTS), False, (), write_state_dict),
    "unit": Target("UniT's published names, .pt", ("unit", *BERTS, *BACKBONES), False, (), write_state_dict),
    STATE_DICT: Target("the names as they are, .pt or .safetensors", (), False, (), write_state_dict),
}
AS_PUBLISHED = (*UNIMOS, STATE_DICT)
"""Targets that take UNIMO's published names as they are."""


def _write_safetensors(folder: Path, source: TensorSource, names: list[str], most: int = 5 * 10**9) -> None:
    write_safetensors(folder, ((name, source.tensors[name]) for name in names), source.read, most, {"format": "pt"})


def _write_torch(path: Path, source: TensorSource) -> None:
    def items() -> Any:
        for name in [*(n for n in source.tensors if n not in source.aliases), *source.aliases]:
            yield name, source.aliases.get(name) or source.read(name)

    write_torch(path, items())
