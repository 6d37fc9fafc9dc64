"""Pairs by index → a stream of them, read ahead in threads or worker processes, from any place on.

What is drawn depends on a pair's index in the stream alone, so how it is read changes nothing.
"""

import os
from collections.abc import Sequence
from typing import Any

import grain

from jfe_jax.data.pipeline.batch_builder import EncodedPair
from jfe_jax.data.pipeline.pair_dataset import BadPair
from jfe_jax.data.pipeline.worker_pool import Workers

# Pairs that threads read before they are asked for.
_AHEAD = 32


class PairReader:
    """Pairs start, start + stride, start + 2 · stride, …

    Args:
      pairs: EncodedPair (or BadPair) by index, endless.
      workers: reader processes; 0 reads in threads of this one.
    """

    def __init__(self, pairs: grain.MapDataset, workers: int):
        self._pairs, self._workers = pairs, workers
        self._iterator: Any = None

    def at(self, index: int) -> EncodedPair | BadPair:
        """The pair of that index, read here and now."""
        return self._pairs[index]

    def start(self, start: int, stride: int) -> None:
        """Begins to read ahead."""
        self.close()
        mine = self._pairs[slice(start, None, stride)]
        if not self._workers:
            threads = min(4, len(os.sched_getaffinity(0)))
            # A single core has nothing to gain from a thread that reads for the thread that packs.
            options = grain.ReadOptions(num_threads=threads if threads > 1 else 0, prefetch_buffer_size=_AHEAD)
            self._iterator = iter(mine.to_iter_dataset(options))
            return
        self._iterator = Workers(mine, self._workers)

    def __next__(self) -> EncodedPair | BadPair:
        return next(self._iterator)

    def close(self) -> None:
        """Stops reading."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def redistribute(states: Sequence[dict[str, Any]], index: int, count: int) -> dict[str, Any]:
    """The loader's state of process `index` of `count`, from those of all processes of a run that had another number.

    What no process had taken yet is shared out, so that nothing comes twice and nothing is left out.
    """
    strides = len(states)
    if strides == count:
        return states[index]
    end = max(state["base"] + strides * state["next"] for state in states)
    left = sorted(
        number
        for place, state in enumerate(states)
        for number in (
            *state["waiting"],
            *range(state["base"] + place + strides * state["next"], end, strides),
        )
    )
    bad: dict[str, int] = {}
    for state in states:
        for unit, number in state["bad"].items():
            bad[unit] = bad.get(unit, 0) + number
    return {
        "base": end,
        "next": 0,
        "waiting": left[index::count],
        # Counted once, by the first.
        "taken": sum(state["taken"] for state in states) if index == 0 else 0,
        "bad": bad if index == 0 else {},
    }
