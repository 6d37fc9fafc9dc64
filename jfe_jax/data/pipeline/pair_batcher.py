"""Encoded pairs → ContrastiveBatch: the last step of the loader's chain, and the one that has a state.

Axes: G groups, N pairs of a group, K hard negatives of a pair, P positives of a query, B items of a group.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grain

from jfe_jax.data.batch import ContrastiveBatch
from jfe_jax.data.pipeline.batch_builder import BatchBuilder, BatchShape, EncodedPair, build_batch
from jfe_jax.data.pipeline.pair_dataset import BadPair
from jfe_jax.data.pipeline.pair_reader import PairReader
from jfe_jax.errors import UserError

_LOG = logging.getLogger(__name__)
# Pairs from which on a share of bad ones says something; problems that are logged, and named in the end.
_ENOUGH, _MOST_PROBLEMS, _SHOWN_PROBLEMS = 10_000, 1000, 20
# A step with a smaller share of its pairs than this is one to warn of.
_FEW = 0.9


def empty_batch(shape: BatchShape) -> ContrastiveBatch:
    """Builds a batch of padding pairs only."""
    return BatchBuilder(shape).finish()


class PairBatches(grain.DatasetIterator):
    """A stream of pairs → ContrastiveBatch of one shape.

    A step takes the deferred pairs first, then the next pairs of the stream (see `batch_builder.build_batch`). So the
    state is the next position in the stream, and the stream indices of the deferred pairs.

    Args:
      reader: where pairs come from.
      index, count: this process reads the pairs index, index + count, … from `base` on (0 until the number of processes
        changes, see `reading.redistribute`).
      max_bad: share of the pairs that may be unreadable; they are skipped, counted by unit, and logged.
    """

    def __init__(self, reader: PairReader, shape: BatchShape, index: int, count: int, max_bad: float):
        super().__init__()
        self._reader, self._shape, self._index, self._count, self._max_bad = reader, shape, index, count, max_bad
        self._base = self._next = self._taken = self._short = 0
        self._started = False
        self._waiting: list[int] = []
        # Encoded pairs of the indices that wait; a restored iterator makes them anew.
        self._held: dict[int, EncodedPair] = {}
        self._bad: Counter[str] = Counter()
        self._problems: dict[str, None] = {}

    def get_state(self) -> dict[str, Any]:
        return {
            "base": self._base,
            "next": self._next,
            "waiting": list(self._waiting),
            "taken": self._taken,
            "bad": dict(self._bad),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._base, self._next, self._waiting = state["base"], state["next"], list(state["waiting"])
        self._taken, self._bad = state["taken"], Counter(state["bad"])
        self._held, self._started = {}, False

    def close(self) -> None:
        self._reader.close()

    def __next__(self) -> ContrastiveBatch:
        """Raises UserError if a pair fits into no batch, or more than the share of them cannot be read."""
        builder, waiting = build_batch(self._shape, self._deferred_pairs(), self._stream())
        batch = builder.finish()
        self._waiting = sorted(waiting)
        self._held = {index: waiting[index].copied() for index in self._waiting}
        total = self._shape.groups * self._shape.pairs
        if builder.count < _FEW * total:
            self._warn_short(batch, builder.count, total)
        return batch

    def _deferred_pairs(self) -> Iterator[tuple[int, EncodedPair]]:
        for index in self._waiting:
            pair = self._held.get(index) or self._reader.at(index)
            if isinstance(pair, BadPair):
                self._skip(pair)
            else:
                yield index, pair

    def _stream(self) -> Iterator[tuple[int, EncodedPair]]:
        while True:
            index = self._base + self._index + self._count * self._next
            if not self._started:
                self._reader.start(index, self._count)
                self._started = True
            pair = next(self._reader)
            self._next += 1
            self._taken += 1
            if isinstance(pair, BadPair):
                self._skip(pair)
            else:
                yield index, pair

    def _skip(self, pair: BadPair) -> None:
        self._bad[pair.unit] += 1
        if pair.problem not in self._problems and len(self._problems) < _MOST_PROBLEMS:
            self._problems[pair.problem] = None
            _LOG.warning("skipped a pair of %s: %s", pair.unit, pair.problem)
        # A share of few is chance.
        if self._bad.total() > self._max_bad * max(self._taken, _ENOUGH):
            shown = "; ".join(list(self._problems)[:_SHOWN_PROBLEMS])
            raise UserError(
                f"{self._bad.total()} of {self._taken} pairs could not be read, more than data.max_bad_share, "
                f"{self._max_bad:g}: {shown}"
            )

    def _warn_short(self, batch: ContrastiveBatch, count: int, total: int) -> None:
        self._short += 1
        # At 1, 10, 100, …: one short step is chance, many are a layout that is too small.
        if str(self._short).strip("0") == "1":
            packed = batch.packed
            images = int((packed.image_start < self._shape.rows * self._shape.row_tokens).sum())
            _LOG.warning(
                "%d steps so far had no room for a tenth of their pairs; this one has %d of %d, with %d of %d image "
                "slots and %.0f %% of the row tokens in use: raise data.image_slots or data.rows",
                self._short,
                count,
                total,
                images,
                packed.image_start.size,
                100 * (packed.segments > 0).mean(),
            )
