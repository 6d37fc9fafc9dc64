"""Our exact search beside faiss.IndexFlatIP: seconds for a batch of queries, and whether they find the same.

Both keep the pool in memory, use all cores that this process may use, and are asked by turns.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jfe_jax.errors import UserError
from jfe_jax.retrieval.search import Searcher


class Row(NamedTuple):
    """One batch size on one pool.

    Attributes:
      ours, theirs: median seconds of a batch.
      ratio: median over the rounds of theirs / ours, each pair measured one after the other.
      same: share of the k results that both found at the same place, or with scores equal to 1e-5.
    """

    pool: int
    width: int
    queries: int
    ours: float
    theirs: float
    ratio: float
    same: float


def run(pools: Sequence[tuple[int, int]], batches: Sequence[int], k: int, rounds: int) -> Iterator[Row]:
    """Times each batch size on each pool (rows, width) of random unit vectors.

    Raises:
      UserError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("faiss is not installed: pip install faiss-cpu") from error
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    for size, width in pools:
        random = np.random.default_rng(0)
        pool, queries = (_unit_rows(random, count, width) for count in (size, max(batches)))
        index = faiss.IndexFlatIP(width)
        index.add(pool)
        searcher = Searcher(pool)
        for batch in batches:
            asked = queries[:batch]
            found, (scores, rows) = searcher.search(asked, k), index.search(asked, k)
            same = (found.rows == rows) | (np.abs(found.scores - scores) < 1e-5)
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(_timed(searcher.search, asked, k))
                theirs.append(_timed(index.search, asked, k))
            ratio = statistics.median(one / other for one, other in zip(theirs, ours, strict=True))
            yield Row(size, width, batch, statistics.median(ours), statistics.median(theirs), ratio, float(same.mean()))


def _unit_rows(random: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = random.standard_normal((count, width), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _timed(work: Callable, *args) -> float:
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start
