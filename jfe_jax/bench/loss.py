"""The contrastive loss with its gradients beside the same written plainly, in PyTorch and in jit.

What a user would write is: all logits at once, the softmax's cross-entropy over their rows and columns. "third" is ours
with so many logits kept (`loss.keep_mib`) as a third of the memory of that has room for.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jfe_jax.bench import memory
from jfe_jax.bench.result import Progress, Result, ratios, table
from jfe_jax.bench.timing import by_turns
from jfe_jax.config import LossConfig
from jfe_jax.errors import UserError

LABELS = {
    "jfe": "ours, as configured",
    "third": "ours, in a third of the plain formula's memory",
    "jit": "`jit` of the plain formula",
    "torch": "PyTorch",
}
SIDES = tuple(LABELS)
TEMPERATURE = 0.05
# Of loss and gradients, against their largest number.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--batches", default="8192,32768", help="pairs, separated by commas")
    parser.add_argument("--width", type=int, default=1024, help="of the embeddings")
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Times the sides by turns, after checking that loss and gradients are the same.

    Memory is measured first, each side in a process of its own. A side that would need more than is free is left out:
    its need is told from the smaller batch's, by the square of the batch.

    Raises:
      UserError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("torch is not installed: pip install torch") from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batches = sorted(int(number) for number in args.batches.split(","))
    peaks: dict[str, tuple[int, int]] = {}
    rows, forecasts = [], []
    for pairs in batches:
        sides = []
        for side in SIDES:
            before, peak = peaks.get(side, (pairs, 0))
            forecast = peak * (pairs // before) ** 2 if side != "jfe" else 0
            if forecast < 0.8 * _free():
                peaks[side] = pairs, _peak(side, pairs, args.width)
                sides.append(side)
        with progress(f"B = {pairs}", len(sides) * args.rounds) as done:
            seconds = _interleaved(
                {side: make(side, *_embeddings(pairs, args.width)) for side in sides}, args.rounds, done
            )
        for side in SIDES:
            before, peak = peaks[side]
            own = seconds.get(side)
            ratio = ratios(own, seconds["jfe"]) if own else None
            rows.append([f"{pairs:,}", LABELS[side], own, ratio, peak * (pairs // before) ** 2 / 2**20])
            forecasts += [] if own else [f"{LABELS[side]} at {pairs:,}"]
    notes = [f"Too little memory for {', '.join(forecasts)}: the memory is a forecast."] if forecasts else []
    return Result(
        tables=[table({"B": "", "": "", "s": ".2f", "/ ours": ".2f", "memory, MiB": ",.0f"}, rows)],
        packages=["jax", "torch"],
        method="in a third: "
        + ", ".join(
            f"`--loss.keep_mib={config.keep_mib:.0f} --loss.tile_mib={config.tile_mib:.0f}` at B = {pairs:,}"
            for pairs, config in ((pairs, third(pairs, args.width)) for pairs in batches)
        )
        + f"; E = {args.width:,}; {args.rounds} rounds by turns: median (least to most); memory: what is added to "
        "the embeddings",
        checked=f"the loss and both gradients, equal to {TOLERANCE:.0e} of the largest",
        notes=notes,
    )


def make(side: str, queries: np.ndarray, candidates: np.ndarray) -> Callable[[], tuple[Any, Any, Any]]:
    """A function without arguments that gives loss and gradients to queries and candidates [B, E]."""
    ours = {"jfe": LossConfig(temperature=TEMPERATURE), "third": third(*queries.shape)}
    sides = {name: partial(_jfe, config) for name, config in ours.items()} | {"jit": _jit, "torch": _torch}
    return sides[side](queries, candidates)


def third(pairs: int, width: int) -> LossConfig:
    """Settings with which the loss takes a third of what the plain formula does.

    That holds the logits, their exponentials and their gradients, and gives the gradients G of the embeddings: a third
    of 3 · L + G. Ours holds G twice, and the tiles in the place of one of them: L - 5/3 · G would be left to keep; a
    third of G less is kept, for what the process needs besides.
    """
    logits, gradients = 4 * pairs**2 / 2**20, 8 * pairs * width / 2**20
    # Tiles of 512 queries: with fewer, adding up the candidates' gradients takes as long as making them.
    tile = max(LossConfig.tile_mib, 4 * 512 * pairs / 2**20)
    return LossConfig(temperature=TEMPERATURE, tile_mib=tile, keep_mib=max(0.0, logits - 2 * gradients))


def _jfe(config: LossConfig, queries: np.ndarray, candidates: np.ndarray) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    from jfe_jax.train import losses

    numbers = jnp.arange(len(queries), dtype=jnp.int32)[None]
    valid = jnp.ones(numbers.shape, bool)
    rest = (numbers, jnp.zeros_like(numbers), numbers[..., None], valid, valid)

    def loss(queries: jax.Array, candidates: jax.Array, rest: Any) -> jax.Array:
        pairs = losses.Pairs(queries[None], candidates[None], *rest)
        return losses.contrastive_loss(pairs, losses.initial_parameters(config), config)[0]

    return _compiled(loss, jnp.asarray(queries), jnp.asarray(candidates), rest)


def _jit(queries: np.ndarray, candidates: np.ndarray) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    def loss(queries: jax.Array, candidates: jax.Array) -> jax.Array:
        logits = queries @ candidates.T / TEMPERATURE
        own = jnp.diagonal(logits)
        rows, columns = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
        return jnp.mean(rows + columns - 2 * own) / 2

    return _compiled(loss, jnp.asarray(queries), jnp.asarray(candidates))


def _compiled(loss: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    import jax

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()

    def work() -> Any:
        value, gradients = jax.block_until_ready(program(*args))
        return value, *gradients

    return work


def _torch(queries: np.ndarray, candidates: np.ndarray) -> Callable[[], Any]:
    import torch
    from torch.nn.functional import cross_entropy

    one, other = (torch.tensor(x, requires_grad=True) for x in (queries, candidates))
    own = torch.arange(len(queries))

    def work() -> Any:
        one.grad = other.grad = None
        logits = one @ other.T / TEMPERATURE
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        loss.backward()
        return loss.detach(), one.grad, other.grad

    return work


def _interleaved(
    sides: dict[str, Callable[[], Any]], rounds: int, progress: Callable[[int], None]
) -> dict[str, list[float]]:
    # Once unmeasured, to see that all compute the same.
    expected = sides["jfe"]()
    for side, work in sides.items():
        for ours, theirs in zip(expected, work(), strict=True):
            scale = np.abs(np.asarray(ours)).max()
            if np.abs(np.asarray(ours) - np.asarray(theirs)).max() > TOLERANCE * scale:
                raise UserError(f"loss or gradients of {side} are not ours: nothing to compare")
    return by_turns(sides, rounds, progress)


def _embeddings(pairs: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    queries, candidates = (random.standard_normal((pairs, width), np.float32) for _ in range(2))
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, candidates))


def _peak(side: str, pairs: int, width: int) -> int:
    command = [sys.executable, "-m", "jfe_jax.bench.loss", side, str(pairs), str(width)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _free() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _main(side: str, pairs: int, width: int) -> None:
    work = make(side, *_embeddings(pairs, width))
    before = memory.status("VmRSS")
    work()
    print(1024 * (memory.peak() - before))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
