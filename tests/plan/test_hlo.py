"""What is read from a compiled program, against what can be counted by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jfe_jax.config import MeshConfig
from jfe_jax.parallel import sharding
from jfe_jax.plan.collectives import find_collectives
from jfe_jax.plan.hlo import HloModule
from jfe_jax.plan.hlo_costs import count_hlo_costs

LAYERS, TOKENS, WIDTH = 5, 32, 16


@pytest.fixture(scope="module")
def program():
    """A stack of weights over 4 devices, gathered layer by layer in a loop; backward scattered, then summed over 2."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))

    def loss(stack, x):
        def layer(x, share):
            w = jax.lax.all_gather(jax.lax.pcast(share, "data", to="varying"), "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(layer, x, stack)
        return jax.lax.psum(jnp.sum(x), ("data", "fsdp"))

    step = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(P(None, "fsdp"), P(("data", "fsdp"))), out_specs=P(None, "fsdp")
    )
    shapes = (
        jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((8 * TOKENS, WIDTH), jnp.float32),
    )
    return HloModule(jax.jit(step).lower(*shapes).compile().as_text())


def test_collectives_count_as_often_as_their_loop_runs(program):
    found = {(item.kind, item.array): item for item in find_collectives(program) if item.bytes > 100}
    weight, share = f"f32[{WIDTH},{WIDTH}]", f"f32[{WIDTH // 4},{WIDTH}]"
    gathered, scattered = found["all-gather", weight], found["reduce-scatter", weight]
    # Without recomputing, the gathered weights are kept for the backward pass.
    assert gathered.count == scattered.count == LAYERS
    assert gathered.bytes == scattered.bytes == LAYERS * WIDTH * WIDTH * 4
    assert gathered.sent == gathered.bytes * 3 / 4
    assert sorted(gathered.group) == [0, 1, 2, 3]
    # The sum over `data` is of shares: in the loop, or once for the whole stack behind it.
    summed = [item for (kind, _), item in found.items() if kind == "all-reduce"]
    assert sum(item.bytes for item in summed) == LAYERS * WIDTH * WIDTH // 4 * 4
    assert all(sorted(item.group) == [0, 4] for item in summed), share
    assert sum(item.sent for item in summed) == sum(item.bytes for item in summed)


def test_flops_count_as_often_as_their_loop_runs(program):
    # x @ w forward; its gradients to w, and to x in all layers but the first, which XLA may compute all the same.
    product = 2 * TOKENS * WIDTH * WIDTH
    assert count_hlo_costs(program).flops in ((3 * LAYERS - 1) * product, 3 * LAYERS * product)


# As libtpu writes it: an all-reduce-scatter in a fusion, an all-gather spread over two, a loop from 1 to 7.
TPU = (Path(__file__).parent / "tpu.hlo.txt").read_text()


def test_fused_collectives_are_what_they_are_and_asynchronous_ones_count_once():
    found = {item.kind: item for item in find_collectives(HloModule(TPU))}
    assert set(found) == {"reduce-scatter", "all-gather"}
    assert (found["reduce-scatter"].bytes, found["reduce-scatter"].sent) == (64 * 32 * 4, 64 * 32 * 3)
    gathered = found["all-gather"]
    assert (gathered.count, gathered.bytes) == (6, 6 * 64 * 32 * 2)
    assert (gathered.what, gathered.group) == ("tower/up_df", tuple(range(8)))


def test_batched_products_written_as_convolutions_count_each_batch_once():
    done = count_hlo_costs(HloModule(TPU))
    assert done.flops == 6 * 2 * 24 * 128 * 96 * 64
    # On-chip operands are no traffic.
    product = (24 * 96 * 64 + 24 * 128 * 96 + 8 * 32) * 2
    assert done.bytes > 6 * product
    assert done.bytes < 6 * (product + 24 * 128 * 64 * 2)


def test_transposed_groups_are_read():
    text = TPU.replace("replica_groups=[1,8]<=[8]", "replica_groups=[2,4]<=[4,2]T(1,0)")
    found = next(item for item in find_collectives(HloModule(text)) if item.kind == "all-gather")
    np.testing.assert_array_equal(found.group, [0, 2, 4, 6])


def test_groups_along_named_axes_are_read():
    def group(axes: str) -> tuple[int, ...]:
        text = TPU.replace("replica_groups=[1,8]<=[8]", f"replica_groups=mesh['a'=2,'b'=2,'c'=2] {{{axes}}}")
        return next(item for item in find_collectives(HloModule(text)) if item.kind == "all-gather").group

    assert group("'b'") == (0, 2)
    assert group("'a','c'") == (0, 1, 4, 5)
    with pytest.raises(ValueError, match="unsupported replica groups"):
        group("'a':(1)2")


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="bound"):
        list(
            HloModule(
                TPU.replace("%limit = s32[]{:T(128)} constant(7)", "%limit = s32[]{:T(128)} custom-call()")
            ).runs()
        )
