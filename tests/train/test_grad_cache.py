"""Gradients in chunks against the gradients of the whole batch. Axes: K chunks, G groups."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.config import DataConfig, LossConfig, MeshConfig, OptimizerConfig
from jfe_jax.parallel import sharding
from jfe_jax.train import grad_cache
from jfe_jax.train import train_state as states
from jfe_jax.train.optimizer import trained_mask
from jfe_jax.train.train_step import gradients, make_eval_step, make_train_step
from tests.support import tiny_training as tiny

CHUNKS = 2
DATA = DataConfig(pairs=16, hard_negatives=1, rows=16, row_tokens=64, image_slots=48)


def training(chunks, sizes=(1, 1, 1), data=DATA):
    config = tiny.config(
        data=data, loss=LossConfig(grad_cache_chunks=chunks), optimizer=OptimizerConfig(freeze=("vision",))
    )
    return states.make_train_setup(
        config, sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    )


def compiled(there, groups):
    """(jitted gradients, arguments) for the pairs laid out in so many groups, whatever the mesh."""
    state = states.init_train_state(there)
    batch = sharding.put_batch(tiny.batch(there.config, groups), there.mesh, there.config.loss.grad_cache_chunks)
    trained = trained_mask(there.config, there.model.axes)
    tree = states.trainable(state.params, state.loss)
    return jax.jit(lambda tree, batch: gradients(there, tree, batch, trained)), (tree, batch)


def computed(there, groups):
    function, arguments = compiled(there, groups)
    with jax.set_mesh(there.mesh):
        return jax.device_get(function(*arguments))


@pytest.fixture(scope="module")
def plain():
    """Gradients and metrics of all 16 pairs at once, on one device."""
    return computed(training(1), 8)


@pytest.mark.parametrize("sizes, bins", [((1, 1, 1), {}), ((2, 2, 1), {}), ((1, 2, 4), {}), ((2, 2, 1), {16: 64})])
def test_chunks_give_the_gradients_of_the_whole_batch(plain, sizes, bins):
    there = training(CHUNKS, sizes, replace(DATA, bins=bins))
    grads, metrics = computed(there, 8)
    expected, plain_metrics = plain
    assert grads["model"]["vision"]["norm"]["scale_d"] is None
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), grads, expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), metrics, plain_metrics)


def test_no_device_holds_a_whole_chunk():
    there = training(CHUNKS, (2, 4, 1))
    tokens = sharding.put_batch(tiny.batch(there.config, 16), there.mesh, CHUNKS).packed.tokens
    assert tokens.shape[:2] == (2, 8)
    assert {shard.data.shape[:2] for shard in tokens.addressable_shards} == {(2, 1)}


def test_memory_is_a_chunks():
    # Twice the pairs in twice the chunks: activations stay as they are, only embeddings and their like are more.
    def temporary(pairs, chunks):
        data = replace(DATA, pairs=pairs, rows=2 * pairs, row_tokens=32, image_slots=3 * pairs)
        config = tiny.config(data=data, loss=LossConfig(grad_cache_chunks=chunks, tile_mib=0.1, keep_mib=0))
        function, arguments = compiled(states.make_train_setup(config, sharding.make_mesh(MeshConfig(data=1))), chunks)
        return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    chunked = temporary(64, 8)
    assert chunked < 1.3 * temporary(32, 4)
    assert temporary(32, 1) > 1.5 * chunked


def test_what_an_encoder_draws_is_drawn_again():
    # Half of the features are dropped; every chunk has a key of its own.
    random = np.random.default_rng(0)
    x, w = random.normal(size=(3, 4, 8)).astype(np.float32), random.normal(size=(8, 6)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 3)

    def encode(w, chunk):
        x, key = chunk
        return jnp.tanh(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0) @ w)

    def loss(scale, embeddings):
        flat = scale * embeddings.reshape(-1, 6)
        return jnp.sum(jax.nn.logsumexp(flat @ flat.T, axis=1)), flat.shape

    def whole(w, scale):
        return loss(scale, jnp.stack([encode(w, (one, key)) for one, key in zip(x, keys, strict=True)]))[0]

    to_w, to_scale, shape = jax.jit(lambda w, s: grad_cache.gradients(encode, loss, w, s, (x, keys)))(w, 0.5)
    expected = jax.grad(whole, argnums=(0, 1))(w, 0.5)
    np.testing.assert_allclose(to_w, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_scale, expected[1], rtol=1e-5)
    assert shape == (12, 6)


def test_the_step_takes_chunks_and_validation_is_its_loss():
    there = training(CHUNKS, (2, 2, 2))
    step, state = make_train_step(there), states.init_train_state(there)
    batch = sharding.put_batch(tiny.batch(there.config, 8), there.mesh, CHUNKS)
    valued = make_eval_step(there)(state, batch)
    seen = []
    for _ in range(4):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    np.testing.assert_allclose(valued["loss"], seen[0], rtol=1e-6)
    assert seen[-1] < seen[0] and step._cache_size() == 1
