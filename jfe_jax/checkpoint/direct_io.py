"""Files that go from a few reused buffers straight to the disk, past the kernel's page cache.

Through the cache, a model takes as many new pages as it has: each is found, filled, and written back later. On a
virtual machine finding one can cost ten times what filling it does, and a model as large as the memory pushes out
everything else (docs/performance.md).
"""

import ctypes
import errno
import fcntl
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Place in memory, place in the file and length of such a write are multiples of the disk's block: 4 KiB at most.
_BLOCK = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
# Of a stream at a time: large enough for the disk's full rate.
_WRITE_BYTES = 16 << 20


class AlignedBuffer:
    """Memory that holds one file's numbers at a time."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._size = 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """What `write` will write, to be filled; it is the same memory at every call."""
        self._size = math.prod(shape) * dtype.itemsize
        if len(self._bytes) < self._size:
            self._bytes = _aligned_empty(self._size)
        return self._bytes[: self._size].view(dtype).reshape(shape)

    def write(self, path: Path) -> None:
        """Makes the file, of the numbers in C order. A power cut may take it before `sync`. Raises OSError."""
        file = _open_direct(path)
        try:
            _pwrite_all(file, self._bytes[: _round_up_to_block(self._size)], 0)
            os.ftruncate(file, self._size)
        finally:
            os.close(file)


class DirectWriter:
    """A file that is written from its start to its end, the part before while the next one is made.

    As a context: at its end the file is whole, but for what a power cut may take before `sync`; OSErrors of the disk
    come from any of its methods.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open_direct(path)
        self._filling, self._other = _aligned_empty(_WRITE_BYTES), _aligned_empty(_WRITE_BYTES)
        self._size = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def write(self, data: np.ndarray) -> None:
        """Appends a contiguous array's bytes, which are taken at once."""
        # NumPy's own types only have the buffer that bytes are.
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

    def _flush(self, place: int, size: int) -> None:
        self._wait()
        self._writing = self._thread.submit(_pwrite_all, self._file, self._filling[:size], place)
        self._filling, self._other = self._other, self._filling

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()


def sync_file_system(directory: Path) -> None:
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


def _round_up_to_block(size: int) -> int:
    """Bytes of the blocks that hold so many."""
    return -(-size // _BLOCK) * _BLOCK


def _aligned_empty(size: int) -> np.ndarray:
    """Memory for at least so many bytes that begins where a block can."""
    # NumPy asks for huge pages, of which a disk takes one as one piece.
    spare = np.zeros(_round_up_to_block(size) + _BLOCK, np.uint8)
    return spare[-spare.ctypes.data % _BLOCK :][: _round_up_to_block(size)]


def _open_direct(path: Path) -> int:
    # A file system without direct writes says so when the file is opened, or at the first of them.
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _pwrite_all(file: int, blocks: np.ndarray, place: int) -> None:
    done = 0
    while done < len(blocks):
        try:
            done += os.pwrite(file, blocks[done:], place + done)
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
