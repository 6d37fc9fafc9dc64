"""Retrieval metrics, computed from the ranks of the right candidates.

`hit@k` asks whether any right candidate is among the first k (M-BEIR calls this "Recall@k"), `recall@k` how many of
them are. The definitions are trec_eval's: linear gains, and a right candidate that was not retrieved still counts as
wanted.

Axes: Q queries, T right candidates of a query (padded).
"""

from collections.abc import Sequence

import numpy as np

PADDING = 0
NOT_RETRIEVED = np.iinfo(np.int32).max
CUTOFFS = (1, 5, 10, 20, 50)


def per_query(
    ranks: np.ndarray,
    gains: np.ndarray | None = None,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    depth: int = 10,
) -> dict[str, np.ndarray]:
    """Every metric of every query.

    Args:
      ranks: int [Q, T]; rank of each right candidate from 1, NOT_RETRIEVED if it is not in the ranking, PADDING for an
        unused column.
      gains: float [Q, T]; relevance above 0 of each right candidate; 1 if not given.
      cutoffs: the k of hit@k and recall@k.
      depth: the k of nDCG@k and MRR@k.

    Returns:
      float64 [Q] by name ("hit@1", "recall@1", …, "ndcg@10", "mrr@10", "map"); NaN where a query has nothing right.
    """
    ranks = np.asarray(ranks, np.int64)
    used = ranks != PADDING
    gains = np.where(used, 1.0 if gains is None else np.asarray(gains, np.float64), 0.0)
    wanted = used.sum(1)
    best = best_rank(ranks)
    with np.errstate(invalid="ignore"):
        values = {}
        for k in cutoffs:
            values[f"hit@{k}"] = (best <= k).astype(np.float64)
        for k in cutoffs:
            values[f"recall@{k}"] = (used & (ranks <= k)).sum(1) / wanted
        values[f"ndcg@{depth}"] = _dcg(ranks, gains, depth) / _dcg(_ideal_ranks(gains), gains, depth)
        values[f"mrr@{depth}"] = np.where(best <= depth, 1.0 / np.maximum(best, 1), 0.0)
        values["map"] = _precision_sum(ranks, used) / wanted
    return {name: np.where(wanted > 0, value, np.nan) for name, value in values.items()}


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean over the queries that have something right; NaN if none has."""
    finite = {name: value[np.isfinite(value)] for name, value in values.items()}
    return {name: float(value.mean()) if len(value) else float("nan") for name, value in finite.items()}


def best_rank(ranks: np.ndarray) -> np.ndarray:
    """int64 [Q]: the smallest rank of each row of [Q, T]; NOT_RETRIEVED if it has none."""
    ranks = np.asarray(ranks, np.int64)
    return np.where(ranks == PADDING, NOT_RETRIEVED, ranks).min(1, initial=NOT_RETRIEVED)


def without(ranks: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Ranks [Q, T] after the candidates at ranks `removed` [Q, X] (padded alike) are taken out of the ranking."""
    ahead = (removed != PADDING)[:, None, :] & (removed[:, None, :] < ranks[:, :, None])
    return np.where((ranks == PADDING) | (ranks == NOT_RETRIEVED), ranks, ranks - ahead.sum(2))


def _ideal_ranks(gains: np.ndarray) -> np.ndarray:
    order = np.argsort(-gains, axis=1, kind="stable")
    ranks = np.empty(gains.shape, np.int64)
    np.put_along_axis(ranks, order, np.arange(1, gains.shape[1] + 1)[None].repeat(len(gains), 0), axis=1)
    return ranks


def _dcg(ranks: np.ndarray, gains: np.ndarray, depth: int) -> np.ndarray:
    counted = (ranks != PADDING) & (ranks <= depth)
    return (np.where(counted, gains, 0.0) / np.log2(np.where(counted, ranks, 1) + 1)).sum(1)


def _precision_sum(ranks: np.ndarray, used: np.ndarray) -> np.ndarray:
    ordered = np.sort(np.where(used, ranks, NOT_RETRIEVED), axis=1)
    found = ordered != NOT_RETRIEVED
    precision = np.arange(1, ranks.shape[1] + 1)[None] / np.where(found, ordered, 1)
    return np.where(found, precision, 0.0).sum(1)
