"""GPU types as data: memory, peaks, bandwidths and the source of each figure; a user's own YAML has the same form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlscale.config_yaml import RecipeLoader
from vlscale.errors import VlscaleError, nearest

TABLE = Path(__file__).with_name("gpus.yaml")
HERE = "here"
"""Instead of a name: this machine, as a calibration describes it."""
_MAX_BYTES = 1 << 16


class Gpu(BaseModel):
    """One type of GPU in its node.

    Attributes:
        memory_gib: memory that a process can see, GiB.
        fp16_tflops, bf16_tflops, fp32_tflops: dense peaks, 10^12 FLOP/s; None: the GPU has no such arithmetic.
        memory_gb_s: bandwidth of its memory, 10^9 B/s.
        link_gb_s: to the other GPUs of the node, per GPU and direction, 10^9 B/s.
        gpus_per_node: GPUs that share a network.
        network_gb_s: of a node, per direction, 10^9 B/s.
        sources: field -> where the figure is from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    memory_gib: float = Field(gt=0)
    fp16_tflops: float | None = Field(gt=0)
    bf16_tflops: float | None = Field(gt=0)
    fp32_tflops: float = Field(gt=0)
    memory_gb_s: float = Field(gt=0)
    link_gb_s: float = Field(gt=0)
    gpus_per_node: int = Field(ge=1)
    network_gb_s: float = Field(gt=0)
    sources: dict[str, str] = Field(default_factory=dict)

    def peak(self, precision: Literal["fp16", "bf16", "fp32"]) -> float | None:
        """Return the peak in FLOP/s; None where the GPU lacks this precision."""
        teraflops = {"fp16": self.fp16_tflops, "bf16": self.bf16_tflops, "fp32": self.fp32_tflops}[precision]
        return None if teraflops is None else teraflops * 1e12


def gpu_names() -> list[str]:
    """Names of the GPUs in the package's table."""
    return list(_read(TABLE))


def load_gpu(name: str) -> Gpu:
    """Return a GPU by its name in the table, or from a user's own file (a name that ends in .yaml or .yml).

    Raises:
        VlscaleError: unknown name (the nearest is told); the file is missing, not YAML, or does not fit.
    """
    if name.endswith((".yaml", ".yml")):
        return _parse(_read(Path(name)), name)
    table = _read(TABLE)
    if name.lower() not in table:
        raise VlscaleError(
            f"--gpu {name}: unknown{nearest(name.lower(), table)} (known: {', '.join(table)}; or a FILE.yaml in the "
            f"form of {TABLE})"
        )
    return _parse(table[name.lower()], name)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise VlscaleError(f"--gpu {path}: more than {_MAX_BYTES} bytes: this describes no GPU")
        raw = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise VlscaleError(f"--gpu {path}: cannot be read ({reason}); copy an entry of {TABLE} into it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise VlscaleError(f"--gpu {path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise VlscaleError(f"--gpu {path}: expected a mapping (memory_gib: ...), found {type(raw).__name__}")
    return raw


def _parse(raw: Any, name: str) -> Gpu:
    try:
        return Gpu.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "entry"
        hint = nearest(where, Gpu.model_fields) if problem["type"] == "extra_forbidden" else ""
        text = re.sub(r"\s+", " ", problem["msg"])
        raise VlscaleError(f"--gpu {name}: {where}: {text}{hint}") from None
