"""A model without its arrays: what initialising, restoring and importing it have in common."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jfe_jax.config import ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.models.layers.blocks import logical_axes
from jfe_jax.models.registry import build_model
from jfe_jax.parallel import sharding

# A run does not start if more than this share of the parameters, and more than so many bytes, lie whole on each device.
UNSPLIT_SHARE, UNSPLIT_BYTES = 0.02, 64 * 2**20


class Blueprint(NamedTuple):
    """What a model is, and where its parameters lie.

    Attributes:
      graphdef: `nnx.merge(graphdef, parameters)` is the model.
      abstract: its parameters as a plain dict of ShapeDtypeStructs that carry their sharding.
      axes: the same dict with a tuple of logical axis names at each leaf.
    """

    graphdef: Any
    abstract: dict[str, Any]
    axes: dict[str, Any]


def blueprint(config: ModelConfig, mesh: Mesh) -> Blueprint:
    """The blueprint of `build_model(config)` on a mesh; no array is made.

    Raises:
      UserError: a size in the config that the mesh does not divide.
    """
    graphdef, shapes = shapes_of(config)
    axes = logical_axes(shapes)
    return Blueprint(graphdef, sharding.abstract_arrays(shapes, sharding.parameter_shardings(shapes, axes, mesh)), axes)


def shapes_of(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Graph of `build_model(config)`, and its parameters as a plain dict of ShapeDtypeStructs that lie nowhere."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(abstract)


def random_parameters(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Fresh parameters as a plain dict; the same on every mesh. Call it under `sharding.initialise`."""
    return nnx.to_pure_dict(nnx.split(build_model(config, nnx.Rngs(seed)))[1])


def shardings_of(abstract: Any) -> Any:
    """The sharding of every leaf of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def unsplit(abstract: Any, mesh: Mesh) -> list[tuple[str, int]]:
    """Name and bytes of every weight that lies whole on each device though the mesh could split it over `fsdp` or
    `tensor`; with one device along both, none."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []

    def whole(spec: PartitionSpec) -> bool:
        return all(mesh.shape[axis] == 1 for axis in spec if axis is not None)

    return [(name, nbytes(leaf)) for name, leaf in named_leaves(abstract) if whole(leaf.sharding.spec)]


def require_split(model: Blueprint, mesh: Mesh) -> None:
    """Refuses weights that every device would hold whole by accident. Adapters may be: they are small.

    Raises:
      UserError: more than 2 % of the bytes lie so, and more than a device would not notice; the largest are named.
    """
    axes = jax.tree_util.tree_flatten_with_path(model.axes, is_leaf=lambda node: isinstance(node, tuple))[0]
    adapters = {sharding.path_name(path) for path, names in axes if "rank" in names}
    whole = [one for one in unsplit(model.abstract, mesh) if one[0] not in adapters]
    whole.sort(key=lambda one: -one[1])
    size, total = sum(size for _, size in whole), sum(nbytes(leaf) for _, leaf in named_leaves(model.abstract))
    if size > max(UNSPLIT_SHARE * total, UNSPLIT_BYTES):
        named = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in whole[:3])
        raise UserError(
            f"{size / total:.1%} of the parameters' bytes would lie whole on every device, more than "
            f"{UNSPLIT_SHARE:.0%}: {named}; give their axes a rule in sharding.PARAMETER_RULES, or choose another mesh"
        )


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Dotted name and leaf, in the order of the tree."""
    return [(sharding.path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def nbytes(leaf: Any) -> int:
    """Bytes of a whole array, concrete or abstract."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
