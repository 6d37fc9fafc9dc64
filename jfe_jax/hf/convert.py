"""Hugging Face directory ↔ run directory, piece by piece: memory does not grow with the model."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from jfe_jax import checkpoint
from jfe_jax.config import Config
from jfe_jax.data.tokens import ItemEncoder
from jfe_jax.errors import UserError
from jfe_jax.hf.files import DTYPES
from jfe_jax.hf.load import open_hf
from jfe_jax.hf.save import NAMES_FILE, SHARD_BYTES, Layout, Outgoing, copy_tokenizer, save_hf
from jfe_jax.streaming import StreamedArray


def from_hf(source: str | Path, target: str | Path, dtype: str | None = None) -> int:
    """Writes a run directory at step 0 that `jfe train` takes as `init` and every other verb opens.

    Args:
      source: directory of safetensors, config.json and tokenizer.
      target: must be new; is there whole or not at all.
      dtype: of the stored weights; None keeps each as it is.

    Returns:
      The number of parameters.

    Raises:
      UserError: as `open_hf` and `save_model`, or the tokenizer does not fit the model.
    """
    weights = open_hf(source)
    _check_tokenizer(weights.config, Path(source))
    tree: dict[str, Any] = {}
    for path, array in weights.arrays.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _as(array, dtype)
    # Only the tokenizer's own files: the source directory holds the weights too.
    with tempfile.TemporaryDirectory() as tokenizer:
        copy_tokenizer(Path(source), Path(tokenizer))
        (Path(tokenizer) / NAMES_FILE).write_text(json.dumps(weights.prefixes, indent=2) + "\n", encoding="utf-8")
        config = dataclasses.replace(weights.config, output=str(target))
        checkpoint.save_model(target, config, tree, tokenizer)
    return sum(array.size for array in weights.arrays.values())


def to_hf(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = "transformers",
) -> int:
    """Writes a directory that transformers opens.

    Args:
      source: a run directory or one of its checkpoints, of the fusion model or a dual encoder.
      target: must be new; is there whole or not at all.
      dtype: of the written weights; None keeps each as the checkpoint stores it.
      shard_bytes, layout: as in `save_hf`.

    Returns:
      The number of parameters.

    Raises:
      UserError: as `load_model` and `save_hf`.
    """
    stored = checkpoint.open_model(source)
    arrays = {path: _as(array, dtype) for path, array in stored.arrays.items()}
    save_hf(Outgoing(stored.config, arrays, stored.tokenizer_dir, stored.step), target, shard_bytes, layout)
    return sum(array.size for array in arrays.values())


def parse_bytes(text: str) -> int:
    """ "5GB", "500MB", "1.5GiB" or plain bytes, as transformers' max_shard_size.

    Raises:
      ValueError: something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no size; write it as 5GB, 500MB or 2GiB")
    return max(1, int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")))


def _check_tokenizer(config: Config, directory: Path) -> None:
    # Before hours of training with it.
    model = config.model
    encoder = ItemEncoder(config.tokens, model.vision, model.image_token)
    if encoder.vocab_size > model.text.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {encoder.vocab_size - 1}, the model a vocabulary of "
            f"{model.text.vocab_size}; they do not belong together"
        )


def _as(array: StreamedArray, dtype: str | None) -> StreamedArray:
    return next((array.astype(one) for one in DTYPES.values() if one.name == dtype), array)
