"""An evaluation: embed the pools once, ask every query, count.

Axes: Q queries, T right candidates of a query, X candidates that show the query's own image, E embedding.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jfe_jax.data.items import Item
from jfe_jax.data.mbeir import Mbeir
from jfe_jax.errors import UserError
from jfe_jax.retrieval import metrics
from jfe_jax.retrieval.means import with_means
from jfe_jax.retrieval.mistakes import mistakes
from jfe_jax.retrieval.protocol import Asked, Pools, Questions, UnitQueries, once, read_mbeir, rectangle
from jfe_jax.retrieval.results import Answers, unit_results
from jfe_jax.retrieval.retriever import Retriever
from jfe_jax.retrieval.search import require_finite, search

# Deep enough for others to compute hit@50 from the run files.
DEPTH = max(metrics.CUTOFFS)

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]


@dataclass
class Evaluation:
    """What came out.

    Attributes:
      results: ready for JSON; see results.py.
      answers: everything that was asked, in the order of the units, then pools, then what was given.
      pools: the candidates.
    """

    results: dict
    answers: list[Answers]
    pools: Pools


def evaluate(
    retriever: Retriever,
    mbeir: Mbeir,
    *,
    split: str = "test",
    pools: Sequence[str] = ("local", "global"),
    units: Sequence[str] = (),
    instruction: int | str | None = 0,
    given: Sequence[str] = ("all",),
    depth: int = DEPTH,
    progress: Progress,
) -> Evaluation:
    """Evaluates a model on the units of a split (all of them, if none is named).

    Args:
      instruction: which of the data set's prompts goes before each query: its number from 0, None for none, or
        protocol.ALL_PROMPTS to ask with each of them and take the mean.
      given: "all" is the whole query; "text" and "image" leave out the other half of the queries that have both.
      depth: how many results of each query are kept, at least 10.
      progress: (name, items) → a context that gives a function to call with the items done.

    Raises:
      UserError: a file is missing or wrong, an image cannot be read, an embedding is not finite, nothing to ask.
    """
    questions = read_mbeir(mbeir, split, pools, units, instruction)
    return ask(retriever, questions, given=given, depth=depth, progress=progress)


def ask(
    retriever: Retriever,
    questions: Questions,
    *,
    given: Sequence[str] = ("all",),
    depth: int = DEPTH,
    progress: Progress,
) -> Evaluation:
    """As `evaluate`, whatever the questions were read from."""
    start = time.monotonic()
    table, units, pools = questions.table, questions.units, questions.pools
    jobs = [
        (unit, mode, asked)
        for unit in units
        for mode in given
        if (asked := [one for one in unit.asked if one.item(mode) is not None])
    ]
    if not jobs:
        where = questions.path if questions.split is None else f"{questions.path}: the units of split {questions.split}"
        raise UserError(f"{where}: there is no judged query to ask (given {', '.join(given)})")
    _require_images(jobs)
    items = [candidate.item() for candidate in table.candidates]
    names = [f"candidate {candidate.did}" for candidate in table.candidates]
    for _, mode, asked in jobs:
        items += [one.item(mode) for one in asked]
        names += [f"query {one.query.qid}" for one in asked]
    embeddings = _embed_unique(retriever, items, names, progress)
    candidates, at = embeddings[: len(table.candidates)], len(table.candidates)
    answers = []
    with progress("searching", len(jobs) * len(pools)) as tick:
        for unit, mode, asked in jobs:
            queries, at = embeddings[at : at + len(asked)], at + len(asked)
            for pool in pools:
                answers.append(_ask(unit, mode, pool, asked, queries, candidates, table, max(depth, 10)))
                tick(1)
    entries = [unit_results(unit, [one for one in answers if one.unit is unit]) for unit in units]
    results = with_means(entries, questions.protocol)
    about = {
        "protocol": questions.protocol.name,
        "checkpoint": str(retriever.path),
        "step": retriever.step,
        "fingerprint": retriever.fingerprint,
        "model": retriever.config.model.kind,
        "parameters": retriever.parameters,
        "data": str(questions.path),
        "split": questions.split,
        "instruction": questions.instruction,
        "given": list(given),
        "pools": list(pools),
        "candidates": len(table.candidates),
        "warnings": _warnings(retriever, units, answers),
        "seconds": round(time.monotonic() - start, 1),
    }
    return Evaluation(about | results, answers, table)


def _embed_unique(retriever: Retriever, items: list[Item], names: list[str], progress: Progress) -> np.ndarray:
    """float32 [B, E]; what is asked or found several times is embedded once."""
    numbers: dict[Item, int] = {}
    first: list[int] = []
    place = np.empty(len(items), np.int64)
    for position, item in enumerate(items):
        if item not in numbers:
            numbers[item] = len(first)
            first.append(position)
        place[position] = numbers[item]
    unique_names = [names[position] for position in first]
    with progress("embedding", len(first)) as tick:
        rows = retriever.encode([items[position] for position in first], names=unique_names, progress=tick)
    require_finite(rows, unique_names, str(retriever.path))
    return rows[place]


def _ask(
    unit: UnitQueries,
    mode: str,
    pool: str,
    questions: list[Asked],
    queries: np.ndarray,
    candidates: np.ndarray,
    table: Pools,
    depth: int,
) -> Answers:
    if questions[0].among is not None:
        return _ask_among(unit, mode, pool, questions, queries, candidates, table, depth)
    rows = table.rows[pool, unit.unit.name]
    targets = table.targets(questions, pool, unit.unit.name)
    parts = (targets.right, targets.own, targets.foil)
    found = search(queries, candidates[rows], depth, np.maximum(np.concatenate(parts, axis=1), -1))
    ranks, own_ranks, foil_ranks = np.split(found.ranks, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
    dangling = targets.right == -2
    return Answers(
        unit=unit,
        pool=pool,
        given=mode,
        asked=questions,
        pool_size=len(rows),
        ranks=np.where(dangling, metrics.NOT_RETRIEVED, ranks),
        gains=targets.gains,
        own_ranks=own_ranks,
        foil_ranks=foil_ranks,
        dangling=int(dangling[once(questions)].sum()),
        rows=rows[found.rows],
        scores=found.scores,
        mistakes=mistakes(questions, rows[found.rows[:, 0]], table),
    )


def _ask_among(
    unit: UnitQueries,
    mode: str,
    pool: str,
    questions: list[Asked],
    queries: np.ndarray,
    candidates: np.ndarray,
    table: Pools,
    depth: int,
) -> Answers:
    """Each query against its own candidates; a wrong one with the right one's score stands before it."""
    ranks, gains = ([[] for _ in questions] for _ in range(2))
    kept = np.full((len(questions), min(depth, max(len(one.among) for one in questions))), -1)
    scores = np.zeros(kept.shape, np.float32)
    for number, (asked, query) in enumerate(zip(questions, queries, strict=True)):
        own = np.unique([table.row[did] for did in asked.among])
        found = np.vecdot(candidates[own].astype(np.float64), query.astype(np.float64)).astype(np.float32)
        right = np.array([table.candidates[row].did in asked.relevant for row in own])
        order = np.lexsort((own, right, -found))
        ranks[number] = (np.flatnonzero(right[order]) + 1).tolist()
        gains[number] = [asked.relevant[table.candidates[own[at]].did] for at in order if right[at]]
        best = order[: kept.shape[1]]
        kept[number, : len(best)], scores[number, : len(best)] = own[best], found[best]
    nothing = np.zeros((len(questions), 0), np.int64)
    return Answers(
        unit=unit,
        pool=pool,
        given=mode,
        asked=questions,
        pool_size=len(table.rows[pool, unit.unit.name]),
        ranks=rectangle(ranks, metrics.PADDING, np.int64),
        gains=rectangle(gains, 0, np.float32),
        own_ranks=nothing,
        foil_ranks=nothing,
        dangling=0,
        rows=kept,
        scores=scores,
        mistakes=mistakes(questions, kept[:, 0], table),
    )


def _require_images(jobs: list[tuple[UnitQueries, str, list[Asked]]]) -> None:
    """Before hours of embedding: the queries' images are there."""
    wanted = {one.item(mode).image: one.query.qid for _, mode, asked in jobs for one in asked}
    wanted.pop(None, None)
    missing = [image for image in wanted if not image.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such image, of query {wanted[missing[0]]} ({len(missing)} of {len(wanted)} images of "
            "queries are missing)"
        )


def _warnings(retriever: Retriever, asked: list[UnitQueries], answers: list[Answers]) -> list[str]:
    warnings = []
    for unit in asked:
        if unit.unjudged:
            warnings.append(f"{unit.unit.name}: {unit.unjudged} queries have no right candidate in the qrels; left out")
        warnings += unit.warnings
    for one in answers:
        if one.given == "all" and one.dangling:
            lost = int((one.best[once(one.asked)] == metrics.NOT_RETRIEVED).sum())
            warnings.append(
                f"{one.unit.unit.name}, {one.pool} pool: {one.dangling} qrels point at candidates that are not in the "
                f"pool ({lost} queries have no other); they count as misses"
            )
    if retriever.cut_texts:
        warnings.append(f"{retriever.cut_texts} texts were longer than tokens.max_text_tokens and were cut")
    return warnings
