"""Writes files with direct I/O from a few reused buffers, bypassing the kernel's page cache.

With buffered I/O a model needs a new page-cache page for every page of its data: each is allocated, filled, and written
back later. On a virtual machine, allocating a page can cost ten times as much as filling it. A model as large as the
memory evicts everything else (docs/performance.md).
"""

import ctypes
import errno
import fcntl
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Direct I/O needs the memory address, the file offset and the length of each write to be multiples of the disk's block
# size, which is 4 KiB at most.
_BLOCK = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
# Bytes per write of a stream: large enough for the disk's full bandwidth.
_WRITE_BYTES = 16 << 20


class AlignedBuffer:
    """A reusable block-aligned buffer that holds the data of one file at a time."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._size = 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns the array to fill, whose contents `write` writes; every call returns the same memory."""
        self._size = math.prod(shape) * dtype.itemsize
        if len(self._bytes) < self._size:
            self._bytes = _aligned_empty(self._size)
        return self._bytes[: self._size].view(dtype).reshape(shape)

    def write(self, path: Path) -> None:
        """Writes the array to a new file, in C order.

        The file is durable only after `sync_file_system`.

        Raises:
          OSError: The file cannot be written.
        """
        file = _open_direct(path)
        try:
            _pwrite_all(file, self._bytes[: _round_up_to_block(self._size)], 0)
            os.ftruncate(file, self._size)
        finally:
            os.close(file)


class DirectWriter:
    """Writes a file sequentially, double-buffered: one buffer is filled while a thread writes the other.

    Use it as a context manager. The file is complete when the context exits, and durable only after
    `sync_file_system`. Any method may raise an OSError of an earlier write.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open_direct(path)
        self._filling, self._other = _aligned_empty(_WRITE_BYTES), _aligned_empty(_WRITE_BYTES)
        self._size = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def write(self, data: np.ndarray) -> None:
        """Appends the bytes of a contiguous array, which are copied before this returns."""
        # Only NumPy's built-in dtypes support the buffer protocol, so the array is viewed as bytes.
        rest = data.reshape(-1).view(np.uint8)
        while len(rest):
            used = self._size % _WRITE_BYTES
            part, rest = rest[: _WRITE_BYTES - used], rest[_WRITE_BYTES - used :]
            self._filling[used : used + len(part)] = part
            self._size += len(part)
            if used + len(part) == _WRITE_BYTES:
                self._flush(self._size - _WRITE_BYTES, _WRITE_BYTES)

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                last = self._size % _WRITE_BYTES
                self._flush(self._size - last, _round_up_to_block(last))
                self._wait()
                os.ftruncate(self._file, self._size)
        finally:
            self._thread.shutdown()
            os.close(self._file)

    def _flush(self, offset: int, size: int) -> None:
        self._wait()
        self._writing = self._thread.submit(_pwrite_all, self._file, self._filling[:size], offset)
        self._filling, self._other = self._other, self._filling

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()


def sync_file_system(directory: Path) -> None:
    """Waits until everything written to the file system of `directory` is on disk.

    Raises:
      OSError: The file system reports an error.
    """
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    finally:
        os.close(descriptor)


def _round_up_to_block(size: int) -> int:
    """Rounds a size in bytes up to a multiple of the block size."""
    return -(-size // _BLOCK) * _BLOCK


def _aligned_empty(size: int) -> np.ndarray:
    """Allocates at least `size` bytes at a block-aligned address."""
    # NumPy requests huge pages, and the disk takes a huge page as one segment.
    spare = np.zeros(_round_up_to_block(size) + _BLOCK, np.uint8)
    return spare[-spare.ctypes.data % _BLOCK :][: _round_up_to_block(size)]


def _open_direct(path: Path) -> int:
    # A file system without direct I/O fails with EINVAL when the file is opened, or at the first write.
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _pwrite_all(file: int, blocks: np.ndarray, offset: int) -> None:
    done = 0
    while done < len(blocks):
        try:
            done += os.pwrite(file, blocks[done:], offset + done)
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
