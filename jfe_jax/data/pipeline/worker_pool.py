"""Reads pairs in worker processes, each with a pipe to this process.

Arrays are written to the pipe without being copied first. No shared memory is needed: containers have only 64 MiB of
it, and the system has to clear every new page of it.
"""

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.batch_builder import EncodedPair
from jfe_jax.data.pipeline.pair_dataset import BadPair
from jfe_jax.errors import UserError
from jfe_jax.utils.background_iterator import prefetch

# Number of pairs that a worker reads and sends at once; number of chunks prefetched from each worker.
_CHUNK, _AHEAD = 8, 4
_PIPE_BYTES = 1 << 20
# Size of a message header: two int64, the bytes of the description and of the pixels that follow it.
_SIZES_BYTES = 16

Pair = EncodedPair | BadPair


class Workers:
    """Yields the pairs of an endless dataset in order, prefetched by `count` processes.

    Args:
      pairs: EncodedPair or BadPair by index. Picklable.
    """

    def __init__(self, pairs: Any, count: int):
        self._workers = [_Worker(pairs, turn, count) for turn in range(count)]
        self._turns = itertools.cycle(self._workers)
        self._chunk: Iterator[Pair] = iter(())

    def __next__(self) -> Pair:
        """Returns the next pair. Raises the exception of a worker, or UserError if a worker was killed."""
        pair = next(self._chunk, None)
        if pair is None:
            self._chunk = iter(next(next(self._turns).chunks))
            pair = next(self._chunk)
        return pair

    def close(self) -> None:
        """Kills the worker processes."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """A process that reads the chunks turn, turn + count, … of the pairs; `chunks` yields them in this process."""

    def __init__(self, pairs: Any, turn: int, count: int):
        # Spawned rather than forked, because this process has threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        # Best effort: a system may limit the pipe size or lack this call.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(theirs.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._process = context.Process(target=_work, args=(theirs, pairs, turn, count), daemon=True)
        self._process.start()
        # With this end closed, the pipe ends when the worker process does.
        theirs.close()
        self.chunks = prefetch(self._read(), _AHEAD)

    def _read(self) -> Generator[list[Pair], None, None]:
        while True:
            try:
                chunk = _next_chunk(self._pipe.fileno())
            except EOFError:
                self._process.join()
                raise UserError(
                    f"a reader process ended with status {self._process.exitcode}; if it was killed for its memory, "
                    "lower data.workers or data.image_cache_mib"
                ) from None
            yield chunk

    def close(self) -> None:
        # Workers are read-only, so killing them is safe.
        self._process.kill()
        self.chunks.close()
        self._process.join()
        self._pipe.close()


def _work(pipe: Any, pairs: Any, turn: int, count: int) -> None:
    # Ctrl-C is sent to the entire process group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(pipe.fileno(), pairs, turn, count)


def _serve(file: int, pairs: Any, turn: int, count: int) -> None:
    # The pipe breaks when the reader has closed it.
    with contextlib.suppress(BrokenPipeError):
        for chunk in itertools.count(turn, count):
            try:
                told, images = _encode_chunk([pairs[chunk * _CHUNK + i] for i in range(_CHUNK)])
            except Exception as error:
                told, images = error, []
            described = pickle.dumps(told)
            sizes = np.array([len(described), sum(image.nbytes for image in images)], "<i8")
            for part in (sizes, described, *images):
                _send(file, part)
            if isinstance(told, Exception):
                return


def _next_chunk(file: int) -> list[Pair]:
    """Receives one chunk. Raises the exception of the worker, or EOFError if the pipe ends."""
    described, size = _receive(file, _SIZES_BYTES).view("<i8").tolist()
    told = pickle.loads(_receive(file, described))
    pixels = _receive(file, size)
    if isinstance(told, Exception):
        raise told
    return _decode_chunk(*told, pixels)


def _encode_chunk(pairs: Sequence[Pair]) -> tuple[tuple[Any, ...], list[np.ndarray]]:
    """Splits a chunk into a picklable description for `_decode_chunk`, and the images."""
    items = [item for pair in pairs if isinstance(pair, EncodedPair) for item in pair.items]
    images = [item.pixels for item in items if item.pixels is not None]
    rest = [pair if isinstance(pair, BadPair) else pair._replace(items=len(pair.items)) for pair in pairs]
    tokens = np.concatenate([np.zeros(0, np.int32), *(item.tokens for item in items)])
    shape = images[0].shape if images else (0, 0, 0)
    return (rest, [(len(item.tokens), item.pixels is not None) for item in items], tokens, shape), images


def _decode_chunk(
    rest: list[Any], sizes: list[tuple[int, bool]], tokens: np.ndarray, shape: tuple[int, int, int], pixels: np.ndarray
) -> list[Pair]:
    images = iter(pixels.reshape(-1, *shape) if len(pixels) else ())
    ends = itertools.accumulate(length for length, _ in sizes)
    items = iter(
        [
            EncodedItem(tokens[end - length : end], next(images) if pictured else None)
            for end, (length, pictured) in zip(ends, sizes, strict=True)
        ]
    )
    return [
        pair if isinstance(pair, BadPair) else pair._replace(items=tuple(itertools.islice(items, pair.items)))
        for pair in rest
    ]


def _send(file: int, content: bytes | np.ndarray) -> None:
    left = memoryview(content if isinstance(content, bytes) else np.ascontiguousarray(content)).cast("B")
    while left:
        left = left[os.write(file, left) :]


def _receive(file: int, size: int) -> np.ndarray:
    """Receives uint8 [size]. Raises EOFError if the pipe ends before that."""
    content = np.empty(size, np.uint8)
    left = memoryview(content)
    while left:
        count = os.readv(file, [left])
        if not count:
            raise EOFError
        left = left[count:]
    return content
