"""Which of the candidates that a model ranks high for a query are its hard negatives.

Those that are right are taken out; of the others, those with a rank in the window are tried one after the other, and
left out if they show and say the same as a right one, lie too near to one, or score too near to what is right.

Axes: Q queries, E embedding, K candidates of a query.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jfe_jax.data.formats.mbeir import MODALITIES
from jfe_jax.errors import UserError
from jfe_jax.mining.candidate_pool import EmbeddedPool
from jfe_jax.mining.near_duplicates import Duplicates
from jfe_jax.search.exact_scores import exact_scores

# A picture that is the same is near, however it was encoded: images further apart are not compared.
_COMPARED_FROM = 0.7


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """What is mined.

    Attributes:
      negatives: of a query, at most.
      wrong_modality: how many of them are of another modality than the right ones, against ignored instructions.
      first_rank, last_rank: window of ranks, from 1, among what is not right.
      pick: "top" takes the first of the window, "random" draws from it.
      seed: of the draws.
      near: a candidate whose inner product with a right one is above 1 - near is a duplicate of it; 0: none is.
      margin: if given, a candidate that scores above the best right one's score - margin is taken for right.
      image_difference: of duplicates.Duplicates; below 0 no images are the same.
      instruction: which prompt the queries are asked with; None asks without.
      pool: "local" or "global".
      dtype: how the pool's embeddings are stored.
    """

    negatives: int = 8
    wrong_modality: int = 0
    first_rank: int = 1
    last_rank: int = 100
    pick: str = "top"
    seed: int = 0
    near: float = 0.01
    margin: float | None = None
    image_difference: float = 2.0
    instruction: int | None = 0
    pool: str = "local"
    dtype: str = "float16"


def check(settings: MiningConfig) -> None:
    """Raises UserError if settings contradict each other."""
    if settings.negatives < 1:
        raise UserError(f"negatives {settings.negatives}: at least one")
    if not 0 <= settings.wrong_modality <= settings.negatives:
        raise UserError(f"{settings.wrong_modality} negatives of the wrong modality: 0 to {settings.negatives}")
    if not 1 <= settings.first_rank <= settings.last_rank:
        raise UserError(f"ranks {settings.first_rank} to {settings.last_rank}: they rise, from 1")
    if not 0 <= settings.near <= 1:
        raise UserError(f"near {settings.near}: from 0, where nothing is a duplicate by it, to 1")
    if settings.margin is not None and not math.isfinite(settings.margin):
        raise UserError(f"margin {settings.margin}: a number")
    if settings.pick not in ("top", "random"):
        raise UserError(f"pick {settings.pick}: top or random")


class MiningQuery(NamedTuple):
    """A query to mine for: its row number in the file, its id, its right candidates in the pool, what it wants."""

    number: int
    qid: str
    right: list[int]
    wanted: str


class Searched(NamedTuple):
    """What was found for the queries `here` of those asked, which want the same modality.

    Attributes:
      found: of candidates of the wanted modality, and of the others: scores and positions [len(here), K], how many of
        them are wanted, and what those are counted as.
    """

    here: list[int]
    found: list[tuple[tuple[np.ndarray, np.ndarray], int, str]]


def search(
    settings: MiningConfig, pool: EmbeddedPool, asked: list[MiningQuery], embeddings: np.ndarray
) -> list[Searched]:
    """The best candidates of the queries, float [Q, E]. Of several processes every one calls it, with the same."""
    depth = settings.last_rank + max(len(one.right) for one in asked)
    searched = []
    for wanted in dict.fromkeys(one.wanted for one in asked):
        here = [number for number, one in enumerate(asked) if one.wanted == wanted]
        others = tuple(name for name in MODALITIES if name != wanted)
        found = [
            (pool.best(embeddings[here], depth, modalities), most, reason)
            for modalities, most, reason in (
                ((wanted,), settings.negatives - settings.wrong_modality, "wanted_modality"),
                (others, settings.wrong_modality, "wrong_modality"),
            )
            if most
        ]
        searched.append(Searched(here, found))
    return searched


def choose(
    settings: MiningConfig,
    pool: EmbeddedPool,
    duplicates: Duplicates,
    asked: list[MiningQuery],
    embeddings: np.ndarray,
    searched: list[Searched],
    counts: Counter[str],
) -> Iterator[tuple[MiningQuery, list[int]]]:
    """Each query with its negatives' positions in the pool."""
    for here, found in searched:
        best_right = _best_right(embeddings[here], pool, [asked[number].right for number in here])
        for place, number in enumerate(here):
            choice = _Choice(settings, pool, duplicates, asked[number], float(best_right[place]), counts)
            chosen = []
            for (scores, rows), most, kind in found:
                taken = choice.take(scores[place], rows[place], most)
                counts[kind] += len(taken)
                chosen += taken
            counts["short"] += len(chosen) < settings.negatives
            yield asked[number], chosen


def _best_right(embeddings: np.ndarray, pool: EmbeddedPool, right: list[list[int]]) -> np.ndarray:
    """float32 [Q]: the best score of each query's right candidates."""
    many = np.array([len(one) for one in right])
    there = np.arange(many.max()) < many[:, None]
    rows = np.zeros(there.shape, np.int64)
    rows[there] = np.concatenate(right)
    return exact_scores(embeddings, pool.rows, rows, there).max(1)


class _Choice:
    """Chooses one query's negatives from what was found."""

    def __init__(
        self,
        settings: MiningConfig,
        pool: EmbeddedPool,
        duplicates: Duplicates,
        asked: MiningQuery,
        best_right: float,
        counts: Counter[str],
    ):
        self._settings, self._pool, self._duplicates = settings, pool, duplicates
        self._asked, self._best_right, self._counts = asked, best_right, counts
        self._right_rows = pool.rows.take(np.array(asked.right))

    def take(self, scores: np.ndarray, rows: np.ndarray, most: int) -> list[int]:
        """At most so many of the candidates [K] found, in falling order."""
        settings = self._settings
        window = np.flatnonzero(~np.isin(rows, self._asked.right))[settings.first_rank - 1 : settings.last_rank]
        if settings.pick == "random":
            digits = [ord(letter) for letter in self._asked.qid]
            window = np.random.default_rng([settings.seed, *digits]).permutation(window)
        taken: list[int] = []
        # As many at a time as are still wanted: hardly any is read in vain.
        while len(taken) < most and len(window):
            some, window = np.split(window, [most - len(taken)])
            for row, reason in zip(rows[some].tolist(), self._left_out(scores[some], rows[some]), strict=True):
                if reason:
                    self._counts[reason] += 1
                else:
                    taken.append(row)
        return taken

    def _left_out(self, scores: np.ndarray, rows: np.ndarray) -> Iterator[str | None]:
        """Why each of the candidates [K] is none, or None."""
        settings, candidate = self._settings, self._pool.file.candidate
        high = scores > (np.inf if settings.margin is None else self._best_right - settings.margin)
        nearness = iter(self._pool.rows.take(rows[~high]) @ self._right_rows.T)
        for row, above in zip(rows.tolist(), high.tolist(), strict=True):
            if above:
                yield "margin"
                continue
            near = next(nearness)
            if settings.near > 0 and near.max() > 1 - settings.near:
                yield "near"
                continue
            close = [number for number, how in zip(self._asked.right, near, strict=True) if how >= _COMPARED_FROM]
            same = any(self._duplicates.same(candidate(row), candidate(one)) for one in close)
            yield "same" if same else None
