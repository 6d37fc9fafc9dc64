"""Products and softmax whose gradients are written out: on the CPU XLA makes slower ones of what JAX derives.

Axes: C any input width, D any output width, Q queries, T keys, H head dim. "…" are leading axes.
"""

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., C] times w [C, D] → [..., D].

    The gradients are those of any product, written out: left to itself, XLA computes the weight's on the CPU from a
    transposed copy of the activations, at a third of the speed.
    """
    return x @ w


def transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """xᵀ y: [..., Q, C] and [..., Q, D] → [..., C, D].

    Eigen's product on the CPU takes a third longer if C is larger than D: then the other way round, and turned.
    """

    def turned(x: jax.Array, y: jax.Array) -> jax.Array:
        # Without the barrier XLA would turn the product back.
        return jax.lax.optimization_barrier(y.mT @ x).mT

    if x.shape[-1] <= y.shape[-1]:
        return x.mT @ y
    return jax.lax.platform_dependent(x, y, cpu=turned, default=lambda x, y: x.mT @ y)


def _matmul_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w, (x, w)


def _matmul_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    return g @ w.T, transposed_product(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """query [..., Q, H] times key [..., T, H] → float32 [..., Q, T].

    The gradient is rounded to the dtype of the two before it is multiplied.
    """
    return jnp.matmul(query, key.mT, preferred_element_type=jnp.float32)


def _scores_forward(query: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return scores(query, key), (query, key)


def _scores_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    query, key = kept
    g = g.astype(query.dtype)
    return g @ key, transposed_product(g, query)


scores.defvjp(_scores_forward, _scores_backward)


def largest(logits: jax.Array) -> jax.Array:
    """Of the last axis, kept: [..., T] → [..., 1].

    On the CPU a comparison that passes a NaN over is a quarter of the work; the exponentials that follow keep it.
    """

    def selected(logits: jax.Array) -> jax.Array:
        least = np.asarray(-np.inf, logits.dtype)
        larger = jax.lax.reduce(logits, least, lambda a, b: jax.lax.select(a > b, a, b), (logits.ndim - 1,))
        return larger[..., None]

    def plain(logits: jax.Array) -> jax.Array:
        return jnp.max(logits, axis=-1, keepdims=True)

    return jax.lax.platform_dependent(logits, cpu=selected, default=plain)


@jax.custom_vjp
def weighted_mean(logits: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(logits) · value: float32 [..., Q, T] and [..., T, H] → [..., Q, H] in the dtype of `value`.

    Both products of the backward pass take operands of that dtype. (Gradient: Dao et al. 2022, FlashAttention, B.2.)
    """
    return _weighted_mean_forward(logits, value)[0]


def _weighted_mean_forward(logits: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    weights = jnp.exp(logits - largest(logits))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    # Divided by their sum after the product with the values: H numbers a row instead of T.
    out = (jnp.matmul(weights, value, preferred_element_type=jnp.float32) / total).astype(value.dtype)
    return out, (weights, total, value, out)


def _weighted_mean_backward(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, total, value, out = kept
    g = g.astype(jnp.float32) / total
    inner = jnp.sum(g * out, axis=-1, keepdims=True)
    g = g.astype(value.dtype)
    to_weights = jnp.matmul(g, value.mT, preferred_element_type=jnp.float32)
    return weights * (to_weights - inner), transposed_product(weights, g)


weighted_mean.defvjp(_weighted_mean_forward, _weighted_mean_backward)


@jax.custom_vjp
def settled(x: jax.Array) -> jax.Array:
    """x, whose gradient is computed once though several things are made of it; XLA's fusions compute it for each."""
    return x


settled.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))
