"""What a conversion did with every tensor, as text and as JSON."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.convert.steps import KeyPlan
from vlscale.hashing import file_digest

_SHOWN = 8
_NONE: Mapping[Path, str] = {}
_FRESH = "a new model's values"


@dataclass
class Report:
    """See :func:`Report.text`; lists and mappings name every tensor.

    Attributes:
        source, target: paths as given.
        kind, layout: of the source: its files and its names.
        to, dtype: of the result.
        mapped: tensors of the result.
        operations: operation -> tensors of the result that it made (transposed, concatenated, ...).
        tensors: tensor of the result -> ``sources``, the names that it is made of, and ``operation``: what was done
            with them, in order ("concatenate, second third"; "copy" where nothing was); a second name of a tensor that
            is written once also has ``shares``, the first.
        tied: name -> name of the tensor that it must equal; compared and written once.
        ignored: name -> why.
        missing, unexpected: what the result lacks, and what nothing is known about.
        fresh: missing tensors that hold the values of a new model (``--allow-missing``).
        left_out: unexpected tensors that are not in the result (``--allow-unexpected``).
        not_finite: tensor of the result -> values that are NaN or infinite.
        vanished: tensor of the result -> values that the dtype made zero.
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
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    not_finite: dict[str, int] = field(default_factory=dict)
    vanished: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    source_files: dict[str, list[Any]] = field(default_factory=dict)
    target_files: dict[str, list[Any]] = field(default_factory=dict)

    def add_plan(self, plan: KeyPlan) -> None:
        """Add what a key map does. Where several follow each other, each is added: names of one are made by the last.

        What only a later map takes, and none before it makes, holds a new model's values.
        """
        known = self.tensors
        self.tensors = {step.target: _entry(step.sources, step.operation, known) for step in plan.steps}
        for second, first in plan.copies.items():
            self.tensors[second] = {**self.tensors[first], "shares": first}
        self._count(step.operation for step in plan.steps)
        self.tied |= plan.tied
        self.ignored |= plan.ignored

    def add_entries(self, entries: Mapping[str, tuple[Sequence[str], str]]) -> None:
        """Add what was done before the first key map: name -> (stored names, operation), of a text encoder."""
        self.tensors |= {name: _entry(sources, operation, {}) for name, (sources, operation) in entries.items()}
        self._count(operation for _, operation in entries.values())

    def _count(self, operations: Iterable[str]) -> None:
        counted = Counter(operation for operation in operations if operation != "copy")
        self.operations = dict(Counter(self.operations) + counted)

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
            ("WITH VALUES ROUNDED TO ZERO", [f"{name} ({count} values)" for name, count in self.vanished.items()]),
        ):
            if names:
                lines.append(f"{len(names)} {label}: {', '.join([*names][:_SHOWN])}{', ...' * (len(names) > _SHOWN)}")
        for label, files in (("from", self.source_files), ("to", self.target_files)):
            lines += [f"{label} {name}: {size} bytes, sha256 {digest}" for name, (size, digest) in files.items()]
        return "\n".join(lines)


def _entry(sources: Sequence[str], operation: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What one tensor is made of, in names of the first source; ``known`` is what is made before, empty at first."""
    stored: list[str] = []
    before: dict[str, None] = {}  # query, key and value may each have been transposed: that is told once
    for name in sources:
        fallback = {"sources": [], "operation": _FRESH} if known else {"sources": [name], "operation": "copy"}
        made = known.get(name, fallback)
        stored += made["sources"]
        before[made["operation"]] = None
    done = [each for each in (*before, operation) if each != "copy"]
    return {"sources": stored, "operation": ", ".join(done) or "copy"}


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
