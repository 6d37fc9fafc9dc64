"""Arrays that are written to a checkpoint, and read from one, piece by piece: for models larger than the memory.

Orbax takes whole arrays; it knows how to store one, in which chunks, but wants all its numbers at once. Here a leaf of
the tree is a shape and a function that reads any part of it; its chunks are read and written a few at a time. The way
back opens the stored arrays themselves.
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

# Of a stored chunk, and so of what is in memory at a time. From 32 MiB on, glibc maps new pages for each that is read
# and clears them, which takes half as long as everything else.
CHUNK_BYTES = 16 << 20
# Written at a time: while one waits for the disk, the others are read and turned.
CHUNKS_IN_FLIGHT = 3
# A chunk of which only a part is wanted is kept for the next part's turn.
CACHE_BYTES = 256 << 20

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StreamedArray:
    """An array that is read in parts.

    Attributes:
      shape, dtype: of the whole.
      read: gives the part at an index of one slice for each axis, with start and stop.
      fill: puts that part into a contiguous array, where this costs less than to copy what `read` gives.
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
        """The same numbers in another type."""
        if dtype == self.dtype:
            return self
        return StreamedArray(self.shape, dtype, lambda index: self.read(index).astype(dtype))

    def into(self, index: Index, out: np.ndarray) -> None:
        """Puts the part at an index into a contiguous array of its shape and this type."""
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
        # What is small is read at once.
        apart = stacked and math.prod(value.shape) * np.dtype(value.dtype).itemsize > CHUNK_BYTES
        return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if apart else ())

    base.array_options.saving.scoped_storage_options_creator = storage
    # Trained weights shrink by a few percent at best, for several times the time.
    base.array_options.saving.use_compression = False
    return base


def streaming_context(base: ocp.Context) -> ocp.Context:
    """`base` for a checkpoint whose `params` are StreamedArrays; each of their chunks is a file of bare numbers."""
    base.checkpointables.registry.add(_StreamedTreeHandler, checkpointable_name="params")
    base.array_options.saving.use_ocdbt = base.array_options.saving.use_zarr3 = False
    return with_per_layer_chunks(base)


def open_stored_arrays(directory: Path) -> dict[str, StreamedArray]:
    """The arrays of an Orbax tree, by dotted path; nothing is read until a part of one is asked for.

    Args:
      directory: of the checkpointable, as `checkpoints/100/params`.

    Raises:
      UserError: when a part is read that is damaged.
    """
    tree = _read_metadata(directory)
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})

    def array(name: str) -> StreamedArray:
        # Not as a URL, in which `#`, `?`, `|` and `%` mean something else.
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
    """Dotted paths of the arrays of an Orbax tree."""
    leaves = _read_metadata(directory)["tree_metadata"].values()
    # What is an empty container in the tree stands there too, with nothing to read.
    leaves = (leaf for leaf in leaves if not leaf["value_metadata"]["skip_deserialize"])
    return [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]


def _read_metadata(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "_METADATA").read_text(encoding="utf-8"))


# How numbers lie in a chunk's file, and how it is called (zarr-specs.readthedocs.io, version 2).
_UNCOMPRESSED = {"compressor": None, "filters": None, "order": "C", "dimension_separator": "."}


class _ChunkWriter(type_handlers.NumpyHandler):
    """Writes the files of chunks itself, a few at a time; Orbax's own gives the whole array to TensorStore."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        # Leaves are written concurrently: so many chunks of them all are in memory.
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
                place = [str(one.start // size) for one, size in zip(index, shape, strict=True)]
                buffer.write(directory / (".".join(place) or "0"))
            finally:
                self._buffers.put(buffer)

        loop = asyncio.get_running_loop()
        try:
            # Who saves all this makes sure of the disk at the end, once.
            await ts.open(ts.Spec(tspec), create=True, context=ts.Context({"file_io_sync": False}))
            if self._failed:
                raise asyncio.CancelledError
            # Orbax's chunks divide the shape.
            await asyncio.gather(
                *(loop.run_in_executor(self._threads, write, one) for one in _chunk_indices(value.shape, shape))
            )
        except BaseException as error:
            # What has been written is removed then: nothing may come after, and nobody asks what else went wrong.
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
    """Nothing is read back as a StreamedArray; the registry wants a name for it all the same."""


class _StreamedTreeHandler(ocp.handlers.PyTreeHandler):
    def __init__(self, *, context: ocp.Context | None = None) -> None:
        leaves = registry.StandardLeafHandlerRegistry()
        leaves.add(StreamedArray, _AbstractStreamedArray, _StreamedLeafHandler, secondary_typestrs=["np.ndarray"])
        super().__init__(context=context, leaf_handler_registry=leaves)


# What it writes is an ordinary tree of arrays, and is recorded as one, so that any Orbax reads it.
_StreamedTreeHandler.__module__ = ocp.handlers.PyTreeHandler.__module__
_StreamedTreeHandler.__qualname__ = ocp.handlers.PyTreeHandler.__qualname__


def _chunk_indices(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
    """Indices that cover `shape` in pieces of `chunk`."""
    starts = (range(0, whole, part) for whole, part in zip(shape, chunk, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + part, whole)) for start, part, whole in zip(corner, chunk, shape, strict=True)
        )
