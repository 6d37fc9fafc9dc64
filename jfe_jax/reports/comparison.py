"""Several models' evaluations side by side: tables over seeds, and the intervals of their differences.

A model is one or more evaluations ("runs"), one for each seed; run i of every model must have answered the same
queries, while run j may have others (another fold). Differences are paired over models: each bootstrap replicate draws
clusters of queries and runs, and draws the same for all models.

Axes: M models, R runs, U units, C clusters, Q queries.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jfe_jax.errors import UserError
from jfe_jax.evaluation.protocols import FUSION
from jfe_jax.evaluation.query_slices import (
    Slice,
    does_not,
    needs_fusion,
    of_rank,
    of_unit,
    of_units,
    of_value,
    query_key,
    value_of,
)

REPLICATES = 2000


@dataclass(frozen=True)
class Run:
    """One evaluation directory: `results.json`, and `queries.jsonl` as one dict a query and pool."""

    path: Path
    results: dict
    queries: list[dict]


def load_run(path: Path) -> Run:
    """Reads what `jfe eval` wrote to `path`; UserError if it is not there or broken."""
    try:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        lines = (path / "queries.jsonl").read_text(encoding="utf-8").splitlines()
        return Run(path, results, [json.loads(line) for line in lines])
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; is {path} the --out of a finished `jfe eval`?") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON ({error}); run `jfe eval` again") from error


def load_models(named: dict[str, Sequence[Path]]) -> dict[str, list[Run]]:
    """All runs of all models.

    Raises:
      UserError: a directory cannot be read, the models differ in their number of runs, or run i of two models did not
        answer the same queries.
    """
    models = {name: [load_run(Path(path)) for path in paths] for name, paths in named.items()}
    first_name, first = next(iter(models.items()))
    for name, runs in models.items():
        if len(runs) != len(first):
            raise UserError(
                f"{first_name} has {len(first)} evaluations and {name} {len(runs)}: give each the same number"
            )
        for one, other in zip(first, runs, strict=True):
            left, right = (
                {(*query_key(line), line["pool"], line["given"]) for line in run.queries} for run in (one, other)
            )
            if left != right:
                unit, qid, _, pool, given = min(left ^ right)
                raise UserError(
                    f"{one.path} and {other.path} are not of the same queries (such as {qid} of {unit}, {pool} "
                    f"pool, given {given}): list each model's evaluations in the same order, made with the same options"
                )
    return models


class Comparison:
    """A metric of several models on one pool, sliced and with intervals.

    Args:
      rank_key: which rank counts; only hit@k, mrr@k and the headline come from a rank alone.
      metric: as in results.json; "headline" is the protocol's, hit@k with a k for each data set.
    """

    def __init__(
        self,
        models: dict[str, list[Run]],
        pool: str,
        *,
        rank_key: str = "rank",
        given: str = "all",
        metric: str = "hit@1",
        replicates: int = REPLICATES,
        seed: int = 0,
    ):
        self.names = list(models)
        first = next(iter(models.values()))[0].results
        self._order = {unit: number for number, unit in enumerate(first["units"])}
        self.members: dict[str, list[str]] = first.get("members", {})
        value = value_of(metric, rank_key, first)
        self.runs = len(next(iter(models.values())))
        lines = [
            [[line for line in run.queries if line["pool"] == pool and line["given"] == given] for run in runs]
            for runs in models.values()
        ]
        # Run i of every model has the same queries; in one order they are one array.
        self._queries = [sorted(run, key=query_key) for run in lines[0]]
        self._hits = [
            np.array([[value(line) for line in sorted(model[run], key=query_key)] for model in lines])
            for run in range(self.runs)
        ]
        self._clusters = sorted({line["cluster"] for run in self._queries for line in run})
        self._numbers = {cluster: number for number, cluster in enumerate(self._clusters)}
        self._replicates = replicates
        self._seed = seed
        self._known: dict[Slice, tuple[np.ndarray, np.ndarray]] = {}

    @functools.cached_property
    def units(self) -> list[str]:
        """Units in the order of the evaluation."""
        there = {(line["task"], line["unit"]) for run in self._queries for line in run}
        return [unit for _, unit in sorted(there, key=lambda pair: (self._order.get(pair[1], 0), *pair))]

    def values(self, key: str) -> list[str]:
        """The values that the queries have under `key` ("kind", "edit"), sorted; None left out."""
        return sorted({line[key] for run in self._queries for line in run if line.get(key)})

    def counts(self, slice_: Slice) -> int:
        """Queries in a slice, over all runs; one asked with several prompts is one."""
        return sum(len({query_key(line)[:2] for line in run if slice_.wanted(line)}) for run in self._queries)

    def means(self, slice_: Slice) -> np.ndarray:
        """float64 [M, R]: mean over units of the metric, each unit weighing the same; NaN where a slice is empty."""
        hits, counts = self._sums(slice_)
        with np.errstate(invalid="ignore", divide="ignore"):
            return _mean_of_units(hits.sum(-1) / counts.sum(-1))

    def replicates(self, slices: Sequence[Slice]) -> list[np.ndarray]:
        """float64 [replicates, M] of each slice: bootstrapped means over runs and units, all from the same draws."""
        sums = [self._sums(one) for one in slices]
        # A slice concerns few of the clusters.
        used = [np.flatnonzero(counts.any((0, 1))) for _, counts in sums]
        sums = [(hits[..., few], counts[..., few]) for (hits, counts), few in zip(sums, used, strict=True)]
        random = np.random.default_rng(self._seed)
        clusters = len(self._clusters)
        picked = random.integers(0, self.runs, (self._replicates, self.runs))
        parts: list[list[np.ndarray]] = [[] for _ in slices]
        step = max(1, int(2e7) // max(clusters, 1))
        for start in range(0, self._replicates, step):
            size = min(step, self._replicates - start)
            weights = random.multinomial(clusters, np.full(clusters, 1 / clusters), size).astype(np.float64)
            for part, (hits, counts), few in zip(parts, sums, used, strict=True):
                drawn = weights[:, few].T
                with np.errstate(invalid="ignore", divide="ignore"):
                    means = _mean_of_units(np.moveaxis(hits @ drawn / (counts @ drawn), -1, 0))
                part.append(_nanmean(np.take_along_axis(means, picked[start : start + size, None, :], axis=2), 2))
        return [np.concatenate(part) for part in parts]

    def _sums(self, slice_: Slice) -> tuple[np.ndarray, np.ndarray]:
        """Hits [M, R, U, C] and counts [R, U, C] of the slice."""
        if slice_ in self._known:
            return self._known[slice_]
        units = {unit: number for number, unit in enumerate(self.units)}
        hits = np.zeros((len(self.names), self.runs, len(units), len(self._clusters)))
        counts = np.zeros(hits.shape[1:])
        for run, queries in enumerate(self._queries):
            chosen = [number for number, line in enumerate(queries) if slice_.wanted(line)]
            at = (
                [units[queries[number]["unit"]] for number in chosen],
                [self._numbers[queries[number]["cluster"]] for number in chosen],
            )
            np.add.at(counts[run], at, 1)
            for model in range(len(self.names)):
                np.add.at(hits[model, run], at, self._hits[run][model, chosen])
        self._known[slice_] = hits, counts
        return hits, counts


def compare(models: dict[str, list[Run]], *, metric: str = "hit@1", replicates: int = REPLICATES) -> dict:
    """All pools, with and without the query's own image, and the controls; ready for JSON.

    Without the query's own image only what comes from a rank alone is known: hit@k, mrr@k and the headline.

    Raises:
      UserError: the evaluations have no pool in common, or do not tell the metric.
    """
    every = [run for runs in models.values() for run in runs]
    pools = [pool for pool in every[0].results["pools"] if all(pool in run.results["pools"] for run in every)]
    if not pools:
        raise UserError("the evaluations have no pool in common; run `jfe eval --pool local,global` for each")
    # A control run (`--queries text`) is compared by what it was given.
    main, *controls = every[0].results["given"]
    told = {"metric": metric, "replicates": replicates, "pools": {}}
    keys = {"with_source": "rank", "without_source": "rank_without_source"}
    if not of_rank(metric):
        del keys["without_source"]
    for pool in pools:
        settings = {
            name: summary(Comparison(models, pool, rank_key=key, given=main, metric=metric, replicates=replicates))
            for name, key in keys.items()
        }
        settings["controls"] = {
            given: summary(Comparison(models, pool, given=given, metric=metric, replicates=replicates), details=False)
            for given in controls
        }
        told["pools"][pool] = settings
    return told


def summary(comparison: Comparison, *, details: bool = True) -> dict:
    """Everything that is said about one comparison, ready for JSON.

    Gains are of the first model over another, in the unit of the metric (1 = 100 %), each as {"value", "low", "high"}
    with its 95 % interval; "pairs" has those of every model over every one behind it, as {model: {other: gain}}, from
    the same draws. `details` adds kinds and edits.
    "best_other" has the highest mean where fusion is needed (where none is, the first other).
    """
    groups = [group for group in (needs_fusion(), does_not()) if comparison.counts(group)]
    families = {"groups": groups, "units": [of_unit(unit) for unit in comparison.units]}
    others = [of_units(name, units) for name, units in comparison.members.items() if name not in FUSION]
    families["forms"] = [group for group in others if comparison.counts(group)]
    for family, key in (("kinds", "kind"), ("edits", "edit")) if details else ():
        families[family] = [of_value(key, value) for value in comparison.values(key)]
    drawn = iter(comparison.replicates([member for members in families.values() for member in members]))
    drawn = {family: {member.name: next(drawn) for member in members} for family, members in families.items()}
    ranked = [*groups[:1], *(group for group in families["forms"] if group.name == "all units")]
    ranking = comparison.means(ranked[0]).mean(1) if ranked else np.zeros(len(comparison.names))
    others = comparison.names[1:]
    best = max(others, key=lambda name: ranking[comparison.names.index(name)]) if others else None
    told = {"models": comparison.names, "runs": comparison.runs, "best_other": best}
    for family, members in families.items():
        told[family] = {member.name: _told(comparison, member, drawn[family][member.name]) for member in members}
    if len(groups) == 2 and others:
        one, other = (group.name for group in groups)
        means = comparison.means(groups[0]) - comparison.means(groups[1])
        pairs = _pairs(comparison, means, drawn["groups"][one] - drawn["groups"][other])
        told |= {"difference_of_gains": _of_first(pairs), "difference_of_pairs": pairs}
    return told


def _told(comparison: Comparison, slice_: Slice, replicates: np.ndarray) -> dict:
    means = comparison.means(slice_)
    pairs = _pairs(comparison, means, replicates)
    return {
        "queries": comparison.counts(slice_),
        "models": {
            name: {"mean": _nanmean(row, 0).item(), "sd": float(np.nanstd(row, ddof=1)) if len(row) > 1 else None}
            for name, row in zip(comparison.names, means, strict=True)
        },
        "gains": _of_first(pairs),
        "pairs": pairs,
    }


def _pairs(comparison: Comparison, means: np.ndarray, replicates: np.ndarray) -> dict:
    """Means [M, R] and their replicates [replicates, M] → the gain of every model over every one behind it."""
    names, pairs = comparison.names, {}
    for one, other in itertools.combinations(range(len(names)), 2):
        low, high = np.nanquantile(replicates[:, one] - replicates[:, other], [0.025, 0.975])
        value = _nanmean(means[one] - means[other], 0).item()
        pairs.setdefault(names[one], {})[names[other]] = {"value": value, "low": float(low), "high": float(high)}
    return pairs


def _of_first(pairs: dict) -> dict:
    return dict(next(iter(pairs.values()), {}))


def _mean_of_units(rates: np.ndarray) -> np.ndarray:
    return _nanmean(rates, -1)


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(axis) / there.sum(axis)
