"""Running top-k over blocks of candidates; reads each score at most once.

An accelerator selects on the device (`DeviceTopK`). On the CPU, XLA's top_k is many times slower than the matrix
product before it. There the device returns the scores and the maximum of each group of GROUP scores, and NumPy reads
only the groups whose maximum exceeds the query's threshold (`HostTopK`). Both keep the same candidates.

Axes: Q queries, C candidates of a block, E embedding, K kept for a query, T targets of a query, D devices.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jfe_jax.embedding.row_source import RowSource
from jfe_jax.parallel.sharding import BATCH_AXES, batch_sharding, group_count
from jfe_jax.search import bf16_prefilter

# Neighbouring candidates that share a maximum.
GROUP = 16


class Block(NamedTuple):
    """Candidates on the devices.

    Attributes:
      start: number of the first row.
      rows: [C, E] as stored, split over the devices; those from `count` on are zeros.
      scales: float32 [C] or None.
    """

    start: int
    count: int
    rows: jax.Array
    scales: jax.Array | None


def blocks(rows: RowSource, size: int, mesh: Mesh, first: int, last: int) -> Iterator[Block]:
    """Rows first … last - 1 in blocks of C = `size`; the next is read while one is in use."""

    def load(start: int) -> Block:
        stored, scales = rows.read(start, min(start + size, last))
        sharding = batch_sharding(mesh)
        count = len(stored)
        parts = [_padded(stored, size), None if scales is None else _padded(scales, size)]
        placed = [None if part is None else jax.device_put(part, sharding) for part in parts]
        return Block(start, count, *placed)

    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for start in range(first, last, size):
            coming = reader.submit(load, start)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


class BlockScores(NamedTuple):
    """Scores of consecutive blocks, C candidates in all.

    Attributes:
      scores: float32 [C, Q].
      maxima: of each GROUP of candidates, [C / GROUP, Q].
      finite: whether all is.
      rounding: float32; the length of the longest difference between a candidate and what stood for it.
    """

    scores: jax.Array
    maxima: jax.Array
    finite: jax.Array
    rounding: jax.Array


def scores_of(queries: jax.Array, several: Sequence[Block], mesh: Mesh) -> BlockScores:
    """Scores of queries [Q, E] in float32; those in bfloat16 meet candidates that are rounded to it too."""
    run = _compiled(queries.dtype == jnp.bfloat16)
    return run(queries, [block.rows for block in several], [block.scales for block in several], mesh)


@functools.cache
def _compiled(rounded: bool) -> Callable[..., BlockScores]:
    options = bf16_prefilter.compiler_options() if rounded else None
    return jax.jit(_scores_of, static_argnames="mesh", compiler_options=options)


def _scores_of(queries: jax.Array, rows: list[jax.Array], scales: list[jax.Array | None], mesh: Mesh) -> BlockScores:
    rounding = jnp.zeros(())
    if queries.dtype == jnp.bfloat16:
        rows, lengths = zip(*(_rounded(part) for part in rows), strict=True)
        rounding = jnp.stack(lengths).max()
    scores = jnp.concatenate([_scores(queries, *block) for block in zip(rows, scales, strict=True)])
    scores = jax.lax.with_sharding_constraint(scores, batch_sharding(mesh))
    maxima = scores.reshape(-1, GROUP, scores.shape[1]).max(1)
    maxima = jax.lax.with_sharding_constraint(maxima, batch_sharding(mesh))
    return BlockScores(scores, maxima, jnp.isfinite(maxima.sum()), rounding)


@jax.jit
def count_between(scores: jax.Array, count: int, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of [C, Q] are above `high` and how many are not below `low`, each [T, Q] → int32 [T, Q]."""
    real = (jnp.arange(scores.shape[0]) < count)[:, None]

    def of_target(_, bounds):
        above, within = scores > bounds[1], scores >= bounds[0]
        return None, ((above & real).sum(0, dtype=jnp.int32), (within & real).sum(0, dtype=jnp.int32))

    return jax.lax.scan(of_target, None, (low, high))[1]


def shards(array: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """Each device's part of an array split over its leading axis, with where it starts; on the CPU without a copy."""
    for shard in sorted(array.addressable_shards, key=lambda one: one.index[0].start or 0):
        yield shard.index[0].start or 0, np.asarray(shard.data)


class HostTopK:
    """The best of each query so far, chosen by NumPy from the scores of one block after another.

    Those that may be among the k best are kept, K at most.

    Attributes:
      scores, rows: float32 and int32 [Q, K], in no order; -inf where there are fewer.
      threshold: float32 [Q]; no candidate that was left out has a better score.
    """

    def __init__(self, queries: int, k: int, keep: int):
        self.scores = np.full((queries, keep), -np.inf, np.float32)
        self.rows = np.zeros((queries, keep), np.int32)
        self.threshold = np.full(queries, -np.inf, np.float32)
        self._k, self._margin = k, np.zeros(queries)
        self._new: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._first = True

    def add(self, found: BlockScores, start: int, count: int, margin: np.ndarray) -> None:
        """Takes the scores of rows start … start + count - 1.

        Args:
          margin: float64 [Q]; a score that is worse than the k-th by more than this is not among the k best.
        """
        self._margin = margin
        for (at, part), (_, tops) in zip(shards(found.scores), shards(found.maxima), strict=True):
            self._add(part, tops, start + at, max(0, min(count - at, len(part))))

    def _add(self, scores: np.ndarray, maxima: np.ndarray, start: int, count: int) -> None:
        queries, keep = self.scores.shape
        whole = count // GROUP
        if self._first and whole >= self._k:
            # K groups reach the K-th largest maximum, so K scores do.
            most = min(keep, whole)
            best = np.partition(maxima[:whole], (whole - most, whole - self._k), axis=0)
            left = np.nextafter(best[whole - most], np.float32(-np.inf)) if most == keep else self.threshold
            self._raise_threshold(left, best[whole - self._k])
        self._first = False
        group, query = np.divmod(np.flatnonzero(maxima[: -(-count // GROUP)] > self.threshold), queries)
        if not len(group):
            return
        values = scores.reshape(-1, GROUP, queries)[group, :, query]
        which, place = np.divmod(np.flatnonzero(values > self.threshold[query][:, None]), GROUP)
        query, rows, values = query[which], group[which] * GROUP + place, values[which, place]
        if count % GROUP:
            query, rows, values = (part[rows < count] for part in (query, rows, values))
        self._new.append((query, (start + rows).astype(np.int32), values))
        # Seldom: to sort in what is new costs as much as the K that are known.
        if sum(len(one[0]) for one in self._new) > queries * keep:
            self.merge_pending()

    def merge_pending(self) -> None:
        """Keeps the best of what is known and what is new."""
        if not self._new:
            return
        (queries, keep), new = self.scores.shape, [np.concatenate(parts) for parts in zip(*self._new, strict=True)]
        self._new = []
        # Numbers of two bytes are sorted in one pass.
        order = np.argsort(new[0].astype(np.uint16) if queries <= 1 << 16 else new[0], kind="stable")
        query, rows, values = (part[order] for part in new)
        many = np.bincount(query, minlength=queries)
        column = keep + np.arange(len(query)) - np.repeat(np.cumsum(many) - many, many)
        all_scores = np.full((queries, keep + many.max()), -np.inf, np.float32)
        all_rows = np.zeros(all_scores.shape, np.int32)
        all_scores[:, :keep], all_rows[:, :keep] = self.scores, self.rows
        all_scores[query, column], all_rows[query, column] = values, rows
        cut, place = many.max(), keep - self._k
        best = np.argpartition(all_scores, (cut, cut + place), axis=1)[:, cut:]
        self.scores, self.rows = (np.take_along_axis(part, best, 1) for part in (all_scores, all_rows))
        self._raise_threshold(self.scores[:, 0], self.scores[:, place])

    def _raise_threshold(self, left: np.ndarray, kth: np.ndarray) -> None:
        """Leaves out, float32 [Q], what is not better than `left` or is too much worse than the k-th best."""
        below = np.nextafter((kth - self._margin).astype(np.float32), np.float32(-np.inf))
        self.threshold = np.maximum(self.threshold, np.maximum(left, below))


class DeviceTopK:
    """As HostTopK, chosen on the devices, each from its own candidates; `recall` below 1 chooses approximately.

    Approximate is `jax.lax.approx_max_k` (arXiv 2206.14286), made for the TPU; elsewhere it is exact.
    """

    def __init__(self, queries: int, keep: int, mesh: Mesh, recall: float = 1.0):
        self._mesh, self._recall, self._keep = mesh, recall, keep
        shape = (group_count(mesh), queries, keep)
        self._best = jax.device_put(
            (np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32)), batch_sharding(mesh)
        )

    def add(self, found: BlockScores, start: int, count: int, margin: np.ndarray) -> None:
        self._best = _merge(self._best, found.scores, start, count, self._mesh, self._recall)

    def merge_pending(self) -> None:
        # [D, Q, K] → [Q, D·K] → the best K.
        parts = [np.concatenate(list(np.asarray(part)), axis=1) for part in self._best]
        best = np.argpartition(parts[0], -self._keep, axis=1)[:, -self._keep :]
        self.scores, self.rows = (np.take_along_axis(part, best, 1) for part in parts)
        self.threshold = self.scores.min(1)


def _scores(queries: jax.Array, rows: jax.Array, scales: jax.Array | None) -> jax.Array:
    # Candidates first: the maximum over candidates is then of whole vectors.
    scores = jnp.einsum(
        "ce,qe->cq",
        rows.astype(queries.dtype),
        queries,
        precision=jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return scores if scales is None else scores * scales[:, None]


def _rounded(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows in bfloat16, and the length of the longest difference from what they were."""
    if rows.dtype == jnp.int8:
        # Whole numbers up to 256 are what they are.
        return rows.astype(jnp.bfloat16), jnp.zeros(())
    rows = rows.astype(jnp.float32)
    # A conversion there and back XLA may leave out.
    near = jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)
    # Squares too small for float32 count as the smallest that are not.
    squares = ((rows - near) ** 2).sum(1).max() + rows.shape[1] * jnp.finfo(jnp.float32).tiny
    return near.astype(jnp.bfloat16), jnp.sqrt(squares) * 1.001


@functools.partial(jax.jit, static_argnames=("mesh", "recall"))
def _merge(best: tuple[jax.Array, jax.Array], scores: jax.Array, start: int, count: int, mesh: Mesh, recall: float):
    def on_device(known: jax.Array, known_rows: jax.Array, scores: jax.Array) -> Any:
        keep = known.shape[-1]
        index = jax.lax.axis_index(BATCH_AXES) * scores.shape[0] + jnp.arange(scores.shape[0], dtype=jnp.int32)
        masked = jnp.where(index < count, scores.T, -jnp.inf)
        most = min(keep, scores.shape[0])
        if recall < 1:
            top, place = jax.lax.approx_max_k(masked, most, recall_target=recall)
        else:
            top, place = jax.lax.top_k(masked, most)
        joined = jnp.concatenate([known[0], top], axis=1)
        joined_rows = jnp.concatenate([known_rows[0], start + index[place]], axis=1)
        top, place = jax.lax.top_k(joined, keep)
        return top[None], jnp.take_along_axis(joined_rows, place, axis=1)[None]

    spec = P(BATCH_AXES)
    split = jax.shard_map(on_device, mesh=mesh, in_specs=(spec, spec, spec), out_specs=(spec, spec))
    return split(*best, scores)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    if len(rows) == size:
        return rows
    padded = np.zeros((size, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded
