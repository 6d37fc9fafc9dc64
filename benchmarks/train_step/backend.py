"""Runs one side of `jfe bench train-step`: makes it, checks it and times it, also in its own process.

`python -m benchmarks.train_step.backend '{"side": "jfe", "settings": {…}}'` prints a line of JSON. It is used on a GPU,
whose memory does not hold both sides. With 0 rounds, it takes the steps that its input names (`Apart`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks.common import matmul_rate
from benchmarks.common.subprocess_server import Served, serve
from benchmarks.train_step.compare import STEPS
from benchmarks.train_step.workload import KINDS, Batch, Settings, batches, config
from jfe_jax.errors import UserError
from jfe_jax.utils import malloc

MODULE = "benchmarks.train_step.backend"


class Timed(NamedTuple):
    """The result of one process.

    Attributes:
      losses, norms: of the first steps on the mix.
      seconds: of every step by kind of items, `rounds` times each batch.
      rate: of this side's own matrix product in the same dtype, FLOP/s.
      peak: of the device's memory in bytes; 0 on a CPU.
      prepared: seconds from start to the first timed step.
      device: its name.
      took: seconds of the whole process, by the caller's clock.
    """

    losses: list[float]
    norms: list[float]
    seconds: dict[str, list[float]]
    rate: float
    peak: int
    prepared: float
    device: str
    took: float = 0.0


def make(side: str, settings: Settings) -> Any:
    """The `Step` of "jfe" or "torch", on its device."""
    if side == "jfe":
        from benchmarks.train_step.jax_step import Step

        return Step(config(settings))
    from benchmarks.train_step import weights
    from benchmarks.train_step.torch_step import Step
    from jfe_jax.config import MeshConfig
    from jfe_jax.models.abstract_model import blueprint
    from jfe_jax.parallel import sharding

    run = config(settings)
    return Step(
        run,
        weights.shapes_of(blueprint(run.model, sharding.make_mesh(MeshConfig(data=1))).abstract),
        checkpointing=settings.checkpointing,
        compiled=settings.compiled,
    )


def time_rounds(
    sides: Sequence[tuple[Any, list[Any]]],
    rounds: int,
    progress: Callable[[int], None] = lambda count: None,
    between: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Returns the seconds of every step of each side, interleaved, after one step on each batch: [side][rounds ·
    batches].

    Args:
      sides: a `Step` and its batches on the device, equally many for each.
      progress: called after each step.
      between: called after each round.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for number in range(len(sides[0][1])):
            for (step, there), own in zip(sides, seconds, strict=True):
                start = time.perf_counter()
                # The update is part of it.
                step.step(there[number])
                step.wait()
                if turn:
                    own.append(time.perf_counter() - start)
                progress(1)
        if turn:
            between()
    return seconds


def put(side: str, step: Any, made: list[Batch]) -> list[Any]:
    """The batches on the device, as `side` takes them."""
    return [step.put(one.packed if side == "jfe" else one.padded) for one in made]


class Apart(Served):
    """A side in a process of its own, as a user runs it; `time_rounds` takes it for a `Step`.

    Ours keeps freed memory as `jfe train` does (`allocator`), PyTorch's has glibc's malloc as it is, unless
    `Settings.kept` says otherwise.

    Args:
      cache: directory of XLA's compiled programs.
    """

    def __init__(self, side: str, settings: Settings, cache: str):
        super().__init__(side, MODULE, _task(side, 0, settings), JAX_COMPILATION_CACHE_DIR=cache)

    def put(self, kind: str, count: int) -> list[str]:
        """The process has its own batches: what each of `count` of a kind is called."""
        return [f"{kind} {number}" for number in range(count)]

    def step(self, batch: str) -> None:
        """Takes a step, and waits for it, see `Served.ask`."""
        self.ask(batch)

    def wait(self) -> None:
        """Nothing: `step` has waited."""


def take_steps(side: str, settings: Settings) -> None:
    """Takes the step that each line of the input names, and repeats the line when it is done."""
    step = make(side, settings)
    there = {kind: put(side, step, batches(settings, kind)) for kind in KINDS}

    def one(line: str) -> None:
        kind, number = line.split()
        step.step(there[kind][int(number)])
        step.wait()

    serve(one)


def run(side: str, rounds: int, settings: Settings) -> Timed:
    """Makes one side, takes the first steps, and times it."""
    start = time.perf_counter()
    step = make(side, settings)
    there = {kind: put(side, step, batches(settings, kind)) for kind in KINDS}
    first = [step.step(there["mix"][number % settings.batches]) for number in range(STEPS)]
    losses, norms = ([float(one[place]) for one in first] for place in (0, 1))
    prepared = time.perf_counter() - start
    seconds = {kind: time_rounds([(step, there[kind])], rounds)[0] for kind in KINDS}
    rate = (matmul_rate.by_jax if side == "jfe" else matmul_rate.by_torch)(settings.dtype)
    return Timed(losses, norms, seconds, rate, step.peak(), prepared, step.name())


def apart(side: str, rounds: int, settings: Settings, cache: str) -> Timed:
    """`run` in a process of its own.

    Args:
      cache: directory of XLA's compiled programs, for a second process.

    Raises:
      UserError: the process failed; the end of what it said.
    """
    start = time.perf_counter()
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.96"}
    if side == "torch":
        env |= {"JAX_PLATFORMS": "cpu", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-m", MODULE, json.dumps(_task(side, rounds, settings))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise UserError(f"{side}'s process failed:\n{done.stderr[-3000:]}")
    return Timed(**json.loads(done.stdout.splitlines()[-1]))._replace(took=time.perf_counter() - start)


def _task(side: str, rounds: int, settings: Settings) -> dict[str, Any]:
    return {"side": side, "rounds": rounds, "settings": asdict(settings)}


def _main(side: str, rounds: int, settings: Settings) -> None:
    if side == "jfe" or settings.kept:
        malloc.keep_freed_memory()
    if side == "torch" and settings.device == "cpu":
        import torch

        torch.set_num_threads(matmul_rate.threads())
    if rounds:
        print(json.dumps(run(side, rounds, settings)._asdict()))
    else:
        take_steps(side, settings)


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    _main(task["side"], task["rounds"], Settings(**task["settings"]))
