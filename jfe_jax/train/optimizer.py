"""AdamW over the parameters that are trained, decaying the ones that are matrices."""

from typing import Any

import jax
import optax

from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.sharding import path_name
from jfe_jax.train import losses
from jfe_jax.train.schedules import learning_rate

# Weights that multiply nothing wide: decay would pull gains and offsets to zero without regularising anything.
UNDECAYED = ("bias", "norm", "scale")


def make_optimizer(config: Config, axes: Any) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW; frozen parameters get no moments and no update.

    It works on the tree {"model": parameters, "loss": loss parameters}.

    Args:
      config: `optimizer` and `loss.learn_temperature` count.
      axes: logical axis names of the model's parameters, a tuple at each leaf.

    Raises:
      UserError: `optimizer.freeze` names no group of parameters.
    """
    settings = config.optimizer
    adamw = optax.adamw(
        learning_rate(settings),
        settings.b1,
        settings.b2,
        weight_decay=settings.weight_decay,
        mask={"model": decay_mask(axes), "loss": jax.tree.map(lambda _: False, losses.learnt(config.loss))},
    )
    labels = jax.tree.map(lambda trained: "trained" if trained else "frozen", trained_mask(config, axes))
    clipped = optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw) if settings.clip_norm else adamw
    return optax.partition({"trained": clipped, "frozen": optax.set_to_zero()}, labels)


def trained_mask(config: Config, axes: Any) -> dict[str, Any]:
    """True where a leaf of the optimizer's tree moves.

    Raises:
      UserError: `optimizer.freeze` names no group of parameters.
    """
    frozen = frozen_mask(axes, config.optimizer.freeze)
    return {
        "model": jax.tree.map(lambda stays: not stays, frozen),
        "loss": losses.learnt(config.loss),
    }


def decay_mask(axes: Any) -> Any:
    """True where weight decay applies: weights with two dimensions or more besides `layers`, no norm and no bias."""

    def decays(path: Any, names: tuple[str | None, ...]) -> bool:
        name = path_name(path).lower()
        matrix = len([axis for axis in names if axis != "layers"]) > 1
        return matrix and not any(part in name.rsplit(".", 1)[-1] for part in UNDECAYED)

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=_is_names)


def frozen_mask(axes: Any, groups: tuple[str, ...]) -> Any:
    """True where a parameter lies in one of `groups`: a key of its path, or several, "vision" or "tower.norm".

    Raises:
      UserError: a group holds no parameter.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(axes, is_leaf=_is_names)[0]]
    for group in groups:
        if not any(_within(path, group) for path in paths):
            known = sorted({part for path in paths for part in path.split(".")})
            raise UserError(f"optimizer.freeze: no parameters under {group!r}; there are {', '.join(known)}")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(_within(path_name(path), group) for group in groups), axes, is_leaf=_is_names
    )


def _within(path: str, group: str) -> bool:
    return f".{group}." in f".{path}."


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple)
