"""Hugging Face directory ↔ run directory, piece by piece: memory does not grow with the model."""

import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jfe_jax.checkpoint import base_model as base_lib
from jfe_jax.checkpoint import model_io
from jfe_jax.checkpoint.model_io import StoredModel
from jfe_jax.checkpoint.streaming import StreamedArray
from jfe_jax.config import Config, TokensConfig, from_dict
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.errors import UserError
from jfe_jax.hf import lora_merge, peft
from jfe_jax.hf.load import open_hf
from jfe_jax.hf.safetensors_io import DTYPES
from jfe_jax.hf.save import NAMES_FILE, SHARD_BYTES, Layout, Outgoing, copy_tokenizer, save_hf
from jfe_jax.hf.settings import ENCODER_FILE
from jfe_jax.models.hf_json import read_json, write_json
from jfe_jax.utils.pytrees import unflatten


def from_hf(source: str | Path, target: str | Path, dtype: str | None = None, beneath: str = "") -> int:
    """Writes a run directory at step 0 that `jfe train` takes as `init` and every other verb opens.

    Args:
      source: directory of safetensors, config.json and tokenizer; or PEFT's, of adapters.
      target: must be new; is there whole or not at all.
      dtype: of the stored weights; None keeps each as it is.
      beneath: of adapters: the Hugging Face directory or the run that they stand on, which `target` refers to; ""
        takes what PEFT's settings name.

    Returns:
      The number of parameters.

    Raises:
      UserError: as `open_hf`, `peft.open_adapter` and `save_model`, or the tokenizer does not fit the model.
    """
    if peft.is_adapter(source):
        return _from_peft(Path(source), target, dtype, beneath)
    if beneath:
        raise UserError(f"--base: {source} has no {peft.SETTINGS}; only adapters stand on something")
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
        write_json(Path(tokenizer) / NAMES_FILE, weights.prefixes)
        config = dataclasses.replace(weights.config, output=str(target))
        model_io.save_model(target, config, tree, tokenizer)
    return sum(array.size for array in weights.arrays.values())


def to_hf(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = "transformers",
    merge: bool = False,
    beneath: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Writes a directory that transformers opens; of a run with adapters one that PEFT opens, unless they are merged.

    Args:
      source: a run directory or one of its checkpoints, of the fusion model or a dual encoder.
      target: must be new; is there whole or not at all.
      dtype: of the written weights; None keeps each as the checkpoint stores it.
      shard_bytes, layout: as in `save_hf`.
      merge: adds adapters to the weights that they stand on; everything is then float32 unless `dtype` says otherwise.
      beneath: what PEFT is to take as the base of adapters; "" takes what they were trained on.
      say: takes a warning for a person: what rounding merged weights to `dtype` loses.

    Returns:
      The number of parameters.

    Raises:
      UserError: as `open_model`, `save_hf`, `peft.save_adapter`; there is nothing to merge, or it has to be.
    """
    stored = model_io.open_model(source)
    if stored.config.model.lora.rank and not merge:
        if layout != "transformers":
            raise UserError(f"--layout {layout}: {source} has adapters apart; add --merge")
        return peft.save_adapter(stored, target, beneath or _base_name(stored), dtype)
    if merge and not stored.config.model.lora.rank:
        raise UserError(f"--merge: {source} has no adapters")
    if beneath:
        raise UserError("--base names what adapters stand on; with --merge they stand on nothing")
    if merge:
        whole, _ = lora_merge.open_whole(source)
        narrow = next((one for one in DTYPES.values() if one.name == dtype and one.itemsize < 4), None)
        if narrow is not None:
            lost = lora_merge.lost_to(narrow, whole)
            say(f"warning: {dtype} loses {lost:.1%} of what the adapters change; without --dtype nothing is lost")
        stored, dtype = lora_merge.without_adapters(whole), dtype or "float32"
    arrays = {path: _as(array, dtype) for path, array in stored.arrays.items()}
    save_hf(Outgoing(stored.config, arrays, stored.tokenizer_dir, stored.step), target, shard_bytes, layout)
    return sum(array.size for array in arrays.values())


def _from_peft(source: Path, target: str | Path, dtype: str | None, beneath: str) -> int:
    named = beneath or peft.base_named_by(source)
    if not Path(named or "/nowhere").is_dir():
        raise UserError(f"{source}: stands on {named or 'a model it does not name'}; give its directory as --base")
    stored, base = lora_merge.stand_on(named)
    adapter = peft.open_adapter(source, {path: array.shape for path, array in stored.arrays.items()})
    arrays = {path: _as(_held(array), dtype) for path, array in adapter.arrays.items()}
    config = stored.config
    # How items were laid out and pooled in training; PEFT does not say.
    encoder = read_json(source / ENCODER_FILE) if (source / ENCODER_FILE).exists() else {}
    how = {name: encoder.pop(name, getattr(config.model, name)) for name in ("pooling", "dtype")}
    tokens = dataclasses.asdict(config.tokens) | encoder
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora=adapter.lora, **how),
        tokens=from_dict(tokens, str(source / ENCODER_FILE), TokensConfig),
        optimizer=dataclasses.replace(config.optimizer, freeze=(), train=adapter.whole),
        init=str(named),
        output=str(target),
    )
    with tempfile.TemporaryDirectory() as tokenizer:
        copy_tokenizer(stored.tokenizer_dir, Path(tokenizer))
        model_io.save_model(target, config, unflatten(arrays), tokenizer, base)
    return sum(array.size for array in arrays.values())


def _base_name(stored: StoredModel) -> str:
    """The Hugging Face directory beneath adapters: they stand on it, or on what was imported from it."""
    beneath = base_lib.read_base_ref(stored.tokenizer_dir.parent)
    if (beneath.path / "config.json").is_file():
        return str(beneath.path)
    place = Path(model_io.open_model(beneath.path).config.tokens.tokenizer).absolute()
    # It may have been trained since, or the directory be another's.
    if (place / "config.json").is_file():
        try:
            same = base_lib.fingerprint_stored(open_hf(place).arrays) == beneath.fingerprint
        except UserError:
            same = False
        return str(place) if same else ""
    return ""


def _held(array: np.ndarray) -> StreamedArray:
    return StreamedArray(array.shape, array.dtype, array.__getitem__)


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
