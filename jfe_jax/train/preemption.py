"""When a run is told to end before its last step: SIGTERM, as from a scheduler that takes the machine away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def preemption_requested() -> Iterator[Callable[[int], bool]]:
    """A function of the number of steps done: whether this run was told to end, so that the step in hand is saved.

    Of several processes any may be told; it is then true in all of them after the same step, a few steps on.
    """
    if jax.process_count() > 1:
        # The runtime catches the signal, and agrees with the other processes on a step that none has passed.
        yield multihost_utils.reached_preemption_sync_point
        return
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: ended.is_set()
        return
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        yield lambda step: ended.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
