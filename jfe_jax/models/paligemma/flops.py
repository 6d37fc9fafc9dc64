"""FLOPs of PaliGemma's towers by formula; also those of the models that are made of its towers."""

from collections.abc import Iterator

from jfe_jax.config import ModelConfig
from jfe_jax.models.base import FlopTerm, Workload
from jfe_jax.models.paligemma.gemma import ends_early


def gemma_token_flops(cfg: ModelConfig) -> tuple[float, float]:
    """Returns a token's forward FLOPs in one Gemma block: of the matrices, and of attention per attended token."""
    text = cfg.text
    heads, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return 2.0 * text.width * (2 * heads + 2 * keys + 3 * text.mlp_dim), 4.0 * heads


def text_attention_flops(cfg: ModelConfig, load: Workload) -> float:
    """Returns the attention FLOPs of one layer: two products of each query with all keys of its row or bin."""
    return 4 * load.tokens * load.seen * cfg.text.num_heads * cfg.text.head_dim


def vision_terms(cfg: ModelConfig, load: Workload, length: int) -> Iterator[FlopTerm]:
    """Yields the patch embedding and the vision tower, whose sequences have `length` tokens."""
    vision = cfg.vision
    yield FlopTerm("patches", "vision.patch_", load.images * vision.patches, ())
    before = tuple(f"vision.{name}" for name in ("patch_", "position_", "class_", "first_norm.", "blocks."))
    attention = vision.depth * 4 * load.images * length**2 * vision.width
    yield FlopTerm("vision", "vision.", load.images * length, before, attention)


def tower_terms(
    cfg: ModelConfig, load: Workload, before: tuple[str, ...], layer_attention: float
) -> Iterator[FlopTerm]:
    """Yields the text tower, whose last layer may compute pooled tokens only."""
    text = cfg.text
    if cfg.pooling != "last" or not ends_early(text.depth):
        yield FlopTerm("tower", "tower.", load.tokens, before, text.depth * layer_attention)
        return
    # The last layer computes keys and values of every token, all else of the pooled ones.
    everywhere = ("key_", "value_", "lora.key.", "lora.value.")
    yield FlopTerm("tower_keys", tuple(f"tower.blocks.attention.{name}" for name in everywhere), load.tokens, before)
    last_attention = 4 * load.items * load.seen_at_end * text.num_heads * text.head_dim
    places = ((text.depth - 1) * load.tokens + load.items) / text.depth
    yield FlopTerm("tower", "tower.", places, before, (text.depth - 1) * layer_attention + last_attention)
