"""A benchmark of one's own: three files, and the images that they name.

    queries.jsonl       {"id", "instruction", "text", "image"} a line; all but the id may be left out or null
    candidates.jsonl    {"id", "text", "image"} a line
    qrels.txt           TREC's `query 0 candidate relevance` a line
      or qrels.tsv      BEIR's `query candidate relevance`, with or without a line of headings

Image paths are relative to the directory. Texts are taken as they are.
"""

import re
from pathlib import Path

from jfe_jax.data.formats.candidate_table import read_candidate_table
from jfe_jax.data.formats.mbeir import TASKS, Candidate, Query, Unit
from jfe_jax.data.formats.mbeir_records import read_lines
from jfe_jax.embedding.items_jsonl import parse_line, read_items
from jfe_jax.errors import UserError
from jfe_jax.evaluation.eval_set import CandidatePools, EvalQuery, EvalSet, EvalTask, not_asked
from jfe_jax.evaluation.protocols import JSONL

QUERIES, CANDIDATES = "queries.jsonl", "candidates.jsonl"
POOL = "local"


def read_jsonl(path: Path, *, instructed: bool = True) -> EvalSet:
    """One unit, named after the directory, on one pool.

    Args:
      instructed: False leaves the queries' instructions out.

    Raises:
      UserError: a file is missing or empty, a line is wrong (with its number), an id is there twice or holds blanks, an
        image is missing, or no judged candidate is in the pool.
    """
    candidates, members = read_candidate_table([path / CANDIDATES], _candidate, path, repeated=False)
    qrels = _read_qrels(path)
    asked, known = [], set()
    for qid, item in read_items(path / QUERIES):
        known.add(_plain(qid, path / QUERIES))
        relevant = {did: gain for did, gain in qrels.get(qid, {}).items() if gain > 0}
        if relevant:
            there = next((row for did in relevant if (row := candidates.row(did)) >= 0), None)
            wanted = "text" if there is None else candidates.modality(there)
            query = Query(qid, item.text or None, item.image, item.modality, None, (), ())
            instruction = item.instruction if instructed else None
            asked.append(EvalQuery(query, relevant, instruction, qid, None, None, wanted=wanted))
    if not known:
        raise UserError(f"{path / QUERIES}: no queries")
    judged = {did for one in asked for did in one.relevant}
    if judged and all(candidates.row(did) < 0 for did in judged):
        raise UserError(
            f"{path}: none of the {len(judged)} right candidates of the qrels, such as {min(judged)}, is in "
            f"{CANDIDATES}: are its ids the same?"
        )
    tasks = {TASKS.get((one.query.modality, one.wanted), -1) for one in asked}
    name = path.resolve().name
    task = tasks.pop() if len(tasks) == 1 else -1
    strange = qrels.keys() - known
    warnings = [not_asked(name, strange)] if strange else []
    unit = EvalTask(Unit(name, name, None), task, asked, len(known) - len(asked), warnings)
    table = CandidatePools(candidates, {(POOL, name): members[path / CANDIDATES]})
    return EvalSet(JSONL, path, None, "own" if instructed else None, (POOL,), table, [unit])


def _candidate(line: bytes, file: Path, number: int) -> Candidate:
    did, item = parse_line(line, file, number)
    if item.instruction:
        raise UserError(f"{file}: candidate {did} has an instruction; only queries have one")
    return Candidate(_plain(did, file), item.text or None, item.image, item.modality)


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Query id → candidate id → relevance."""
    files = [path / name for name in ("qrels.txt", "qrels.tsv") if (path / name).is_file()]
    if len(files) != 1:
        said = "both" if files else "neither"
        raise UserError(f"{path}: there is {said} of qrels.txt and qrels.tsv; one of them is wanted")
    (file,) = files
    columns = 3 if file.suffix == ".tsv" else 4
    form = "query, candidate, relevance" if columns == 3 else "query 0 candidate relevance"
    relevant: dict[str, dict[str, int]] = {}
    for number, line in read_lines(file):
        fields = line.split()
        relevance = _relevance(fields[-1]) if len(fields) == columns else None
        if relevance is None:
            # BEIR's files begin with headings; a first line that ends in a number is a judgement.
            if number == 1 and columns == len(fields) == 3 and not re.match(r"[-+.]?[0-9]", fields[-1]):
                continue
            raise UserError(f"{file}:{number}: a line is `{form}`, not {line[:80]!r}")
        query, candidate = fields[0], fields[-2]
        known = relevant.setdefault(query, {}).setdefault(candidate, relevance)
        if known != relevance:
            raise UserError(
                f"{file}:{number}: candidate {candidate} of query {query} is judged twice, {known} and {relevance}; "
                "leave one of the lines out"
            )
    if not relevant:
        raise UserError(f"{file}: no judgements")
    return relevant


def _relevance(text: str) -> int | None:
    """The integer that a field holds, also as `1.0`; None for anything else."""
    match = re.fullmatch(r"(-?[0-9]{1,9})(\.0{1,9})?", text)
    return int(match[1]) if match else None


def _plain(name: str, file: Path) -> str:
    if len(name.split()) != 1 or name.strip() != name:
        raise UserError(f"{file}: the id {name!r} holds blanks, which qrels and run files cannot")
    return name
