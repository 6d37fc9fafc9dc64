"""Backbones by name. Each is one folder, imported when it is asked for.

`graphdef, params = nnx.split(build_model(cfg, rngs))` once; then `nnx.merge(graphdef, params)(packed)` inside jit.
"""

import importlib

from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.models import lora
from jfe_jax.models.base import Backbone, HfFormat
from jfe_jax.models.layers import attention

# Name → module and class.
_BACKBONES: dict[str, tuple[str, str]] = {
    "fusion": ("jfe_jax.models.paligemma.backbone", "PaliGemmaBackbone"),
    "two_tower": ("jfe_jax.models.two_tower.backbone", "TwoTowerBackbone"),
    "dual": ("jfe_jax.models.siglip_clip.backbone", "SiglipClipBackbone"),
}


def get_backbone(cfg: ModelConfig) -> Backbone:
    """Returns the backbone that `cfg.kind` names."""
    return _load(cfg.kind)


def hf_formats() -> list[HfFormat]:
    """Returns the Hugging Face directories of all backbones that have one."""
    formats = [_load(kind).hf_format for kind in _BACKBONES]
    return [hf_format for hf_format in formats if hf_format is not None]


def _load(kind: str) -> Backbone:
    module, name = _BACKBONES[kind]
    return getattr(importlib.import_module(module), name)()


def build_model(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the encoder of `cfg.kind`, with random float32 parameters.

    Raises:
      UserError: The sizes in `cfg` do not fit together.
    """
    backbone = get_backbone(cfg)
    backbone.validate(cfg)
    attention.check(cfg, backbone.attention)
    model = backbone.build(cfg, rngs)
    # After everything else is drawn: the same seed gives the same base model with and without adapters.
    lora.attach(model, cfg.lora, rngs)
    return model


def embedding_width(cfg: ModelConfig) -> int:
    """Returns E, the width of the model's embeddings."""
    return get_backbone(cfg).embedding_width(cfg)
