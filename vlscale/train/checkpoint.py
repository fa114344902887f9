"""Checkpoints that are either whole or not there.

DeepSpeed writes its files one by one and verifies none. Here they go to ``step-N.tmp``; each rank hashes what it wrote;
the main process writes ``manifest.json``, flushes everything to disk and renames the folder to ``step-N``; ``latest``
follows. Loading believes nothing that the manifest's hashes do not confirm, and unpickles no code (weights only).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.errors import VlscaleError
from vlscale.hashing import file_digest
from vlscale.train.engine import Engine
from vlscale.train.processes import Processes

VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
MAX_MANIFEST_BYTES = 64 << 20
_FOLDER = re.compile(r"step-(0|[1-9][0-9]{0,14})", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", re.ASCII)
_RANKED = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]+)_")
_OTHERS = "resume from another checkpoint (--resume FOLDER), or start a new run in another --run_dir"


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says of a checkpoint.

    Attributes:
        step: steps that the plan had cut.
        world_size, zero_stage, precision: of the run that wrote it.
        files: name -> (bytes, sha256 in hex).
        fingerprint: of the plan.
        trainer: the loop's state, as JSON.
        recipe: the resolved recipe, as JSON.
        model: the model's configuration, as JSON.
    """

    step: int
    world_size: int
    zero_stage: int
    precision: str
    files: dict[str, tuple[int, str]]
    fingerprint: str
    trainer: dict[str, Any]
    recipe: dict[str, Any]
    model: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: ``<run>/checkpoints``.
        processes: all of them call every method that saves or loads.
        keep: newest checkpoints that are kept.
        say: prints a line.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int, say: Callable[[str], None]) -> None:
        self.folder, self.keep = folder, keep
        self._processes, self._say = processes, say

    def present(self) -> list[Path]:
        """Checkpoint folders, the newest first, whether valid or not."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def save(self, engine: Engine, step: int, facts: Mapping[str, Any]) -> Path:
        """Write ``step-<step>``.

        Args:
            engine: its state is saved.
            step: steps that the plan has cut.
            facts: the remaining fields of :class:`Manifest`, as JSON types.

        Returns:
            The folder.

        Raises:
            VlscaleError: the disk does not take it.
        """
        final, temporary = self.folder / f"step-{step}", self.folder / f"step-{step}.tmp"
        if self._processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
        self._processes.barrier()
        with self._processes.agreed():
            try:
                engine.save(self.folder, temporary.name)
            except (OSError, RuntimeError) as error:
                raise VlscaleError(f"checkpoint {temporary}: cannot be written ({error})") from None
        with self._processes.agreed():
            mine = self._hash_own(temporary)
        files = {name: entry for part in self._processes.gather(mine) for name, entry in part.items()}
        with self._processes.agreed():
            if self._processes.main:
                manifest = {"version": VERSION, "step": step, "files": files, **facts}
                manifest |= {"world_size": self._processes.world_size, "zero_stage": engine.stage}
                self._publish(temporary, final, manifest)
        return final

    def _hash_own(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Hash and flush the files that this rank wrote: those with its number; all others are the main process's."""
        found = {}
        for path in sorted(folder.iterdir()):
            ranked = _RANKED.match(path.name)
            if (int(ranked[1]) if ranked else 0) == self._processes.rank:
                try:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                    found[path.name] = (path.stat().st_size, file_digest(path, hashlib.sha256))
                except OSError as error:
                    raise VlscaleError(f"checkpoint {path}: cannot be read back ({error.strerror})") from None
        return found

    def _publish(self, temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        try:
            _write(temporary / MANIFEST, json.dumps(manifest, indent=1))
            _flush(temporary)
            old = final.with_name(f"{final.name}.old.tmp")
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            _write(self.folder / f".{LATEST}", final.name + "\n")
            os.replace(self.folder / f".{LATEST}", self.folder / LATEST)
            _flush(self.folder)
        except OSError as error:
            raise VlscaleError(f"checkpoint {final}: cannot be written ({error.strerror}); free some space") from None
        for path in [*self.present()[self.keep :], *self.folder.glob("step-*.tmp")]:
            if path != final:
                shutil.rmtree(path, ignore_errors=True)

    def find(self, resume: str) -> tuple[Path, Manifest] | None:
        """Decide where to start from; the answer is the same in all processes.

        Args:
            resume: ``none``, ``auto`` (the newest valid checkpoint, if any) or a checkpoint folder.

        Returns:
            Folder and manifest, or None to start afresh.

        Raises:
            VlscaleError: the run folder holds checkpoints, but none was asked for or none is valid; or the folder that
                was asked for is not valid.
        """
        with self._processes.agreed():
            found = self.present()
            if resume == "none" and found:
                raise VlscaleError(
                    f"{self.folder} holds checkpoints (newest: {found[0].name}); go on from them with --resume auto, "
                    f"or start a new run in another --run_dir"
                )
            if resume not in ("auto", "none") and found and Path(resume).resolve().parent != self.folder.resolve():
                raise VlscaleError(
                    f"{self.folder} holds checkpoints of another run than {resume}; give another --run_dir"
                )
        if resume not in ("auto", "none"):
            manifest, problem = self._examine(Path(resume))
            self._processes.fail_together(problem)
            assert manifest is not None
            return Path(resume), manifest
        for path in found:
            manifest, problem = self._examine(path)
            problems = [text for text in self._processes.gather(problem) if text is not None]
            if not problems:
                assert manifest is not None
                return path, manifest
            self._say(f"warning: {problems[0]}: trying the one before")
        if found:
            self._processes.fail_together(
                f"{self.folder}: none of the {len(found)} checkpoints is valid; {_OTHERS} (they are left as they are)"
            )
        return None

    def _examine(self, folder: Path) -> tuple[Manifest | None, str | None]:
        """Read a manifest and hash the files that this rank will load; returns it, or what is wrong."""
        try:
            manifest = read_manifest(folder)
            for name, (size, digest) in manifest.files.items():
                path = folder / name
                ranked = _RANKED.match(name)
                if not path.is_file() or path.stat().st_size != size:
                    raise VlscaleError(f"checkpoint {path}: missing or not {size} bytes long")
                # Every file is hashed by one rank; with fewer processes than wrote it, by the main one.
                owner = int(ranked[1]) if ranked else 0
                mine = owner == self._processes.rank or (self._processes.main and owner >= self._processes.world_size)
                if mine and file_digest(path, hashlib.sha256) != digest:
                    raise VlscaleError(f"checkpoint {path}: its sha256 is not the manifest's")
        except OSError as error:
            return None, f"checkpoint {folder}: cannot be read ({error.strerror})"
        except VlscaleError as error:
            return None, str(error)
        return manifest, None

    def load(self, engine: Engine, folder: Path, manifest: Manifest, precision: str, model: Mapping[str, Any]) -> None:
        """Restore the engine from a checkpoint that :meth:`find` returned.

        Raises:
            VlscaleError: it was written by another number of processes, ZeRO stage, precision or model.
        """
        with self._processes.agreed():
            pairs: list[tuple[str, Any, Any]] = [
                ("processes", manifest.world_size, self._processes.world_size),
                ("ZeRO stage", manifest.zero_stage, engine.stage),
                ("precision", manifest.precision, precision),
            ]
            for what, old, new in pairs:
                if old != new:
                    raise VlscaleError(
                        f"checkpoint {folder}: written with {what} {old}, this run has {new}; changing it on resume is "
                        f"not supported yet: start with {old}"
                    )
            for key in {*manifest.model, *model}:
                if manifest.model.get(key) != model.get(key):
                    raise VlscaleError(
                        f"checkpoint {folder}: the model has {key} {manifest.model.get(key)}, the recipe says "
                        f"{model.get(key)}; restore the recipe, or start a new run in another --run_dir"
                    )
        with self._processes.agreed():
            engine.load(folder.parent, folder.name)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; hashes are not compared.

    Raises:
        VlscaleError: it is missing, damaged, or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise VlscaleError(f"checkpoint {path}: more than {MAX_MANIFEST_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VlscaleError(f"checkpoint {path}: cannot be read ({error.strerror}); is this a checkpoint?") from None
    except (ValueError, RecursionError):
        raise VlscaleError(f"checkpoint {path}: not valid JSON") from None
    try:
        if raw["version"] != VERSION:
            raise VlscaleError(f"checkpoint {path}: version {raw['version']}, this vlscale reads {VERSION}")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in raw["files"].items()}
        numbers = [int(raw[key]) for key in ("step", "world_size", "zero_stage")]
        texts = [str(raw[key]) for key in ("precision", "fingerprint")]
        objects = [dict(raw[key]) for key in ("trainer", "recipe", "model")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VlscaleError(f"checkpoint {path}: damaged ({error!r})") from None
    bad = [name for name in files if not _FILE.fullmatch(name) or (folder / name).is_symlink()]
    if bad or not files:
        raise VlscaleError(f"checkpoint {path}: names no file, or one outside its folder: {bad[:1]}")
    return Manifest(numbers[0], numbers[1], numbers[2], texts[0], files, texts[1], *objects)


def recipe_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return ``key: old -> new`` for every value in which two resolved recipes differ."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += recipe_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before} -> {after}")
    return changes


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Flush a folder's own entry list to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
