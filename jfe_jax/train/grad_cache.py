"""Gradients of a loss over a batch whose activations do not fit at once (GradCache: Gao et al. 2021, section 3.2).

Axes: K chunks; what follows is the encoder's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def gradients(
    encode: Callable[[Any, Any], jax.Array],
    loss: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    params: Any,
    loss_params: Any,
    chunks: Any,
    hold: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Any, Any, Any]:
    """Gradients of loss(loss_params, embeddings of all chunks), exact, with one chunk's activations in memory.

    Three passes: every chunk is encoded and only its embeddings kept; the loss gives the gradient to each embedding;
    every chunk is encoded again, and its embeddings' gradient carried back. An encoder that draws (dropout) has to take
    what it draws from out of its chunk, as a key of its own: then it draws the same twice.

    Args:
      encode: (params, chunk) → embeddings.
      loss: (loss_params, embeddings with K in front) → scalar, and what is to be returned besides.
      params, loss_params: what gradients are wanted of.
      chunks: leaves have K in front.
      hold: pins the layout of a tree like `params`: of the sum that is carried from chunk to chunk.

    Returns:
      Gradients to `params` and to `loss_params`, and what `loss` returns besides.
    """
    embeddings = jax.lax.map(lambda chunk: encode(params, chunk), chunks)
    (to_loss_params, to_embeddings), aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(loss_params, embeddings)

    def add(total: Any, own: tuple[Any, jax.Array]) -> tuple[Any, None]:
        chunk, to_embeddings = own
        _, back = jax.vjp(lambda params: encode(params, chunk), params)
        return hold(jax.tree.map(jnp.add, total, back(to_embeddings)[0])), None

    zeros = hold(jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, (chunks, to_embeddings))[0], to_loss_params, aux
