"""A Joint Fusion Encoder in sentence-transformers: texts, images, and both in one sequence.

    model = SentenceTransformer(DIRECTORY, trust_remote_code=True)
    model.encode(["a red dress"])
    model.encode([Image.open("dress.png")])
    model.encode([{"image": Image.open("dress.png"), "text": "but sleeveless"}])

One call takes items of one kind, which is sentence-transformers' rule; the vectors of all kinds can be compared.
This file lies beside the weights and needs torch, transformers, sentence-transformers and Pillow, not jfe_jax. It
prepares items exactly as training did. A prompt is an instruction: it goes before the text, a space between them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sentence_transformers.base.modality import is_image_url_or_path
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import load_dir_path
from tokenizers import Tokenizer
from transformers import PaliGemmaForConditionalGeneration
from transformers.image_utils import load_image

SETTINGS = "jfe.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json", SETTINGS)


class JointFusionEncoder(InputModule):
    """Items → unit vectors."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, directory: Path):
        super().__init__()
        self.auto_model = model
        self.directory = directory
        self.settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # A text that spells a special token is text.
        self.tokenizer.encode_special_tokens = True
        config = model.config
        self.bos, self.eos, self.pad = (getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        self.image_token = config.image_token_id
        self.size = config.vision_config.image_size
        self.patches = (self.size // config.vision_config.patch_size) ** 2
        self.max_seq_length = self.settings["max_text_tokens"]

    @property
    def modalities(self) -> list:
        return ["text", "image", ("image", "text")]

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict | None = None,
        **kwargs,
    ) -> "JointFusionEncoder":
        hub = {
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        directory = Path(load_dir_path(model_name_or_path, subfolder, **hub))
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        # Computed in what the model was trained in, whatever its weights are stored in, unless asked otherwise.
        given = {"dtype": settings["dtype"], **(model_kwargs or {})}
        return cls(PaliGemmaForConditionalGeneration.from_pretrained(directory, **given), directory)

    def save(self, output_path: str, *args, safe_serialization: bool = True, **kwargs) -> None:
        self.auto_model.save_pretrained(output_path, safe_serialization=safe_serialization)
        for name in TOKENIZER:
            if (self.directory / name).is_file():
                (Path(output_path) / name).write_bytes((self.directory / name).read_bytes())

    def get_embedding_dimension(self) -> int:
        return self.auto_model.config.text_config.hidden_size

    def preprocess(self, inputs: list, prompt: str | None = None, **kwargs) -> dict[str, torch.Tensor]:
        """Items → ids [B, S], attention mask [B, S], and pixels [M, 3, H, W] of those that have an image."""
        rows, pixels = [], []
        for item in inputs:
            text, image = self._parts(item)
            rows.append(self._ids(text, (prompt or "").strip(), image is not None))
            if image is not None:
                pixels.append(self._pixels(image))
        longest = max(map(len, rows))
        features = {
            "input_ids": torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }
        if pixels:
            features["pixel_values"] = torch.stack(pixels)
        return features

    def forward(self, features: dict[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
        mask = features["attention_mask"]
        pixels = features.get("pixel_values")
        states = self.auto_model.model(
            input_ids=features["input_ids"],
            attention_mask=mask,
            pixel_values=None if pixels is None else pixels.to(self.auto_model.dtype),
        ).last_hidden_state.float()
        if self.settings["pooling"] == "last":
            vectors = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        else:
            vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        features["sentence_embedding"] = torch.nn.functional.normalize(vectors, dim=-1)
        return features

    def _parts(self, item):
        if isinstance(item, dict):
            text, image = item.get("text"), item.get("image")
        elif isinstance(item, str) and not is_image_url_or_path(item):
            text, image = item, None
        else:
            text, image = None, item
        if image is None and not text:
            raise ValueError("an item needs a text or an image")
        return text, image

    def _ids(self, text: str | None, instruction: str, has_image: bool) -> list[int]:
        whole = f"{instruction} {text}" if instruction and text else instruction or text or ""
        newline = "\n" if self.settings["newline"] else ""
        close = self.tokenizer.encode(newline, add_special_tokens=False).ids
        ids = self.tokenizer.encode(whole + newline, add_special_tokens=False).ids
        # After a text that ends in a newline the two may be one token.
        closed = ids[len(ids) - len(close) :] == close
        ids = ids[: len(ids) - len(close)] if closed else ids
        ids = [one for one in ids if one != self.image_token]
        if len(ids) > self.max_seq_length:
            ids, closed = ids[: self.max_seq_length], True
        return [*[self.image_token] * (self.patches * has_image), self.bos, *ids, *(close if closed else []), self.eos]

    def _pixels(self, image) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            image = image.cpu().numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            image = load_image(image) if "://" in image or image.startswith("data:") else Image.open(image)
        rgb = _rgb(ImageOps.exif_transpose(image))
        if rgb.size != (self.size, self.size):
            rgb = rgb.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float()
        return (pixels / 255 - 0.5) / 0.5


def _rgb(image: Image.Image) -> Image.Image:
    """Palettes resolved, 16-bit grey scaled to 8 bits, transparency laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
