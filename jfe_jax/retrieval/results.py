"""Ranks → the numbers of `results.json`, the lines of `queries.jsonl`, and TREC run files.

    results.json
      units.{unit}.pools.{pool}       size, dangling, metrics, without_source, two_way, two_way_foil, controls,
                                      kinds.{kind} and edits.{edit} (metrics and without_source of those queries)
      groups.{pool}.{group}           the same metrics, mean over the group's units; "all units" and "headline" too
      kinds.{pool}.{kind}             mean over the units that have such queries

Metrics are fractions of 1. `without_source` is what they are once the candidates that show the query's own image are
taken out of the pool; `two_way` is how often the best right candidate stands before all of those, `two_way_foil` before
the wrong candidate that the data set names as the query's foil.
"""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jfe_jax.retrieval import metrics
from jfe_jax.retrieval.groups import GROUPS, TASK_NAMES, headline_cutoff
from jfe_jax.retrieval.protocol import Asked, Pools, UnitQueries

HEADLINE = "headline: mean hit@5, of Fashion data sets hit@10"


@dataclass(frozen=True)
class Answers:
    """One unit's queries, given in one way, on one pool.

    Attributes:
      ranks: int [Q, T] of what is right, as in metrics.py; `gains` float [Q, T].
      own_ranks: int [Q, X] of the candidates that show the query's own image; `foil_ranks` int [Q, 1] of the foil.
      dangling: right candidates that are not in the pool.
      rows, scores: [Q, depth] of the best candidates, positions in Pools.candidates.
    """

    unit: UnitQueries
    pool: str
    given: str
    asked: list[Asked]
    pool_size: int
    ranks: np.ndarray
    gains: np.ndarray
    own_ranks: np.ndarray
    foil_ranks: np.ndarray
    dangling: int
    rows: np.ndarray
    scores: np.ndarray

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


def unit_results(unit: UnitQueries, answers: list[Answers]) -> dict:
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
        "queries": len(unit.asked),
        "unjudged": unit.unjudged,
        "pools": pools,
    }


def with_means(units: list[dict]) -> dict:
    """Adds the means over units, each unit weighing the same."""
    units = [unit for unit in units if unit["pools"]]
    pools = list(dict.fromkeys(pool for unit in units for pool in unit["pools"]))
    groups, kinds = {}, {}
    for pool in pools:
        members = [unit for unit in units if pool in unit["pools"]]
        by_group = {name: [unit for unit in members if unit["task"] in tasks] for name, tasks in GROUPS.items()}
        groups[pool] = {
            name: _mean([unit["pools"][pool] for unit in chosen])
            for name, chosen in (*by_group.items(), ("all units", members))
            if chosen
        }
        groups[pool][HEADLINE] = float(
            np.mean([unit["pools"][pool]["metrics"][f"hit@{headline_cutoff(unit['dataset'])}"] for unit in members])
        )
        names = sorted({kind for unit in members for kind in unit["pools"][pool]["kinds"]})
        kinds[pool] = {
            kind: _mean(
                [unit["pools"][pool]["kinds"][kind] for unit in members if kind in unit["pools"][pool]["kinds"]]
            )
            for kind in names
        }
    return {"groups": groups, "kinds": kinds, "units": {unit["unit"]: unit for unit in units}}


def query_lines(answers: Iterable[Answers]) -> Iterable[dict]:
    """The lines of queries.jsonl: where the best right candidate stands, for each query, pool and way of asking.

    Ranks are from 1; None if what is asked for (a right candidate, the query's own image, its foil) is not in the pool.
    """
    for one in answers:
        best_without = metrics.best_rank(one.ranks_without_source)
        own, foil = metrics.best_rank(one.own_ranks), metrics.best_rank(one.foil_ranks)
        for number, asked in enumerate(one.asked):
            yield {
                "unit": one.unit.unit.name,
                "task": one.unit.task,
                "qid": asked.query.qid,
                "pool": one.pool,
                "given": one.given,
                "rank": _rank(one.best[number]),
                "rank_without_source": _rank(best_without[number]),
                "source_rank": _rank(own[number]),
                "foil_rank": _rank(foil[number]),
                "cluster": asked.cluster,
                "kind": asked.kind,
                "edit": asked.edit,
            }


def write(out: Path, results: dict, answers: list[Answers], pools: Pools) -> None:
    """Writes results.json (last), queries.jsonl, runs/{unit}.{pool}.trec and qrels/{unit}.qrels."""
    for folder in ("runs", "qrels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    with (out / "queries.jsonl").open("w", encoding="utf-8") as file:
        for line in query_lines(answers):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    dids = [candidate.did for candidate in pools.candidates]
    for one in answers:
        if one.given != answers[0].given:
            continue
        name = one.unit.unit.name
        with (out / "runs" / f"{name}.{one.pool}.trec").open("w", encoding="utf-8") as file:
            for asked, rows, scores in zip(one.asked, one.rows, one.scores.tolist(), strict=True):
                for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
                    # Nine digits give a float32 back exactly.
                    file.write(f"{asked.query.qid} Q0 {dids[row]} {rank} {score:.9g} jfe\n")
        with (out / "qrels" / f"{name}.qrels").open("w", encoding="utf-8") as file:
            for asked in one.asked:
                for did, gain in asked.relevant.items():
                    file.write(f"{asked.query.qid} 0 {did} {gain}\n")
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _entry(one: Answers) -> dict:
    return {
        "size": one.pool_size,
        "queries": len(one.asked),
        "dangling": one.dangling,
        "metrics": metrics.means(one.metrics),
        "without_source": metrics.means(one.metrics_without_source),
        "source_in_pool": int(one.own_ranks.any(1).sum()),
        "two_way": _two_way(one.best, one.own_ranks),
        "foil_in_pool": int(one.foil_ranks.any(1).sum()),
        "two_way_foil": _two_way(one.best, one.foil_ranks),
        "kinds": _of(one, [asked.kind for asked in one.asked]),
        "edits": _of(one, [asked.edit for asked in one.asked]),
    }


def _two_way(best: np.ndarray, others: np.ndarray) -> float | None:
    asked = others.any(1)
    return float((best < metrics.best_rank(others))[asked].mean()) if asked.any() else None


def _of(one: Answers, values: list[str | None]) -> dict:
    entries = {}
    for value in sorted({value for value in values if value}):
        chosen = np.array([other == value for other in values])
        entries[value] = {
            "queries": int(chosen.sum()),
            "metrics": metrics.means({name: numbers[chosen] for name, numbers in one.metrics.items()}),
            "without_source": metrics.means(
                {name: numbers[chosen] for name, numbers in one.metrics_without_source.items()}
            ),
        }
    return entries


def _mean(entries: list[dict]) -> dict:
    mean = {"units": len(entries), "queries": sum(entry["queries"] for entry in entries)}
    for key in ("metrics", "without_source"):
        mean[key] = {name: float(np.mean([entry[key][name] for entry in entries])) for name in entries[0][key]}
    for key in ("two_way", "two_way_foil"):
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        if values:
            mean[key] = float(np.mean(values))
    controls = dict.fromkeys(given for entry in entries for given in entry.get("controls", ()))
    if controls:
        mean["controls"] = {
            given: _mean([entry["controls"][given] for entry in entries if given in entry.get("controls", ())])
            for given in controls
        }
    return mean


def _rank(rank: np.integer) -> int | None:
    return None if rank == metrics.NOT_RETRIEVED else int(rank)
