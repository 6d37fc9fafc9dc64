"""Reads an M-BEIR directory as published, in every known spelling.

    query/{split}/mbeir_{dataset}[_task{t}]_{split}.jsonl
    cand_pool/local/mbeir_{dataset}_task{t}[_{split}]_cand_pool.jsonl
    cand_pool/global/mbeir_union_{split}_cand_pool.jsonl        (older: cand_pool/union_pool/)
    qrels/{split}/mbeir_{dataset}_task{t}_{split}_qrels.txt
    instructions/query_instructions.tsv

Texts and instructions are formatted as the benchmark formats them. Files are read line by line. An error names the file
and the line.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jfe_jax.data.formats.mbeir_records import (
    MODALITIES,
    TASKS,
    Candidate,
    Query,
    decode_row,
    format_string,
    normalize_modality,
    parse_candidate,
    parse_dataset_id,
    parse_query,
    read_lines,
    read_qrels,
    read_rows,
)
from jfe_jax.errors import UserError

__all__ = ["MODALITIES", "TASKS", "Candidate", "Mbeir", "Query", "Unit", "format_string", "parse_dataset_id"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One file of a dataset's queries of one task (None if it mixes several, as some training files do)."""

    name: str
    dataset: str
    task: int | None


class Mbeir:
    """An M-BEIR directory.

    Raises:
      UserError: `path` is not such a directory. Every method raises it if a file is missing or a row is malformed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "query").is_dir():
            raise UserError(f"{self.path}: no M-BEIR directory (it has no query/)")

    @property
    def splits(self) -> list[str]:
        """Names of the directories under query/."""
        return sorted(entry.name for entry in (self.path / "query").iterdir() if entry.is_dir())

    def units(self, split: str) -> list[Unit]:
        """Returns the units of a split, sorted by name."""
        return [unit for unit, _ in self._query_files(split)]

    def unit(self, split: str, name: str) -> Unit:
        """Returns the unit of that name."""
        units = {unit.name: unit for unit in self.units(split)}
        if name not in units:
            raise UserError(f"{self.path / 'query' / split}: no unit {name}; there are {', '.join(units)}")
        return units[name]

    def query_file(self, split: str, unit: Unit) -> Path:
        for known, file in self._query_files(split):
            if known.name == unit.name:
                return file
        raise UserError(f"{self.path / 'query' / split}: no queries of {unit.name}")

    def queries(self, split: str, unit: Unit) -> list[Query]:
        """Reads all queries of a unit, in the file's order."""
        return list(self.iter_queries(split, unit))

    def iter_queries(self, split: str, unit: Unit) -> Iterator[Query]:
        """Yields the queries of a unit one at a time, in the file's order."""
        for where, row in read_rows(self.query_file(split, unit)):
            query, problems = parse_query(row, self.path)
            if query is None or problems:
                raise UserError(f"{where}: {problems[0]}")
            yield query

    def pool_file(self, split: str, unit: Unit, kind: Literal["local", "global"]) -> Path:
        """Returns the pool file of a unit; a pool of the split takes precedence over one for all splits."""
        pools = self.path / "cand_pool"
        if kind == "local":
            names = [f"local/mbeir_{unit.name}_{split}_cand_pool.jsonl", f"local/mbeir_{unit.name}_cand_pool.jsonl"]
        else:
            names = [f"{folder}/mbeir_union_{split}_cand_pool.jsonl" for folder in ("global", "union_pool")]
        for name in names:
            if (pools / name).is_file():
                return pools / name
        raise UserError(f"{pools / names[0]}: no such candidate pool")

    def pool(self, split: str, unit: Unit, kind: Literal["local", "global"]) -> list[Candidate]:
        """Reads all candidates of a unit's local or global pool, in the file's order."""
        return list(self.candidates(self.pool_file(split, unit, kind)))

    def candidate(self, line: bytes, file: Path, number: int) -> Candidate:
        """Parses the candidate on line `number` of a pool file."""
        row, problem = decode_row(line)
        candidate, problems = (None, [problem]) if problem else parse_candidate(row, self.path)
        if candidate is None or problems:
            raise UserError(f"{file}:{number}: {problems[0]}")
        return candidate

    def candidates(self, file: Path) -> Iterator[Candidate]:
        """Yields the candidates of one pool file."""
        for where, row in read_rows(file):
            candidate, problems = parse_candidate(row, self.path)
            if candidate is None or problems:
                raise UserError(f"{where}: {problems[0]}")
            yield candidate

    def pool_files(self) -> list[Path]:
        """Returns every pool file, local ones first."""
        pools = self.path / "cand_pool"
        return [
            file for folder in ("local", "global", "union_pool") for file in sorted((pools / folder).glob("*.jsonl"))
        ]

    def qrels_file(self, split: str, unit: Unit) -> Path:
        return self.path / "qrels" / split / f"mbeir_{unit.name}_{split}_qrels.txt"

    def qrels(self, split: str, unit: Unit) -> dict[str, dict[str, int]]:
        """Reads the relevance judgements: query id → candidate id → relevance."""
        file = self.qrels_file(split, unit)
        if not file.is_file():
            raise UserError(f"{file}: no such qrels file")
        relevant: dict[str, dict[str, int]] = {}
        for where, qid, did, relevance in read_qrels(file):
            if relevance is None:
                raise UserError(f"{where}: a line of qrels is `qid 0 did relevance task`")
            relevant.setdefault(qid, {})[did] = relevance
        return relevant

    def instructions(
        self, dataset: str | int, query_modality: str, candidate_modality: str, *, required: bool = True
    ) -> tuple[str, ...]:
        """Returns the prompts (four, as published) for a dataset's name or id and the modalities of query and positive.

        Raises:
          UserError: there is none. With `required` False, () is returned instead.
        """
        table = self.instruction_table
        key = (_normalize_name(dataset), query_modality, candidate_modality)
        if key not in table and required:
            raise UserError(
                f"{self.path / 'instructions/query_instructions.tsv'}: no instructions for dataset {dataset}, "
                f"query {query_modality}, candidate {candidate_modality}"
            )
        return table.get(key, ())

    @functools.cached_property
    def instruction_table(self) -> dict[tuple[str, str, str], tuple[str, ...]]:
        """(normalized name or id of the dataset, query modality, candidate modality) → prompts."""
        file = self.path / "instructions/query_instructions.tsv"
        if not file.is_file():
            return {}
        lines = [(f"{file}:{number}", line) for number, line in read_lines(file)]
        header = lines[0][1].split("\t") if lines else []
        wanted = ("query_modality", "cand_modality", "dataset_name", "dataset_id")
        if any(name not in header for name in wanted):
            raise UserError(f"{file}:1: the header needs the columns {', '.join(wanted)} and prompt_1 to prompt_4")
        table: dict[tuple[str, str, str], tuple[str, ...]] = {}
        for where, line in lines[1:]:
            fields = dict(zip(header, line.split("\t"), strict=False))
            if not set(wanted) <= fields.keys():
                raise UserError(f"{where}: {len(fields)} columns, the header has {len(header)}")
            modalities = [normalize_modality(fields[key]) for key in wanted[:2]]
            if None in modalities:
                raise UserError(
                    f"{where}: unknown modality in {fields['query_modality']!r}, {fields['cand_modality']!r}"
                )
            prompts = [format_string(text) for name, text in fields.items() if name.startswith("prompt")]
            for dataset in (fields["dataset_name"], fields["dataset_id"]):
                table[_normalize_name(dataset), modalities[0], modalities[1]] = tuple(filter(None, prompts))
        return table

    def _query_files(self, split: str) -> list[tuple[Unit, Path]]:
        folder = self.path / "query" / split
        if not folder.is_dir():
            raise UserError(f"{folder}: no such split; there are {', '.join(self.splits)}")
        found = []
        for file in sorted(folder.glob("mbeir_*.jsonl")):
            # Strip the split's name, which may contain underscores, or else the last word.
            stem = file.name.removesuffix(f"_{split}.jsonl")
            stem = stem if stem != file.name else file.name.removesuffix(".jsonl").rpartition("_")[0]
            match = re.fullmatch(r"mbeir_(.+?)(?:_task(\d+))?", stem)
            if match:
                dataset, task = match.groups()
                found.append((Unit(stem.removeprefix("mbeir_"), dataset, None if task is None else int(task)), file))
        return found


def _normalize_name(dataset: str | int) -> str:
    return re.sub(r"[^a-z0-9]", "", str(dataset).lower())
