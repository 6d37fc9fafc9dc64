"""Sums over all pairs of queries and candidates, a tile of queries at a time, so that no [J, I] array is ever whole.

Axes: I queries of this device, J candidates of everybody, T queries of a tile, P right answers, E embedding. A tile's
logits are [J, T]: its product with all candidates then needs no transposed copy of them, which on the CPU took longer
than half of the product.

Each function is differentiated by hand: the backward pass makes a tile's logits again and needs nothing of the forward
pass but its results, and the logits of as many rows as may be kept. Beside those, memory is a tile's, whatever I and J.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
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


class Columns(NamedTuple):
    """What is known of the candidates: numbers int32 [J] (-1 for a filler), modalities int32 [J], valid bool [J]."""

    ids: jax.Array
    modality: jax.Array
    valid: jax.Array


class Settings(NamedTuple):
    """What is fixed when the loss is compiled.

    Attributes:
      columns: log Σ exp over the rows of each column, too.
      mask: leave out candidates that are right for the query.
      same_modality: leave out candidates of another modality than the query's positive.
      tile_bytes: of a tile's logits.
      keep_bytes: of logits that are kept for the backward pass, which need not make them again.
      axes: mesh axes of a surrounding shard_map.
    """

    columns: bool
    mask: bool
    same_modality: bool
    tile_bytes: int
    keep_bytes: int
    axes: tuple[str, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def log_sums(
    settings: Settings, queries: jax.Array, candidates: jax.Array, scale: jax.Array, rows: Rows, columns: Columns
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log Σ exp(s_ij) over the negatives of each row, and over this device's rows of each column.

    Args:
      settings: see Settings.
      queries, candidates: float32 [I, E], [J, E].
      scale: float32 scalar; s_ij = scale · <q_i, c_j>.
      rows, columns: which pairs are negatives.

    Returns:
      float32 [I]; [J] (empty without `settings.columns`); the greatest s_ij of each row [I], which has no gradient.
      -inf where there is no negative.
    """
    return _log_sums_forward(settings, queries, candidates, scale, rows, columns)[0]


def _log_sums_forward(settings: Settings, queries, candidates, scale, rows, columns):
    def tile(carry, logits):
        highest, log_sum = _log_sum(logits, 0)
        if settings.columns:
            most, total = carry
            now = jnp.maximum(most, jnp.max(logits, axis=1))
            added = jnp.sum(jnp.exp(logits - _finite(now)[:, None]), axis=1)
            carry = (now, total * jnp.exp(most - _finite(now)) + added)
        return carry, (log_sum, highest)

    empty = _varying(settings, jnp.full(len(candidates) if settings.columns else 0, -jnp.inf))
    (most, total), (log_sum, highest), kept = _forward(
        settings, tile, (empty, jnp.zeros_like(empty)), queries, candidates, scale, rows, columns
    )
    column_sums = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + most, -jnp.inf)
    return (log_sum, column_sums, highest), (queries, candidates, scale, rows, columns, log_sum, column_sums, kept)


def _log_sums_backward(settings: Settings, saved, cotangents):
    queries, candidates, scale, rows, columns, log_sum, column_sums, kept = saved
    to_rows, to_columns, _ = cotangents

    def weights(logits, log_sum, to_rows):
        given = to_rows * jnp.exp(logits - _finite(log_sum))
        if settings.columns:
            given += to_columns[:, None] * jnp.exp(logits - _finite(column_sums)[:, None])
        return given

    return _backward(settings, weights, queries, candidates, scale, rows, columns, kept, log_sum, to_rows)[:5]


log_sums.defvjp(_log_sums_forward, _log_sums_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def softplus_sums(
    settings: Settings,
    queries: jax.Array,
    candidates: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rows: Rows,
    columns: Columns,
) -> tuple[jax.Array, jax.Array]:
    """Σ log(1 + exp(s_ij + bias)) over the negatives of each row.

    Args: as of `log_sums`, and bias, a float32 scalar.

    Returns:
      float32 [I]; the greatest s_ij of each row [I], which has no gradient.
    """
    return _softplus_sums_forward(settings, queries, candidates, scale, bias, rows, columns)[0]


def _softplus_sums_forward(settings: Settings, queries, candidates, scale, bias, rows, columns):
    def tile(carry, logits):
        return carry, (jnp.sum(jax.nn.softplus(logits + bias), axis=0), jnp.max(logits, axis=0))

    _, (total, highest), kept = _forward(settings, tile, (), queries, candidates, scale, rows, columns)
    return (total, highest), (queries, candidates, scale, bias, rows, columns, kept)


def _softplus_sums_backward(settings: Settings, saved, cotangents):
    queries, candidates, scale, bias, rows, columns, kept = saved

    def weights(logits, to_rows):
        return to_rows * jax.nn.sigmoid(logits + bias)

    *given, to_bias = _backward(settings, weights, queries, candidates, scale, rows, columns, kept, cotangents[0])
    return *given[:3], to_bias, None, None


softplus_sums.defvjp(_softplus_sums_forward, _softplus_sums_backward)


def _forward(
    settings: Settings, tile: Callable[..., Any], carry: Any, queries, candidates, scale, rows: Rows, columns: Columns
) -> Any:
    # carry, outputs = tile(carry, logits), -inf for those that are no negatives. Returns the last carry, the outputs of
    # all rows, and the logits [tiles, J, T] of the first tiles, None of none.
    def one(keep, carry, number):
        # By number: parts of the queries to go through would be copies.
        queries, rows = jax.tree.map(lambda x: x[number], tiles)
        logits = _logits(settings, queries, candidates, scale, rows, columns)
        carry, outputs = tile(carry, logits)
        return carry, (outputs, logits if keep else None)

    tiles, parts, kept = _tiles(settings, len(candidates), (queries, rows)), [], None
    count = min(len(tiles[0]), settings.keep_bytes // (4 * len(candidates) * tiles[0].shape[1]))
    for keep, numbers in ((True, jnp.arange(count)), (False, jnp.arange(count, len(tiles[0])))):
        if len(numbers):
            carry, (outputs, logits) = jax.lax.scan(partial(one, keep), carry, numbers)
            parts.append(outputs)
            kept = logits if keep else kept
    outputs = jax.tree.map(lambda *parts: _whole(jnp.concatenate(parts), len(queries)), *parts)
    return carry, outputs, kept


def _backward(
    settings: Settings, weights: Callable[..., Any], queries, candidates, scale, rows, columns, kept, *by_row: Any
) -> Any:
    # `weights` gives the cotangent of a tile's logits, as the forward pass has them. Returns those of queries,
    # candidates, scale, two times None for what is known, and the sum of all weights.
    tiles = _tiles(settings, len(candidates), (queries, rows, *by_row))

    def again(queries, rows):
        return _logits(settings, queries, candidates, scale, rows, columns)

    def logits(number, queries, rows):
        if kept is None:
            return again(queries, rows)
        if len(kept) == len(tiles[0]):
            return kept[number]
        # One loop for both kinds: two would hold the gradients to the queries twice, to join them.
        return jax.lax.cond(number < len(kept), lambda *_: kept[number], again, queries, rows)

    def tile(carry, own):
        to_candidates, to_scale, total = carry
        number, queries, rows, *by_row = own
        given = weights(logits(number, queries, rows), *by_row)
        to_queries = scale * _matmul(given.T, candidates)
        # Σ_j given_ij s_ij = <q_i, to_q_i>.
        to_scale += jnp.sum(to_queries * queries) / scale
        return (to_candidates + _matmul(given, scale * queries), to_scale, total + jnp.sum(given)), to_queries

    zero = _varying(settings, jnp.zeros(()))
    carry = (_varying(settings, jnp.zeros(candidates.shape)), zero, zero)
    (to_candidates, to_scale, total), to_queries = jax.lax.scan(tile, carry, (jnp.arange(len(tiles[0])), *tiles))
    return _whole(to_queries, len(queries)), to_candidates, to_scale, None, None, total


def _logits(
    settings: Settings, queries: jax.Array, candidates: jax.Array, scale: jax.Array, rows: Rows, columns: Columns
) -> jax.Array:
    # [J, T], -inf where the pair may not be pushed apart.
    return jnp.where(_negatives(settings, rows, columns), _matmul(candidates, (scale * queries).T), -jnp.inf)


def _tiles(settings: Settings, columns: int, by_row: Any) -> Any:
    # [I, …] → [tiles, T, …], T of nearly one size: the last tile is filled up with rows that are not valid and count
    # for nothing.
    count = len(jax.tree.leaves(by_row)[0])
    tiles = -(-count // max(8, settings.tile_bytes // (4 * columns) // 8 * 8))
    size = -(-count // tiles)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, tiles * size - count), *[(0, 0)] * (x.ndim - 1)]), by_row)
    return jax.tree.map(lambda x: x.reshape(tiles, size, *x.shape[1:]), padded)


def _whole(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])[:count]


def _negatives(settings: Settings, rows: Rows, columns: Columns) -> jax.Array:
    # bool [J, T]: the pair may be pushed apart.
    ids = columns.ids[:, None]
    own = jnp.arange(len(ids))[:, None] == rows.own_column
    negative = rows.valid & columns.valid[:, None] & ~own
    if settings.mask:
        # Padding of `right` is -1, and so is a filler's number: fillers are not valid. Written out over P because a
        # reduction would hold [J, T, P] in memory.
        sets = (rows.right[:, p] == ids for p in range(rows.right.shape[1]))
        negative &= ~functools.reduce(jnp.logical_or, sets, rows.own_id == ids)
    if settings.same_modality:
        negative &= rows.modality == columns.modality[:, None]
    return negative


def _matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _log_sum(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    highest = jnp.max(x, axis=axis)
    total = jnp.sum(jnp.exp(x - jnp.expand_dims(_finite(highest), axis)), axis=axis)
    return highest, jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + highest, -jnp.inf)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(x == -jnp.inf, 0.0, x)


def _varying(settings: Settings, x: jax.Array) -> jax.Array:
    # A loop's carry has to be of one kind from the start: different on each device.
    return jax.lax.pcast(x, settings.axes, to="varying") if settings.axes else x
