"""What the doctor says: one line for each thing looked at, and the cure with everything that is not well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        section: heading that it stands under.
        name: what was looked at; the same in every run, for programs.
        state: ``failed``: training will not run, or not rightly. ``warning``: it will, with less comfort or speed.
        text: what was found.
        cure: what to do; empty where nothing is to be done.
    """

    section: str
    name: str
    state: State
    text: str
    cure: str = ""

    def __post_init__(self) -> None:
        if (self.state == "ok") == bool(self.cure):
            raise ValueError(f"{self.name}: a {self.state} line {'has a' if self.cure else 'without'} cure")


@dataclass(frozen=True)
class Section:
    """Makes the findings of one section."""

    title: str

    def ok(self, name: str, text: str) -> Finding:
        """All is well."""
        return Finding(self.title, name, "ok", text)

    def warning(self, name: str, text: str, cure: str) -> Finding:
        """It runs, but."""
        return Finding(self.title, name, "warning", text, cure)

    def failed(self, name: str, text: str, cure: str) -> Finding:
        """It does not run."""
        return Finding(self.title, name, "failed", text, cure)

    def bad(self, serious: bool, name: str, text: str, cure: str) -> Finding:
        """Failed where it is serious, otherwise a warning."""
        return Finding(self.title, name, "failed" if serious else "warning", text, cure)


def exit_status(findings: Iterable[Finding]) -> int:
    """1 if something failed, else 0."""
    return int(any(finding.state == "failed" for finding in findings))


def some(items: Sequence[str], shown: int = 5) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def counted(count: int, what: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {what}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Seconds for people, in the largest unit that is not 0."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"
