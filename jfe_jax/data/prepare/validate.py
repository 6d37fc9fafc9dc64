"""Validates an M-BEIR directory in one streaming pass: counts its contents and reports defects with file and line.

An error is a row that reading would fail on. A warning may be intentional: candidates that are in no pool (the
published OVEN and InfoSeek have many), or units without instructions. Warnings are counted per file and reported at
their first line.
"""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jfe_jax.data.formats.mbeir import Mbeir, Unit
from jfe_jax.data.formats.mbeir_records import MODALITIES, iter_rows, parse_candidate, parse_query, read_qrels
from jfe_jax.data.prepare.validate_images import ImageMode, ImageValidator
from jfe_jax.data.prepare.validation_report import DefectKind, ValidationReport
from jfe_jax.errors import UserError


def validate_mbeir(path: Path, *, images: ImageMode = "none") -> ValidationReport:
    """Reads the entire directory. `images` selects the images to decode.

    Raises:
      UserError: `path` is no M-BEIR directory.
    """
    return _MbeirValidator(Mbeir(path), images).run()


class _MbeirValidator:
    def __init__(self, mbeir: Mbeir, images: ImageMode):
        self._mbeir = mbeir
        self._report = ValidationReport(str(mbeir.path))
        self._add = self._report.add
        self._images = ImageValidator(mbeir.path, images, self._report)
        # Hash of candidate id → 4 · index of the pool file + modality: a compact entry for each of millions.
        self._candidates: dict[int, int] = {}
        self._first: dict[tuple[str, str], int] = {}

    def run(self) -> ValidationReport:
        for number, file in enumerate(self._mbeir.pool_files()):
            self._pool(number, file)
        try:
            _ = self._mbeir.instruction_table
            has_table = True
        except UserError as error:
            has_table = False
            file, line, message = _split_place(str(error))
            self._add("error", "malformed", file, line, message)
        for split in self._mbeir.splits:
            for unit in self._mbeir.units(split):
                qids = self._queries(split, unit, has_table)
                self._qrels(split, unit, qids)
        self._totals()
        self._images.finish()
        return self._report

    def _pool(self, number: int, file: Path) -> None:
        dataset, task = _pool_unit(file)
        for line, row, problem in self._rows(file):
            candidate, problems = (None, [problem]) if problem else parse_candidate(row, self._mbeir.path)
            self._problems(file, line, problems)
            if candidate is None:
                continue
            self._report.counts["candidate", file.parent.name, dataset, task, candidate.modality] += 1
            key, modality = hash(candidate.did), _modality_number(candidate.modality)
            known = self._candidates.get(key, -1)
            if known >= 0 and known // 4 == number:
                self._add("error", "duplicate_id", file, line, f"candidate {candidate.did} was already in this file")
            elif known >= 0 and known % 4 != modality:
                message = f"candidate {candidate.did} has another modality than in another pool"
                self._add("error", "modality_contradicts", file, line, message)
            self._candidates[key] = 4 * number + modality
            self._images.add(file, line, candidate.image)

    def _queries(self, split: str, unit: Unit, has_table: bool) -> set[int]:
        file = self._mbeir.query_file(split, unit)
        # The published union repeats rows of small sets on purpose.
        repeats = unit.dataset.startswith("union")
        qids: set[int] = set()
        for line, row, problem in self._rows(file):
            query, problems = (None, [problem]) if problem else parse_query(row, self._mbeir.path)
            self._problems(file, line, problems)
            if query is None:
                continue
            task = -1 if unit.task is None else unit.task
            self._report.counts["query", split, unit.dataset, task, query.modality] += 1
            key = hash(query.qid)
            if key in qids and not repeats:
                self._add("error", "duplicate_id", file, line, f"query {query.qid} was already in this file")
            qids.add(key)
            self._images.add(file, line, query.image)
            if not query.pos:
                self._count(file, line, "no_positive")
            wanted = set()
            for did in query.pos:
                known = self._candidates.get(hash(did), -1)
                if known < 0:
                    self._count(file, line, "pos_cand_list")
                elif known % 4 < len(MODALITIES):
                    wanted.add(MODALITIES[known % 4])
            for did in query.neg:
                if hash(did) not in self._candidates:
                    self._count(file, line, "neg_cand_list")
            for modality in wanted if has_table else ():
                if not self._mbeir.instructions(unit.dataset, query.modality, modality, required=False):
                    self._count(file, line, f"instructions {query.modality} → {modality}")
        return qids

    def _qrels(self, split: str, unit: Unit, qids: set[int]) -> None:
        file = self._mbeir.qrels_file(split, unit)
        if not file.is_file():
            return
        try:
            for where, qid, did, relevance in read_qrels(file):
                line = int(where.rpartition(":")[2])
                if relevance is None:
                    self._add("error", "malformed", file, line, "a line of qrels is `qid 0 did relevance task`")
                    continue
                if hash(qid) not in qids:
                    self._count(file, line, "unknown_query")
                if hash(did) not in self._candidates:
                    self._count(file, line, "qrels")
        except UserError as error:
            self._add("error", "malformed", *_split_place(str(error)))

    def _rows(self, file: Path) -> Iterator[tuple[int, Any, str | None]]:
        try:
            yield from iter_rows(file)
        except UserError as error:
            self._add("error", "malformed", file, 0, str(error).removeprefix(f"{file}: "))

    def _problems(self, file: Path, line: int, problems: list[str]) -> None:
        for message in problems:
            kind: DefectKind = "malformed"
            if message.startswith("unknown") and "modality" in message:
                kind = "unknown_modality"
            elif "contradicts" in message:
                kind = "modality_contradicts"
            elif "leaves the directory" in message:
                kind = "leaves_directory"
            self._add("error", kind, file, line, message)

    def _count(self, file: Path, line: int, what: str) -> None:
        self._first.setdefault((str(file), what), line)
        self._report.dangling[str(file), what] += 1

    def _totals(self) -> None:
        counted, self._report.dangling = self._report.dangling, collections.Counter()
        for (file, what), count in counted.items():
            line = self._first[file, what]
            if what.startswith("instructions"):
                message = f"no {what} for {count} pairs, from this line on"
                self._add("warning", "missing_instructions", file, line, message)
            elif what == "no_positive":
                self._add(
                    "warning", "no_positive", file, line, f"{count} queries without a positive, from this line on"
                )
            elif what == "unknown_query":
                message = f"{count} lines about queries that the unit does not have, from this line on"
                self._add("warning", "unknown_query", file, line, message)
            else:
                self._report.dangling[file, what] = count
                message = f"{count} candidate ids of {what} are in no pool, from this line on"
                self._add("warning", "dangling_candidate", file, line, message)


def _split_place(text: str) -> tuple[str, int, str]:
    place, _, message = text.partition(": ")
    file, _, line = place.rpartition(":")
    return (file, int(line), message) if line.isdecimal() else (place, 0, message)


def _modality_number(modality: str) -> int:
    return MODALITIES.index(modality) if modality in MODALITIES else len(MODALITIES)


def _pool_unit(file: Path) -> tuple[str, int]:
    stem = file.name.removeprefix("mbeir_").removesuffix("_cand_pool.jsonl")
    dataset, marker, rest = stem.partition("_task")
    task = rest.partition("_")[0]
    return (dataset, int(task)) if marker and task.isdecimal() else (stem.partition("_")[0], -1)
