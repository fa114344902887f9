"""The edge to mosaicml-streaming: the one module that imports it, and only when something is written.

Reading needs none of it: see ``shard.py`` and ``reader.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlscale.data.index import HASH
from vlscale.errors import VlscaleError

MAX_SHARD_BYTES = 1 << 31


def open_writer(folder: Path, columns: Mapping[str, str], shard_bytes: int) -> Any:
    """Return a ``streaming.MDSWriter`` into ``folder``: uncompressed shards of about ``shard_bytes``, xxh64 hashes.

    Raises:
        VlscaleError: mosaicml-streaming is not installed, or ``shard_bytes`` is out of range.
    """
    if not 1 <= shard_bytes <= MAX_SHARD_BYTES:
        raise VlscaleError(f"{folder}: shard_bytes is {shard_bytes}, expected 1..{MAX_SHARD_BYTES}")
    try:
        from streaming import MDSWriter
    except ImportError as error:
        raise VlscaleError(
            f"{folder}: writing needs mosaicml-streaming ({error}); pip install 'vlscale[train]'"
        ) from None

    class Writer(MDSWriter):
        """Does not write an empty shard when the first row alone is larger than a shard."""

        def flush_shard(self) -> None:
            if self.new_samples:
                super().flush_shard()

    return Writer(out=str(folder), columns=dict(columns), hashes=[HASH], size_limit=shard_bytes)
