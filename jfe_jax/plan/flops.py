"""Counts a step's model FLOPs by formula. They are the numerator of MFU.

The forward pass costs 2 FLOPs per matrix weight and position (token, patch, image or item) that the weight is applied
to. The weight gradient costs the same again if the weight is trained. The input gradient costs the same again if
anything before it is trained. Attention adds its two matrix products. Recomputation to save memory is work of the
hardware, not of the model, so it does not count. Attention is bidirectional, so it is not halved as a causal tower's
is. Norms, activations, look-ups, pooling, the loss and the optimizer do not count. (Definition: Chowdhery et al. 2022,
PaLM, appendix B; not halved, as in AI-Hypercomputer/maxtext for bidirectional towers.)

Counts either full rows, including padding and other segments, because the hardware multiplies them too
(`packed_workload`), or only the items, which are the useful work (`items_workload`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.models.base import Workload

# Parameters with two or more axes that are not matrices of a product: tables are looked up, the others are added or
# used as a token.
_NO_MATRIX = ("table_vd", "position_pd", "position_sd", "probe_eed")


@dataclass(frozen=True)
class ModuleFlops:
    """FLOPs of a sequence of layers.

    Attributes:
      name: Name of the module.
      matrices, attention: Forward FLOPs for the global batch.
      learned: The part of `matrices` whose weights are trained.
      through: True if gradients propagate through this module to trained parameters before it.
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
    """Describes the global batch of `config.data` with every position of every row and bin, and every image slot."""
    data = config.data
    items, tokens = data.pairs * (2 + data.hard_negatives), data.rows * data.row_tokens
    keys_per_query = sum(count * length**2 for length, count in data.bins.items()) / tokens or data.row_tokens
    return Workload(tokens, keys_per_query, data.image_slots, items, max(data.bins, default=data.row_tokens))


def items_workload(lengths: Sequence[int], images: int) -> Workload:
    """Describes items of the given lengths in tokens, patches included, `images` of them with an image; no padding."""
    tokens, items = sum(lengths), len(lengths)
    return Workload(tokens, sum(length * length for length in lengths) / max(tokens, 1), images, items, tokens / items)


def count_module_flops(config: Config, load: Workload | None = None) -> list[ModuleFlops]:
    """Counts the FLOPs of each module of the model, in the order of the forward pass.

    Args:
      config: The run's config.
      load: The workload; None is `packed_workload`.

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
    trained, names = flatten(trained_mask(config, axes)["model"]), flatten(axes)
    sizes = {
        path: math.prod(leaf.shape)
        for path, leaf in flatten(shapes).items()
        if len(names[path]) - ("layers" in names[path]) > 1 and "bias" not in path and not path.endswith(_NO_MATRIX)
    }
    modules = []
    for term in get_backbone(config.model).flop_terms(config.model, load or packed_workload(config)):
        matrices = {path: 2.0 * size * term.places for path, size in sizes.items() if path.startswith(term.weights)}
        sizes = {path: size for path, size in sizes.items() if path not in matrices}
        learned = math.fsum(flops for path, flops in matrices.items() if trained[path])
        through = any(is_trained for path, is_trained in trained.items() if path.startswith(term.before))
        modules.append(ModuleFlops(term.name, math.fsum(matrices.values()), term.attention, learned, through))
    if sizes:
        raise UserError(f"there is no formula for the FLOPs of {', '.join(sizes)}")
    return modules


def count_training_flops(config: Config, load: Workload | None = None) -> float:
    """Counts the model FLOPs of one optimizer step over `load`; see `count_module_flops`."""
    return math.fsum(module.training for module in count_module_flops(config, load))


def count_embedding_flops(config: Config, load: Workload | None = None) -> float:
    """Counts the model FLOPs of embedding `load`; see `count_module_flops`."""
    return math.fsum(module.forward for module in count_module_flops(config, load))
