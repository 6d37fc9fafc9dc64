"""Builds a batch from pairs.

Axes: G groups, N pairs of a group, K hard negatives of a pair, P positives of a query, B items of a group.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jfe_jax.data.batch import ContrastiveBatch, Layout
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import Packer
from jfe_jax.errors import UserError

# Further pairs of the stream are tried while fewer than 1 / _MAX_WAITING_DIVISOR of a step's pairs are deferred.
_MAX_WAITING_DIVISOR = 8


class EncodedPair(NamedTuple):
    """An encoded query with its candidates, ready for a batch.

    Attributes:
      qid: id of the query.
      items: the query, the positive and the negatives, in this order.
      candidate_ids: ids of the candidates: the positive's, then the negatives'.
      modalities: indices into MODALITIES of the candidates.
      positives: ids of all positives of the query.
    """

    qid: str
    items: tuple[EncodedItem, ...]
    candidate_ids: tuple[int, ...]
    modalities: tuple[int, ...]
    positives: tuple[int, ...]

    def copied(self) -> "EncodedPair":
        """Returns a copy of the pair that owns its arrays."""
        items = (EncodedItem(np.array(t), None if p is None else np.array(p)) for t, p in self.items)
        return self._replace(items=tuple(items))


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Static sizes of a process's batches: G, N, K, P, R, S, M, H = W and each group's bins."""

    groups: int
    pairs: int
    negatives: int
    positives: int
    rows: int
    row_tokens: int
    image_slots: int
    image_size: int
    layout: Layout
    bins: tuple[tuple[int, int], ...] = ()


class BatchBuilder:
    """Builds a batch by adding pairs to it.

    Attributes:
      count: number of pairs added so far.
      indices: stream indices of each group's pairs, in the order in which they were added.
    """

    def __init__(self, shape: BatchShape):
        self.count = 0
        self._shape = shape
        self.indices: list[list[int]] = [[] for _ in range(shape.groups)]
        self._packer = Packer(
            groups=shape.groups,
            rows=shape.rows,
            row_tokens=shape.row_tokens,
            image_slots=shape.image_slots,
            image_size=shape.image_size,
            layout=shape.layout,
            bins=shape.bins,
        )
        G, N, K, P = shape.groups, shape.pairs, shape.negatives, shape.positives
        self._candidates = np.full((G, N * (1 + K)), -1, np.int32)
        self._modalities = np.full((G, N * (1 + K)), -1, np.int32)
        self._positives = np.full((G, N, P), -1, np.int32)

    def add(self, index: int, pair: EncodedPair) -> bool:
        """Adds the pair to the emptiest group that has room for it.

        Args:
          index: of the pair in the stream.

        Returns:
          False if no group has room.

        Raises:
          UserError: the pair does not fit into an empty batch either.
        """
        N, K, P = self._shape.pairs, self._shape.negatives, self._shape.positives
        for g in sorted(range(self._shape.groups), key=lambda g: -self._packer.free[g]):
            n = len(self.indices[g])
            if n == N:
                continue
            # Indices of the pair's query, positive and negatives in B (see ContrastiveBatch).
            places = (n, N + n, *range(2 * N + n * K, 2 * N + n * K + len(pair.items) - 2))
            if self._packer.add(g, list(zip(places, pair.items, strict=True))):
                for place, candidate_id, modality in zip(places[1:], pair.candidate_ids, pair.modalities, strict=True):
                    self._candidates[g, place - N] = candidate_id
                    self._modalities[g, place - N] = modality
                # Put the sampled positive first so that truncation to P never drops it.
                positives = pair.positives[:P]
                if pair.candidate_ids[0] not in positives:
                    positives = [pair.candidate_ids[0], *positives[: P - 1]]
                self._positives[g, n, : len(positives)] = positives
                self.indices[g].append(index)
                self.count += 1
                return True
        if self.count == 0:
            sizes = ", ".join(str(len(item.tokens)) for item in pair.items)
            images = sum(item.pixels is not None for item in pair.items)
            raise UserError(
                f"query {pair.qid} with its candidates ({sizes} tokens, {images} images) does not fit into a group "
                f"({self._shape.rows} rows of {self._shape.row_tokens} tokens, {self._shape.image_slots} image slots): "
                "raise data.rows or data.image_slots"
            )
        return False

    def finish(self) -> ContrastiveBatch:
        """Returns the batch, with each group's pairs sorted by their stream index."""
        N, K = self._shape.pairs, self._shape.negatives
        packed = self._packer.finish(N * (2 + K))
        for g, indices in enumerate(self.indices):
            order = np.arange(N)
            order[: len(indices)] = np.argsort(indices)
            places = np.concatenate([order, N + order, (2 * N + order[:, None] * K + np.arange(K)).ravel()])
            for array in (packed.pool, packed.pool_span, packed.valid):
                array[g] = array[g, places]
            for array in (self._candidates, self._modalities):
                array[g] = array[g, places[N:] - N]
            self._positives[g] = self._positives[g, order]
        return ContrastiveBatch(packed, self._candidates, self._modalities, self._positives)


def build_batch(
    shape: BatchShape, waiting: Iterable[tuple[int, EncodedPair]], stream: Iterator[tuple[int, EncodedPair]]
) -> tuple[BatchBuilder, dict[int, EncodedPair]]:
    """Fills a batch with pairs, each given with its stream index.

    The deferred pairs in `waiting` are packed first, in their order, so that none is deferred for long. Then as many
    pairs of the stream as complete the batch are added, the largest first, because small ones fit into the space that
    large ones leave. After that the next pairs of the stream are tried one by one.

    Returns:
      The builder, and the pairs that found no room, by index.

    Raises:
      UserError: a pair does not fit into an empty batch.
    """
    total = shape.groups * shape.pairs
    builder, deferred = BatchBuilder(shape), {}

    def add_or_defer(index: int, pair: EncodedPair) -> None:
        if not builder.add(index, pair):
            deferred[index] = pair

    for index, pair in waiting:
        add_or_defer(index, pair)
    fresh = itertools.islice(stream, max(0, total - builder.count - len(deferred)))
    for index, pair in sorted(fresh, key=_size, reverse=True):
        add_or_defer(index, pair)
    while builder.count < total and len(deferred) < max(1, total // _MAX_WAITING_DIVISOR):
        add_or_defer(*next(stream))
    return builder, deferred


def _size(numbered: tuple[int, EncodedPair]) -> tuple[int, int]:
    lengths = [len(item.tokens) for item in numbered[1].items]
    return max(lengths), sum(lengths)
