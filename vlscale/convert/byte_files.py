"""What the readers and writers of raw tensors share: ranges of a file that must not change, fresh files.

Ranges are read into memory of their own and not mapped: a mapped file that is truncated meanwhile kills the process.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlscale.convert.source import TensorInfo
from vlscale.errors import VlscaleError

_PIECE = 1 << 24
Stamp = tuple[int, int, int]
"""Size, time of change (ns) and inode: what tells that a file is still the one that was opened."""


class ByteFile:
    """An open file, read by ranges; a context manager that closes it.

    Args:
        path: the file, named in errors.
        stream: already open (an unpacked copy without a name); None opens ``path``.
        expected: its stamp at an earlier opening.

    Attributes:
        size: bytes.
        stamp: see :data:`Stamp`.

    Raises:
        VlscaleError: not a plain file, cannot be read, or another one than ``expected``.
    """

    def __init__(self, path: Path, stream: BinaryIO | None = None, expected: Stamp | None = None) -> None:
        self.path = path
        try:
            # A pipe would make open() wait for ever.
            if stream is None and not path.is_file():
                raise VlscaleError(f"{path}: no such file, or not a plain one; give the path of a checkpoint")
            self._stream = path.open("rb") if stream is None else stream
            self.stamp = _stamp(self._stream)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise VlscaleError(f"{path}: cannot be read ({error}); check the path and its permissions") from None
        self.size = self.stamp[0]
        if expected is not None and expected != self.stamp:
            self.close()
            raise VlscaleError(f"{path}: has been changed since it was opened; run again on a file that rests")

    def read(self, where: str, begin: int, count: int) -> bytes:
        """Return ``count`` bytes from byte ``begin`` on; the caller has bounded the count.

        Raises:
            VlscaleError: the file ends earlier, or has been changed since it was opened.
        """
        content = bytearray(count)
        self._fill(where, memoryview(content), begin)
        return bytes(content)

    def tensor(self, where: str, info: TensorInfo, begin: int) -> Tensor:
        """Return the tensor whose little-endian, row-major elements begin at byte ``begin``.

        Raises:
            VlscaleError: see :meth:`read`; a boolean that is neither 0 nor 1; more than fits into memory.
        """
        if not 0 <= begin <= begin + info.nbytes <= self.size:
            raise VlscaleError(f"{where}: ends at byte {begin + info.nbytes} of {self.size}; the file is truncated")
        try:
            flat = torch.empty(info.nbytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            raise VlscaleError(
                f"{where}: its {info.nbytes} bytes do not fit into memory; use a larger machine"
            ) from None
        self._fill(where, flat.numpy().data, begin)
        if info.dtype is torch.bool and flat.numel() and int(flat.max()) > 1:
            raise VlscaleError(f"{where}: holds a boolean {int(flat.max())}, expected 0 or 1; the file is damaged")
        return flat.view(info.dtype).reshape(info.shape)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self, where: str, room: memoryview, begin: int) -> None:
        done = 0
        try:
            if _stamp(self._stream) != self.stamp:
                raise VlscaleError(f"{where}: the file has been changed since it was opened; run again when it rests")
            while done < len(room):
                step = os.preadv(self._stream.fileno(), [room[done:]], begin + done)
                if step == 0:
                    raise VlscaleError(
                        f"{where}: the file ends at byte {begin + done}; it is truncated, fetch it again"
                    )
                done += step
        except OSError as error:
            raise VlscaleError(f"{where}: cannot be read ({error.strerror}); check the disk") from None


def _stamp(stream: BinaryIO) -> Stamp:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


class ByteStream(io.RawIOBase):
    """A :class:`ByteFile` as a stream to parse; the caller closes the file."""

    def __init__(self, file: ByteFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte; the end of the file is where its size was when it was opened."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        return self._place

    def readinto(self, target: Any) -> int:
        """Fill ``target`` as far as the file goes."""
        room = memoryview(target).cast("B")
        count = max(0, min(len(room), self._file.size - self._place))
        room[:count] = self._file.read(str(self._file.path), self._place, count)
        self._place += count
        return count


class FreshFiles:
    """New files of one folder, all or none: whatever was made is deleted when the block fails.

    Args:
        folder: made if it is missing; what it holds already is never replaced.

    Raises:
        VlscaleError: (on leaving the block) a file exists already, or the disk refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []
        self._made = False

    def create(self, name: str) -> BinaryIO:
        """Open a new file for writing; ``name`` has been checked."""
        path = self.folder / name
        stream = path.open("xb")
        self.paths.append(path)
        return stream

    def __enter__(self) -> FreshFiles:
        try:
            self._made = not self.folder.is_dir()
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise VlscaleError(f"{self.folder}: cannot be made ({error.strerror}); its parent must exist") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        for path in self.paths:
            path.unlink(missing_ok=True)
        if self._made:
            with suppress(OSError):  # somebody else has put a file there
                self.folder.rmdir()
        if isinstance(error, FileExistsError):
            raise VlscaleError(f"{error.filename}: exists already; write into an empty folder") from None
        if isinstance(error, OSError):
            raise VlscaleError(f"{self.folder}: cannot be written ({error.strerror}); check its space") from None


def write_tensor(stream: BinaryIO, name: str, tensor: Tensor, info: TensorInfo) -> None:
    """Write a tensor's elements row-major; a strided view is copied in pieces, not whole.

    Raises:
        ValueError: the tensor is not what ``info`` promised (the file's header tells that already).
    """
    if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
        raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)}, promised {info.dtype} {list(info.shape)}")
    for piece in _pieces(tensor.detach().cpu()):
        # Flat, whatever the strides of sides of length 1: those tell nothing, but torch would not see such as bytes.
        flat = piece.as_strided((piece.numel(),), (1,))
        stream.write(flat.view(torch.uint8).numpy().data)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield tensor
        return
    rows = max(1, _PIECE // (tensor[0].numel() * tensor.dtype.itemsize))
    for first in range(0, tensor.shape[0], rows):
        yield tensor[first : first + rows].contiguous()
