"""Holds millions of candidates: compact arrays in memory, texts and image names read from their files on demand.

Axes: N candidates, X of them that show a given image.
"""

import bisect
import functools
import hashlib
import os
import weakref
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jfe_jax.data.formats.line_index import iter_nonblank_lines
from jfe_jax.data.formats.mbeir import MODALITIES, Candidate
from jfe_jax.data.ids import image_id, image_name, name_id
from jfe_jax.errors import UserError

# (line, file, line number) → candidate. Raises UserError if the line is malformed.
ParseCandidate = Callable[[bytes, Path, int], Candidate]

_STRINGS = np.dtypes.StringDType()
# Maximum number of ids held as Python strings at a time.
_CHUNK = 1 << 16


class CandidateTable(Sequence[Candidate]):
    """Candidates with unique ids, in descending order of id: trec_eval's order among equal scores.

    A candidate takes about 50 bytes. Its text and its image's name are read from its file on access.

    Attributes:
      root: the directory that image paths begin with.
      contents: int64 [N]; see `content_id`.
      images: int64 [N]; see `ids.image_id`.
      modalities: int8 [N]; indices into MODALITIES.
      files: int16 [N]; index of the file that each was first read from.
      names: names of the files.
    """

    def __init__(
        self,
        dids: np.ndarray,
        columns: dict[str, np.ndarray],
        root: Path,
        names: Sequence[str],
        read: Callable[[int], Candidate],
    ):
        self.root, self.names, self._sorted_dids, self._read = root, names, dids, read
        self.contents, self.images = columns["contents"], columns["images"]
        self.modalities, self.files = columns["modalities"], columns["files"]

    @classmethod
    def from_candidates(cls, candidates: Sequence[Candidate], root: Path) -> "CandidateTable":
        """Builds a table of candidates in memory. Their ids must be unique."""
        ordered = sorted(candidates, key=lambda one: one.did, reverse=True)
        columns = _ColumnBuilder(root)
        for one in ordered:
            columns.add(one, 0)
        dids, arrays = columns.finish()
        return cls(dids[::-1], arrays, root, ["candidates"], ordered.__getitem__)

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, row: int) -> Candidate:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._read(int(row))

    def did(self, row: int) -> str:
        """Returns the id of a candidate."""
        return self._sorted_dids[len(self) - 1 - int(row)]

    def dids(self, rows: np.ndarray) -> np.ndarray:
        """Returns the ids of candidates: strings, in the shape of `rows`."""
        return self._sorted_dids[len(self) - 1 - rows]

    def digest(self, rows: np.ndarray) -> str:
        """Returns a digest of the ids, contents and order of these candidates."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.contents[rows]), digest_size=16)
        for start in range(0, len(rows), _CHUNK):
            digest.update("\n".join(self.dids(rows[start : start + _CHUNK])).encode())
        return digest.hexdigest()

    def row(self, did: str) -> int:
        """Returns the row of the candidate with that id; -1 if there is none."""
        # np.searchsorted would copy the array.
        at = bisect.bisect_left(self._sorted_dids, did)
        return len(self) - 1 - at if at < len(self) and self._sorted_dids[at] == did else -1

    def modality(self, row: int) -> str:
        """Returns a candidate's modality, one of MODALITIES."""
        return MODALITIES[self.modalities[row]]

    def showing(self, image: Path) -> np.ndarray:
        """Returns int32 [X], ascending: the rows of the candidates that show an image."""
        ids, order = self._by_image
        key = image_id(image, self.root)
        return order[np.searchsorted(ids, key) : np.searchsorted(ids, key, "right")]

    @functools.cached_property
    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.images, kind="stable").astype(np.int32)
        return self.images[order], order


def content_id(instruction: str | None, text: str | None, image: Path | None, root: Path) -> int:
    """Hashes an item's texts and image to an int64. Two different items collide with probability 2⁻⁶⁴.

    An image is identified by its path, not by its content. `root` is the directory that the path begins with.
    """
    location = "" if image is None else f"{_real_path(root)}/{image_name(image, root)}"
    return name_id("\0".join((instruction or "", text or "", location)))


def read_candidate_table(
    files: Sequence[Path], parse: ParseCandidate, root: Path, *, repeated: bool = True
) -> tuple[CandidateTable, dict[Path, np.ndarray]]:
    """Reads files of candidates.

    Args:
      repeated: allow an id to occur again, if its content is the same.

    Returns:
      A table of all candidates, and for each file the rows of its candidates: int32, ascending.

    Raises:
      UserError: a file has no candidates or a malformed line, or two lines give one id to different candidates.
    """
    columns, bounds, starts, lengths = _ColumnBuilder(root), [0], array("q"), array("i")
    for number, file in enumerate(files):
        for line_number, start, line in iter_nonblank_lines(file):
            columns.add(parse(line, file, line_number), number)
            starts.append(start)
            lengths.append(len(line))
        bounds.append(len(starts))
        if bounds[-1] == bounds[-2]:
            raise UserError(f"{file}: the pool of candidates is empty")
    dids, arrays = columns.finish()
    order = np.argsort(dids, kind="stable")
    dids = dids[order]
    new = np.concatenate([[True], dids[1:] != dids[:-1]])
    number, first = np.cumsum(new) - 1, order[new]
    wrong = arrays["contents"][order] != arrays["contents"][first[number]] if repeated else ~new
    if wrong.any():
        first_wrong = np.flatnonzero(wrong)[0]
        at = order[first_wrong]
        file = files[arrays["files"][at]]
        line = next(line for line, start, _ in iter_nonblank_lines(file) if start == starts[at])
        problem = "is another one than in a pool read before" if repeated else "is there a second time"
        raise UserError(f"{file}:{line}: candidate {dids[first_wrong]} {problem}")
    # Rows are in descending order of id.
    row = np.empty(len(order), np.int32)
    row[order] = number[-1] - number
    found = {file: np.unique(row[a:b]) for file, a, b in zip(files, bounds, bounds[1:], strict=False)}
    first = first[::-1]
    arrays = {name: values[first] for name, values in arrays.items()}
    places = (np.frombuffer(part, part.typecode)[first] for part in (starts, lengths))
    reader = _LineReader(files, arrays["files"], *places, parse)
    return CandidateTable(dids[new], arrays, root, [file.stem for file in files], reader), found


class _ColumnBuilder:
    """Accumulates the columns of a table candidate by candidate."""

    def __init__(self, root: Path):
        self._root, self._ids = root, []
        self._chunks: list[np.ndarray] = []
        self._arrays = {"contents": array("q"), "images": array("q"), "modalities": array("b"), "files": array("h")}

    def add(self, candidate: Candidate, file: int) -> None:
        arrays, image = self._arrays, candidate.image
        arrays["contents"].append(content_id(None, candidate.text, image, self._root))
        arrays["images"].append(image_id(image, self._root))
        arrays["modalities"].append(MODALITIES.index(candidate.modality))
        arrays["files"].append(file)
        self._ids.append(candidate.did)
        if len(self._ids) == _CHUNK:
            self._flush()

    def finish(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the ids and the other columns, each [N]."""
        self._flush()
        dids, self._chunks = np.concatenate(self._chunks), []
        # np.frombuffer shares the memory instead of copying it.
        return dids, {name: np.frombuffer(values, values.typecode) for name, values in self._arrays.items()}

    def _flush(self) -> None:
        self._chunks.append(np.array(self._ids, _STRINGS))
        self._ids = []


class _LineReader:
    """Reads a candidate's line from its file on demand."""

    def __init__(
        self, files: Sequence[Path], number: np.ndarray, start: np.ndarray, length: np.ndarray, parse: ParseCandidate
    ):
        self._files, self._number, self._start, self._length = files, number, start, length
        self._parse = parse
        self._open = [os.open(file, os.O_RDONLY) for file in files]
        # Not __del__: at interpreter exit the os module may be gone.
        for file in self._open:
            weakref.finalize(self, os.close, file)

    def __call__(self, row: int) -> Candidate:
        number, start = int(self._number[row]), int(self._start[row])
        return self._parse(os.pread(self._open[number], int(self._length[row]), start), self._files[number], 0)


@functools.lru_cache(16)
def _real_path(root: Path) -> str:
    return os.path.realpath(root)
