"""Low-rank adapters (LoRA, arXiv 2106.09685): beside a kernel W lie A and B, and x W becomes x W + scale · (x A) B.

The product A B, as large as W, is never formed in training. A starts random and B at zero, so that a model with fresh
adapters is the model without. A and B are float32 parameters, cast to the compute dtype as every kernel is.

Axes: L layers, C the kernel's input axes flattened, R rank, O its output axes flattened.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jfe_jax.config import LoraConfig
from jfe_jax.errors import UserError
from jfe_jax.models.layers.blocks import Adaptable, project, zeros


class Kernel(NamedTuple):
    """A kernel that can have an adapter.

    Attributes:
      module: dotted path of the module that holds it.
      name: of the parameter; ends in its axis letters.
      inner: how many of its axes, after L, are contracted.
    """

    module: str
    name: str
    inner: int = 1

    @property
    def short(self) -> str:
        return self.name.rpartition("_")[0]

    @property
    def axes(self) -> str:
        return self.name.rpartition("_")[2]

    @property
    def stacked(self) -> bool:
        return "blocks" in self.module.split(".")

    @property
    def path(self) -> str:
        """Of the parameter, as in the parameter tree."""
        return f"{self.module}.{self.name}"

    @property
    def pair(self) -> tuple[str, str]:
        """Paths of A and B."""
        a, b = _names(self)
        return f"{self.module}.lora.{self.short}.{a}", f"{self.module}.lora.{self.short}.{b}"


# By the names that `model.lora.targets` knows them by; so are all those that a name begins.
KERNELS = {
    "attention.query": Kernel("tower.blocks.attention", "query_dnh"),
    "attention.key": Kernel("tower.blocks.attention", "key_dkh"),
    "attention.value": Kernel("tower.blocks.attention", "value_dkh"),
    "attention.out": Kernel("tower.blocks.attention", "out_nhd", 2),
    "mlp.gate": Kernel("tower.blocks", "gate_df"),
    "mlp.up": Kernel("tower.blocks", "up_df"),
    "mlp.down": Kernel("tower.blocks", "down_fd"),
    "vision.attention.query": Kernel("vision.blocks.attention", "query_dnh"),
    "vision.attention.key": Kernel("vision.blocks.attention", "key_dnh"),
    "vision.attention.value": Kernel("vision.blocks.attention", "value_dnh"),
    "vision.attention.out": Kernel("vision.blocks.attention", "out_nhd", 2),
    "vision.mlp.up": Kernel("vision.blocks", "up_df"),
    "vision.mlp.down": Kernel("vision.blocks", "down_fd"),
    "projector": Kernel("projector", "kernel_cd"),
}


class Adapters(nnx.Module):
    """The pairs of a module, each under its kernel's name without the axis letters."""


class Pair(nnx.Module):
    """A [*inner axes, R] and B [R, *outer axes] of one kernel, stacked as it is."""

    def __init__(self, kernel: Kernel, shape: tuple[int, ...], cfg: LoraConfig, rngs: nnx.Rngs):
        self.scale, self.inner, self.names = scale(cfg), kernel.inner, _names(kernel)
        lead = shape[: kernel.stacked]
        inner, outer = shape[len(lead) :][: kernel.inner], shape[len(lead) :][kernel.inner :]
        fan_in = 1
        for axis in inner:
            fan_in *= axis
        # As peft: kaiming_uniform(a=sqrt(5)), whose bound is fan_in^-1/2.
        drawn = jax.random.uniform(rngs.params(), (*lead, *inner, cfg.rank), jnp.float32, -1, 1)
        setattr(self, self.names[0], nnx.Param(drawn * fan_in**-0.5))
        setattr(self, self.names[1], zeros(*lead, cfg.rank, *outer))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *inner axes] → what is added to the projection, [..., *outer axes] in x's dtype."""
        a, b = (getattr(self, name)[...] for name in self.names)
        return project(project(x, a, self.inner) * self.scale, b)


def attach(model: nnx.Module, cfg: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives `model` fresh adapters on the kernels that `cfg.targets` names; none if `cfg.rank` is 0.

    Raises:
      UserError: a target is unknown or the model has no such kernel, or a setting is out of range.
    """
    for kernel in kernels(cfg):
        module = model
        for part in kernel.module.split("."):
            module = getattr(module, part, None)
        if not isinstance(module, Adaptable) or not hasattr(module, kernel.name):
            raise UserError(f"model.lora.targets: this kind of model has no {kernel.module}.{kernel.name}")
        if module.lora is None:
            module.lora = Adapters()
        shape = getattr(module, kernel.name).shape
        setattr(module.lora, kernel.short, Pair(kernel, shape, cfg, rngs))


def kernels(cfg: LoraConfig) -> list[Kernel]:
    """The kernels that have adapters.

    Raises:
      UserError: a target is unknown, or a setting is out of range.
    """
    if not cfg.rank:
        return []
    if cfg.rank < 0 or not cfg.alpha > 0:
        raise UserError(
            f"model.lora: rank is {cfg.rank} and alpha {cfg.alpha}; rank has to be 0 or more, alpha above 0"
        )
    if not cfg.targets:
        raise UserError("model.lora.targets is empty; name what has adapters, as [attention, mlp]")
    chosen = set()
    for target in cfg.targets:
        below = {name for name in KERNELS if _within(name, target)}
        if not below:
            known = ", ".join([*_groups(), *KERNELS])
            raise UserError(f"model.lora.targets: no {target!r}; there are {known}")
        chosen |= below
    return [kernel for name, kernel in KERNELS.items() if name in chosen]


def targets(names: Iterable[str]) -> tuple[str, ...]:
    """The shortest targets that stand for exactly these names of KERNELS."""
    left, found = set(names), []
    for group in [*_groups(), *KERNELS]:
        below = {name for name in KERNELS if _within(name, group)}
        if below <= left:
            found.append(group)
            left -= below
    return tuple(found)


def scale(cfg: LoraConfig) -> float:
    """What A B is multiplied by; alpha / sqrt(rank) is rsLoRA's (arXiv 2312.03732)."""
    return cfg.alpha / (cfg.rank**0.5 if cfg.rslora else cfg.rank)


def is_adapter(path: str) -> bool:
    """Whether a parameter's dotted path is an A's or a B's."""
    return ".lora." in path


def without_adapters(params: dict[str, Any]) -> dict[str, Any]:
    """A parameter tree, of anything, without its adapters."""
    return {
        name: without_adapters(node) if isinstance(node, dict) else node
        for name, node in params.items()
        if name != "lora"
    }


def merge(params: dict[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    """The same model without adapters: every W with a pair becomes W + scale · A B, in float32.

    Args:
      params: plain dict of float32 arrays, with the adapters of `cfg`; it is left as it is.
    """
    merged = without_adapters(params)
    for kernel in kernels(cfg):
        given, made = _node(params, kernel.module), _node(merged, kernel.module)
        a, b = (given["lora"][kernel.short][name] for name in _names(kernel))
        weight = given[kernel.name]
        made[kernel.name] = jax.jit(
            lambda w, a, b, kernel=kernel: w + delta(kernel, a, b, cfg), out_shardings=weight.sharding
        )(weight, a, b)
    return merged


def delta(kernel: Kernel, a: jax.Array, b: jax.Array, cfg: LoraConfig) -> jax.Array:
    """scale · A B in the kernel's shape, [L,] *inner axes, *outer axes."""
    inner, outer = a.shape[:-1], b.shape[1 + kernel.stacked :]
    lead = a.shape[: kernel.stacked]
    rank = a.shape[-1]
    product = jnp.matmul(a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1), precision=jax.lax.Precision.HIGHEST)
    return (scale(cfg) * product).reshape(*inner, *outer)


def _names(kernel: Kernel) -> tuple[str, str]:
    return f"a_{kernel.axes[: kernel.inner]}r", f"b_r{kernel.axes[kernel.inner :]}"


def _groups() -> Iterator[str]:
    """Beginnings of names, wide ones first."""
    parts = [name.split(".") for name in KERNELS]
    widest = max(map(len, parts))
    return iter(dict.fromkeys(".".join(one[:size]) for size in range(1, widest) for one in parts if len(one) > size))


def _within(name: str, group: str) -> bool:
    return f"{name}.".startswith(f"{group}.")


def _node(tree: dict[str, Any], path: str) -> dict[str, Any]:
    for part in path.split("."):
        tree = tree[part]
    return tree
