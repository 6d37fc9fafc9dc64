"""What is kept of the logits is as exact as the logits, in three quarters of their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.train import kept


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
        held = kept.room(logits.shape)
        places = [(a, b) for a in range(2) for b in range(3)]
        for place in places:
            held = kept.put(held, place, logits[place], scale)
        return held, jnp.stack([kept.get(held, place, scale) for place in places]).reshape(logits.shape)

    held, back = there_and_back(logits, scale)
    assert np.array_equal(np.isneginf(back), masked)
    # Half a step, and float32's rounding of the results.
    np.testing.assert_allclose(
        back[~masked], scale * np.clip(cosines[~masked].astype(float), -1, 1), rtol=2e-7, atol=scale * 2.0**-24 * 1.01
    )
    assert sum(part.nbytes for part in held) == kept.BYTES * logits.size
