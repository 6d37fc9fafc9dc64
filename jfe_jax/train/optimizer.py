"""The optimizer over the parameters that are trained: one rule, decay for matrices, learning rates by group."""

from typing import Any

import jax
import optax

from jfe_jax.config import Config, LoraConfig
from jfe_jax.errors import UserError
from jfe_jax.losses import contrastive
from jfe_jax.models import lora
from jfe_jax.parallel.sharding import path_name
from jfe_jax.train.schedules import learning_rate
from jfe_jax.train.update_rules import scale_by_optimizer
from jfe_jax.utils.pytrees import flatten

# Weights that multiply nothing wide: decay would pull gains and offsets to zero without regularising anything.
UNDECAYED = ("bias", "norm", "scale")


def make_optimizer(config: Config, axes: Any) -> optax.GradientTransformation:
    """Clips by the global norm, then the rule, decay and learning rate; frozen parameters get no moments and no update.

    It works on the tree {"model": parameters, "loss": loss parameters}.

    Args:
      config: `optimizer` and what `loss` learns count.
      axes: logical axis names of the model's parameters, a tuple at each leaf.

    Raises:
      UserError: `optimizer.freeze` or `optimizer.learning_rate_factors` names no group of parameters.
    """
    settings = config.optimizer
    loss = contrastive.trainable_mask(config.loss)
    names = {"model": axes, "loss": jax.tree.map(lambda _: (), loss)}
    matrices = {"model": decay_mask(axes), "loss": jax.tree.map(lambda _: False, loss)}
    parts = [
        scale_by_optimizer(settings, names, matrices),
        optax.add_decayed_weights(settings.weight_decay, matrices),
        optax.scale_by_learning_rate(learning_rate(settings)),
    ]
    if settings.learning_rate_factors:
        factors = rate_factors(names, settings.learning_rate_factors)
        parts.append(optax.stateless(lambda updates, _: _scaled(updates, factors)))
    optimizer = optax.chain(*parts)
    if settings.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    labels = jax.tree.map(lambda trained: "trained" if trained else "frozen", trained_mask(config, axes))
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def trained_mask(config: Config, axes: Any) -> dict[str, Any]:
    """True where a leaf of the optimizer's tree moves: with adapters they and `optimizer.train`, else all but `freeze`.

    Raises:
      UserError: `optimizer.freeze` or `optimizer.train` names no group of parameters, or one that cannot be trained.
    """
    settings, adapters = config.optimizer, config.model.lora
    moves = jax.tree.map(lambda stays: not stays, frozen_mask(axes, settings.freeze))
    if adapters.rank:
        chosen = frozen_mask(axes, settings.train, "train")
        _refuse_doubled(chosen, adapters)
        moves = jax.tree_util.tree_map_with_path(
            lambda path, moves, chosen: moves and (chosen or lora.is_adapter(path_name(path))), moves, chosen
        )
    elif settings.train:
        raise UserError("optimizer.train goes with model.lora.rank above 0; without adapters all trains but freeze")
    return {"model": moves, "loss": contrastive.trainable_mask(config.loss)}


def decay_mask(axes: Any) -> Any:
    """True where weight decay applies: weights with two dimensions or more besides `layers`, no norm and no bias."""

    def decays(path: Any, names: tuple[str | None, ...]) -> bool:
        name = path_name(path).lower()
        matrix = len([axis for axis in names if axis != "layers"]) > 1
        return matrix and not any(part in name.rsplit(".", 1)[-1] for part in UNDECAYED)

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=_is_names)


def frozen_mask(axes: Any, groups: tuple[str, ...], key: str = "freeze") -> Any:
    """True where a parameter lies in one of `groups`: a key of its path, or several, "vision" or "tower.norm".

    Raises:
      UserError: a group holds no parameter; `key` of `optimizer` named it.
    """
    _refuse_unknown(axes, groups, key)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(_within(path_name(path), group) for group in groups), axes, is_leaf=_is_names
    )


def rate_factors(names: Any, groups: dict[str, float]) -> Any:
    """The factor of each leaf's learning rate: that of the group that names it with the most keys; 1 of no group.

    Args:
      names: the optimizer's tree, a tuple at each leaf.
      groups: as of `frozen_mask`; "loss" are the loss's own parameters.

    Raises:
      UserError: a group holds no parameter.
    """
    _refuse_unknown(names, tuple(groups), "learning_rate_factors")

    def factor(path: Any, _: Any) -> float:
        own = [group for group in groups if _within(path_name(path), group)]
        return groups[max(own, key=lambda group: group.count("."))] if own else 1.0

    return jax.tree_util.tree_map_with_path(factor, names, is_leaf=_is_names)


def _scaled(updates: Any, factors: Any) -> Any:
    # Groups that are frozen have nothing in `updates`.
    return jax.tree.map(
        lambda factor, update: update if isinstance(update, optax.MaskedNode) else factor * update, factors, updates
    )


def _refuse_unknown(names: Any, groups: tuple[str, ...], key: str) -> None:
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(names, is_leaf=_is_names)[0]]
    for group in groups:
        if not any(_within(path, group) for path in paths):
            known = sorted({part for path in paths for part in path.split(".")})
            raise UserError(f"optimizer.{key}: no parameters under {group!r}; there are {', '.join(known)}")


def _refuse_doubled(chosen: Any, adapters: LoraConfig) -> None:
    flat = flatten(chosen)
    doubled = [kernel.path for kernel in lora.kernels(adapters) if flat[kernel.path]]
    if doubled:
        raise UserError(
            f"optimizer.train: {', '.join(doubled)} would be trained both whole and by an adapter; take it out of "
            "optimizer.train or out of model.lora.targets"
        )


def _within(path: str, group: str) -> bool:
    return f".{group}." in f".{path}."


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple)
