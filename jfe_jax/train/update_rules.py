"""From gradients to a direction to go: the part of an optimizer that has a memory.

Learning rate, weight decay and everything that is the same for all of them is in train/optimizer.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfe_jax.config import OptimizerConfig

# What Muon's updates are scaled to: AdamW's usual root mean square, so that its learning rates serve (Liu et al. 2025,
# "Muon is scalable for LLM training", 2.2).
MUON_RMS = 0.2


def scale_by_optimizer(settings: OptimizerConfig, axes: Any, matrices: Any) -> optax.GradientTransformation:
    """The update rule `settings.name`.

    Args:
      settings: its moments.
      axes: logical axis names of the parameters, a tuple at each leaf.
      matrices: True where a parameter is a product's matrix.
    """
    if settings.name == "adafactor":
        return _adafactor(settings)
    if settings.name == "muon":
        return _muon(settings, axes, matrices)
    return _adam(settings)


def _adam(settings: OptimizerConfig) -> optax.GradientTransformation:
    # optax stores the first moment in any type, the second in the parameters'.
    adam = optax.scale_by_adam(settings.b1, settings.b2, mu_dtype=jnp.dtype(settings.first_moment_dtype))
    if settings.second_moment_dtype == "float32":
        return adam

    def kept(state: Any, dtype: str) -> Any:
        return state._replace(nu=optax.tree.cast(state.nu, jnp.dtype(dtype)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, kept(state, "float32"), params)
        return updates, kept(state, settings.second_moment_dtype)

    return optax.GradientTransformation(lambda params: kept(adam.init(params), settings.second_moment_dtype), update)


def _adafactor(settings: OptimizerConfig) -> optax.GradientTransformation:
    """Shazeer & Stern 2018 without its relative step sizes: rows and columns of a second moment, clipped by block.

    The first moment is a mean of updates, not of gradients, as there (section 6).
    """
    parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if settings.b1:
        parts.append(optax.ema(settings.b1, debias=False, accumulator_dtype=jnp.dtype(settings.first_moment_dtype)))
    return optax.chain(*parts)


def _muon(settings: OptimizerConfig, axes: Any, matrices: Any) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices inside the model (Jordan et al. 2024); Adam for tables, norms and biases."""

    def label(names: tuple[str | None, ...], matrix: bool) -> str:
        return "muon" if matrix and not {"vocab", "position"} & {*names} else "adam"

    labels = jax.tree.map(label, axes, matrices, is_leaf=_is_names)
    sides = jax.tree.map(muon_dimension_numbers, axes, is_leaf=_is_names)

    def sides_of(updates: Any) -> Any:
        # In the tree of this group, which has nothing where others have their parameters.
        return jax.tree.map(
            lambda own, update: update if isinstance(update, optax.MaskedNode) else own,
            sides,
            updates,
            is_leaf=lambda node: isinstance(node, optax.contrib.MuonDimensionNumbers),
        )

    def scaled(updates: Any, params: Any = None) -> Any:
        def one(update: jax.Array, own: optax.contrib.MuonDimensionNumbers) -> jax.Array:
            longer = max(math.prod(update.shape[axis] for axis in side) for side in own)
            # An orthogonal matrix has a root mean square of 1 / sqrt(longer side).
            return update * (MUON_RMS * math.sqrt(longer))

        return jax.tree.map(one, updates, sides_of(updates))

    muon = optax.contrib.scale_by_muon(
        beta=settings.muon_momentum,
        mu_dtype=jnp.dtype(settings.first_moment_dtype),
        weight_dimension_numbers=sides_of,
    )
    return optax.partition({"muon": optax.chain(muon, optax.stateless(scaled)), "adam": _adam(settings)}, labels)


def muon_dimension_numbers(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers:
    """Which axes of a weight are contracted and which come out; `layers` is neither, each layer being its own matrix.

    A weight that begins with the model's width, or an adapter's rank, takes that in; any other gives its last axis.
    """
    axes = [place for place, name in enumerate(names) if name != "layers"]
    cut = 1 if axes and names[axes[0]] in ("embed", "rank") else len(axes) - 1
    return optax.contrib.MuonDimensionNumbers(tuple(axes[:cut]), tuple(axes[cut:]))


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple)
