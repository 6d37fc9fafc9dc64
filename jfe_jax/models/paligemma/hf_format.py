"""PaliGemma's Hugging Face directory."""

from pathlib import Path
from typing import Any

from jfe_jax.config import Config, ModelConfig, TokensConfig
from jfe_jax.models.paligemma import hf_config
from jfe_jax.models.paligemma.hf_names import NAMES
from jfe_jax.models.paligemma.model_card import paligemma_card


class PaliGemmaFormat:
    """`PaliGemmaForConditionalGeneration`, with jfe.json for pooling and template."""

    model_types = ("paligemma",)
    layouts = ("transformers", "sentence-transformers")
    names = NAMES

    def read_config(self, tree: dict[str, Any], directory: Path, encoder: dict[str, Any]) -> Config:
        """Reads config.json and jfe.json."""
        return hf_config.read_paligemma(tree, directory, encoder)

    def config_json(self, model: ModelConfig, special: dict[str, int]) -> dict[str, Any]:
        """Returns config.json."""
        return hf_config.paligemma_config_json(model, special)

    def encoder_json(self, model: ModelConfig, tokens: TokensConfig) -> dict[str, Any]:
        """Returns jfe.json."""
        return hf_config.paligemma_encoder_json(model, tokens)

    def processor_json(self, model: ModelConfig) -> dict[str, Any]:
        """Returns preprocessor_config.json."""
        return hf_config.paligemma_processor_json(model)

    def tag(self, model: ModelConfig) -> str:
        """Returns the model card's tag."""
        return "paligemma"

    def card(self, config: Config, step: int, name: str, layout: str, base: str) -> list[str]:
        """Returns the model card's description."""
        return paligemma_card(config, step, name, layout, base)
