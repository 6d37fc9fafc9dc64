"""Checkpoints: written while training goes on, restored onto any mesh, opened without their YAML.

A run directory holds `config.yaml`, `tokenizer/`, `logs/` and `checkpoints/<step>/`, the last with the Orbax
checkpointables `params` (plain dict of the model's parameters), `train` (the rest of the training state), `data` (the
data iterator's position, one file per process) and `config` (the resolved tree). One without `train` and `data` is a
model only.
"""

import dataclasses
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from jfe_jax import config as configs
from jfe_jax.blueprint import Blueprint, blueprint
from jfe_jax.config import Config, MeshConfig, ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.sharding import make_mesh

CHECKPOINTS, TOKENIZER, CONFIG = "checkpoints", "tokenizer", "config.yaml"
# What may differ between a checkpoint's model and the one that takes its weights: how it computes, not what it is.
FREE = ("dtype", "remat")


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


class Saved(NamedTuple):
    """What a run continues from."""

    step: int
    params: Any
    train: Any
    data: Any


class RunCheckpoints:
    """The checkpoints of one training run, newest good one first. Writing happens in the background."""

    def __init__(self, run: Path, keep: int, warn: Callable[[str], None]):
        """Opens `run`/checkpoints, or makes it; what a killed process left half-written is removed, named to `warn`."""
        self._directory = run.absolute() / CHECKPOINTS
        self._warn = warn
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_half_written()
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            context=_context(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )

    def steps(self) -> list[int]:
        """Steps that there is a checkpoint of, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, config: Config, params: Any, train: Any, data: Any) -> None:
        """Starts to write; the arrays may be donated as soon as this returns. Waits for the save before, if need be.

        Raises:
          UserError: this or the previous checkpoint cannot be written (a full disk); older ones are intact.
        """
        parts = {"params": params, "train": train, "data": _IteratorState(data), "config": dataclasses.asdict(config)}
        try:
            self._checkpointer.save_checkpointables_async(step, parts, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until everything is on disk. Raises as `save` does."""
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits and releases. Raises as `save` does."""
        try:
            self._checkpointer.close()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, config: Config, abstract_params: Any, abstract_train: Any) -> Saved | None:
        """The newest checkpoint that can be read, on the shardings of the abstract trees; None if there is none.

        A damaged checkpoint is named in a line to `warn`, set aside in `damaged/`, and the one before is used.

        Raises:
          UserError: the checkpoint is of another model or optimizer layout (the differing keys are listed), or every
            checkpoint is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self._directory / str(step)
            try:
                saved = _read_config(path)
                data = _IteratorState()
                refuse_other_model(saved.model, config.model, str(path))
                _refuse_other_state(saved, config, str(path))
                with _context():
                    ocp.load_checkpointables(path, {"data": data})
                    loaded = ocp.load_checkpointables(path, {"params": abstract_params, "train": abstract_train})
                return Saved(step, loaded["params"], loaded["train"], data.state)
            except UserError:
                raise
            except Exception as error:
                self._set_aside(path, error)
        if steps:
            raise UserError(f"{self._directory}: no checkpoint can be read; they are in {self._damaged}")
        return None

    @property
    def _damaged(self) -> Path:
        return self._directory.parent / "damaged"

    def _set_aside(self, path: Path, error: Exception) -> None:
        self._damaged.mkdir(exist_ok=True)
        target = self._damaged / path.name
        if target.exists():
            shutil.rmtree(target)
        path.rename(target)
        self._checkpointer.reload()
        self._warn(
            f"warning: checkpoint {path} is damaged ({_one_line(error)}); moved to {target}, using the one before"
        )

    def _remove_half_written(self) -> None:
        for path in sorted(self._directory.iterdir()):
            if path.is_dir() and ".orbax-checkpoint-tmp" in path.name:
                self._warn(f"warning: checkpoint {path} is half-written; removed, using the one before")
                shutil.rmtree(path)

    def _failed(self, error: Exception) -> UserError:
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        good = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())
        kept = f"step {good[-1]} is intact" if good else "there is none before it"
        return UserError(f"{self._directory}: cannot write the checkpoint ({_one_line(error)}); {kept}")


def save_model(path: str | Path, config: Config, params: Any, tokenizer_dir: str | Path) -> None:
    """Writes a run directory at step 0 that holds only a model.

    Args:
      path: must hold no checkpoint yet.
      config: the resolved config; its `model` is what counts.
      params: nnx.State or plain dict.
      tokenizer_dir: is copied.

    Raises:
      UserError: there is a checkpoint already, or it cannot be written.
    """
    run = Path(path).absolute()
    if (run / CHECKPOINTS).exists() and any((run / CHECKPOINTS).iterdir()):
        raise UserError(f"{run}: holds checkpoints already; choose another directory")
    write_run_files(run, config, Path(tokenizer_dir))
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    target = run / CHECKPOINTS / "0"
    target.parent.mkdir(exist_ok=True)
    try:
        with _context():
            ocp.save_checkpointables(target, {"params": pure, "config": dataclasses.asdict(config)})
    except Exception as error:
        raise UserError(f"{target}: cannot write the checkpoint ({_one_line(error)})") from error


def write_run_files(run: Path, config: Config, tokenizer_dir: Path) -> None:
    """`config.yaml` and `tokenizer/` of a run directory, which is made."""
    run.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir.absolute() != (run / TOKENIZER).absolute():
        shutil.copytree(tokenizer_dir, run / TOKENIZER, dirs_exist_ok=True)
    (run / CONFIG).write_text(configs.to_yaml(config), encoding="utf-8")


def load_model(path: str | Path, mesh: Mesh | None = None) -> LoadedModel:
    """Opens a model for use.

    Args:
      path: a run directory (its newest checkpoint that can be read is taken) or one `checkpoints/<step>` of it.
      mesh: where the parameters are to lie; None is the first device.

    Raises:
      UserError: no checkpoint there, or none that can be read.
    """
    mesh = mesh or make_mesh(MeshConfig(data=1))
    for step, place in _candidates(Path(path)):
        try:
            config = _read_config(place)
            plan = blueprint(config.model, mesh)
            params = _load_params(place, plan)
        except UserError:
            raise
        except Exception as error:
            failure = f"{place} is damaged ({_one_line(error)})"
            continue
        return LoadedModel(config, plan.graphdef, params, place.parent.parent / TOKENIZER, step)
    raise UserError(f"{path}: no checkpoint can be read; {failure}")


def load_parameters(path: str | Path, config: ModelConfig, plan: Blueprint) -> dict[str, Any]:
    """The parameters of a checkpoint as a plain dict, to start another run of the same model from.

    Raises:
      UserError: no readable checkpoint at `path`, or one of another model; the differing keys are listed.
    """
    for _, place in _candidates(Path(path)):
        try:
            refuse_other_model(_read_config(place).model, config, str(place))
            return nnx.to_pure_dict(_load_params(place, plan))
        except UserError:
            raise
        except Exception as error:
            failure = f"{place} is damaged ({_one_line(error)})"
    raise UserError(f"{path}: no checkpoint can be read; {failure}")


def refuse_other_model(saved: ModelConfig, wanted: ModelConfig, place: str) -> None:
    """Raises UserError, with the differing keys, if weights of one model do not fit the other."""
    same = {name: getattr(wanted, name) for name in FREE}
    differing = configs.differing_keys(dataclasses.replace(saved, **same), wanted)
    if differing:
        raise UserError(f"{place}: another model: {'; '.join(f'model.{key}' for key in differing)}")


def tokenizer_of(path: str | Path) -> Path:
    """The tokenizer's directory of a run directory or of one of its checkpoints.

    Raises:
      UserError: no checkpoint there.
    """
    return _candidates(Path(path))[0][1].parent.parent / TOKENIZER


def latest_step(run: str | Path) -> int | None:
    """The newest complete checkpoint's step, without opening it; None if there is none."""
    directory = Path(run) / CHECKPOINTS
    found = [int(path.name) for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []
    return max(found, default=None)


def _refuse_other_state(saved: Config, wanted: Config, place: str) -> None:
    # What decides which parameters have moments.
    for key in ("optimizer.freeze", "loss.learn_temperature"):
        section, name = key.split(".")
        one, other = getattr(getattr(saved, section), name), getattr(getattr(wanted, section), name)
        if one != other:
            raise UserError(
                f"{place}: cannot continue with {key}: {one} != {other}; start a new run from it with `init`"
            )


def _candidates(path: Path) -> list[tuple[int, Path]]:
    if (path / "_CHECKPOINT_METADATA").exists() and path.name.isdigit():
        return [(int(path.name), path.absolute())]
    directory = path.absolute() / CHECKPOINTS
    found = [child for child in directory.iterdir() if child.name.isdigit()] if directory.is_dir() else []
    if not found:
        raise UserError(f"{path}: no checkpoint there; give a run directory of `jfe train` or one of its checkpoints")
    return sorted(((int(child.name), child) for child in found), reverse=True)


def _read_config(place: Path) -> Config:
    with _context():
        tree = ocp.load_checkpointables(place, {"config": None})["config"]
    return configs.from_dict(tree, f"{place}/config")


def _load_params(place: Path, plan: Blueprint) -> nnx.State:
    with _context():
        return nnx.State(ocp.load_checkpointables(place, {"params": plan.abstract})["params"])


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


class _IteratorState:
    """The data iterator's position as an Orbax checkpointable: every process writes and reads its own."""

    def __init__(self, state: Any = None):
        self.state = state

    async def save(self, directory: Any) -> Awaitable[None]:
        text = json.dumps(self.state)

        async def write() -> None:
            (Path(await directory.await_creation()) / _process_file()).write_text(text, encoding="utf-8")

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read() -> None:
            self.state = json.loads((Path(directory) / _process_file()).read_text(encoding="utf-8"))

        return read()


def _process_file() -> str:
    return f"process_{jax.process_index()}-of-{jax.process_count()}.json"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
