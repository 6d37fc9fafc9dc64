"""Manages the checkpoints of a training run: asynchronous saves, restores onto any mesh, and damaged checkpoints."""

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
    """State that a run resumes from."""

    step: int
    config: Config
    params: Any
    train: Any
    data: Any


class CheckpointManager:
    """Saves the checkpoints of one training run in the background and restores the newest one that is intact."""

    def __init__(self, run: Path, keep: int, warn: Callable[[str], None], keep_every: int = 0, keep_best: int = 0):
        """Opens or creates `run`/checkpoints and removes partial checkpoints that a killed process left.

        Args:
          run: Run directory.
          keep: Number of most recent checkpoints to keep.
          warn: Callback for warnings, such as the name of a partial checkpoint that was removed.
          keep_every: Also keep the checkpoints whose step is a multiple of this; 0 disables it.
          keep_best: Also keep this many checkpoints with the lowest validation loss; 0 disables it.
        """
        self._directory = run.absolute() / CHECKPOINTS
        self._warn = warn
        self._closed = False
        with all_or_none():
            if is_process_zero():
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_half_written()
        preservation = [policies.LatestN(keep)]
        if keep_every:
            preservation.append(policies.EveryNSteps(keep_every))
        if keep_best:
            # reverse=True sorts from the highest loss to the lowest; the policy keeps the last n.
            preservation.append(
                policies.BestN(
                    get_metric_fn=_validation_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        self._links_best = keep_best > 0
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            context=model_io.orbax_context(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(preservation),
        )

    def steps(self) -> list[int]:
        """Returns the steps of the existing checkpoints, ascending."""
        return [saved.step for saved in self._checkpointer.checkpoints]

    def save(self, step: int, config: Config, params: Any, train: Any, data: Any, loss: float | None = None) -> None:
        """Starts an asynchronous save, after waiting for the previous one. The arrays may be donated once this returns.

        Args:
          step, config, params, train, data: The values that `restore` returns.
          loss: Validation loss, which ranks the best checkpoints.

        Raises:
          UserError: This or the previous checkpoint cannot be written (a full disk); older ones are intact.
        """
        parts = {"params": params, "train": train, "data": _IteratorState(data), "config": dataclasses.asdict(config)}
        try:
            metrics = None if loss is None else {"val_loss": loss}
            self._checkpointer.save_checkpointables_async(step, parts, force=True, metrics=metrics)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until all checkpoints are on disk. Raises as `save` does."""
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._failed(error) from error
        self._link_best()

    def close(self) -> None:
        """Waits for pending saves and releases resources. Raises as `save` does, unless it has raised already."""
        if self._closed:
            return
        try:
            self._checkpointer.close()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, config: Config, abstract_params: Any, abstract_train: Any) -> RestoredRun | None:
        """Restores the newest readable checkpoint onto the shardings of the abstract trees.

        A damaged checkpoint is reported to `warn` and moved to `damaged/`, and the previous one is used instead.

        Returns:
          The restored state, or None if there is no checkpoint.

        Raises:
          UserError: The checkpoint has a different model or optimizer layout (the differing keys are listed), or every
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
                        f"{path}: contains a model without training state; pass it as `init`, with another output"
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
            raise UserError(f"{self._directory}: no checkpoint can be read; all were moved to {self._damaged}")
        return None

    @property
    def _damaged(self) -> Path:
        return self._directory.parent / "damaged"

    def _link_best(self) -> None:
        with_loss = [saved for saved in self._checkpointer.checkpoints if saved.metrics is not None]
        if not (self._links_best and with_loss and is_process_zero()):
            return
        best = min(with_loss, key=lambda saved: _validation_loss(saved.metrics))
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
        reason = model_io.flatten_message(error)
        self._warn(f"warning: checkpoint {path} is damaged ({reason}); moved to {target}, using the previous one")

    def _remove_half_written(self) -> None:
        for path in sorted(self._directory.iterdir()):
            if path.is_dir() and ".orbax-checkpoint-tmp" in path.name:
                self._warn(f"warning: checkpoint {path} is incomplete; removed, using the previous one")
                shutil.rmtree(path, ignore_errors=True)

    def _failed(self, error: Exception) -> UserError:
        # Other threads may still be writing parts of the failed checkpoint, so close the checkpointer before removal.
        self._closed = True
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        intact = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())
        remaining = f"step {intact[-1]} is intact" if intact else "there is no earlier one"
        return UserError(
            f"{self._directory}: cannot write the checkpoint ({model_io.explain_write_failure(error)}); {remaining}"
        )


def _validation_loss(metrics: dict[str, float]) -> float:
    # A NaN or infinite loss ranks last.
    return metrics["val_loss"] if math.isfinite(metrics["val_loss"]) else math.inf


def _restore_train(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    stored, expected = {*read_stored_names(path / "train")}, _leaf_names(abstract)
    # Checkpoints written before the counter of skipped steps existed lack it, so it starts at zero.
    new = {"skipped"} - stored
    if stored != expected - new:
        changed = sorted(stored ^ (expected - new))
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path}: contains the state of a different optimizer ({', '.join(changed[:3])}{more} differ); restore the "
            "original `optimizer` settings, or start a new run from it with `init`"
        )
    train = model_io.restore_checkpointable(
        path, "train", {name: abstract[name] for name in abstract if name not in new}
    )
    zeros = {name: init_sharded(partial(jnp.zeros_like, abstract[name]), abstract[name].sharding) for name in new}
    return train | zeros


def _leaf_names(tree: Any) -> set[str]:
    return {path_name(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_same_optimizer_layout(saved: Config, current: Config, path: str) -> None:
    # Keys that determine which parameters and which moments exist.
    keys = ["optimizer.name", "optimizer.freeze", "optimizer.train"]
    keys += ["loss.kind", "loss.learn_temperature", "loss.learn_bias"]
    for key in keys:
        section, name = key.split(".")
        old, new = getattr(getattr(saved, section), name), getattr(getattr(current, section), name)
        if old != new:
            raise UserError(f"{path}: cannot resume with {key}: {old} != {new}; start a new run from it with `init`")


class _IteratorState:
    """The data iterator's state as an Orbax checkpointable, with one file per process.

    A process restores its own state. If the number of processes has changed, the remaining data of all of them is
    redistributed.
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
            process_file = Path(directory) / _process_file_name()
            if process_file.exists():
                self.state = json.loads(process_file.read_text(encoding="utf-8"))
                return
            # In process order; the numbers in the names are not zero-padded, so shorter names sort first.
            files = sorted(process_file.parent.glob("process_*.json"), key=lambda file: (len(file.name), file.name))
            if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
                raise FileNotFoundError(f"{process_file.parent}: the states of some processes are missing")
            states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            self.state = redistribute(states, jax.process_index(), jax.process_count())

        return read()


def _process_file_name() -> str:
    return f"process_{jax.process_index()}-of-{jax.process_count()}.json"
