"""A model without its arrays: what initialising, restoring and importing it have in common."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from jfe_jax import sharding
from jfe_jax.config import ModelConfig
from jfe_jax.models import build_model, logical_axes


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
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(abstract)
    axes = logical_axes(shapes)
    return Blueprint(graphdef, sharding.abstract_arrays(shapes, sharding.parameter_shardings(shapes, axes, mesh)), axes)


def random_parameters(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Fresh parameters as a plain dict; the same on every mesh. Call it under `sharding.initialise`."""
    return nnx.to_pure_dict(nnx.split(build_model(config, nnx.Rngs(seed)))[1])


def shardings_of(abstract: Any) -> Any:
    """The sharding of every leaf of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
