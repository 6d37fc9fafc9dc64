"""Searches a pool that is larger than memory, exactly: seconds and peak memory.

The pool is generated as float16 and read from its file by a separate process. Its peak memory is VmHWM from Linux:
every page that it had in memory, including pages of files. Each query is a row of the pool with noise, and must find
that row.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common import memory
from benchmarks.common.result import Progress, Result, table
from jfe_jax.embedding.row_source import FileRows
from jfe_jax.search.exact import search

_BLOCK = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the pool."""
    parser.add_argument("--rows", type=int, default=5_600_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--dir", type=Path, help="where to make it: 23 GB by default")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Generates the pool, searches it and removes it."""
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        file = Path(folder) / "pool.npy"
        with progress("generating", args.rows) as made:
            generate(file, args.rows, args.width, made)
        size = file.stat().st_size / 1e9
        command = [sys.executable, "-m", "benchmarks.stream", str(file), str(args.queries), str(args.k)]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    seconds, peak, right = float(told[-3]), int(told[-2]) / 2**20, int(told[-1])
    formats = {"pool": "", "GB on disk": ".1f", "queries": "d", "s": ".0f", "peak memory, GiB": ".2f"}
    row = [f"{args.rows:,} x {args.width} float16", size, args.queries, seconds, peak]
    return Result(
        tables=[table(formats, [row])],
        packages=["jax"],
        method=f"the {args.k} best of each, one search",
        checked=f"{right} of {args.queries} queries, rows of the pool with noise, found their row",
    )


def generate(file: Path, rows: int, width: int, progress: Callable[[int], None]) -> None:
    """Writes float16 [rows, width] of unit rows, no two of them equal up to 8192 · width rows."""
    random = np.random.default_rng(0)
    base = random.standard_normal((_BLOCK, width), np.float32)
    base = (base / np.linalg.norm(base, axis=1, keepdims=True)).astype(np.float16)
    twice = np.concatenate([base, base], axis=1)
    with open(file, "wb") as stream:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, rows, _BLOCK):
            # The same numbers with the columns turned: another direction, at the cost of a copy.
            turn = start // _BLOCK % width
            part = twice[: rows - start, turn : turn + width]
            stream.write(np.ascontiguousarray(part))
            progress(len(part))


def _search(file: Path, queries: int, k: int) -> None:
    rows = FileRows(file, norm=1.01)
    random = np.random.default_rng(1)
    wanted = np.sort(random.choice(rows.shape[0], queries, replace=False))
    asked = rows.take(wanted).astype(np.float32)
    asked += random.standard_normal(asked.shape, np.float32) / np.sqrt(rows.shape[1])
    start = time.monotonic()
    found = search(asked, rows, k)
    seconds = time.monotonic() - start
    print(seconds, memory.peak(), int((found.rows[:, 0] == wanted).sum()))


if __name__ == "__main__":
    _search(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
