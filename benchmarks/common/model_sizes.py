"""Sizes of PaliGemma's architecture that the benchmarks run.

The small ones keep the published proportions: 256 patches of 14 pixels, heads of 72 in the image tower, one kv head, an
MLP of eight times the width in the text tower, a fifth of its parameters in the image tower. Their vocabulary is cut:
the published one of 257,216 would be 99 M of parameters at a width of 384.
"""

from jfe_jax.config import ModelConfig, TextConfig, VisionConfig
from jfe_jax.errors import UserError


def _text(vocab_size: int, width: int, depth: int, mlp_dim: int, num_heads: int, head_dim: int) -> TextConfig:
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=head_dim,
    )


def _vision(width: int, depth: int, mlp_dim: int, num_heads: int, image_size: int = 224) -> VisionConfig:
    return VisionConfig(image_size=image_size, width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)


GEOMETRIES = {
    # 0.3 M, for trying a benchmark out.
    "tiny": ModelConfig(vision=_vision(72, 2, 144, 1, 56), text=_text(512, 64, 2, 512, 2, 32), image_token=511),
    # 30 M: 16 M in the text tower, 3 M in the image tower, 11 M in the table.
    "30m": ModelConfig(vision=_vision(288, 3, 1152, 4), text=_text(28672, 384, 4, 3072, 6, 64), image_token=28671),
    # 145 M: 78 M, 16 M and 50 M.
    "150m": ModelConfig(vision=_vision(576, 4, 2304, 8), text=_text(65536, 768, 5, 6144, 6, 128), image_token=65535),
    # PaliGemma 3B at 224 px as it is: configs/paligemma_3b/paligemma_3b.yaml.
    "3b": ModelConfig(),
}


def geometry(name: str) -> ModelConfig:
    """Raises UserError if there is none of this name."""
    if name not in GEOMETRIES:
        raise UserError(f"--geometry {name}: there are {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]
