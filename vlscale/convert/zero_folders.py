"""Which folder is meant, and which of DeepSpeed's files it holds; nothing of their contents but a magic number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlscale.convert.zero_layout import CURE
from vlscale.errors import VlscaleError
from vlscale.train.checkpoint import MANIFEST, Checkpoints, Manifest, read_manifest
from vlscale.train.processes import Processes
from vlscale.untrusted import is_file_name, shown

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{2,5})_model_states\.pt", re.ASCII)
"""At stage 3 there is one for each rank, else one."""
RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{2,5})_optim_states\.pt", re.ASCII)
_TAGS = ("latest", "latest_universal")
_MOST_TAG = 1024
_MAGIC = b"PK\x03\x04"


class _Alone(Processes):
    """The one process of a conversion, for the functions that resume uses."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"))

    def total(self, values: Any) -> list[float]:
        return list(values)

    def gather(self, item: Any) -> list[Any]:
        return [item]

    def fail_together(self, message: str | None) -> None:
        if message is not None:
            raise VlscaleError(message)


def choose(path: Path, verify: bool) -> tuple[Path, Manifest | None, list[str]]:
    """Return the checkpoint that ``path`` names, its manifest, and why newer ones were not taken.

    Args:
        path: a checkpoint, a folder of them, or a run folder.
        verify: compare hashes with the manifest, not only sizes.

    Raises:
        VlscaleError: there is none, or none that is valid.
    """
    try:
        found = list(dict.fromkeys(candidates(path)))
        marked = [folder for folder in found if (folder / MANIFEST).is_file()]
        others = [folder for folder in found if folder not in marked and is_checkpoint(folder)]
        others.sort(key=lambda folder: folder != path and folder.name not in _tags(folder.parent))
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    skipped: list[str] = []
    for folder in marked if path not in others else []:
        try:
            return folder, _examine(folder, verify), skipped
        except VlscaleError as error:
            if folder == path:
                raise VlscaleError(f"{error}; {CURE}") from None
            skipped.append(str(error))
    if skipped:
        raise VlscaleError(f"{path}: none of its {len(skipped)} checkpoints is valid ({skipped[0]}); {CURE}")
    if others:  # a folder without a manifest beside others that have one is what is left of a damaged one
        return others[0], None, skipped
    raise VlscaleError(
        f"{path}: holds no checkpoint of DeepSpeed's (*_model_states.pt, *_optim_states.pt or zero/*/fp32.pt); give a "
        f"step-N folder or a run folder"
    )


def _examine(folder: Path, verify: bool) -> Manifest:
    """Check a folder against its manifest, with the function that resume uses."""
    if verify:
        found = Checkpoints(folder.parent, _Alone(), 1, _ignore).find(str(folder))
        assert found is not None
        return found[1]
    manifest = read_manifest(folder)
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise VlscaleError(f"checkpoint {path}: missing or not {size} bytes long")
    return manifest


def candidates(path: Path) -> Iterator[Path]:
    """Yield the folders that may be checkpoints: the path itself, or what lies in it or its ``checkpoints``."""
    yield path
    for parent in (path, path / "checkpoints"):
        yield from Checkpoints(parent, _Alone(), 1, _ignore).present()
        for tag in _tags(parent):
            yield parent / tag


def _ignore(line: str) -> None:
    pass


def _tags(parent: Path) -> list[str]:
    """Return what DeepSpeed's ``latest`` files name; a name that is a path is left."""
    found = []
    for name in _TAGS:
        file = parent / name
        if file.is_file() and file.stat().st_size <= _MOST_TAG:
            tag = file.read_text(encoding="utf-8", errors="replace").strip()
            if is_file_name(tag) and (parent / tag).is_dir() and tag not in found:
                found.append(tag)
    return found


def is_universal(folder: Path) -> bool:
    """Say whether a folder holds what ``ds_to_universal`` writes."""
    return next((folder / "zero").glob("*/fp32.pt"), None) is not None


def is_checkpoint(folder: Path) -> bool:
    """Say whether a folder holds a file of DeepSpeed's that is an archive, or a manifest that names one."""
    if not folder.is_dir():
        return False
    names = [path for path in folder.iterdir() if MODEL_FILE.fullmatch(path.name) or RANK_FILE.fullmatch(path.name)]
    for path in [*names, *(folder / "zero").glob("*/fp32.pt")]:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_MAGIC)) == _MAGIC:
                    return True
    try:
        return any(MODEL_FILE.fullmatch(name) for name in read_manifest(folder).files)
    except VlscaleError:
        return False


def listed(folder: Path, pattern: re.Pattern[str], suffix: str, ranks: Any = None) -> list[Path]:
    """Return a folder's files of one kind by rank; a model file without a rank is that of rank 0.

    Args:
        folder: a checkpoint.
        pattern: :data:`MODEL_FILE` or :data:`RANK_FILE`.
        suffix: that such files have.
        ranks: how many there have to be if there is any, where that is known.

    Raises:
        VlscaleError: files of a parallelism that is not read here, two of one rank, or one missing.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        match = pattern.fullmatch(path.name)
        if match is None or int(match[2]):
            what = "is of tensor, pipeline or expert parallel training; only ZeRO is read here"
            raise VlscaleError(f"{folder}: {shown(path.name)} {what}")
        rank = int(match[1] or 0)
        if rank in found:
            raise VlscaleError(f"{path}: {found[rank].name} is of the same rank: two runs in one folder; {CURE}")
        found[rank] = path
    count = ranks if type(ranks) is int and found else len(found)
    gap = next((rank for rank in range(count) if rank not in found), None)
    if gap is not None:
        raise VlscaleError(
            f"{folder}: the *{suffix} of rank {gap} is missing: {len(found)} of {count} are there; {CURE}"
        )
    if len(found) > count:
        raise VlscaleError(f"{found[max(found)]}: the checkpoint has {count} ranks: a file of another run; {CURE}")
    return [path for _, path in sorted(found.items())]
