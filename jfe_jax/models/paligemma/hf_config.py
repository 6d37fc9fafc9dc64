"""`PaliGemmaForConditionalGeneration`'s config.json and preprocessor_config.json, in both directions."""

from pathlib import Path
from typing import Any

from jfe_jax.config import Config, ModelConfig, TextConfig, TokensConfig, VisionConfig, from_dict
from jfe_jax.errors import UserError
from jfe_jax.models.hf_json import refuse, section

TANH_GELU = "gelu_pytorch_tanh"

# ours → theirs, with the value that transformers takes when a PaliGemma config.json leaves it out.
_VISION = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "width": ("hidden_size", 1152),
    "depth": ("num_hidden_layers", 27),
    "mlp_dim": ("intermediate_size", 4304),
    "num_heads": ("num_attention_heads", 16),
    "norm_eps": ("layer_norm_eps", 1e-6),
}
_GEMMA_1 = {
    "vocab_size": ("vocab_size", 257216),
    "width": ("hidden_size", 2048),
    "depth": ("num_hidden_layers", 18),
    "mlp_dim": ("intermediate_size", 16384),
    "num_heads": ("num_attention_heads", 8),
    "num_kv_heads": ("num_key_value_heads", 1),
    "head_dim": ("head_dim", 256),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
_GEMMA_2 = _GEMMA_1 | {
    "vocab_size": ("vocab_size", 256000),
    "width": ("hidden_size", 2304),
    "depth": ("num_hidden_layers", 26),
    "mlp_dim": ("intermediate_size", 9216),
    "num_kv_heads": ("num_key_value_heads", 4),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
    "attn_logit_softcap": ("attn_logit_softcapping", 50.0),
    "sliding_window": ("sliding_window", 4096),
}
_TEXT = {"gemma": _GEMMA_1, "gemma2": _GEMMA_2}


def read_paligemma(tree: dict[str, Any], directory: Path, encoder: dict[str, Any]) -> Config:
    """Reads the configuration that a directory of a PaliGemma describes; its tokenizer is the directory itself.

    Args:
      tree: Its config.json.
      directory: The directory.
      encoder: What its jfe.json says of pooling and template; {} without one.

    Raises:
      UserError: A setting that the encoder does not implement.
    """
    path = directory / "config.json"
    vision, text = section(tree, "vision_config", path), section(tree, "text_config", path)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    family = text.get("model_type", "gemma")
    table = _TEXT.get(family, _GEMMA_1)
    sizes = {ours: text.get(theirs, default) for ours, (theirs, default) in table.items()}
    layer_types = text.get("layer_types")
    # Gemma 2 without windows: nothing that a layer's number decides.
    if layer_types == ["full_attention"] * sizes["depth"] and "sliding_window" in sizes:
        sizes["sliding_window"], layer_types = 0, None
    refuse(
        path,
        {
            "text_config.model_type": (family, tuple(_TEXT)),
            "text_config.layer_types": (layer_types, (None, _layer_types(sizes["depth"]))),
            # "gelu" is what old Gemma files say and mean the tanh form by.
            "text_config.hidden_act": (
                text.get("hidden_activation") or text.get("hidden_act"),
                (None, "gelu", TANH_GELU),
            ),
            "text_config.attention_bias": (text.get("attention_bias", False), (False,)),
            "text_config.rope_parameters.rope_type": (rope.get("rope_type", rope.get("type")), (None, "default")),
            "vision_config.model_type": (vision.get("model_type", "siglip_vision_model"), ("siglip_vision_model",)),
            "vision_config.hidden_act": (vision.get("hidden_act"), (None, TANH_GELU)),
            "vision_config.num_channels": (vision.get("num_channels", 3), (3,)),
        },
    )
    image_token = tree.get("image_token_index", tree.get("image_token_id"))
    if image_token is None:
        raise UserError(f"{path}: no image_token_index; add the id of <image>")
    if not 0 <= image_token < sizes["vocab_size"]:
        raise UserError(
            f"{path}: image_token_index {image_token} is beyond text_config.vocab_size, {sizes['vocab_size']}; "
            "it has to be the id of <image> in tokenizer.json"
        )
    model = {
        "vision": {ours: vision.get(theirs, default) for ours, (theirs, default) in _VISION.items()},
        # null is how a file says that there is no cap or no window.
        "text": {name: 0 if value is None else value for name, value in sizes.items()}
        | {
            "rope_theta": rope.get("rope_theta") or text.get("rope_theta") or 10000.0,
            "post_norms": family == "gemma2",
        },
        "image_token": image_token,
        "pooling": encoder.pop("pooling", "last"),
        "dtype": encoder.pop("dtype", "float32"),
    }
    return from_dict({"model": model, "tokens": {"tokenizer": str(directory), **encoder}}, str(path))


def paligemma_config_json(model: ModelConfig, special: dict[str, int]) -> dict[str, Any]:
    """Writes config.json of a `PaliGemmaForConditionalGeneration` of this geometry.

    Args:
      model: The configuration of a fusion model.
      special: Ids of "bos", "eos" and "pad".
    """
    ids = {f"{name}_token_id": number for name, number in special.items()}
    family = "gemma2" if model.text.post_norms else "gemma"
    text = {theirs: getattr(model.text, ours) for ours, (theirs, _) in _TEXT[family].items()}
    if family == "gemma2":
        text |= {
            "query_pre_attn_scalar": model.text.query_pre_attn_scalar or model.text.head_dim,
            "attn_logit_softcapping": model.text.attn_logit_softcap or None,
            "sliding_window": model.text.sliding_window or None,
            "layer_types": _layer_types(model.text.depth)
            if model.text.sliding_window
            else ["full_attention"] * model.text.depth,
        }
    vision = {theirs: getattr(model.vision, ours) for ours, (theirs, _) in _VISION.items()}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "dtype": "float32",
        **ids,
        "hidden_size": model.text.width,
        "image_token_index": model.image_token,
        "projection_dim": model.text.width,
        "tie_word_embeddings": True,
        "vocab_size": model.text.vocab_size,
        "text_config": {
            "model_type": family,
            **text,
            # As the encoder runs: transformers' classes then give its hidden states without a custom mask.
            "is_causal": False,
            "use_bidirectional_attention": True,
            **ids,
            "hidden_act": TANH_GELU,
            "hidden_activation": TANH_GELU,
            "attention_bias": False,
            # Older and newer versions of transformers read one or the other.
            "rope_theta": model.text.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.text.rope_theta},
            "num_image_tokens": model.vision.patches,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            "hidden_act": TANH_GELU,
            "num_channels": 3,
            "projection_dim": model.text.width,
            "vision_use_head": False,
        },
    }


def paligemma_encoder_json(model: ModelConfig, tokens: TokensConfig) -> dict[str, Any]:
    """Writes what `read_paligemma` takes as `encoder`."""
    tree = {"pooling": model.pooling, "max_text_tokens": tokens.max_text_tokens, "newline": tokens.newline}
    # Of the computation; config.json's is that of the stored weights.
    return tree | {"dtype": model.dtype}


def paligemma_processor_json(model: ModelConfig) -> dict[str, Any]:
    """Writes preprocessor_config.json: the image preparation that `jfe_jax.data.image_transforms` does."""
    side = model.vision.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        # Pillow's number of bicubic
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": model.vision.patches,
    }


def _layer_types(depth: int) -> list[str]:
    """Gemma 2's: a window in layers 0, 2, 4, …"""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(depth)]


# Of the fields that are not in the tables, PaliGemma leaves the defaults.
assert {*_VISION, "activation", "resize", "resampler", "mean", "std"} == set(VisionConfig.__dataclass_fields__)
assert {*_GEMMA_2, "rope_theta", "post_norms", "positions", "activation"} == set(TextConfig.__dataclass_fields__)
