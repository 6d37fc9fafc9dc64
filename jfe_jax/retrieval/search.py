"""Exact nearest neighbours by inner product, a block of scores at a time.

Ties go to the candidate that stands first, so the answer does not depend on the blocks.

Axes: Q queries, N candidates, E embedding, T targets of a query, C candidates of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfe_jax.errors import UserError

QUERY_BLOCK = 1024
CANDIDATE_BLOCK = 8192
# Targets are padded to a multiple of this, and lengths to round numbers: many pools and units share few compilations.
_TARGET_STEP = 4


class Found(NamedTuple):
    """What `search` found.

    Attributes:
      scores: float32 [Q, k], falling.
      rows: int32 [Q, k]; positions in the candidates.
      ranks: int32 [Q, T]; rank from 1 of each target among all N candidates; 0 for a target of -1.
    """

    scores: np.ndarray
    rows: np.ndarray
    ranks: np.ndarray


def search(
    queries: np.ndarray,
    candidates: np.ndarray,
    k: int,
    targets: np.ndarray | None = None,
    *,
    query_block: int = QUERY_BLOCK,
    candidate_block: int = CANDIDATE_BLOCK,
) -> Found:
    """The k best candidates of each query, and the exact ranks of given targets.

    Candidates are read a block at a time, so they may be a memory map larger than memory.

    Args:
      queries: float [Q, E].
      candidates: float [N, E]; N at least 1.
      k: results per query; N if there are fewer.
      targets: int [Q, T]; positions in the candidates, padded with -1.

    Raises:
      UserError: there are no candidates, or the widths differ.
    """
    if not len(candidates):
        raise UserError("the pool of candidates is empty: there is nothing to search")
    if queries.shape[1] != candidates.shape[1]:
        raise UserError(
            f"queries have width {queries.shape[1]}, candidates {candidates.shape[1]}: "
            "they were embedded by different checkpoints"
        )
    k = min(k, len(candidates))
    width = 0 if targets is None else targets.shape[1]
    padded_targets = np.full((len(queries), -(-width // _TARGET_STEP) * _TARGET_STEP), -1, np.int32)
    if targets is not None:
        padded_targets[:, :width] = targets
    query_block = min(query_block, _rounded(len(queries)))
    candidate_block = min(candidate_block, _rounded(len(candidates)))
    blocks = [
        _Block(
            _padded(queries[start : start + query_block], query_block, 0),
            _padded(padded_targets[start : start + query_block], query_block, -1),
            k,
        )
        for start in range(0, len(queries), query_block)
    ]
    total = len(candidates)
    single = total <= candidate_block
    for start, block in _blocks(candidates, candidate_block):
        for part in blocks:
            scores = _scores(part.queries, block)
            part.best = _merge(part.best, scores, start, total, k)
            if width:
                part.wanted = _target_scores(part.wanted, scores, part.targets, start)
            if width and single:
                part.ahead = _count_ahead(part.ahead, scores, part.wanted, part.targets, start, total)
    # What stands ahead of a target can be counted only once its score is known.
    for start, block in _blocks(candidates, candidate_block) if width and not single else ():
        for part in blocks:
            scores = _scores(part.queries, block)
            part.ahead = _count_ahead(part.ahead, scores, part.wanted, part.targets, start, total)
    scores, rows = (_joined([part.best[i] for part in blocks], len(queries), k) for i in range(2))
    ahead = _joined([part.ahead for part in blocks], len(queries), padded_targets.shape[1])
    ranks = np.where(padded_targets < 0, 0, ahead + 1)[:, :width]
    return Found(scores.astype(np.float32), rows.astype(np.int32), ranks.astype(np.int32))


def require_finite(embeddings: np.ndarray, names: list[str], what: str) -> None:
    """Raises UserError with the first name of a row [B, E] that holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(bad):
        raise UserError(
            f"{what}: the embedding of {names[bad[0]]} is not finite ({len(bad)} of {len(embeddings)} are so): "
            "training has probably diverged; take an earlier checkpoint"
        )


class _Block:
    """A block of queries and what is known of it so far."""

    def __init__(self, queries: np.ndarray, targets: np.ndarray, k: int):
        self.queries = queries
        self.targets = targets
        self.best = np.full((len(queries), k), -np.inf, np.float32), np.zeros((len(queries), k), np.int32)
        self.wanted = np.zeros(targets.shape, np.float32)
        self.ahead = np.zeros(targets.shape, np.int32)


# Scores are always computed by this one function on these block shapes: a target's score must equal, to the last bit,
# the one that it is compared with.
@jax.jit
def _scores(queries: jax.Array, block: jax.Array) -> jax.Array:
    return jnp.einsum("qe,ce->qc", queries, block, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="k")
def _merge(best: tuple[jax.Array, jax.Array], scores: jax.Array, start: int, total: int, k: int):
    rows = start + jnp.arange(scores.shape[1], dtype=jnp.int32)
    scores = jnp.where(rows < total, scores, -jnp.inf)
    # top_k prefers the lower position among equals, and earlier blocks stand first.
    top, position = jax.lax.top_k(scores, min(k, scores.shape[1]))
    joined = jnp.concatenate([best[0], top], axis=1)
    joined_rows = jnp.concatenate([best[1], start + position.astype(jnp.int32)], axis=1)
    top, position = jax.lax.top_k(joined, k)
    return top, jnp.take_along_axis(joined_rows, position, axis=1)


@jax.jit
def _target_scores(wanted: jax.Array, scores: jax.Array, targets: jax.Array, start: int) -> jax.Array:
    column = targets - start
    here = (column >= 0) & (column < scores.shape[1])
    return jnp.where(here, jnp.take_along_axis(scores, jnp.where(here, column, 0), axis=1), wanted)


@jax.jit
def _count_ahead(ahead, scores, wanted, targets, start: int, total: int):
    rows = start + jnp.arange(scores.shape[1], dtype=jnp.int32)

    def of_target(_, column):
        score, target = column
        before = (scores > score[:, None]) | ((scores == score[:, None]) & (rows < target[:, None]))
        return None, (before & (rows < total)).sum(1, dtype=jnp.int32)

    _, counts = jax.lax.scan(of_target, None, (wanted.T, targets.T))
    return ahead + counts.T


def _blocks(candidates: np.ndarray, size: int):
    for start in range(0, len(candidates), size):
        yield start, jnp.asarray(_padded(candidates[start : start + size], size, 0))


def _padded(rows: np.ndarray, size: int, filler: int) -> np.ndarray:
    dtype = np.int32 if np.issubdtype(rows.dtype, np.integer) else np.float32
    padded = np.full((size, rows.shape[1]), filler, dtype)
    padded[: len(rows)] = rows
    return padded


def _joined(parts: list[jax.Array | np.ndarray], length: int, width: int) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts] or [np.zeros((0, width))])[:length]


def _rounded(length: int) -> int:
    return -(-length // 1024) * 1024 if length > 1024 else max(128, 1 << max(length - 1, 0).bit_length())
