"""Hidden states of packed rows → one vector per item; unit norm.

Axes: G groups, R rows, S tokens of a row, D width, B items, E embedding.
"""

import jax
import jax.numpy as jnp

from jfe_jax.data.batch import PackedBatch


def pool(hidden: jax.Array, packed: PackedBatch, how: str, mask: jax.Array | None = None) -> jax.Array:
    """Pools every item's tokens.

    Args:
      hidden: [G, R, S, D].
      packed: where the items are.
      how: "last" takes the token at `packed.pool`, "mean" the mean over `packed.pool_span`, "largest" the first token
        with the largest id of the span.
      mask: bool [G, R, S]; "mean" leaves out what is False. None keeps all.

    Returns:
      float32 [G, B, D]; fillers get some finite value.
    """
    g, r, s, d = hidden.shape
    flat = hidden.reshape(g, r * s, d)
    if how != "mean":
        where = packed.pool if how == "last" else _largest(packed)
        rows = jnp.take_along_axis(flat, where[..., None], axis=1, mode="clip")
        return rows.astype(jnp.float32)
    return mean_over(in_span(jnp.arange(r * s), packed.pool_span), flat, mask)


def _largest(packed: PackedBatch) -> jax.Array:
    """Where each item's first token with its largest id is, in the flattened R·S: int32 [G, B]."""
    tokens = packed.tokens.reshape(packed.tokens.shape[0], 1, -1)
    return jnp.argmax(jnp.where(in_span(jnp.arange(tokens.shape[-1]), packed.pool_span), tokens, -1), axis=-1)


def in_span(index: jax.Array, span: jax.Array) -> jax.Array:
    """Which of the tokens `index` [X] or [G, X] lie in which item's span [G, B, 2]: bool [G, B, X]."""
    index = jnp.expand_dims(index, -2)
    return (index >= span[..., :1]) & (index < span[..., 1:])


def mean_over(member: jax.Array, flat: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of the vectors flat [G, X, D] that are members [G, B, X] (and not masked): float32 [G, B, D], 0 of none."""
    if mask is not None:
        member = member & mask.reshape(mask.shape[0], 1, -1)
    weights = member.astype(flat.dtype)
    total = jnp.einsum("gbx,gxd->gbd", weights, flat, preferred_element_type=jnp.float32)
    return total / jnp.maximum(jnp.sum(member, axis=-1, keepdims=True), 1)


def unit(x: jax.Array) -> jax.Array:
    """x [..., E] scaled to unit norm; zero stays zero, with a zero gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
