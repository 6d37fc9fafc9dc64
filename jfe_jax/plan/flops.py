"""Model FLOPs of a step by formula: what MFU is measured in.

2 FLOPs for each weight of a matrix and each place (token, patch, image or item) that it is applied to, forward; as many
again for the gradient to the weights, if they are trained, and for the gradient that goes on towards the input, if
something there is trained. Attention adds its two products. What is recomputed to save memory is extra work of the
machine, not of the model. Attention goes in both directions, so it is not halved as a causal tower's is. Norms,
activations, look-ups, pooling, the loss and the optimizer do not count. (Definition: Chowdhery et al. 2022, PaLM,
appendix B; halving left out as in AI-Hypercomputer/maxtext for bidirectional towers.)

Counts either full rows, including padding and other segments, because the hardware multiplies them too
(`packed_workload`), or only the items, which are the useful work (`items_workload`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.models.base import Workload

# Parameters of two axes or more that multiply nothing: tables are looked up, the others are added or stand for a token.
_NO_MATRIX = ("table_vd", "position_pd", "position_sd", "probe_eed")


@dataclass(frozen=True)
class ModuleFlops:
    """A run of layers.

    Attributes:
      matrices, attention: forward FLOPs for the global batch.
      learned: of `matrices`, those whose weights are trained.
      through: whether the backward pass goes through to what comes before.
    """

    name: str
    matrices: float
    attention: float
    learned: float
    through: bool

    @property
    def forward(self) -> float:
        return self.matrices + self.attention

    @property
    def training(self) -> float:
        # Attention has no weights: both its operands are activations, so its gradients cost twice the forward pass.
        return self.forward + self.learned + (self.matrices + 2 * self.attention) * self.through


def packed_workload(config: Config) -> Workload:
    """The global batch of `config.data`, every place of every row and bin, and every image slot."""
    data = config.data
    items, tokens = data.pairs * (2 + data.hard_negatives), data.rows * data.row_tokens
    seen = sum(count * length**2 for length, count in data.bins.items()) / tokens or data.row_tokens
    return Workload(tokens, seen, data.image_slots, items, max(data.bins, default=data.row_tokens))


def items_workload(lengths: Sequence[int], images: int) -> Workload:
    """Items of so many tokens each, patches included, `images` of them with an image; no padding."""
    tokens, items = sum(lengths), len(lengths)
    return Workload(tokens, sum(length * length for length in lengths) / max(tokens, 1), images, items, tokens / items)


def count_module_flops(config: Config, load: Workload | None = None) -> list[ModuleFlops]:
    """Every part of the model with its FLOPs for `load`, in the order of the forward pass; None for `packed_workload`.

    Raises:
      UserError: `optimizer.freeze` or `optimizer.train` names no group of parameters.
    """
    from jfe_jax.models.abstract_model import shapes_of
    from jfe_jax.models.layers.blocks import logical_axes
    from jfe_jax.models.registry import get_backbone
    from jfe_jax.train.optimizer import trained_mask
    from jfe_jax.utils.pytrees import flatten

    _, shapes = shapes_of(config.model)
    axes = logical_axes(shapes)
    moves, names = flatten(trained_mask(config, axes)["model"]), flatten(axes)
    sizes = {
        path: math.prod(leaf.shape)
        for path, leaf in flatten(shapes).items()
        if len(names[path]) - ("layers" in names[path]) > 1 and "bias" not in path and not path.endswith(_NO_MATRIX)
    }
    found = []
    for run in get_backbone(config.model).flop_terms(config.model, load or packed_workload(config)):
        own = {path: 2.0 * size * run.places for path, size in sizes.items() if path.startswith(run.weights)}
        sizes = {path: size for path, size in sizes.items() if path not in own}
        learned = math.fsum(flops for path, flops in own.items() if moves[path])
        through = any(moved for path, moved in moves.items() if path.startswith(run.before))
        found.append(ModuleFlops(run.name, math.fsum(own.values()), run.attention, learned, through))
    if sizes:
        raise UserError(f"there is no formula for the FLOPs of {', '.join(sizes)}")
    return found


def count_training_flops(config: Config, load: Workload | None = None) -> float:
    """Of one optimizer step over `load`, see `parts`."""
    return math.fsum(part.training for part in count_module_flops(config, load))


def count_embedding_flops(config: Config, load: Workload | None = None) -> float:
    """Of embedding `load`, see `parts`."""
    return math.fsum(part.forward for part in count_module_flops(config, load))
