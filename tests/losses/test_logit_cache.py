"""Cached logits are as exact as the logits, in three quarters of their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.losses import logit_cache


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_cached_logits_round_trip(scale):
    random = np.random.default_rng(0)
    cosines = random.uniform(-1, 1, (2, 3, 8, 16)).astype(np.float32)
    # Rounding takes products of unit vectors past 1.
    cosines[0, 0, 0, :6] = [1, -1, 1 + 1e-6, -1 - 1e-6, 0, -1e-9]
    masked = random.random(cosines.shape) < 0.2
    masked[0, 0, 0, :6] = False
    logits = np.where(masked, -np.inf, np.float32(scale) * cosines)

    @jax.jit
    def round_trip(logits, scale):
        ranges = logit_cache.plan_cache(3, max_quantized=2, max_in_grad_buffer=1)
        cache = logit_cache.allocate(ranges, (2, 16, 8), 8)
        blocks = [(block_range, a, b) for a in range(2) for block_range in ranges for b in block_range.indices]
        for block_range, a, b in blocks:
            cache = logit_cache.store(cache, block_range, a, b, logits[a, b], scale)
        return cache, jnp.stack([logit_cache.load(cache, *block, scale) for block in blocks]).reshape(logits.shape)

    cache, back = round_trip(logits, scale)
    assert np.array_equal(np.isneginf(back), masked)
    # Half a step, and float32's rounding of the results.
    np.testing.assert_allclose(
        back[~masked], scale * np.clip(cosines[~masked].astype(float), -1, 1), rtol=2e-7, atol=scale * 2.0**-24 * 1.01
    )
    np.testing.assert_array_equal(back[:, 2], logits[:, 2])
    assert cache.high16.nbytes + cache.low8.nbytes == logit_cache.BYTES * logits[:, :2].size


@pytest.mark.parametrize(
    ("max_quantized", "max_in_grad_buffer", "expected"),
    [
        (9, 2, [(0, 5, "quantized")]),
        (3, 4, [(0, 3, "quantized"), (3, 5, "grad_buffer")]),
        (1, 2, [(0, 1, "quantized"), (1, 3, "grad_buffer"), (3, 5, "recompute")]),
        (0, 0, [(0, 5, "recompute")]),
    ],
)
def test_cache_plan_fills_the_quantized_share_then_the_gradient_buffer(max_quantized, max_in_grad_buffer, expected):
    assert [
        (block_range.indices.start, block_range.indices.stop, block_range.storage)
        for block_range in logit_cache.plan_cache(5, max_quantized, max_in_grad_buffer)
    ] == expected
