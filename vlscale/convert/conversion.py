"""Converting one checkpoint into another: recognise, map, check, stream, rename.

Nothing is written before every name and shape has been checked; the result appears under its name when it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlscale.convert import uniter
from vlscale.convert.filling import Filled
from vlscale.convert.layouts import STATE_DICT
from vlscale.convert.mapped import DTYPES, Mapped, as_it_is
from vlscale.convert.model_config import config_of
from vlscale.convert.opening import Opened, open_checkpoint
from vlscale.convert.placing import check_apart, check_target, put_in_place, workplace
from vlscale.convert.report import Report, digests
from vlscale.convert.source import TensorSource
from vlscale.convert.steps import KeyPlan, matching, problems_of
from vlscale.convert.targets import AS_PUBLISHED, OURS, PICKLED, TARGETS, Target
from vlscale.convert.task_heads import is_task_name
from vlscale.convert.unimo_model import UNIMO_LAYOUTS, check_exportable, export_plans
from vlscale.errors import VlscaleError, nearest
from vlscale.models.registry import ModelConfig, expected_shapes
from vlscale.models.unimo_config import UnimoConfig
from vlscale.models.uniter import UniterConfig


@dataclass(frozen=True)
class Wish:
    """What is asked of a conversion.

    Attributes:
        source, target: paths.
        layout: of the source's names; None finds it out.
        to: key of :data:`~vlscale.convert.targets.TARGETS`; None takes what the source suggests.
        dtype: ``fp32``, ``fp16`` or ``bf16``, of all floating-point tensors; ``keep`` leaves them.
        model: a preset's name or a configuration file, for what the source does not say.
        allow_missing, allow_unexpected: patterns of names; missing ones get a new model's values, unexpected ones are
            left out.
        overwrite: replace what the target path holds.
        hashed: check a training checkpoint's hashes, and tell those of source and result; False saves that time.
    """

    source: Path
    target: Path
    layout: str | None = None
    to: str | None = None
    dtype: str = "fp32"
    model: str | None = None
    allow_missing: Sequence[str] = field(default_factory=tuple)
    allow_unexpected: Sequence[str] = field(default_factory=tuple)
    overwrite: bool = False
    hashed: bool = True


class RefusedError(VlscaleError):
    """Tensors are missing or unexpected; ``report`` names all of them."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def convert(wish: Wish) -> Report:
    """Convert a checkpoint.

    Raises:
        RefusedError: tensors are missing or unexpected and not allowed to be; nothing has been written.
        VlscaleError: unknown or ambiguous formats, damaged or hostile files, an existing target.
    """
    _check(wish)
    with open_checkpoint(wish.source, wish.layout, wish.hashed, wish.to, wish.to in AS_PUBLISHED) as opened:
        check_apart(wish.target, (wish.source, *opened.source.files))
        to = wish.to or _suggested(opened)
        target = _target(to, opened, wish.target)
        report = Report(str(wish.source), str(wish.target), opened.kind, opened.layout, to, wish.dtype)
        report.add_entries(opened.entries)
        for stage in opened.stages:
            report.add_plan(stage.plan)
        report.provenance = dict(opened.provenance)
        report.unexpected = opened.unexpected
        as_model = opened.model is not None and target.models
        config, source = _as_model(opened, to, wish, report) if as_model else (None, opened.mapped)
        _refuse(report, wish)
        opened.check_tied()
        result = Mapped(source, as_it_is(source), DTYPES.get(wish.dtype), counts=True)
        report.add_plan(result.plan)
        report.mapped = len(result.tensors)
        if wish.hashed:
            report.source_files = digests(opened.source.files, wish.source, opened.digests)
        _write(target, result, config, report, wish)
        return report


def _check(wish: Wish) -> None:
    """Refuse what can be told from the wish alone."""
    if wish.dtype not in (*DTYPES, "keep"):
        raise VlscaleError(f"--dtype {wish.dtype!r}: expected {', '.join(DTYPES)} or keep")
    if wish.to is not None and wish.to not in TARGETS:
        raise VlscaleError(f"--to {wish.to!r} is unknown{nearest(wish.to, TARGETS)} (known: {', '.join(TARGETS)})")
    check_target(wish.target, wish.overwrite)


def _suggested(opened: Opened) -> str:
    if opened.layout == "vlscale" and opened.kind != "deepspeed":
        raise VlscaleError(f"{opened.source.path}: is a vlscale folder already; say with --to what it shall become")
    return "vlscale" if opened.layout in OURS else STATE_DICT


def _target(to: str, opened: Opened, path: Path) -> Target:
    target = TARGETS[to]
    if target.folder and path.suffix in (*PICKLED, ".pdparams", ".safetensors"):
        raise VlscaleError(f"{path}: {to} is a folder, the name is a file's; drop {path.suffix} or say another --to")
    if not _fits(target, opened):
        fitting = [name for name, each in TARGETS.items() if _fits(each, opened)]
        raise VlscaleError(
            f"{opened.source.path}: {opened.layout} cannot become {to!r}; it can become {', '.join(fitting)}"
        )
    return target


def _fits(target: Target, opened: Opened) -> bool:
    of_model = opened.model is None or not target.models or opened.model in target.models
    return of_model and (not target.layouts or opened.layout in target.layouts)


def _as_model(opened: Opened, to: str, wish: Wish, report: Report) -> tuple[ModelConfig, TensorSource]:
    """Check our names against the model; fill in what may be missing; go on to published names where asked for."""
    config = config_of(opened, wish.model)
    expected, found = expected_shapes(config), opened.mapped.tensors
    report.missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected and not is_task_name(name)]
    report.unexpected = sorted({*report.unexpected, *surplus})
    for name, info in found.items():
        if name in expected and info.shape != tuple(expected[name]):
            raise VlscaleError(
                f"{opened.source.path}: {name} is {list(info.shape)}, the model's is {list(expected[name])}; give the "
                "model that the weights are of with --model"
            )
    source: TensorSource = Mapped(opened.mapped, as_it_is(opened.mapped, {*found} - {*surplus}))
    if report.missing:
        source = Filled(source, config, report.missing)
    for plan in _to_published(source, config, to):
        report.unexpected = sorted({*report.unexpected, *plan.unexpected})
        report.add_plan(plan)
        source = Mapped(source, plan)
    return config, source


def _to_published(source: TensorSource, config: ModelConfig, to: str) -> tuple[KeyPlan, ...]:
    """The key maps to published names, one after the other; none where ours are kept.

    Raises:
        VlscaleError: the published model cannot compute what this one does.
    """
    if to == "uniter":
        assert isinstance(config, UniterConfig)
        plan = uniter.export_plan(source.tensors, heads=config.heads)
        plan.check(str(source.path))
        return (plan,)
    if to not in UNIMO_LAYOUTS:
        return ()
    assert isinstance(config, UnimoConfig)
    check_exportable(config, UNIMO_LAYOUTS[to])
    return export_plans(source.tensors, UNIMO_LAYOUTS[to])


def _refuse(report: Report, wish: Wish) -> None:
    """Compare what is missing and unexpected with what may be."""
    report.fresh = sorted(matching(report.missing, wish.allow_missing))
    report.left_out = sorted(matching(report.unexpected, wish.allow_unexpected))
    report.missing = [name for name in report.missing if name not in {*report.fresh}]
    report.unexpected = [name for name in report.unexpected if name not in {*report.left_out}]
    problems = [*problems_of(report.missing, report.unexpected)]
    if problems:
        options = " and ".join(
            option
            for option, names in (("--allow-missing", report.missing), ("--allow-unexpected", report.unexpected))
            if names
        )
        raise RefusedError(f"{wish.source}: {'; '.join(problems)}; allow them with {options} PATTERN", report)


def _write(target: Target, result: Mapped, config: ModelConfig | None, report: Report, wish: Wish) -> None:
    """Write into a folder of its own beside the target, then put it in place."""
    try:
        with workplace(wish.target) as beside:
            target.write(beside, result, config, report)
            written = sorted(path for path in beside.rglob("*") if path.is_file()) if beside.is_dir() else [beside]
            if wish.hashed:
                report.target_files = digests(written, beside)
            report.not_finite, report.vanished = dict(result.not_finite), dict(result.vanished)
            put_in_place(beside, wish.target, wish.overwrite)
    except OSError as error:
        raise VlscaleError(
            f"{wish.target}: cannot be written ({error.strerror or error}); check its folder, its name and the space"
        ) from None
    except VlscaleError as error:  # of a writer, which knows the folder beside only
        raise type(error)(str(error).replace(f"{beside.parent}/", f"{wish.target.absolute().parent}/")) from None
