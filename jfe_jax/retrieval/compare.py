"""Several models' evaluations side by side: tables over seeds, and the intervals of their differences.

A model is one or more evaluations ("runs"), one for each seed; run i of every model must have answered the same
queries, while run j may have others (another fold). Differences are paired over models: each bootstrap replicate draws
clusters of queries and runs, and draws the same for all models.

Axes: M models, R runs, U units, C clusters, Q queries.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jfe_jax.errors import UserError
from jfe_jax.retrieval.groups import DOES_NOT_NEED_FUSION, NEEDS_FUSION

REPLICATES = 2000


@dataclass(frozen=True)
class Run:
    """One evaluation directory: `results.json`, and `queries.jsonl` as one dict a query and pool."""

    path: Path
    results: dict
    queries: list[dict]


@dataclass(frozen=True)
class Slice:
    """The queries that a number is about: `wanted` chooses among the lines of queries.jsonl."""

    name: str
    wanted: Callable[[dict], bool]


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
                {(line["unit"], line["qid"], line["pool"], line["given"]) for line in run.queries}
                for run in (one, other)
            )
            if left != right:
                unit, qid, pool, given = min(left ^ right)
                raise UserError(
                    f"{one.path} and {other.path} are not of the same queries (such as {qid} of {unit}, {pool} "
                    f"pool, given {given}): list each model's evaluations in the same order, made with the same options"
                )
    return models


class Comparison:
    """Hit@k of several models on one pool, sliced and with intervals; `rank_key` names the rank that counts."""

    def __init__(
        self,
        models: dict[str, list[Run]],
        pool: str,
        *,
        rank_key: str = "rank",
        given: str = "all",
        k: int = 1,
        replicates: int = REPLICATES,
        seed: int = 0,
    ):
        self.names = list(models)
        self.runs = len(next(iter(models.values())))
        lines = [
            [[line for line in run.queries if line["pool"] == pool and line["given"] == given] for run in runs]
            for runs in models.values()
        ]
        # Run i of every model has the same queries; in one order they are one array.
        self._queries = [sorted(run, key=_key) for run in lines[0]]
        self._hits = [
            np.array([[_hit(line[rank_key], k) for line in sorted(model[run], key=_key)] for model in lines])
            for run in range(self.runs)
        ]
        self._clusters = sorted({line["cluster"] for run in self._queries for line in run})
        self._numbers = {cluster: number for number, cluster in enumerate(self._clusters)}
        self._replicates = replicates
        self._seed = seed
        self._known: dict[Slice, tuple[np.ndarray, np.ndarray]] = {}

    @functools.cached_property
    def units(self) -> list[str]:
        """Units in the order of task, then name."""
        return [unit for _, unit in sorted({(line["task"], line["unit"]) for run in self._queries for line in run})]

    def values(self, key: str) -> list[str]:
        """The values that the queries have under `key` ("kind", "edit"), sorted; None left out."""
        return sorted({line[key] for run in self._queries for line in run if line.get(key)})

    def counts(self, slice_: Slice) -> int:
        """Queries in a slice, over all runs."""
        return int(self._sums(slice_)[1].sum())

    def means(self, slice_: Slice) -> np.ndarray:
        """float64 [M, R]: mean over units of hit@k, each unit weighing the same; NaN where a slice is empty."""
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


def needs_fusion() -> Slice:
    return Slice("needs fusion", lambda line: line["task"] in NEEDS_FUSION)


def does_not() -> Slice:
    return Slice("does not", lambda line: line["task"] in DOES_NOT_NEED_FUSION)


def of_unit(unit: str) -> Slice:
    return Slice(unit, lambda line: line["unit"] == unit)


def of_value(key: str, value: str) -> Slice:
    return Slice(value, lambda line: line.get(key) == value)


def compare(models: dict[str, list[Run]], *, k: int = 1, replicates: int = REPLICATES) -> dict:
    """All pools, with and without the query's own image, and the controls; ready for JSON.

    Raises:
      UserError: the evaluations have no pool in common.
    """
    every = [run for runs in models.values() for run in runs]
    pools = [pool for pool in every[0].results["pools"] if all(pool in run.results["pools"] for run in every)]
    if not pools:
        raise UserError("the evaluations have no pool in common; run `jfe eval --pool local,global` for each")
    # A control run (`--queries text`) is compared by what it was given.
    main, *controls = every[0].results["given"]
    told = {"k": k, "replicates": replicates, "pools": {}}
    for pool in pools:
        settings = {
            name: summary(Comparison(models, pool, rank_key=key, given=main, k=k, replicates=replicates))
            for name, key in (("with_source", "rank"), ("without_source", "rank_without_source"))
        }
        settings["controls"] = {
            given: summary(Comparison(models, pool, given=given, k=k, replicates=replicates), details=False)
            for given in controls
        }
        told["pools"][pool] = settings
    return told


def summary(comparison: Comparison, *, details: bool = True) -> dict:
    """Everything that is said about one comparison, ready for JSON.

    Gains are of the first model over another, in the unit of the metric (1 = 100 %), each as {"value", "low", "high"}
    with its 95 % interval; `details` adds kinds and edits.
    "best_other" has the highest mean where fusion is needed (where none is, the first other).
    """
    groups = [group for group in (needs_fusion(), does_not()) if comparison.counts(group)]
    families = {"groups": groups, "units": [of_unit(unit) for unit in comparison.units]}
    for family, key in (("kinds", "kind"), ("edits", "edit")) if details else ():
        families[family] = [of_value(key, value) for value in comparison.values(key)]
    drawn = iter(comparison.replicates([member for members in families.values() for member in members]))
    drawn = {family: {member.name: next(drawn) for member in members} for family, members in families.items()}
    ranking = comparison.means(groups[0]).mean(1) if groups else np.zeros(len(comparison.names))
    others = comparison.names[1:]
    best = max(others, key=lambda name: ranking[comparison.names.index(name)]) if others else None
    told = {"models": comparison.names, "runs": comparison.runs, "best_other": best}
    for family, members in families.items():
        told[family] = {member.name: _told(comparison, member, drawn[family][member.name]) for member in members}
    if len(groups) == 2 and others:
        one, other = (group.name for group in groups)
        told["difference_of_gains"] = _gains(
            comparison,
            comparison.means(groups[0]) - comparison.means(groups[1]),
            drawn["groups"][one] - drawn["groups"][other],
        )
    return told


def _told(comparison: Comparison, slice_: Slice, replicates: np.ndarray) -> dict:
    means = comparison.means(slice_)
    return {
        "queries": comparison.counts(slice_),
        "models": {
            name: {"mean": _nanmean(row, 0).item(), "sd": float(np.nanstd(row, ddof=1)) if len(row) > 1 else None}
            for name, row in zip(comparison.names, means, strict=True)
        },
        "gains": _gains(comparison, means, replicates),
    }


def _gains(comparison: Comparison, means: np.ndarray, replicates: np.ndarray) -> dict:
    gains = {}
    for number, name in enumerate(comparison.names[1:], 1):
        drawn = replicates[:, 0] - replicates[:, number]
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        gains[name] = {
            "value": _nanmean(means[0] - means[number], 0).item(),
            "low": float(low),
            "high": float(high),
        }
    return gains


def _key(line: dict) -> tuple[str, str]:
    return line["unit"], line["qid"]


def _hit(rank: int | None, k: int) -> float:
    return float(rank is not None and rank <= k)


def _mean_of_units(rates: np.ndarray) -> np.ndarray:
    return _nanmean(rates, -1)


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(axis) / there.sum(axis)
