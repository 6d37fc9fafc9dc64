"""Writes a model as a Hugging Face directory that transformers opens: PaliGemma, or a dual encoder's own class."""

import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jfe_jax.checkpoint.model_io import atomic_directory
from jfe_jax.checkpoint.streaming import StreamedArray
from jfe_jax.config import Config
from jfe_jax.data.processor import SPECIAL_OF
from jfe_jax.errors import UserError
from jfe_jax.hf import mapping
from jfe_jax.hf.model_card import known_results, model_card
from jfe_jax.hf.safetensors_io import Tensor, write_weights
from jfe_jax.hf.settings import ENCODER_FILE, get_hf_format
from jfe_jax.hf.st_layout import add_layout
from jfe_jax.models.hf_json import write_json

Layout = Literal["transformers", "sentence-transformers"]
SHARD_BYTES = 5 * 10**9
# How the files that a model came from spell the table's prefixes; goes along with the tokenizer through training.
NAMES_FILE = "hf_names.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    NAMES_FILE,
)


class Outgoing(NamedTuple):
    """A model on its way out.

    Attributes:
      config: of the run that trained it.
      arrays: every parameter by dotted path, in the type that is written.
      tokenizer_dir: a Hugging Face tokenizer's directory.
      step: optimizer steps it was trained for.
    """

    config: Config
    arrays: Mapping[str, StreamedArray]
    tokenizer_dir: Path
    step: int


def save_hf(model: Outgoing, out: str | Path, shard_bytes: int = SHARD_BYTES, layout: Layout = "transformers") -> None:
    """Writes config.json, safetensors, the tokenizer, the image processor's settings and a model card.

    Written beside `out` and renamed into place, so that `out` is there whole or not at all. The tensors are named as in
    the files that the model came from, or else as transformers writes them; one is in memory at a time.

    Args:
      model: a fusion model or a dual encoder.
      out: must not exist, or be an empty directory.
      shard_bytes: weights are split into files of at most this size (a larger tensor has one of its own).
      layout: "sentence-transformers" adds what that library needs to open the directory.

    Raises:
      UserError: the model has no Hugging Face layout, `out` is in use, the tokenizer is missing, or the disk is full.
    """
    config, tokenizer = model.config, Path(model.tokenizer_dir)
    hf_format = get_hf_format(config.model)
    if layout not in hf_format.layouts:
        raise UserError("the sentence-transformers layout is of the fusion model; a dual encoder has transformers' own")
    tensors = _tensors(model.arrays, _names(tokenizer))
    main = Counter(str(tensor.dtype) for tensor in tensors.values()).most_common(1)[0][0]
    special = special_ids(tokenizer, SPECIAL_OF[config.tokens.template])
    try:
        with atomic_directory(out) as part:
            write_json(part / "config.json", hf_format.config_json(config.model, special) | {"dtype": main})
            write_json(part / ENCODER_FILE, hf_format.encoder_json(config.model, config.tokens))
            write_json(part / "preprocessor_config.json", hf_format.processor_json(config.model))
            copy_tokenizer(tokenizer, part)
            results = known_results(tokenizer.parent, model.step)
            card = model_card(config, model.step, Path(out).name, results, layout)
            (part / "README.md").write_text(card, encoding="utf-8")
            if layout == "sentence-transformers":
                add_layout(part)
            write_weights(part, tensors, shard_bytes)
    except OSError as error:
        raise UserError(f"{out}: cannot write it ({error.strerror}); nothing is left of it") from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to a tokenizer, and nothing else of the directory, into the existing `target`."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: no tokenizer there ({', '.join(TOKENIZER_FILES)})")
    for path in found:
        shutil.copyfile(path, target / path.name)


def special_ids(directory: Path, needed: Collection[str] = ("bos", "eos", "pad")) -> dict[str, int]:
    """Ids of "bos", "eos" and "pad", which transformers wants in config.json; those not `needed` may be left out."""
    settings, vocabulary = (_read_json(directory / name) for name in ("tokenizer_config.json", "tokenizer.json"))
    added = {token["content"]: token["id"] for token in vocabulary.get("added_tokens", [])}
    known = vocabulary.get("model", {}).get("vocab", {})
    ids = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        number = added.get(token, known.get(token) if isinstance(known, dict) else None)
        if number is None and name in needed:
            raise UserError(f"{directory}: the tokenizer names no {name}_token of its vocabulary")
        if number is not None:
            ids[name] = number
    return ids


def _tensors(arrays: Mapping[str, StreamedArray], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Every torch tensor of the model, by the name that it is written under."""

    def tensor(piece: mapping.Piece) -> Tensor:
        array = arrays[piece.entry.ours]
        whole = tuple(slice(0, size) for size in piece.shape)

        def read() -> np.ndarray:
            if piece.layer is None:
                return piece.entry.to_theirs(array.read(whole))
            return piece.entry.to_theirs(array.read((slice(piece.layer, piece.layer + 1), *whole))[0])

        return Tensor(piece.entry.their_shape(piece.shape), array.dtype, read)

    def spelt(name: str) -> str:
        ours = next((one for one in prefixes if name.startswith(one)), None)
        return name if ours is None else prefixes[ours] + name.removeprefix(ours)

    pieces = mapping.pieces({path: array.shape for path, array in arrays.items()})
    return {spelt(name): tensor(piece) for name, piece in pieces.items()}


def _names(tokenizer: Path) -> dict[str, str]:
    return _read_json(tokenizer / NAMES_FILE) if (tokenizer / NAMES_FILE).exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
