"""Weights gathered where they are used: the same numbers as on one device, and what travels between devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jfe_jax.config import MeshConfig
from jfe_jax.parallel import fsdp, sharding
from jfe_jax.plan.collectives import find_collectives
from jfe_jax.plan.hlo import HloModule
from jfe_jax.train import train_state as states
from jfe_jax.train.train_step import make_train_step
from tests.support import tiny_training as tiny

VOCABULARY, WIDTH = 40, 16
AXES = {"table": ("vocab", "embed"), "kernel": ("embed", "mlp"), "bias": ("mlp",)}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def inputs():
    rng = np.random.default_rng(0)
    params = {
        "table": rng.normal(size=(VOCABULARY, WIDTH)),
        "kernel": rng.normal(size=(WIDTH, 8)),
        "bias": rng.normal(size=8),
    }
    # Few ids for many tokens: most rows of the table get several gradients; 99 is past its end.
    ids = rng.integers(0, 7, (4, 2, 9))
    ids[0, 0, 0] = 99
    return jax.tree.map(lambda x: x.astype(np.float32), params), ids.astype(np.int32)


def model(params, ids):
    if fsdp.in_fsdp_shard_map():
        x = fsdp.sharded_embedding_lookup(params["table"], ids, jnp.float32)
        kernel, bias = (
            fsdp.all_gather_param(params[name], AXES[name], jnp.float32, name) for name in ("kernel", "bias")
        )
    else:
        x, kernel, bias = jnp.take(params["table"], ids, axis=0, mode="clip"), params["kernel"], params["bias"]
    return jnp.tanh(x @ kernel + bias)


def test_values_and_gradients_equal_those_of_one_device(mesh):
    params, ids = inputs()
    weights = np.random.default_rng(1).normal(size=(4, 2, 9, 8)).astype(np.float32)

    def loss(params, ids):
        assert fsdp.uses_batch_axes() == bool(jax.sharding.get_abstract_mesh().axis_names)
        y = fsdp.fsdp_shard_map(model, params, AXES, ids) if fsdp.uses_batch_axes() else model(params, ids)
        return jnp.sum(y * weights)

    alone = jax.jit(jax.value_and_grad(loss))(params, ids)
    with jax.set_mesh(mesh):
        spread = jax.jit(jax.value_and_grad(loss))(params, ids)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), alone, spread)
    assert np.count_nonzero(np.abs(alone[1]["table"]).sum(axis=1)) == 8


@pytest.mark.parametrize("shape, axes", [((36, 2, 3), ("embed", "heads", "head_dim")), ((4, 36), ("mlp", "embed"))])
def test_gradients_whose_shares_fill_no_tile_are_the_same(mesh, shape, axes):
    rng = np.random.default_rng(2)
    weight, weights = rng.normal(size=shape).astype(np.float32), rng.normal(size=(4, *shape)).astype(np.float32)

    def apply(weight, weights):
        whole = fsdp.all_gather_param(weight, axes, jnp.float32, "weight") if fsdp.in_fsdp_shard_map() else weight
        return jnp.sin(whole) * weights

    alone = jax.grad(lambda weight: jnp.sum(apply(weight, weights)))(weight)
    with jax.set_mesh(mesh):
        spread = jax.jit(jax.grad(lambda weight: jnp.sum(fsdp.fsdp_shard_map(apply, weight, axes, weights))))(weight)
    np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-6)


def test_gradients_are_summed_in_float32_though_weights_are_gathered_in_bfloat16(mesh):
    def loss(kernel, x):
        whole = fsdp.all_gather_param(kernel, AXES["kernel"], jnp.bfloat16, "kernel")
        return jnp.sum((x.astype(jnp.bfloat16) @ whole).astype(jnp.float32) ** 2)[None]

    def summed(kernel, x):
        specs = {"in_specs": (P("fsdp"), P(sharding.BATCH_AXES)), "out_specs": P(sharding.BATCH_AXES)}
        return jnp.sum(jax.shard_map(loss, **specs, axis_names=frozenset(sharding.BATCH_AXES))(kernel, x))

    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(jax.grad(summed))(jnp.ones((16, 8)), jnp.ones((4, 16))))
    assert "reduce_scatter" in text and "all_gather" in text
    scattered = next(line for line in text.splitlines() if "= reduce_scatter" in line)
    gathered = next(line for line in text.splitlines() if "= all_gather" in line)
    assert ":f32[" in scattered and ":bf16[" in gathered


def test_a_step_moves_tokens_not_the_table():
    """What the compiled step sends: no array as large as the table, gradients of matrices scattered before summed."""
    config = tiny.config()
    # A table larger than everything else, and no two weights of one shape.
    text = replace(config.model.text, vocab_size=512, mlp_dim=96)
    config = replace(config, model=replace(config.model, text=text))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    training = states.make_train_setup(config, mesh)
    batch = sharding.put_batch(tiny.batch(config, 8), mesh)
    moved = find_collectives(HloModule(make_train_step(training).lower(training.abstract, batch).compile().as_text()))
    assert max(item.bytes for item in moved) < text.vocab_size * text.width * 4
    assert [item.kind for item in moved if item.what.startswith("table") and item.array.endswith(",8]")] == [
        "all-to-all",
        "all-to-all",
    ]

    def kinds(array):
        return {item.kind for item in moved if item.array == array}

    # Of the table's gradient, each device's columns are summed over `data`.
    assert kinds(f"f32[{text.vocab_size},{text.width // 4}]") == {"all-reduce"}
    assert kinds(f"f32[{text.mlp_dim},{text.width}]") == {"all-gather", "reduce-scatter"}
    assert kinds(f"f32[{text.mlp_dim},{text.width // 4}]") == {"all-reduce"}
