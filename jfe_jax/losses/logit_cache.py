"""Logits kept for the backward pass: in three bytes each, and where the queries' gradients will be.

<q_i, c_j> of unit vectors lies within -1 and 1. Counted in steps of 2^-23 it is as exact as float32 near 1, and a
quarter smaller. The gradients' memory is needed anyway: until those of T queries are there, it holds as many of their
logits as they are. Axes as in `blocks`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BYTES = 3
_QUANT_SCALE = (2**15 - 1) * 2**8
# Of the upper part, where a pair is no negative: below what -1 makes.
_NONE = -(2**15)


class BlockRange(NamedTuple):
    """Blocks of candidates that are treated alike, for all queries.

    Attributes:
      places: of B.
      storage: "quantized" or "grad_buffer"; "recompute" for those that are not kept.
    """

    places: range
    storage: str


class LogitCache(NamedTuple):
    """Logits of all queries and some blocks of candidates.

    Attributes:
      high16: int16 [A, B', U, T], steps by 256.
      low8: uint8 [A, B', U, T], what is left.
      grad_scratch: float32 [A, T·E], a [U, T] after the other.
    """

    high16: jax.Array
    low8: jax.Array
    grad_scratch: jax.Array


def plan_cache(count: int, keep: int, lend: int) -> list[BlockRange]:
    """Of `count` blocks of candidates, where there is memory for `keep` in steps and for `lend` in the gradients'."""
    keep = min(count, keep)
    lend = keep + min(count - keep, lend)
    found = (
        BlockRange(range(keep), "quantized"),
        BlockRange(range(keep, lend), "grad_buffer"),
        BlockRange(range(lend, count), "recompute"),
    )
    return [part for part in found if part.places]


def allocate(of: list[BlockRange], queries: tuple[int, int, int], u: int) -> LogitCache:
    """For blocks of `queries` [A, T, E] and of U candidates."""
    a, t, e = queries
    shape = a, sum(len(part.places) for part in of if part.storage == "quantized"), u, t
    return LogitCache(jnp.zeros(shape, jnp.int16), jnp.zeros(shape, jnp.uint8), jnp.zeros((a, t * e), jnp.float32))


def store(
    kept: LogitCache, part: BlockRange, number: jax.Array, place: jax.Array, logits: jax.Array, scale: jax.Array
) -> LogitCache:
    """With the logits [U, T] of a block, `scale` times products of unit vectors or -inf.

    Args:
      number, place: int32, of A and of B.
    """
    if part.storage == "grad_buffer":
        return _written(kept, number, (place - part.places.start) * logits.size, logits)
    if part.storage == "recompute":
        return kept
    steps = jnp.clip(jnp.round(logits * (_QUANT_SCALE / scale)), -_QUANT_SCALE, _QUANT_SCALE).astype(jnp.int32)
    high16 = jnp.where(logits == -jnp.inf, _NONE, steps >> 8).astype(jnp.int16)
    low8 = (steps & 255).astype(jnp.uint8)
    high16, low8 = (
        jax.lax.dynamic_update_slice(held, one[None, None], (number, place, 0, 0))
        for held, one in ((kept.high16, high16), (kept.low8, low8))
    )
    return kept._replace(high16=high16, low8=low8)


def load(kept: LogitCache, part: BlockRange, number: jax.Array, place: jax.Array, scale: jax.Array) -> jax.Array:
    """The logits [U, T] that `store` was given for the block, float32; in steps to 2^-24 of `scale`."""
    u, t = kept.high16.shape[2:]
    if part.storage == "grad_buffer":
        where = number, (place - part.places.start) * u * t
        return jax.lax.dynamic_slice(kept.grad_scratch, where, (1, u * t)).reshape(u, t)
    high16, low8 = (x[number, place].astype(jnp.int32) for x in (kept.high16, kept.low8))
    logits = ((high16 << 8) + low8).astype(jnp.float32) * (scale / _QUANT_SCALE)
    return jnp.where(high16 == _NONE, -jnp.inf, logits)


def write_gradients(kept: LogitCache, number: jax.Array, gradients: jax.Array) -> LogitCache:
    """With the gradients [T, E] of block `number` of the queries in place of its lent logits."""
    return _written(kept, number, 0, gradients)


def _written(kept: LogitCache, number: jax.Array, start: jax.Array | int, numbers: jax.Array) -> LogitCache:
    return kept._replace(
        grad_scratch=jax.lax.dynamic_update_slice(kept.grad_scratch, numbers.reshape(1, -1), (number, start))
    )
