"""Files that go from one reused buffer straight to the disk, past the kernel's page cache.

Through the cache, a model takes as many new pages as it has: each is found, filled, and written back later. On a
virtual machine finding one can cost ten times what filling it does, and a model as large as the memory pushes out
everything else (docs/performance.md).
"""

import ctypes
import errno
import math
import os
from pathlib import Path

import numpy as np

# Place in memory, place in the file and length of such a write are multiples of the disk's block: 4 KiB at most.
_BLOCK = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


class Buffer:
    """Memory that holds one file's numbers at a time."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._size = 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """What `write` will write, to be filled; it is the same memory at every call."""
        self._size = math.prod(shape) * dtype.itemsize
        room = -(-self._size // _BLOCK) * _BLOCK
        if len(self._bytes) < room:
            # NumPy asks for huge pages, of which a disk takes one as one piece.
            spare = np.zeros(room + _BLOCK, np.uint8)
            self._bytes = spare[-spare.ctypes.data % _BLOCK :][:room]
        return self._bytes[: self._size].view(dtype).reshape(shape)

    def write(self, path: Path) -> None:
        """Makes the file, of the numbers in C order. A power cut may take it before `sync`. Raises OSError."""
        try:
            self._write(path, _DIRECT)
        except OSError as error:
            # A file system without such writes says so when the file is opened, or at the first of them.
            if error.errno != errno.EINVAL or not _DIRECT:
                raise
            self._write(path, 0)

    def _write(self, path: Path, flags: int) -> None:
        blocks = memoryview(self._bytes[: -(-self._size // _BLOCK) * _BLOCK])
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | flags, 0o666)
        try:
            done = 0
            while done < len(blocks):
                done += os.pwrite(file, blocks[done:], done)
            os.ftruncate(file, self._size)
        finally:
            os.close(file)


def sync(directory: Path) -> None:
    """Returns when the disk has all that was written to the file system of `directory`. Raises OSError."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    place = os.open(directory, os.O_RDONLY)
    try:
        if syncfs(place):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    finally:
        os.close(place)
