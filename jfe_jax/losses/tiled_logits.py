"""Logits of all pairs of queries and candidates, a block of both at a time, so that no [J, I] array is ever whole.

Axes: I queries of this device, J candidates of everybody, A blocks of T queries, B blocks of U candidates, P right
answers, E embedding. A block's logits are [U, T].

`forward` sums over them and `backward` gives the gradients. That makes a block's logits again and needs nothing of the
forward pass but its results, and the logits of as many blocks as may be kept. It adds the gradients up where they are
returned, those of the positives too: memory besides is that of a few blocks, whatever I and J.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfe_jax.losses import logit_cache


class QueryInfo(NamedTuple):
    """What is known of the queries.

    Attributes:
      own_column: int32 [I], the column of the query's positive.
      own_id: int32 [I], number of that positive.
      right: int32 [I, P], numbers of all candidates that are right, padded with -1.
      modality: int32 [I], of the positive: what the query wants.
      valid: bool [I].
    """

    own_column: jax.Array
    own_id: jax.Array
    right: jax.Array
    modality: jax.Array
    valid: jax.Array


class CandidateInfo(NamedTuple):
    """What is known of the candidates.

    Attributes:
      place: int32 [J], their columns, 0 to J - 1.
      ids: int32 [J], their numbers, -1 for a filler.
      modality: int32 [J].
      valid: bool [J].
    """

    place: jax.Array
    ids: jax.Array
    modality: jax.Array
    valid: jax.Array


class TileConfig(NamedTuple):
    """What is fixed when the loss is compiled.

    Attributes:
      columns: log Σ exp over the rows of each column, too.
      mask: leave out candidates that are right for the query.
      same_modality: leave out candidates of another modality than the query's positive.
      tile_bytes: of a block's logits.
      keep_bytes: of logits that are kept for the backward pass, which need not make them again; besides those in the
        memory of the queries' gradients, see `kept`.
      axes: mesh axes of a surrounding shard_map.
    """

    columns: bool
    mask: bool
    same_modality: bool
    tile_bytes: int
    keep_bytes: int
    axes: tuple[str, ...]


class LogitInputs(NamedTuple):
    """What s_ij = scale · <q_i, c_j> are made of, and which of the pairs are negatives.

    Attributes:
      queries, candidates: float32 [I, E], [J, E]: unit rows, but for those that are not valid.
      scale: float32 scalar, above 0.
      rows, columns: see QueryInfo, CandidateInfo.
    """

    queries: jax.Array
    candidates: jax.Array
    scale: jax.Array
    rows: QueryInfo
    columns: CandidateInfo


def forward(settings: TileConfig, block: Callable[..., Any], scores: LogitInputs, *empty: tuple[float, ...]) -> Any:
    """What sums over the logits take from them.

    Args:
      settings, scores: see TileConfig, LogitInputs.
      block: (logits [U, T], by_row, by_column) → by_row, by_column adds a block's logits, -inf for those that are no
        negatives, to what there is of its rows and columns: tuples of [T] and of [U].
      empty: what there is at first, a number for each of by_row and of by_column.

    Returns:
      Tuples of [I] and of [J], and what is kept of the logits.
    """
    rows, columns = _blocks(settings, scores)
    start, by_column = (
        tuple(_varying(settings, jnp.full(shape, value)) for value in values)
        for shape, values in zip((rows.known.valid.shape[1:], columns.known.valid.shape), empty, strict=True)
    )
    parts = _parts(settings, rows, columns)
    room = logit_cache.allocate(parts, rows.vectors.shape, columns.vectors.shape[1])
    logits_kept = jax.tree.map(partial(_varying, settings), room)

    def some_rows(carry, own):
        logits_kept, by_column = carry
        number, own = own
        turned, by_row, sums = _turned(own.vectors), start, []

        def one(part, carry, other):
            logits_kept, by_row = carry
            place, by_column = other
            logits = _logits(settings, scores.scale, turned, own.known, _at(columns, place))
            by_row, by_column = block(logits, by_row, by_column)
            return (logit_cache.store(logits_kept, part, number, place, logits, scores.scale), by_row), by_column

        for part in parts:
            (logits_kept, by_row), added = _scan(one, (logits_kept, by_row), part, by_column)
            sums.append(added)
        return (logits_kept, jax.tree.map(lambda *sums: jnp.concatenate(sums), *sums)), by_row

    others = jnp.arange(len(rows.vectors)), rows
    (logits_kept, by_column), by_row = jax.lax.scan(some_rows, (logits_kept, by_column), others)
    return _whole(by_row, len(scores.queries)), _whole(by_column, len(scores.candidates)), logits_kept


def backward(
    settings: TileConfig,
    weights: Callable[..., Any],
    scores: LogitInputs,
    logits_kept: logit_cache.LogitCache,
    to_own: jax.Array,
    by_row: Any,
    by_column: Any,
) -> tuple[LogitInputs, jax.Array]:
    """The scores' cotangents.

    Args:
      settings, scores: see TileConfig, LogitInputs.
      weights: (logits [U, T], by_row, by_column) → the cotangents [U, T] of a block's <q_i, c_j>, from its logits as
        `forward` has them.
      logits_kept: what `forward` returned last.
      to_own: [I], cotangents of s_ij of the positives, which are no negatives.
      by_row, by_column: tuples of [I] and of [J], of which `weights` has a block's.

    Returns:
      The cotangents, and the sum of all weights.
    """
    rows, columns = _blocks(settings, scores)
    to_own, by_row = _cut((scores.scale * to_own, by_row), len(rows.vectors))
    by_column = _cut(by_column, len(columns.vectors))

    def some_rows(carry, own):
        logits_kept, *sums = carry
        number, own, to_own, by_row = own
        turned = _turned(own.vectors)

        def one(part, carry, other):
            to_vectors, to_candidates, total = carry
            place, by_column = other
            column = _at(columns, place)
            if part.storage != "recompute":
                logits = logit_cache.load(logits_kept, part, number, place, scores.scale)
            else:
                logits = _logits(settings, scores.scale, turned, own.known, column)
            given = weights(logits, by_row, by_column)
            total += jnp.sum(given)
            # XLA makes a sum once for all that it is needed for, other simple operations each time.
            given += jnp.where(_own_places(own.known, column.known), to_own, 0.0)
            to_vectors += _matmul(_turned(given), column.vectors)
            added = to_candidates[place] + _matmul(given, own.vectors)
            return (to_vectors, jax.lax.dynamic_update_index_in_dim(to_candidates, added, place, 0), total), None

        sums = (_varying(settings, jnp.zeros(own.vectors.shape)), *sums)
        # Those to be made again first: what that takes is not in memory beside what is kept of the others.
        for part in reversed(_parts(settings, rows, columns)):
            sums, _ = _scan(one, sums, part, by_column)
        to_vectors, *sums = sums
        return (logit_cache.write_gradients(logits_kept, number, to_vectors), *sums), None

    sums = (_varying(settings, jnp.zeros(shape)) for shape in (columns.vectors.shape, ()))
    others = jnp.arange(len(rows.vectors)), rows, to_own, by_row
    (logits_kept, to_candidates, total), _ = jax.lax.scan(some_rows, (logits_kept, *sums), others)
    to_queries = logits_kept.grad_scratch.reshape(rows.vectors.shape)
    # Σ_j given_ij s_ij = <q_i, to_q_i>.
    to_scale = jnp.sum(to_queries * rows.vectors) / scores.scale
    to_queries, to_candidates = _whole(to_queries, len(scores.queries)), _whole(to_candidates, len(scores.candidates))
    return LogitInputs(to_queries, to_candidates, to_scale, None, None), total


class _Blocks(NamedTuple):
    # Of queries or candidates: vectors [A, T, E] or [B, U, E], and Rows or Columns as long.
    vectors: jax.Array
    known: Any


def _blocks(settings: TileConfig, scores: LogitInputs) -> tuple[_Blocks, _Blocks]:
    # Near to a square, where the least is added up, and rather more queries, whose gradients take less to add. The
    # last are filled up with what is not valid and counts for nothing.
    numbers, (queries, candidates) = settings.tile_bytes // 4, map(len, scores[:2])
    a = _number(queries, max(8, math.isqrt(2 * numbers)))
    b = _number(candidates, max(8, numbers // -(-queries // a)))
    return _Blocks(*_cut((scores.queries, scores.rows), a)), _Blocks(*_cut((scores.candidates, scores.columns), b))


def _number(count: int, most: int) -> int:
    # The fewest of up to `most`, or a few more if they divide the count.
    least = -(-count // most)
    return next((parts for parts in range(least, 2 * least) if count % parts == 0), least)


def _cut(by_one: Any, parts: int) -> Any:
    def cut(x):
        size = -(-len(x) // parts)
        return jnp.pad(x, [(0, parts * size - len(x)), *[(0, 0)] * (x.ndim - 1)]).reshape(parts, size, *x.shape[1:])

    return jax.tree.map(cut, by_one)


def _whole(by_block: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], by_block)


def _parts(settings: TileConfig, rows: _Blocks, columns: _Blocks) -> list[logit_cache.BlockRange]:
    count, u = columns.known.valid.shape
    keep = settings.keep_bytes // (logit_cache.BYTES * rows.known.valid.size * u)
    return logit_cache.plan_cache(count, keep, lend=rows.vectors.shape[2] // u)


def _scan(one: Callable[..., Any], carry: Any, part: logit_cache.BlockRange, by_column: Any) -> Any:
    start, stop = part.places.start, part.places.stop
    others = jax.tree.map(lambda x: x[start:stop], by_column)
    return jax.lax.scan(partial(one, part), carry, (jnp.arange(start, stop), others))


def _at(blocks: _Blocks, place: jax.Array) -> _Blocks:
    return jax.tree.map(lambda x: x[place], blocks)


def _logits(settings: TileConfig, scale: jax.Array, turned: jax.Array, rows: QueryInfo, column: _Blocks) -> jax.Array:
    # [U, T] of the queries [E, T], -inf where the pair may not be pushed apart.
    return jnp.where(_negatives(settings, rows, column.known), scale * _matmul(column.vectors, turned), -jnp.inf)


def _negatives(settings: TileConfig, rows: QueryInfo, columns: CandidateInfo) -> jax.Array:
    # bool [U, T]: the pair may be pushed apart.
    ids = columns.ids[:, None]
    negative = rows.valid & columns.valid[:, None] & ~_own_places(rows, columns)
    if settings.mask:
        # Padding of `right` is -1, and so is a filler's number: fillers are not valid. Written out over P because a
        # reduction would hold [U, T, P] in memory.
        sets = (rows.right[:, p] == ids for p in range(rows.right.shape[1]))
        negative &= ~functools.reduce(jnp.logical_or, sets, rows.own_id == ids)
    if settings.same_modality:
        negative &= rows.modality == columns.modality[:, None]
    return negative


def _own_places(rows: QueryInfo, columns: CandidateInfo) -> jax.Array:
    # bool [U, T]: the candidate is the query's positive.
    return columns.place[:, None] == rows.own_column


def _matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _turned(x: jax.Array) -> jax.Array:
    # On the CPU turning a matrix and then multiplying takes less time than a product that has to turn it.
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.optimization_barrier(x.T), default=jnp.transpose)


def _varying(settings: TileConfig, x: jax.Array) -> jax.Array:
    # A loop's carry has to be of one kind from the start: different on each device.
    return jax.lax.pcast(x, settings.axes, to="varying") if settings.axes else x
