"""Compares the contrastive loss and its gradients with the plain formula, in PyTorch and in jit.

The plain formula is what a user would write: all logits at once, and the softmax's cross-entropy over rows and columns.
"third" is this project's loss with as many logits cached (`loss.keep_mib`) as fit into a third of `jit`'s memory.
`loss.gpu` measures on a GPU.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import memory
from benchmarks.common.interleaved import by_turns
from benchmarks.common.result import Progress, Result, ratios, table
from jfe_jax.config import LossConfig
from jfe_jax.errors import UserError

LABELS = {
    "jfe": "ours, as configured",
    "third": "ours, in a third of `jit`'s memory",
    "jit": "`jit` of the plain formula",
    "torch": "PyTorch",
}
# What the third is of, comes first.
SIDES = ("jit", "jfe", "third", "torch")
COLUMNS = {"B": "", "": "", "s": ".2f", "/ ours": ".2f", "memory, MiB": ",.0f"}
BATCHES = {"cpu": "8192,32768", "gpu": "8192,32768,65536"}
# Of "third": what is small leaves more to keep, but a GPU takes longer to start a small tile's work than to do it.
TILE_MIB = {"cpu": 2.0, "gpu": 64.0}
TEMPERATURE = 0.05
# Of loss and gradients, against their largest number.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares sizes and device."""
    parser.add_argument("--device", choices=list(BATCHES), default="cpu")
    parser.add_argument(
        "--batches", help=f"pairs, separated by commas; default {BATCHES['cpu']}, GPU: {BATCHES['gpu']}"
    )
    parser.add_argument("--width", type=int, default=1024, help="of the embeddings")
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Times the sides in interleaved rounds, after checking that loss and gradients agree.

    On a CPU, memory is measured first, each side in a separate process. A side that would need more than is free is
    skipped. Its need is extrapolated from the smaller batch, by the square of the batch.

    Raises:
      UserError: torch is not installed; on a GPU, as `gpu.run`.
    """
    batches = sorted(int(number) for number in (args.batches or BATCHES[args.device]).split(","))
    if args.device == "gpu":
        from benchmarks.loss import gpu

        return gpu.run(batches, args.width, args.rounds, progress)
    try:
        import torch
    except ImportError as error:
        raise UserError("torch is not installed: pip install torch") from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peaks: dict[str, tuple[int, int]] = {}
    rows, forecasts, settings, apart = [], [], [], 0.0
    for pairs in batches:
        config, works = None, {}
        for side in SIDES:
            before, peak = peaks.get(side, (pairs, 0))
            forecast = peak * (pairs // before) ** 2
            if side in ("jfe", "third") or forecast < 0.8 * _free():
                peaks[side] = pairs, _peak(side, pairs, args.width, config)
                works[side] = make(side, *embeddings(pairs, args.width), config=config)
            if side == "jit":
                before, peak = peaks[side]
                config = third(pairs, args.width, peak * (pairs // before) ** 2)
        settings.append(f"`{words(config)}` at B = {pairs:,}")
        with progress(f"B = {pairs}", len(works) * args.rounds) as done:
            seconds, differing = _interleaved(works, args.rounds, done)
            apart = max(apart, differing)
        for side, label in LABELS.items():
            before, peak = peaks[side]
            own = seconds.get(side)
            ratio = ratios(own, seconds["jfe"]) if own else None
            rows.append([f"{pairs:,}", label, own, ratio, peak * (pairs // before) ** 2 / 2**20])
            forecasts += [] if own else [f"{label} at {pairs:,}"]
    notes = [f"Too little memory for {', '.join(forecasts)}: the memory is a forecast."] if forecasts else []
    return Result(
        tables=[table(COLUMNS, rows)],
        packages=["jax", "torch"],
        method=f"in a third: {', '.join(settings)}; E = {args.width:,}; {args.rounds} interleaved rounds: median (min "
        "to max); memory: what is added to the embeddings",
        checked=checked(apart),
        notes=notes,
    )


def make(
    side: str, queries: np.ndarray, candidates: np.ndarray, config: LossConfig | None = None, device: str = "cpu"
) -> Callable[[], tuple[Any, Any, Any]]:
    """A function without arguments that gives loss and gradients to queries and candidates [B, E].

    Args:
      config: of "third".
      device: PyTorch's.
    """
    if side == "torch":
        return _torch(queries, candidates, device)
    if side == "jit":
        return _jit(queries, candidates)
    return _jfe(config if side == "third" else LossConfig(temperature=TEMPERATURE), queries, candidates)


def third(pairs: int, width: int, plain: int, tile_mib: float = TILE_MIB["cpu"]) -> LossConfig:
    """Settings with which the loss takes a third of `plain` bytes.

    Beside the gradients, which it gives, and the logits that it keeps, it holds seven arrays of a block's size, and the
    process some MiB.
    """
    gradients = 8 * pairs * width / 2**20
    keep = plain / 2**20 / 3 - gradients - 7 * tile_mib - 28
    return LossConfig(temperature=TEMPERATURE, tile_mib=tile_mib, keep_mib=float(max(0, int(keep))))


def words(config: LossConfig) -> str:
    """Settings of `third`, as on a command line."""
    return f"--loss.keep_mib={config.keep_mib:.0f} --loss.tile_mib={config.tile_mib:.0f}"


def check(side: str, ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """By how much loss and gradients of a side differ from ours, of the largest number of each.

    Raises:
      UserError: by more than rounding.
    """
    both = [(np.asarray(one), np.asarray(other)) for one, other in zip(ours, theirs, strict=True)]
    apart = max(np.abs(one - other).max() / np.abs(one).max() for one, other in both)
    if not apart <= TOLERANCE:
        raise UserError(f"loss or gradients of {side} are not ours: nothing to compare")
    return apart


def checked(apart: float) -> str:
    """Describes the outcome of `check` for a result."""
    return f"the loss and both gradients, which differ by up to {apart:.0e} of the largest"


def embeddings(pairs: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random queries and their candidates, unit rows, float32 [B, E].

    Pairs are of a kind by sixteens, at a cosine of about 0.5 beside 0.7 within a pair: the gradients are those of
    negatives that count, as in training, and show it if one is wrong.
    """
    random = np.random.default_rng(0)
    kinds = np.repeat(random.standard_normal((-(-pairs // 16), width), np.float32), 16, axis=0)[:pairs]
    common = kinds + np.float32(0.4**0.5) * random.standard_normal((pairs, width), np.float32)
    both = (common + np.float32(0.6**0.5) * random.standard_normal((pairs, width), np.float32) for _ in range(2))
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in both)


def _jfe(config: LossConfig, queries: np.ndarray, candidates: np.ndarray) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    from jfe_jax.losses import contrastive

    numbers = jnp.arange(len(queries), dtype=jnp.int32)[None]
    valid = jnp.ones(numbers.shape, bool)
    rest = (numbers, jnp.zeros_like(numbers), numbers[..., None], valid, valid)

    def loss(queries: jax.Array, candidates: jax.Array, rest: Any) -> jax.Array:
        pairs = contrastive.ContrastiveInputs(queries[None], candidates[None], *rest)
        return contrastive.contrastive_loss(pairs, contrastive.initial_parameters(config), config)[0]

    return _Compiled(loss, jnp.asarray(queries), jnp.asarray(candidates), rest)


def _jit(queries: np.ndarray, candidates: np.ndarray) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    def loss(queries: jax.Array, candidates: jax.Array) -> jax.Array:
        logits = jnp.matmul(queries, candidates.T, precision=jax.lax.Precision.HIGHEST) / TEMPERATURE
        own = jnp.diagonal(logits)
        rows, columns = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
        return jnp.mean(rows + columns - 2 * own) / 2

    return _Compiled(loss, jnp.asarray(queries), jnp.asarray(candidates))


class _Compiled:
    # Value and gradients to queries and candidates, the first two of the arguments.
    def __init__(self, loss: Callable[..., Any], *args: Any):
        import jax

        self._args = args
        self._program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()

    def __call__(self) -> tuple[Any, Any, Any]:
        import jax

        value, gradients = jax.block_until_ready(self._program(*self._args))
        return value, *gradients

    def memory(self) -> int:
        """Bytes that XLA plans, besides the arguments'."""
        plan = self._program.memory_analysis()
        return plan.temp_size_in_bytes + plan.output_size_in_bytes


def _torch(queries: np.ndarray, candidates: np.ndarray, device: str) -> Callable[[], Any]:
    import torch
    from torch.nn.functional import cross_entropy

    one, other = (torch.tensor(x, requires_grad=True, device=device) for x in (queries, candidates))
    own = torch.arange(len(queries), device=device)

    def work() -> Any:
        one.grad = other.grad = None
        logits = one @ other.T / TEMPERATURE
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), one.grad, other.grad

    return work


def _interleaved(
    sides: dict[str, Callable[[], Any]], rounds: int, progress: Callable[[int], None]
) -> tuple[dict[str, list[float]], float]:
    # Once unmeasured, to see that all compute the same.
    ours = sides["jfe"]()
    apart = max(check(side, ours, work()) for side, work in sides.items())
    return by_turns(sides, rounds, progress), apart


def _peak(side: str, pairs: int, width: int, config: LossConfig | None) -> int:
    sizes = (config.tile_mib, config.keep_mib) if side == "third" else ()
    command = [sys.executable, "-m", "benchmarks.loss.loss", side, *map(str, (pairs, width, *sizes))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _free() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _main(side: str, pairs: int, width: int, *sizes: float) -> None:
    config = LossConfig(temperature=TEMPERATURE, tile_mib=sizes[0], keep_mib=sizes[1]) if sizes else None
    work = make(side, *embeddings(pairs, width), config=config)
    before = memory.status("VmRSS")
    work()
    print(1024 * (memory.peak() - before))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
