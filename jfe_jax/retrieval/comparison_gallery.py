"""Queries that tell two models apart, with what each found, read back from their evaluations and the data."""

from collections.abc import Sequence
from pathlib import Path

from jfe_jax.data.mbeir import Candidate, Mbeir
from jfe_jax.errors import UserError
from jfe_jax.retrieval.compare import Run
from jfe_jax.retrieval.gallery import SHOWN, Card, Ranking
from jfe_jax.retrieval.page import text
from jfe_jax.retrieval.protocol import Asked

_PICKS = {"only {first} right": 5, "only {other} right": 4, "both wrong": 2, "both right": 2}


def outcomes(first: str, other: str | None) -> list[str]:
    return [outcome.format(first=first, other=other) for outcome in _PICKS] if other else ["right", "wrong"]


def cards(models: dict[str, list[Run]], pool: str, other: str | None) -> tuple[list[Card], str]:
    """Queries of the first run that tell the first model from the best other, and a note if they cannot be shown."""
    shown = [name for name in (next(iter(models)), other) if name]
    runs = [models[name][0] for name in shown]
    try:
        return _pick(runs, shown, pool), ""
    except (UserError, OSError) as error:
        return [], f'<p class="note">No gallery: {text(error)}</p>'


def _pick(runs: list[Run], names: list[str], pool: str) -> list[Card]:
    lines = [
        {(line["unit"], line["qid"]): line for line in run.queries if line["pool"] == pool and line["given"] == "all"}
        for run in runs
    ]
    left = {}
    chosen: dict[tuple[str, str], str] = {}
    names_of = outcomes(names[0], names[1] if len(names) > 1 else None)
    for key in sorted(lines[0], key=lambda key: (lines[0][key]["task"], *key)):
        right = [line[key]["rank"] == 1 for line in lines]
        if len(right) == 1:
            outcome, most = names_of[0 if right[0] else 1], 4
        else:
            number = {(True, False): 0, (False, True): 1, (False, False): 2, (True, True): 3}[tuple(right)]
            outcome, most = names_of[number], list(_PICKS.values())[number]
        left.setdefault((key[0], outcome), most)
        if left[key[0], outcome]:
            left[key[0], outcome] -= 1
            chosen[key] = outcome
    return _shown(runs, names, pool, lines, chosen)


def _shown(runs: list[Run], names: list[str], pool: str, lines: list[dict], chosen: dict) -> list[Card]:
    results = runs[0].results
    mbeir = Mbeir(results["data"])
    split, number = results["split"], results["instruction"]
    found = [{unit: _read_run(run.path, unit, pool) for unit in {unit for unit, _ in chosen}} for run in runs]
    cards, needed = [], {did for tops in found for unit, qid in chosen for did, _ in tops[unit].get(qid, ())}
    for name in dict.fromkeys(unit for unit, _ in chosen):
        unit = mbeir.unit(split, name)
        qrels = mbeir.qrels(split, unit)
        needed |= {did for key in chosen if key[0] == name for did in qrels.get(key[1], ())}
        candidates = {one.did: one for one in mbeir.candidates(mbeir.pool_file(split, unit, pool)) if one.did in needed}
        for query in mbeir.iter_queries(split, unit):
            if (name, query.qid) not in chosen:
                continue
            line = lines[0][name, query.qid]
            relevant = {did: gain for did, gain in qrels.get(query.qid, {}).items() if gain > 0}
            right = next((candidates[did] for did in relevant if did in candidates), None)
            prompts = mbeir.instructions(unit.dataset, query.modality, right.modality, required=False) if right else ()
            instruction = prompts[number] if number is not None and prompts else None
            asked = Asked(query, relevant, instruction, line["cluster"], line["kind"], line["edit"])
            rankings = [
                Ranking(model, by_key[name, query.qid]["rank"], _candidates(tops[name].get(query.qid, ()), candidates))
                for model, by_key, tops in zip(names, lines, found, strict=True)
            ]
            cards.append(Card(name, chosen[name, query.qid], asked, rankings, right))
    return cards


def _candidates(found: Sequence[tuple[str, float]], known: dict[str, Candidate]) -> list[tuple[Candidate, float]]:
    return [(known[did], score) for did, score in found if did in known]


def _read_run(path: Path, unit: str, pool: str) -> dict[str, list[tuple[str, float]]]:
    tops: dict[str, list[tuple[str, float]]] = {}
    with (path / "runs" / f"{unit}.{pool}.trec").open(encoding="utf-8") as lines:
        for line in lines:
            qid, _, did, rank, score, _ = line.split()
            if int(rank) <= SHOWN:
                tops.setdefault(qid, []).append((did, float(score)))
    return tops
