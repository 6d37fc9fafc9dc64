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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jfe_jax.config import Config, ModelConfig
from jfe_jax.errors import UserError

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


@dataclass(frozen=True)
class Workload:
    """What a step computes on: text tower's tokens, those each of them attends to (mean), images, items, those that an
    item's pooled token attends to (mean)."""

    tokens: float
    seen: float
    images: float
    items: float
    seen_at_end: float


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


class FlopTerm(NamedTuple):
    """What a part is made of.

    Attributes:
      weights: how the paths of its matrices begin, one way or several, of those that no run before has.
      places: how often a step applies each of them; a mean, if not all are applied as often.
      before: how the paths of parameters begin to which a gradient goes through it.
      attention: forward FLOPs of all of it.
    """

    name: str
    weights: str | tuple[str, ...]
    places: float
    before: tuple[str, ...]
    attention: int = 0


def count_module_flops(config: Config, load: Workload | None = None) -> list[ModuleFlops]:
    """Every part of the model with its FLOPs for `load`, in the order of the forward pass; None for `packed_workload`.

    Raises:
      UserError: `optimizer.freeze` or `optimizer.train` names no group of parameters.
    """
    from jfe_jax.models.abstract_model import shapes_of
    from jfe_jax.models.registry import logical_axes
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
    for run in _flop_terms(config.model, load or packed_workload(config)):
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


def _flop_terms(model: ModelConfig, load: Workload) -> Iterator[FlopTerm]:
    vision, text = model.vision, model.text
    patches = load.images * vision.patches
    # CLIP has a class token beside its patches.
    length = vision.patches + (model.kind == "dual" and model.family == "clip")
    # Two products of each query with all keys of its row or image.
    of_text = 4 * load.tokens * load.seen * text.num_heads * text.head_dim
    of_images = vision.depth * 4 * load.images * length**2 * vision.width
    words = ("embedder.", "tower.blocks.")
    yield FlopTerm("patches", "vision.patch_", patches, ())
    into = tuple(f"vision.{name}" for name in ("patch_", "position_", "class_", "first_norm.", "blocks."))
    yield FlopTerm("vision", "vision.", load.images * length, into, of_images)
    if model.kind == "dual":
        yield from _dual_head_terms(model, load.images)
        into = ("text.table_", "text.position_", "text.blocks.")
        yield FlopTerm("text", "text.", load.tokens, into, text.depth * of_text)
        # SigLIP's, or CLIP's.
        yield FlopTerm("text_head", "text_", load.items, ("text.",))
        return
    if model.kind == "two_tower" and model.fusion == "score":
        # Each head's weighted mean of the patches has the patches and their weights as operands.
        mean = 2 * patches * vision.num_heads * vision.width
        yield FlopTerm("image_probe", "image_pool.probe_", patches, ("vision.",), mean)
        yield FlopTerm("image_pool", "image_pool.", load.images, ("vision.", "image_pool.probe_"))
    else:
        yield FlopTerm("projector", "projector.", patches, ("vision.",))
    if model.kind == "fusion":
        yield from _fusion_tower_terms(model, load, ("vision.", "projector.", *words), of_text)
        return
    yield FlopTerm("tower", "tower.", load.tokens, words, text.depth * of_text)
    if model.fusion == "feature":
        before = ("vision.", "projector.", "embedder.", "tower.", "image_mark_", "text_mark_", "fusion.blocks.")
        yield FlopTerm("fusion", "fusion.", load.tokens, before, model.fusion_depth * of_text)
        yield FlopTerm("projection", "projection.", load.items, (*before, "fusion."))
    else:
        yield FlopTerm("projection", "projection.", load.items, ("embedder.", "tower."))


def _fusion_tower_terms(
    model: ModelConfig, load: Workload, before: tuple[str, ...], of_layer: float
) -> Iterator[FlopTerm]:
    from jfe_jax.models.paligemma.gemma import ends_early

    text = model.text
    if model.pooling != "last" or not ends_early(text.depth):
        yield FlopTerm("tower", "tower.", load.tokens, before, text.depth * of_layer)
        return
    # The last layer computes keys and values of every token, all else of the pooled ones.
    everywhere = ("key_", "value_", "lora.key.", "lora.value.")
    yield FlopTerm("tower_keys", tuple(f"tower.blocks.attention.{name}" for name in everywhere), load.tokens, before)
    of_last = 4 * load.items * load.seen_at_end * text.num_heads * text.head_dim
    places = ((text.depth - 1) * load.tokens + load.items) / text.depth
    yield FlopTerm("tower", "tower.", places, before, (text.depth - 1) * of_layer + of_last)


def _dual_head_terms(model: ModelConfig, images: float) -> Iterator[FlopTerm]:
    if model.family == "clip":
        yield FlopTerm("image_head", "image_projection_", images, ("vision.",))
        return
    patches, width = model.vision.patches, model.vision.width
    # A third of it makes the probe's query, the others key and value of every patch.
    yield FlopTerm("image_probe", "image_head.in_dinh", images * (1 + 2 * patches) / 3, ("vision.",))
    before = ("vision.", "image_head.probe_", "image_head.in_")
    yield FlopTerm("image_head", "image_head.", images, before, images * 4 * patches * width)
