"""Checks of sizes that several backbones share."""

from collections.abc import Iterable

from jfe_jax.config import ModelConfig
from jfe_jax.errors import UserError


def require(conditions: Iterable[tuple[bool, str]]) -> None:
    """Raises UserError with the problem of the first condition (holds, problem) that does not hold."""
    for holds, problem in conditions:
        if not holds:
            raise UserError(problem)


def check_towers(cfg: ModelConfig) -> None:
    """Raises UserError if heads do not divide the widths, or the pixels' normalization is malformed."""
    vision, text = cfg.vision, cfg.text
    require(
        (
            (
                vision.width % vision.num_heads == 0,
                f"model.vision.width {vision.width} is no multiple of num_heads {vision.num_heads}",
            ),
            (
                text.num_heads % text.num_kv_heads == 0,
                f"model.text.num_heads {text.num_heads} is no multiple of num_kv_heads {text.num_kv_heads}",
            ),
            (
                len(vision.mean) == len(vision.std) == 3 and all(vision.std),
                "model.vision.mean and std are three numbers each, std's not 0",
            ),
        )
    )


def check_gemma(cfg: ModelConfig) -> None:
    """Raises UserError if the sizes of a PaliGemma do not fit together; `check_towers` included."""
    vision, text = cfg.vision, cfg.text
    require(
        (
            (
                vision.image_size % vision.patch_size == 0,
                f"model.vision.image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}",
            ),
            (text.head_dim % 2 == 0, f"model.text.head_dim {text.head_dim} is odd; rotary positions need halves"),
            (cfg.pooling != "largest", "model.pooling 'largest': only a dual encoder's text is pooled so"),
        )
    )
    check_towers(cfg)
