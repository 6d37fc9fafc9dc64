"""The step on a GPU: every way to attend and to recompute gives the loss and the gradients of float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.config import OptimizerConfig, TextConfig, VisionConfig
from jfe_jax.train import train_state as states
from jfe_jax.train.train_step import make_train_step
from tests.support import tiny_training as tiny
from tests.support.stepping import batch, gradients, training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def config():
    small = tiny.config(optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, steps=50))
    text = TextConfig(
        vocab_size=tiny.VOCABULARY, width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=64
    )
    vision = VisionConfig(image_size=8, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2)
    return replace(small, model=replace(small.model, text=text, vision=vision))


@pytest.fixture(scope="module")
def exact(config):
    with jax.default_matmul_precision("highest"):
        return gradients(training(config))


@pytest.mark.parametrize(
    "attention, remat", [("xla", "none"), ("cudnn", "full"), ("cudnn", "up"), ("cudnn", "dots"), ("xla", "offload")]
)
def test_loss_and_gradients_are_those_of_float32(config, exact, attention, remat):
    model = replace(config.model, dtype="bfloat16", attention=attention, remat=remat)
    loss, found = gradients(training(replace(config, model=model)))
    np.testing.assert_allclose(loss, exact[0], rtol=2e-2)
    found, expected = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, exact[1])
    )
    assert found @ expected >= 0.995 * np.linalg.norm(found) * np.linalg.norm(expected)


def test_training_learns_and_compiles_once(config):
    there = training(replace(config, model=replace(config.model, dtype="bfloat16", attention="cudnn")))
    step, state = make_train_step(there), states.init_train_state(there)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch(there))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1 and losses[-1] < 0.8 * losses[0]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
