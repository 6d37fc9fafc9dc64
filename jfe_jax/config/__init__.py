"""The configuration of a run: frozen dataclasses, read from YAML with command-line overrides."""

from jfe_jax.config.data import DataConfig, TokensConfig
from jfe_jax.config.loader import differing_keys, from_dict, load, to_yaml
from jfe_jax.config.model import LoraConfig, ModelConfig, TextConfig, VisionConfig
from jfe_jax.config.schema import Config
from jfe_jax.config.train import CheckpointConfig, LossConfig, MeshConfig, OptimizerConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TextConfig",
    "TokensConfig",
    "VisionConfig",
    "differing_keys",
    "from_dict",
    "load",
    "to_yaml",
]
