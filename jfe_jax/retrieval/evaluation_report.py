"""The report of one evaluation, and its headline for the terminal."""

from pathlib import Path

import numpy as np

from jfe_jax.retrieval import charts, page
from jfe_jax.retrieval.evaluate import Evaluation
from jfe_jax.retrieval.gallery import SHOWN, Card, Ranking, gallery
from jfe_jax.retrieval.metrics import NOT_RETRIEVED
from jfe_jax.retrieval.page import percent, text
from jfe_jax.retrieval.results import HEADLINE, Answers

_MISSES = _SUCCESSES = 6
_COLUMNS = ("hit@1", "hit@5", "hit@10", "recall@1", "recall@5", "recall@10", "ndcg@10", "mrr@10", "map")
OUTCOMES = ("miss", "success")


def headline(results: dict) -> str:
    """A Markdown table of hit@k for the groups and units, each pool."""
    lines = ["| pool | queries | hit@1 | hit@5 | hit@10 | hit@1 without source |", "|---|---|---:|---:|---:|---:|"]
    for pool in results["pools"]:
        rows = [(name, entry) for name, entry in results["groups"][pool].items() if name != HEADLINE]
        rows += [(name, unit["pools"][pool]) for name, unit in results["units"].items()]
        for name, entry in rows:
            cells = [percent(entry["metrics"][f"hit@{k}"]) for k in (1, 5, 10)]
            cells.append(percent(entry["without_source"]["hit@1"]))
            lines.append(f"| {pool} | {name} ({entry['queries']}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, evaluation: Evaluation) -> None:
    """Writes the self-contained page."""
    results = evaluation.results
    pools = results["pools"]
    sections = [
        ("summary", "Summary", _summary(results)),
        ("bars", f"hit@1 by unit, {pools[-1]} pool", _bars(results, pools[-1])),
        *((f"pool-{pool}", f"{pool.capitalize()} pool", _pool(results, pool)) for pool in pools),
        ("kinds", "Kinds of query", "".join(_kinds(results, pool) for pool in pools)),
        ("controls", "Half of the query alone", "".join(_controls(results, pool) for pool in pools)),
        ("training", "Training", charts.training_charts([("training", 0, Path(results["checkpoint"]))])),
        ("gallery", f"Queries and what was found, {pools[-1]} pool", gallery(_cards(evaluation, pools[-1]), OUTCOMES)),
    ]
    title = f"Evaluation of {results['checkpoint']}"
    path.write_text(page.page(title, sections, _lead(results)), encoding="utf-8")


def _lead(results: dict) -> str:
    instruction = "none" if results["instruction"] is None else f"prompt {results['instruction']}"
    return page.facts(
        [
            ("model", f"{results['model']}, {results['parameters']:,} parameters"),
            ("step", results["step"]),
            ("data", f"{results['data']}, {results['split']}"),
            ("candidates", f"{results['candidates']:,}"),
            ("instruction", instruction),
            ("query", results["given"][0]),
        ]
    ) + page.warnings(results["warnings"])


def _summary(results: dict) -> str:
    rows = []
    for pool in results["pools"]:
        for name, entry in results["groups"][pool].items():
            if name != HEADLINE:
                rows.append([f"{text(name)}, {pool} pool", str(entry["units"]), *_metric_cells(entry, _COLUMNS[:3])])
    head = [
        "mean over units",
        "units",
        "hit@1",
        "hit@5",
        "hit@10",
        "hit@1<br>without source",
        "two-way<br>own image",
        "two-way<br>foil",
    ]
    headlines = "; ".join(f"{pool} pool {percent(results['groups'][pool][HEADLINE])}" for pool in results["pools"])
    note = (
        "hit@k: a right candidate is among the first k (M-BEIR's “Recall@k”). Needs fusion: tasks 6, 7, 8. Does not: "
        "tasks 0, 1, 3, 4. Without source: candidates that show the query's own image are taken out of the pool. "
        "Two-way: the best right candidate stands before all of those, or before the foil, a wrong candidate that the "
        "data set names for the query."
    )
    return f"{page.table(head, rows)}<p>{text(HEADLINE)}: {headlines}.</p><p class='note'>{note}</p>"


def _metric_cells(entry: dict, names: tuple[str, ...]) -> list[str]:
    return [
        *(percent(entry["metrics"][name]) for name in names),
        percent(entry["without_source"]["hit@1"]),
        percent(entry.get("two_way")),
        percent(entry.get("two_way_foil")),
    ]


def _bars(results: dict, pool: str) -> str:
    return charts.bars(
        [(name, [(unit["pools"][pool]["metrics"]["hit@1"], None)]) for name, unit in results["units"].items()]
    )


def _pool(results: dict, pool: str) -> str:
    rows, sums = [], []
    for name, unit in results["units"].items():
        entry = unit["pools"][pool]
        about = [f"{entry['size']:,}", str(entry["dangling"]), text(unit["task_name"])]
        rows.append([text(name), str(entry["queries"]), *_metric_cells(entry, _COLUMNS), *about])
    for name, entry in results["groups"][pool].items():
        if name != HEADLINE:
            sums.append(len(rows))
            rows.append([text(name), str(entry["queries"]), *_metric_cells(entry, _COLUMNS), "", "", ""])
    head = [
        "unit",
        "queries",
        *_COLUMNS,
        "hit@1<br>without source",
        "two-way<br>own image",
        "two-way<br>foil",
        "pool",
        "dangling<br>qrels",
        "task",
    ]
    return page.table(head, rows, sums)


def _kinds(results: dict, pool: str) -> str:
    def row(name: str, entry: dict) -> list[str]:
        return [text(name), str(entry["queries"]), *_metric_cells(entry, _COLUMNS[:3])[:-2]]

    head = [f"{pool} pool", "queries", "hit@1", "hit@5", "hit@10", "hit@1<br>without source"]
    kinds = [row(kind, entry) for kind, entry in results["kinds"][pool].items()]
    edits = [
        row(f"{name}: {edit}", entry)
        for name, unit in results["units"].items()
        for edit, entry in unit["pools"][pool]["edits"].items()
    ]
    return page.table(head, kinds) + page.folded(f"edits, {pool} pool", page.table(head, edits))


def _controls(results: dict, pool: str) -> str:
    rows = []
    entries = [(name, unit["pools"][pool]) for name, unit in results["units"].items()]
    for name, entry in [
        *entries,
        *((name, entry) for name, entry in results["groups"][pool].items() if name != HEADLINE),
    ]:
        controls = entry.get("controls")
        if controls and name != "all units":
            shown = [entry["metrics"]["hit@1"], *(controls[given]["metrics"]["hit@1"] for given in controls)]
            rows.append([text(name), *map(percent, shown)])
    given = [name for name in results["given"][1:]]
    return page.table([f"hit@1, {pool} pool", results["given"][0], *(f"{name} only" for name in given)], rows)


def _cards(evaluation: Evaluation, pool: str) -> list[Card]:
    cards = []
    first = evaluation.results["given"][0]
    for one in evaluation.answers:
        if one.pool == pool and one.given == first:
            cards += [_card(one, number, outcome, evaluation) for outcome, number in picked(one.best)]
    return cards


def picked(best: np.ndarray) -> list[tuple[str, int]]:
    """(outcome, query's number): the worst misses, worst first, then successes from all over the list."""
    misses = [number for number in np.argsort(-best, kind="stable") if best[number] > 1][:_MISSES]
    right = np.flatnonzero(best == 1)
    spread = right[np.linspace(0, len(right) - 1, min(_SUCCESSES, len(right))).astype(int)] if len(right) else []
    return [("miss", int(number)) for number in misses] + [("success", int(number)) for number in spread]


def _card(one: Answers, number: int, outcome: str, evaluation: Evaluation) -> Card:
    candidates = evaluation.pools.candidates
    asked = one.asked[number]
    rank = None if one.best[number] == NOT_RETRIEVED else int(one.best[number])
    found = zip(one.rows[number][:SHOWN], one.scores[number].tolist(), strict=False)
    right = next((candidates[evaluation.pools.row[did]] for did in asked.relevant if did in evaluation.pools.row), None)
    ranking = Ranking("", rank, [(candidates[row], score) for row, score in found])
    return Card(one.unit.unit.name, outcome, asked, [ranking], right)
