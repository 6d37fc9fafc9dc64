"""The M-BEIR protocol: embed the pools once, ask every query, count.

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
from jfe_jax.retrieval.protocol import Asked, Pools, UnitQueries, read_pools, read_queries
from jfe_jax.retrieval.results import Answers, unit_results, with_means
from jfe_jax.retrieval.retriever import Retriever
from jfe_jax.retrieval.search import require_finite, search

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
    instruction: int | None = 0,
    given: Sequence[str] = ("all",),
    depth: int = 10,
    progress: Progress,
) -> Evaluation:
    """Evaluates a model on the units of a split (all of them, if none is named).

    Args:
      given: "all" is the whole query; "text" and "image" leave out the other half of the queries that have both.
      depth: how many results of each query are kept, at least 10.
      progress: (name, items) → a context that gives a function to call with the items done.

    Raises:
      UserError: a file is missing or wrong, an image cannot be read, an embedding is not finite, nothing to ask.
    """
    start = time.monotonic()
    chosen = [mbeir.unit(split, name) for name in units] if units else mbeir.units(split)
    table = read_pools(mbeir, split, chosen, pools)
    asked = [read_queries(mbeir, split, unit, table, instruction) for unit in chosen]
    asked = sorted(asked, key=lambda unit: (unit.task, unit.unit.name))
    jobs = [
        (unit, mode, questions)
        for unit in asked
        for mode in given
        if (questions := [one for one in unit.asked if one.item(mode) is not None])
    ]
    if not jobs:
        raise UserError(
            f"{mbeir.path}: the units of split {split} have no judged query to ask (given {', '.join(given)})"
        )
    items = [candidate.item() for candidate in table.candidates]
    names = [f"candidate {candidate.did}" for candidate in table.candidates]
    for _, mode, questions in jobs:
        items += [one.item(mode) for one in questions]
        names += [f"query {one.query.qid}" for one in questions]
    embeddings = _embed_unique(retriever, items, names, progress)
    candidates, at = embeddings[: len(table.candidates)], len(table.candidates)
    answers = []
    with progress("searching", len(jobs) * len(pools)) as tick:
        for unit, mode, questions in jobs:
            queries, at = embeddings[at : at + len(questions)], at + len(questions)
            for pool in pools:
                answers.append(_ask(unit, mode, pool, questions, queries, candidates, table, max(depth, 10)))
                tick(1)
    results = with_means([unit_results(unit, [one for one in answers if one.unit is unit]) for unit in asked])
    about = {
        "checkpoint": str(retriever.path),
        "step": retriever.step,
        "fingerprint": retriever.fingerprint,
        "model": retriever.config.model.kind,
        "parameters": retriever.parameters,
        "data": str(mbeir.path),
        "split": split,
        "instruction": instruction,
        "given": list(given),
        "pools": list(pools),
        "candidates": len(table.candidates),
        "warnings": _warnings(retriever, asked, answers, instruction),
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
        dangling=int(dangling.sum()),
        rows=rows[found.rows],
        scores=found.scores,
    )


def _warnings(
    retriever: Retriever, asked: list[UnitQueries], answers: list[Answers], instruction: int | None
) -> list[str]:
    warnings = []
    for unit in asked:
        if unit.unjudged:
            warnings.append(f"{unit.unit.name}: {unit.unjudged} queries have no right candidate in the qrels; left out")
        if instruction is not None and any(one.instruction is None for one in unit.asked):
            warnings.append(f"{unit.unit.name}: the data has no instructions for it; queries were given none")
    for one in answers:
        if one.given == "all" and one.dangling:
            warnings.append(
                f"{one.unit.unit.name}, {one.pool} pool: {one.dangling} qrels point at candidates that are not in the "
                f"pool ({int((one.best == metrics.NOT_RETRIEVED).sum())} queries have no other); they count as misses"
            )
    if retriever.cut_texts:
        warnings.append(f"{retriever.cut_texts} texts were longer than tokens.max_text_tokens and were cut")
    return warnings
