"""One stage of training, from a config to a finished run directory; stops and continues anywhere."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from jfe_jax import config as configs
from jfe_jax.checkpoint import base_model, model_io
from jfe_jax.checkpoint.manager import CheckpointManager
from jfe_jax.config import Config
from jfe_jax.data.pipeline.loader import training_batches
from jfe_jax.data.pipeline.pair_batcher import empty_batch
from jfe_jax.errors import UserError
from jfe_jax.parallel import sharding
from jfe_jax.parallel.distributed import all_or_none, is_process_zero
from jfe_jax.train import train_state as states
from jfe_jax.train import validate
from jfe_jax.train.device_prefetch import Prefetcher
from jfe_jax.train.init_from import load_initial_weights
from jfe_jax.train.metrics_writer import MetricsLog, Progress
from jfe_jax.train.preemption import preemption_requested
from jfe_jax.train.train_state import TrainSetup, TrainState
from jfe_jax.train.train_step import compile_ahead, make_eval_step, make_train_step
from jfe_jax.utils import pytrees

# Metrics are fetched this many steps late: the device always has a step in hand while the host waits for numbers.
MAX_IN_FLIGHT_STEPS = 2


class TrainResult(NamedTuple):
    """How a call ended: the step reached, and a line that says it."""

    step: int
    message: str


def train(config: Config, resume: Literal["auto", "never"], say: Callable[[str], None]) -> TrainResult:
    """Trains until `config.optimizer.steps`, or until the process is told to end (SIGTERM), and saves.

    A run directory with checkpoints is continued from its newest good one, on whatever mesh the config has now; on the
    CPU the result is the same to the bit as without the interruption. A finished run is left as it is.

    Args:
      config: the resolved config.
      resume: "never" refuses a run directory that holds checkpoints.
      say: takes lines for a person.

    Raises:
      UserError: the config does not fit the machine, the data or the checkpoint; a checkpoint cannot be written; the
        loss or gradients are not finite for `optimizer.max_skipped_steps` in a row (the last checkpoint is kept).
    """
    with all_or_none():
        config = with_tokenizer(config)
        run, steps = Path(config.output), config.optimizer.steps
        validate.check(config)
        done = model_io.find_latest_step(run)
        if done is not None and resume == "never":
            raise UserError(f"{run}: holds checkpoints up to step {done}; remove it, choose another output, or resume")
        if done is not None and done >= steps:
            return TrainResult(done, f"{run}: finished at step {done}; nothing to do")
        mesh = sharding.make_mesh(config.mesh)
        groups = sharding.group_count(mesh) * config.loss.grad_cache_chunks
        batches = _batches(config, groups, config.data.split)
        training = states.make_train_setup(config, mesh)
    step = make_train_step(training)
    one = empty_batch(replace(batches.shape, groups=1))
    compiled = compile_ahead(step, training.abstract, sharding.abstract_batch(one, mesh, config.loss.grad_cache_chunks))
    kept = config.checkpoint
    checkpoints = CheckpointManager(run, kept.keep, say, kept.keep_every_steps, kept.keep_best)
    try:
        with all_or_none():
            start, state = starting_point(training, checkpoints, batches, say)
            if is_process_zero():
                model_io.write_run_files(run, config, Path(config.tokens.tokenizer))
        reached = Trainer(training, step, compiled, checkpoints, groups, say).run(start, state, batches)
        checkpoints.wait()
    finally:
        checkpoints.close()
    if reached < steps:
        return TrainResult(reached, f"{run}: stopped at step {reached} of {steps}, saved; run it again to continue")
    return TrainResult(reached, f"{run}: finished at step {reached}")


def with_tokenizer(config: Config) -> Config:
    """The config with `tokens.tokenizer` filled in from `init` if it is empty.

    Raises:
      UserError: neither names a tokenizer.
    """
    if config.tokens.tokenizer:
        return config
    if not config.init:
        raise UserError("tokens.tokenizer is empty: give a Hugging Face tokenizer's directory")
    inherited = model_io.find_tokenizer(config.init)
    return replace(config, tokens=replace(config.tokens, tokenizer=str(inherited)))


def starting_point(
    training: TrainSetup, checkpoints: CheckpointManager, batches: Any, say: Callable[[str], None]
) -> tuple[int, TrainState]:
    """Step and state to go on from: the run's own checkpoint (`batches` is set to its place), `init`, or random.

    With adapters the run directory gets its `base.json`.
    """
    config, abstract = training.config, training.abstract
    kept = pytrees.select(abstract.params, training.checkpointed_mask)
    saved = checkpoints.restore(config, kept, abstract._replace(params={})._asdict())
    if saved is not None:
        params = saved.params
        if config.model.lora.rank:
            params = pytrees.overlay(model_io.restore_base_params(Path(config.output), training.mesh), params)
        batches.set_state(saved.data)
        say(f"continuing from step {saved.step}")
        changed = configs.differing_keys(saved.config, config)
        if changed:
            say(f"other settings than the checkpoint's: {'; '.join(changed)}")
        return saved.step, TrainState(**saved.train | {"params": params})
    if not config.init:
        return 0, states.init_train_state(training)
    start = load_initial_weights(config.init, training)
    with all_or_none():
        if start.base is not None and is_process_zero():
            base_model.write_base_ref(Path(config.output), start.base)
    if start.message:
        say(start.message)
    return 0, states.init_train_state(training, start.params)


class Trainer:
    """The loop itself, with what it reports to."""

    def __init__(
        self,
        training: TrainSetup,
        step: Any,
        compiled: Future[Any],
        checkpoints: CheckpointManager,
        groups: int,
        say: Callable[[str], None],
    ):
        self.config, self.training, self.groups, self.say = training.config, training, groups, say
        self.checkpoints, self.compiled = checkpoints, compiled
        self.train_step, self.eval_step = step, make_eval_step(training)
        self.programs = 0
        self.saved: int | None = max(checkpoints.steps(), default=None)

    def run(self, start: int, state: TrainState, batches: Any) -> int:
        """Runs from `start`; returns the step reached."""
        steps = self.config.optimizer.steps
        self.log = MetricsLog(Path(self.config.output) / "logs", start) if is_process_zero() else None
        self.progress = Progress(steps, start, self.say)
        self.pending: deque[tuple[int, dict[str, jax.Array], dict[str, int]]] = deque()
        self.waited, self.since, self.start, self.last_logged = 0.0, time.monotonic(), start, start
        source = Prefetcher(batches, self.training.mesh, self.config.loss.grad_cache_chunks)
        step = start
        try:
            with preemption_requested() as ended:
                self.compiled.result()
                while step < steps and not ended(step):
                    batch, position, idle = source.take(self._computing)
                    self.waited += idle
                    state, metrics = self.train_step(state, batch)
                    step += 1
                    self._warn_on_recompile(step)
                    self.pending.append((step, metrics, position["bad"]))
                    self._flush_metrics(MAX_IN_FLIGHT_STEPS)
                    saves = _every(step, self.config.checkpoint.every_steps) or step == steps
                    values = _every(step, self.config.val_every_steps) or (
                        self.config.val_every_steps and step == steps
                    )
                    # First, so that the checkpoint knows its loss, and the log of what it continues has it.
                    loss = None
                    if values or (saves and self.config.checkpoint.keep_best):
                        loss = self._validate(step, state)
                    if saves:
                        self._save(step, state, position, loss)
                if step > start and step != self.saved:
                    self._save(step, state, position)
        finally:
            source.close()
            self.progress.close()
            if self.log is not None:
                self.log.close()
        return step

    def _computing(self) -> bool:
        # The devices take steps in order: while the newest is not done, they do not wait.
        return bool(self.pending) and not all(value.is_ready() for value in self.pending[-1][1].values())

    def _flush_metrics(self, max_in_flight: int) -> None:
        # Fetches the metrics of all but the newest `max_in_flight` steps.
        while len(self.pending) > max_in_flight:
            step, metrics, bad = self.pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._check_nonfinite(step, values)
            shown = None
            if _every(step, self.config.log_every_steps) or step == self.config.optimizer.steps:
                now = time.monotonic()
                seconds = max(now - self.since, 1e-9)
                items = values.pop("pairs") * (2 + self.config.data.hard_negatives) * (step - self.last_logged)
                shown = values | {"items_per_second": items / seconds, "data_wait": min(self.waited / seconds, 1.0)}
                # Pairs that this process has skipped since the run began.
                shown |= {f"skipped_{unit}": count for unit, count in bad.items()}
                self.waited, self.since, self.last_logged = 0.0, now, step
                if self.log is not None:
                    self.log.write(step, shown)
            elif self.last_logged == self.start:
                # The first step waited for the compiler; rates are of what comes after it.
                self.waited, self.since, self.last_logged = 0.0, time.monotonic(), step
            self.progress.update(step, shown)

    def _warn_on_recompile(self, step: int) -> None:
        programs = self.train_step._cache_size()
        if self.programs and programs > self.programs:
            self.progress.say(f"warning: step {step} was compiled again: its batch has another shape than those before")
        self.programs = programs

    def _check_nonfinite(self, step: int, values: dict[str, float]) -> None:
        in_row = int(values.pop("skipped_in_row"))
        if not in_row:
            return
        what = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
        if in_row >= self.config.optimizer.max_skipped_steps:
            kept = "there is no checkpoint" if self.saved is None else f"checkpoint {self.saved} is kept"
            many = f", not finite for {in_row} steps" if in_row > 1 else ""
            raise UserError(
                f"step {step}: {what}{many}; stopped, {kept}; lower optimizer.learning_rate or raise "
                "loss.min_temperature"
            )
        self.progress.say(f"warning: step {step} is skipped: {what} ({int(values['skipped'])} so far)")

    def _save(self, step: int, state: TrainState, position: Any, loss: float | None = None) -> None:
        # Not before it is known that training goes on.
        self._flush_metrics(0)
        params = pytrees.select(state.params, self.training.checkpointed_mask)
        self.checkpoints.save(step, self.config, params, state._replace(params={})._asdict(), position, loss)
        self.saved = step

    def _validate(self, step: int, state: TrainState) -> float:
        self._flush_metrics(0)
        begun = time.monotonic()
        batches = _batches(self.config, self.groups, self.config.data.val_split)
        source = Prefetcher(batches, self.training.mesh, self.config.loss.grad_cache_chunks)
        try:
            results = [self.eval_step(state, next(source)[0]) for _ in range(self.config.val_steps)]
        finally:
            source.close()
        means = {
            f"val_{name}": sum(float(one[name]) for one in results) / len(results) for name in ("loss", "accuracy")
        }
        if self.log is not None:
            self.log.write(step, means)
        self.progress.say(
            f"step {step}: validation loss {means['val_loss']:.4f}, in-batch accuracy {means['val_accuracy']:.1%}"
        )
        self.since += time.monotonic() - begun
        return means["val_loss"]


def _batches(config: Config, groups: int, split: str) -> Any:
    return iter(
        training_batches(
            config,
            groups=groups,
            split=split,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    )


def _every(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
