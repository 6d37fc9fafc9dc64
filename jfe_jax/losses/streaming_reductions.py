"""Reductions over all pairs of queries and candidates, with custom gradients. Computed tile by tile: `tiled_logits`."""

from functools import partial

import jax
import jax.numpy as jnp

from jfe_jax.losses.tiled_logits import LogitInputs, TileConfig, backward, forward
from jfe_jax.models.layers.matmul import largest


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def log_sums(
    settings: TileConfig, inputs: LogitInputs, positives: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes log Σ exp(s_ij) over the negatives of each row, and over this device's rows of each column.

    Args:
      settings, inputs: see TileConfig, LogitInputs.
      positives: float32 [I, E], the candidates of `rows.own_column`. Their gradient goes to the candidates.

    Returns:
      float32 [I], s_ij of the positives; [I] and [J] (empty without `settings.columns`), the sums, -inf where there is
      no negative; [I], the largest s_ij of the negatives, which has no gradient.
    """
    return _log_sums_forward(settings, inputs, positives)[0]


def _log_sums_forward(settings: TileConfig, inputs: LogitInputs, positives):
    def reduce_tile(logits, by_row, by_column):
        return _update_log_sum(*by_row, logits, 0), _update_log_sum(*by_column, logits, 1) if by_column else ()

    empty = -jnp.inf, 0.0
    by_row, by_column, cache = forward(settings, reduce_tile, inputs, empty, empty if settings.columns else ())
    log_sum, column_sums = _finish_log_sum(*by_row), _finish_log_sum(*by_column) if by_column else jnp.zeros(0)
    results = _positive_logits(inputs, positives), log_sum, column_sums, by_row[0]
    return results, (inputs, log_sum, column_sums, cache)


def _log_sums_backward(settings: TileConfig, saved, cotangents):
    inputs, log_sum, column_sums, cache = saved
    d_positive, d_rows, d_columns, _ = cotangents

    def dlogits_fn(logits, by_row, by_column):
        d_rows, log_sum = by_row
        d_logits = d_rows * jnp.exp(logits - log_sum)
        if by_column:
            d_columns, column_sums = (x[:, None] for x in by_column)
            d_logits += d_columns * jnp.exp(logits - column_sums)
        return d_logits

    d_rows, d_columns = inputs.scale * d_rows, inputs.scale * d_columns
    by_column = (d_columns, _zero_if_neg_inf(column_sums)) if settings.columns else ()
    by_row = d_rows, _zero_if_neg_inf(log_sum)
    return backward(settings, dlogits_fn, inputs, cache, d_positive, by_row, by_column)[0], None


log_sums.defvjp(_log_sums_forward, _log_sums_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def softplus_sums(
    settings: TileConfig, inputs: LogitInputs, positives: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes Σ log(1 + exp(s_ij + bias)) over the negatives of each row.

    Args: as of `log_sums`, and bias, a float32 scalar.

    Returns:
      float32 [I], s_ij of the positives; [I], the sums; [I], the largest s_ij of the negatives, which has no gradient.
    """
    return _softplus_sums_forward(settings, inputs, positives, bias)[0]


def _softplus_sums_forward(settings: TileConfig, inputs: LogitInputs, positives, bias):
    def reduce_tile(logits, by_row, _):
        total, highest = by_row
        total += jnp.sum(jax.nn.softplus(logits + bias), axis=0)
        return (total, jnp.maximum(highest, jnp.max(logits, axis=0))), ()

    by_row, _, cache = forward(settings, reduce_tile, inputs, (0.0, -jnp.inf), ())
    return (_positive_logits(inputs, positives), *by_row), (inputs, bias, cache)


def _softplus_sums_backward(settings: TileConfig, saved, cotangents):
    inputs, bias, cache = saved

    def dlogits_fn(logits, by_row, _):
        return by_row[0] * jax.nn.sigmoid(logits + bias)

    d_positive, d_rows, _ = cotangents
    d_inputs, total = backward(settings, dlogits_fn, inputs, cache, d_positive, (inputs.scale * d_rows,), ())
    return d_inputs, None, total / inputs.scale


softplus_sums.defvjp(_softplus_sums_forward, _softplus_sums_backward)


def _positive_logits(inputs: LogitInputs, positives: jax.Array) -> jax.Array:
    # In batches: XLA would otherwise materialize all elementwise products before it sums them.
    return inputs.scale * jax.lax.map(lambda pair: jnp.vdot(*pair), (inputs.queries, positives), batch_size=256)


def _update_log_sum(highest: jax.Array, total: jax.Array, logits: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    # Adds a tile to the running maximum of x and to Σ exp(x - maximum).
    now = jnp.maximum(highest, largest(logits)[:, 0] if axis else jnp.max(logits, axis=0))
    shift = _zero_if_neg_inf(now)
    added = jnp.sum(jnp.exp(logits - jnp.expand_dims(shift, axis)), axis=axis)
    return now, total * jnp.exp(highest - shift) + added


def _finish_log_sum(highest: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + highest, -jnp.inf)


def _zero_if_neg_inf(x: jax.Array) -> jax.Array:
    return jnp.where(x == -jnp.inf, 0.0, x)
