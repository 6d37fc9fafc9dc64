"""Axis G is over the mesh axes data and fsdp; weights are split by their logical names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jfe_jax.config import MeshConfig, ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.models.abstract_model import blueprint, random_parameters, require_split, shardings_of, unsplit
from jfe_jax.parallel import sharding
from tests.support import tiny_training as tiny

MESHES = [(1, 8, 1), (2, 2, 2)]


def mesh(data: int, fsdp: int, tensor: int):
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def test_minus_one_takes_what_is_left():
    assert dict(mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.group_count(mesh(-1, 2, 2)) == 4


def test_surplus_devices_stay_idle():
    assert mesh(2, 1, 1).size == 2


@pytest.mark.parametrize(
    "sizes, says",
    [
        ((3, 3, 1), "data=3 x fsdp=3 x tensor=1 needs 9 devices; there are 8"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "axes are 1 or more"),
        ((-1, 3, 1), "8 devices do not divide by 3"),
    ],
)
def test_impossible_meshes_are_refused(sizes, says):
    with pytest.raises(UserError, match=says):
        mesh(*sizes)


def test_weights_are_split_by_name():
    assert sharding.parameter_spec(("layers", "embed", "mlp"), (2, 32, 64), mesh(2, 2, 2)) == P(None, "fsdp", "tensor")


def test_vectors_are_not_split_over_fsdp():
    assert sharding.parameter_spec(("layers", "embed"), (2, 32), mesh(2, 2, 2)) == P(None, None)
    assert sharding.parameter_spec(("mlp",), (32,), mesh(2, 2, 2)) == P("tensor")


def test_colliding_axes_are_refused():
    with pytest.raises(ValueError, match="fall on mesh axis 'tensor'"):
        sharding.parameter_spec(("mlp", "heads"), (8, 8), mesh(2, 2, 2))


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="no sharding rule for axis 'width'"):
        sharding.parameter_spec(("width",), (8,), mesh(2, 2, 2))


def test_indivisible_axis_is_refused_and_kv_heads_stay_whole():
    with pytest.raises(UserError, match=r"mesh.fsdp=8 does not divide w's axis 'embed' of 12"):
        sharding.parameter_spec(("embed", None), (12, 3), mesh(1, 8, 1), "w")
    assert sharding.parameter_spec(("embed", "kv_heads", "head_dim"), (32, 1, 8), mesh(2, 2, 2)) == P(
        "fsdp", None, None
    )


@pytest.fixture(scope="module")
def reference():
    return jax.jit(lambda: random_parameters(tiny.config().model, 0))()


@pytest.mark.parametrize("sizes", MESHES)
def test_initialisation_is_in_place_and_the_same_on_every_mesh(sizes, reference):
    config = tiny.config().model
    there = mesh(*sizes)
    shardings = shardings_of(blueprint(config, there).abstract)
    params = sharding.init_sharded(lambda: random_parameters(config, 0), shardings)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    down = params["tower"]["blocks"]["down_fd"]
    _, fsdp, tensor = sizes
    assert down.addressable_shards[0].data.shape == (1, 64 // tensor, 32 // fsdp)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), params, reference)


def test_the_true_geometry_is_split_nearly_whole():
    plan = blueprint(ModelConfig(), mesh(1, 8, 1))
    leaves = jax.tree.leaves(plan.abstract)
    total = sum(leaf.size for leaf in leaves)
    assert total > 2.9e9
    whole = sum(leaf.size for leaf in leaves if leaf.sharding.is_fully_replicated)
    assert whole < 0.02 * total


def test_what_lies_whole_is_listed_and_too_much_is_refused():
    there = mesh(1, 8, 1)
    plan = blueprint(ModelConfig(), there)
    names = {name for name, _ in unsplit(plan.abstract, there)}
    assert "tower.norm.scale_d" in names and "embedder.table_vd" not in names
    require_split(plan, there)
    by_accident = jax.tree.map(lambda leaf: leaf, plan.abstract)
    table = by_accident["embedder"]["table_vd"]
    whole = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=sharding.replicated(there))
    by_accident["embedder"]["table_vd"] = whole
    with pytest.raises(UserError, match=r"18\.\d% of the parameters' .* than 2%: embedder.table_vd \(2010 MiB"):
        require_split(plan._replace(abstract=by_accident), there)
    # Without anything to split over there is no accident.
    assert unsplit(blueprint(tiny.config().model, mesh(8, 1, 1)).abstract, mesh(8, 1, 1)) == []


def test_optimizer_state_lies_as_its_parameters():
    there = mesh(1, 8, 1)
    plan = blueprint(tiny.config().model, there)
    moments = {"adam": ({"model": plan.abstract}, {"count": jax.ShapeDtypeStruct((), jnp.int32)})}
    found = sharding.optimizer_state_shardings(moments, {"model": shardings_of(plan.abstract)}, there)
    assert found["adam"][0]["model"] == shardings_of(plan.abstract)
    assert found["adam"][1]["count"].is_fully_replicated


def test_constrain_needs_no_mesh_and_uses_one():
    x = jnp.ones((4, 2, 8))
    assert sharding.constrain(x, ("group", None, "mlp")) is x
    with jax.set_mesh(mesh(2, 2, 2)):
        y = jax.jit(lambda x: sharding.constrain(x, ("group", None, "mlp")))(x)
    assert y.sharding.spec == P(("data", "fsdp"), None, "tensor")


def test_constrain_is_nothing_inside_shard_map():
    there = mesh(2, 2, 2)
    with jax.set_mesh(there):
        f = jax.shard_map(lambda x: sharding.constrain(x, ("group", "mlp")), in_specs=P("data"), out_specs=P("data"))
        np.testing.assert_array_equal(jax.jit(f)(jnp.ones((4, 8))), np.ones((4, 8)))


def test_batches_are_split_by_group():
    there = mesh(2, 2, 2)
    batch = sharding.put_batch(tiny.batch(tiny.config(), 4), there)
    assert batch.packed.tokens.sharding.spec == P(("data", "fsdp"))
    assert batch.packed.tokens.addressable_shards[0].data.shape[0] == 1
