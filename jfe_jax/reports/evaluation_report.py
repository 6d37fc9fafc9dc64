"""The report of one evaluation, and its headline for the terminal."""

from pathlib import Path

import numpy as np

from jfe_jax.evaluation.error_analysis import MISTAKES
from jfe_jax.evaluation.eval_set import first_occurrence
from jfe_jax.evaluation.evaluator import Evaluation
from jfe_jax.evaluation.metrics import CUTOFFS, NOT_RETRIEVED
from jfe_jax.evaluation.results import RankedResults
from jfe_jax.reports import html, svg_charts
from jfe_jax.reports.gallery import SHOWN, Card, Ranking, gallery
from jfe_jax.reports.html import percent, text
from jfe_jax.reports.published_table import published_table

_MISSES = _SUCCESSES = 6
_HITS = ("hit@1", "hit@5", "hit@10")
_COLUMNS = (*(f"{name}@{k}" for name in ("hit", "recall") for k in CUTOFFS), "ndcg@10", "mrr@10", "map")
OUTCOMES = ("miss", "success")


def headline(results: dict) -> str:
    """A Markdown table of hit@k for the groups and units, each pool."""
    lines = ["| pool | queries | hit@1 | hit@5 | hit@10 | hit@1 without source |", "|---|---|---:|---:|---:|---:|"]
    for pool in results["pools"]:
        rows = [(name, entry) for name, entry in results["groups"][pool].items()]
        rows += [(name, unit["pools"][pool]) for name, unit in results["units"].items()]
        for name, entry in rows:
            cells = [percent(entry["metrics"][f"hit@{k}"]) for k in (1, 5, 10)]
            cells.append(percent(entry["without_source"]["hit@1"]))
            lines.append(f"| {pool} | {name} ({entry['queries']}) | {' | '.join(cells)} |")
    lines += ["", *headlines(results)] if results["headline"] else []
    return "\n".join(lines)


def headlines(results: dict) -> list[str]:
    """The protocol's headline of each pool, or which of its units are missing."""
    lines = []
    for pool, told in results["headline"].items():
        if told["missing"]:
            which = ", ".join(told["missing"])
            lines.append(f"{pool} pool: no {told['name']}; {len(told['missing'])} units are missing: {which}")
        else:
            lines.append(f"{pool} pool, {told['name']}: {percent(told['value'])}{_spread(told['spread'])}")
    return lines


def rounding(results: dict) -> str:
    """How the candidates' embeddings were stored, and what that may have cost."""
    if results["dtype"] == "float32":
        return "float32"
    return f"{results['dtype']}: scores off by {results['score_error']:.1e} at most"


def write(path: Path, evaluation: Evaluation) -> None:
    """Writes the self-contained page."""
    results = evaluation.results
    pools = results["pools"]
    found = gallery(_cards(evaluation, pools[-1]), OUTCOMES, evaluation.images)
    sections = [
        ("summary", "Summary", _summary(results)),
        ("published", "Beside published figures", published_table(results)),
        ("bars", f"hit@1 by group and unit, {pools[-1]} pool", _bars(results, pools[-1])),
        *((f"pool-{pool}", f"{pool.capitalize()} pool", _pool(results, pool)) for pool in pools),
        ("mistakes", "Where the first result is wrong", "".join(_mistakes(results, pool) for pool in pools)),
        ("prompts", "From prompt to prompt", "".join(_prompts(results, pool) for pool in pools)),
        ("kinds", "Kinds of query", "".join(_kinds(results, pool) for pool in pools)),
        ("controls", "Half of the query alone", "".join(_controls(results, pool) for pool in pools)),
        ("training", "Training", svg_charts.training_charts([("training", 0, Path(results["checkpoint"]))])),
        ("gallery", f"Queries and what was found, {pools[-1]} pool", found),
    ]
    title = f"Evaluation of {results['checkpoint']}"
    path.write_text(html.page(title, sections, _lead(results)), encoding="utf-8")


def _lead(results: dict) -> str:
    instruction = {None: "none", "all": "mean over all prompts", "own": "each query's own"}.get(
        results["instruction"], f"prompt {results['instruction']}"
    )
    return html.facts(
        [
            ("model", f"{results['model']}, {results['parameters']:,} parameters"),
            ("step", results["step"]),
            ("data", ", ".join(filter(None, (results["data"], results["split"])))),
            ("candidates", f"{results['candidates']:,}"),
            ("embeddings", rounding(results)),
            ("instruction", instruction),
            ("query", results["given"][0]),
        ]
    ) + html.warnings(results["warnings"])


def _summary(results: dict) -> str:
    rows = [
        [f"{text(name)}, {pool} pool", str(entry["units"]), *_metric_cells(entry, _HITS)]
        for pool in results["pools"]
        for name, entry in results["groups"][pool].items()
    ]
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
    note = (
        "hit@k: a right candidate is among the first k (M-BEIR's “Recall@k”). Needs fusion: tasks 6, 7, 8. Does not: "
        "tasks 0, 1, 3, 4. Without source: candidates that show the query's own image are taken out of the pool. "
        "Two-way: the best right candidate stands before all of those, or before the foil, a wrong candidate that the "
        "data set names for the query."
    )
    said = "".join(f"<p>{text(line)}</p>" for line in headlines(results))
    return f"{html.table(head, rows)}{said}<p class='note'>{note}</p>"


def _metric_cells(entry: dict, names: tuple[str, ...]) -> list[str]:
    return [
        *(percent(entry["metrics"][name]) for name in names),
        percent(entry["without_source"]["hit@1"]),
        percent(entry.get("two_way")),
        percent(entry.get("two_way_foil")),
    ]


def _bars(results: dict, pool: str) -> str:
    entries = [(name, entry) for name, entry in results["groups"][pool].items()]
    entries += [(name, unit["pools"][pool]) for name, unit in results["units"].items()]
    return svg_charts.bar_chart(
        [
            (name, [(entry["metrics"]["hit@1"], entry["spread"]["hit@1"] if "spread" in entry else None)])
            for name, entry in entries
        ]
    )


def _mistakes(results: dict, pool: str) -> str:
    entries = [(name, entry) for name, entry in results["groups"][pool].items()]
    first = len(results["units"])
    entries = [(name, unit["pools"][pool]) for name, unit in results["units"].items()] + entries
    rows = [
        [text(name), percent(entry["metrics"]["hit@1"]), *(percent(entry["mistakes"][kind]) for kind in MISTAKES)]
        for name, entry in entries
    ]
    head = [f"{text(pool)} pool", "right", *MISTAKES]
    note = (
        "What stands first, in % of queries. Wrong modality: the instruction was not followed; the right item is then "
        "the one that shows or says the same as a right candidate or the query itself."
    )
    table = html.table(head, rows, range(first, len(rows)))
    return table + (f"<p class='note'>{note}</p>" if pool == results["pools"][-1] else "")


def _prompts(results: dict, pool: str) -> str:
    entries = [(name, unit["pools"][pool]) for name, unit in results["units"].items()]
    entries += [(name, entry) for name, entry in results["groups"][pool].items()]
    entries = [(name, entry) for name, entry in entries if "prompts" in entry]
    numbers = list(dict.fromkeys(number for _, entry in entries for number in entry["prompts"]))
    rows = [
        [
            text(name),
            percent(entry["metrics"]["hit@1"]) + _spread(entry["spread"]["hit@1"]),
            percent(entry["metrics"]["hit@5"]) + _spread(entry["spread"]["hit@5"]),
            *(percent(entry["prompts"].get(number, {}).get("hit@1")) for number in numbers),
        ]
        for name, entry in entries
    ]
    head = [f"{text(pool)} pool", "hit@1, mean ± sd", "hit@5, mean ± sd", *(f"hit@1, prompt {one}" for one in numbers)]
    return html.table(head, rows)


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {percent(value)}"


def _pool(results: dict, pool: str) -> str:
    rows, sums = [], []
    for name, unit in results["units"].items():
        entry = unit["pools"][pool]
        about = [f"{entry['size']:,}", str(entry["dangling"]), text(unit["task_name"])]
        rows.append([text(name), str(entry["queries"]), *_metric_cells(entry, _COLUMNS), *about])
    for name, entry in results["groups"][pool].items():
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
    return html.table(head, rows, sums)


def _kinds(results: dict, pool: str) -> str:
    def row(name: str, entry: dict) -> list[str]:
        return [text(name), str(entry["queries"]), *_metric_cells(entry, _HITS)[:-2]]

    head = [f"{pool} pool", "queries", "hit@1", "hit@5", "hit@10", "hit@1<br>without source"]
    kinds = [row(kind, entry) for kind, entry in results["kinds"][pool].items()]
    edits = [
        row(f"{name}: {edit}", entry)
        for name, unit in results["units"].items()
        for edit, entry in unit["pools"][pool]["edits"].items()
    ]
    return html.table(head, kinds) + html.folded(f"edits, {pool} pool", html.table(head, edits))


def _controls(results: dict, pool: str) -> str:
    rows = []
    entries = [(name, unit["pools"][pool]) for name, unit in results["units"].items()]
    for name, entry in [*entries, *results["groups"][pool].items()]:
        controls = entry.get("controls")
        if controls and name != "all units":
            shown = [entry["metrics"]["hit@1"], *(controls[given]["metrics"]["hit@1"] for given in controls)]
            rows.append([text(name), *map(percent, shown)])
    given = [name for name in results["given"][1:]]
    return html.table([f"hit@1, {pool} pool", results["given"][0], *(f"{name} only" for name in given)], rows)


def _cards(evaluation: Evaluation, pool: str) -> list[Card]:
    cards = []
    main = evaluation.results["given"][0]
    for one in evaluation.answers:
        if one.pool == pool and one.given == main:
            # With the first prompt, if it was asked with several.
            first = np.array(first_occurrence(one.asked))
            cards += [_card(one, int(first[at]), outcome, evaluation) for outcome, at in picked(one.best[first])]
    return cards


def picked(best: np.ndarray) -> list[tuple[str, int]]:
    """(outcome, query's number): the worst misses, worst first, then successes from all over the list."""
    misses = [number for number in np.argsort(-best, kind="stable") if best[number] > 1][:_MISSES]
    right = np.flatnonzero(best == 1)
    spread = right[np.linspace(0, len(right) - 1, min(_SUCCESSES, len(right))).astype(int)] if len(right) else []
    return [("miss", int(number)) for number in misses] + [("success", int(number)) for number in spread]


def _card(one: RankedResults, number: int, outcome: str, evaluation: Evaluation) -> Card:
    candidates = evaluation.pools.candidates
    asked = one.asked[number]
    rank = None if one.best[number] == NOT_RETRIEVED else int(one.best[number])
    found = zip(one.rows[number][:SHOWN], one.scores[number].tolist(), strict=False)
    right = next((known for did in asked.relevant if (known := evaluation.pools.find(did)) is not None), None)
    ranking = Ranking("", rank, [(candidates[row], score) for row, score in found if row >= 0])
    return Card(one.unit.unit.name, outcome, asked, [ranking], right)
