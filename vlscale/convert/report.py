"""What a conversion did with every tensor, as text and as JSON."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlscale.convert.steps import KeyPlan
from vlscale.hashing import file_digest

_SHOWN = 8
_NONE: Mapping[Path, str] = {}


@dataclass
class Report:
    """See :func:`Report.text`; lists and mappings name every tensor.

    Attributes:
        source, target: paths as given.
        kind, layout: of the source: its files and its names.
        to, dtype: of the result.
        mapped: tensors of the result.
        operations: operation -> tensors of the result that it made (transposed, concatenated, ...).
        tied: name -> name of the tensor that it must equal; compared and written once.
        ignored: name -> why.
        missing, unexpected: what the result lacks, and what nothing is known about.
        fresh: missing tensors that hold the values of a new model (``--allow-missing``).
        left_out: unexpected tensors that are not in the result (``--allow-unexpected``).
        not_finite: tensor of the result -> values that are NaN or infinite.
        provenance: what the source says of itself: vocabulary, licence, step.
        source_files, target_files: name -> [bytes, sha256].
    """

    source: str
    target: str
    kind: str
    layout: str
    to: str
    dtype: str
    mapped: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    not_finite: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    source_files: dict[str, list[Any]] = field(default_factory=dict)
    target_files: dict[str, list[Any]] = field(default_factory=dict)

    def add_plan(self, plan: KeyPlan) -> None:
        """Count what a key map does. Where several follow each other, each is added."""
        counted = Counter(step.operation for step in plan.steps if step.operation != "copy")
        self.operations = dict(Counter(self.operations) + counted)
        self.tied |= plan.tied
        self.ignored |= plan.ignored

    def text(self) -> str:
        """A few lines for people; counts, and the first names of each kind."""
        lines = [
            f"{self.source} ({self.kind}, {self.layout}) -> {self.target} ({self.to}, {self.dtype})",
            f"{self.mapped} tensors" + "".join(f", {count} {what}" for what, count in self.operations.items()),
        ]
        for label, names in (
            ("tied, written once", self.tied),
            ("ignored", [f"{name} ({why})" for name, why in self.ignored.items()]),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("new, with fresh values", self.fresh),
            ("left out", self.left_out),
            ("WITH NaN OR INFINITY", [f"{name} ({count} values)" for name, count in self.not_finite.items()]),
        ):
            if names:
                lines.append(f"{len(names)} {label}: {', '.join([*names][:_SHOWN])}{', ...' * (len(names) > _SHOWN)}")
        for label, files in (("from", self.source_files), ("to", self.target_files)):
            lines += [f"{label} {name}: {size} bytes, sha256 {digest}" for name, (size, digest) in files.items()]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write all of it as JSON.

        Raises:
            OSError: it cannot be written.
        """
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", encoding="utf-8")


def digests(files: Iterable[Path], root: Path, known: Mapping[Path, str] = _NONE) -> dict[str, list[Any]]:
    """Name below ``root`` (or of the file) -> [bytes, sha256]; what is ``known`` is not read again.

    Raises:
        OSError: a file cannot be read.
    """
    base = root if root.is_dir() else root.parent
    return {
        str(path.relative_to(base)) if path.is_relative_to(base) else path.name: [
            path.stat().st_size,
            known.get(path) or file_digest(path, hashlib.sha256),
        ]
        for path in files
    }
