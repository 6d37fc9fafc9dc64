"""What is asked → answers: each pool is searched for all that is asked of it, and a search that is finished is kept.

    {folder}/{unit}.{pool}.{given}[.prompt{n}].npz     what a search found, and a digest of what it was made of

Axes: Q queries, T right candidates of a query, K kept for a query, E embedding.
"""

import functools
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jfe_jax.embedding.embedding_cache import CachedRows
from jfe_jax.embedding.row_source import ArrayRows, RowSource
from jfe_jax.embedding.shard_store import decode
from jfe_jax.evaluation import metrics
from jfe_jax.evaluation.error_analysis import classify_mistakes
from jfe_jax.evaluation.eval_set import (
    CandidatePools,
    EvalQuery,
    EvalSet,
    EvalTask,
    Targets,
    by_prompt,
    first_occurrence,
    pad_ragged,
)
from jfe_jax.evaluation.results import RankedResults
from jfe_jax.parallel.distributed import all_or_none, allgather_json, is_process_zero
from jfe_jax.search.exact import Found, Searcher

# On the CPU, pools up to so many bytes stay in memory from one unit to the next; larger ones are read for each, which
# takes no longer.
_RESIDENT = 128 << 20
# Candidates that are read for each query apart are kept, decoded, up to so many bytes.
_IN_MEMORY = 1 << 30
# Bytes of the queries that are asked together.
_QUERY_BYTES = 256 << 20


class Job(NamedTuple):
    """A unit's queries given in one way: `first` and those after it among all queries' embeddings."""

    unit: EvalTask
    given: str
    asked: list[EvalQuery]
    first: int


class SearchCache:
    """Searches that are finished.

    Args:
      folder: where they are.
      made_of: whatever else they depend on, such as the checkpoint.
    """

    def __init__(self, folder: Path, made_of: str):
        self._folder, self._made_of = folder, made_of

    def digest(self, *parts: bytes | np.ndarray | str) -> str:
        """Of all that a search is made of."""
        digest = hashlib.blake2b(self._made_of.encode(), digest_size=16)
        for part in parts:
            content = part.encode() if isinstance(part, str) else np.ascontiguousarray(part)
            digest.update(f"\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def load(self, name: str, digest: str) -> Found | None:
        """What was found, if it is there, whole, in every process."""
        found = None
        try:
            with open(self._folder / f"{name}.npz", "rb") as stream, np.load(stream) as file:
                if str(file["digest"]) == digest:
                    found = Found(*(file[field] for field in Found._fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        return found if all(allgather_json(found is not None)) else None

    def save(self, name: str, digest: str, found: Found) -> None:
        """Keeps it; the file is there whole or not at all."""
        with all_or_none():
            if is_process_zero():
                self._folder.mkdir(parents=True, exist_ok=True)
                part = self._folder / f"{name}.part"
                with part.open("wb") as stream:
                    np.savez(stream, digest=np.array(digest), **found._asdict())
                os.replace(part, self._folder / f"{name}.npz")


def run_searches(
    jobs: Sequence[Job],
    questions: EvalSet,
    candidates: CachedRows,
    queries: CachedRows,
    contents: np.ndarray,
    *,
    depth: int,
    kept: SearchCache,
    progress: Callable[[int], None],
) -> list[RankedResults]:
    """Returns the results of each job on each of the questions' pools, in this order.

    Args:
      candidates: embeddings of the questions' candidates; `queries` of all jobs' queries, and `contents`, what they
        say.
      progress: called with the number of scores computed, or found computed, since its last call; see `count_scores`.
    """
    done: dict[tuple[int, str], RankedResults] = {}
    pools, table = questions.pools, questions.table
    # Units that share a pool one after the other: it is opened once.
    shared: dict[int, list[tuple[int, str]]] = {}
    for number, job in enumerate(jobs):
        for pool in pools:
            shared.setdefault(id(table.rows[pool, job.unit.unit.name]), []).append((number, pool))
    for asks in shared.values():
        number, pool = asks[0]
        if jobs[number].asked[0].among is not None:
            rows = _in_memory(candidates)
            for number, pool in asks:
                done[number, pool] = rank_subset(jobs[number], pool, rows, queries, table, depth, progress)
            continue
        rows = table.rows[pool, jobs[number].unit.unit.name]
        search = _Search(table, rows, candidates, queries, contents, depth, kept)
        for number, pool in asks:
            done[number, pool] = search.search_pool(jobs[number], pool, progress)
    return [done[number, pool] for number in range(len(jobs)) for pool in pools]


def count_scores(jobs: Sequence[Job], pools: Sequence[str], table: CandidatePools) -> int:
    """How many scores `run_searches` computes."""
    return sum(
        len(job.asked) * len(table.rows[pool, job.unit.unit.name])
        if job.asked[0].among is None
        else sum(len(one.among) for one in job.asked)
        for job in jobs
        for pool in pools
    )


class _Search:
    """A pool that is asked several times; opened when the first search is not kept."""

    def __init__(
        self,
        table: CandidatePools,
        rows: np.ndarray,
        candidates: CachedRows,
        queries: CachedRows,
        contents: np.ndarray,
        depth: int,
        kept: SearchCache,
    ):
        self._table, self._rows, self._queries, self._contents, self._kept = table, rows, queries, contents, kept
        self._candidates, self._depth = candidates[rows], depth
        self._digest = table.candidates.digest(rows)
        self._searcher: Searcher | None = None

    def search_pool(self, job: Job, pool: str, progress: Callable[[int], None]) -> RankedResults:
        asked, table = job.asked, self._table
        targets = table.targets(asked, pool, job.unit.unit.name)
        parts = (targets.right, targets.own, targets.foil)
        together = np.maximum(np.concatenate(parts, axis=1), -1)
        prompts = by_prompt(asked)
        found: Found | None = None
        for prompt, numbers in prompts.items():
            name = f"{job.unit.unit.name}.{pool}.{job.given}" + (f".prompt{prompt}" if len(prompts) > 1 else "")
            one = self._found(name, np.array(numbers) + job.first, together[numbers], progress)
            if found is None:
                found = Found(*(np.empty((len(asked), *part.shape[1:]), part.dtype) for part in one))
            for whole, part in zip(found, one, strict=True):
                whole[numbers] = part
        return _answers(job, pool, targets, found, self._rows, table)

    def _found(self, name: str, numbers: np.ndarray, targets: np.ndarray, progress: Callable[[int], None]) -> Found:
        digest = self._kept.digest(self._digest, self._contents[numbers], targets, str(self._depth))
        found = self._kept.load(name, digest)
        if found is not None:
            progress(len(self._rows) * len(targets))
            return found
        if self._searcher is None:
            size = len(self._rows) * self._candidates.row_bytes
            on_cpu = jax.local_devices()[0].platform == "cpu"
            self._searcher = Searcher(self._candidates, resident=size <= _RESIDENT if on_cpu else None)
        queries = self._queries[numbers]
        step = max(1, _QUERY_BYTES // queries.row_bytes)
        parts = []
        for start in range(0, len(targets), step):
            asked, wanted = queries.read(start, start + step)[0], targets[start : start + step]
            count = functools.partial(_count, progress, len(asked))
            parts.append(self._searcher.search(asked, self._depth, wanted, progress=count))
        found = Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        self._kept.save(name, digest, found)
        return found


def _count(progress: Callable[[int], None], queries: int, rows: int) -> None:
    progress(queries * rows)


def _answers(
    job: Job, pool: str, targets: Targets, found: Found, rows: np.ndarray, table: CandidatePools
) -> RankedResults:
    widths = [part.shape[1] for part in (targets.right, targets.own)]
    ranks, own_ranks, foil_ranks = np.split(found.ranks, np.cumsum(widths), axis=1)
    dangling = targets.right == -2
    return RankedResults(
        unit=job.unit,
        pool=pool,
        given=job.given,
        asked=job.asked,
        pool_size=len(rows),
        ranks=np.where(dangling, metrics.NOT_RETRIEVED, ranks),
        gains=targets.gains,
        own_ranks=own_ranks,
        foil_ranks=foil_ranks,
        dangling=int(dangling[first_occurrence(job.asked)].sum()),
        rows=rows[found.rows],
        scores=found.scores,
        mistakes=classify_mistakes(job.asked, rows[found.rows[:, 0]], table),
    )


def _in_memory(rows: CachedRows) -> RowSource:
    """The same rows, decoded once if they are few."""
    size = 4 * rows.shape[0] * rows.shape[1]
    return ArrayRows(decode(*rows.read(0, rows.shape[0]))) if size <= _IN_MEMORY else rows


def rank_subset(
    job: Job,
    pool: str,
    candidates: RowSource,
    queries: CachedRows,
    table: CandidatePools,
    depth: int,
    progress: Callable[[int], None],
) -> RankedResults:
    """Each query against its own candidates; a wrong one with the right one's score stands before it."""
    questions, known = job.asked, table.candidates
    ranks, gains = ([[] for _ in questions] for _ in range(2))
    kept = np.full((len(questions), min(depth, max(len(one.among) for one in questions))), -1)
    scores = np.zeros(kept.shape, np.float32)
    embeddings = queries[np.arange(job.first, job.first + len(questions))]
    for number, asked in enumerate(questions):
        query = embeddings.take(np.array([number]))[0]
        own = np.unique([known.row(did) for did in asked.among])
        found = np.vecdot(candidates.take(own), query).astype(np.float32)
        right = np.array([known.did(row) in asked.relevant for row in own])
        order = np.lexsort((own, right, -found))
        ranks[number] = (np.flatnonzero(right[order]) + 1).tolist()
        gains[number] = [asked.relevant[known.did(own[at])] for at in order if right[at]]
        best = order[: kept.shape[1]]
        kept[number, : len(best)], scores[number, : len(best)] = own[best], found[best]
        progress(len(asked.among))
    nothing = np.zeros((len(questions), 0), np.int64)
    return RankedResults(
        unit=job.unit,
        pool=pool,
        given=job.given,
        asked=questions,
        pool_size=len(table.rows[pool, job.unit.unit.name]),
        ranks=pad_ragged(ranks, metrics.PADDING, np.int64),
        gains=pad_ragged(gains, 0, np.float32),
        own_ranks=nothing,
        foil_ranks=nothing,
        dangling=0,
        rows=kept,
        scores=scores,
        mistakes=classify_mistakes(questions, kept[:, 0], table),
    )
