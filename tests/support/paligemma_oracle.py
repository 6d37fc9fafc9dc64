"""transformers' PyTorch PaliGemma, tiny and random, run in both directions: what our tower has to agree with."""

from pathlib import Path

import numpy as np
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from jfe_jax.data.item import EncodedItem
from jfe_jax.data.processor import train_tokenizer

IMAGE_TOKEN, VOCABULARY, PATCHES, SIDE = 399, 400, 16, 56


# Small enough that the cap and the window change what the items below give.
GEMMA_2 = {
    "model_type": "gemma2",
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "sliding_window": 5,
    "attn_implementation": "eager",
}


# What parity is measured on.
MODELS = {
    "Gemma 1, 1 kv head": {},
    "Gemma 1, 2 kv heads": {"kv_heads": 2},
    "Gemma 1, 224 px": {"side": 224},
    "Gemma 2": {"kv_heads": 2, "text": GEMMA_2},
    "Gemma 2, no cap and no window": {
        "text": GEMMA_2 | {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 3},
    },
}


def tiny(
    kv_heads: int = 1, seed: int = 0, text: dict | None = None, side: int = SIDE
) -> PaliGemmaForConditionalGeneration:
    """Heads are not width / number wide; every weight, norms and biases too, is random and of a size that counts.

    Args:
      text: settings of the text tower that differ from a Gemma 1's.
      side: of an image, in pixels.
    """
    config = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "patch_size": 14,
            "image_size": side,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma",
            "hidden_size": 32,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 16,
            "vocab_size": VOCABULARY,
            **(text or {}),
        },
        image_token_index=IMAGE_TOKEN,
        vocab_size=VOCABULARY,
        projection_dim=32,
        hidden_size=32,
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 100
            if "embed" in name and weight.ndim == 2:
                fan_in = weight.shape[1]
            noise = torch.randn(weight.shape, generator=generator) * fan_in**-0.5
            layer_norm = "vision_tower" in name and "norm" in name and name.endswith("weight")
            weight.copy_(noise + 1 if layer_norm else noise)
    return model


def save(model: PaliGemmaForConditionalGeneration, directory: Path, **options) -> Path:
    """A directory as from the hub: weights, config and a tokenizer."""
    model.save_pretrained(directory, **options)
    texts = ["a small red house", "the same person with a darker skin tone", "find an image that matches"]
    train_tokenizer(texts, VOCABULARY, directory)
    return directory


def items(seed: int = 0, side: int = SIDE) -> dict[str, EncodedItem]:
    """Text only, image only and both, of different lengths."""
    rng = np.random.default_rng(seed)
    patches = (side // 14) ** 2

    def item(words: int, image: bool) -> EncodedItem:
        text = [2, *rng.integers(4, 390, words), 1]
        tokens = [IMAGE_TOKEN] * patches * image + text
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if image else None
        return EncodedItem(np.array(tokens, np.int32), pixels)

    return {
        "text only": item(9, False),
        "image only": item(0, True),
        "image and text": item(6, True),
        "longer text": item(17, False),
        "another image and text": item(3, True),
    }


def hidden(model: PaliGemmaForConditionalGeneration, item: EncodedItem) -> torch.Tensor:
    """Last hidden state [S, D] of one item alone, in both directions; positions are PaliGemma's own, from 1."""
    # What decides the mask; the config's `use_bidirectional_attention` alone leaves Gemma 2 causal.
    model.config.text_config.is_causal = False
    pixels = None
    if item.pixels is not None:
        pixels = torch.from_numpy((item.pixels.astype(np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    output = model.model(
        input_ids=torch.from_numpy(item.tokens.astype(np.int64))[None],
        pixel_values=pixels,
        attention_mask=torch.ones(1, len(item.tokens), dtype=torch.int64),
    )
    return output.last_hidden_state[0]


def pooled(model: PaliGemmaForConditionalGeneration, item: EncodedItem, pooling: str) -> torch.Tensor:
    """Unit embedding [D]."""
    states = hidden(model, item)
    vector = states[-1] if pooling == "last" else states.mean(0)
    return vector / vector.norm()
