"""Where ZeRO leaves the elements of each parameter (DeepSpeed 0.10 to 0.19, its ``zero_to_fp32.py`` for comparison).

* Stage 0: ``mp_rank_00_model_states.pt`` holds all tensors under ``module``.
* Stages 1 and 2: each group of the optimiser is one vector, its parameters in the order of ``param_shapes``, cut into
  one equal part per rank. The vector is padded to a multiple of 2 x ranks; what the last rank saved may lack that.
* Stage 3: each parameter is cut into ceil(n / ranks) elements per rank; a rank's parts lie one behind the other.

Frozen parameters, buffers and the names of tied ones stand in the model's file. At stages 1 to 3 the vectors are the
master weights, float32 unless DeepSpeed was told otherwise.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from vlscale.convert.pickle_values import Leaf
from vlscale.convert.source import TensorInfo, check_tensor
from vlscale.convert.torch_files import StoredTensor, TorchFile
from vlscale.errors import VlscaleError
from vlscale.untrusted import check_count, is_sane_name, shown

CURE = "copy the whole checkpoint again, or convert another one"


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a tensor that lie in one file, one behind the other or as one view."""

    path: Path
    stored: StoredTensor

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.stored.shape)

    def cut(self, first: int, count: int) -> Piece:
        """Return ``count`` elements of a vector from ``first`` on."""
        return Piece(self.path, replace(self.stored, shape=(count,), offset=self.stored.offset + first))


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and the pieces that its elements are read from, in order; a single piece may have its shape."""

    info: TensorInfo
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ModelFile:
    """What a ``*_model_states.pt`` says.

    Attributes:
        module: the state dict, whose parameters are empty at stage 3.
        buffers: names of the module that are no parameters.
        shapes: of the optimiser's groups, in the order of their vectors; None at stage 0.
        frozen, fragments: shapes of parameters without an optimiser, and this rank's parts of them.
        shared: name -> the name that its tensor is stored under.
        facts: ``global_steps``, ``dp_world_size``, ``ds_version`` and so on, as plain values.
        stage: of the configuration that was in force; None if it is not told.
    """

    path: Path
    module: dict[str, Piece]
    buffers: frozenset[str]
    shapes: list[dict[str, tuple[int, ...]]] | None
    frozen: dict[str, tuple[int, ...]]
    fragments: dict[str, Piece]
    shared: dict[str, str]
    facts: dict[str, Any]
    stage: int | None


@dataclass(frozen=True)
class RankFile:
    """What an ``*_optim_states.pt`` says.

    Attributes:
        each: whether each parameter is partitioned (stage 3), or each group.
        groups: this rank's part of the vectors.
        ranks: number of parts, for each group or once.
        gaps: elements left free behind each parameter of each group; None is none.
        steps: the optimiser's step counts, which all ranks share; tensors are still to be read.
    """

    path: Path
    each: bool
    groups: list[Piece]
    ranks: list[int]
    gaps: list[list[int]] | None
    steps: list[Any] = field(default_factory=list)


def parse_model(file: TorchFile) -> ModelFile:
    """Check the parts of a model's file that the weights need.

    Raises:
        VlscaleError: a part is missing or of another kind.
    """
    path, tree = file.path, file.value
    module = _pieces(file, "module")
    shapes = None
    if tree.get("param_shapes") is not None:
        shapes = [_shapes(path, "param_shapes", group) for group in _list(path, tree, "param_shapes")]
    shared, buffers = _dict(path, tree, "shared_params"), _list(path, tree, "buffer_names")
    pairs = [*shared.items()]
    if not all(type(part) is str for part in (*buffers, *(part for pair in pairs for part in pair))):
        raise VlscaleError(f"{path}: shared_params or buffer_names hold something else than names; {CURE}")
    _check_names(path, shared)
    names = ("global_steps", "skipped_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_version")
    facts = {name: tree[name] for name in names if type(tree.get(name)) in (int, str)}
    config = tree.get("ds_config")
    zero = config.get("zero_optimization") if type(config) is dict else None
    stage = zero.get("stage") if type(zero) is dict else None
    return ModelFile(
        path,
        module,
        frozenset(buffers),
        shapes,
        _shapes(path, "frozen_param_shapes", _dict(path, tree, "frozen_param_shapes")),
        _pieces(file, "frozen_param_fragments"),
        shared,
        facts,
        stage if type(stage) is int else None,
    )


def parse_rank(file: TorchFile) -> RankFile:
    """Check the parts of an optimiser's file that the weights need.

    Raises:
        VlscaleError: a part is missing, of another kind, or of a layout that is not read here.
    """
    path = file.path
    state = _dict(path, file.value, "optimizer_state_dict")
    each = "fp32_flat_groups" in state
    key = "fp32_flat_groups" if each else "single_partition_of_fp32_groups"
    groups = _list(path, state, key)
    if not groups or not all(type(group) is StoredTensor and group.stride == (1,) for group in groups):
        raise VlscaleError(f"{path}: {key} holds no vectors of master weights; is it a ZeRO checkpoint? {CURE}")
    if state.get("ds_zero_partition_groups") is not None:
        raise VlscaleError(f"{path}: parameters are partitioned over several groups of ranks (experts): not read here")
    count = state.get("partition_count")
    ranks: list[Any] = count if type(count) is list else [count]
    if not ranks or not all(type(number) is int and number > 0 for number in ranks):
        raise VlscaleError(f"{path}: partition_count is not a number of ranks; {CURE}")
    gaps = state.get("param_alignment_paddings")
    if gaps is not None and not (
        type(gaps) is list
        and len(gaps) == len(groups)
        and all(type(each) is list and all(type(gap) is int and gap >= 0 for gap in each) for each in gaps)
    ):
        raise VlscaleError(f"{path}: param_alignment_paddings is not a list of numbers for each group; {CURE}")
    base = state.get("optimizer_state_dict" if each else "base_optimizer_state")
    pieces = []
    for group in groups:
        file.check(f"{path}: {key}", group)
        pieces.append(Piece(path, group))
    return RankFile(path, each, pieces, ranks, gaps, _step_counts(base))


def _step_counts(base: Any) -> list[Any]:
    """Find ``step`` in an optimiser's state dict; where it stands depends on the optimiser."""
    if type(base) is not dict:
        return []
    states, groups = base.get("state"), base.get("param_groups")
    parts = [*(states.values() if type(states) is dict else []), *(groups if type(groups) is list else [])]
    found = [part.get("step") for part in parts if type(part) is dict]
    return [step for step in found if type(step) is int or (type(step) is StoredTensor and math.prod(step.shape) == 1)]


def whole(piece: Piece) -> Entry:
    """Return the entry of a tensor that lies in one file."""
    return Entry(TensorInfo(piece.stored.dtype, piece.stored.shape), (piece,))


def frozen_entries(models: Sequence[ModelFile]) -> dict[str, Entry]:
    """Return parameters without an optimiser: whole at stages 1 and 2 (one model file), cut at stage 3.

    Raises:
        VlscaleError: parts are missing or do not add up to the shape.
    """
    found = {}
    for name, shape in models[0].frozen.items():
        parts = [model.fragments.get(name) for model in models]
        dtypes = {part.stored.dtype for part in parts if part is not None}
        pieces, left = [], math.prod(shape)
        cut = len(parts) > 1 and any(part is not None and part.stored.stride != (1,) for part in parts)
        if None in parts or len(dtypes) != 1 or cut:
            raise VlscaleError(f"{models[0].path}: the frozen {shown(name)} lacks parts of its {len(parts)}; {CURE}")
        for part in parts:
            assert part is not None
            pieces.append(part if part.numel <= left else part.cut(0, left))
            left -= pieces[-1].numel
        where = f"{models[0].path}: the frozen {shown(name)}"
        if left:
            raise VlscaleError(f"{where} lacks {left} elements of its shape {list(shape)}; {CURE}")
        found[name] = Entry(check_tensor(where, dtypes.pop(), shape), tuple(pieces))
    return found


def group_entries(shapes: list[dict[str, tuple[int, ...]]], ranks: Sequence[RankFile]) -> dict[str, Entry]:
    """Return the parameters of stages 1 and 2.

    Raises:
        VlscaleError: the ranks' parts are not those of one vector, or padding does not fit.
    """
    found: dict[str, Entry] = {}
    first = ranks[0]
    for index, group in enumerate(shapes):
        sizes = [rank.groups[index].numel for rank in ranks]
        gaps = first.gaps[index] if first.gaps is not None else [0] * len(group)
        if len(gaps) != len(group):
            raise VlscaleError(f"{first.path}: {len(gaps)} paddings for {len(group)} parameters of group {index}")
        needed, grain = sum(map(math.prod, group.values())) + sum(gaps), 2 * len(ranks)
        most = -(-needed // grain) * grain
        odd = next((rank for rank, size in zip(ranks[:-1], sizes, strict=False) if size != sizes[0]), None)
        if odd is not None or sizes[-1] > sizes[0] or not needed <= sum(sizes) <= most:
            where = (odd or ranks[-1]).path
            raise VlscaleError(
                f"{where}: the ranks hold {str(sizes)[:80]} elements of group {index}, expected equal parts of "
                f"{needed} to {most}; files of different runs or damage: {CURE}"
            )
        parts, ends, place = [rank.groups[index] for rank in ranks], list(accumulate(sizes)), 0
        dtype = first.groups[index].stored.dtype
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            pieces = tuple(_cut(parts, ends, place, math.prod(shape)))
            found[name] = Entry(check_tensor(f"{first.path}: {shown(name)}", dtype, shape), pieces)
            place += math.prod(shape) + gap
    return found


def _cut(parts: Sequence[Piece], ends: list[int], place: int, numel: int) -> list[Piece]:
    """Cut ``numel`` elements from ``place`` on of a vector that is spread over ``parts``, which end at ``ends``."""
    pieces, stop = [], place + numel
    index = bisect_right(ends, place)
    while place < stop:
        part = parts[index]
        count = min(stop, ends[index]) - place
        if count:
            pieces.append(part.cut(place - (ends[index] - part.numel), count))
        place, index = place + count, index + 1
    return pieces


def each_entries(shapes: list[dict[str, tuple[int, ...]]], ranks: Sequence[RankFile]) -> dict[str, Entry]:
    """Return the parameters of stage 3.

    Raises:
        VlscaleError: the ranks' parts are of different sizes, or more or less than the shapes need.
    """
    parameters = {name: shape for group in shapes for name, shape in group.items()}
    parts = {name: -(-math.prod(shape) // len(ranks)) for name, shape in parameters.items()}
    needed = sum(parts.values())
    for rank in ranks:
        sizes = [group.numel for group in rank.groups]
        if sizes != [group.numel for group in ranks[0].groups] or sum(sizes) != needed:
            raise VlscaleError(
                f"{rank.path}: holds vectors of {str(sizes)[:80]} elements, expected {needed} in all, as in the other "
                f"ranks; files of different runs or damage: {CURE}"
            )
    ends, place, found = list(accumulate(group.numel for group in ranks[0].groups)), 0, {}
    dtype = ranks[0].groups[0].stored.dtype
    for name, shape in parameters.items():
        numel, pieces = math.prod(shape), []
        for number, rank in enumerate(ranks):
            count = max(0, min(parts[name], numel - number * parts[name]))
            pieces += _cut(rank.groups, ends, place, count)
        found[name] = Entry(check_tensor(f"{ranks[0].path}: {shown(name)}", dtype, shape), tuple(pieces))
        place += parts[name]
    return found


def check_ranks(shapes: list[dict[str, tuple[int, ...]]], ranks: Sequence[RankFile]) -> None:
    """Compare what all ranks must agree on.

    Raises:
        VlscaleError: numbers of ranks or groups, dtypes or layouts differ, or a name stands in two groups.
    """
    if len({name for group in shapes for name in group}) != sum(map(len, shapes)):
        raise VlscaleError(f"{ranks[0].path}: a parameter stands in two groups of param_shapes; the file is damaged")
    for rank in ranks:
        dtypes = [group.stored.dtype for group in rank.groups]
        if set(rank.ranks) != {len(ranks)}:
            raise VlscaleError(
                f"{rank.path}: was written by {rank.ranks[0]} ranks, but there are the files of {len(ranks)}; files "
                f"are missing or of another run: {CURE}"
            )
        if rank.each != ranks[0].each or dtypes != [group.stored.dtype for group in ranks[0].groups]:
            raise VlscaleError(f"{rank.path}: another ZeRO stage or precision than {ranks[0].path.name}; {CURE}")
        if (len(rank.groups) != len(shapes)) if not rank.each else len(set(dtypes)) != 1:
            raise VlscaleError(
                f"{rank.path}: {len(rank.groups)} groups of weights, the model has {len(shapes)}; {CURE}"
            )


def _dict(path: Path, tree: Any, key: str) -> dict[Any, Any]:
    if type(tree) is not dict:
        raise VlscaleError(f"{path}: holds a {type(tree).__name__}, expected a dict that DeepSpeed wrote; {CURE}")
    value = tree.get(key)
    if value is None and key not in ("module", "optimizer_state_dict"):  # not told at stage 0
        return {}
    if type(value) is not dict:
        raise VlscaleError(f"{path}: {key} is a {type(value).__name__}, expected a dict; is it DeepSpeed's? {CURE}")
    return value


def _list(path: Path, tree: dict[Any, Any], key: str) -> list[Any]:
    value = tree.get(key)
    if type(value) is not list:
        raise VlscaleError(f"{path}: {key} is a {type(value).__name__}, expected a list; is it DeepSpeed's? {CURE}")
    return value


def _pieces(file: TorchFile, key: str) -> dict[str, Piece]:
    """Return the tensors of a dict, each checked against the file."""
    found = {name: each for name, each in _dict(file.path, file.value, key).items() if type(each) is StoredTensor}
    check_count(file.path, len(found))
    _check_names(file.path, found)
    for name, each in found.items():
        file.check(f"{file.path}: {shown(name)}", each)
    return {name: Piece(file.path, each) for name, each in found.items()}


def _shapes(path: Path, key: str, group: Any) -> dict[str, tuple[int, ...]]:
    if type(group) is not dict:
        raise VlscaleError(f"{path}: {key} is a {type(group).__name__}, expected names and shapes; {CURE}")
    check_count(path, len(group))
    _check_names(path, group)
    found = {}
    for name, size in group.items():
        sides = size.plain() if isinstance(size, Leaf) else size  # torch.Size is a leaf
        if type(sides) not in (tuple, list) or not all(type(side) is int for side in sides):
            raise VlscaleError(f"{path}: {key} of {shown(name)} is no shape; {CURE}")
        found[name] = check_tensor(f"{path}: {key} of {shown(name)}", torch.uint8, tuple(sides)).shape
    return found


def _check_names(path: Path, names: Any) -> None:
    bad = next((name for name in names if type(name) is not str or not is_sane_name(name)), None)
    if bad is not None:
        raise VlscaleError(f"{path}: holds a tensor named {shown(str(bad))}; the file is damaged or hostile")
