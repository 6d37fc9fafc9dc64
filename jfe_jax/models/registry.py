"""Models: packed items → unit vectors. All kinds take a PackedBatch and give float32 [G, B, E].

`graphdef, params = nnx.split(build_model(cfg, rngs))` once; then `nnx.merge(graphdef, params)(packed)` inside jit.
"""

from collections.abc import Iterator

from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.models import lora
from jfe_jax.models.layers import attention
from jfe_jax.models.layers.blocks import count_parameters, logical_axes
from jfe_jax.models.paligemma.model import FusionEncoder
from jfe_jax.models.siglip_clip.model import DualEncoder, dual_logits
from jfe_jax.models.two_tower.model import TwoTowerEncoder

__all__ = ["build_model", "count_parameters", "dual_logits", "embedding_width", "logical_axes"]


def build_model(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The encoder of `cfg.kind`, with random float32 parameters.

    Raises:
      UserError: the sizes in `cfg` do not fit together.
    """
    _check(cfg)
    attention.check(cfg)
    model = {"fusion": FusionEncoder, "two_tower": TwoTowerEncoder, "dual": DualEncoder}[cfg.kind](cfg, rngs)
    # After everything else is drawn: the same seed gives the same model beneath.
    lora.attach(model, cfg.lora, rngs)
    return model


def embedding_width(cfg: ModelConfig) -> int:
    """E, the width of the model's embeddings."""
    own = {"two_tower": cfg.embed_dim, "dual": cfg.embed_dim or cfg.vision.width}
    return own.get(cfg.kind) or cfg.text.width


def _check(cfg: ModelConfig) -> None:
    for holds, problem in (
        (
            # Pixels beyond the last whole patch are left out, as in siglip-so400m-patch14-384.
            cfg.kind == "dual" or cfg.vision.image_size % cfg.vision.patch_size == 0,
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
        (
            cfg.kind == "dual" or cfg.text.head_dim % 2 == 0,
            f"model.text.head_dim {cfg.text.head_dim} is odd; rotary positions need halves",
        ),
        (
            len(cfg.vision.mean) == len(cfg.vision.std) == 3 and all(cfg.vision.std),
            "model.vision.mean and std are three numbers each, std's not 0",
        ),
        (
            cfg.kind != "fusion" or cfg.embed_dim in (0, cfg.text.width),
            f"model.embed_dim {cfg.embed_dim}: the fusion model's embedding has the tower's width {cfg.text.width}",
        ),
        (
            cfg.kind == "dual" or cfg.pooling != "largest",
            "model.pooling 'largest': only a dual encoder's text is pooled so",
        ),
        *(_dual_conditions(cfg) if cfg.kind == "dual" else ()),
    ):
        if not holds:
            raise UserError(problem)


def _dual_conditions(cfg: ModelConfig) -> Iterator[tuple[bool, str]]:
    text = cfg.text
    yield text.positions > 0, "model.text.positions is 0; a dual encoder's text tower has learned positions"
    yield (
        (text.num_kv_heads, text.head_dim * text.num_heads) == (text.num_heads, text.width),
        f"model.text: a dual encoder's text tower has num_kv_heads = num_heads ({text.num_heads}) and head_dim = "
        f"width / num_heads ({text.width / text.num_heads:g})",
    )
    yield cfg.pooling != "mean", "model.pooling 'mean': a dual encoder's text is pooled at one token"
    yield (
        cfg.family == "clip" or cfg.embed_dim in (0, cfg.vision.width),
        f"model.embed_dim {cfg.embed_dim}: SigLIP's embedding has the vision tower's width {cfg.vision.width}",
    )
