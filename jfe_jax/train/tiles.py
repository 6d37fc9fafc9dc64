"""Sums over all pairs of queries and candidates, a tile of rows at a time, so that no [I, J] array is ever whole.

Axes: I queries of this device, J candidates of everybody, T queries of a tile, P right answers, E embedding.

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
    def tile(keep, carry, queries, rows):
        logits = scale * _products(queries, candidates)
        negative = jnp.where(_negatives(settings, rows, columns), logits, -jnp.inf)
        highest, log_sum = _log_sum(negative, 1)
        if settings.columns:
            most, total = carry
            now = jnp.maximum(most, jnp.max(negative, axis=0))
            carry = (now, total * jnp.exp(most - _finite(now)) + jnp.sum(jnp.exp(negative - _finite(now)), axis=0))
        return carry, (log_sum, highest), logits if keep else None

    empty = _varying(settings, jnp.full(len(candidates) if settings.columns else 0, -jnp.inf))
    (most, total), (log_sum, highest), kept = _keeping(
        settings, tile, (empty, jnp.zeros_like(empty)), len(candidates), queries, rows
    )
    column_sums = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + most, -jnp.inf)
    return (log_sum, column_sums, highest), (queries, candidates, scale, rows, columns, log_sum, column_sums, kept)


def _log_sums_backward(settings: Settings, saved, cotangents):
    queries, candidates, scale, rows, columns, log_sum, column_sums, kept = saved
    to_rows, to_columns, _ = cotangents

    def weights(logits, rows, log_sum, to_rows):
        negative = jnp.where(_negatives(settings, rows, columns), logits, -jnp.inf)
        given = to_rows[:, None] * jnp.exp(negative - _finite(log_sum)[:, None])
        if settings.columns:
            given += to_columns * jnp.exp(negative - _finite(column_sums))
        return given

    return _products_backward(settings, weights, queries, candidates, scale, kept, rows, log_sum, to_rows)[:5]


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
    def tile(keep, carry, queries, rows):
        logits = scale * _products(queries, candidates)
        negative = _negatives(settings, rows, columns)
        total = jnp.sum(jnp.where(negative, jax.nn.softplus(logits + bias), 0.0), axis=1)
        highest = jnp.max(jnp.where(negative, logits, -jnp.inf), axis=1)
        return carry, (total, highest), logits if keep else None

    _, (total, highest), kept = _keeping(settings, tile, (), len(candidates), queries, rows)
    return (total, highest), (queries, candidates, scale, bias, rows, columns, kept)


def _softplus_sums_backward(settings: Settings, saved, cotangents):
    queries, candidates, scale, bias, rows, columns, kept = saved

    def weights(logits, rows, to_rows):
        return jnp.where(_negatives(settings, rows, columns), to_rows[:, None] * jax.nn.sigmoid(logits + bias), 0.0)

    *given, to_bias = _products_backward(settings, weights, queries, candidates, scale, kept, rows, cotangents[0])
    return *given[:3], to_bias, None, None


softplus_sums.defvjp(_softplus_sums_forward, _softplus_sums_backward)


def _products_backward(settings: Settings, weights, queries, candidates, scale, kept, *by_row):
    # `weights` gives the cotangent of a tile's logits. Returns those of queries, candidates, scale, two times None for
    # what is known, and the sum of all weights.
    def tile(carry, kept, queries, *by_row):
        to_candidates, to_scale, total = carry
        logits = scale * _products(queries, candidates) if kept is None else kept
        given = weights(logits, *by_row)
        to_queries = scale * _matmul(given, candidates)
        # Σ_j given_ij s_ij = <q_i, to_q_i>.
        to_scale += jnp.sum(to_queries * queries) / scale
        return (to_candidates + scale * _matmul(given.T, queries), to_scale, total + jnp.sum(given)), (to_queries,)

    zero = _varying(settings, jnp.zeros(()))
    carry, by_row = (_varying(settings, jnp.zeros(candidates.shape)), zero, zero), (queries, *by_row)
    count, parts = 0 if kept is None else len(kept), []
    for logits, own in ((kept, _rows(by_row, 0, count)), (None, _rows(by_row, count, len(queries)))):
        if len(own[0]):
            carry, (to_queries,) = _over_tiles(settings, tile, carry, len(candidates), logits, *own)
            parts.append(to_queries)
    to_candidates, to_scale, total = carry
    return jnp.concatenate(parts), to_candidates, to_scale, None, None, total


def _keeping(settings: Settings, tile: Callable[..., Any], carry: Any, columns: int, *by_row: Any) -> Any:
    # carry, outputs, logits = tile(keep, carry, *by_row), first over the rows whose logits are kept, then over the
    # others. Returns the last carry, the outputs of all rows and the logits of the first, None of none.
    rows, size = len(jax.tree.leaves(by_row)[0]), _tile_rows(settings, columns)
    # Whole tiles: nothing is filled up and cut off again.
    count, parts, kept = min(rows, settings.keep_bytes // (4 * columns) // size * size), [], None
    for keep, own in ((True, _rows(by_row, 0, count)), (False, _rows(by_row, count, rows))):
        if len(jax.tree.leaves(own)[0]):

            def one(carry, *own, keep=keep):
                carry, *outputs = tile(keep, carry, *own)
                return carry, outputs

            carry, (outputs, logits) = _over_tiles(settings, one, carry, columns, *own)
            parts.append(outputs)
            kept = logits if keep else kept
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts), kept


def _rows(by_row: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[start:stop], by_row)


def _over_tiles(settings: Settings, tile: Callable[..., Any], carry: Any, columns: int, *by_row: Any) -> Any:
    # carry, outputs = tile(carry, *by_row) over tiles of rows; outputs have I in front again.
    count = len(jax.tree.leaves(by_row)[0])
    tiles = -(-count // _tile_rows(settings, columns))
    if tiles == 1:
        return tile(carry, *by_row)
    # Tiles of nearly one size: the last is filled up with rows that are not valid and count for nothing.
    size = -(-count // tiles)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, tiles * size - count), *[(0, 0)] * (x.ndim - 1)]), by_row)
    split = jax.tree.map(lambda x: x.reshape(tiles, size, *x.shape[1:]), padded)
    carry, outputs = jax.lax.scan(lambda carry, own: tile(carry, *own), carry, split)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], outputs)


def _tile_rows(settings: Settings, columns: int) -> int:
    return max(8, settings.tile_bytes // (4 * columns) // 8 * 8)


def _negatives(settings: Settings, rows: Rows, columns: Columns) -> jax.Array:
    # bool [T, J]: the pair may be pushed apart.
    own = jnp.arange(len(columns.ids))[None] == rows.own_column[:, None]
    negative = rows.valid[:, None] & columns.valid[None] & ~own
    if settings.mask:
        # Padding of `right` is -1, and so is a filler's number: fillers are not valid. Written out over P because a
        # reduction would hold [T, J, P] in memory.
        sets = (rows.right[:, p, None] == columns.ids[None] for p in range(rows.right.shape[1]))
        negative &= ~functools.reduce(jnp.logical_or, sets, rows.own_id[:, None] == columns.ids[None])
    if settings.same_modality:
        negative &= rows.modality[:, None] == columns.modality[None]
    return negative


def _products(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return _matmul(rows, columns.T)


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
