"""The run folder: what was used, exactly, and what came of it.

recipe.yaml       the recipe with every default filled in
ds_config.json    the DeepSpeed configuration with every number filled in
provenance.json   versions, commit, machine, command line and plan fingerprint, one entry per start
train.log         what was printed
metrics.jsonl     one row of scalars per logging interval and evaluation
tensorboard/      the same for TensorBoard
checkpoints/      step-N, to go on from
model/            config.json and model.safetensors, to use
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import vlscale
from vlscale.config import Recipe, resolved
from vlscale.errors import VlscaleError

_PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "safetensors", "tokenizers", "huggingface_hub")
_SECRET = re.compile(r"(token(?!s)|secret|password|passwd|credential|api_?key|access_?key)", re.IGNORECASE)


class RunFolder:
    """Paths inside a run folder, and the files that describe the run.

    Args:
        path: the folder; it is created.

    Raises:
        VlscaleError: the folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.log = path / "train.log"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VlscaleError(
                f"run folder {path}: cannot be created ({error.strerror}); give another --run_dir"
            ) from None

    def describe(self, recipe: Recipe, ds_config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write both configurations and add an entry to provenance.json; for the main process.

        Args:
            recipe: as resolved.
            ds_config: as resolved.
            facts: of this start: world size, accumulation, plan fingerprint, step it starts from.
        """
        _replace(self.path / "recipe.yaml", yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True))
        _replace(self.path / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        path = self.path / "provenance.json"
        entry = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts, **provenance(sys.argv)}
        _replace(path, json.dumps({"starts": [*_starts(path), entry]}, indent=2) + "\n")


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """Return what ran where: versions, git commit, machine, command line without secrets."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": hide_secrets(command),
        "vlscale": vlscale.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def hide_secrets(command: Sequence[str]) -> list[str]:
    """Return the command line with the values of options that look like secrets replaced."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, separator, _ = word.partition("=")
        if hide_next:
            shown.append("...")
        elif separator and _SECRET.search(name):
            shown.append(f"{name}=...")
        else:
            shown.append(word)
        hide_next = not separator and word.startswith("--") and bool(_SECRET.search(word))
    return shown


def commit() -> str | None:
    """Commit of the source tree, with ``+changes`` if it was changed since; None outside a git work tree."""
    here = Path(vlscale.__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parent:
            return None  # installed inside somebody else's work tree
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _starts(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) else []


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
