"""What a recipe is made of: sections, and kinds of values (shares, sizes in bytes, folders and URLs)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


class Section(BaseModel):
    """Base of every section: frozen, numbers finite, and without tolerance for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _bytes(value: Any) -> Any:
    """``64gb`` as a number of bytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", value) if isinstance(value, str) else None
    if isinstance(value, str) and (not match or match[2].lower() not in _UNITS):
        raise ValueError("expected a number of bytes, such as 64gb, 500mb or 64000000000")
    return round(float(match[1]) * _UNITS[match[2].lower()]) if match else value


def is_url(root: Any) -> bool:
    """Is this a remote's URL (``s3://...``, ``dbfs:/...``) rather than a folder?"""
    return isinstance(root, str) and bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|dbfs:/", root))


def _root(value: Any) -> Any:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("expected a folder, or a URL such as s3://bucket/folder")
    return value if is_url(value) else Path(value).expanduser()


def _folder(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, (str, Path)) else value


Folder = Annotated[Path, BeforeValidator(_folder)]
Root = Annotated[Path | str, BeforeValidator(_root)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
