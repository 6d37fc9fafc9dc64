"""State of one block of queries during a search: scores each block of candidates, then rescores the best exactly.

Blocks of scores select the candidates that may be among the best (topk.py), in bfloat16 where that is faster
(bf16_prefilter.py). The exact score orders them (exact_scores.py). If more candidates than fit into the K kept ones are
within rounding error of the k-th, all of them are rescored.

Axes: Q queries, N candidates, C candidates of a block, E embedding, T targets of a query, K kept for a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jfe_jax.embedding.row_source import RowSource
from jfe_jax.errors import UserError
from jfe_jax.parallel.sharding import replicated
from jfe_jax.search import bf16_prefilter, topk
from jfe_jax.search.exact_scores import best_first, exact_scores, tolerance

if TYPE_CHECKING:
    from jfe_jax.search.exact import Searcher

# As many more than k are kept, so that scores which differ by rounding alone cannot push one of the k out.
_SPARE = 14
# Targets are padded to a multiple of this: many pools and units share few compilations.
_TARGET_STEP = 4
# Doubtful queries that are looked at together.
_AT_ONCE = 1024
# A pool in which more of the queries than this are doubtful after a rough pass lies too dense for it.
_TOO_MANY = 0.1


class QueryBlock:
    """A block of queries [Q, E] and what is known of it so far."""

    def __init__(self, searcher: Searcher, queries: np.ndarray, targets: np.ndarray, k: int):
        self._searcher, self._queries, self._targets, self._k = searcher, queries, targets, k
        self._tolerance = tolerance(queries, searcher.norm)
        length = _query_length(len(queries))
        # A rank is counted, and would be in doubt for each candidate that is near a target.
        self._bf16_queries = None
        if not targets.shape[1] and searcher.uses_prefilter(length):
            self._bf16_queries = bf16_prefilter.Bf16Queries(queries, searcher.norm)
        # How far the scores asked for are off, so far.
        self._off = self._bf16_queries.tolerance(0.0) if self._bf16_queries else self._tolerance
        asked = self._bf16_queries.rounded if self._bf16_queries else queries.astype(np.float32)
        self._padded = self._on_devices(_padded(asked, length))
        keep = bf16_prefilter.SPREAD * k if self._bf16_queries else k
        self._keep = min(keep + _SPARE, searcher.rows.shape[0])
        self._top = searcher.new_top(length, k, self._keep)
        self._counts = None
        if targets.shape[1]:
            self._wanted = exact_scores(queries, searcher.rows, np.maximum(targets, 0))
            low, high = (self._wanted + sign * self._tolerance[:, None] for sign in (-1, 1))
            width = -(-targets.shape[1] // _TARGET_STEP) * _TARGET_STEP
            # Nothing is above what pads.
            bounds = [np.where(targets < 0, np.inf, bound).astype(np.float32).T for bound in (low, high)]
            self._bounds = [
                self._on_devices(np.pad(one, ((0, width - len(one)), (0, len(self._padded) - len(queries)))))
                for one in bounds
            ]

    def ask(self, several: Sequence[topk.Block]) -> Callable[[], None]:
        """Has the devices compute the scores of consecutive blocks; what it gives takes them."""
        found = topk.scores_of(self._padded, several, self._searcher.mesh)
        start, count = several[0].start, sum(block.count for block in several)
        if self._targets.shape[1]:
            counts = topk.count_between(found.scores, count, *self._bounds)
            self._counts = counts if self._counts is None else jax.tree.map(jax.numpy.add, self._counts, counts)

        def take() -> None:
            if not found.finite:
                _refuse_not_finite(self._searcher.rows, start, count)
            if self._bf16_queries:
                self._off = np.maximum(self._off, self._bf16_queries.tolerance(float(found.rounding)))
            self._top.add(found, start, count, np.pad(2 * self._off, (0, self.length - len(self._off))))

        return take

    @property
    def length(self) -> int:
        """Queries with the padding."""
        return len(self._padded)

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores and rows [Q, k] and ranks [Q, T], of all processes."""
        self._top.merge_pending()
        top = self._top
        scores, rows = self._certain(*(part[: len(self._queries)] for part in (top.scores, top.rows, top.threshold)))
        ahead = self._ahead()
        if jax.process_count() > 1:
            from jax.experimental.multihost_utils import process_allgather

            scores, rows, ahead = process_allgather((scores, rows, ahead))
            scores, rows = best_first(np.concatenate(scores, 1), np.concatenate(rows, 1), self._k)
            ahead = ahead.sum(0)
        return scores, rows, np.where(self._targets < 0, 0, ahead + 1).astype(np.int32)

    def _certain(self, kept: np.ndarray, rows: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the blocks kept [Q, K], in order of the exact scores [Q, k], with what rounding may have left out.

        Nothing that is not kept has a score above `threshold` [Q].
        """
        searcher, there = self._searcher, np.isfinite(kept) & (kept >= threshold[:, None])
        # A process with fewer than k candidates gives what comes last.
        scores = exact_scores(self._queries, searcher.rows, rows, there)
        rows = np.where(there, rows, np.iinfo(np.int32).max)
        scores, rows = best_first(scores, rows, self._k)
        if searcher.recall < 1 or searcher.last - searcher.first <= self._keep:
            return scores, rows
        doubtful = np.flatnonzero(threshold + self._off >= scores[:, -1])
        if self._bf16_queries and len(doubtful) > _TOO_MANY * len(scores):
            searcher.prefilter = False
        if len(doubtful):
            bounds = scores[doubtful, -1] - self._tolerance[doubtful], np.full(len(doubtful), np.inf)
            for number, (more, at) in self._near(doubtful, *bounds):
                query = doubtful[number]
                fresh = ~np.isin(at, rows[query])
                joined = np.concatenate([scores[query], more[fresh]]), np.concatenate([rows[query], at[fresh]])
                scores[query], rows[query] = (part[0] for part in best_first(*(one[None] for one in joined), self._k))
        return scores, rows

    def _ahead(self) -> np.ndarray:
        """int64 [Q, T]: candidates of this process that stand before each target."""
        if not self._targets.shape[1]:
            return np.zeros(self._targets.shape, np.int64)
        searcher, targets = self._searcher, self._targets
        above, within = (
            np.asarray(part, np.int64).T[: len(targets), : targets.shape[1]]
            for part in self._counts or np.zeros((2, *self._bounds[0].shape), np.int32)
        )
        here = (targets >= searcher.first) & (targets < searcher.last)
        query, column = np.nonzero((targets >= 0) & (within - above > here))
        wanted, row = self._wanted[query, column], targets[query, column]
        bounds = (wanted + sign * self._tolerance[query] for sign in (-1, 1))
        for number, (scores, rows) in self._near(query, *bounds):
            before = (scores > wanted[number]) | ((scores == wanted[number]) & (rows < row[number]))
            above[query[number], column[number]] += before.sum()
        return above

    def _near(
        self, query: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """All candidates that the blocks score from `low` to `high`, for each of the queries numbered `query`.

        Yields:
          Position in `query` and (exact scores, rows), in parts.
        """
        low, high = low.astype(np.float32), high.astype(np.float32)
        searcher = self._searcher
        for block in searcher.blocks() if len(query) else ():
            for at in range(0, len(query), _AT_ONCE):
                part = slice(at, at + _AT_ONCE)
                asked = self._queries[query[part]].astype(np.float32)
                padded = self._on_devices(_padded(asked, _query_length(len(asked))))
                for start, scores in topk.shards(topk.scores_of(padded, [block], searcher.mesh).scores):
                    scores = scores[: max(0, block.count - start), : len(asked)]
                    column, row = np.nonzero(((scores >= low[part]) & (scores <= high[part])).T)
                    for number in np.unique(column):
                        rows = (block.start + start + row[column == number])[None]
                        one = query[at + number]
                        exact = exact_scores(self._queries[one : one + 1], searcher.rows, rows)
                        yield at + number, (exact[0], rows[0])

    def _on_devices(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, replicated(self._searcher.mesh))


def _refuse_not_finite(rows: RowSource, start: int, count: int) -> None:
    stored, scales = rows.read(start, start + count)
    good = np.isfinite(stored).all(1) & (True if scales is None else np.isfinite(scales))
    where = f"row {start + int(np.argmin(good))}" if not good.all() else f"a score after row {start}"
    raise UserError(
        f"the pool of candidates: {where} is not finite: it was written by a training that diverged, or is damaged; "
        "embed it again"
    )


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


def _query_length(length: int) -> int:
    """Few shapes, so few compilations; a single query stays one."""
    if length > 256:
        return -(-length // 256) * 256
    return 1 if length == 1 else max(8, 1 << (length - 1).bit_length())
