"""Writes a model as a Hugging Face directory that transformers opens as PaliGemmaForConditionalGeneration."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jfe_jax.checkpoint import written_whole
from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.hf import mapping
from jfe_jax.hf.card import known_results, model_card
from jfe_jax.hf.load import INDEX, SINGLE
from jfe_jax.hf.sentence_transformers import add_layout
from jfe_jax.hf.settings import ENCODER_FILE, config_json, encoder_json, processor_json

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
    NAMES_FILE,
)


def save_hf(
    loaded: Any,
    out: str | Path,
    shard_bytes: int = SHARD_BYTES,
    dtypes: Mapping[str, np.dtype] | None = None,
    layout: Layout = "transformers",
) -> None:
    """Writes config.json, safetensors, the tokenizer, the image processor's settings and a model card.

    Written beside `out` and renamed into place, so that `out` is there whole or not at all. The tensors are named as in
    the files that the model came from, or else as transformers writes them.

    Args:
      loaded: a `checkpoint.LoadedModel` of the fusion model.
      out: must not exist, or be an empty directory.
      shard_bytes: weights are split into files of at most this size (a larger tensor has one of its own).
      dtypes: what each parameter, by dotted path, is written as; float32 where it says nothing.
      layout: "sentence-transformers" adds what that library needs to open the directory.

    Raises:
      UserError: the model has no Hugging Face layout, `out` is in use, the tokenizer is missing, or the disk is full.
    """
    config: Config = loaded.config
    if config.model.kind != "fusion":
        raise UserError(f"model.kind is {config.model.kind!r}: only the fusion model has a Hugging Face layout for now")
    special = special_ids(Path(loaded.tokenizer_dir))
    with written_whole(out) as part:
        _write_json(part / "config.json", config_json(config.model, special) | {"dtype": _main(dtypes)})
        _write_json(part / ENCODER_FILE, encoder_json(config.model, config.tokens))
        _write_json(part / "preprocessor_config.json", processor_json(config.model))
        copy_tokenizer(Path(loaded.tokenizer_dir), part)
        results = known_results(Path(loaded.tokenizer_dir).parent, loaded.step)
        card = model_card(config, loaded.step, Path(out).name, results, layout)
        (part / "README.md").write_text(card, encoding="utf-8")
        if layout == "sentence-transformers":
            add_layout(part)
        try:
            write_weights(part, _tensors(loaded.params, dtypes, _names(Path(loaded.tokenizer_dir))), shard_bytes)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{out}: cannot write the weights ({error}); nothing is left of it") from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to a tokenizer, and nothing else of the directory, into the existing `target`."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: no tokenizer there ({', '.join(TOKENIZER_FILES)})")
    for path in found:
        shutil.copyfile(path, target / path.name)


def special_ids(directory: Path) -> dict[str, int]:
    """Ids of "bos", "eos" and "pad", which transformers wants in config.json."""
    settings, vocabulary = (_read_json(directory / name) for name in ("tokenizer_config.json", "tokenizer.json"))
    added = {token["content"]: token["id"] for token in vocabulary.get("added_tokens", [])}
    known = vocabulary.get("model", {}).get("vocab", {})
    ids = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        number = added.get(token, known.get(token) if isinstance(known, dict) else None)
        if number is None:
            raise UserError(f"{directory}: the tokenizer names no {name}_token of its vocabulary")
        ids[name] = number
    return ids


def _tensors(
    params: nnx.State, dtypes: Mapping[str, np.dtype] | None, prefixes: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    flat = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(params)}
    for name, piece in mapping.pieces({path: leaf.shape for path, leaf in flat.items()}).items():
        leaf, dtype = flat[piece.entry.ours], (dtypes or {}).get(piece.entry.ours, np.dtype(np.float32))
        tensor = piece.entry.to_theirs(np.asarray(leaf if piece.layer is None else leaf[piece.layer]).astype(dtype))
        for ours, theirs in prefixes.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        yield name, tensor


def _names(tokenizer: Path) -> dict[str, str]:
    return _read_json(tokenizer / NAMES_FILE) if (tokenizer / NAMES_FILE).exists() else {}


def _main(dtypes: Mapping[str, np.dtype] | None) -> str:
    """The type that config.json names: that of most parameters."""
    return Counter(map(str, dtypes.values())).most_common(1)[0][0] if dtypes else "float32"


def write_weights(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Writes one safetensors file, or several of at most `shard_bytes` and their index."""
    # One shard in memory at a time; how many there are is known at the end, and so are their names.
    shards: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        save_file(batch, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and sum(held.nbytes for held in batch.values()) + tensor.nbytes > shard_bytes:
            flush()
        batch[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
