"""Gradients that are written out, against those that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.models.layers import matmul

PAIRS = {
    # A weight's gradient is computed the one way or the other, by which side is larger.
    "wide": (matmul.matmul, lambda x, w: x @ w, ((2, 5, 12), (12, 3))),
    "narrow": (matmul.matmul, lambda x, w: x @ w, ((2, 5, 3), (3, 12))),
    "scores": (matmul.scores, lambda q, k: q @ k.mT, ((2, 1, 9, 4), (2, 1, 6, 4))),
    "weighted_mean": (
        matmul.weighted_mean,
        lambda logits, value: jax.nn.softmax(logits, axis=-1) @ value,
        ((2, 1, 9, 6), (2, 1, 6, 4)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_the_derived_ones(name):
    own, plain, shapes = PAIRS[name]
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    if name == "weighted_mean":
        # Padding's keys have no weight, and a large logit does not overflow.
        args[0] = (args[0] * 100).at[..., -2:].set(-1e30)
    cotangent = jnp.asarray(rng.normal(size=plain(*args).shape), jnp.float32)
    found, expected = (jax.jit(lambda *a, f=f: jax.vjp(f, *a)[1](cotangent))(*args) for f in (own, plain))
    np.testing.assert_allclose(own(*args), plain(*args), rtol=1e-5, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_logit_that_is_no_number_is_told():
    logits, value = jnp.zeros((2, 9, 6)).at[0, 4, 1].set(jnp.nan), jnp.ones((2, 6, 4))
    bad = np.isnan(jax.jit(matmul.weighted_mean)(logits, value)).all(-1)
    assert bad.sum() == 1 and bad[0, 4]
