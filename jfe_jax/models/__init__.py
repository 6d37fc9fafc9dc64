"""Models: packed items → unit vectors. Both kinds take a PackedBatch and give float32 [G, B, E].

`graphdef, params = nnx.split(build_model(cfg, rngs))` once; then `nnx.merge(graphdef, params)(packed)` inside jit.
"""

from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.models.fusion import FusionEncoder
from jfe_jax.models.layers import count_parameters, logical_axes
from jfe_jax.models.two_tower import TwoTowerEncoder

__all__ = ["build_model", "count_parameters", "embedding_width", "logical_axes"]


def build_model(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The encoder of `cfg.kind`, with random float32 parameters.

    Raises:
      UserError: the sizes in `cfg` do not fit together.
    """
    _check(cfg)
    return FusionEncoder(cfg, rngs) if cfg.kind == "fusion" else TwoTowerEncoder(cfg, rngs)


def embedding_width(cfg: ModelConfig) -> int:
    """E, the width of the model's embeddings."""
    return cfg.embed_dim or cfg.text.width if cfg.kind == "two_tower" else cfg.text.width


def _check(cfg: ModelConfig) -> None:
    for holds, problem in (
        (
            cfg.vision.image_size % cfg.vision.patch_size == 0,
            f"model.vision.image_size {cfg.vision.image_size} is no multiple of patch_size {cfg.vision.patch_size}",
        ),
        (
            cfg.vision.width % cfg.vision.num_heads == 0,
            f"model.vision.width {cfg.vision.width} is no multiple of num_heads {cfg.vision.num_heads}",
        ),
        (
            cfg.text.num_heads % cfg.text.num_kv_heads == 0,
            f"model.text.num_heads {cfg.text.num_heads} is no multiple of num_kv_heads {cfg.text.num_kv_heads}",
        ),
        (cfg.text.head_dim % 2 == 0, f"model.text.head_dim {cfg.text.head_dim} is odd; rotary positions need halves"),
        (
            cfg.kind == "two_tower" or cfg.embed_dim in (0, cfg.text.width),
            f"model.embed_dim {cfg.embed_dim}: the fusion model's embedding has the tower's width {cfg.text.width}",
        ),
    ):
        if not holds:
            raise UserError(problem)
