"""Looks over the pages of an LMDB file before liblmdb does, which aborts the process at a page of the wrong type.

Branch and leaf pages alone are looked at, whose keys have to be read anyway; the values of feature files lie on
overflow pages. The layout is that of LMDB's data version 1 on 64-bit machines (``mdb.c``: MDB_page, MDB_meta).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = 0xBEEFC0DE
_BRANCH, _LEAF = 1, 2
_HEADER = 16
_EMPTY = (1 << 64) - 1


def page_problem(data: Path, page_size: int) -> str:
    """Return what is wrong with the first branch or leaf page of a file that is none; empty if all are.

    Args:
        data: the file, as large as its header says.
        page_size: bytes of a page.
    """
    pages: NDArray[np.uint8] = np.memmap(data, np.uint8, "r")
    count = len(pages) // page_size
    pages = pages[: count * page_size].reshape(count, page_size)
    found = _root(pages)
    if found is None:
        return ""  # another version of LMDB, which it has to judge itself
    root, depth = found
    if root == _EMPTY or not depth:
        return ""
    level = np.array([root], np.uint64)
    for below in range(depth - 1, -1, -1):
        wrong = _first_wrong(pages, level, _BRANCH if below else _LEAF)
        if wrong:
            return wrong
        if below:
            level = np.concatenate([_children(pages[int(number)]) for number in level])
    return ""


def _root(pages: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Page of the root and depth of the tree, from the newer of the two meta pages."""
    metas = []
    for number in range(min(2, len(pages))):
        fields = struct.unpack_from("<II", pages[number].tobytes(), _HEADER)
        if fields == (_MAGIC, 1):
            body = pages[number].tobytes()[_HEADER + 24 :]
            _flags, depth = struct.unpack_from("<HH", body, 48 + 4)
            (root,) = struct.unpack_from("<Q", body, 48 + 40)
            (transaction,) = struct.unpack_from("<Q", body, 96 + 8)
            metas.append((transaction, root, depth))
    return None if len(metas) < 2 else max(metas)[1:]


def _first_wrong(pages: NDArray[np.uint8], level: NDArray[np.uint64], kind: int) -> str:
    beyond = level >= len(pages)
    if beyond.any():
        return f"page {int(level[beyond.argmax()])} of {len(pages)} is referred to"
    places = level.astype(np.int64)
    numbers = np.ascontiguousarray(pages[places, :8]).view("<u8")[:, 0]
    flags, lower, upper = np.ascontiguousarray(pages[places, 10:16]).view("<u2").T
    wrong = (numbers != level) | (flags & 0xF != kind) | (lower < _HEADER + 2) | (lower > upper)
    wrong |= upper > pages.shape[1]
    return f"page {int(places[wrong.argmax()])} is not what it should be" if wrong.any() else ""


def _children(page: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Pages below a branch page: of each node, 48 bits."""
    lower = int(page[12:14].view("<u2")[0])
    nodes = page[_HEADER:lower].view("<u2").astype(np.int64)
    nodes = np.minimum(nodes, len(page) - 6)
    parts = page[nodes[:, None] + np.arange(6)].astype(np.uint64)
    found: NDArray[np.uint64] = (parts << np.arange(0, 48, 8, dtype=np.uint64)).sum(1, dtype=np.uint64)
    return found
