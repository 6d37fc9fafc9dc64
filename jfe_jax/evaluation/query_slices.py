"""The lines of queries.jsonl: which of them a number is about, and what each says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jfe_jax.errors import UserError
from jfe_jax.evaluation.protocols import FUSION, PROTOCOLS

HEADLINE = "headline"


@dataclass(frozen=True)
class Slice:
    """The queries that a number is about: `wanted` chooses among the lines of queries.jsonl."""

    name: str
    wanted: Callable[[dict], bool]


def needs_fusion() -> Slice:
    return _of_tasks("needs fusion")


def does_not() -> Slice:
    return _of_tasks("does not")


def _of_tasks(name: str) -> Slice:
    return Slice(name, lambda line: line["task"] in FUSION[name])


def of_units(name: str, units: Sequence[str]) -> Slice:
    return Slice(name, lambda line: line["unit"] in units)


def of_unit(unit: str) -> Slice:
    return Slice(unit, lambda line: line["unit"] == unit)


def of_value(key: str, value: str) -> Slice:
    return Slice(value, lambda line: line.get(key) == value)


def query_key(line: dict) -> tuple[str, str, int]:
    """Unit, query and prompt (-1 for none)."""
    prompt = line.get("prompt")
    return line["unit"], line["qid"], -1 if prompt is None else prompt


def of_rank(metric: str) -> bool:
    """Whether a rank alone gives the metric."""
    return metric == HEADLINE or metric.startswith(("hit@", "mrr@"))


def value_of(metric: str, rank_key: str, results: dict) -> Callable[[dict], float]:
    """What a line says of a metric: a function.

    Args:
      rank_key: which of its ranks counts.
      results: the results.json beside it.

    Raises:
      UserError: (the function) the line does not tell the metric.
    """
    if metric == HEADLINE:
        protocol = PROTOCOLS[results["protocol"]]
        cutoffs = {name: protocol.cutoff(unit["dataset"]) for name, unit in results["units"].items()}
        return lambda line: _hit(line[rank_key], cutoffs[line["unit"]])
    name, _, k = metric.partition("@")
    if of_rank(metric) and k.isdecimal() and int(k):
        if name == "hit":
            return lambda line: _hit(line[rank_key], int(k))
        return lambda line: _hit(line[rank_key], int(k)) / (line[rank_key] or 1)

    def told(line: dict) -> float:
        if metric not in line.get("metrics", {}):
            known = ", ".join(line.get("metrics", {})) or "none: evaluate again"
            raise UserError(f"queries.jsonl does not tell {metric}; it tells hit@k, mrr@k for any k, and {known}")
        return line["metrics"][metric]

    return told


def _hit(rank: int | None, k: int) -> float:
    return float(rank is not None and rank <= k)
