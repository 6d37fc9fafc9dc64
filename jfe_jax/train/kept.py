"""Logits kept for the backward pass, in three bytes each.

<q_i, c_j> of unit vectors lies within -1 and 1. Counted in steps of 2^-23 it is as exact as float32 near 1, and a
quarter smaller. Axes as in `blocks`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BYTES = 3
_HIGHEST = 2**15 - 1
_STEPS = _HIGHEST * 2**8
# Of the upper part, where a pair is no negative: below what -1 makes.
_NONE = -(2**15)


class Kept(NamedTuple):
    """Steps, in two parts: int16 [A, B', U, T], of 256 each, and uint8 [A, B', U, T], what is left."""

    upper: jax.Array
    lower: jax.Array


def room(shape: tuple[int, int, int, int]) -> Kept:
    """For logits [A, B', U, T]."""
    return Kept(jnp.zeros(shape, jnp.int16), jnp.zeros(shape, jnp.uint8))


def put(kept: Kept, block: tuple[jax.Array, jax.Array], logits: jax.Array, scale: jax.Array) -> Kept:
    """With the logits [U, T] of a block, `scale` times products of unit vectors or -inf, in its place (of A, of B')."""
    steps = jnp.clip(jnp.round(logits * (_STEPS / scale)), -_STEPS, _STEPS).astype(jnp.int32)
    upper = jnp.where(logits == -jnp.inf, _NONE, steps >> 8).astype(jnp.int16)
    parts = Kept(upper, (steps & 255).astype(jnp.uint8))
    return jax.tree.map(
        lambda held, one: jax.lax.dynamic_update_slice(held, one[None, None], (*block, 0, 0)), kept, parts
    )


def get(kept: Kept, block: tuple[jax.Array, jax.Array], scale: jax.Array) -> jax.Array:
    """The logits [U, T] that `put` was given for the block, float32, to 2^-24 of `scale`; -inf where they were."""
    upper, lower = (x[block].astype(jnp.int32) for x in kept)
    logits = ((upper << 8) + lower).astype(jnp.float32) * (scale / _STEPS)
    return jnp.where(upper == _NONE, -jnp.inf, logits)
