"""LoRA adapters as the library PEFT keeps them: adapter_model.safetensors and adapter_config.json, out and in.

PEFT's lora_A is [R, in], lora_B [out, R]: the pairs of models/lora.py as torch Linears. What was trained whole besides
stands under `modules_to_save`. Neither direction needs PEFT or torch.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jfe_jax.checkpoint.model_io import StoredModel, atomic_directory
from jfe_jax.config import LoraConfig
from jfe_jax.errors import UserError
from jfe_jax.hf import mapping
from jfe_jax.hf.load import parameter_shapes
from jfe_jax.hf.mapping import Piece
from jfe_jax.hf.model_card import known_results, model_card
from jfe_jax.hf.safetensors_io import DTYPES, Tensor, write_file
from jfe_jax.hf.save import copy_tokenizer
from jfe_jax.hf.settings import ENCODER_FILE, get_hf_format
from jfe_jax.models import lora
from jfe_jax.models.hf_json import write_json
from jfe_jax.models.hf_spec import Entry
from jfe_jax.models.lora import Kernel
from jfe_jax.models.paligemma import hf_names

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# How transformers names modules in memory, which is what PEFT looks for.
_IN_MEMORY = {
    hf_names.TEXT: "model.language_model.",
    hf_names.VISION: f"model.{hf_names.VISION}",
    hf_names.PROJECTOR: f"model.{hf_names.PROJECTOR}",
}
_ROOT = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
# Of adapter_config.json: what is read, or changes nothing of the embeddings; anything else has to be off.
_READ = {"r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "base_model_name_or_path"}
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision", "lora_dropout"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "megatron_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config"),
}
# These start from other weights than the base's, or change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """A PEFT directory, read.

    Attributes:
      lora: its settings.
      arrays: the pairs, and what was trained whole besides, by our dotted paths.
      whole: groups for `optimizer.train`.
      base: what it names as the model that it stands on, or "".
    """

    lora: LoraConfig
    arrays: dict[str, np.ndarray]
    whole: tuple[str, ...]
    base: str


def is_adapter(directory: str | Path) -> bool:
    """Whether PEFT wrote a directory."""
    return (Path(directory) / SETTINGS).is_file()


def base_named_by(directory: str | Path) -> str:
    """What a PEFT directory names as the model that it stands on, or ""."""
    return _settings(Path(directory)).get("base_model_name_or_path") or ""


def save_adapter(stored: StoredModel, out: str | Path, base_name: str, dtype: str | None = None) -> int:
    """Writes a directory that PEFT loads onto the base, and returns how many numbers it holds.

    Written beside `out` and renamed into place.

    Args:
      stored: a fusion model's checkpoint with adapters; only they, and what was trained besides, are looked at.
      out: must not exist, or be an empty directory.
      base_name: what PEFT is to take as the base; "" if nobody knows.
      dtype: of the written weights; None keeps them as they are stored.

    Raises:
      UserError: the model has no Hugging Face layout, or what was trained besides is no whole module; `out` is in use.
    """
    model = stored.config.model
    pieces = mapping.pieces(parameter_shapes(dataclasses.replace(model, lora=LoraConfig())))
    kernels = {kernel.path: kernel for kernel in lora.kernels(model.lora)}
    wanted = next((one for one in DTYPES.values() if one.name == dtype), None)
    arrays = {
        path: array.read(tuple(slice(0, size) for size in array.shape)).astype(wanted or array.dtype, copy=False)
        for path, array in stored.arrays.items()
    }
    tensors, adapted, whole = {}, [], {}
    for name, piece in pieces.items():
        module = _in_memory(name).rpartition(".")[0]
        kernel = kernels.get(piece.entry.ours)
        if kernel is not None:
            adapted.append(module)
            for side, entry, path in _sides(kernel):
                tensors[f"{_ROOT}{module}.lora_{side}.weight"] = entry.to_theirs(_layer(arrays[path], piece))
        whole.setdefault(module, []).append(piece.entry.ours in arrays)
        if piece.entry.ours in arrays:
            tensors[_ROOT + _in_memory(name)] = piece.entry.to_theirs(_layer(arrays[piece.entry.ours], piece))
    parts = [module for module, trained in whole.items() if any(trained) and (not all(trained) or module in adapted)]
    if parts:
        raise UserError(
            f"{out}: PEFT keeps whole modules, and of {', '.join(parts)} only a part was trained; export with --merge"
        )
    targets = dict.fromkeys(re.sub(r"\\\.\d+\\\.", lambda _: r"\.\d+\.", re.escape(module)) for module in adapted)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": model.lora.rank,
        "lora_alpha": int(model.lora.alpha) if model.lora.alpha == int(model.lora.alpha) else model.lora.alpha,
        "use_rslora": model.lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": "|".join(targets),
        "modules_to_save": [module for module, trained in whole.items() if all(trained)] or None,
    }
    hf_format = get_hf_format(model)
    try:
        with atomic_directory(out) as part:
            write_json(part / SETTINGS, settings)
            write_json(part / ENCODER_FILE, hf_format.encoder_json(model, stored.config.tokens))
            write_json(part / "preprocessor_config.json", hf_format.processor_json(model))
            copy_tokenizer(Path(stored.tokenizer_dir), part)
            results = known_results(Path(stored.tokenizer_dir).parent, stored.step)
            card = model_card(stored.config, stored.step, Path(out).name, results, "peft", base_name)
            (part / "README.md").write_text(card, encoding="utf-8")
            write_file(part / WEIGHTS, {name: _tensor(tensor) for name, tensor in tensors.items()})
    except OSError as error:
        raise UserError(f"{out}: cannot write it ({error.strerror}); nothing is left of it") from error
    return sum(tensor.size for tensor in tensors.values())


def open_adapter(directory: str | Path, shapes: dict[str, tuple[int, ...]]) -> Adapter:
    """Reads what PEFT wrote for a PaliGemma.

    Args:
      shapes: of the base's parameters, by dotted path.

    Raises:
      UserError: a file is missing or damaged; a setting that changes the model in another way than these adapters do;
        or tensors that have no place, a wrong shape, or lack their other half or other layers: all are listed.
    """
    directory = Path(directory)
    settings = _settings(directory)
    pieces = mapping.pieces(shapes)
    adaptable = {kernel.path: (name, kernel) for name, kernel in lora.KERNELS.items()}
    found: dict[str, dict[int | None, np.ndarray]] = {}
    wanted: dict[str, int] = {}
    problems, names = [], set()
    for key, tensor in _tensors(directory).items():
        pair = _PAIR.fullmatch(key.removeprefix(_ROOT))
        name = f"{pair['module']}.weight" if pair else key.removeprefix(_ROOT)
        known = mapping.canonical(re.sub(r"\.(modules_to_save|original_module)(\.default)?(?=\.)", "", name))
        if known is None:
            continue
        piece = pieces.get(known)
        if piece is None or (pair and piece.entry.ours not in adaptable):
            problems.append(f"{key} has no place")
            continue
        entry, path, shape = piece.entry, piece.entry.ours, piece.shape
        if pair:
            target, kernel = adaptable[path]
            names.add(target)
            a, b = _sides(kernel)
            _, entry, path = a if pair["side"] == "A" else b
            inner, outer = shape[: kernel.inner], shape[kernel.inner :]
            shape = (*inner, settings["r"]) if pair["side"] == "A" else (settings["r"], *outer)
        if tensor.shape != entry.their_shape(shape):
            problems.append(f"{key} has shape {list(tensor.shape)}, not {list(entry.their_shape(shape))}")
            continue
        found.setdefault(path, {})[piece.layer] = entry.to_ours(tensor, shape)
        wanted[path] = shapes[piece.entry.ours][0] if piece.layer is not None else 1
    for target in names:
        problems += [f"{target} lacks {path}" for path in lora.KERNELS[target].pair if path not in found]
    short = [path for path, layers in found.items() if len(layers) != wanted[path]]
    problems += [f"{path}: layers {sorted(found[path])} of {wanted[path]}; all or none are wanted" for path in short]
    if not names:
        problems.append("there are no adapters")
    if problems:
        raise UserError(f"{directory / WEIGHTS}: does not fit the base: {'; '.join(problems)}")
    arrays = {
        path: layers[None] if None in layers else np.stack([layers[layer] for layer in sorted(layers)])
        for path, layers in found.items()
    }
    cfg = LoraConfig(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        rslora=bool(settings.get("use_rslora")),
        targets=lora.targets(names),
    )
    whole = tuple(sorted(path for path in arrays if not lora.is_adapter(path)))
    return Adapter(cfg, arrays, whole, settings.get("base_model_name_or_path") or "")


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = tree.get("peft_type"), tree.get("r"), tree.get("lora_alpha")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot read PEFT's settings ({error})") from error
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind!r}; only 'LORA' is read")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}; both have to be numbers above 0")
    # None, False, {}, "none": off.
    bad = {key: value for key, value in tree.items() if value and key not in _READ | _HARMLESS}
    if bad.get("bias") == "none":
        del bad["bias"]
    if bad.get("init_lora_weights") in _PLAIN_STARTS:
        bad.pop("init_lora_weights", None)
    # Off by its kind, not by a value that is false.
    if bad:
        listed = ", ".join(f"{key} = {value!r}" for key, value in bad.items())
        raise UserError(f"{path}: not implemented here: {listed}; merge with PEFT (merge_and_unload) and import that")
    return tree


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    path = directory / WEIGHTS
    if not path.is_file():
        hint = "; save it again with safe_serialization=True" if (directory / "adapter_model.bin").exists() else ""
        raise UserError(f"{path}: not there{hint}")
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); copy it again") from error


def _sides(kernel: Kernel) -> tuple[tuple[str, Entry, str], tuple[str, Entry, str]]:
    a, b = kernel.pair
    return ("A", Entry(a, "lora_A.weight", kernel.inner), a), ("B", Entry(b, "lora_B.weight", 1), b)


def _in_memory(name: str) -> str:
    root = next(root for root in _IN_MEMORY if name.startswith(root))
    return _IN_MEMORY[root] + name.removeprefix(root)


def _layer(array: np.ndarray, piece: Piece) -> np.ndarray:
    return array if piece.layer is None else array[piece.layer]


def _tensor(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)
