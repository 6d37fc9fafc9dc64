"""Checkpoints: written while training goes on, restored onto any mesh, opened without their YAML.

A run directory holds `config.yaml`, `tokenizer/`, `logs/` and `checkpoints/<step>/`, the last with the Orbax
checkpointables `params` (plain dict of the model's parameters), `train` (the rest of the training state), `data` (the
data iterator's position, one file per process) and `config` (the resolved tree). One without `train` and `data` is a
model only. With adapters `params` holds them and what is trained besides; `base.json` says where the rest lies.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from jfe_jax import config as configs
from jfe_jax.checkpoint import base_model, direct_io
from jfe_jax.checkpoint.streaming import (
    StreamedArray,
    open_stored_arrays,
    read_stored_names,
    streaming_context,
    with_per_layer_chunks,
)
from jfe_jax.config import Config, LoraConfig, MeshConfig, ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.models import lora
from jfe_jax.models.abstract_model import Blueprint, blueprint
from jfe_jax.parallel.sharding import make_mesh, path_name
from jfe_jax.utils import pytrees
from jfe_jax.utils.local_paths import require_checkpoint_path

CHECKPOINTS, TOKENIZER, CONFIG, BEST = "checkpoints", "tokenizer", "config.yaml", "best"
# What may differ between a checkpoint's model and the one that takes its weights: how it computes, not what it is.
RUNTIME_ONLY_FIELDS = ("dtype", "remat", "attention")


class LoadedModel(NamedTuple):
    """A model with its weights: `nnx.merge(graphdef, params)(packed)`.

    Attributes:
      config: the run's resolved config.
      graphdef, params: of `nnx.split`.
      tokenizer_dir: a Hugging Face tokenizer's directory.
      step: optimizer steps it was trained for.
    """

    config: Config
    graphdef: Any
    params: nnx.State
    tokenizer_dir: Path
    step: int


def save_model(
    path: str | Path,
    config: Config,
    params: Any,
    tokenizer_dir: str | Path,
    base_ref: base_model.BaseModelRef | None = None,
) -> None:
    """Writes a run directory at step 0 that holds only a model.

    Written beside `path` and renamed into place, so that it is there whole or not at all.

    Args:
      path: must not exist, or be an empty directory.
      config: the resolved config; its `model` is what counts.
      params: nnx.State or plain dict; its leaves may be StreamedArrays (all of them, if any).
      tokenizer_dir: is copied.
      base_ref: where the parameters lie that `params` lacks, which are adapters then.

    Raises:
      UserError: `path` is in use, or the checkpoint cannot be written; what reading a StreamedArray raises.
    """
    require_checkpoint_path(path, "checkpoint")
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    streamed = any(isinstance(leaf, StreamedArray) for leaf in jax.tree.leaves(pure))
    with atomic_directory(path) as run:
        write_run_files(run, config, Path(tokenizer_dir))
        if base_ref is not None:
            base_model.write_base_ref(run, base_ref)
        target = run / CHECKPOINTS / "0"
        target.parent.mkdir()
        try:
            with streaming_context(orbax_context()) if streamed else orbax_context():
                ocp.save_checkpointables(target, {"params": pure, "config": dataclasses.asdict(config)})
            if streamed:
                direct_io.sync_file_system(target)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{path}: cannot write the checkpoint ({explain_write_failure(error)}); nothing is left of it"
            ) from error


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A new directory beside `path` to write into; renamed to `path` at the end, removed after an exception.

    Raises:
      UserError: `path` is something else than an empty directory.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; choose another directory or remove it")
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            path.rmdir()
        part.rename(path)
    except BaseException:
        # Threads may still write after an interrupt: under the other name they find nothing to write to.
        gone = part.with_suffix(".gone")
        part.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        raise


def write_run_files(run: Path, config: Config, tokenizer_dir: Path) -> None:
    """`config.yaml` and `tokenizer/` of a run directory, which is made."""
    run.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir.absolute() != (run / TOKENIZER).absolute():
        shutil.copytree(tokenizer_dir, run / TOKENIZER, dirs_exist_ok=True)
    (run / CONFIG).write_text(configs.to_yaml(config), encoding="utf-8")


def load_model(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    validate: Callable[[Config, Path], None] | None = None,
) -> LoadedModel:
    """Opens a model for use.

    Args:
      path: a run directory (its newest checkpoint that can be read is taken), or `checkpoints/<step>` or `best` of it.
      mesh: where the parameters are to lie; None is the first device. One of this process's devices is opened by this
        process alone, another by all of them together.
      dtype: to hold the parameters in, as "bfloat16"; None is what they are stored in, float32 after training.
      validate: is given the config and the checkpoint's directory before anything large is read; may raise.

    Raises:
      UserError: no checkpoint there, or none that can be read; or what adapters stand on is not there.
    """
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices())
    for step, place in _list_checkpoints(Path(path)):
        try:
            config = read_config(place, alone=not mesh.is_multi_process)
            if validate:
                validate(config, place)
            # How training attends may need its accelerator, and its length of rows.
            plan = blueprint(dataclasses.replace(config.model, attention="xla"), mesh)
            if dtype:
                plan = plan._replace(abstract=_with_dtype(plan.abstract, dtype))
            params = nnx.State(_load_params(place, plan, mesh))
        except UserError:
            raise
        except Exception as error:
            failure = f"{place} is damaged ({flatten_message(error)})"
            continue
        return LoadedModel(config, plan.graphdef, params, place.parent.parent / TOKENIZER, step)
    raise UserError(f"{path}: no checkpoint can be read; {failure}")


def check_same_model(saved: ModelConfig, wanted: ModelConfig, place: str) -> None:
    """Raises UserError, with the differing keys, if weights of one model do not fit the other."""
    same = {name: getattr(wanted, name) for name in RUNTIME_ONLY_FIELDS}
    differing = configs.differing_keys(dataclasses.replace(saved, **same), wanted)
    if differing:
        raise UserError(f"{place}: another model: {'; '.join(f'model.{key}' for key in differing)}")


class StoredModel(NamedTuple):
    """A model that lies on the disk.

    Attributes:
      config: the run's resolved config.
      arrays: its parameters by dotted path, in the types that they are stored in.
      tokenizer_dir, step: as in LoadedModel.
    """

    config: Config
    arrays: dict[str, StreamedArray]
    tokenizer_dir: Path
    step: int


def open_model(path: str | Path) -> StoredModel:
    """Opens a model without reading it.

    Args:
      path: as for `load_model`.

    Raises:
      UserError: no checkpoint there, or one that is damaged.
    """
    step, place = _list_checkpoints(Path(path))[0]
    try:
        arrays = open_stored_arrays(place / "params")
        return StoredModel(read_config(place), arrays, place.parent.parent / TOKENIZER, step)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place} is damaged ({flatten_message(error)}); name another of the run's checkpoints"
        ) from error


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer's directory of a run directory or of one of its checkpoints.

    Raises:
      UserError: no checkpoint there.
    """
    return _list_checkpoints(Path(path))[0][1].parent.parent / TOKENIZER


def find_latest_step(run: str | Path) -> int | None:
    """The newest complete checkpoint's step, without opening it; None if there is none."""
    directory = Path(run) / CHECKPOINTS
    found = [int(path.name) for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []
    return max(found, default=None)


def _list_checkpoints(path: Path) -> list[tuple[int, Path]]:
    # `best` is a link to one.
    path = path.resolve()
    require_checkpoint_path(path, "checkpoint")
    if (path / "_CHECKPOINT_METADATA").exists() and path.name.isdigit():
        return [(int(path.name), path)]
    directory = path / CHECKPOINTS
    found = [child for child in directory.iterdir() if child.name.isdigit()] if directory.is_dir() else []
    if not found:
        raise UserError(f"{path}: no checkpoint there; give a run directory of `jfe train` or one of its checkpoints")
    return sorted(((int(child.name), child) for child in found), reverse=True)


def read_config(place: Path, *, alone: bool = False) -> Config:
    """The resolved config of the checkpoint directory `place`; `alone` as for `restore_checkpointable`."""
    return configs.from_dict(restore_checkpointable(place, "config", None, alone=alone), f"{place}/config")


def _with_dtype(abstract: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.numpy.dtype(dtype), sharding=leaf.sharding), abstract
    )


def _load_params(place: Path, plan: Blueprint, mesh: Mesh) -> dict[str, Any]:
    held, alone = read_stored_names(place / "params"), not mesh.is_multi_process
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in held, plan.abstract)
    if not any(map(lora.is_adapter, held)) or all(jax.tree.leaves(mask)):
        return restore_checkpointable(place, "params", plan.abstract, alone=alone)
    # First what is small and may be damaged.
    own = restore_checkpointable(place, "params", pytrees.select(plan.abstract, mask), alone=alone)
    beneath = restore_base_params(place.parent.parent, mesh)
    beneath = jax.tree.map(
        lambda leaf, wanted: leaf.astype(wanted.dtype), beneath, lora.without_adapters(plan.abstract)
    )
    return pytrees.overlay(beneath, own)


def restore_base_params(run: Path, mesh: Mesh) -> dict[str, Any]:
    """The weights that the adapters of a run stand on, on a mesh. Raises UserError as `base_model.load_base_params`."""

    def load(path: Path) -> tuple[LoraConfig, dict[str, Any]]:
        if (path / "config.json").is_file():
            # Where Hugging Face's names are known.
            from jfe_jax.hf.load import load_hf

            config, params = load_hf(path, mesh)
            return config.model.lora, nnx.to_pure_dict(params)
        loaded = load_model(path, mesh)
        return loaded.config.model.lora, nnx.to_pure_dict(loaded.params)

    return base_model.load_base_params(run, load)


def restore_checkpointable(place: Path, part: str, abstract: Any, *, alone: bool = False) -> Any:
    """One checkpointable of the directory `place`, into its abstract tree; whatever Orbax raises if it is damaged.

    Args:
      alone: by this process, onto its own devices; else every process calls it, and none is done before all are.
    """
    context = orbax_context()
    if alone:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    # Not several at once: Orbax leaves the others' coroutines behind when one fails.
    with context:
        return ocp.load_checkpointables(place, {part: abstract})[part]


def orbax_context() -> ocp.Context:
    """How all checkpoints are written and read: `config` as JSON."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return with_per_layer_chunks(context)


def explain_write_failure(error: Exception) -> str:
    """Why writing failed: the system's own words, where the storage library has wrapped them."""
    text = flatten_message(error)
    words = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS))
    return next((one for one in words if one in text), text)


def flatten_message(error: Exception) -> str:
    """An exception's message without line breaks, cut to what a line holds."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


class _OrbaxLogFilter(logging.Filter):
    """Drops the tracebacks that Orbax's threads log of errors which then reach the caller as exceptions, and that there
    is no OCDBT to merge where none is wanted."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = record.levelno >= logging.ERROR or "Skipping merge of OCDBT" in str(record.msg)
        return not ("orbax" in record.pathname and told)


logging.getLogger("absl").addFilter(_OrbaxLogFilter())
