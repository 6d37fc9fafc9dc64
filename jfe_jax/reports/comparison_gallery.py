"""Queries that tell two models apart, with what each found, read back from their evaluations and the data."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from jfe_jax.data.formats.line_index import iter_nonblank_lines
from jfe_jax.data.formats.mbeir import Candidate, Mbeir
from jfe_jax.data.formats.mbeir_records import decode_row
from jfe_jax.data.storage.image_store import DirectoryImages, ImageLookup, open_images
from jfe_jax.errors import UserError
from jfe_jax.evaluation.eval_set import ALL_PROMPTS, EvalQuery
from jfe_jax.evaluation.load import read_questions
from jfe_jax.evaluation.protocols import MBEIR, MMEB
from jfe_jax.reports.comparison import Run
from jfe_jax.reports.gallery import SHOWN, Card, Ranking
from jfe_jax.reports.html import text

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


def images(models: dict[str, list[Run]]) -> ImageLookup:
    """Where the images of the first run are."""
    results = next(iter(models.values()))[0].results
    if not results.get("images"):
        return DirectoryImages()
    try:
        return open_images(Path(results["data"]), Path(results["images"]), list, copies=False)
    except (UserError, OSError):
        # They have gone since: a page without pictures.
        return DirectoryImages()


def _pick(runs: list[Run], names: list[str], pool: str) -> list[Card]:
    lines = [
        # The first prompt comes last, so it stays, if a query was asked with several.
        {
            (line["unit"], line["qid"]): line
            for line in reversed(run.queries)
            if line["pool"] == pool and line["given"] == "all"
        }
        for run in runs
    ]
    left = {}
    chosen: dict[tuple[str, str], str] = {}
    names_of = outcomes(names[0], names[1] if len(names) > 1 else None)

    def worst(key: tuple[str, str]) -> float:
        ranks = [line[key]["rank"] for line in lines]
        return max(math.inf if rank is None else rank for rank in ranks)

    # Of each unit the worst misses first.
    for key in sorted(lines[0], key=lambda key: (lines[0][key]["task"], key[0], -worst(key), key[1])):
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
    found = [{unit: _read_run(run.path, unit, pool) for unit in {unit for unit, _ in chosen}} for run in runs]
    wanted = {did for tops in found for unit, qid in chosen for did, _ in tops[unit].get(qid, ())}
    cards = []
    for unit, asked, candidates in _questions(runs[0].results, pool, chosen, wanted, lines[0]):
        key = unit, asked.query.qid
        right = next((candidates[did] for did in asked.relevant if did in candidates), None)
        rankings = [
            Ranking(model, by_key[key]["rank"], _candidates(tops[unit].get(key[1], ()), candidates))
            for model, by_key, tops in zip(names, lines, found, strict=True)
        ]
        cards.append(Card(unit, chosen[key], asked, rankings, right))
    return cards


def _questions(
    results: dict, pool: str, chosen: dict, wanted: set[str], lines: dict
) -> Iterator[tuple[str, EvalQuery, dict[str, Candidate]]]:
    """Each chosen query again: its unit, itself, and the candidates wanted of its pool."""
    names = list(dict.fromkeys(unit for unit, _ in chosen))
    if results.get("protocol", MBEIR.name) != MBEIR.name:
        instruction = None if results["instruction"] is None else 0
        units = names if results["protocol"] == MMEB.name else ()
        questions = read_questions(Path(results["data"]), units=units, instruction=instruction)
        for unit in questions.units:
            for asked in unit.asked:
                if (unit.unit.name, asked.query.qid) in chosen:
                    dids = wanted | asked.relevant.keys()
                    found = ((did, questions.table.find(did)) for did in dids)
                    yield unit.unit.name, asked, {did: one for did, one in found if one is not None}
        return
    mbeir, split = Mbeir(results["data"]), results["split"]
    number = 0 if results["instruction"] == ALL_PROMPTS else results["instruction"]
    units = {name: mbeir.unit(split, name) for name in names}
    qrels = {name: mbeir.qrels(split, unit) for name, unit in units.items()}
    wanted = wanted | {did for name, qid in chosen for did in qrels[name].get(qid, ())}
    files = {name: mbeir.pool_file(split, unit, pool) for name, unit in units.items()}
    # Of a large pool only what is shown, in one pass.
    known = {file: _wanted(mbeir, file, wanted) for file in dict.fromkeys(files.values())}
    for name, unit in units.items():
        candidates = known[files[name]]
        for query in mbeir.iter_queries(split, unit):
            if (name, query.qid) not in chosen:
                continue
            line = lines[name, query.qid]
            relevant = {did: gain for did, gain in qrels[name].get(query.qid, {}).items() if gain > 0}
            right = next((candidates[did] for did in relevant if did in candidates), None)
            prompts = mbeir.instructions(unit.dataset, query.modality, right.modality, required=False) if right else ()
            instruction = prompts[number] if number is not None and prompts else None
            yield name, EvalQuery(query, relevant, instruction, line["cluster"], line["kind"], line["edit"]), candidates


def _wanted(mbeir: Mbeir, file: Path, dids: set[str]) -> dict[str, Candidate]:
    rows = (line for line in iter_nonblank_lines(file) if (row := decode_row(line[2])[0]) and row.get("did") in dids)
    return {one.did: one for number, _, line in rows if (one := mbeir.candidate(line, file, number))}


def _candidates(found: Sequence[tuple[str, float]], known: dict[str, Candidate]) -> list[tuple[Candidate, float]]:
    return [(known[did], score) for did, score in found if did in known]


def _read_run(path: Path, unit: str, pool: str) -> dict[str, list[tuple[str, float]]]:
    tops: dict[str, list[tuple[str, float]]] = {}
    files = [path / "runs" / f"{unit}.{pool}{part}.trec" for part in ("", ".prompt0")]
    with (files[0] if files[0].exists() else files[1]).open(encoding="utf-8") as lines:
        for line in lines:
            qid, _, did, rank, score, _ = line.split()
            if int(rank) <= SHOWN:
                tops.setdefault(qid, []).append((did, float(score)))
    return tops
