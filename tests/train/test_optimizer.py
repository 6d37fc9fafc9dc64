"""Learning rates by step; which parameters decay, and which stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax import sharding
from jfe_jax.blueprint import blueprint
from jfe_jax.config import LossConfig, MeshConfig, OptimizerConfig
from jfe_jax.errors import UserError
from jfe_jax.train.optimizer import decay_mask, make_optimizer
from jfe_jax.train.schedules import learning_rate
from tests.train import tiny


def test_warm_up_is_a_line_that_starts_above_zero():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=4, steps=20))
    np.testing.assert_allclose([rate(step) for step in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("schedule, middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_decay_reaches_the_end_fraction(schedule, middle):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, steps=20, schedule=schedule, end_fraction=0.1)
    rate = learning_rate(config)
    np.testing.assert_allclose(rate(12), middle, rtol=1e-6)
    np.testing.assert_allclose(rate(20), 1.0 if schedule == "constant" else 0.1, rtol=1e-6)


def test_no_warm_up():
    assert learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=0, steps=20))(0) == 1.0


@functools.cache
def plan():
    return blueprint(tiny.config().model, sharding.make_mesh(MeshConfig(data=1)))


def test_norms_and_biases_do_not_decay_and_matrices_do():
    mask = decay_mask(plan().axes)
    block, vision = mask["tower"]["blocks"], mask["vision"]["blocks"]
    assert block["down_fd"] and block["attention"]["query_dnh"] and mask["embedder"]["table_vd"]
    assert not block["mlp_norm"]["scale_d"]
    assert not vision["attention"]["query_bias_nh"] and not vision["mlp_norm"]["bias_d"]
    assert not mask["projector"]["bias_d"] and mask["projector"]["kernel_cd"]


def updates(config):
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 2.0, leaf.dtype), plan().abstract)
    tree = {"model": params, "loss": {"log_inverse_temperature": np.float32(2.0)}}
    optimizer = make_optimizer(config, plan().axes)

    @jax.jit
    def update(tree):
        state = optimizer.init(tree)
        return optimizer.update(jax.tree.map(jnp.zeros_like, tree), state, tree)[0], state

    moved, state = update(tree)
    return moved, tree, state


def test_decay_alone_moves_what_decays():
    config = tiny.config(optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5))
    moved, tree, _ = updates(config)
    table = tree["model"]["embedder"]["table_vd"]
    np.testing.assert_allclose(moved["model"]["embedder"]["table_vd"], -0.05 * table, rtol=1e-5, atol=1e-8)
    assert not moved["model"]["vision"]["norm"]["scale_d"].any()
    assert moved["loss"]["log_inverse_temperature"] == 0


def test_frozen_groups_stay_and_have_no_moments():
    frozen = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, freeze=("vision", "tower.norm"))
    moved, _, state = updates(tiny.config(optimizer=frozen, loss=LossConfig(learn_temperature=False)))
    assert not any(x.any() for x in jax.tree.leaves(moved["model"]["vision"]))
    assert moved["model"]["embedder"]["table_vd"].any()
    _, tree, whole = updates(tiny.config())
    count = len(jax.tree.leaves(tree["model"]["vision"])) + len(jax.tree.leaves(tree["model"]["tower"]["norm"])) + 1
    assert len(jax.tree.leaves(whole)) - len(jax.tree.leaves(state)) == 2 * count


def test_freezing_nothing_is_an_error():
    config = tiny.config(optimizer=OptimizerConfig(freeze=("visoin",)))
    with pytest.raises(UserError, match=r"no parameters under 'visoin'; there are .*vision"):
        make_optimizer(config, plan().axes)
