"""Numbers for candidates: dataset·10⁷ + index, as M-BEIR hashes its ids; int32 in the loss, one integer on disk."""

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path

from jfe_jax.data.mbeir import MODALITIES, Candidate, Mbeir, dataset_id
from jfe_jax.data.mbeir_rows import iter_rows, parse_candidate
from jfe_jax.errors import UserError

PER_DATASET = 10_000_000
# 214·10⁷ is beyond int32.
MAX_DATASET = 213


class CandidateIndex:
    """Numbers the candidates of one dataset: those in local pools first, then those that only a global pool has.

    Attributes:
      numbers: candidate id → number.
      modalities: candidate id → index into MODALITIES.

    Raises:
      UserError: the dataset's id or its candidates are too many for int32, or a row is wrong.
    """

    def __init__(self, mbeir: Mbeir, dataset: int):
        if dataset > MAX_DATASET:
            raise UserError(f"{mbeir.path}: dataset id {dataset} is larger than {MAX_DATASET}")
        self.mbeir, self.dataset = mbeir, dataset
        self.numbers: dict[str, int] = {}
        self.modalities: dict[str, int] = {}
        # Which lines of which file the candidates are on, in the order of their numbers.
        self._lines: list[tuple[Path, array]] = []
        for file in mbeir.pool_files():
            lines = array("q")
            for line, candidate in self._new_candidates(file):
                self.numbers[candidate.did] = dataset * PER_DATASET + len(self.numbers)
                self.modalities[candidate.did] = MODALITIES.index(candidate.modality)
                lines.append(line)
            if lines:
                self._lines.append((file, lines))
        if len(self.numbers) > PER_DATASET:
            raise UserError(f"{mbeir.path}: dataset {dataset} has more than {PER_DATASET} candidates")

    def candidates(self) -> Iterator[Candidate]:
        """The candidates in the order of their numbers."""
        for file, lines in self._lines:
            wanted = iter(lines)
            line = next(wanted)
            for number, row, _ in iter_rows(file, containing=f'"{self.dataset}:'):
                if number == line:
                    candidate, problems = parse_candidate(row, self.mbeir.path)
                    if candidate is None or problems:
                        raise UserError(f"{file}:{number}: {problems[0]}")
                    yield candidate
                    line = next(wanted, None)
                    if line is None:
                        break

    def _new_candidates(self, file: Path) -> Iterator[tuple[int, Candidate]]:
        prefix = f"{self.dataset}:"
        for line, row, problem in iter_rows(file, containing=f'"{prefix}'):
            # Most rows of a global pool were in a local one.
            if isinstance(row, dict) and isinstance(row.get("did"), str):
                did = row["did"]
                if did in self.numbers or not did.startswith(prefix):
                    continue
            candidate, problems = (None, [problem]) if problem else parse_candidate(row, self.mbeir.path)
            if candidate is None or problems:
                raise UserError(f"{file}:{line}: {problems[0]}")
            yield line, candidate


class CandidateIndices:
    """The candidate indices of all datasets, each made when it is first asked for."""

    def __init__(self, mbeir: Mbeir):
        self._mbeir = mbeir
        self._known: dict[int, CandidateIndex] = {}
        self._fingerprints: dict[int, str] = {}

    def of(self, dataset: int) -> CandidateIndex:
        if dataset not in self._known:
            self._known[dataset] = CandidateIndex(self._mbeir, dataset)
        return self._known[dataset]

    def number(self, did: str) -> int | None:
        """The candidate's number, or None if it is in no pool.

        Raises:
          ValueError: the id does not tell its dataset.
        """
        return self.of(dataset_id(did)).numbers.get(did)

    def modality(self, did: str) -> int:
        """Index into MODALITIES of a candidate that is in a pool."""
        return self.of(dataset_id(did)).modalities[did]

    def fingerprint(self, dataset: int) -> str:
        """Changes when a line about the dataset's candidates does; needs no index."""
        if dataset not in self._fingerprints:
            digest, prefix = hashlib.blake2b(digest_size=16), f'"{dataset}:'.encode()
            for file in self._mbeir.pool_files():
                with open(file, "rb") as stream:
                    for line in stream:
                        if prefix in line:
                            digest.update(line)
            self._fingerprints[dataset] = digest.hexdigest()
        return self._fingerprints[dataset]
