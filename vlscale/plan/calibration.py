"""What short measurements found on one machine, and the file that keeps it; read by ``vlscale plan --calibration``."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Annotated, Literal

import torch as pytorch
from pydantic import Field, ValidationError, model_validator

from vlscale.errors import VlscaleError
from vlscale.plan.curves import Curve, Measured, Positive, Surface

FORMAT = 1
Device = pytorch.device
_MAX_BYTES = 1 << 20
Seconds = Annotated[float, Field(ge=0, le=1e6)]


class Machine(Measured):
    """What a calibration is valid for.

    Attributes:
        device: name of the GPU or processor; kind: ``cuda`` or ``cpu``; threads: that PyTorch uses on a CPU.
        torch: version; precision: of weights and activations.
        attention_dropout: whether attention weights are dropped, which changes the kernel.
    """

    device: str = Field(max_length=200)
    kind: Literal["cpu", "cuda"]
    threads: int = Field(ge=1)
    torch: str = Field(max_length=100)
    precision: Literal["fp32", "fp16", "bf16"]
    attention_dropout: bool

    @classmethod
    def here(cls, device: Device, precision: str, attention_dropout: bool) -> Machine:
        """Describe this machine."""
        name = pytorch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        threads = pytorch.get_num_threads() if device.type == "cpu" else 1
        return cls.model_validate({
            "device": name, "kind": device.type, "threads": threads, "torch": pytorch.__version__,
            "precision": precision, "attention_dropout": attention_dropout,
        })  # fmt: skip


class Passes(Measured):
    """Seconds of an operation: forward alone, and forward with backward."""

    forward: Curve
    both: Curve


class Attention(Measured):
    """Seconds of attention, ``a x examples + b x tokens + c x sum of squared lengths``, per width of the model.

    The three numbers go exactly through three measured lengths, so one of them may be negative.

    Attributes:
        widths: rising; forward, both: (a, b, c) of each width, packed; padded_forward, padded_both: where examples are
            short and padded to the longest, as which all of them count then.
    """

    widths: tuple[Positive, ...] = Field(min_length=1, max_length=16)
    forward: tuple[tuple[float, float, float], ...]
    both: tuple[tuple[float, float, float], ...]
    padded_forward: tuple[tuple[float, float, float], ...]
    padded_both: tuple[tuple[float, float, float], ...]

    @model_validator(mode="after")
    def _fits(self) -> Attention:
        for name in ("forward", "both", "padded_forward", "padded_both"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} is not of {len(self.widths)} widths")
        return self


class Probed(Measured):
    """What the probe measured and predicted for the recipe itself.

    Attributes:
        recipe: its name; micro_batch_tokens: the largest budget; accumulation: micro-steps per step at ``gpus``.
        step_s: measured, without communication; predicted_s: from the operators.
        peak_bytes: measured, of the largest micro-batch that was run; tokens: of that.
    """

    recipe: str = Field(max_length=200)
    gpus: int = Field(ge=1)
    micro_batch_tokens: int = Field(ge=1)
    accumulation: int = Field(ge=1)
    step_s: Positive
    predicted_s: Positive
    peak_bytes: Positive
    tokens: int = Field(ge=1)


class Calibration(Measured):
    """Measured costs of the operations that a training step is made of.

    Attributes:
        version: of this format; machine: where it was measured.
        products: forward of a projection; products_input, products_weight: the two products of its backward pass.
        norm: dropout, residual sum and LayerNorm over elements; gelu: over elements.
        copy: one addition of two tensors into a third, over elements.
        attention: see :class:`Attention`.
        losses: ``entropy``, ``divergence``, ``square``: a loss with its gradient over the elements of the output.
        table: gradient of a table of vectors over its elements.
        accumulate: adding a gradient to the accumulator, over elements; tensor_s: per tensor beside that.
        optimizer: the update over the elements that a GPU owns.
        transport: seconds per example, per cell and iteration, and per cell and unit of width.
        micro_step_s: what a micro-step takes beside all that, whatever its size.
        probed: the measured recipe; None if only operators were measured.
    """

    version: Literal[1] = 1
    machine: Machine
    products: Surface
    products_input: Surface
    products_weight: Surface
    norm: Passes
    gelu: Passes
    copy_: Curve = Field(alias="copy")
    attention: Attention
    losses: dict[Literal["entropy", "divergence", "square"], Curve] = Field(min_length=3)
    table: Curve
    accumulate: Curve
    tensor_s: Seconds
    optimizer: Curve
    transport: tuple[Seconds, Seconds, Seconds]
    micro_step_s: Seconds
    probed: Probed | None = None

    @property
    def best_flops(self) -> float:
        """FLOP/s of the fastest product that was measured."""
        return max(
            2 * rows * width * width / seconds
            for width, curve in zip(self.products.widths, self.products.curves, strict=True)
            for rows, seconds in zip(curve.sizes, curve.seconds, strict=True)
        )

    def describe(self) -> list[str]:
        """Return what was measured, one line each."""
        machine = self.machine
        where = f"{machine.device}, " + (f"{machine.threads} threads, " if machine.kind == "cpu" else "")
        lines = [
            f"on {where}PyTorch {machine.torch}, {machine.precision}: products by size (at best "
            f"{self.best_flops / 1e9:,.0f} GFLOP/s), norms and dropout, gelu, attention, losses, tables, accumulation, "
            f"optimal transport, the optimiser, each by itself; {self.micro_step_s * 1e3:.2f} ms per micro-step beside",
        ]
        if self.probed is not None:
            probed = self.probed
            lines.append(
                f"recipe {probed.recipe} at {probed.micro_batch_tokens} tokens: a step of {probed.step_s:.4f} s, "
                f"predicted from the operations {probed.predicted_s:.4f} s "
                f"({probed.predicted_s / probed.step_s - 1:+.1%})"
            )
        return lines


def write_calibration(found: Calibration, path: Path) -> None:
    """Write a calibration, whole or not at all; an earlier one is replaced.

    Raises:
        VlscaleError: the file cannot be written.
    """
    write_whole(path, found.model_dump_json(indent=1, by_alias=True) + "\n", "--calibration")


def read_calibration(path: Path) -> Calibration:
    """Read a calibration.

    Raises:
        VlscaleError: it is missing, too large, not JSON, of another format, or a value does not fit.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise VlscaleError(f"--calibration {path}: more than {_MAX_BYTES} bytes: this is no calibration")
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except OSError as error:
        raise VlscaleError(
            f"--calibration {path}: cannot be read ({error.strerror}); `vlscale plan --probe --calibration {path}` "
            f"writes it"
        ) from None
    except (ValueError, RecursionError):
        raise VlscaleError(f"--calibration {path}: not JSON; it is damaged: measure again with --probe") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != FORMAT:
        raise VlscaleError(
            f"--calibration {path}: its version is {version!r}, this vlscale reads {FORMAT}: measure again with --probe"
        )
    try:
        return Calibration.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where, what = ".".join(map(str, problem["loc"])), re.sub(r"\s+", " ", problem["msg"])
        raise VlscaleError(
            f"--calibration {path}: {where}: {what}; it is damaged: measure again with --probe"
        ) from None


def check_machine(found: Calibration, path: Path, expected: Machine) -> None:
    """Refuse a calibration of another device or precision.

    Raises:
        VlscaleError: what differs is named.
    """
    ours, theirs = expected.model_dump(), found.machine.model_dump()
    for name, value in ours.items():
        if theirs[name] != value:
            raise VlscaleError(
                f"--calibration {path}: measured with {name} {theirs[name]!r}, this plan is for {value!r}: "
                f"measure there with --probe, or leave --calibration out"
            )


def check_gpu(found: Calibration, path: Path, gpu: str) -> None:
    """Refuse a calibration of another type of GPU; a file of the user's own is taken at its word.

    Raises:
        VlscaleError: both are named.
    """
    family = gpu.lower().split("-")[0]
    if not gpu.endswith((".yaml", ".yml")) and family not in found.machine.device.lower():
        raise VlscaleError(
            f"--calibration {path}: measured on {found.machine.device!r}, this plan is for --gpu {gpu}: measure on "
            f"such a GPU with --probe, take --gpu here, or leave --calibration out"
        )


def check_target_folder(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Raises:
        VlscaleError: its folder is missing, or it is a folder; names ``option``.
    """
    if not path.absolute().parent.is_dir():
        raise VlscaleError(f"{option} {path}: {path.absolute().parent} is no folder; make it first")
    if path.is_dir():
        raise VlscaleError(f"{option} {path}: is a folder; name a file")


def write_whole(path: Path, text: str, option: str) -> None:
    """Write ``text`` to a file beside ``path`` and put it in its place.

    Raises:
        VlscaleError: the file cannot be written; names ``option``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise VlscaleError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from None


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
