"""`SiglipModel`'s and `CLIPModel`'s config.json and preprocessor_config.json ↔ our configuration."""

from pathlib import Path
from typing import Any, NamedTuple

from jfe_jax.config import Config, ModelConfig, TokensConfig, from_dict
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.errors import UserError
from jfe_jax.models.hf_json import read_json, refuse, section

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
# Before transformers 4.31 CLIP's files named 2, and the token of the largest id was pooled; they still do.
LARGEST_EOS = 2
BICUBIC = 3
_COMMON = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}
_VISION = _COMMON | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT = _COMMON | {"vocab_size": "vocab_size", "positions": "max_position_embeddings"}


class _Family(NamedTuple):
    """transformers' defaults for what a file leaves out, and the names of its classes."""

    name: str
    vision: dict[str, Any]
    text: dict[str, Any]
    processor: dict[str, Any]


_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIGLIP_BASE = _BASE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_CLIP_BASE = _BASE | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_FAMILIES = {
    "siglip": _Family(
        "Siglip",
        _SIGLIP_BASE | {"image_size": 224, "patch_size": 16},
        _SIGLIP_BASE | {"vocab_size": 32000, "max_position_embeddings": 64},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "clip": _Family(
        "CLIP",
        _CLIP_BASE | {"image_size": 224, "patch_size": 32},
        _CLIP_BASE
        | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
        {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "do_center_crop": True,
        },
    ),
}


def read_dual(tree: dict[str, Any], directory: Path, encoder: dict[str, Any]) -> Config:
    """The configuration that a directory of a `SiglipModel` or `CLIPModel` describes.

    Args:
      tree: its config.json, whose model_type is "siglip" or "clip".
      directory: where the image processor's settings and the tokenizer are.
      encoder: settings of `tokens` that config.json cannot say.

    Raises:
      UserError: a setting that is not implemented.
    """
    path, name = directory / "config.json", tree["model_type"]
    family = _FAMILIES[name]
    # An older way to write the two, which transformers still prefers.
    vision, text = (
        default
        | (
            section(tree, f"{part}_config_dict", path)
            if tree.get(f"{part}_config_dict") is not None
            else section(tree, f"{part}_config", path)
        )
        for part, default in (("vision", family.vision), ("text", family.text))
    )
    width = tree.get("projection_dim", 512) if name == "clip" else text.get("projection_size") or text["hidden_size"]
    refuse(
        path,
        {
            "vision_config.hidden_act": (vision["hidden_act"], tuple(ACTIVATIONS)),
            "text_config.hidden_act": (text["hidden_act"], tuple(ACTIVATIONS)),
            "vision_config.num_channels": (vision.get("num_channels", 3), (3,)),
            "vision_config.vision_use_head": (vision.get("vision_use_head", True), (True,)),
            "vision_config.model_type": (vision.get("model_type"), (None, f"{name}_vision_model")),
            "text_config.model_type": (text.get("model_type"), (None, f"{name}_text_model")),
        },
    )
    for part, settings in (("vision_config", vision), ("text_config", text)):
        if settings["hidden_size"] % settings["num_attention_heads"]:
            raise UserError(
                f"{path}: {part}.hidden_size {settings['hidden_size']} is no multiple of num_attention_heads "
                f"{settings['num_attention_heads']}"
            )
    if name == "siglip" and width != vision["hidden_size"]:
        raise UserError(
            f"{path}: text_config.projection_size {width} is not vision_config.hidden_size {vision['hidden_size']}: "
            "the two embeddings cannot be compared"
        )
    ours_text = _ours(_TEXT, text)
    heads = ours_text["num_heads"]
    positions = ours_text["positions"]
    model = {
        "kind": "dual",
        "family": name,
        "vision": _ours(_VISION, vision) | _preparation(directory, family, vision["image_size"]),
        "text": ours_text | {"num_kv_heads": heads, "head_dim": ours_text["width"] // heads},
        "pooling": "largest" if text.get("eos_token_id") == LARGEST_EOS and name == "clip" else "last",
        "embed_dim": width,
    }
    room = positions - (1 if name == "siglip" else 2)
    tokens = {"max_text_tokens": room, **encoder, "tokenizer": str(directory), "template": name, "newline": False}
    whole = {"model": model, "tokens": tokens, "data": {"row_tokens": positions}}
    config = from_dict(whole, str(path))
    if name == "clip" and config.model.pooling == "last":
        closing = ItemEncoder(config.tokens, config.model.vision, config.model.image_token).eos_id
        if text["eos_token_id"] != closing:
            raise UserError(
                f"{path}: text_config.eos_token_id is {text['eos_token_id']}, but the tokenizer closes a text with "
                f"{closing}: the state that is pooled would be another; correct the one that is wrong"
            )
    return config


def dual_config_json(model: ModelConfig, special: dict[str, int]) -> dict[str, Any]:
    """config.json of a `SiglipModel` or `CLIPModel` of this geometry.

    Args:
      model: a dual encoder's configuration.
      special: ids of the tokenizer's "bos", "eos" and "pad", those that it has.
    """
    family, clip = _FAMILIES[model.family], model.family == "clip"
    ids = {f"{name}_token_id": number for name, number in special.items()}
    if model.pooling == "largest":
        ids["eos_token_id"] = LARGEST_EOS
    text, vision = _theirs(_TEXT, model.text), _theirs(_VISION, model.vision)
    width = model.embed_dim or model.vision.width
    return {
        "architectures": [f"{family.name}Model"],
        "model_type": model.family,
        "dtype": "float32",
        **({"projection_dim": width} if clip else {}),
        "text_config": {
            "model_type": f"{model.family}_text_model",
            **text,
            **ids,
            ("projection_dim" if clip else "projection_size"): width,
        },
        "vision_config": {
            "model_type": f"{model.family}_vision_model",
            **vision,
            "num_channels": 3,
            **({"projection_dim": width} if clip else {"vision_use_head": True}),
        },
    }


def dual_processor_json(model: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json: the image preparation that `jfe_jax.data.image_transforms` does."""
    family, side = _FAMILIES[model.family].name, model.vision.image_size
    crop = model.vision.resize == "crop"
    return {
        "image_processor_type": f"{family}ImageProcessor",
        "processor_class": f"{family}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if crop else {"height": side, "width": side},
        "do_center_crop": crop,
        **({"crop_size": {"height": side, "width": side}} if crop else {}),
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.vision.mean),
        "image_std": list(model.vision.std),
    }


def dual_encoder_json(tokens: TokensConfig) -> dict[str, Any]:
    """Returns the `encoder` argument of `read_dual`."""
    return {"max_text_tokens": tokens.max_text_tokens}


def _ours(table: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    found = {ours: settings[theirs] for ours, theirs in table.items()}
    return found | {"activation": ACTIVATIONS[found["activation"]]}


def _theirs(table: dict[str, str], settings: Any) -> dict[str, Any]:
    named = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    found = {theirs: getattr(settings, ours) for ours, theirs in table.items()}
    return found | {"hidden_act": named[settings.activation]}


def _preparation(directory: Path, family: _Family, side: int) -> dict[str, Any]:
    """`resize`, `mean` and `std` of `VisionConfig`, as the directory's image processor has them."""
    path, settings = directory / "preprocessor_config.json", {}
    if path.is_file():
        settings = read_json(path)
    elif (directory / "processor_config.json").is_file():
        path = directory / "processor_config.json"
        settings = section(read_json(path), "image_processor", path)
    settings = family.processor | {key: value for key, value in settings.items() if value is not None}
    crop = settings.get("do_center_crop", False)
    square = {"height": side, "width": side}
    # One number stands for the shorter side, or for both of a crop.
    size, cropped = settings.get("size"), settings.get("crop_size", side)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    refuse(
        path,
        {
            "size": (size, (None, {"shortest_edge": side} if crop else square)),
            "crop_size": (cropped if crop else side, (side, square)),
            "resample": (settings.get("resample", BICUBIC), (BICUBIC,)),
            "do_resize": (settings.get("do_resize", True), (True,)),
            "do_rescale": (settings.get("do_rescale", True), (True,)),
            "rescale_factor": (round(settings.get("rescale_factor", 1 / 255) * 255, 9), (1.0,)),
            "do_normalize": (settings.get("do_normalize", True), (True,)),
        },
    )
    return {
        "resize": "crop" if crop else "stretch",
        "mean": settings["image_mean"],
        "std": settings["image_std"],
    }
