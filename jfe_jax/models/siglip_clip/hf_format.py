"""The Hugging Face directories of SigLIP and CLIP."""

from pathlib import Path
from typing import Any

from jfe_jax.config import Config, ModelConfig, TokensConfig
from jfe_jax.models.siglip_clip import hf_config
from jfe_jax.models.siglip_clip.hf_names import NAMES
from jfe_jax.models.siglip_clip.model_card import dual_card


class SiglipClipFormat:
    """`SiglipModel` or `CLIPModel`, with jfe.json for the text's length."""

    model_types = ("siglip", "clip")
    layouts = ("transformers",)
    names = NAMES

    def read_config(self, tree: dict[str, Any], directory: Path, encoder: dict[str, Any]) -> Config:
        """Reads config.json and jfe.json."""
        return hf_config.read_dual(tree, directory, encoder)

    def config_json(self, model: ModelConfig, special: dict[str, int]) -> dict[str, Any]:
        """Returns config.json."""
        return hf_config.dual_config_json(model, special)

    def encoder_json(self, model: ModelConfig, tokens: TokensConfig) -> dict[str, Any]:
        """Returns jfe.json."""
        return hf_config.dual_encoder_json(tokens)

    def processor_json(self, model: ModelConfig) -> dict[str, Any]:
        """Returns preprocessor_config.json."""
        return hf_config.dual_processor_json(model)

    def tag(self, model: ModelConfig) -> str:
        """Returns the model card's tag."""
        return model.family

    def card(self, config: Config, step: int, name: str, layout: str, base: str) -> list[str]:
        """Returns the model card's description."""
        return dual_card(config, step, name)
