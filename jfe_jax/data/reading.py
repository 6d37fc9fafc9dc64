"""Pairs by index → a stream of them, read ahead in threads or worker processes, from any place on.

What is drawn depends on a pair's index in the stream alone, so how it is read changes nothing.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jfe_jax.data.filling import EncodedPair
from jfe_jax.data.items import EncodedItem
from jfe_jax.data.pairs import BadPair

# Pairs that a worker sends at once.
_CHUNK = 8
_AHEAD = 32
_NEVER_SHARED = 1 << 62


class PairReader:
    """Pairs start, start + stride, start + 2 · stride, …

    Args:
      pairs: EncodedPair (or BadPair) by index, endless.
      workers: reader processes; 0 reads in threads of this one.
    """

    def __init__(self, pairs: grain.MapDataset, workers: int):
        self._pairs, self._workers = pairs, workers
        self._iterator: Any = None
        self._chunk: Iterator[EncodedPair | BadPair] = iter(())

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
        # Grain asks for its flags' values, which absl refuses until somebody has parsed a command line.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        chunks = mine.batch(_CHUNK, batch_fn=_to_chunk).to_iter_dataset(options)
        # Through pipes. New shared memory for each array takes longer: the system clears every page of it. And it is
        # scarce (64 MiB in a container), and whoever writes beyond its end is killed.
        pipes = grain.experimental.DatasetOptions(min_shm_size=_NEVER_SHARED)
        chunks = grain.experimental.WithOptionsIterDataset(chunks, pipes)
        self._iterator = iter(chunks.mp_prefetch(grain.MultiprocessingOptions(self._workers, _AHEAD // _CHUNK)))

    def __next__(self) -> EncodedPair | BadPair:
        if not self._workers:
            return next(self._iterator)
        pair = next(self._chunk, None)
        if pair is None:
            self._chunk = _from_chunk(next(self._iterator))
            pair = next(self._chunk)
        return pair

    def close(self) -> None:
        """Stops reading."""
        self._chunk = iter(())
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _to_chunk(pairs: Sequence[EncodedPair | BadPair]) -> dict[str, np.ndarray | bytes]:
    """Pairs as two arrays and what describes them, however many items they have: quick to pickle."""
    items = [item for pair in pairs if isinstance(pair, EncodedPair) for item in pair.items]
    images = [item.pixels for item in items if item.pixels is not None]
    rest = [pair if isinstance(pair, BadPair) else pair._replace(items=len(pair.items)) for pair in pairs]
    shape = [(len(item.tokens), item.pixels is not None) for item in items]
    return {
        "tokens": np.concatenate([np.zeros(0, np.int32), *(item.tokens for item in items)]),
        "pixels": np.stack(images) if images else np.zeros(0, np.uint8),
        "rest": pickle.dumps((rest, shape)),
    }


def _from_chunk(chunk: dict[str, Any]) -> Iterator[EncodedPair | BadPair]:
    tokens, pixels = chunk["tokens"], chunk["pixels"]
    rest, shape = pickle.loads(chunk["rest"])
    items, token, image = [], 0, 0
    for length, has_image in shape:
        items.append(EncodedItem(tokens[token : token + length], pixels[image] if has_image else None))
        token += length
        image += has_image
    done = 0
    for pair in rest:
        if isinstance(pair, BadPair):
            yield pair
        else:
            done += pair.items
            yield pair._replace(items=tuple(items[done - pair.items : done]))


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
