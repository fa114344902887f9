"""Paddle fluid persistables, the form of the official UNIMO weights: read from a folder, a tar or a combined file.

``save_params`` and ``save_persistables`` write a LoDTensor record (:mod:`vlscale.convert.lod_tensor`) for each
variable: into a file of the variable's name, or, given a ``filename``, all into one file in sorted order and without
names, so that such a file needs the list of names beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from vlscale.convert.byte_files import ByteFile, FreshFiles, Stamp, write_tensor
from vlscale.convert.lod_tensor import Record, read_record, record_head, starts_record
from vlscale.convert.source import TensorInfo
from vlscale.convert.tar_members import (
    BLOCK,
    MOST_UNPACKED,
    TarMember,
    first_bytes,
    is_gzip,
    is_tar,
    list_members,
    open_tar,
    walk_members,
)
from vlscale.errors import VlscaleError
from vlscale.untrusted import check_count, is_file_name, is_sane_name, shown, strict_json

FORMAT = "fluid"
MOST_LOD_NUMBERS = 1_000_000
"""Of all variables together."""
_MOST_LIST = 64 << 20
_GLANCE = 1 << 16
_MOST_GLANCES = 100
# What lies beside variables in released folders and is none: a program, texts, what file managers leave.
_OTHER_NAMES = frozenset({"__model__", "README", "LICENSE"})
_OTHER_ENDS = (".json", ".md", ".txt", ".yaml", ".yml", ".log", ".sh", ".py", ".sha256", ".md5")
_OF_PARAMETER = re.compile(
    r"(.+?)(?:_(?:moment[12]?|beta[12]_pow_acc|inf_norm|velocity|momentum|mean_square|mean_grad)_\d+|\.master)"
)
_OF_RUN = re.compile(
    r"@LR_DECAY_COUNTER@|(?:(?:scheduled_)?learning_rate|loss_scaling|(?:num_)?(?:good|bad)_steps)(?:_\d+)?|"
    r"duplicated_trigram_blocking(?:_.+)?"
)


def is_optimizer_variable(name: str, names: Collection[str]) -> bool:
    """Say whether a variable is state of training or of decoding, and no weight of the model.

    That is: an accumulator of an optimiser (``X_moment1_0``, ``X_beta1_pow_acc_0``, ...) or a float32 copy
    (``X.master``, which has accumulators itself) of a variable ``X`` that is there; the schedule's counter and rate;
    the loss scale and its counters; the constant of trigram blocking.

    Args:
        name: of the variable.
        names: of all variables; give a set or a mapping, it is asked once.
    """
    match = _OF_PARAMETER.fullmatch(name)
    return (match is not None and match[1] in names) or _OF_RUN.fullmatch(name) is not None


@dataclass(frozen=True)
class _Place:
    """Where a variable lies; ``path`` and ``stamp`` are None in the one file that stays open."""

    record: Record
    path: Path | None = None
    stamp: Stamp | None = None


class FluidSource:
    """A :class:`vlscale.convert.source.TensorSource`.

    ``extra`` holds ``lod`` (variable -> offsets of each level, for those that have any) and ``other_files`` (names of
    what lies beside the variables and has been passed over). The files of a folder are opened for each tensor anew.
    """

    format = FORMAT
    aliases: Mapping[str, str] = {}

    def __init__(
        self,
        path: Path,
        files: tuple[Path, ...],
        places: Mapping[str, _Place],
        other_files: Sequence[str],
        opened: ByteFile | None,
    ) -> None:
        self.path = path
        self.files = files
        self.tensors: Mapping[str, TensorInfo] = {name: place.record.info for name, place in places.items()}
        lod = {name: [list(level) for level in p.record.levels] for name, p in places.items() if p.record.levels}
        if sum(len(level) for levels in lod.values() for level in levels) > MOST_LOD_NUMBERS:
            raise VlscaleError(
                f"{path}: has more than {MOST_LOD_NUMBERS} LoD offsets; this is no checkpoint of a model"
            )
        self.extra: Mapping[str, Any] = {"lod": lod, "other_files": sorted(other_files)}
        self._places = places
        self._opened = opened

    def read(self, name: str) -> Tensor:
        """Return a variable on the CPU; only its own bytes are read.

        Raises:
            VlscaleError: the file is damaged, or has been changed since it was opened.
        """
        place = self._places[name]
        where, record = f"{self.path}: variable {shown(name)}", place.record
        if place.path is None:
            assert self._opened is not None
            return self._opened.tensor(where, record.info, record.begin)
        with ByteFile(place.path, expected=place.stamp) as file:
            return file.tensor(where, record.info, record.begin)

    def __enter__(self) -> FluidSource:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the archive; an unpacked copy vanishes."""
        if self._opened is not None:
            self._opened.close()


def recognise(path: Path) -> bool:
    """Say whether a folder, a tar (packed or not) or a file holds LoDTensor records, by the first few it finds."""
    try:
        if path.is_dir():
            return _recognise_folder(path)
        head = first_bytes(path, _GLANCE)
        if is_tar(head[:BLOCK]):
            return _recognise_tar(path, head)
        with ByteFile(path) as file:
            return not is_gzip(file.read(str(path), 0, min(3, file.size))) and starts_record(head, file.size)
    except (VlscaleError, OSError):
        return False


def _recognise_folder(path: Path) -> bool:
    asked = 0
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_other(entry.name) or not entry.is_file():
                continue
            with ByteFile(Path(entry.path)) as file:
                if starts_record(file.read(entry.path, 0, min(_GLANCE, file.size)), file.size, whole=True):
                    return True
            asked += 1
            if asked == _MOST_GLANCES:
                break
    return False


class _Glance:
    """The first bytes of an archive whose end is not known; for :func:`walk_members`."""

    size = 1 << 62

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, where: str, begin: int, count: int) -> bytes:
        if begin + count > len(self._content):
            raise VlscaleError(f"{where}: no variable among its first bytes")
        return self._content[begin : begin + count]


def _recognise_tar(path: Path, head: bytes) -> bool:
    for member in walk_members(path, _Glance(head)):
        if not _is_other(member.name.rpartition("/")[2]):
            return starts_record(head[member.begin : member.begin + member.size], member.size, whole=True)
    return False


def _is_other(file_name: str) -> bool:
    return file_name.startswith(".") or file_name in _OTHER_NAMES or file_name.lower().endswith(_OTHER_ENDS)


def open_source(path: Path, names: Iterable[str] | None = None, most: int = MOST_UNPACKED) -> FluidSource:
    """Read the heads of all variables of a folder, a tar, a tar.gz or a combined file.

    Args:
        path: the folder or file.
        names: of the variables of a combined file, in any order. Left out, they are read from the JSON list
            ``PATH.order.json`` or, without the path's ending, ``STEM.order.json`` beside it, which must be sorted.
        most: bytes that a packed tar may yield, see :func:`vlscale.convert.tar_members.open_tar`.

    Raises:
        VlscaleError: what cannot be read, is damaged, has variables whose name is no plain file name, holds none, or
            names that do not fit the combined file.
    """
    if path.is_dir():
        return _open_folder(path)
    if is_tar(first_bytes(path, BLOCK)):
        return _open_archive(path, most)
    with ByteFile(path) as file:
        head = file.read(str(path), 0, min(8, file.size))
    if is_gzip(head):
        raise VlscaleError(f"{path}: is gzip, but no tar is in it; give a folder, a tar(.gz) or a combined file")
    return _open_combined(path, names)


def _open_folder(path: Path) -> FluidSource:
    places: dict[str, _Place] = {}
    other: list[str] = []
    for name in _folder_names(path):
        if _is_other(name) or (path / name).is_dir():
            other.append(name if is_sane_name(name) else shown(name))
            continue
        where = f"{path}: variable {shown(name)}"
        _check_name(where, name)
        with ByteFile(path / name) as file:
            places[name] = _Place(_whole_record(where, file, 0, file.size), path / name, file.stamp)
    if not places:
        raise VlscaleError(f"{path}: holds no variables; give the folder with one file per variable")
    return FluidSource(path, tuple(path / name for name in places), places, other, None)


def _folder_names(path: Path) -> list[str]:
    names: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                names.append(entry.name)
                check_count(path, len(names))
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return sorted(names)


def _check_name(where: str, name: str) -> None:
    if not is_file_name(name) or _is_other(name):
        raise VlscaleError(f"{where}: is no plain file name that a variable can have; rename it")


def _whole_record(where: str, file: ByteFile, begin: int, end: int) -> Record:
    record = read_record(where, file, begin, end)
    if record.end != end:
        raise VlscaleError(
            f"{where}: {end - record.end} bytes follow its elements ({record.info.dtype} {list(record.info.shape)}); "
            "a combined file needs the list of its names, else it is damaged"
        )
    return record


def _open_archive(path: Path, most: int) -> FluidSource:
    file = open_tar(path, most)
    try:
        members: dict[str, TarMember] = {}
        other: list[str] = []
        folders: set[str] = set()
        for member in list_members(path, file):
            folder, _, name = member.name.rpartition("/")
            if _is_other(name):
                other.append(member.name)
                continue
            folders.add(folder)
            members[name] = member
        if len(folders) != 1:
            found = f"variables in {', '.join(shown(name) for name in sorted(folders)[:4])}" if folders else "none"
            raise VlscaleError(f"{path}: expected the variables of one folder, found {found}; unpack it and name one")
        check_count(path, len(members))
        places = {}
        for name, member in members.items():
            where = f"{path}: variable {shown(name)}"
            _check_name(where, name)
            places[name] = _Place(_whole_record(where, file, member.begin, member.begin + member.size))
        return FluidSource(path, (path,), places, other, file)
    except BaseException:
        file.close()
        raise


def _open_combined(path: Path, names: Iterable[str] | None) -> FluidSource:
    files: tuple[Path, ...] = (path,)
    if names is None:
        listed, beside = _read_list(path)
        files = (path, beside)
    else:
        listed = sorted(names)
    check_count(path, len(listed))
    file = ByteFile(path)
    try:
        places: dict[str, _Place] = {}
        position = 0
        for name in listed:
            where = f"{path}: variable {shown(name)}"
            if not is_sane_name(name) or name in places:
                raise VlscaleError(f"{where}: is listed twice, or is no name; mend the list of names")
            if position == file.size:
                raise VlscaleError(f"{where}: the file has ended after {len(places)} of {len(listed)}; mend the list")
            record = read_record(where, file, position, file.size)
            places[name] = _Place(record)
            position = record.end
        if position != file.size:
            raise VlscaleError(f"{path}: {file.size - position} bytes follow {len(listed)} variables; mend the list")
        return FluidSource(path, files, places, (), file)
    except BaseException:
        file.close()
        raise


def _read_list(path: Path) -> tuple[list[str], Path]:
    stem = path.name.rpartition(".")[0] or path.name
    tried = [path.with_name(f"{path.name}.order.json"), path.with_name(f"{stem}.order.json")]
    beside = next((candidate for candidate in tried if candidate.is_file()), None)
    if beside is None:
        raise VlscaleError(
            f"{path}: a combined file has no names; put the JSON list of its variables beside it as {tried[1].name}"
        )
    with ByteFile(beside) as file:
        if file.size > _MOST_LIST:
            raise VlscaleError(
                f"{beside}: has {file.size} bytes, expected at most {_MOST_LIST}; this is no list of names"
            )
        listed = strict_json(str(beside), file.read(str(beside), 0, file.size), 1)
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise VlscaleError(f"{beside}: expected a JSON list of the variables' names")
    # Paddle writes sorted; records of another order would be named wrongly, often with fitting shapes.
    if any(first >= second for first, second in pairwise(listed)):
        raise VlscaleError(
            f"{beside}: its names are not sorted, or one comes twice; Paddle stores them sorted: sort them"
        )
    return listed, beside


def write_fluid(
    folder: Path, tensors: Iterable[tuple[str, TensorInfo]], read: Callable[[str], Tensor]
) -> tuple[Path, ...]:
    """Write one file for each variable, byte for byte as Paddle 1.8's ``save_vars`` does.

    Args:
        folder: made if it is missing; files that it holds are not replaced.
        tensors: names and what :data:`read` will return.
        read: called once for each name; one tensor is held at a time.

    Returns:
        The files written.

    Raises:
        VlscaleError: a name that is no plain file name, a type that Paddle lacks, a file exists, or the disk refused;
            whatever has been written is deleted then.
        ValueError: a name comes twice, or :data:`read` returns something else than promised.
    """
    heads: dict[str, tuple[TensorInfo, bytes]] = {}
    for name, info in tensors:
        where = f"{folder}: variable {shown(name)}"
        if name in heads:
            raise ValueError(f"{name}: given twice")
        _check_name(where, name)
        heads[name] = (info, record_head(where, info))
    with FreshFiles(folder) as fresh:
        for name, (info, head) in heads.items():
            with fresh.create(name) as stream:
                stream.write(head)
                write_tensor(stream, name, read(name), info)
    return tuple(fresh.paths)
