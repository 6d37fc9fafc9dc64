"""The configuration of a run: frozen dataclasses, read from YAML with command-line overrides."""

from jfe_jax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    TokensConfig,
    VisionConfig,
    differing_keys,
    from_dict,
    load,
    to_yaml,
)

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
