"""Adapters put into the weights that they stand on, piece by piece: memory does not grow with the model."""

import dataclasses
from pathlib import Path

import numpy as np

from jfe_jax.checkpoint import base_model, model_io
from jfe_jax.checkpoint.base_model import BaseModelRef
from jfe_jax.checkpoint.model_io import StoredModel
from jfe_jax.checkpoint.streaming import Index, StreamedArray
from jfe_jax.config import LoraConfig
from jfe_jax.hf.load import open_hf
from jfe_jax.models import lora
from jfe_jax.models.lora import Kernel

Arrays = dict[str, StreamedArray]


def open_whole(path: str | Path) -> tuple[StoredModel, Path]:
    """A run or a Hugging Face directory with every parameter, adapters apart, and the very directory that they lie in.

    Raises:
      UserError: as `open_model`, `open_hf` and `base_model.read_base_ref`; what adapters stand on is not what it was.
    """
    path = Path(path).absolute()
    if (path / "config.json").is_file():
        weights = open_hf(path)
        return StoredModel(weights.config, weights.arrays, path, 0), path
    stored = model_io.open_model(path)
    run = stored.tokenizer_dir.parent
    place = run / model_io.CHECKPOINTS / str(stored.step)
    if not stored.config.model.lora.rank:
        return stored, place
    found = base_model.read_base_ref(run)
    beneath, _ = open_whole(found.path)
    base_model.check_fingerprint(found, base_model.fingerprint_stored(beneath.arrays), run)
    return stored._replace(arrays=merged(beneath.arrays, beneath.config.model.lora) | stored.arrays), place


def stand_on(path: str | Path) -> tuple[StoredModel, BaseModelRef]:
    """The model at `path` without adapters of its own, and how others refer to it. Raises UserError as `open_whole`."""
    stored, place = open_whole(path)
    return without_adapters(stored), BaseModelRef(place, base_model.fingerprint_stored(stored.arrays))


def without_adapters(stored: StoredModel) -> StoredModel:
    """The same model with its adapters merged; the kernels that had one are float32."""
    arrays = merged(stored.arrays, stored.config.model.lora)
    model = dataclasses.replace(stored.config.model, lora=LoraConfig())
    # What was trained whole besides has no adapters to be beside.
    optimizer = dataclasses.replace(stored.config.optimizer, train=())
    return stored._replace(arrays=arrays, config=dataclasses.replace(stored.config, model=model, optimizer=optimizer))


def merged(arrays: Arrays, cfg: LoraConfig) -> Arrays:
    """Every W of a pair as W + scale · A B in float32, as `lora.merge`, added up when a part is read."""
    made = {path: array for path, array in arrays.items() if not lora.is_adapter(path)}
    for kernel in lora.kernels(cfg):
        made[kernel.path] = _sum(kernel, made[kernel.path], *(arrays[path] for path in kernel.pair), cfg)
    return made


def lost_to(dtype: np.dtype, stored: StoredModel) -> float:
    """How much of what adapters change is lost when W + scale · A B is rounded to `dtype`: ‖lost‖ / ‖scale · A B‖."""
    lost = change = 0.0
    whole = merged(stored.arrays, stored.config.model.lora)
    for kernel in lora.kernels(stored.config.model.lora):
        before, after = stored.arrays[kernel.path], whole[kernel.path]
        for layer in range(before.shape[0]) if kernel.stacked else (None,):
            rest = tuple(slice(0, size) for size in before.shape[kernel.stacked :])
            index = rest if layer is None else (slice(layer, layer + 1), *rest)
            old, new = (array.read(index).astype(np.float32) for array in (before, after))
            kept = new.astype(dtype).astype(np.float32) - old
            lost += float(np.sum((kept - (new - old)) ** 2, dtype=np.float64))
            change += float(np.sum((new - old) ** 2, dtype=np.float64))
    return (lost / change) ** 0.5 if change else 0.0


def _sum(kernel: Kernel, weight: StreamedArray, a: StreamedArray, b: StreamedArray, cfg: LoraConfig) -> StreamedArray:
    scale, split = np.float32(lora.scale(cfg)), kernel.stacked + kernel.inner

    def read(index: Index) -> np.ndarray:
        lead, rank = index[: kernel.stacked], slice(0, cfg.rank)
        left = a.read((*index[:split], rank)).astype(np.float32)
        right = b.read((*lead, rank, *index[split:])).astype(np.float32)
        layers = left.shape[: kernel.stacked]
        product = left.reshape(*layers, -1, cfg.rank) @ right.reshape(*layers, cfg.rank, -1)
        own = weight.read(index).astype(np.float32)
        return own + scale * product.reshape(own.shape)

    return StreamedArray(weight.shape, np.dtype(np.float32), read)
