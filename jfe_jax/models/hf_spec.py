"""One parameter of ours and its tensor in Hugging Face files: the same numbers in another order.

A torch Linear is [out, in] and knows no heads; ours is [in axes…, out axes…]. Reordering loses nothing, so a tensor
that goes out and comes back is the same to the bit.
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """One parameter.

    Attributes:
      ours: dotted path in the model.
      theirs: name in the file, `{layer}` if stacked.
      inner: how many of our leading axes (after L) are the torch matrix's `in`; 0 if the axes stand in the same order.
      convolution: theirs is a convolution's [out, colours, y, x].
    """

    ours: str
    theirs: str
    inner: int = 0
    convolution: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the torch tensor for one layer of ours, of `shape` without L."""
        if self.convolution:
            return (shape[3], shape[2], shape[0], shape[1])
        if self.inner:
            return (_size(shape[self.inner :]), _size(shape[: self.inner]))
        return (_size(shape),) if "bias" in self.theirs else shape

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One layer's torch tensor in our order, of `shape`."""
        out = np.empty(shape, tensor.dtype)
        self.part(shape, tuple(slice(0, size) for size in shape), tensor.__getitem__, out)
        return out

    def part(
        self,
        shape: tuple[int, ...],
        index: tuple[slice, ...],
        fetch: Callable[[tuple[slice, ...]], np.ndarray],
        out: np.ndarray,
    ) -> None:
        """Puts a part of one layer of ours into `out`; no more of the torch tensor is read than contains it.

        Args:
          shape: of our whole layer.
          index: a slice with start and stop for each of our axes.
          fetch: gives a part of the torch tensor.
          out: contiguous, of the part's shape.
        """
        inner, outer = _span(shape[: self.inner], index[: self.inner]), _span(shape[self.inner :], index[self.inner :])
        if self.convolution:
            everything = (slice(None),) * 4
            out[...] = fetch(everything).transpose(2, 3, 1, 0)[index]
        elif self.inner:
            theirs = fetch((outer.flat, inner.flat))
            if theirs.size == out.size:
                transpose(theirs, out.reshape(theirs.shape[::-1]))
            else:
                out[...] = transposed(theirs).reshape(*inner.shape, *outer.shape)[(*inner.rest, *outer.rest)]
        elif len(shape) == len(self.their_shape(shape)):
            out[...] = fetch(index)
        else:
            out[...] = fetch((outer.flat,)).reshape(outer.shape)[outer.rest]

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """One layer of ours as a contiguous torch tensor."""
        if self.convolution:
            return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        shape = self.their_shape(array.shape)
        return transposed(array.reshape(shape[::-1])) if self.inner else np.ascontiguousarray(array.reshape(shape))


def linear(ours: str, theirs: str, inner: int = 1) -> Entry:
    """A torch Linear's matrix."""
    return Entry(ours, f"{theirs}.weight", inner)


class TensorNames(NamedTuple):
    """The names of a backbone's tensors.

    Attributes:
      roots: The prefixes that names have in its table.
      spellings: Patterns and replacements that rewrite other versions' names into the table's, from left to right.
      ignored: Names that an encoder has no use for by design.
      table: Given the dotted paths of a model's parameters, returns its entries, or None if the model is another one.
    """

    roots: tuple[str, ...]
    spellings: tuple[tuple[re.Pattern[str], str], ...]
    ignored: re.Pattern[str] | None
    table: Callable[[Collection[str]], tuple[Entry, ...] | None]


def block(ours: str, theirs: str) -> Iterator[Entry]:
    """The layers of SigLIP's and CLIP's towers, `models.vision.VisionBlock`; both names are prefixes."""
    for name, short in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield linear(f"{ours}attention.{name}_dnh", f"{theirs}self_attn.{short}")
        yield Entry(f"{ours}attention.{name}_bias_nh", f"{theirs}self_attn.{short}.bias")
    yield linear(f"{ours}attention.out_nhd", f"{theirs}self_attn.out_proj", inner=2)
    yield Entry(f"{ours}attention.out_bias_d", f"{theirs}self_attn.out_proj.bias")
    for name, norm in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        yield Entry(f"{ours}{name}.scale_d", f"{theirs}{norm}.weight")
        yield Entry(f"{ours}{name}.bias_d", f"{theirs}{norm}.bias")
    for weight, bias, short in (("up_df", "up_bias_f", "fc1"), ("down_fd", "down_bias_d", "fc2")):
        yield linear(f"{ours}{weight}", f"{theirs}mlp.{short}")
        yield Entry(f"{ours}{bias}", f"{theirs}mlp.{short}.bias")


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transpose."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    transpose(matrix, out)
    return out


def transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """Fills `out`, block by block; all at once takes four times as long."""
    # What a core's cache holds. Rows of a power of two of bytes have the same place in it: an odd cache line between
    # them keeps them from pushing each other out.
    height, width, odd = 256 // matrix.itemsize, 2048, 64 // matrix.itemsize
    block = np.empty((height, width + odd), matrix.dtype)
    for row in range(0, matrix.shape[0], height):
        for column in range(0, matrix.shape[1], width):
            part = matrix[row : row + height, column : column + width]
            held = block[: part.shape[0], : part.shape[1]]
            held[...] = part
            out[column : column + width, row : row + height] = held.T


class _Span(NamedTuple):
    """A part of several axes, widened so that it is one run of them flattened: all axes but the first are whole.

    Attributes:
      flat: the run.
      shape: of what it holds.
      rest: takes the part out of that.
    """

    flat: slice
    shape: tuple[int, ...]
    rest: tuple[slice, ...]


def _span(shape: tuple[int, ...], index: tuple[slice, ...]) -> _Span:
    if not shape:
        return _Span(slice(0, 1), (), ())
    row = _size(shape[1:])
    first = index[0]
    held = (first.stop - first.start, *shape[1:])
    return _Span(slice(first.start * row, first.stop * row), held, (slice(None), *index[1:]))


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
