"""The compiled step on meshes of 8 fake devices against one device."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jfe_jax.config import DataConfig, LossConfig, OptimizerConfig
from jfe_jax.train import train_state as states
from jfe_jax.train.train_step import make_eval_step, make_train_step
from tests.support import tiny_training as tiny
from tests.support.stepping import batch, gradients, training

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def config():
    return tiny.config(data=DataConfig(pairs=16, hard_negatives=1, rows=16, row_tokens=48, image_slots=32))


@pytest.fixture(scope="module")
def alone(config):
    return gradients(training(config))


@pytest.mark.parametrize("sizes", MESHES)
def test_loss_and_gradients_equal_those_of_one_device(config, alone, sizes):
    spread = gradients(training(config, sizes))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), alone, spread)


def test_with_bins_too(config, alone):
    # Half of the room is left over by rows of 48 for items of at most 9 tokens.
    data = replace(config.data, row_tokens=24, bins={12: 32, 24: 8})
    spread = gradients(training(replace(config, data=data), (2, 2, 2)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), alone, spread)


def test_the_step_compiles_once_learns_and_reuses_its_state(config):
    there = training(config, (2, 2, 2))
    step, state = make_train_step(there), states.init_train_state(there)
    first = state
    seen = []
    for _ in range(8):
        state, metrics = step(state, batch(there))
        seen.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    assert seen[-1] < seen[0]
    assert state.step == 8
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert jax.tree.map(lambda x: x.sharding, state.params) == jax.tree.map(lambda x: x.sharding, there.abstract.params)


def test_temperature_stops_at_its_minimum_and_validation_is_the_loss_before_the_update(config):
    there = training(
        replace(
            config,
            loss=LossConfig(temperature=0.05, min_temperature=0.0499),
            optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=0, steps=9, schedule="constant"),
        )
    )
    step, state = make_train_step(there), states.init_train_state(there)
    valued = jax.device_get(make_eval_step(there)(state, batch(there)))
    state, stepped = step(state, batch(there))
    np.testing.assert_allclose(valued["loss"], stepped["loss"], rtol=1e-6)
    np.testing.assert_allclose(valued["temperature"], 0.05, rtol=1e-6)
    for _ in range(5):
        state, metrics = step(state, batch(there))
        assert metrics["temperature"] >= 0.0499 * (1 - 1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(config):
    there = training(config, (2, 2, 2))
    step, state = make_train_step(there), states.init_train_state(there)
    state, metrics = step(state, batch(there))
    good = jax.device_get(state._replace(step=0, skipped=0))
    rate = float(metrics["learning_rate"])
    # A temperature that is not a number makes the loss one, and every gradient.
    temperature = state.loss["log_inverse_temperature"]
    nan = jax.device_put(np.float32(np.nan), temperature.sharding)
    for count in (1, 2):
        state, metrics = step(state._replace(loss={"log_inverse_temperature": nan}), batch(there, seed=count))
        assert not np.isfinite(metrics["loss"])
        assert (metrics["skipped"], metrics["skipped_in_row"]) == (count, count)
        nan = state.loss["log_inverse_temperature"]
    assert state.step == 3 and np.isnan(nan)
    state = state._replace(loss={"log_inverse_temperature": jax.device_put(np.float32(3.0), nan.sharding)})
    kept = jax.device_get(state._replace(step=0, skipped=0, loss=good.loss))
    jax.tree.map(np.testing.assert_array_equal, kept, good)
    state, metrics = step(state, batch(there, seed=3))
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (2, 0)
    # The schedule went on by one step, not by three.
    assert float(metrics["learning_rate"]) == 2 * rate
    assert list(state.skipped) == [2, 0]
