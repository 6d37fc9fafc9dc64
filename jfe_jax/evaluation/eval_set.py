"""What is asked: which queries, against which pools, with what right; M-BEIR's read from its directory.

Candidates stand in falling order of their ids, which is trec_eval's order among equal scores: the run files give the
same figures there as here.

Axes: Q queries, N candidates of a pool, T right candidates of a query, X candidates that show the query's own image.
"""

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jfe_jax.data.formats.candidate_table import CandidateTable, read_candidate_table
from jfe_jax.data.formats.mbeir import TASKS, Candidate, Mbeir, Query, Unit
from jfe_jax.data.item import Item
from jfe_jax.errors import UserError
from jfe_jax.evaluation.protocols import MBEIR, Protocol

ALL_PROMPTS = "all"


@dataclass(frozen=True)
class EvalQuery:
    """A query with what is known about it.

    Attributes:
      relevant: candidate id → relevance above 0.
      instruction: what goes before its text.
      cluster: the bootstrap's unit of drawing; queries about the same thing share it.
      kind, edit: as the data set calls them, if it does.
      foil: id of the wrong candidate that a two-way choice is made against, if the data set names one.
      wanted: the modality of what it asks for.
      prompt: the number of its instruction among the data set's prompts, if that is where it is from.
      among: the candidates it is asked against, if they are its own and not the pool's.
    """

    query: Query
    relevant: dict[str, int]
    instruction: str | None
    cluster: str
    kind: str | None
    edit: str | None
    foil: str | None = None
    wanted: str = "text"
    prompt: int | None = None
    among: tuple[str, ...] | None = None

    def item(self, given: str) -> Item | None:
        """The whole query, or with only its "text" or "image" (None if it does not have both); always instructed."""
        query = self.query
        if given != "all" and query.modality != "image,text":
            return None
        return Item(
            text=None if given == "image" else query.text,
            image=None if given == "text" else query.image,
            instruction=self.instruction,
        )


class Targets(NamedTuple):
    """Positions in a pool, -1 for padding.

    Attributes:
      right: int32 [Q, T]; -2 for a right candidate that is not in the pool.
      gains: float32 [Q, T]; its relevance.
      own: int32 [Q, X]; the query's own image, unless it is right.
      foil: int32 [Q, 1].
    """

    right: np.ndarray
    gains: np.ndarray
    own: np.ndarray
    foil: np.ndarray


@dataclass
class EvalTask:
    """One unit's judged queries; those without any right candidate are only counted.

    With several prompts a query stands in `asked` once for each, one after the other.
    """

    unit: Unit
    task: int
    asked: list[EvalQuery]
    unjudged: int
    warnings: list[str] = field(default_factory=list)

    @property
    def queries(self) -> int:
        """Different queries."""
        return len(first_occurrence(self.asked))


def first_occurrence(asked: Sequence[EvalQuery]) -> list[int]:
    """Where each query stands first, however often it is asked."""
    first: dict[str, int] = {}
    for number, one in enumerate(asked):
        first.setdefault(one.query.qid, number)
    return list(first.values())


def by_prompt(asked: Sequence[EvalQuery]) -> dict[int | None, list[int]]:
    """Positions of what was asked with each prompt."""
    numbers: dict[int | None, list[int]] = {}
    for number, one in enumerate(asked):
        numbers.setdefault(one.prompt, []).append(number)
    return numbers


@dataclass
class EvalSet:
    """All that an evaluation asks.

    Attributes:
      path, split, instruction: what was read, for the report.
      pools: names of the pools in use.
      table: their candidates.
      units: in the protocol's order.
    """

    protocol: Protocol
    path: Path
    split: str | None
    instruction: int | str | None
    pools: tuple[str, ...]
    table: "CandidatePools"
    units: list[EvalTask]


@dataclass
class CandidatePools:
    """Every candidate of the pools in use, once.

    Attributes:
      candidates: in falling order of their ids.
      rows: int32 [N] of each (pool, unit's name): positions in `candidates`, rising; the same array for the same pool.
    """

    candidates: CandidateTable
    rows: dict[tuple[str, str], np.ndarray]

    def find(self, did: str) -> Candidate | None:
        """The candidate of that id."""
        row = self.candidates.row(did)
        return self.candidates[row] if row >= 0 else None

    def targets(self, asked: Sequence[EvalQuery], pool: str, unit: str) -> "Targets":
        """Where in the pool what counts for each query stands."""
        rows, known = self.rows[pool, unit], self.candidates
        right, gains, own, foils = [], [], [], []
        for one in asked:
            wanted = [known.row(did) for did in one.relevant]
            shown = known.showing(one.query.image).tolist() if one.query.image is not None else ()
            right.append([_position(rows, number) if number >= 0 else -2 for number in wanted])
            gains.append(list(one.relevant.values()))
            found = [_position(rows, number) for number in shown if number not in wanted]
            own.append([number for number in found if number >= 0])
            foil = known.row(one.foil) if one.foil is not None and one.foil not in one.relevant else -1
            foils.append([max(_position(rows, foil), -1) if foil >= 0 else -1])
        return Targets(
            pad_ragged(right, -1, np.int32),
            pad_ragged(gains, 0, np.float32),
            pad_ragged(own, -1, np.int32),
            pad_ragged(foils, -1, np.int32),
        )


def read_mbeir(
    mbeir: Mbeir, split: str, pools: Sequence[str], units: Sequence[str], instruction: int | str | None
) -> EvalSet:
    """The units of a split (all of them, if none is named) on the named pools.

    Raises:
      UserError: as read_pools and read_queries.
    """
    chosen = [mbeir.unit(split, name) for name in units] if units else mbeir.units(split)
    table = read_pools(mbeir, split, chosen, pools)
    asked = [read_queries(mbeir, split, unit, table, instruction) for unit in chosen]
    asked.sort(key=lambda unit: MBEIR.order(unit.unit.name, unit.task))
    return EvalSet(MBEIR, mbeir.path, split, instruction, tuple(pools), table, asked)


def read_pools(mbeir: Mbeir, split: str, units: Sequence[Unit], pools: Sequence[str]) -> CandidatePools:
    """Reads each pool file once.

    Raises:
      UserError: a pool is missing or empty, or two rows give one id to different candidates.
    """
    files = {(pool, unit.name): mbeir.pool_file(split, unit, pool) for pool in pools for unit in units}
    candidates, members = read_candidate_table(list(dict.fromkeys(files.values())), mbeir.candidate, mbeir.path)
    return CandidatePools(candidates, {key: members[file] for key, file in files.items()})


def read_queries(
    mbeir: Mbeir, split: str, unit: Unit, pools: CandidatePools, instruction: int | str | None
) -> EvalTask:
    """A unit's queries with the prompt of number `instruction` (None: without; ALL_PROMPTS: with each of them).

    Raises:
      UserError: there are fewer prompts.
    """
    qrels = mbeir.qrels(split, unit)
    asked, unjudged, task, repeated = [], 0, unit.task, 0
    known: dict[str, int] = {}
    for query in mbeir.iter_queries(split, unit):
        content = hash((query.text, query.image, query.modality))
        if query.qid in known:
            if known[query.qid] != content:
                raise UserError(
                    f"{mbeir.query_file(split, unit)}: query {query.qid} is there twice, with different contents; "
                    "give one of the two another qid"
                )
            repeated += 1
            continue
        known[query.qid] = content
        relevant = {did: gain for did, gain in qrels.get(query.qid, {}).items() if gain > 0}
        if not relevant:
            unjudged += 1
            continue
        there = next((row for did in relevant if (row := pools.candidates.row(did)) >= 0), None)
        wanted = None if there is None else pools.candidates.modality(there)
        if task is None and wanted is not None:
            task = TASKS.get((query.modality, wanted))
        wanted = wanted or _wanted_modality(task)
        prompts = (
            () if instruction is None else mbeir.instructions(unit.dataset, query.modality, wanted, required=False)
        )
        numbers = range(len(prompts)) if instruction == ALL_PROMPTS else [instruction]
        if prompts and numbers[-1] >= len(prompts):
            raise UserError(f"{unit.name}: no instruction {instruction}; there are {len(prompts)}, from 0")
        about = _about(query.src_content)
        asked += [
            EvalQuery(
                query,
                relevant,
                prompts[number] if prompts else None,
                cluster=str(about.get("group", query.qid)),
                kind=about.get("kind"),
                edit=about.get("edit"),
                foil=about.get("foil"),
                wanted=wanted,
                prompt=number if prompts else None,
            )
            for number in (numbers if prompts else [None])
        ]
    warnings = []
    if repeated:
        warnings.append(f"{unit.name}: {repeated} rows repeat a query that is there already; each query counts once")
    if strange := qrels.keys() - known.keys():
        warnings.append(not_asked(unit.name, strange))
    if instruction is not None and any(one.instruction is None for one in asked):
        warnings.append(f"{unit.name}: the data has no instructions for it; queries were given none")
    return EvalTask(unit, -1 if task is None else task, asked, unjudged, warnings)


def not_asked(unit: str, strange: Set[str]) -> str:
    """The warning about queries that only the qrels know."""
    return f"{unit}: the qrels judge {len(strange)} queries that are not asked, such as {min(strange)}"


def _about(source: str | None) -> dict:
    # Free text in M-BEIR itself; a data set may say more in JSON.
    try:
        about = json.loads(source or "{}")
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _wanted_modality(task: int | None) -> str:
    return next((candidate for (_, candidate), number in TASKS.items() if number == task), "text")


def _position(rows: np.ndarray, number: int) -> int:
    at = int(np.searchsorted(rows, number))
    return at if at < len(rows) and rows[at] == number else -2


def pad_ragged(ragged: list[list], filler: int, dtype: type) -> np.ndarray:
    """Lists of unequal length → an array, filled up on the right."""
    width = max(map(len, ragged), default=0)
    return np.array([[*row, *[filler] * (width - len(row))] for row in ragged], dtype).reshape(len(ragged), width)
