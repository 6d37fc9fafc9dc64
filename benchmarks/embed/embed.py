"""Compares `jfe embed` with sentence-transformers on the exported checkpoint, from files to vectors on disk.

Items with a text, an image or both are mixed in one file. Both sides open the directory that
`jfe convert to-hf --layout sentence-transformers` writes, each in its own process (`embed.backend`). Every round reads
a pool under a new path, so neither side has seen its images before.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.model_sizes import geometry
from benchmarks.common.result import Cell, Progress, Result, ratios, table
from benchmarks.embed import pool
from benchmarks.embed.backend import Apart
from jfe_jax.config import Config, ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.plan import flops

# Of the difference between a vector of ours and of theirs, both of length 1; rounding to bfloat16 adds up over layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
# What `SentenceTransformer.encode` takes if nobody chooses.
DEFAULT_BATCH = 32
# Of the 3 B geometry, whose own tokenizer is not there; a look-up, whatever its size.
VOCABULARY = 32768


class Pool(NamedTuple):
    """Of the items: their number, those with an image, mean tokens, and the FLOPs that their vectors need."""

    items: int
    images: int
    tokens: float
    work: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares sizes."""
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--geometry", help="tiny, 30m, 150m or 3b; default 30m, on a GPU 3b")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), help="default float32, on a GPU bfloat16")
    parser.add_argument("--items", type=int, default=2000, help="of the pool")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="2,4,8,16,64", help="their batch sizes that are tried besides 32")
    parser.add_argument("--tried", type=int, default=64, help="items that each of them is tried on")
    parser.add_argument("--dir", type=Path, help="where to make pool and model")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Times both sides in interleaved rounds, after checking that their vectors agree.

    Raises:
      UserError: sentence-transformers is not installed, or the vectors differ.
    """
    for package in ("sentence_transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install sentence-transformers")
    if args.device == "gpu":
        # This process has its JAX too; the card is the sides'.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, contextlib.ExitStack() as ending:
        return _measure(args, Path(folder), progress, ending)


def _geometry(args: argparse.Namespace) -> str:
    return args.geometry or ("3b" if args.device == "gpu" else "30m")


def _model(args: argparse.Namespace) -> ModelConfig:
    model = geometry(_geometry(args))
    if model.text.vocab_size > 2 * VOCABULARY:
        text = dataclasses.replace(model.text, vocab_size=VOCABULARY)
        model = dataclasses.replace(model, text=text, image_token=VOCABULARY - 1)
    return dataclasses.replace(model, dtype=args.dtype or ("bfloat16" if args.device == "gpu" else "float32"))


def _measure(args: argparse.Namespace, folder: Path, progress: Progress, ending: contextlib.ExitStack) -> Result:
    items = pool.write_pool(folder / "pool", args.items)
    texts = [record["text"] for record in map(json.loads, items.read_text(encoding="utf-8").splitlines())]
    config = pool.write_export(folder / "exported", _model(args), [text for text in texts if text])
    ours, theirs = (Apart(side, folder / "exported", args.device) for side in ("jfe", "sentence-transformers"))
    for side in (ours, theirs):
        ending.callback(side.close)
    dtype = config.model.dtype
    rate, device = ours.rate(dtype, folder / "rate")
    rate = max(rate, theirs.rate(dtype, folder / "rate")[0])
    # The first calls compile, and are compared.
    started = time.perf_counter()
    first = ours(items, folder / "first")
    compiled = time.perf_counter() - started
    apart = float(np.linalg.norm(first - theirs(items, folder / "first.npy", DEFAULT_BATCH), axis=1).max())
    if not apart <= TOLERANCE[dtype]:
        raise UserError(f"the vectors differ by up to {apart:.1e}: the two sides do not compute the same")
    tried = _tried(args, folder, items, theirs)
    best = min(tried, key=tried.__getitem__)
    sides: dict[str, Callable[[Path, Path], Any]] = {
        "jfe": ours,
        f"sentence-transformers, batches of {best}": lambda file, out: theirs(file, out.with_suffix(".npy"), best),
    }
    if best != DEFAULT_BATCH:
        sides[f"the same, of {DEFAULT_BATCH} (its default)"] = lambda file, out: theirs(
            file, out.with_suffix(".npy"), DEFAULT_BATCH
        )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with progress("rounds", args.rounds * len(sides)) as done:
        for turn in range(args.rounds):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                file = pool.linked(items.parent, folder / "again")
                started = time.perf_counter()
                sides[name](file, folder / "out")
                seconds[name].append(time.perf_counter() - started)
                shutil.rmtree(file.parent)
                shutil.rmtree(folder / "out", ignore_errors=True)
                done(1)
    rate = max(rate, *(side.rate(dtype, folder / "rate")[0] for side in (ours, theirs)))
    told = _told(items, config)
    return Result(
        tables=[_table(seconds, told, rate)],
        packages=["jax", "sentence-transformers", "transformers", "torch"],
        method=f"{_named(args, config)}; {told.items:,} items, {told.images / told.items:.0%} with an image, "
        f"{told.tokens:.0f} tokens on average; medians of {args.rounds} interleaved rounds; matrix rate "
        f"{rate / 1e9:.0f} GFLOP/s; FLOPs that the vectors need, without padding",
        checked=f"vectors, equal to {apart:.0e}",
        notes=[
            f"Nothing is compiled in the rounds. jfe's first call took {compiled:.0f} s, of which compilation took "
            f"{compiled - statistics.median(seconds['jfe']):.0f} s. A pool of any size pays that once.",
            f"Batch sizes of sentence-transformers, seconds for {args.tried} items: "
            + ", ".join(f"{size}: {took:.1f}" for size, took in sorted(tried.items()))
            + ".",
        ],
        device=device if args.device == "gpu" else "",
    )


def _tried(args: argparse.Namespace, folder: Path, items: Path, theirs: Apart) -> dict[int, float]:
    """Seconds by batch size, of the pool's first items."""
    some = items.with_name("some.jsonl")
    some.write_text("".join(items.read_text(encoding="utf-8").splitlines(True)[: args.tried]), encoding="utf-8")
    took = {}
    for size in sorted({DEFAULT_BATCH, *(int(size) for size in args.batches.split(","))}):
        started = time.perf_counter()
        theirs(some, folder / "tried.npy", size)
        took[size] = time.perf_counter() - started
    return took


def _named(args: argparse.Namespace, config: Config) -> str:
    cut = config.model.text.vocab_size < geometry(_geometry(args)).text.vocab_size
    return f"{_geometry(args)}{f' with a vocabulary of {VOCABULARY:,}' * cut}, {config.model.dtype}"


def _told(items: Path, config: Config) -> Pool:
    from jfe_jax.data.processor import ItemEncoder
    from jfe_jax.embedding.items_jsonl import read_items

    encoder = ItemEncoder(config.tokens, config.model.vision, config.model.image_token)
    found = [one for _, one in read_items(items)]
    lengths = [len(encoder.tokens(one.text, one.instruction, one.image is not None)) for one in found]
    images = sum(one.image is not None for one in found)
    work = flops.count_embedding_flops(config, flops.items_workload(lengths, images))
    return Pool(len(found), images, statistics.mean(lengths), work)


def _table(seconds: dict[str, list[float]], told: Pool, rate: float) -> Any:
    rows: list[list[Cell]] = []
    for name, own in seconds.items():
        speeds = [told.items / second for second in own]
        used = [told.work / second / rate for second in own]
        rows.append([name, speeds, used, None if name == "jfe" else ratios(own, seconds["jfe"])])
    return table({"side": "", "items/s": ".2f", "of the matrix rate": ".0%", "jfe / this": ".2f"}, rows)
