"""The score that decides: exact, whatever blocks and devices a candidate was found with.

Matrix products on blocks of different shapes sum in different orders, so the same candidate has scores that differ in
their last bits, and equal candidates are not equal any more. So blocks only say who may be among the best. What is
returned, and what orders it, is the inner product in float64 rounded to float32, each computed alone.

Axes: Q queries, K candidates of a query, E embedding.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jfe_jax.embedding.row_source import RowSource

# A float32 inner product of E terms is off by E·2⁻²⁴·|q||c| at most, and by λ·√E·2⁻²⁴·|q||c| with a probability that
# vanishes in λ (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019).
_LAMBDA = 4.0


def tolerance(queries: np.ndarray, norm: float) -> np.ndarray:
    """float64 [Q]: how far a float32 score of each query [Q, E] is from the exact one, with candidates up to `norm`."""
    lengths, width = np.linalg.norm(queries.astype(np.float64), axis=1), queries.shape[1]
    # Processors may take products below the smallest normal number for 0.
    return _LAMBDA * np.sqrt(width) * 2.0**-24 * lengths * norm + width * float(np.finfo(np.float32).tiny)


def exact_scores(
    queries: np.ndarray, candidates: RowSource, rows: np.ndarray, there: np.ndarray | None = None
) -> np.ndarray:
    """float32 [Q, K]: scores of the candidates numbered `rows` [Q, K]; -inf for those that are not `there`."""
    scores = np.full(rows.shape, -np.inf, np.float32)
    there = np.ones(rows.shape, bool) if there is None else there

    def of_query(number: int) -> None:
        # One dot product for each row: its order of summation depends on nothing but E.
        wanted = there[number]
        scores[number, wanted] = np.vecdot(candidates.take(rows[number, wanted]), queries[number].astype(np.float64))

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        list(threads.map(of_query, range(len(queries))))
    return scores


def best_first(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k first of [Q, K] by falling score, equals by rising row."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
