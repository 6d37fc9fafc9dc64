"""Sums over all pairs of queries and candidates, each differentiated by hand: see `blocks`."""

from functools import partial

import jax
import jax.numpy as jnp

from jfe_jax.losses.tiled_logits import LogitInputs, TileConfig, backward, forward
from jfe_jax.models.layers.matmul import largest


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def log_sums(
    settings: TileConfig, scores: LogitInputs, positives: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """log Σ exp(s_ij) over the negatives of each row, and over this device's rows of each column.

    Args:
      settings, scores: see TileConfig, LogitInputs.
      positives: float32 [I, E], the candidates of `rows.own_column`. Their gradient is the candidates'.

    Returns:
      float32 [I], s_ij of the positives; [I] and [J] (empty without `settings.columns`), the sums, -inf where there is
      no negative; [I], the greatest s_ij of the negatives, which has no gradient.
    """
    return _log_sums_forward(settings, scores, positives)[0]


def _log_sums_forward(settings: TileConfig, scores: LogitInputs, positives):
    def block(logits, by_row, by_column):
        return _added(*by_row, logits, 0), _added(*by_column, logits, 1) if by_column else ()

    empty = -jnp.inf, 0.0
    by_row, by_column, kept = forward(settings, block, scores, empty, empty if settings.columns else ())
    log_sum, column_sums = _log_sum(*by_row), _log_sum(*by_column) if by_column else jnp.zeros(0)
    results = _own(scores, positives), log_sum, column_sums, by_row[0]
    return results, (scores, log_sum, column_sums, kept)


def _log_sums_backward(settings: TileConfig, saved, cotangents):
    scores, log_sum, column_sums, kept = saved
    to_own, to_rows, to_columns, _ = cotangents

    def weights(logits, by_row, by_column):
        to_rows, log_sum = by_row
        given = to_rows * jnp.exp(logits - log_sum)
        if by_column:
            to_columns, column_sums = (x[:, None] for x in by_column)
            given += to_columns * jnp.exp(logits - column_sums)
        return given

    to_rows, to_columns = scores.scale * to_rows, scores.scale * to_columns
    by_column = (to_columns, _finite(column_sums)) if settings.columns else ()
    return backward(settings, weights, scores, kept, to_own, (to_rows, _finite(log_sum)), by_column)[0], None


log_sums.defvjp(_log_sums_forward, _log_sums_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def softplus_sums(
    settings: TileConfig, scores: LogitInputs, positives: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ log(1 + exp(s_ij + bias)) over the negatives of each row.

    Args: as of `log_sums`, and bias, a float32 scalar.

    Returns:
      float32 [I], s_ij of the positives; [I], the sums; [I], the greatest s_ij of the negatives, which has no gradient.
    """
    return _softplus_sums_forward(settings, scores, positives, bias)[0]


def _softplus_sums_forward(settings: TileConfig, scores: LogitInputs, positives, bias):
    def block(logits, by_row, _):
        total, highest = by_row
        total += jnp.sum(jax.nn.softplus(logits + bias), axis=0)
        return (total, jnp.maximum(highest, jnp.max(logits, axis=0))), ()

    by_row, _, kept = forward(settings, block, scores, (0.0, -jnp.inf), ())
    return (_own(scores, positives), *by_row), (scores, bias, kept)


def _softplus_sums_backward(settings: TileConfig, saved, cotangents):
    scores, bias, kept = saved

    def weights(logits, by_row, _):
        return by_row[0] * jax.nn.sigmoid(logits + bias)

    to_own, to_rows, _ = cotangents
    given, total = backward(settings, weights, scores, kept, to_own, (scores.scale * to_rows,), ())
    return given, None, total / scores.scale


softplus_sums.defvjp(_softplus_sums_forward, _softplus_sums_backward)


def _own(scores: LogitInputs, positives: jax.Array) -> jax.Array:
    # A few at a time: XLA would hold all products of numbers in memory, to add them up.
    return scores.scale * jax.lax.map(lambda pair: jnp.vdot(*pair), (scores.queries, positives), batch_size=256)


def _added(highest: jax.Array, total: jax.Array, logits: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    # The greatest x and Σ exp(x - greatest), with those of a block.
    now = jnp.maximum(highest, largest(logits)[:, 0] if axis else jnp.max(logits, axis=0))
    shift = _finite(now)
    added = jnp.sum(jnp.exp(logits - jnp.expand_dims(shift, axis)), axis=axis)
    return now, total * jnp.exp(highest - shift) + added


def _log_sum(highest: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + highest, -jnp.inf)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(x == -jnp.inf, 0.0, x)
