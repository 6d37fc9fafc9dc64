"""Reads a Hugging Face PaliGemma directory, single file or sharded, without torch or transformers."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

# Gives NumPy the type bfloat16, which files have.
import ml_dtypes  # noqa: F401
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.hf import mapping
from jfe_jax.hf.settings import read_config
from jfe_jax.models import build_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_hf(directory: str | Path) -> tuple[Config, nnx.State]:
    """Opens a directory that transformers wrote.

    Returns:
      The configuration (`model` and `tokens` as the directory says, the rest default) and the parameters, float32 on
      the first device, in the tree of `nnx.split(build_model(config.model, …))`. Stored bfloat16 or float16 is widened,
      which loses nothing.

    Raises:
      UserError: a file is missing or damaged; or a tensor of the files has no place, a parameter no tensor, or the two
        another shape: all of them are listed.
    """
    directory = Path(directory)
    config = read_config(directory)
    abstract = nnx.split(nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0))))[1]
    flat = {".".join(path): leaf for path, leaf in nnx.to_flat_state(abstract)}
    pieces = mapping.pieces({path: leaf.shape for path, leaf in flat.items()})
    arrays = {path: np.empty(leaf.shape, np.float32) for path, leaf in flat.items()}
    problems, filled = [], set()
    for file in weight_files(directory):
        try:
            with safe_open(file, "numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    problems += _fill(name, tensors, pieces, arrays, filled)
        except SafetensorError as error:
            raise UserError(f"{file}: damaged ({error}); copy it again") from error
    problems += [f"{name} is missing" for name in pieces if name not in filled]
    if problems:
        raise UserError(f"{directory}: the weights do not fit config.json: {'; '.join(problems)}")
    return config, _with_values(abstract, arrays)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory.

    Raises:
      UserError: there is none, or one that the index names is missing.
    """
    if (directory / INDEX).exists():
        try:
            names = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{directory / INDEX}: not an index of safetensors ({error})") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{directory}: {INDEX} names files that are not there: {', '.join(missing)}")
        return [directory / name for name in names]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{directory}: only pickled weights ({', '.join(pickles)}), and opening those can run any code; "
            "save them as safetensors with transformers' save_pretrained"
        )
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX}")


def _fill(
    name: str, tensors: Any, pieces: dict[str, mapping.Piece], arrays: dict[str, np.ndarray], filled: set[str]
) -> list[str]:
    """Puts one tensor into its place; returns what is wrong with it."""
    known = mapping.canonical(name)
    if known is None:
        return []
    piece = pieces.get(known)
    if piece is None:
        return [f"{name} is unknown"]
    if known in filled:
        return [f"{name} is there twice"]
    filled.add(known)
    shape = tuple(tensors.get_slice(name).get_shape())
    wanted = piece.entry.their_shape(piece.shape)
    if shape != wanted:
        return [f"{name} has shape {list(shape)}, not {list(wanted)}"]
    target = arrays[piece.entry.ours]
    target = target if piece.layer is None else target[piece.layer]
    target[...] = piece.entry.to_ours(tensors.get_tensor(name), piece.shape)
    return []


def _with_values(abstract: nnx.State, arrays: dict[str, np.ndarray]) -> nnx.State:
    # Popped, so that no weight is held twice for longer than its own move.
    leaves = [
        (path, leaf.replace(jnp.asarray(arrays.pop(".".join(path))))) for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.from_flat_state(leaves)
