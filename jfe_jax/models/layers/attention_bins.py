"""Packed tokens ↔ the bins that attention works on (`batch.AttentionBins`).

Axes: G groups, R rows, S tokens of a row, W bins of L tokens.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jfe_jax.data.batch import AttentionBins


def longest(bins: AttentionBins) -> int:
    """Tokens of the longest bin."""
    return max(index.shape[-1] for index in bins.token_index)


def split(x: jax.Array, bins: AttentionBins) -> list[jax.Array]:
    """[G, R, S, …] → [G, W, L, …] for each length; 0 where a bin holds no token."""
    flat = x.reshape(x.shape[0], -1, *x.shape[3:])
    places = _move(flat, _flat(bins.token_index), _flat([bins.inverse_index]))
    return _parts(places, bins)


def join(parts: Sequence[jax.Array], bins: AttentionBins) -> jax.Array:
    """Back again: [G, W, L, …] for each length → [G, R, S, …]; 0 for padding."""
    places = _move(_flat(parts), _flat([bins.inverse_index]), _flat(bins.token_index))
    return places.reshape(*bins.inverse_index.shape, *places.shape[2:])


def split_ids(ids: jax.Array, bins: AttentionBins) -> list[jax.Array]:
    """int32 [G, R, S] → [G, W, L] for each length; -1 where a bin holds no token."""
    flat = ids.reshape(ids.shape[0], -1)
    places = jnp.take_along_axis(flat, _flat(bins.token_index), axis=1, mode="fill", fill_value=-1)
    return _parts(places, bins)


def _flat(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([part.reshape(part.shape[0], -1, *part.shape[3:]) for part in parts], axis=1)


def _parts(places: jax.Array, bins: AttentionBins) -> list[jax.Array]:
    shapes = [index.shape for index in bins.token_index]
    ends = itertools.accumulate(w * length for _, w, length in shapes)
    parts = jnp.split(places, list(ends)[:-1], axis=1)
    return [part.reshape(*shape, *part.shape[2:]) for part, shape in zip(parts, shapes, strict=True)]


@jax.custom_vjp
def _move(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    # x [G, X, …] → [G, Y, …], of each place what is at `source` [G, Y], 0 if that is X. `target` [G, X] is the inverse:
    # so the gradient is looked up as well; left to itself, it would be added up one token after the other.
    index = source.reshape(*source.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def _move_forward(x: jax.Array, source: jax.Array, target: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _move(x, source, target), (source, target)


def _move_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None, None]:
    source, target = kept
    return _move(g, target, source), None, None


_move.defvjp(_move_forward, _move_backward)
