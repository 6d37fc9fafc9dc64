"""Caches logits for the backward pass: quantized to three bytes each, and in the buffer of the queries' gradients.

<q_i, c_j> of unit vectors is between -1 and 1. As a multiple of 2^-23 it is as exact as float32 is near 1, and a
quarter smaller. The buffer of the queries' gradients is needed anyway. Until the gradients of T queries are written to
it, it caches as many logits of these queries as their gradients have elements. Axes as in `tiled_logits`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BYTES = 3
_QUANT_SCALE = (2**15 - 1) * 2**8
# `high16` of a pair that is no negative: below the quantized value of -1.
_MASKED = -(2**15)


class BlockRange(NamedTuple):
    """Consecutive blocks of candidates that are stored alike, for all queries.

    Attributes:
      indices: of the B blocks.
      storage: "quantized" or "grad_buffer"; "recompute" for blocks that are not cached.
    """

    indices: range
    storage: str


class LogitCache(NamedTuple):
    """Logits of all queries and of the first blocks of candidates.

    Attributes:
      high16: int16 [A, B', U, T], the quantized logit's multiples of 256.
      low8: uint8 [A, B', U, T], the remainder.
      grad_scratch: float32 [A, T·E], one [U, T] block after the other.
    """

    high16: jax.Array
    low8: jax.Array
    grad_scratch: jax.Array


def plan_cache(num_blocks: int, max_quantized: int, max_in_grad_buffer: int) -> list[BlockRange]:
    """Assigns a storage to each block of candidates: first quantized, then the gradient buffer, the rest recomputed."""
    quantized_end = min(num_blocks, max_quantized)
    grad_buffer_end = quantized_end + min(num_blocks - quantized_end, max_in_grad_buffer)
    ranges = (
        BlockRange(range(quantized_end), "quantized"),
        BlockRange(range(quantized_end, grad_buffer_end), "grad_buffer"),
        BlockRange(range(grad_buffer_end, num_blocks), "recompute"),
    )
    return [block_range for block_range in ranges if block_range.indices]


def allocate(ranges: list[BlockRange], query_shape: tuple[int, int, int], u: int) -> LogitCache:
    """Allocates the cache for query blocks of shape [A, T, E] and candidate blocks of U."""
    a, t, e = query_shape
    num_quantized = sum(len(block_range.indices) for block_range in ranges if block_range.storage == "quantized")
    shape = a, num_quantized, u, t
    return LogitCache(jnp.zeros(shape, jnp.int16), jnp.zeros(shape, jnp.uint8), jnp.zeros((a, t * e), jnp.float32))


def store(
    cache: LogitCache,
    block_range: BlockRange,
    query_block: jax.Array,
    candidate_block: jax.Array,
    logits: jax.Array,
    scale: jax.Array,
) -> LogitCache:
    """Returns the cache with the logits [U, T] of a block: `scale` times products of unit vectors, or -inf.

    Args:
      query_block, candidate_block: int32 scalars, indices into A and B.
    """
    if block_range.storage == "grad_buffer":
        offset = (candidate_block - block_range.indices.start) * logits.size
        return _write_scratch(cache, query_block, offset, logits)
    if block_range.storage == "recompute":
        return cache
    quantized = jnp.clip(jnp.round(logits * (_QUANT_SCALE / scale)), -_QUANT_SCALE, _QUANT_SCALE).astype(jnp.int32)
    high16 = jnp.where(logits == -jnp.inf, _MASKED, quantized >> 8).astype(jnp.int16)
    low8 = (quantized & 255).astype(jnp.uint8)
    high16, low8 = (
        jax.lax.dynamic_update_slice(cached, block[None, None], (query_block, candidate_block, 0, 0))
        for cached, block in ((cache.high16, high16), (cache.low8, low8))
    )
    return cache._replace(high16=high16, low8=low8)


def load(
    cache: LogitCache, block_range: BlockRange, query_block: jax.Array, candidate_block: jax.Array, scale: jax.Array
) -> jax.Array:
    """Returns the float32 logits [U, T] that `store` received; quantized ones are exact to 2^-24 of `scale`."""
    u, t = cache.high16.shape[2:]
    if block_range.storage == "grad_buffer":
        start = query_block, (candidate_block - block_range.indices.start) * u * t
        return jax.lax.dynamic_slice(cache.grad_scratch, start, (1, u * t)).reshape(u, t)
    high16, low8 = (x[query_block, candidate_block].astype(jnp.int32) for x in (cache.high16, cache.low8))
    logits = ((high16 << 8) + low8).astype(jnp.float32) * (scale / _QUANT_SCALE)
    return jnp.where(high16 == _MASKED, -jnp.inf, logits)


def write_gradients(cache: LogitCache, query_block: jax.Array, gradients: jax.Array) -> LogitCache:
    """Overwrites a query block's logits in the gradient buffer with its gradients [T, E]."""
    return _write_scratch(cache, query_block, 0, gradients)


def _write_scratch(cache: LogitCache, query_block: jax.Array, offset: jax.Array | int, values: jax.Array) -> LogitCache:
    grad_scratch = jax.lax.dynamic_update_slice(cache.grad_scratch, values.reshape(1, -1), (query_block, offset))
    return cache._replace(grad_scratch=grad_scratch)
