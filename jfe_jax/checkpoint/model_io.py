"""Saves and loads models as Orbax checkpoints, which restore onto any mesh and need no separate YAML config.

A run directory contains `config.yaml`, `tokenizer/`, `logs/` and `checkpoints/<step>/`. A checkpoint has the Orbax
checkpointables `params` (plain dict of the model's parameters), `train` (the rest of the training state), `data` (the
data iterator's state, one file per process) and `config` (the resolved config tree). A checkpoint without `train` and
`data` is a model only. In a LoRA run `params` contains the adapters and the other trained parameters, and `base.json`
locates the base weights.
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
# Model fields that may differ between a checkpoint and the model that loads it: they affect how the model computes, not
# its parameters.
RUNTIME_ONLY_FIELDS = ("dtype", "remat", "attention")


class LoadedModel(NamedTuple):
    """A model with its weights: `nnx.merge(graphdef, params)(packed)`.

    Attributes:
      config: Resolved config of the run.
      graphdef, params: As returned by `nnx.split`.
      tokenizer_dir: Directory of a Hugging Face tokenizer.
      step: Number of optimizer steps that the model was trained for.
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
    """Writes a run directory with a single checkpoint, at step 0, that contains only a model.

    The write is atomic: a temporary directory next to `path` is renamed to it at the end.

    Args:
      path: Must not exist, or be an empty directory.
      config: Resolved config, of which only `model` matters.
      params: nnx.State or plain dict. Either all leaves are StreamedArrays or none is.
      tokenizer_dir: Tokenizer directory to copy.
      base_ref: Base model, if `params` are adapters.

    Raises:
      UserError: `path` is in use, or the checkpoint cannot be written, or reading a StreamedArray raises it.
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
                f"{path}: cannot write the checkpoint ({explain_write_failure(error)}); partial files were removed"
            ) from error


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a new directory next to `path` to write into.

    The directory is renamed to `path` at the end, or removed after an exception.

    Raises:
      UserError: `path` exists and is not an empty directory.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists; choose another directory or remove it")
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            path.rmdir()
        part.rename(path)
    except BaseException:
        # Threads may still be writing after an interrupt. Renaming first makes their paths invalid.
        gone = part.with_suffix(".gone")
        part.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        raise


def write_run_files(run: Path, config: Config, tokenizer_dir: Path) -> None:
    """Creates a run directory with its `config.yaml` and `tokenizer/`."""
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
    """Loads a model with its parameters.

    Args:
      path: A run directory (the newest readable checkpoint is loaded), or its `checkpoints/<step>` or `best`.
      mesh: Mesh to place the parameters on; None is the first device. If all its devices belong to this process, only
        this process loads the model. Otherwise every process must call this function.
      dtype: Dtype of the loaded parameters, such as "bfloat16"; None keeps the stored dtype, which is float32 after
        training.
      validate: Called with the config and the checkpoint's directory before anything large is read; may raise.

    Raises:
      UserError: There is no checkpoint, none can be read, or the base model of adapters is missing.
    """
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices())
    for step, ckpt_dir in _list_checkpoints(Path(path)):
        try:
            config = read_config(ckpt_dir, single_process=not mesh.is_multi_process)
            if validate:
                validate(config, ckpt_dir)
            # The attention implementation of training may need its accelerator and its row length.
            plan = blueprint(dataclasses.replace(config.model, attention="xla"), mesh)
            if dtype:
                plan = plan._replace(abstract=_with_dtype(plan.abstract, dtype))
            params = nnx.State(_load_params(ckpt_dir, plan, mesh))
        except UserError:
            raise
        except Exception as error:
            failure = f"{ckpt_dir} is damaged ({flatten_message(error)})"
            continue
        return LoadedModel(config, plan.graphdef, params, ckpt_dir.parent.parent / TOKENIZER, step)
    raise UserError(f"{path}: no checkpoint can be read; {failure}")


def check_same_model(saved: ModelConfig, current: ModelConfig, path: str) -> None:
    """Raises UserError, with the differing keys, if the weights of one model do not fit the other."""
    runtime_fields = {name: getattr(current, name) for name in RUNTIME_ONLY_FIELDS}
    differing = configs.differing_keys(dataclasses.replace(saved, **runtime_fields), current)
    if differing:
        raise UserError(f"{path}: different model: {'; '.join(f'model.{key}' for key in differing)}")


class StoredModel(NamedTuple):
    """A model on disk.

    Attributes:
      config: Resolved config of the run.
      arrays: Parameters by dotted path, in their stored dtypes.
      tokenizer_dir, step: As in LoadedModel.
    """

    config: Config
    arrays: dict[str, StreamedArray]
    tokenizer_dir: Path
    step: int


def open_model(path: str | Path) -> StoredModel:
    """Opens a model without reading its parameters.

    Args:
      path: As for `load_model`.

    Raises:
      UserError: There is no checkpoint, or it is damaged.
    """
    step, ckpt_dir = _list_checkpoints(Path(path))[0]
    try:
        arrays = open_stored_arrays(ckpt_dir / "params")
        return StoredModel(read_config(ckpt_dir), arrays, ckpt_dir.parent.parent / TOKENIZER, step)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{ckpt_dir} is damaged ({flatten_message(error)}); choose another checkpoint of the run"
        ) from error


def find_tokenizer(path: str | Path) -> Path:
    """Returns the tokenizer directory of a run directory or of one of its checkpoints.

    Raises:
      UserError: There is no checkpoint.
    """
    return _list_checkpoints(Path(path))[0][1].parent.parent / TOKENIZER


def find_latest_step(run: str | Path) -> int | None:
    """Returns the step of the newest complete checkpoint, without opening it; None if there is none."""
    directory = Path(run) / CHECKPOINTS
    steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []
    return max(steps, default=None)


def _list_checkpoints(path: Path) -> list[tuple[int, Path]]:
    # Resolves `best`, which is a symbolic link to a checkpoint.
    path = path.resolve()
    require_checkpoint_path(path, "checkpoint")
    if (path / "_CHECKPOINT_METADATA").exists() and path.name.isdigit():
        return [(int(path.name), path)]
    directory = path / CHECKPOINTS
    ckpt_dirs = [child for child in directory.iterdir() if child.name.isdigit()] if directory.is_dir() else []
    if not ckpt_dirs:
        raise UserError(f"{path}: no checkpoint there; give a run directory of `jfe train` or one of its checkpoints")
    return sorted(((int(child.name), child) for child in ckpt_dirs), reverse=True)


def read_config(ckpt_dir: Path, *, single_process: bool = False) -> Config:
    """Reads the resolved config of a checkpoint directory; `single_process` as for `restore_checkpointable`."""
    tree = restore_checkpointable(ckpt_dir, "config", None, single_process=single_process)
    return configs.from_dict(tree, f"{ckpt_dir}/config")


def _with_dtype(abstract: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.numpy.dtype(dtype), sharding=leaf.sharding), abstract
    )


def _load_params(ckpt_dir: Path, plan: Blueprint, mesh: Mesh) -> dict[str, Any]:
    stored, single_process = read_stored_names(ckpt_dir / "params"), not mesh.is_multi_process
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in stored, plan.abstract)
    if not any(map(lora.is_adapter, stored)) or all(jax.tree.leaves(mask)):
        return restore_checkpointable(ckpt_dir, "params", plan.abstract, single_process=single_process)
    # Read the small adapter first, so that damage surfaces before the base model is loaded.
    trained = restore_checkpointable(
        ckpt_dir, "params", pytrees.select(plan.abstract, mask), single_process=single_process
    )
    base = restore_base_params(ckpt_dir.parent.parent, mesh)
    base = jax.tree.map(lambda leaf, abstract: leaf.astype(abstract.dtype), base, lora.without_adapters(plan.abstract))
    return pytrees.overlay(base, trained)


def restore_base_params(run: Path, mesh: Mesh) -> dict[str, Any]:
    """Restores the base weights of a run's adapters onto a mesh.

    Raises:
      UserError: As `base_model.load_base_params` raises it.
    """

    def load(path: Path) -> tuple[LoraConfig, dict[str, Any]]:
        if (path / "config.json").is_file():
            # Imported here because `hf` imports this module.
            from jfe_jax.hf.load import load_hf

            config, params = load_hf(path, mesh)
            return config.model.lora, nnx.to_pure_dict(params)
        loaded = load_model(path, mesh)
        return loaded.config.model.lora, nnx.to_pure_dict(loaded.params)

    return base_model.load_base_params(run, load)


def restore_checkpointable(ckpt_dir: Path, name: str, abstract: Any, *, single_process: bool = False) -> Any:
    """Restores one checkpointable of a checkpoint directory.

    Args:
      ckpt_dir: Checkpoint directory.
      name: Name of the checkpointable, such as "params".
      abstract: Abstract tree to restore into.
      single_process: If true, this process restores onto its own devices without the others. If false, every process
        must call this, and no call returns before all have finished.

    Raises:
      Exception: Whatever Orbax raises if the checkpointable is damaged.
    """
    context = orbax_context()
    if single_process:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    # One checkpointable at a time: if one of several fails, Orbax leaves the coroutines of the others running.
    with context:
        return ocp.load_checkpointables(ckpt_dir, {name: abstract})[name]


def orbax_context() -> ocp.Context:
    """Returns the Orbax context for reading and writing all checkpoints, with `config` stored as JSON."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return with_per_layer_chunks(context)


def explain_write_failure(error: Exception) -> str:
    """Returns the reason of a failed write: the system's error message, if the storage library has wrapped it."""
    text = flatten_message(error)
    messages = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS))
    return next((message for message in messages if message in text), text)


def flatten_message(error: Exception) -> str:
    """Returns an exception's message on one line, truncated to 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


class _OrbaxLogFilter(logging.Filter):
    """Drops redundant log records of Orbax.

    Those are tracebacks of errors in Orbax's threads, which also reach the caller as exceptions, and the notice that
    there is no OCDBT to merge in checkpoints that do not use it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        redundant = record.levelno >= logging.ERROR or "Skipping merge of OCDBT" in str(record.msg)
        return not ("orbax" in record.pathname and redundant)


logging.getLogger("absl").addFilter(_OrbaxLogFilter())
