"""An iterator that is some elements ahead of whoever reads it."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(iterator: Generator[T, None, None], depth: int) -> Iterator[T]:
    """What `iterator` gives, made in a thread of its own, up to `depth` elements before they are asked for.

    What it raises is raised when its turn comes. Once this is closed, or no longer wanted, the thread ends.
    """
    made: queue.Queue[Any] = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(element: Any) -> bool:
        while not stop.is_set():
            try:
                made.put(element, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for element in iterator:
                if not put((element, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))
        finally:
            iterator.close()

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            element, error = made.get()
            if error is not None:
                raise error
            if element is end:
                return
            yield element
    finally:
        stop.set()
        thread.join()
