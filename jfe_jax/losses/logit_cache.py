"""Logits kept for the backward pass: in three bytes each, and where the queries' gradients will be.

<q_i, c_j> of unit vectors lies within -1 and 1. Counted in steps of 2^-23 it is as exact as float32 near 1, and a
quarter smaller. The gradients' memory is needed anyway: until those of T queries are there, it holds as many of their
logits as they are. Axes as in `blocks`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BYTES = 3
_STEPS = (2**15 - 1) * 2**8
# Of the upper part, where a pair is no negative: below what -1 makes.
_NONE = -(2**15)


class Part(NamedTuple):
    """Blocks of candidates that are treated alike, for all queries.

    Attributes:
      places: of B.
      how: "steps" or "lent"; "" for those that are not kept.
    """

    places: range
    how: str


class Kept(NamedTuple):
    """Logits of all queries and some blocks of candidates.

    Attributes:
      upper: int16 [A, B', U, T], steps by 256.
      lower: uint8 [A, B', U, T], what is left.
      lent: float32 [A, T·E], a [U, T] after the other.
    """

    upper: jax.Array
    lower: jax.Array
    lent: jax.Array


def parts(count: int, keep: int, lend: int) -> list[Part]:
    """Of `count` blocks of candidates, where there is memory for `keep` in steps and for `lend` in the gradients'."""
    keep = min(count, keep)
    lend = keep + min(count - keep, lend)
    found = Part(range(keep), "steps"), Part(range(keep, lend), "lent"), Part(range(lend, count), "")
    return [part for part in found if part.places]


def room(of: list[Part], queries: tuple[int, int, int], u: int) -> Kept:
    """For blocks of `queries` [A, T, E] and of U candidates."""
    a, t, e = queries
    shape = a, sum(len(part.places) for part in of if part.how == "steps"), u, t
    return Kept(jnp.zeros(shape, jnp.int16), jnp.zeros(shape, jnp.uint8), jnp.zeros((a, t * e), jnp.float32))


def put(kept: Kept, part: Part, number: jax.Array, place: jax.Array, logits: jax.Array, scale: jax.Array) -> Kept:
    """With the logits [U, T] of a block, `scale` times products of unit vectors or -inf.

    Args:
      number, place: int32, of A and of B.
    """
    if part.how == "lent":
        return _written(kept, number, (place - part.places.start) * logits.size, logits)
    if not part.how:
        return kept
    steps = jnp.clip(jnp.round(logits * (_STEPS / scale)), -_STEPS, _STEPS).astype(jnp.int32)
    upper = jnp.where(logits == -jnp.inf, _NONE, steps >> 8).astype(jnp.int16)
    lower = (steps & 255).astype(jnp.uint8)
    upper, lower = (
        jax.lax.dynamic_update_slice(held, one[None, None], (number, place, 0, 0))
        for held, one in ((kept.upper, upper), (kept.lower, lower))
    )
    return kept._replace(upper=upper, lower=lower)


def get(kept: Kept, part: Part, number: jax.Array, place: jax.Array, scale: jax.Array) -> jax.Array:
    """The logits [U, T] that `put` was given for the block, float32; in steps to 2^-24 of `scale`."""
    u, t = kept.upper.shape[2:]
    if part.how == "lent":
        where = number, (place - part.places.start) * u * t
        return jax.lax.dynamic_slice(kept.lent, where, (1, u * t)).reshape(u, t)
    upper, lower = (x[number, place].astype(jnp.int32) for x in (kept.upper, kept.lower))
    logits = ((upper << 8) + lower).astype(jnp.float32) * (scale / _STEPS)
    return jnp.where(upper == _NONE, -jnp.inf, logits)


def returned(kept: Kept, number: jax.Array, gradients: jax.Array) -> Kept:
    """With the gradients [T, E] of block `number` of the queries in place of its lent logits."""
    return _written(kept, number, 0, gradients)


def _written(kept: Kept, number: jax.Array, start: jax.Array | int, numbers: jax.Array) -> Kept:
    return kept._replace(lent=jax.lax.dynamic_update_slice(kept.lent, numbers.reshape(1, -1), (number, start)))
