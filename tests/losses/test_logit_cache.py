"""What is kept of the logits is as exact as the logits, in three quarters of their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.losses import logit_cache


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_kept_logits_come_back(scale):
    random = np.random.default_rng(0)
    cosines = random.uniform(-1, 1, (2, 3, 8, 16)).astype(np.float32)
    # Rounding takes products of unit vectors past 1.
    cosines[0, 0, 0, :6] = [1, -1, 1 + 1e-6, -1 - 1e-6, 0, -1e-9]
    masked = random.random(cosines.shape) < 0.2
    masked[0, 0, 0, :6] = False
    logits = np.where(masked, -np.inf, np.float32(scale) * cosines)

    @jax.jit
    def there_and_back(logits, scale):
        of = logit_cache.plan_cache(3, keep=2, lend=1)
        held = logit_cache.allocate(of, (2, 16, 8), 8)
        places = [(part, a, b) for a in range(2) for part in of for b in part.places]
        for part, a, b in places:
            held = logit_cache.store(held, part, a, b, logits[a, b], scale)
        return held, jnp.stack([logit_cache.load(held, *place, scale) for place in places]).reshape(logits.shape)

    held, back = there_and_back(logits, scale)
    assert np.array_equal(np.isneginf(back), masked)
    # Half a step, and float32's rounding of the results.
    np.testing.assert_allclose(
        back[~masked], scale * np.clip(cosines[~masked].astype(float), -1, 1), rtol=2e-7, atol=scale * 2.0**-24 * 1.01
    )
    np.testing.assert_array_equal(back[:, 2], logits[:, 2])
    assert held.high16.nbytes + held.low8.nbytes == logit_cache.BYTES * logits[:, :2].size


@pytest.mark.parametrize(
    ("keep", "lend", "expected"),
    [
        (9, 2, [(0, 5, "quantized")]),
        (3, 4, [(0, 3, "quantized"), (3, 5, "grad_buffer")]),
        (1, 2, [(0, 1, "quantized"), (1, 3, "grad_buffer"), (3, 5, "recompute")]),
        (0, 0, [(0, 5, "recompute")]),
    ],
)
def test_what_is_not_kept_is_lent_memory_as_far_as_it_goes(keep, lend, expected):
    assert [
        (part.places.start, part.places.stop, part.storage) for part in logit_cache.plan_cache(5, keep, lend)
    ] == expected
