"""Model FLOPs of a step by formula: what MFU is measured in.

The multiplications of the model itself, 2 FLOPs each, forward and backward once; what is recomputed to save memory is
extra work of the machine, not of the model. Attention goes in both directions, so it is not halved as a causal tower's
is. (Definition: Chowdhery et al. 2022, PaLM, appendix B; halving left out as in AI-Hypercomputer/maxtext for
bidirectional towers.)

Either of whole rows, padding and other segments included, because the hardware multiplies them too (`of_rows`), or of
the items alone, which is what a user gets (`of_items`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jfe_jax.config import Config, TextConfig, VisionConfig
from jfe_jax.errors import UserError


@dataclass(frozen=True)
class Part:
    """A run of layers: its forward FLOPs, and whether the backward pass goes to its weights and through it."""

    name: str
    matrices: float
    attention: float
    to_weights: bool = True
    through: bool = True

    @property
    def forward(self) -> float:
        return self.matrices + self.attention

    @property
    def training(self) -> float:
        # Attention has no weights: both its operands are activations, so its gradients cost twice the forward pass.
        return self.forward + self.matrices * (self.to_weights + self.through) + 2 * self.attention * self.through


@dataclass(frozen=True)
class Load:
    """What a step computes on: text tower's tokens, those each of them attends to (mean), images, items."""

    tokens: float
    seen: float
    images: float
    items: float


def of_rows(config: Config) -> Load:
    """The global batch of `config.data`, every place of every row and every image slot."""
    data = config.data
    return Load(data.rows * data.row_tokens, data.row_tokens, data.image_slots, data.pairs * (2 + data.hard_negatives))


def of_items(lengths: Sequence[int], images: int) -> Load:
    """Items of so many tokens each, patches included, `images` of them with an image; no padding."""
    tokens = sum(lengths)
    return Load(tokens, sum(length * length for length in lengths) / max(tokens, 1), images, len(lengths))


def text_layer(cfg: TextConfig, seen: float) -> tuple[float, float]:
    """FLOPs of a token in one layer, forward: in matrices, and in attention to `seen` tokens."""
    heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    weights = cfg.width * (2 * heads + 2 * kv) + 3 * cfg.width * cfg.mlp_dim
    return 2.0 * weights, 4.0 * seen * heads


def vision_layer(cfg: VisionConfig) -> tuple[float, float]:
    """FLOPs of a patch in one layer, forward: in matrices, and in attention over its image."""
    weights = 4 * cfg.width**2 + 2 * cfg.width * cfg.mlp_dim
    return 2.0 * weights, 4.0 * cfg.patches * cfg.width


def parts(config: Config, load: Load | None = None) -> list[Part]:
    """Every part of the model with its FLOPs for `load`; None for the global batch, `of_rows`.

    Raises:
      UserError: a kind of model that no formula is given for.
    """
    model, load = config.model, load or of_rows(config)
    vision, text = model.vision, model.text
    tokens, patches = load.tokens, load.images * vision.patches
    frozen = config.optimizer.freeze

    def trained(name: str) -> bool:
        return name not in frozen

    of_patch, of_image = vision_layer(vision)
    of_token, of_row = text_layer(text, load.seen)
    patch_weights = vision.patch_size**2 * 3 * vision.width
    sees = trained("vision")
    found = [
        Part("patches", 2.0 * patches * patch_weights, 0, sees, False),
        Part(
            "vision", patches * vision.depth * of_patch, patches * vision.depth * of_image, sees, sees
        ),
    ]  # fmt: skip
    if model.kind == "fusion":
        projects = trained("projector")
        deep = sees or projects or trained("embedder")
        projector = 2.0 * patches * vision.width * text.width
        tower = Part(
            "tower", tokens * text.depth * of_token, tokens * text.depth * of_row, trained("tower"),
            deep or trained("tower"),
        )  # fmt: skip
        return [*found, Part("projector", projector, 0, projects, sees), tower]
    if model.kind == "two_tower" and model.fusion in ("score", "feature"):
        width = model.embed_dim or text.width
        tower = Part("tower", tokens * text.depth * of_token, tokens * text.depth * of_row, trained("tower"))
        head = Part("projection", 2.0 * load.items * text.width * width, 0)
        if model.fusion == "score":
            pool = 2.0 * load.images * (vision.width**2 + vision.width * width) + 4.0 * patches * vision.width * (
                vision.num_heads
            )
            return [*found, Part("image_pool", pool, 0), tower, head]
        fusion = Part(
            "fusion", tokens * model.fusion_depth * of_token, tokens * model.fusion_depth * of_row
        )  # fmt: skip
        projector = Part("projector", 2.0 * patches * vision.width * text.width, 0, trained("projector"), sees)
        return [*found, projector, tower, fusion, head]
    raise UserError(f"model.kind {model.kind!r}: there is no formula for its FLOPs yet")


def training_flops(config: Config, load: Load | None = None) -> float:
    """Of one optimizer step over `load`, see `parts`."""
    return sum(part.training for part in parts(config, load))


def embedding_flops(config: Config, load: Load | None = None) -> float:
    """Of embedding `load`, see `parts`."""
    return sum(part.forward for part in parts(config, load))
