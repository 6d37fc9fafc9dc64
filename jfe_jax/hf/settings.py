"""Hugging Face's config.json of any backbone, in both directions. The backbones' folders know what is in it."""

from pathlib import Path
from typing import Any

from jfe_jax.config import Config, ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.models.base import HfFormat
from jfe_jax.models.hf_json import read_json
from jfe_jax.models.registry import get_backbone, hf_formats

# What config.json cannot say: how an item is laid out and pooled.
ENCODER_FILE = "jfe.json"


def read_config(directory: Path) -> Config:
    """Reads the configuration that a Hugging Face directory describes; its tokenizer is the directory itself.

    Raises:
      UserError: No config.json, another architecture, or a setting that the encoder does not implement.
    """
    path = directory / "config.json"
    tree = read_json(path)
    encoder: dict[str, Any] = read_json(directory / ENCODER_FILE) if (directory / ENCODER_FILE).exists() else {}
    known = {name: hf_format for hf_format in hf_formats() for name in hf_format.model_types}
    model_type = tree.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        *most, last = map(repr, known)
        raise UserError(f"{path}: model_type {model_type!r}; only {', '.join(most)} and {last} are read")
    return known[model_type].read_config(tree, directory, encoder)


def get_hf_format(model: ModelConfig) -> HfFormat:
    """Returns how a model's backbone is laid out as a Hugging Face directory.

    Raises:
      UserError: It has no such layout.
    """
    hf_format = get_backbone(model).hf_format
    if hf_format is None:
        raise UserError(
            f"model.kind is {model.kind!r}, which no class of transformers is; 'fusion' and 'dual' have one"
        )
    return hf_format
