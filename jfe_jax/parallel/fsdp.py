"""Each device works on its own groups and holds its own share of every weight, which it gathers when a layer needs it.

Left to the partitioner, a weight's gradient is summed whole over all devices in the compute type and an embedding
table's too. Written out, under `shard_map` over the batch axes with `tensor` left to the partitioner: weights are
gathered in the compute type, their gradients leave as a float32 reduce-scatter over `fsdp` and a sum of shares over
`data`, and token embeddings are exchanged instead of the table (ZeRO: Rajbhandari et al. 2020, section 5).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jfe_jax.parallel.sharding import BATCH_AXES, parameter_spec

_DATA, _FSDP = BATCH_AXES
# Rows of a share that a ring's two directions divide into whole tiles.
_TILE_ROWS = 16


def fsdp_shard_map(function: Callable[[Any, Any], jax.Array], params: Any, axes: Any, batch: Any) -> jax.Array:
    """function(params, batch) with every device on its own groups.

    Args:
      function: receives this device's shards of `params` (see `all_gather_param`) and its groups of `batch`. Returns
        an array whose leading axis is G.
      params: leaves are arrays, split as `sharding.parameter_spec` has it.
      axes: the same tree with a tuple of logical axis names at each leaf.
      batch: leaves have G in front.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def share(leaf: jax.Array, names: Sequence[str | None]) -> P:
        return P(*(axis if axis == _FSDP else None for axis in parameter_spec(names, leaf.shape, mesh)))

    specs = jax.tree.map(share, params, axes)
    return jax.shard_map(
        function, in_specs=(specs, P(BATCH_AXES)), out_specs=P(BATCH_AXES), axis_names=frozenset(BATCH_AXES)
    )(params, batch)


def uses_batch_axes() -> bool:
    """Whether a mesh is in context whose batch axes have several devices: `fsdp_shard_map` is then the way to go."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = all(kinds.get(axis) == AxisType.Auto for axis in BATCH_AXES)
    return auto and any(mesh.shape[axis] > 1 for axis in BATCH_AXES)


def in_fsdp_shard_map() -> bool:
    """Whether the surroundings are those of a function that `fsdp_shard_map` runs."""
    return _FSDP in jax.sharding.get_abstract_mesh().manual_axes


def all_gather_param(
    share: jax.Array, axes: Sequence[str | None], dtype: jnp.dtype, name: str, stacked: bool = False
) -> jax.Array:
    """A weight from the devices' shares of it, inside `fsdp_shard_map`.

    Args:
      share: this device's part of a weight.
      axes: the weight's logical axis names, without "layers".
      dtype: matrices are gathered in it; vectors stay as they are.
      name: what the collectives are called in the compiled program.
      stacked: `share` has an axis L in front.

    Returns:
      The whole weight (split over `tensor` at most). Its gradient is summed over devices in float32.
    """
    names = parameter_spec(axes, (0,) * len(axes), jax.sharding.get_abstract_mesh())
    where = next((place + stacked for place, axis in enumerate(names) if axis == _FSDP), None)
    return _all_gather(share, where, jnp.dtype(dtype) if len(axes) > 1 else share.dtype, name)


def sharded_embedding_lookup(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding table of which this device has some columns [V, D/fsdp], inside `fsdp_shard_map`.

    Every device looks its columns up for the tokens of all devices that share the table with it, then they exchange:
    R·S·D numbers move instead of the table's V·D, forward and back.

    Args:
      ids: int32 [G, R, S]; past the table's end they give its last row.

    Returns:
      [G, R, S, D] in `dtype`.
    """
    with jax.named_scope("table"):
        table = jax.lax.pcast(table, _DATA, to="varying")
        everyone = jax.lax.all_gather(ids, _FSDP)
        columns = jnp.take(table, everyone, axis=0, mode="clip").astype(dtype)
        return jax.lax.all_to_all(columns, _FSDP, split_axis=0, concat_axis=columns.ndim - 1, tiled=True)[0]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(share: jax.Array, where: int | None, dtype: jnp.dtype, name: str) -> jax.Array:
    with jax.named_scope(name):
        share = share.astype(dtype)
        # Where the type says that devices differ, autodiff sums the gradient: here, before it meets the activations.
        if where is None:
            return jax.lax.pcast(share, BATCH_AXES, to="varying")
        return jax.lax.all_gather(jax.lax.pcast(share, _DATA, to="varying"), _FSDP, axis=where, tiled=True)


def _all_gather_forward(
    share: jax.Array, where: int | None, dtype: jnp.dtype, name: str
) -> tuple[jax.Array, jax.Array]:
    return _all_gather(share, where, dtype, name), jnp.zeros((), share.dtype)


def _all_gather_backward(
    where: int | None, dtype: jnp.dtype, name: str, like: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    with jax.named_scope(name):
        gradient = gradient.astype(like.dtype)
        if where is None:
            return (jax.lax.psum(gradient, BATCH_AXES),)
        return (_reduce_scatter(gradient, where),)


def _reduce_scatter(gradient: jax.Array, where: int) -> jax.Array:
    # XLA's TPU compiler scatters sums of matrices whose shares fill its tiles; of others it makes all of the sum on
    # every chip. So: as a matrix, each share padded.
    sizes, n = gradient.shape, jax.lax.axis_size(_FSDP)
    own, before = sizes[where] // n, math.prod(sizes[:where])
    extra = -own % _TILE_ROWS if own > _TILE_ROWS else 0
    padded = jnp.pad(gradient.reshape(before, n, own, -1), [(0, 0), (0, 0), (0, extra), (0, 0)])
    after = padded.shape[-1]
    axis = int(before > 1)
    matrix = padded.reshape(*[before] * (before > 1), n * (own + extra), *[after] * (after > 1))
    share = jax.lax.psum_scatter(matrix, _FSDP, scatter_dimension=axis, tiled=True)
    share = jax.lax.psum(jax.lax.slice_in_dim(share, 0, own, axis=axis), _DATA)
    return share.reshape(*sizes[:where], own, *sizes[where + 1 :])


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)
