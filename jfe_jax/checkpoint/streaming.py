"""Writes and reads the arrays of a checkpoint chunk by chunk, for models larger than the memory.

Orbax stores an array in chunks but needs all of it in memory. Here a leaf of the tree is a shape and a function that
reads any slice of it, and its chunks are read and written a few at a time. Reading opens the stored arrays lazily.
"""

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import type_handlers
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.serialization import numpy_leaf_handler, registry

from jfe_jax.checkpoint.direct_io import AlignedBuffer
from jfe_jax.errors import UserError

# Size of a stored chunk, and so of each read and write. From 32 MiB on, glibc maps and clears new pages for every chunk
# that is read, which takes half as long as everything else.
CHUNK_BYTES = 16 << 20
# Chunks processed concurrently: while one waits for the disk, the others are read and transposed.
CHUNKS_IN_FLIGHT = 3
# TensorStore caches a chunk of which only a part was read, for the reads of its other parts.
CACHE_BYTES = 256 << 20

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StreamedArray:
    """An array that is read slice by slice.

    Attributes:
      shape, dtype: Shape and dtype of the full array.
      read: Returns the part at an index, which is one slice per axis with start and stop.
      fill: Writes that part into a contiguous array. Set it if this is cheaper than copying the result of `read`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    fill: Callable[[Index, np.ndarray], None] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def astype(self, dtype: np.dtype) -> "StreamedArray":
        """Returns a view that converts to another dtype when it is read."""
        if dtype == self.dtype:
            return self
        return StreamedArray(self.shape, dtype, lambda index: self.read(index).astype(dtype))

    def into(self, index: Index, out: np.ndarray) -> None:
        """Writes the part at an index into a contiguous array of its shape and this dtype."""
        if self.fill:
            self.fill(index, out)
        else:
            out[...] = self.read(index)


def with_per_layer_chunks(base: ocp.Context) -> ocp.Context:
    """Configures `base` for checkpoints that `open_stored_arrays` reads efficiently.

    Chunks are small, and each holds a single layer where layers are stacked: other formats store layers separately, so
    an export reads them one by one.
    """
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def storage(keypath: Any, value: Any) -> Any:
        stacked = any(getattr(key, "key", getattr(key, "name", None)) == "blocks" for key in keypath)
        # Small arrays are read in one piece.
        per_layer = stacked and math.prod(value.shape) * np.dtype(value.dtype).itemsize > CHUNK_BYTES
        return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if per_layer else ())

    base.array_options.saving.scoped_storage_options_creator = storage
    # Compression shrinks trained weights by a few percent at best and takes several times as long.
    base.array_options.saving.use_compression = False
    return base


def streaming_context(base: ocp.Context) -> ocp.Context:
    """Configures `base` to save `params` that are StreamedArrays, with each chunk as a file of raw numbers."""
    base.checkpointables.registry.add(_StreamedTreeHandler, checkpointable_name="params")
    base.array_options.saving.use_ocdbt = base.array_options.saving.use_zarr3 = False
    return with_per_layer_chunks(base)


def open_stored_arrays(directory: Path) -> dict[str, StreamedArray]:
    """Opens the arrays of an Orbax tree, by dotted path, without reading their data.

    Args:
      directory: Directory of the checkpointable, such as `checkpoints/100/params`.

    Raises:
      UserError: On a later read, if the stored data is damaged.
    """
    tree = _read_metadata(directory)
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})

    def array(name: str) -> StreamedArray:
        # A JSON spec, not a URL, in which `#`, `?`, `|` and `%` have special meanings.
        base = {"driver": "file", "path": f"{directory.absolute()}/"}
        store = (
            {"driver": "ocdbt", "base": base, "path": name}
            if tree["use_ocdbt"]
            else base | {"path": f"{directory.absolute()}/{name}/"}
        )
        driver = "zarr3" if tree["use_zarr3"] else "zarr"
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
        opened = ts.open(spec, context=context, read=True, open=True).result()

        def read(index: Index) -> np.ndarray:
            try:
                return opened[index].read().result()
            except ValueError as error:
                raise UserError(f"{directory}: cannot read {name} ({' '.join(str(error).split())[:300]})") from error

        return StreamedArray(opened.shape, opened.dtype.numpy_dtype, read)

    return {name: array(name) for name in read_stored_names(directory)}


def read_stored_names(directory: Path) -> list[str]:
    """Returns the dotted paths of the arrays of an Orbax tree."""
    leaves = _read_metadata(directory)["tree_metadata"].values()
    # The metadata also lists empty containers of the tree, which have no data.
    leaves = (leaf for leaf in leaves if not leaf["value_metadata"]["skip_deserialize"])
    return [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]


def _read_metadata(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "_METADATA").read_text(encoding="utf-8"))


# Layout and file names of chunks (zarr-specs.readthedocs.io, version 2).
_UNCOMPRESSED = {"compressor": None, "filters": None, "order": "C", "dimension_separator": "."}


class _ChunkWriter(type_handlers.NumpyHandler):
    """Writes chunk files directly, a few at a time. Orbax's own handler passes the full array to TensorStore."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        # Leaves are written concurrently. The thread count limits the chunks in memory over all of them.
        self._threads = ThreadPoolExecutor(CHUNKS_IN_FLIGHT)
        self._failed = False
        self._buffers: SimpleQueue[AlignedBuffer] = SimpleQueue()
        for _ in range(CHUNKS_IN_FLIGHT):
            self._buffers.put(AlignedBuffer())

    async def _open_and_write(self, value: StreamedArray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        del ts_context
        tspec = tspec | {"metadata": tspec["metadata"] | _UNCOMPRESSED}
        directory, shape = Path(tspec["kvstore"]["path"]), tuple(tspec["metadata"]["chunks"])

        def write(index: Index) -> None:
            buffer = self._buffers.get()
            try:
                value.into(index, buffer.array(shape, value.dtype))
                chunk_index = [str(part.start // size) for part, size in zip(index, shape, strict=True)]
                buffer.write(directory / (".".join(chunk_index) or "0"))
            finally:
                self._buffers.put(buffer)

        loop = asyncio.get_running_loop()
        try:
            # No sync per file: `save_model` syncs the file system once at the end.
            await ts.open(ts.Spec(tspec), create=True, context=ts.Context({"file_io_sync": False}))
            if self._failed:
                raise asyncio.CancelledError
            # Orbax's chunks divide the shape.
            await asyncio.gather(
                *(loop.run_in_executor(self._threads, write, index) for index in _chunk_indices(value.shape, shape))
            )
        except BaseException as error:
            # The caller removes the partial checkpoint, so nothing may be written after this. Only the first error is
            # raised; the other leaves are cancelled.
            self._threads.shutdown(cancel_futures=True)
            if self._failed:
                raise asyncio.CancelledError from error
            self._failed = True
            raise


class _StreamedLeafHandler(numpy_leaf_handler.NumpyLeafHandler):
    def __init__(self, *, context: ocp.Context | None = None) -> None:
        super().__init__(context=context)
        self._handler_impl = _ChunkWriter()


class _AbstractStreamedArray:
    """Placeholder that the registry requires as the abstract type; nothing is restored as a StreamedArray."""


class _StreamedTreeHandler(ocp.handlers.PyTreeHandler):
    def __init__(self, *, context: ocp.Context | None = None) -> None:
        leaves = registry.StandardLeafHandlerRegistry()
        leaves.add(StreamedArray, _AbstractStreamedArray, _StreamedLeafHandler, secondary_typestrs=["np.ndarray"])
        super().__init__(context=context, leaf_handler_registry=leaves)


# The handler writes an ordinary tree of arrays. Recording it under the standard handler's name lets any Orbax read it.
_StreamedTreeHandler.__module__ = ocp.handlers.PyTreeHandler.__module__
_StreamedTreeHandler.__qualname__ = ocp.handlers.PyTreeHandler.__qualname__


def _chunk_indices(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
    """Yields indices that cover `shape` in chunks of shape `chunk`."""
    starts = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size)) for start, step, size in zip(corner, chunk, shape, strict=True)
        )
