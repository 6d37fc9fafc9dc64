"""What training carries from step to step, and how it is made in place on a mesh.

Nothing random is kept: whatever a step draws is a function of the seed and the step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jfe_jax.config import Config
from jfe_jax.losses import contrastive
from jfe_jax.models.abstract_model import Blueprint, blueprint, random_parameters, require_split, shardings_of
from jfe_jax.models.siglip_clip.model import dual_logits
from jfe_jax.parallel import sharding
from jfe_jax.parallel.sharding import path_name
from jfe_jax.train.optimizer import make_optimizer, trained_mask
from jfe_jax.utils import pytrees


class TrainState(NamedTuple):
    """All of it is donated to the step, which returns the next.

    Attributes:
      step: int32 scalar, steps done.
      skipped: int32 [2]; of them, those that changed nothing because something was not finite: all, and the last ones.
      params: the model's parameters as a plain dict.
      loss: the loss's own parameters.
      optimizer: optax's state.
    """

    step: jax.Array
    skipped: jax.Array
    params: dict[str, Any]
    loss: dict[str, jax.Array]
    optimizer: optax.OptState


class TrainSetup(NamedTuple):
    """A config made concrete on a mesh, before any array exists.

    Attributes:
      config: the run's.
      mesh: its devices.
      model: blueprint of the model.
      optimizer: over {"model": params, "loss": loss parameters}.
      abstract: TrainState of ShapeDtypeStructs with their shardings.
      checkpointed_mask: a bool for each parameter: whether checkpoints hold it. With adapters only what is trained.
    """

    config: Config
    mesh: Mesh
    model: Blueprint
    optimizer: optax.GradientTransformation
    abstract: TrainState
    checkpointed_mask: dict[str, Any]


def make_train_setup(config: Config, mesh: Mesh) -> TrainSetup:
    """Raises UserError where config and mesh do not fit, and if too much would lie whole on every device."""
    model = blueprint(config.model, mesh)
    require_split(model, mesh)
    optimizer = make_optimizer(config, model.axes)
    shapes = jax.eval_shape(lambda params: _initial_state(config, optimizer, params), model.abstract)
    rest = sharding.optimizer_state_shardings(shapes._replace(params={}), {"model": shardings_of(model.abstract)}, mesh)
    shardings = rest._replace(params=shardings_of(model.abstract))
    moves = trained_mask(config, model.axes)["model"]
    kept = moves if config.model.lora.rank else jax.tree.map(lambda _: True, moves)
    return TrainSetup(config, mesh, model, optimizer, sharding.abstract_arrays(shapes, shardings), kept)


def init_train_state(training: TrainSetup, params: dict[str, Any] | None = None) -> TrainState:
    """The state before step 0, every array made where it is to lie.

    Args:
      params: parameters on the mesh, which become the state's own; what they lack, or all, is random.
    """
    config, given = training.config, params or {}
    have = pytrees.flatten(given)
    lacking = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) not in have, training.model.abstract)

    def fresh(given: dict[str, Any]) -> TrainState:
        # The numbers of what is given count too: a temperature may come from them.
        whole = pytrees.overlay(random_parameters(config.model, config.seed), given)
        return _initial_state(config, training.optimizer, whole)._replace(params=pytrees.select(whole, lacking))

    shardings = shardings_of(training.abstract)
    shardings = shardings._replace(params=pytrees.select(shardings.params, lacking))
    state = sharding.init_sharded(fresh, shardings, given)
    return state._replace(params=pytrees.overlay(state.params, given))


def trainable(params: dict[str, Any], loss: dict[str, jax.Array]) -> dict[str, Any]:
    """The tree that gradients and optimizer work on."""
    return {"model": params, "loss": loss}


def _initial_state(config: Config, optimizer: optax.GradientTransformation, params: dict[str, Any]) -> TrainState:
    loss = contrastive.initial_parameters(config.loss)
    if not config.loss.temperature:
        own = dual_logits(params)
        loss = contrastive.clamp({name: own.get(name, value) for name, value in loss.items()}, config.loss)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)
    return TrainState(step, skipped, params, loss, optimizer.init(trainable(params, loss)))
