"""Hugging Face directory ↔ run directory. Inwards in pieces: memory does not grow with the model."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jfe_jax import checkpoint
from jfe_jax.hf.load import DTYPES, open_hf
from jfe_jax.hf.save import NAMES_FILE, SHARD_BYTES, Layout, copy_tokenizer, save_hf
from jfe_jax.models import count_parameters
from jfe_jax.streaming import Index, StreamedArray


def from_hf(source: str | Path, target: str | Path, dtype: str | None = None) -> int:
    """Writes a run directory at step 0 that `jfe train` takes as `init` and every other verb opens.

    Args:
      source: directory of safetensors, config.json and tokenizer.
      target: must be new; is there whole or not at all.
      dtype: of the stored weights; None keeps each as it is.

    Returns:
      The number of parameters.

    Raises:
      UserError: as `open_hf` and `save_model`.
    """
    weights = open_hf(source)
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
      source: a run directory or one of its checkpoints, of the fusion model.
      target: must be new; is there whole or not at all.
      dtype: of the written weights; None keeps each as the checkpoint stores it.
      shard_bytes, layout: as in `save_hf`.

    Returns:
      The number of parameters.

    Raises:
      UserError: as `load_model` and `save_hf`.
    """
    loaded = checkpoint.load_model(source)
    stored = checkpoint.stored_dtypes(source, loaded.step)
    save_hf(loaded, target, shard_bytes, {path: _dtype(dtype, one) for path, one in stored.items()}, layout)
    return count_parameters(loaded.params)


def parse_bytes(text: str) -> int:
    """ "5GB", "500MB", "1.5GiB" or plain bytes, as transformers' max_shard_size.

    Raises:
      ValueError: something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no size; write it as 5GB, 500MB or 2GiB")
    return max(1, int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")))


def _dtype(name: str | None, otherwise: np.dtype) -> np.dtype:
    return next((one for one in DTYPES.values() if one.name == name), otherwise)


def _as(array: StreamedArray, dtype: str | None) -> StreamedArray:
    wanted = _dtype(dtype, array.dtype)

    def read(index: Index) -> np.ndarray:
        return array.read(index).astype(wanted, copy=False)

    return dataclasses.replace(array, dtype=wanted, read=read)
