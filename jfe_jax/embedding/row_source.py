"""Where the candidates of a search are: in memory, or in a file that is read a block at a time.

Axes: N rows, E embedding.
"""

import os
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from jfe_jax.errors import UserError


class RowSource(Protocol):
    """N embeddings of width E.

    Attributes:
      shape: (N, E).
      norm: no row is longer than this; None if that is not known.
    """

    shape: tuple[int, int]
    norm: float | None

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows as they are stored, float or int8 [n, E], and what each is to be multiplied by, float32 [n] or None."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, int [n] → float64 [n, E]."""


class ArrayRows:
    """The rows of a float array, or of a memory map of one."""

    def __init__(self, array: np.ndarray, norm: float | None = None):
        self.array, self.shape, self.norm = array, array.shape, norm

    def read(self, start: int, stop: int) -> tuple[np.ndarray, None]:
        return np.asarray(self.array[start:stop]), None

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.array[rows].astype(np.float64)


class FileRows:
    """The rows of a `.npy` file in C order; read, not mapped, so that only what is asked for takes memory.

    Args:
      path: float32, float16 or int8 [N, E].
      scales: float32 [N], what the rows of an int8 file are to be multiplied by.

    Raises:
      UserError: it is no such file, or is cut short.
    """

    def __init__(self, path: Path, scales: np.ndarray | None = None, norm: float | None = None):
        self.path, self.scales, self.norm = path, scales, norm
        try:
            mapped = np.load(path, mmap_mode="r")
            self._file = os.open(path, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no embeddings, or cut short ({error})") from error
        # Not __del__: when Python ends there is no os any more.
        weakref.finalize(self, os.close, self._file)
        self.shape, self.dtype, self._offset = mapped.shape, mapped.dtype, mapped.offset
        if not mapped.flags.c_contiguous or mapped.ndim != 2 or self.dtype not in (np.float32, np.float16, np.int8):
            raise UserError(f"{path}: float32, float16 or int8 rows are wanted, not {self.dtype} {list(self.shape)}")
        self._row_bytes = self.shape[1] * self.dtype.itemsize

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        # Python's integers: byte 2^31 of a file is beyond int32.
        start, stop = int(start), min(int(stop), self.shape[0])
        rows = np.empty((stop - start, self.shape[1]), self.dtype)
        left, at = memoryview(rows.reshape(-1).view(np.uint8)), self._offset + start * self._row_bytes
        while left:
            # One call reads at most 2 GiB.
            done = os.preadv(self._file, [left], at)
            if not done:
                raise UserError(f"{self.path}: cut short while it was read")
            left, at = left[done:], at + done
        return rows, None if self.scales is None else self.scales[start:stop]

    def take(self, rows: np.ndarray) -> np.ndarray:
        stored = np.empty((len(rows), self.shape[1]), self.dtype)
        into, size = memoryview(stored.reshape(-1).view(np.uint8)), self._row_bytes
        for place, row in enumerate(rows.tolist()):
            if os.preadv(self._file, [into[place * size : (place + 1) * size]], self._offset + row * size) != size:
                raise UserError(f"{self.path}: cut short while it was read")
        # The product in float32 is what the row stands for, wherever it is read.
        whole = stored if self.scales is None else stored.astype(np.float32) * self.scales[rows][:, None]
        return whole.astype(np.float64)


class RowSlice:
    """Rows start … stop - 1 of others."""

    def __init__(self, rows: RowSource, start: int, stop: int):
        self._rows, self._start, self._stop = rows, start, stop
        self.shape, self.norm = (stop - start, rows.shape[1]), rows.norm

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self._rows.read(self._start + start, min(self._start + stop, self._stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._rows.take(np.asarray(rows) + self._start)


def largest_norm(rows: RowSource, block: int = 65536) -> float:
    """The length of the longest row; reads them all."""
    largest = 0.0
    for start in range(0, rows.shape[0], block):
        stored, scales = rows.read(start, start + block)
        lengths = _lengths(stored.astype(np.float32, copy=False))
        if scales is not None:
            lengths = lengths * scales
        largest = max(largest, float(lengths.max(initial=0)))
    return largest


def _lengths(rows: np.ndarray) -> np.ndarray:
    squares = np.einsum("ne,ne->n", rows, rows)
    if not 1e-20 < squares.max(initial=0) < 1e30:
        # Too far from 1 for squares in float32.
        squares = np.einsum("ne,ne->n", rows, rows, dtype=np.float64)
    return np.sqrt(squares)


def require_finite(embeddings: np.ndarray, names: list[str], what: str) -> None:
    """Raises UserError with the first name of a row [B, E] that holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(bad):
        raise UserError(
            f"{what}: the embedding of {names[bad[0]]} is not finite ({len(bad)} of {len(embeddings)} are so): "
            "training has probably diverged; take an earlier checkpoint"
        )
