"""Compares a contrastive step on packed batches with transformers' PaliGemma in PyTorch on padded ones, in pairs/s.

Both start from the same weights (`weights`) and see the same pairs. The time of a step is that of forward and backward
pass, loss and update. Its batch is on the device already. Each side runs in its own process, with the memory allocator
that a user has. On a CPU, the steps are interleaved, after a check of losses, gradients and updated weights in this
process. A GPU's memory holds only one side, so processes are interleaved, and first losses and gradient norms compared.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.common import matmul_rate
from benchmarks.common.result import Progress, Result, table
from benchmarks.train_step import backend, compare
from benchmarks.train_step.workload import CHOICE, EQUAL_TEXT, KINDS, Settings, batches, config
from jfe_jax.errors import UserError
from jfe_jax.plan import flops

SIDES = ("jfe", "torch")
# What bfloat16 may change in the first losses and gradient norms.
ROUNDED = 0.03
# What an argument is if it is not given.
DEFAULTS = {
    "cpu": {"geometry": "30m", "rows": 20, "row_tokens": 640, "attend": "bins", "dtype": "float32"},
    "gpu": {"geometry": "3b", "rows": 8, "row_tokens": 640, "attend": "rows", "dtype": "bfloat16"},
}
COLUMNS = {
    "items": "",
    "pairs": ".0f",
    "real tokens": ".0%",
    "torch's": ".0%",
    "pairs/s": ".2f",
    "torch's pairs/s": ".2f",
    "ratio": ".2f",
    "of the matrix rate": ".0%",
    "torch's share": ".0%",
}


class Measured(NamedTuple):
    """Of our side and PyTorch's, which may be left out.

    Attributes:
      seconds: of every step by kind of items, round by round, batch by batch in each round.
      rates: FLOP/s of the machine's matrix product in the same dtype, the better of XLA's and PyTorch's, by kind of
        items: of each round, as a machine that others share is not always as fast.
      checked: what was compared before, in words.
      device: its name, "" for a CPU.
      notes: sentences.
    """

    seconds: dict[str, list[list[float]]]
    rates: dict[str, list[float]]
    checked: str
    device: str = ""
    notes: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares sizes, and how each side computes."""
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--geometry", help="tiny, 30m, 150m or 3b; default 30m on a CPU, 3b on a GPU")
    parser.add_argument("--rows", type=int, help="packed rows of a step; default 20, on a GPU 8")
    parser.add_argument("--row-tokens", type=int, help="default 640")
    parser.add_argument("--attend", choices=["rows", "bins"], help="over what; default bins on a CPU, rows on a GPU")
    parser.add_argument("--batches", type=int, default=3, help="different batches, by turns")
    parser.add_argument("--rounds", type=int, default=5, help="times that each batch is taken; on a GPU in each turn")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the products; default bfloat16 on a GPU")
    parser.add_argument("--attention", choices=["xla", "cudnn", "splash"], default="xla", help="of our model")
    parser.add_argument("--remat", choices=["none", "full", "up", "dots"], default="none", help="of our model")
    parser.add_argument("--checkpointing", action="store_true", help="PyTorch's layers are computed again")
    parser.add_argument("--compiled", action="store_true", help="PyTorch's side through torch.compile")
    parser.add_argument("--kept", action="store_true", help="CPU: PyTorch's process keeps freed memory, as ours does")
    parser.add_argument("--alone", action="store_true", help="CPU: our side only, for its share of the matrix rate")
    parser.add_argument("--turns", type=int, default=2, help="GPU: processes of each side, by turns")
    parser.add_argument("--budget-seconds", type=float, default=400, help="GPU: no turn that would end later")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Measures both sides.

    Raises:
      UserError: torch or transformers is not installed, the sides do not compute the same, or one does not fit.
    """
    given = {name: getattr(args, name) or default for name, default in DEFAULTS[args.device].items()}
    same = ("device", "batches", "attention", "remat", "checkpointing", "compiled", "kept")
    settings = Settings(**given, **{name: getattr(args, name) for name in same})
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'jfe-jax[hf]'") from error
    torch.set_num_threads(matmul_rate.threads())
    if args.device == "cpu":
        found = _on_cpu(settings, args.rounds, SIDES[:1] if args.alone else SIDES, progress)
    else:
        found = _on_gpu(settings, args.rounds, args.turns, args.budget_seconds)
    rate = statistics.median(one for own in found.rates.values() for one in own)
    how = [settings.geometry, settings.dtype]
    how += [f"{name} {getattr(args, name)}" for name in ("attention", "remat") if args.device == "gpu"]
    how += [f"PyTorch {name}" for name in ("checkpointing", "compiled") if getattr(args, name)]
    how += ["PyTorch's freed memory kept"] * args.kept
    return Result(
        tables=[table(COLUMNS, [_row(kind, found, settings) for kind in KINDS])],
        packages=["jax", "torch", "transformers"],
        method=f"{', '.join(how)}; interleaved rounds over {settings.batches} batch{'es' * (settings.batches > 1)}; "
        f"matrix rate {rate / 1e9:,.0f} GFLOP/s (median of the rounds); model FLOPs without padding and what is "
        "recomputed",
        checked=found.checked,
        notes=[
            f"mix: M-BEIR's modalities and lengths, {settings.rows} rows of {settings.row_tokens:,} tokens, attention "
            f"over {settings.attend}, PyTorch's padded to the longest of the batch; of {CHOICE} batches those whose "
            "padding is nearest to the mean.",
            f"equal: every item has an image and {EQUAL_TEXT} tokens of text, one a row on both sides.",
            *found.notes,
        ],
        device=found.device,
    )


def _on_cpu(settings: Settings, rounds: int, names: Sequence[str], progress: Progress) -> Measured:
    import jax

    seconds, measured = {}, {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as cache:
        # What is compiled here need not be in our side's process.
        jax.config.update("jax_compilation_cache_dir", cache)
        words = _checked(settings, names) if len(names) > 1 else ""
        jax.config.update("jax_compilation_cache_dir", None)
        sides = [backend.Apart(name, settings, cache) for name in names]
        try:
            with progress("steps", len(sides) * len(KINDS) * (rounds + 1) * settings.batches) as done:
                for kind in KINDS:
                    there = [(side, side.put(kind, settings.batches)) for side in sides]
                    seconds[kind] = backend.time_rounds(
                        there, rounds, done, lambda kind=kind: measured[kind].append(_rate(settings))
                    )
        finally:
            for side in sides:
                side.close()
    return Measured(seconds, measured, words)


def _checked(settings: Settings, names: Sequence[str]) -> str:
    found = compare.compare(*(backend.make(name, settings) for name in names), batches(settings, "mix"))
    words = ", ".join(f"{name} to {value:.0e}" for name, value in found._asdict().items())
    return f"{words} (relative; weights by what a step changes)"


def _rate(settings: Settings) -> float:
    return max(matmul_rate.by_jax(settings.dtype, 2), matmul_rate.by_torch(settings.dtype, 2))


def _on_gpu(settings: Settings, rounds: int, turns: int, budget: float) -> Measured:
    start, found = time.perf_counter(), {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as cache:
        for turn in range(turns):
            for side, results in found.items():
                took = results[-1].took if results else 0.0
                if budget and turn and time.perf_counter() - start + took > budget:
                    _say(f"no time left for turn {turn + 1} of {side}")
                    continue
                one = backend.apart(side, rounds, settings, cache)
                results.append(one)
                medians = (f"{kind} {statistics.median(own):.3f} s a step" for kind, own in one.seconds.items())
                _say(f"{side}: {one.took:.0f} s, of them {one.prepared:.0f} s until ready; {', '.join(medians)}")
    first = [results[0] for results in found.values()]
    apart = [
        max(abs(a / b - 1) for a, b in zip(*(getattr(one, what) for one in first), strict=True))
        for what in ("losses", "norms")
    ]
    if not max(apart) <= ROUNDED:
        raise UserError(f"losses and gradient norms differ by {apart}: the two sides do not compute the same")
    seconds = {
        kind: [[second for one in results for second in one.seconds[kind]] for results in found.values()]
        for kind in KINDS
    }
    peaks = " and ".join(f"{one.peak / 2**30:.1f} GiB ({side})" for side, one in zip(SIDES, first, strict=True))
    return Measured(
        seconds,
        {kind: [max(one.rate for results in found.values() for one in results)] for kind in KINDS},
        "losses of the first {} steps to {:.1e}, gradient norms to {:.1e}".format(compare.STEPS, *apart),
        first[0].device,
        (f"Peak memory {peaks}.",) if first[0].peak else (),
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _row(kind: str, found: Measured, settings: Settings) -> list[Any]:
    run, made = config(settings), batches(settings, kind)
    pairs, work = sum(batch.pairs for batch in made), sum(flops.count_training_flops(run, batch.load) for batch in made)
    # Batches hold different numbers of pairs: a round over all of them is one measurement.
    rounds = [[sum(own[at : at + len(made)]) for at in range(0, len(own), len(made))] for own in found.seconds[kind]]
    speeds = [[pairs / second for second in own] for own in rounds]
    real = [statistics.mean(batch.real[side] for batch in made) for side in (0, 1)]
    used = [
        [work / second / rate for second, rate in zip(own, itertools.cycle(found.rates[kind]), strict=False)]
        for own in rounds
    ]
    if len(rounds) == 1:
        return [kind, pairs / len(made), *real, *speeds, None, None, *used, None]
    # On a GPU there may be more rounds of one side.
    ratios = [a / b for a, b in zip(*speeds, strict=False)]
    return [kind, pairs / len(made), *real, *speeds, ratios, *used]
