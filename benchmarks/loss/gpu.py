"""Runs `jfe bench loss` on a GPU: jax's sides interleaved in one process, PyTorch in another, as memory holds only one.

`python -m benchmarks.loss.gpu '{"side": "jax", …}'` prints a line of JSON, and writes loss and gradients of the
smallest batch to a directory, where the caller compares them. Products use true float32 on both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.interleaved import by_turns
from benchmarks.common.result import Cell, Progress, Result, ratios, table
from benchmarks.loss import loss
from jfe_jax.errors import UserError

PROCESSES = {"jax": ("jit", "jfe", "third"), "torch": ("torch",)}


class Measured(NamedTuple):
    """A side at one batch.

    Attributes:
      side: a name of `loss.LABELS`.
      pairs: of the batch.
      seconds: of each round; none where the device's memory does not hold it.
      memory: bytes of the device's that are added to the embeddings; 0 if not known.
      settings: ours, as on a command line.
    """

    side: str
    pairs: int
    seconds: list[float]
    memory: int
    settings: str = ""


def run(batches: Sequence[int], width: int, rounds: int, progress: Progress, device: str = "gpu") -> Result:
    """Measures all sides; on the "cpu" only to see that it would work.

    Raises:
      UserError: no GPU is seen, a process failed, or the sides do not compute the same.
    """
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as directory, progress("processes", len(PROCESSES)) as done:
        task = {"batches": list(batches), "width": width, "rounds": rounds, "directory": directory, "device": device}
        for side in PROCESSES:
            printed = _process({**task, "side": side})
            name = printed["name"]
            found += [Measured(*one) for one in printed["found"]]
            done(1)
        answers = {file.stem: np.load(file) for file in Path(directory).glob("*.npz")}
    apart = max(
        loss.check(side, *([one[name] for name in sorted(one)] for one in (answers["jfe"], theirs)))
        for side, theirs in answers.items()
    )
    rows: list[list[Cell]] = []
    for pairs in batches:
        here = {one.side: one for one in found if one.pairs == pairs}
        for side, label in loss.LABELS.items():
            one, ours = here[side], here["jfe"].seconds
            ratio = ratios(one.seconds, ours) if one.seconds and ours else None
            rows.append([f"{pairs:,}", label, one.seconds or None, ratio, one.memory / 2**20 if one.memory else None])
    settings = ", ".join(f"`{one.settings}` at B = {one.pairs:,}" for one in found if one.settings)
    return Result(
        tables=[table(loss.COLUMNS | {"s": ".4f"}, rows)],
        packages=["jax", "torch"],
        method=f"in a third: {settings}; E = {width:,}; products in true float32 on both sides (jax's precision "
        f"HIGHEST, torch's float32_matmul_precision highest); {rounds} rounds, jax's sides interleaved, PyTorch in "
        "its own process: median (min to max); memory: what is added to the embeddings, as XLA plans it and as "
        "PyTorch's allocator counts it",
        checked=f"at B = {batches[0]:,}, {loss.checked(apart)}",
        notes=[] if all(one.seconds for one in found) else ["Without a time: more than the card's memory holds."],
        device=name,
    )


def _process(task: dict[str, Any]) -> dict[str, Any]:
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.96"}
    command = [sys.executable, "-m", "benchmarks.loss.gpu", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise UserError(f"{task['side']}'s process: {done.stderr[-3000:].strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def _by_jax(task: dict[str, Any]) -> tuple[list[Measured], str]:
    import jax

    card, width, found = jax.devices()[0], task["width"], []
    if card.platform != task["device"]:
        raise UserError(f"JAX sees no {task['device'].upper()}, but a {card.device_kind}")
    room = (card.memory_stats() or {}).get("bytes_limit", sys.maxsize)
    for pairs in task["batches"]:
        embeddings = loss.embeddings(pairs, width)
        works: dict[str, Any] = {side: loss.make(side, *embeddings) for side in ("jit", "jfe")}
        config = loss.third(pairs, width, works["jit"].memory(), tile_mib=loss.TILE_MIB["gpu"])
        works["third"] = loss.make("third", *embeddings, config=config)
        memory, settings = {side: work.memory() for side, work in works.items()}, {"third": loss.words(config)}
        held = {side: work for side, work in works.items() if memory[side] < room and _answered(work, side, task)}
        seconds = by_turns(held, task["rounds"], lambda count: None)
        found += [Measured(side, pairs, seconds.get(side, []), memory[side], settings.get(side, "")) for side in works]
    return found, card.device_kind


def _by_torch(task: dict[str, Any]) -> tuple[list[Measured], str]:
    try:
        import torch
    except ImportError as error:
        raise UserError("torch is not installed: pip install torch") from error
    card, found = task["device"] == "gpu", []
    if card and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU")
    torch.set_float32_matmul_precision("highest")
    for pairs in task["batches"]:
        work = loss.make("torch", *loss.embeddings(pairs, task["width"]), device="cuda" if card else "cpu")
        before = torch.cuda.memory_allocated() if card else 0
        if card:
            torch.cuda.reset_peak_memory_stats()
        held = {"torch": work} if _answered(work, "torch", task) else {}
        peak = torch.cuda.max_memory_allocated() - before if held and card else 0
        seconds = by_turns(held, task["rounds"], lambda count: None)
        found.append(Measured("torch", pairs, seconds.get("torch", []), peak))
        del work, held
        if card:
            torch.cuda.empty_cache()
    return found, torch.cuda.get_device_name() if card else "cpu"


def _answered(work: Callable[[], Any], side: str, task: dict[str, Any]) -> bool:
    # Runs it for the first time, and keeps what the first batch gives; False if the device's memory does not hold it.
    try:
        answer = work()
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        return False
    file = Path(task["directory"], f"{side}.npz")
    if not file.exists():
        np.savez(file, *(x.cpu() if side == "torch" else np.asarray(x) for x in answer))
    return True


def _main(task: dict[str, Any]) -> None:
    try:
        found, name = {"jax": _by_jax, "torch": _by_torch}[task["side"]](task)
    except UserError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps({"found": found, "name": name}))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
