"""Assigns integer ids to candidates: dataset·10⁷ + index, as M-BEIR hashes its ids. They are int32 in the loss.

A candidate takes about 20 bytes here, so that millions fit: string ids are stored as 64-bit hashes in sorted arrays.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jfe_jax.data.formats.line_index import iter_nonblank_lines
from jfe_jax.data.formats.mbeir import MODALITIES, Candidate, Mbeir, parse_dataset_id
from jfe_jax.data.formats.mbeir_records import decode_row, iter_rows, parse_candidate
from jfe_jax.data.ids import IDS_PER_DATASET, MAX_DATASET_ID, image_id
from jfe_jax.errors import UserError


class CandidateIndex:
    """Assigns integer ids to the candidates of one dataset: local pools first, then candidates only in a global pool.

    Attributes:
      fingerprint: changes when a line about the dataset's candidates changes.
      problem: describes the first malformed row, if there is one.
    """

    def __init__(self, mbeir: Mbeir, dataset: int):
        self.mbeir, self.dataset = mbeir, dataset
        self.fingerprint = ""
        self._digest = hashlib.blake2b(digest_size=16)
        self._known: set[int] = set()
        self._hashes, self._modalities, self._images = array("q"), array("b"), array("q")
        # The file and the line numbers of the candidates, in the order of their integer ids.
        self._lines: list[tuple[Path, array]] = []
        self.problem: str | None = None

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, dids: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the candidates' integer ids (int64, -1 if not in any pool) and indices into MODALITIES (int8)."""
        wanted = np.fromiter(map(hash, dids), np.int64)
        if not len(self):
            return np.full(len(wanted), -1), np.zeros(len(wanted), np.int8)
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        rows = np.where(self._sorted[places] == wanted, self._order[places], -1)
        return np.where(rows < 0, -1, self.dataset * IDS_PER_DATASET + rows), self._kinds[rows]

    @property
    def image_ids(self) -> np.ndarray:
        """int64, sorted: ids (see `image_id`) of the images that the candidates refer to."""
        return np.unique(np.array(self._images, np.int64))

    def candidates(self) -> Iterator[Candidate]:
        """Yields the candidates in the order of their integer ids."""
        for file, lines in self._lines:
            wanted = iter(lines)
            line = next(wanted)
            for number, row, _ in iter_rows(file, containing=f'"{self.dataset}:'):
                if number == line:
                    yield parse_candidate(row, self.mbeir.path)[0]
                    line = next(wanted, None)
                    if line is None:
                        break

    def add(self, file: Path, number: int, line: bytes, row: dict) -> None:
        """Adds a decoded pool line. A line of a known candidate only changes the fingerprint."""
        self._digest.update(line)
        key = hash(row["did"])
        if key in self._known:
            return
        candidate, problems = parse_candidate(row, self.mbeir.path)
        if candidate is None or problems:
            self.problem = self.problem or f"{file}:{number}: {problems[0]}"
            return
        self._known.add(key)
        self._hashes.append(key)
        self._modalities.append(MODALITIES.index(candidate.modality))
        if candidate.image is not None:
            self._images.append(image_id(candidate.image, self.mbeir.path))
        if not self._lines or self._lines[-1][0] is not file:
            self._lines.append((file, array("l")))
        self._lines[-1][1].append(number)

    def close(self) -> None:
        """Sorts the index after the last line. Call before `find`."""
        self.fingerprint = self._digest.hexdigest()
        self._known = set()
        hashes = np.array(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        self._sorted, self._order = hashes[order], order.astype(np.int32)
        self._kinds = np.array(self._modalities, np.int8)
        if len(self) > IDS_PER_DATASET:
            self.problem = f"{self.mbeir.path}: dataset {self.dataset} has more than {IDS_PER_DATASET} candidates"


class CandidateIndices:
    """The candidate indices of all datasets, built on first use in one pass over the pools."""

    def __init__(self, mbeir: Mbeir):
        self._mbeir = mbeir
        self._known: dict[int, CandidateIndex] | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of all datasets together."""
        if self._known is None:
            self._known = self._read()
        return "".join(f"{dataset}:{index.fingerprint};" for dataset, index in sorted(self._known.items()))

    def for_dataset(self, dataset: int) -> CandidateIndex:
        """Returns the index of a dataset; an empty one if no pool has candidates of it.

        Raises:
          UserError: the dataset's id is too large for int32, or a row of the dataset or a line of a pool is malformed.
        """
        if dataset > MAX_DATASET_ID:
            raise UserError(f"{self._mbeir.path}: dataset id {dataset} is larger than {MAX_DATASET_ID}")
        if self._known is None:
            self._known = self._read()
        if dataset not in self._known:
            self._known[dataset] = CandidateIndex(self._mbeir, dataset)
            self._known[dataset].close()
        if self._known[dataset].problem:
            raise UserError(self._known[dataset].problem)
        return self._known[dataset]

    def find(self, dids: list[str]) -> tuple[list[int], list[int]]:
        """Returns the candidates' integer ids (-1 if not in any pool) and their indices into MODALITIES.

        Raises:
          ValueError: an id does not contain its dataset's number.
        """
        datasets = [parse_dataset_id(did) for did in dids]
        if len({*datasets}) == 1:
            numbers, kinds = self.for_dataset(datasets[0]).find(dids)
            return numbers.tolist(), kinds.tolist()
        found = [self.for_dataset(dataset).find([did]) for dataset, did in zip(datasets, dids, strict=True)]
        return [int(number[0]) for number, _ in found], [int(kind[0]) for _, kind in found]

    def _read(self) -> dict[int, CandidateIndex]:
        indices: dict[int, CandidateIndex] = {}
        for file in self._mbeir.pool_files():
            for number, _, line in iter_nonblank_lines(file):
                row, problem = decode_row(line)
                try:
                    dataset = parse_dataset_id(row["did"])
                except (TypeError, KeyError, AttributeError, ValueError):
                    problem = problem or (parse_candidate(row, self._mbeir.path)[1] or ["did is not dataset:number"])[0]
                if problem:
                    raise UserError(f"{file}:{number}: {problem}")
                index = indices.get(dataset)
                if index is None:
                    index = indices[dataset] = CandidateIndex(self._mbeir, dataset)
                index.add(file, number, line, row)
        for index in indices.values():
            index.close()
        return indices
