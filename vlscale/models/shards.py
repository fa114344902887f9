"""The index of weights in several files, as the Hugging Face hub has it: which file holds which tensor.

It stands beside the files, is JSON, and is read here for every kind of them; what a file holds, its own reader says.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.errors import VlscaleError
from vlscale.untrusted import check_count, is_file_name, is_sane_name, shown, strict_json

MOST_INDEX = 100_000_000
"""Bytes of an index."""
MOST_SHARDS = 1000
_MOST_OBJECTS = 100


@dataclass(frozen=True)
class ShardIndex:
    """What an index says; nothing of it has been compared with the files yet.

    Attributes:
        path: of the index.
        names_of: file of the same folder -> names of its tensors; sorted by file.
        metadata: the index's own remarks.
    """

    path: Path
    names_of: Mapping[str, frozenset[str]]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards, sorted."""
        return tuple(self.path.parent / shard for shard in self.names_of)

    def check_shard(self, file: Path, found: Collection[str]) -> None:
        """Compare the names of the tensors that one of :attr:`files` holds with those that it should.

        Raises:
            VlscaleError: it lacks one, or holds one that the index does not put there.
        """
        names = self.names_of[file.name]
        lacks, more = names - {*found}, {*found} - names
        if lacks or more:
            problem = f"lacks {shown(min(lacks))}" if lacks else f"holds {shown(min(more))}"
            says = "stands there" if lacks else "does not stand there"
            raise VlscaleError(f"{file}: {problem}, which {says} by {self.path.name}; fetch all files of one release")


def read_index(path: Path, suffix: str) -> ShardIndex:
    """Read an index, whoever wrote it.

    Args:
        path: the index.
        suffix: of its shards, for example ``.safetensors``.

    Raises:
        VlscaleError: it is missing, too large or damaged, or names something else than files of its own folder.
    """
    found = strict_json(str(path), _content(path), _MOST_OBJECTS)
    shard_of = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise VlscaleError(f"{path}: has no weight_map of tensor names to files; fetch it again")
    check_count(path, len(shard_of))
    names_of: dict[str, set[str]] = {}
    for name, shard in shard_of.items():
        if not is_sane_name(name) or name == "__metadata__":
            raise VlscaleError(f"{path}: {shown(name)} is no name of a tensor; the file is damaged or hostile")
        if not isinstance(shard, str) or not is_file_name(shard) or not shard.endswith(suffix):
            raise VlscaleError(
                f"{path}: puts {shown(name)} into {shown(str(shard))}, expected a {suffix} file of this folder"
            )
        names_of.setdefault(shard, set()).add(name)
    if len(names_of) > MOST_SHARDS:
        raise VlscaleError(f"{path}: names {len(names_of)} shards, expected at most {MOST_SHARDS}; join them first")
    metadata = found.get("metadata", {})
    if not isinstance(metadata, dict):
        raise VlscaleError(f"{path}: its metadata is no object; fetch it again")
    return ShardIndex(path, {shard: frozenset(names_of[shard]) for shard in sorted(names_of)}, metadata)


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would make open() wait for ever
            raise VlscaleError(f"{path}: no such file, or not a plain one; give a folder that holds {path.name}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_INDEX:
                raise VlscaleError(f"{path}: has {size} bytes, expected at most {MOST_INDEX}; this is no index")
            return file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise VlscaleError(f"{path}: cannot be read ({error}); check the path and its permissions") from None
