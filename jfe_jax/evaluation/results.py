"""Ranks → the numbers of `results.json`, the lines of `queries.jsonl`, and TREC run files.

    results.json
      units.{unit}.pools.{pool}       size, dangling, metrics, without_source, two_way, two_way_foil, mistakes,
                                      controls, kinds.{kind} and edits.{edit} (metrics and without_source of those
                                      queries); asked with several prompts: prompts.{number} (metrics), spread
      groups.{pool}.{group}           the same, mean over the group's units; "all units" too
      members.{group}                 the names of those units
      headline.{pool}                 name, value, units, missing (the value is null until none is missing)
      kinds.{pool}.{kind}             mean over the units that have such queries

Metrics are fractions of 1. `without_source` is what they are once the candidates that show the query's own image are
taken out of the pool; `two_way` is how often the best right candidate stands before all of those, `two_way_foil` before
the wrong candidate that the data set names as the query's foil. `mistakes` are the shares of queries whose first result
is wrong in that way (see error_analysis.py). Asked with several prompts, `metrics` are their mean and `spread` the
standard deviation over the prompts.
"""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jfe_jax.embedding.shard_store import write_json
from jfe_jax.evaluation import metrics
from jfe_jax.evaluation.aggregate import spread
from jfe_jax.evaluation.error_analysis import MISTAKES
from jfe_jax.evaluation.eval_set import CandidatePools, EvalQuery, EvalTask, by_prompt, first_occurrence
from jfe_jax.evaluation.protocols import TASK_NAMES

# What a query's line says besides ranks, which give hit@k and mrr.
_TOLD = ("recall@", "ndcg@", "map")


@dataclass(frozen=True)
class RankedResults:
    """One unit's queries, given in one way, on one pool.

    Attributes:
      ranks: int [Q, T] of what is right, as in metrics.py; `gains` float [Q, T].
      own_ranks: int [Q, X] of the candidates that show the query's own image; `foil_ranks` int [Q, 1] of the foil.
      dangling: right candidates that are not in the pool.
      rows, scores: [Q, depth] of the best candidates, positions in CandidatePools.candidates; -1 where there are no
        more.
      mistakes: int8 [Q]; what is wrong with the first result, see error_analysis.py.
    """

    unit: EvalTask
    pool: str
    given: str
    asked: list[EvalQuery]
    pool_size: int
    ranks: np.ndarray
    gains: np.ndarray
    own_ranks: np.ndarray
    foil_ranks: np.ndarray
    dangling: int
    rows: np.ndarray
    scores: np.ndarray
    mistakes: np.ndarray

    @functools.cached_property
    def best(self) -> np.ndarray:
        """int64 [Q]: rank of the best right candidate."""
        return metrics.best_rank(self.ranks)

    @functools.cached_property
    def ranks_without_source(self) -> np.ndarray:
        """int [Q, T]: ranks in the pool without the query's own image."""
        return metrics.without(self.ranks, self.own_ranks)

    @functools.cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """float64 [Q] by name."""
        return metrics.per_query(self.ranks, self.gains)

    @functools.cached_property
    def metrics_without_source(self) -> dict[str, np.ndarray]:
        """float64 [Q] by name."""
        return metrics.per_query(self.ranks_without_source, self.gains)


def unit_results(unit: EvalTask, answers: list[RankedResults]) -> dict:
    """The entry of one unit in results.json."""
    pools: dict[str, dict] = {}
    for one in answers:
        entry = _entry(one)
        if one.given == answers[0].given:
            pools[one.pool] = entry
        else:
            pools[one.pool].setdefault("controls", {})[one.given] = {
                key: entry[key] for key in ("queries", "metrics", "without_source")
            }
    return {
        "unit": unit.unit.name,
        "dataset": unit.unit.dataset,
        "task": unit.task,
        "task_name": TASK_NAMES.get(unit.task, "mixed"),
        "queries": unit.queries,
        "unjudged": unit.unjudged,
        "pools": pools,
    }


def query_lines(answers: Iterable[RankedResults]) -> Iterable[dict]:
    """The lines of queries.jsonl: where the best right candidate stands, for each query, pool and way of asking.

    Ranks are from 1; None if what is asked for (a right candidate, the query's own image, its foil) is not in the pool.
    """
    for one in answers:
        best_without = metrics.best_rank(one.ranks_without_source)
        own, foil = metrics.best_rank(one.own_ranks), metrics.best_rank(one.foil_ranks)
        several = len(by_prompt(one.asked)) > 1
        for number, asked in enumerate(one.asked):
            yield {
                "unit": one.unit.unit.name,
                "task": one.unit.task,
                "qid": asked.query.qid,
                "prompt": asked.prompt if several else None,
                "pool": one.pool,
                "given": one.given,
                "rank": _rank(one.best[number]),
                "rank_without_source": _rank(best_without[number]),
                "source_rank": _rank(own[number]),
                "foil_rank": _rank(foil[number]),
                "mistake": MISTAKES[one.mistakes[number] - 1] if one.mistakes[number] else None,
                "metrics": {
                    name: round(float(values[number]), 6)
                    for name, values in one.metrics.items()
                    if name.startswith(_TOLD)
                },
                "cluster": asked.cluster,
                "kind": asked.kind,
                "edit": asked.edit,
            }


def write_results(out: Path, results: dict, answers: list[RankedResults], pools: CandidatePools) -> None:
    """Writes results.json (last), queries.jsonl, runs/{unit}.{pool}.trec and qrels/{unit}.qrels.

    Asked with several prompts, there is a run for each, {unit}.{pool}.prompt{number}.trec.
    """
    for folder in ("runs", "qrels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    with (out / "queries.jsonl").open("w", encoding="utf-8") as file:
        for line in query_lines(answers):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    for one in answers:
        if one.given != answers[0].given:
            continue
        name = one.unit.unit.name
        for prompt, numbers in by_prompt(one.asked).items():
            part = f".prompt{prompt}" if len(by_prompt(one.asked)) > 1 else ""
            with (out / "runs" / f"{name}.{one.pool}{part}.trec").open("w", encoding="utf-8") as file:
                for number in numbers:
                    qid, found = one.asked[number].query.qid, one.rows[number]
                    dids = pools.candidates.dids(found[found >= 0])
                    for rank, (did, score) in enumerate(zip(dids, one.scores[number].tolist(), strict=False), 1):
                        # Nine digits give a float32 back exactly.
                        file.write(f"{qid} Q0 {did} {rank} {score:.9g} jfe\n")
        with (out / "qrels" / f"{name}.qrels").open("w", encoding="utf-8") as file:
            for number in first_occurrence(one.asked):
                asked = one.asked[number]
                for did, gain in asked.relevant.items():
                    file.write(f"{asked.query.qid} 0 {did} {gain}\n")
    write_json(out / "results.json", results)


def _entry(one: RankedResults) -> dict:
    return {
        "size": one.pool_size,
        "queries": len(first_occurrence(one.asked)),
        "dangling": one.dangling,
        "metrics": metrics.means(one.metrics),
        "without_source": metrics.means(one.metrics_without_source),
        "source_in_pool": int(one.own_ranks.any(1).sum()),
        "two_way": _two_way(one.best, one.own_ranks),
        "foil_in_pool": int(one.foil_ranks.any(1).sum()),
        "two_way_foil": _two_way(one.best, one.foil_ranks),
        "mistakes": {name: float((one.mistakes == code).mean()) for code, name in enumerate(MISTAKES, 1)},
        **_prompts(one),
        "kinds": _of(one, [asked.kind for asked in one.asked]),
        "edits": _of(one, [asked.edit for asked in one.asked]),
    }


def _prompts(one: RankedResults) -> dict:
    prompts = by_prompt(one.asked)
    if len(prompts) == 1:
        return {}
    told = {
        str(prompt): metrics.means({name: values[numbers] for name, values in one.metrics.items()})
        for prompt, numbers in prompts.items()
    }
    return {"prompts": told, "spread": spread(list(told.values()))}


def _two_way(best: np.ndarray, others: np.ndarray) -> float | None:
    asked = others.any(1)
    return float((best < metrics.best_rank(others))[asked].mean()) if asked.any() else None


def _of(one: RankedResults, values: list[str | None]) -> dict:
    entries = {}
    for value in sorted({value for value in values if value}):
        chosen = np.array([other == value for other in values])
        entries[value] = {
            "queries": len(
                first_occurrence([asked for asked, wanted in zip(one.asked, chosen, strict=True) if wanted])
            ),
            "metrics": metrics.means({name: numbers[chosen] for name, numbers in one.metrics.items()}),
            "without_source": metrics.means(
                {name: numbers[chosen] for name, numbers in one.metrics_without_source.items()}
            ),
        }
    return entries


def _rank(rank: np.integer) -> int | None:
    return None if rank == metrics.NOT_RETRIEVED else int(rank)
