"""Batches put onto the devices ahead of the step that wants them."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from jfe_jax.data.batch import ContrastiveBatch
from jfe_jax.parallel.sharding import put_batch

# How often one who waits looks whether the devices still compute, in seconds.
_LOOK = 0.005


class Prefetcher:
    """Reads an iterator in a thread of its own and yields (batch on the mesh, iterator state after that batch).

    The state that goes with a batch is what a checkpoint has to hold for training to continue with the next one,
    however far ahead the reading is.
    """

    def __init__(self, iterator: Any, mesh: Mesh, chunks: int = 1, depth: int = 2):
        """Starts to read.

        Args:
          iterator: with `get_state` and `close`, as grain's.
          mesh, chunks: see `sharding.put_batch`.
          depth: batches that wait on the devices.
        """
        self._iterator, self._mesh, self._chunks = iterator, mesh, chunks
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[ContrastiveBatch, Any]]:
        return self

    def __next__(self) -> tuple[ContrastiveBatch, Any]:
        """The next batch and state; raises what the iterator raised, when its turn comes."""
        return self.take(lambda: False)[:2]

    def take(self, busy: Callable[[], bool]) -> tuple[ContrastiveBatch, Any, float]:
        """As `next`; also how many seconds the devices had nothing to do for want of it.

        That is less than was waited here if steps were still under way, which `busy` says.
        """
        idle_since = None
        while True:
            if idle_since is None and not busy():
                idle_since = time.monotonic()
            try:
                item = self._queue.get(timeout=_LOOK if idle_since is None else None)
                break
            except queue.Empty:
                continue
        if isinstance(item, BaseException):
            self._stop.set()
            raise item
        return *item, 0.0 if idle_since is None else time.monotonic() - idle_since

    def close(self) -> None:
        """Stops reading and closes the iterator; what was read ahead is dropped."""
        self._stop.set()
        self._thread.join()
        self._iterator.close()

    def _read(self) -> None:
        try:
            for batch in self._iterator:
                if not self._put((put_batch(batch, self._mesh, self._chunks), self._iterator.get_state())):
                    return
            self._put(StopIteration())
        except Exception as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
