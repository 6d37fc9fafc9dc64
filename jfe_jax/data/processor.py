"""Encodes items as token ids and pixels.

Three layouts (`tokens.template`), each closed by the token that is pooled. PaliGemma's: an item with P image patches is
`<image>`·P, `<bos>`, text ids, newline, `<eos>`. CLIP's: `<bos>`, text ids, `<eos>`. SigLIP's: text ids, `<eos>`,
padding to a fixed length, whose last token is pooled whatever it is. In the last two the image is apart from the text,
and an item without text is a single placeholder. Any Hugging Face tokenizer directory works, Gemma's included.

Axes: S tokens, P patches, H W pixels.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jfe_jax.config import TokensConfig, VisionConfig
from jfe_jax.data.cached_tokenizer import TextEncoder
from jfe_jax.data.image_transforms import check_resampler, to_pixels
from jfe_jax.data.item import EncodedItem, Item
from jfe_jax.errors import UserError

# Texts are encoded one at a time, and a thread pool for a single text costs more than encoding it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_LOG = logging.getLogger(__name__)
IMAGE = "<image>"
_SPECIAL = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
# Special tokens of each template.
SPECIAL_OF = {"paligemma": ("pad", "bos", "eos", "image"), "clip": ("bos", "eos"), "siglip": ("pad", "eos")}


class ItemEncoder:
    """Encodes items for one tokenizer and one image size.

    Attributes:
      pad_id, bos_id, eos_id, image_id: the special tokens; None for those that the template does not use.
      vocab_size: one more than the largest id.
      image_size: H and W.
      longest: maximum number of tokens of an item.
      cut_texts: number of texts truncated to `max_text_tokens` so far.

    Raises:
      UserError: no tokenizer there, a special token is missing, or `<image>` is not `image_token`.
    """

    def __init__(self, tokens: TokensConfig, vision: VisionConfig, image_token: int):
        tokenizer, special = _load(Path(tokens.tokenizer), SPECIAL_OF[tokens.template])
        self.pad_id, self.bos_id, self.eos_id, self.image_id = (
            special.get(name) for name in ("pad", "bos", "eos", "image")
        )
        if self.image_id is not None and self.image_id != image_token:
            raise UserError(
                f"{tokens.tokenizer}: {IMAGE} has id {self.image_id}, but model.image_token is {image_token}; set it so"
            )
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._encode = TextEncoder(tokenizer)
        self.image_size, self._resize, self._resampler = vision.image_size, vision.resize, vision.resampler
        check_resampler(vision.resampler, vision.resize)
        self.cut_texts = 0
        self._max_text, self._template = tokens.max_text_tokens, tokens.template
        self._head = np.array([] if self.bos_id is None else [self.bos_id], np.int32)
        placeholders = np.full(0 if self.image_id is None else vision.patches, self.image_id or 0, np.int32)
        self._image_head = np.concatenate([placeholders, self._head])
        self._newline = "\n" if tokens.newline and tokens.template == "paligemma" else ""
        self._close = self._encode(self._newline)
        self._tail = np.array([*self._close, self.eos_id], np.int32)
        self.longest = len(self._image_head) + self._max_text + len(self._tail)

    def encode(self, item: Item, name: str = "image") -> EncodedItem:
        """Returns tokens int32 [S] and pixels uint8 [H, W, 3] (None without an image); errors call the image `name`.

        Raises:
          UserError: the item is empty or its image cannot be read.
        """
        if item.image is None and not item.text and not item.instruction:
            raise UserError("an item needs a text or an image")
        pixels = None if item.image is None else self.pixels(item.image, name)
        return EncodedItem(self.tokens(item.text, item.instruction, pixels is not None), pixels)

    def pixels(self, image: bytes | Path | np.ndarray, name: str) -> np.ndarray:
        """Returns only the pixels of `encode`, uint8 [H, W, 3]."""
        return to_pixels(image, self.image_size, name, self._resize, self._resampler)

    def tokens(self, text: str | None, instruction: str | None, has_image: bool) -> np.ndarray:
        """Returns only the tokens of `encode`, int32 [S]."""
        full_text = f"{instruction} {text}" if instruction and text else instruction or text or ""
        if has_image and not full_text and self._template != "paligemma":
            return self._tail[-1:]
        # The newline is encoded with the text, as PaliGemma's processor does: after a text that ends in one, the two
        # may be one token.
        ids = self._encode(full_text + self._newline)
        closed = ids[len(ids) - len(self._close) :] == self._close
        tail = self._tail if closed else self._tail[-1:]
        ids = ids[: len(ids) - len(self._close)] if closed else ids
        # Text that spells the placeholder must not claim an image.
        if self.image_id is not None and self.image_id in ids:
            ids = [token_id for token_id in ids if token_id != self.image_id]
        if len(ids) > self._max_text:
            self._count_cut()
            ids, tail = ids[: self._max_text], self._tail
        head = self._image_head if has_image else self._head
        length = self.longest if self._template == "siglip" else len(head) + len(ids) + len(tail)
        tokens = np.full(length, self.pad_id or 0, np.int32)
        tokens[: len(head)] = head
        tokens[len(head) : len(head) + len(ids)] = ids
        tokens[len(head) + len(ids) : len(head) + len(ids) + len(tail)] = tail
        return tokens

    def _count_cut(self) -> None:
        self.cut_texts += 1
        # Warn at 1, 10, 100, …, which is enough to show the scale.
        if str(self.cut_texts).strip("0") == "1":
            _LOG.warning("texts cut to tokens.max_text_tokens, %d: %d so far", self._max_text, self.cut_texts)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Trains a byte-level BPE and writes it as a Hugging Face tokenizer directory.

    Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then bytes and merges, `<image>` last, always at `vocab_size` - 1: with
    too few texts for that many merges, `<unused…>` entries fill the gap.

    Raises:
      UserError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    least = 256 + len(_SPECIAL) + 1
    if vocab_size < least:
        raise UserError(f"a byte-level vocabulary needs at least {least} entries, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = vocab_size - 1 - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<unused{i}>", normalized=False) for i in range(missing)])
    tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in _SPECIAL.items()},
        "extra_special_tokens": {"image_token": IMAGE},
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _load(directory: Path, wanted: tuple[str, ...]) -> tuple[Tokenizer, dict[str, int]]:
    """Loads the tokenizer and the ids of the `wanted` special tokens."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        if (directory / "spiece.model").is_file():
            raise UserError(
                f"tokens.tokenizer: {directory} has spiece.model only; add the model's tokenizer.json to it"
            )
        raise UserError(f"tokens.tokenizer: {file} does not exist; name a Hugging Face tokenizer directory")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file}: not a tokenizer ({' '.join(str(error).split())})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    named = {name: token for name, token in (_SPECIAL | {"image": IMAGE}).items() if name in wanted}
    for settings in ("special_tokens_map.json", "tokenizer_config.json"):
        tree = _read_json(directory / settings)
        for name in named.keys() - {"image"}:
            token = tree.get(f"{name}_token")
            named[name] = (token.get("content") if isinstance(token, dict) else token) or named[name]
    ids = {}
    for name, token in named.items():
        ids[name] = tokenizer.token_to_id(token)
        if ids[name] is None:
            raise UserError(f"{directory}: the tokenizer has no {token} token")
    return tokenizer, ids


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
