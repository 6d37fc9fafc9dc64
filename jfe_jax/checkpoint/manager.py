"""The checkpoints of a run while it trains: written in the background, restored onto any mesh, damage survived."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jfe_jax.checkpoint import model_io
from jfe_jax.checkpoint.model_io import BEST, CHECKPOINTS
from jfe_jax.checkpoint.streaming import read_stored_names
from jfe_jax.config import Config
from jfe_jax.data.pipeline.pair_reader import redistribute
from jfe_jax.errors import UserError
from jfe_jax.parallel.distributed import all_or_none, is_process_zero
from jfe_jax.parallel.sharding import init_sharded, path_name

policies = ocp.training.preservation_policies


class RestoredRun(NamedTuple):
    """What a run continues from."""

    step: int
    config: Config
    params: Any
    train: Any
    data: Any


class CheckpointManager:
    """The checkpoints of one training run, newest good one first. Writing happens in the background."""

    def __init__(self, run: Path, keep: int, warn: Callable[[str], None], keep_every: int = 0, keep_best: int = 0):
        """Opens `run`/checkpoints, or makes it; what a killed process left half-written is removed, named to `warn`.

        Kept are the newest `keep`, those whose step `keep_every` divides, and the `keep_best` with the lowest loss.
        """
        self._directory = run.absolute() / CHECKPOINTS
        self._warn = warn
        self._closed = False
        with all_or_none():
            if is_process_zero():
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_half_written()
        kept = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        if keep_best:
            # Sorted from the worst to the best, of which the last are kept.
            kept.append(
                policies.BestN(
                    get_metric_fn=_validation_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        self._links_best = keep_best > 0
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            context=model_io.orbax_context(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
        )

    def steps(self) -> list[int]:
        """Steps that there is a checkpoint of, ascending."""
        return [saved.step for saved in self._checkpointer.checkpoints]

    def save(self, step: int, config: Config, params: Any, train: Any, data: Any, loss: float | None = None) -> None:
        """Starts to write; the arrays may be donated as soon as this returns. Waits for the save before, if need be.

        Args:
          step, config, params, train, data: what `restore` gives back.
          loss: on the validation split, by which the best are known.

        Raises:
          UserError: this or the previous checkpoint cannot be written (a full disk); older ones are intact.
        """
        parts = {"params": params, "train": train, "data": _IteratorState(data), "config": dataclasses.asdict(config)}
        try:
            metrics = None if loss is None else {"val_loss": loss}
            self._checkpointer.save_checkpointables_async(step, parts, force=True, metrics=metrics)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until everything is on disk. Raises as `save` does."""
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._failed(error) from error
        self._link_best()

    def close(self) -> None:
        """Waits and releases. Raises as `save` does, unless that has been raised already."""
        if self._closed:
            return
        try:
            self._checkpointer.close()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, config: Config, abstract_params: Any, abstract_train: Any) -> RestoredRun | None:
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
                saved = model_io.read_config(path)
                data = _IteratorState()
                if not (path / "train").exists():
                    raise UserError(
                        f"{path}: holds a model and no training state; give it as `init`, with another output"
                    )
                model_io.check_same_model(saved.model, config.model, str(path))
                _check_same_optimizer_layout(saved, config, str(path))
                model_io.restore_checkpointable(path, "data", data)
                params = model_io.restore_checkpointable(path, "params", abstract_params)
                return RestoredRun(step, saved, params, _restore_train(path, abstract_train), data.state)
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

    def _link_best(self) -> None:
        valued = [saved for saved in self._checkpointer.checkpoints if saved.metrics is not None]
        if not (self._links_best and valued and is_process_zero()):
            return
        best = min(valued, key=lambda saved: _validation_loss(saved.metrics))
        link = self._directory.parent / BEST
        new = link.with_name(f".{BEST}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(Path(CHECKPOINTS) / str(best.step))
        new.replace(link)

    def _set_aside(self, path: Path, error: Exception) -> None:
        target = self._damaged / path.name
        with all_or_none():
            if is_process_zero():
                self._damaged.mkdir(exist_ok=True)
                if target.exists():
                    shutil.rmtree(target)
                path.rename(target)
        self._checkpointer.reload()
        why = model_io.flatten_message(error)
        self._warn(f"warning: checkpoint {path} is damaged ({why}); moved to {target}, using the one before")

    def _remove_half_written(self) -> None:
        for path in sorted(self._directory.iterdir()):
            if path.is_dir() and ".orbax-checkpoint-tmp" in path.name:
                self._warn(f"warning: checkpoint {path} is half-written; removed, using the one before")
                shutil.rmtree(path, ignore_errors=True)

    def _failed(self, error: Exception) -> UserError:
        # Other threads may still be writing their parts of what cannot be finished.
        self._closed = True
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        good = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())
        kept = f"step {good[-1]} is intact" if good else "there is none before it"
        return UserError(
            f"{self._directory}: cannot write the checkpoint ({model_io.explain_write_failure(error)}); {kept}"
        )


def _validation_loss(metrics: dict[str, float]) -> float:
    # What is no number is the worst.
    return metrics["val_loss"] if math.isfinite(metrics["val_loss"]) else math.inf


def _restore_train(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    stored, wanted = {*read_stored_names(path / "train")}, _leaf_names(abstract)
    # A checkpoint from before steps were skipped counts none.
    new = {"skipped"} - stored
    if stored != wanted - new:
        changed = sorted(stored ^ (wanted - new))
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path}: holds the state of another optimizer ({', '.join(changed[:3])}{more} differ); set `optimizer` as "
            "it was, or start a new run from it with `init`"
        )
    train = model_io.restore_checkpointable(
        path, "train", {name: abstract[name] for name in abstract if name not in new}
    )
    zeros = {name: init_sharded(partial(jnp.zeros_like, abstract[name]), abstract[name].sharding) for name in new}
    return train | zeros


def _leaf_names(tree: Any) -> set[str]:
    return {path_name(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_same_optimizer_layout(saved: Config, wanted: Config, place: str) -> None:
    # What decides which parameters there are, and which moments they have.
    keys = ["optimizer.name", "optimizer.freeze", "optimizer.train"]
    keys += ["loss.kind", "loss.learn_temperature", "loss.learn_bias"]
    for key in keys:
        section, name = key.split(".")
        one, other = getattr(getattr(saved, section), name), getattr(getattr(wanted, section), name)
        if one != other:
            raise UserError(
                f"{place}: cannot continue with {key}: {one} != {other}; start a new run from it with `init`"
            )


class _IteratorState:
    """The data iterator's position as an Orbax checkpointable: every process writes its own.

    It reads its own too, or, if there were more or fewer of them, its share of what they all had left.
    """

    def __init__(self, state: Any = None):
        self.state = state

    async def save(self, directory: Any) -> Awaitable[None]:
        text = json.dumps(self.state)

        async def write() -> None:
            (Path(await directory.await_creation()) / _process_file_name()).write_text(text, encoding="utf-8")

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read() -> None:
            own = Path(directory) / _process_file_name()
            if own.exists():
                self.state = json.loads(own.read_text(encoding="utf-8"))
                return
            # In the order of the processes, whose numbers are not padded.
            files = sorted(own.parent.glob("process_*.json"), key=lambda file: (len(file.name), file.name))
            if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
                raise FileNotFoundError(f"{own.parent}: the states of some processes are missing")
            states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            self.state = redistribute(states, jax.process_index(), jax.process_count())

        return read()


def _process_file_name() -> str:
    return f"process_{jax.process_index()}-of-{jax.process_count()}.json"
