"""A recipe's file with another token budget: every other byte stays, comments too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vlscale.config import load_recipe
from vlscale.errors import VlscaleError
from vlscale.plan.calibration import check_target_folder, write_whole

_KEY = "micro_batch_tokens"
_DECIDES = ("model", "data", "batch", "objectives", "optimizer", "activation_checkpointing")
"""Sections that decide which budget fits,"""
_DECIDES_NOT = re.compile(r"data\.((datasets|validation)\.\d+\.root|cache|cache_limit|workers|prefetch|verify)")
"""but for where the data lie and how they are read."""


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Raises:
        VlscaleError: its folder is missing, it is a folder, or it exists and may not be replaced.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise VlscaleError(f"--write {path}: expected a name that ends in .yaml")
    check_target_folder(path, "--write")
    if path.exists() and not overwrite:
        raise VlscaleError(f"--write {path}: exists; name another file, or add --overwrite")


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse to write what was found under overrides that the file would not hold.

    Raises:
        VlscaleError: an override that decides which budget fits is named.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] in _DECIDES and not _DECIDES_NOT.fullmatch(key):
            raise VlscaleError(
                f"--write: the budget would be that of --set {override}, which the file does not say: write it into a "
                f"copy of the recipe and probe that, or drop --write"
            )


def write_budget(recipe: Path, target: Path, tokens: int, overwrite: bool) -> None:
    """Write a copy of ``recipe`` with ``batch.micro_batch_tokens`` replaced; whole or not at all.

    Raises:
        VlscaleError: see :func:`check_target`; or the place of the value is not found in the file.
    """
    check_target(target, overwrite)
    expected = load_recipe(recipe, (f"batch.{_KEY}={tokens}",))
    text = with_tokens(recipe.read_text(encoding="utf-8"), tokens)
    if text is not None:
        draft = target.with_name(f".{target.stem}.draft{target.suffix}")
        write_whole(draft, text, "--write")
        try:
            if load_recipe(draft) == expected:
                write_whole(target, text, "--write")
                return
        except VlscaleError:
            pass
        finally:
            draft.unlink(missing_ok=True)
    raise VlscaleError(
        f"--write {target}: the batch section of {recipe} is written in a way that is not understood; set "
        f"batch.{_KEY}: {tokens} there by hand"
    )


def with_tokens(text: str, tokens: int) -> str | None:
    """Return the recipe's text with the value replaced, or added to its batch section; None where there is none."""
    lines = text.splitlines(keepends=True)
    start = next((number for number, line in enumerate(lines) if re.match(r"batch\s*:", line)), None)
    if start is None:
        return None
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " \t#"):
        end += 1
    for number in range(start, end):
        code, mark, comment = lines[number].partition("#")
        replaced, count = re.subn(rf"\b({_KEY}\s*:\s*)[^\s,}}]+", rf"\g<1>{tokens}", code)
        if count:
            lines[number] = replaced + mark + comment
            return "".join(lines)
    opening = re.match(r"batch\s*:\s*(\{)?", lines[start])
    assert opening is not None
    if opening[1]:
        lines[start] = f"{lines[start][: opening.end()]}{_KEY}: {tokens}, {lines[start][opening.end() :]}"
        return "".join(lines)
    indent = next((re.match(r"\s+", line) for line in lines[start + 1 : end] if re.match(r"[ ]+[a-z]", line)), None)
    lines.insert(start + 1, f"{indent[0] if indent else '  '}{_KEY}: {tokens}\n")
    return "".join(lines)
