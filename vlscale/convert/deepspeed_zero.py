"""The weights in a checkpoint of DeepSpeed's, of any ZeRO stage and any number of ranks, and in a universal one.

A path may name a ``step-N`` folder of vlscale's (its manifest is checked), DeepSpeed's own tag folder, a folder of
those, or a run folder. Of several checkpoints of vlscale's the newest valid one is taken, as on resume. Names are those
of the trained module, so vlscale's begin with ``model.``. Master weights are returned where they exist under names,
which is everywhere but in fp16 at stage 0. Neither DeepSpeed nor its number of processes is needed.

* Partitions: see :mod:`vlscale.convert.zero_layout`.
* Universal: ``zero/<name>/fp32.pt`` holds ``{"param": tensor}``, or, from stage 3, the tensor alone and
  flat, as ``ds_to_universal`` writes them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale.convert.byte_files import ByteFile
from vlscale.convert.source import TensorInfo
from vlscale.convert.torch_files import StoredTensor, TorchFile
from vlscale.convert.zero_folders import MODEL_FILE, RANK_FILE, candidates, choose, is_checkpoint, is_universal, listed
from vlscale.convert.zero_layout import (
    CURE,
    Entry,
    ModelFile,
    Piece,
    RankFile,
    check_ranks,
    each_entries,
    frozen_entries,
    group_entries,
    parse_model,
    parse_rank,
    whole,
)
from vlscale.errors import VlscaleError
from vlscale.train.checkpoint import MANIFEST, Manifest
from vlscale.untrusted import check_count, is_sane_name, shown

FORMAT = "deepspeed"
_OPEN_FILES = 64
_SLAB = 1 << 24


class _Files:
    """Parsed files by path, a bounded number of them open; one that is opened again must be the same still."""

    def __init__(self) -> None:
        self._known: dict[Path, TorchFile] = {}
        self._open: OrderedDict[Path, TorchFile] = OrderedDict()

    def __getitem__(self, path: Path) -> TorchFile:
        if path not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            known = self._known.get(path)
            if known is None:
                known = self._known[path] = TorchFile(path, _CALLS, ["deepspeed"])
            else:
                known.file = ByteFile(path, expected=known.file.stamp)
            self._open[path] = known
        self._open.move_to_end(path)
        return self._open[path]

    def forget_values(self) -> None:
        """Let go of what was parsed; the places of the storages stay."""
        for file in self._known.values():
            file.value = None

    def __iter__(self) -> Iterator[Path]:
        return iter(self._known)

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _stage(number: Any) -> int:
    if type(number) is not int:
        raise ValueError("a ZeRO stage that is no number")
    return number


_CALLS = {("deepspeed.runtime.zero.config", "ZeroStageEnum"): _stage}


class ZeroSource:
    """The tensors of a DeepSpeed checkpoint; see :class:`vlscale.convert.source.TensorSource`.

    Attributes:
        folder: the checkpoint that was chosen.
        digests: file -> sha256 in hex, where they were compared with the manifest.
    """

    format = FORMAT

    def __init__(
        self, path: Path, folder: Path, files: _Files, entries: Mapping[str, Entry], aliases: Mapping[str, str]
    ) -> None:
        self.path, self.folder = path, folder
        self.files = tuple(files)
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in entries.items()}
        self.aliases = aliases
        self.extra: Mapping[str, Any] = {}
        self.digests: Mapping[Path, str] = {}
        self._files, self._entries = files, entries

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, of the stored dtype; only its own bytes are read.

        Raises:
            VlscaleError: a file has been changed since it was opened, or cannot be read.
            KeyError: there is no such tensor.
        """
        entry = self._entries[name]
        where = f"{self.folder}: {shown(name)}"
        if len(entry.pieces) == 1:
            piece = entry.pieces[0]
            return self._files[piece.path].read(where, piece.stored).view(entry.info.shape)
        dtype, place = entry.info.dtype, 0
        flat = torch.empty(sum(piece.numel for piece in entry.pieces), dtype=dtype)
        most = _SLAB // dtype.itemsize
        for piece in entry.pieces:
            file = self._files[piece.path]
            for first in range(0, piece.numel, most):  # so that the tensor stands in memory only once
                part = file.read(where, piece.cut(first, min(most, piece.numel - first)).stored)
                flat[place : place + part.numel()] = part
                place += part.numel()
        return flat.view(entry.info.shape)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> ZeroSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def recognise(path: Path) -> bool:
    """Say whether ``path`` is a DeepSpeed checkpoint, a folder of them, or a run folder of vlscale's."""
    try:
        return path.is_dir() and any(map(is_checkpoint, candidates(path)))
    except OSError:
        return False


def open_source(path: Path, verify: bool = True) -> ZeroSource:
    """Open a checkpoint; names, shapes and places are read.

    Args:
        path: see the module.
        verify: compare the files' hashes with vlscale's manifest, which reads them whole; sizes are compared always.

    Raises:
        VlscaleError: no checkpoint, or none that is valid; files are missing, damaged, or of different runs; a layout
            that is not read here (tensor or pipeline parallel, experts).
    """
    folder, manifest, skipped = choose(path, verify)
    files = _Files()
    try:
        entries, aliases, facts = _universal(folder, files) if is_universal(folder) else _partitioned(folder, files)
        if manifest is not None:
            _check_manifest(folder, manifest, files, facts)
        check_count(folder, len(entries) + len(aliases))
        files.forget_values()
        tensors: dict[str, Entry] = {}
        for name in [*facts.pop("order"), *entries, *aliases]:
            if name in entries or name in aliases:
                target = aliases.get(name, name)
                tensors.setdefault(target, entries[target])  # an alias follows the name that it refers to
                tensors.setdefault(name, entries[target])
        source = ZeroSource(path, folder, files, tensors, aliases)
    except BaseException:
        files.close()
        raise
    source.extra = {**facts, "skipped": skipped, "manifest": None if manifest is None else _facts(manifest)}
    if manifest is not None and verify:
        source.digests = {folder / name: digest for name, (_, digest) in manifest.files.items()}
    return source


def _facts(manifest: Manifest) -> dict[str, Any]:
    names = ("step", "world_size", "zero_stage", "precision", "fingerprint", "recipe", "model")
    return {name: getattr(manifest, name) for name in names}


def _check_manifest(folder: Path, manifest: Manifest, files: _Files, facts: Mapping[str, Any]) -> None:
    stray = next((path for path in files if path.name not in manifest.files), None)
    if stray is not None:
        raise VlscaleError(f"{stray}: the manifest beside it does not name it: a file of another run; {CURE}")
    for what in ("world_size", "zero_stage"):
        if facts[what] is not None and facts[what] != getattr(manifest, what):
            raise VlscaleError(
                f"{folder / MANIFEST}: says {what} {getattr(manifest, what)}, the files say {facts[what]}; {CURE}"
            )


def _models(folder: Path, files: _Files) -> list[ModelFile]:
    models = [parse_model(files[path]) for path in listed(folder, MODEL_FILE, "model_states.pt")]
    for model in models[1:]:
        first = models[0]
        if (model.facts, model.shapes, model.frozen) != (first.facts, first.shapes, first.frozen):
            raise VlscaleError(f"{model.path}: is of another step or run than {first.path.name}; {CURE}")
    return models


def _partitioned(folder: Path, files: _Files) -> tuple[dict[str, Entry], dict[str, str], dict[str, Any]]:
    """Return entries, aliases and facts of a checkpoint as DeepSpeed's engine writes it."""
    models = _models(folder, files)
    if not models:
        raise VlscaleError(f"{folder}: the file of the model, *mp_rank_00_model_states.pt, is missing; {CURE}")
    model = models[0]
    world = model.facts.get("dp_world_size")
    ranks = [parse_rank(files[path]) for path in listed(folder, RANK_FILE, "optim_states.pt", world)]
    if ranks and world is not None and world != len(ranks):
        raise VlscaleError(f"{model.path}: was written by {world} ranks, there are files of {len(ranks)}; {CURE}")
    entries: dict[str, Entry] = {}
    if ranks:
        if model.shapes is None:
            raise VlscaleError(f"{model.path}: has no param_shapes, but there are optimiser files beside it; {CURE}")
        _check_steps(ranks, files)
        check_ranks(model.shapes, ranks)
        if ranks[0].each and len(models) != len(ranks):
            raise VlscaleError(f"{folder}: {len(models)} *_model_states.pt for {len(ranks)} ranks; {CURE}")
        entries = (each_entries if ranks[0].each else group_entries)(model.shapes, ranks)
    elif model.shapes is not None or model.stage:
        raise VlscaleError(f"{folder}: all *_optim_states.pt are missing, which hold the master weights; {CURE}")
    entries |= frozen_entries(models if ranks and ranks[0].each else models[:1])
    stage = 3 if ranks and ranks[0].each else model.stage if ranks else 0
    facts = {**model.facts, "universal": False, "zero_stage": stage, "world_size": world or len(ranks) or None}
    return *_completed(files[model.path], model, entries, cut=stage == 3), {**facts, "order": [*model.module]}


def _completed(
    file: TorchFile, model: ModelFile, entries: dict[str, Entry], cut: bool
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Add what the module holds beside the optimiser's parameters, and find the tied names.

    Args:
        file, model: the model's file.
        entries: parameters that were found.
        cut: the module's parameters are placeholders, only its buffers are whole.
    """
    aliases = dict(model.shared)
    places: dict[Any, str] = {}
    for name, piece in model.module.items():
        if name in entries or name in aliases or (cut and name not in model.buffers):
            continue
        # At stage 0 nothing but the place tells that two names are one tensor; empty ones share a place with others.
        place = file.place(piece.stored)
        if piece.numel and places.setdefault(place, name) != name:
            aliases[name] = places[place]
        else:
            entries[name] = whole(piece)
    lost = next((name for name in aliases.values() if name in aliases or name not in entries), None)
    if lost is not None:
        raise VlscaleError(f"{model.path}: shared_params names {shown(lost)}, which is not stored; {CURE}")
    return entries, aliases


def _check_steps(ranks: list[RankFile], files: _Files) -> None:
    """Compare the optimiser's step counts: the only thing in these files that tells when they were written."""

    def steps(rank: RankFile) -> list[Any]:
        return [
            files[rank.path].read(f"{rank.path}: step", step).item() if type(step) is StoredTensor else step
            for step in rank.steps
        ]

    first = steps(ranks[0])
    for rank in ranks[1:]:
        found = steps(rank)
        if found != first:
            raise VlscaleError(
                f"{rank.path}: is of optimiser step {str(found)[:40]}, {ranks[0].path.name} of {str(first)[:40]}: the "
                f"ranks' files are of different steps; {CURE}"
            )


def _universal(folder: Path, files: _Files) -> tuple[dict[str, Entry], dict[str, str], dict[str, Any]]:
    """Return entries, aliases and facts of a universal checkpoint."""
    models = _models(folder, files)
    entries: dict[str, Entry] = {}
    for path in sorted((folder / "zero").glob("*/fp32.pt")):
        name = path.parent.name
        check_count(folder, len(entries))
        if not is_sane_name(name) or path.is_symlink() or path.parent.is_symlink():
            raise VlscaleError(f"{folder / 'zero'}: {shown(name)} is a link or no name of a parameter; {CURE}")
        tree = files[path].value
        stored = tree.get("param") if type(tree) is dict else tree
        if type(stored) is not StoredTensor:
            raise VlscaleError(f"{path}: has no tensor 'param', expected what ds_to_universal writes; {CURE}")
        files[path].check(f"{path}: param", stored)
        entries[name] = whole(Piece(path, stored))
    facts = {"universal": True, "zero_stage": None, "world_size": None}
    if not models:
        return entries, {}, {**facts, "order": []}
    model = models[0]
    for name, shape in ((name, shape) for group in model.shapes or () for name, shape in group.items()):
        if name not in entries:
            raise VlscaleError(f"{folder / 'zero' / name / 'fp32.pt'}: is missing; convert to universal again")
        found = entries[name].info
        # From stage 3 they are vectors.
        if found.shape not in (shape, (math.prod(shape),)):
            path = entries[name].pieces[0].path
            raise VlscaleError(f"{path}: is {list(found.shape)}, {model.path.name} says {list(shape)}; {CURE}")
        entries[name] = Entry(TensorInfo(found.dtype, shape), entries[name].pieces)
    cut = len(models) > 1 or model.stage == 3
    entries |= frozen_entries(models if cut else models[:1])
    return *_completed(files[model.path], model, entries, cut), {**model.facts, **facts, "order": [*model.module]}
