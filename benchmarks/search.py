"""Compares exact search with faiss.IndexFlatIP: seconds for a batch of queries, and agreement of the results.

Both hold the pool in memory, use all cores that this process may use, and run in interleaved rounds.
"""

import argparse
import os

import numpy as np

from benchmarks.common.interleaved import by_turns
from benchmarks.common.result import Progress, Result, ratios, table
from jfe_jax.errors import UserError
from jfe_jax.search.exact import Searcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares pools and batch sizes."""
    parser.add_argument("--pools", default="1000000x256,200000x1024", help="rows x width, separated by commas")
    parser.add_argument("--batches", default="1,64,1024", help="queries asked together")
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Times each batch size on each pool of random unit vectors.

    Raises:
      UserError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("faiss is not installed: pip install faiss-cpu") from error
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    pools = [tuple(int(number) for number in pool.split("x")) for pool in args.pools.split(",")]
    batches = [int(number) for number in args.batches.split(",")]
    rows, same = [], 1.0
    with progress("searches", 2 * args.rounds * len(pools) * len(batches)) as done:
        for size, width in pools:
            random = np.random.default_rng(0)
            pool, queries = (_unit_rows(random, count, width) for count in (size, max(batches)))
            index = faiss.IndexFlatIP(width)
            index.add(pool)
            searcher = Searcher(pool)
            for batch in batches:
                asked = queries[:batch]
                found, (scores, theirs) = searcher.search(asked, args.k), index.search(asked, args.k)
                same = min(same, float(((found.rows == theirs) | (np.abs(found.scores - scores) < 1e-5)).mean()))
                sides = {
                    "jfe": lambda s=searcher, q=asked: s.search(q, args.k),
                    "faiss": lambda i=index, q=asked: i.search(q, args.k),
                }
                took = by_turns(sides, args.rounds, done)
                rows.append([f"{size:,} x {width}", batch, *took.values(), ratios(took["faiss"], took["jfe"])])
    formats = {"pool": "", "queries": "d", "jfe, s": ".3f", "faiss, s": ".3f", "faiss / jfe": ".2f"}
    return Result(
        tables=[table(formats, rows)],
        packages=["jax", "faiss-cpu"],
        method=f"the {args.k} best; {args.rounds} interleaved rounds: median (min to max)",
        checked=f"{same:.4%} of the results or more are the same row at the same rank, or have a score equal to 1e-5",
    )


def _unit_rows(random: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = random.standard_normal((count, width), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
