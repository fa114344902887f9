"""From a path to an open checkpoint: which reader takes it is decided by content, never by a name alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.convert import deepspeed_zero, fluid, huggingface, paddle_params, safetensors_files, torch_files
from vlscale.convert.layouts import BACKBONES, backbone_plan, layout_of, plan_of
from vlscale.convert.mapped import Mapped, Merged, as_it_is
from vlscale.convert.source import TensorSource
from vlscale.convert.steps import KeyPlan, Step
from vlscale.convert.task_heads import is_task_name
from vlscale.convert.text_encoders import text_weights
from vlscale.convert.unimo_model import UNIMO_LAYOUTS, import_plans
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, MODEL_TYPE, PROVENANCE_FILE, TASK_HEAD_FILE, read_json
from vlscale.models.unimo_config import UnimoConfig
from vlscale.untrusted import shown

READERS: dict[str, Any] = {
    "deepspeed": deepspeed_zero,
    "hugging-face": huggingface,
    "fluid": fluid,
    "safetensors": safetensors_files,
    "torch": torch_files,
    "pdparams": paddle_params,
}
"""Kinds of files; a folder of Hugging Face's is one of safetensors too, and the first that takes it wins."""
STARTED = ("vilbert", "unit", "unimo")
"""Models that a BERT or RoBERTa starts, under their published names; UNITER's are mapped on to vlscale's."""
_ENGINE = "model."
_TOLD = ("step", "world_size", "zero_stage", "precision", "fingerprint")


@dataclass(frozen=True)
class Opened:
    """A checkpoint under the names that it has in vlscale, or its published ones.

    Attributes:
        kind: of the files, of :data:`READERS`.
        layout: of the names, of :data:`vlscale.convert.layouts.LAYOUTS`, ``bert``, ``roberta`` or ``state-dict``.
        source: the files.
        stages: the tensors, renamed in so many key maps, each of the names of the one before.
        model: ``uniter`` or ``unimo``, where the names are now those of this library's model; None where they are
            published ones.
        config: what the checkpoint says of its model, raw, or None.
        digests: file -> sha256, where they were compared with the checkpoint's own list already.
        entries: where the files' names had to be changed before the key map: name -> (stored names, operation).
        provenance: what readers that check it tell: step, precision, licence, vocabulary; not what any pickle says.
    """

    kind: str
    layout: str
    source: TensorSource
    stages: tuple[Mapped, ...]
    model: str | None
    config: dict[str, Any] | None
    digests: Mapping[Path, str]
    provenance: Mapping[str, Any]
    entries: Mapping[str, tuple[Sequence[str], str]] = field(default_factory=dict)

    @property
    def mapped(self) -> Mapped:
        """The tensors under their last names."""
        return self.stages[-1]

    @property
    def unexpected(self) -> list[str]:
        """Names that a key map does not know."""
        return sorted(name for stage in self.stages for name in stage.plan.unexpected)

    def check_tied(self) -> None:
        """See :meth:`~vlscale.convert.mapped.Mapped.check_tied`, of every key map."""
        for stage in self.stages:
            stage.check_tied()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exception: object) -> None:
        self.source.__exit__(*exception)


def kind_of(path: Path) -> str:
    """Return which reader takes ``path``.

    Raises:
        VlscaleError: none does, or several that are not told apart by content.
    """
    if not path.exists():
        raise VlscaleError(f"{path}: no such file or folder; give a checkpoint")
    found = [kind for kind, reader in READERS.items() if reader.recognise(path)]
    if "hugging-face" in found or path.is_dir():
        found = found[:1] if {*found} <= {"hugging-face", "safetensors"} else found
    if len(found) > 1:
        raise VlscaleError(f"{path}: may be {' or '.join(found)}; give the file or folder inside that is meant")
    if not found:
        raise VlscaleError(
            f"{path}: no checkpoint is recognised in it (looked for {', '.join(READERS)}); see vlscale convert --help"
        )
    return found[0]


def open_checkpoint(
    path: Path, layout: str | None = None, hashed: bool = True, to: str | None = None, published: bool = False
) -> Opened:
    """Open a checkpoint; names and shapes are read, no tensor yet.

    Args:
        path: file or folder.
        layout: of its names; None finds it out.
        to: what it shall become: a BERT is laid out for the model that it starts, of :data:`STARTED`, else for UNITER,
            and a detector's backbone for UniT.
        hashed: compare the files of a training checkpoint with its manifest's hashes, not their sizes alone.
        published: leave UNIMO's published names and shapes as they are.

    Raises:
        VlscaleError: see :func:`kind_of`; damaged or hostile files; a layout that the content does not bear out.
    """
    kind = kind_of(path)
    more = {"verify": hashed} if kind == "deepspeed" else {}
    source: TensorSource = READERS[kind].open_source(path, **more)
    try:
        if not source.tensors:
            raise VlscaleError(f"{path}: holds no tensors; give a checkpoint")
        return _opened(kind, source, layout, to, published)
    except BaseException:
        source.__exit__()
        raise


def _opened(kind: str, source: TensorSource, layout: str | None, to: str | None, published: bool) -> Opened:
    if isinstance(source, huggingface.HuggingFaceSource):
        return _text_encoder(source, layout, to if to in STARTED else "uniter")
    config: dict[str, Any] | None = None
    digests: Mapping[Path, str] = {}
    told: Mapping[str, Any] = {}
    entries: Mapping[str, tuple[Sequence[str], str]] = {}
    if isinstance(source, deepspeed_zero.ZeroSource):
        manifest = source.extra.get("manifest") or {}
        config, digests = manifest.get("model"), source.digests
        told = {key: {**source.extra, **manifest}.get(key) for key in _TOLD}
        source = unwrapped = _Unwrapped(source)
        entries = {step.target: (step.sources, step.operation) for step in unwrapped.plan.steps}
    elif kind == "safetensors" and source.path.is_dir():
        source, config = _vlscale_folder(source)
        before = source.path / PROVENANCE_FILE
        if config is not None and before.is_file():
            raw = read_json(before)
            told = {key: raw[key] for key in (*_TOLD, "licence", "vocabulary") if key in raw} | {"before": raw}
    found = layout_of(source.tensors, str(source.path), layout)
    plan = backbone_plan(source, found) if to == "unit" and found in BACKBONES else plan_of(source, found)
    stages: tuple[Mapped, ...] = (Mapped(source, plan),)
    if found in UNIMO_LAYOUTS and not published:
        stages = (*stages, *_as_unimo(stages[0], found))
    model = _model_of(found, stages[-1].tensors, config) if not (found in UNIMO_LAYOUTS and published) else None
    return Opened(kind, found, source, stages, model, config, digests, told, entries)


def _as_unimo(source: TensorSource, layout: str) -> tuple[Mapped, Mapped]:
    """Published names, cleaned, as this library's: renamed and transposed first, query, key and value joined then."""
    first, second = import_plans(source.tensors, UNIMO_LAYOUTS[layout], tasks=True)
    renamed = Mapped(source, first)
    return renamed, Mapped(renamed, second)


def _model_of(layout: str, names: Iterable[str], config: Mapping[str, Any] | None) -> str | None:
    """Which model the names are of, if they are this library's."""
    if layout in UNIMO_LAYOUTS:
        return "unimo"
    if layout != "vlscale":
        return "uniter" if layout == "uniter" else None
    told = (config or {}).get("model_type")
    if told is None:  # weights alone; every UNITER has types, in a table of its own
        return "uniter" if "type_embedding.weight" in names else "unimo"
    return "unimo" if told == UnimoConfig.model_type else "uniter"


def _text_encoder(source: huggingface.HuggingFaceSource, layout: str | None, model: str) -> Opened:
    """A BERT is seen as the published checkpoint that it would be without images; a RoBERTa has another vocabulary."""
    kind = source.shape.kind
    if layout not in (None, kind):
        raise VlscaleError(f"{source.path / CONFIG_FILE}: says {kind!r}, not {layout!r}; drop --from")
    weights = text_weights(source, model)
    if weights.missing:
        raise VlscaleError(f"{source.path}: {', '.join(weights.missing[:4])} missing; give a whole {kind}")
    named = _Weights(source, weights)
    inner = plan_of(named, model) if model == "uniter" else as_it_is(named)
    tied = {second: f"tied to {first}, and equal" for second, first in weights.tied.items()}
    plan = KeyPlan(inner.steps, ignored={**weights.ignored, **tied}, unexpected=weights.unexpected)
    mapped = Mapped(named, plan)
    told = {key: source.extra[key] for key in ("licence", "vocabulary")}
    entries = {name: (entry.sources, entry.operation) for name, entry in weights.entries.items()}
    of = "uniter" if model == "uniter" else None
    return Opened("hugging-face", kind, source, (mapped,), of, dict(source.extra["config"]), {}, told, entries)


def _vlscale_folder(source: TensorSource) -> tuple[TensorSource, dict[str, Any] | None]:
    config = source.path / CONFIG_FILE
    raw = read_json(config) if config.is_file() else {}
    if raw.get("model_type") not in (MODEL_TYPE, UnimoConfig.model_type):
        return source, None
    head = source.path / TASK_HEAD_FILE
    if not head.is_file():
        return source, raw
    more = safetensors_files.open_source(head)
    stray = next((name for name in more.tensors if not is_task_name(name)), None)
    if stray is not None:
        more.__exit__()
        raise VlscaleError(f"{head}: holds {shown(stray)}, which is no part of a task's head; convert the source again")
    return Merged(source, more), raw


class _Weights:
    """:class:`~vlscale.convert.text_encoders.TextWeights` as a source."""

    def __init__(self, source: huggingface.HuggingFaceSource, weights: Any) -> None:
        self.path, self.format, self.files, self.extra = source.path, source.format, source.files, source.extra
        self.tensors, self.aliases = weights.tensors, dict[str, str]()
        self.read: Callable[[str], Any] = weights.read
        self._source = source

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.__exit__(*exception)


class _Unwrapped(Mapped):
    """A training checkpoint without the prefix of the module that DeepSpeed trains."""

    def __init__(self, source: TensorSource) -> None:
        copies = {second.removeprefix(_ENGINE): first.removeprefix(_ENGINE) for second, first in source.aliases.items()}
        names = [name for name in source.tensors if name not in source.aliases]
        super().__init__(
            source, KeyPlan(tuple(Step(name.removeprefix(_ENGINE), (name,)) for name in names), copies=copies)
        )
