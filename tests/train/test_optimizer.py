"""Learning rates by step; which parameters decay, and which stay."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.config import LossConfig, MeshConfig, OptimizerConfig
from jfe_jax.errors import UserError
from jfe_jax.models.abstract_model import blueprint
from jfe_jax.parallel import sharding
from jfe_jax.parallel.sharding import path_name
from jfe_jax.train import train_state as states
from jfe_jax.train.optimizer import decay_mask, make_optimizer
from jfe_jax.train.schedules import learning_rate
from jfe_jax.train.train_step import make_train_step
from tests.support import tiny_training as tiny


def test_warm_up_is_a_line_that_starts_above_zero():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=4, steps=20))
    np.testing.assert_allclose([rate(step) for step in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("schedule, middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_decay_reaches_the_end_fraction(schedule, middle):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, steps=20, schedule=schedule, end_fraction=0.1)
    rate = learning_rate(config)
    np.testing.assert_allclose(rate(12), middle, rtol=1e-6)
    np.testing.assert_allclose(rate(20), 1.0 if schedule == "constant" else 0.1, rtol=1e-6)


def test_wsd_stays_up_until_the_last_fraction():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=4, steps=20, schedule="wsd", decay_fraction=0.25, end_fraction=0.1
    )
    rate = learning_rate(config)
    np.testing.assert_allclose([rate(step) for step in (4, 14, 15)], 1.0)
    np.testing.assert_allclose([rate(step) for step in (16, 20)], [1 - 0.9 / 5, 0.1], rtol=1e-6)


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


def updates(config, gradient=0.0, steps=1):
    """Last update, tree and optimizer's state; the gradient is one number everywhere, or random for None."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 2.0, leaf.dtype), plan().abstract)
    tree = {"model": params, "loss": {"log_inverse_temperature": np.float32(2.0)}}
    optimizer = make_optimizer(config, plan().axes)

    def gradient_of(leaf):
        shape = np.shape(leaf)
        return np.full(shape, gradient, np.float32) if gradient is not None else random.normal(size=shape).astype("f4")

    @jax.jit
    def update(tree, gradients):
        state = optimizer.init(tree)
        for _ in range(steps):
            moved, state = optimizer.update(gradients, state, tree)
        return moved, state

    moved, state = update(tree, jax.tree.map(gradient_of, tree))
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


def test_learning_rates_by_group_and_the_nearest_name_counts():
    factors = {"vision": 0.5, "vision.blocks": 0.1, "loss": 3.0}
    settings = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    config = tiny.config(optimizer=replace(settings, learning_rate_factors=factors, freeze=("projector",)))
    moved, _, _ = updates(config, gradient=1.0)
    plain, _, _ = updates(tiny.config(optimizer=settings), gradient=1.0)

    def ratio(*keys):
        one, other = moved["model"], plain["model"]
        for key in keys:
            one, other = one[key], other[key]
        return np.asarray(one / other).ravel()[0]

    np.testing.assert_allclose(ratio("vision", "norm", "scale_d"), 0.5, rtol=1e-5)
    np.testing.assert_allclose(ratio("vision", "blocks", "up_df"), 0.1, rtol=1e-5)
    np.testing.assert_allclose(ratio("tower", "norm", "scale_d"), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        moved["loss"]["log_inverse_temperature"], 3 * plain["loss"]["log_inverse_temperature"], rtol=1e-5
    )
    assert not moved["model"]["projector"]["kernel_cd"].any()
    with pytest.raises(UserError, match=r"learning_rate_factors: no parameters under 'visoin'; there are .*vision"):
        make_optimizer(tiny.config(optimizer=OptimizerConfig(learning_rate_factors={"visoin": 1.0})), plan().axes)


def test_muon_moves_matrices_along_orthogonal_ones_of_adams_size():
    settings = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0)
    moved, _, state = updates(tiny.config(optimizer=replace(settings, clip_norm=0.0)), gradient=None)
    blocks = moved["model"]["tower"]["blocks"]
    for matrix in (
        blocks["down_fd"][0],
        np.asarray(blocks["attention"]["query_dnh"][0]).reshape(32, 32),
        np.asarray(blocks["attention"]["out_nhd"][0]).reshape(32, 32),
        np.asarray(moved["model"]["vision"]["patch_yxcd"]).reshape(48, 16),
    ):
        singular = np.linalg.svd(np.asarray(matrix), compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
        # Five Newton-Schulz steps bring them between 0.7 and 1.2 (Jordan et al. 2024).
        assert singular.min() > 0.6 and singular.max() < 1.25
    # The table, a bias and the temperature go Adam's way: its first step is the sign of the gradient.
    for leaf in (moved["model"]["embedder"]["table_vd"], moved["model"]["projector"]["bias_d"]):
        np.testing.assert_allclose(np.abs(leaf), 1.0, rtol=1e-3)
    kept = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert not any("nu" in path.split(".") and "down_fd" in path for path in kept)
    assert any("nu" in path.split(".") and "table_vd" in path for path in kept)


def test_adafactor_keeps_rows_and_columns():
    text = replace(tiny.config().model.text, width=128, mlp_dim=256)
    model = replace(tiny.config().model, text=text)
    there = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = tiny.config(model=model, optimizer=OptimizerConfig(name="adafactor", b1=0.0))
    training = states.make_train_setup(config, there)
    shapes = {
        path_name(path).partition("model.")[2]: leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(training.abstract.optimizer)[0]
        if "v_row" in path_name(path)
    }
    assert shapes["tower.blocks.down_fd"] == (1, 128)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(training.abstract.optimizer))
    assert numbers < 0.4 * sum(leaf.size for leaf in jax.tree.leaves(training.abstract.params))


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_rules_learn_with_moments_in_bfloat16_on_a_mesh(name):
    there = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    settings = OptimizerConfig(
        name=name,
        learning_rate=1e-2,
        warmup_steps=0,
        first_moment_dtype="bfloat16",
        second_moment_dtype="bfloat16",
        freeze=("vision",),
    )
    training = states.make_train_setup(tiny.config(optimizer=settings), there)
    narrow = [leaf.dtype for leaf in jax.tree.leaves(training.abstract.optimizer) if leaf.dtype == jnp.bfloat16]
    assert narrow
    step, state = make_train_step(training), states.init_train_state(training)
    batch = sharding.put_batch(tiny.batch(training.config, 4), there)
    seen = []
    for _ in range(4):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] - 0.05
    assert [x.dtype for x in jax.tree.leaves(state.optimizer)] == [
        x.dtype for x in jax.tree.leaves(training.abstract.optimizer)
    ]


def test_moments_in_bfloat16_are_the_float32_ones_rounded():
    settings = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant")
    narrow = replace(settings, first_moment_dtype="bfloat16", second_moment_dtype="bfloat16")
    (one, _, wide), (other, _, state) = (
        updates(tiny.config(optimizer=each), gradient=None, steps=2) for each in (settings, narrow)
    )
    # The second step sees moments that were rounded once.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.03, atol=1e-6), one, other)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(each)) for each in (wide, state)]
    assert sizes[1] < 0.51 * sizes[0]
