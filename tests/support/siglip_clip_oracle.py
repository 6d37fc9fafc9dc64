"""transformers' PyTorch SiglipModel and CLIPModel, tiny and random: what our dual encoder has to agree with."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from jfe_jax.data.item import EncodedItem

VOCABULARY = 600
# CLIP's tokens around a text, the last of its vocabulary; SigLIP's padding, which closes a text as well.
BOS, EOS, PAD = 590, 591, 1
WORDS = "a small red house the same person with a darker skin tone find an image that matches don't stop 12 3"
_TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
_DEEP = {"num_hidden_layers": 3, "hidden_size": 36, "num_attention_heads": 3}
# Name → what `tiny` takes. Towers of unequal depth and width; at 60 px the last pixels fill no patch.
MODELS = {
    "SigLIP, 60 px": {"family": "siglip", "vision": {"image_size": 60, "num_hidden_layers": 2}},
    "SigLIP, 224 px": {"family": "siglip", "text": _DEEP | {"projection_size": 24}, "vision": {"image_size": 224}},
    "CLIP, 56 px, quick GELU": {"family": "clip", "text": {"num_hidden_layers": 2}},
    "CLIP, 224 px, GELU": {
        "family": "clip",
        "text": {"hidden_act": "gelu"},
        "vision": _DEEP | {"hidden_act": "gelu", "image_size": 224},
    },
    "CLIP, 56 px, eos_token_id 2": {
        "family": "clip",
        "text": {"eos_token_id": 2, "max_position_embeddings": 35},
        "vision": {"num_hidden_layers": 2},
    },
}


def tiny(family: str, text: dict | None = None, vision: dict | None = None, seed: int = 0) -> torch.nn.Module:
    """Every weight, norms and biases too, is random and of a size that counts.

    Args:
      family: "siglip" or "clip".
      text, vision: settings of the towers that differ.
    """
    # Ids of `save`'s tokenizers.
    special = (
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
        if family == "clip"
        else {"bos_token_id": PAD, "eos_token_id": PAD, "pad_token_id": PAD}
    )
    text = {**_TOWER, **special, "vocab_size": VOCABULARY, "max_position_embeddings": 30, **(text or {})}
    vision = {**_TOWER, "patch_size": 14, "image_size": 56, **(vision or {})}
    if family == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 100
            if "embedding.weight" in name and weight.ndim == 2:
                fan_in = weight.shape[1]
            noise = torch.randn(weight.shape, generator=generator) * fan_in**-0.5
            weight.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


def save(model: torch.nn.Module, directory: Path, **options) -> Path:
    """A directory as from the hub: weights, config, tokenizer and image preparation."""
    model.save_pretrained(directory, **options)
    side = model.config.vision_config.image_size
    square = {"height": side, "width": side}
    if model.config.model_type == "clip":
        _clip_tokenizer().save_pretrained(directory)
        # Neither of the two has the same value twice, or anybody's default.
        size = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
        processor = {**size, "image_mean": [0.48, 0.45, 0.41], "image_std": [0.27, 0.26, 0.28]}
    else:
        _siglip_tokenizer(model.config.text_config.max_position_embeddings).save_pretrained(directory)
        processor = {"size": square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    name = {"clip": "CLIP", "siglip": "Siglip"}[model.config.model_type]
    kinds = {"image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor", "resample": 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor | kinds))
    return directory


def items(model: torch.nn.Module, seed: int = 0) -> dict[str, EncodedItem]:
    """Text only, image only and both, of different lengths, laid out as data/tokens.py does."""
    rng = np.random.default_rng(seed)
    clip, text = model.config.model_type == "clip", model.config.text_config
    side = model.config.vision_config.image_size

    def item(words: int, image: bool, above: bool = False) -> EncodedItem:
        ids = [*rng.integers(4, 290, words)]
        if above:
            # A token added after the vocabulary was made.
            ids[words // 2] = EOS + 7
        padded = [*ids, *[PAD] * (text.max_position_embeddings - words)]
        tokens = [BOS, *ids, EOS] if clip else padded
        if image and not words:
            tokens = [EOS if clip else PAD]
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if image else None
        return EncodedItem(np.array(tokens, np.int32), pixels)

    return {
        "text only": item(9, False),
        "image only": item(0, True),
        "image and text": item(6, True),
        "longest text": item(text.max_position_embeddings - (2 if clip else 1), False),
        "another image and text": item(3, True),
        "an added token": item(5, False, above=True),
    }


def text_hidden(model: torch.nn.Module, item: EncodedItem) -> torch.Tensor | None:
    """Last hidden states of one item's text alone, [S, D]; None without a text."""
    return None if len(item.tokens) == 1 else _text(model, item).last_hidden_state[0]


def image_hidden(model: torch.nn.Module, item: EncodedItem) -> torch.Tensor | None:
    """Last hidden states of one item's image, [P, D] (CLIP: 1 + P); None without an image."""
    return None if item.pixels is None else _image(model, item).last_hidden_state[0]


def pooled(model: torch.nn.Module, item: EncodedItem) -> torch.Tensor:
    """The late-fusion embedding [E]: text features plus image features, scaled to unit norm."""
    features = [_text(model, item).pooler_output[0]] if len(item.tokens) > 1 else []
    features += [_image(model, item).pooler_output[0]] if item.pixels is not None else []
    return sum(features) / sum(features).norm()


def features(model: torch.nn.Module, item: EncodedItem) -> dict[str, torch.Tensor]:
    """What get_text_features and get_image_features give, [E] each, of what the item has."""
    found = {"text": _text(model, item).pooler_output[0]} if len(item.tokens) > 1 else {}
    return found | ({"image": _image(model, item).pooler_output[0]} if item.pixels is not None else {})


def _text(model: torch.nn.Module, item: EncodedItem):
    # Its usual use: SigLIP's padding is seen, CLIP's comes after what looks at it.
    return model.get_text_features(torch.from_numpy(item.tokens.astype(np.int64))[None])


def _image(model: torch.nn.Module, item: EncodedItem):
    clip = model.config.model_type == "clip"
    mean, std = ([0.48, 0.45, 0.41], [0.27, 0.26, 0.28]) if clip else ([0.5] * 3, [0.5] * 3)
    pixels = (item.pixels.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return model.get_image_features(torch.from_numpy(pixels).permute(2, 0, 1)[None])


def _clip_tokenizer() -> CLIPTokenizer:
    """CLIPTokenizer itself, over a vocabulary of 592: bytes, bytes that end a word, merges."""
    whole = CLIPTokenizer()
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = whole.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = whole.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(WORDS.split(), trainer)
    tree = json.loads(tokenizer.to_str())["model"]
    known = dict.fromkeys([*tree["vocab"], *(f"{byte}</w>" for byte in alphabet)])
    vocabulary = {token: number for number, token in enumerate(known)}
    vocabulary |= {f"<filler{number}>": number for number in range(len(vocabulary), BOS)}
    vocabulary |= {"<|startoftext|>": BOS, "<|endoftext|>": EOS}
    return CLIPTokenizer(vocabulary, [tuple(pair) for pair in tree["merges"]], model_max_length=30)


def _siglip_tokenizer(positions: int) -> PreTrainedTokenizerFast:
    """As the hub's tokenizer.json: lower case, no punctuation, SentencePiece's unigrams, closed by padding."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        WORDS.split() * 3, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=positions,
        model_input_names=["input_ids"],
    )
