"""Candidates by the million: compact arrays in memory, their rows in the files that they were read from.

Axes: N candidates, X of them that show an image.
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

# A line, its file and its number → the candidate; UserError if it is wrong.
ParseCandidate = Callable[[bytes, Path, int], Candidate]

_STRINGS = np.dtypes.StringDType()
# Ids that are Python objects at a time.
_CHUNK = 1 << 16


class CandidateTable(Sequence[Candidate]):
    """Candidates, each id once, in falling order of their ids, which is trec_eval's order among equal scores.

    A candidate takes some 50 bytes; its text and its image's name are read from its file when it is asked for.

    Attributes:
      root: the directory that image paths begin with.
      contents: int64 [N]; see `content_id`.
      images: int64 [N]; numbering.image_id.
      modalities: int8 [N]; indices into MODALITIES.
      files: int16 [N]; the number of the file that each was first read from.
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
        """Candidates that are in memory, each id once."""
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
        """The id of a candidate."""
        return self._sorted_dids[len(self) - 1 - int(row)]

    def dids(self, rows: np.ndarray) -> np.ndarray:
        """The ids of candidates, strings of rows' shape."""
        return self._sorted_dids[len(self) - 1 - rows]

    def digest(self, rows: np.ndarray) -> str:
        """Changes with the ids and contents of these candidates, or their order."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.contents[rows]), digest_size=16)
        for start in range(0, len(rows), _CHUNK):
            digest.update("\n".join(self.dids(rows[start : start + _CHUNK])).encode())
        return digest.hexdigest()

    def row(self, did: str) -> int:
        """Where the candidate of that id stands; -1 if there is none."""
        # NumPy's own search would copy the array.
        at = bisect.bisect_left(self._sorted_dids, did)
        return len(self) - 1 - at if at < len(self) and self._sorted_dids[at] == did else -1

    def modality(self, row: int) -> str:
        """One of MODALITIES."""
        return MODALITIES[self.modalities[row]]

    def showing(self, image: Path) -> np.ndarray:
        """int32 [X], rising: the candidates that show an image."""
        ids, order = self._by_image
        key = image_id(image, self.root)
        return order[np.searchsorted(ids, key) : np.searchsorted(ids, key, "right")]

    @functools.cached_property
    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.images, kind="stable").astype(np.int32)
        return self.images[order], order


def content_id(instruction: str | None, text: str | None, image: Path | None, root: Path) -> int:
    """int64 that stands for what an item says and shows: two different ones have the same once in 2⁶⁴ pairs.

    An image counts by its path, not by what is in it. `root` is the directory the path begins with.
    """
    place = "" if image is None else f"{_real_path(root)}/{image_name(image, root)}"
    return name_id("\0".join((instruction or "", text or "", place)))


def read_candidate_table(
    files: Sequence[Path], parse: ParseCandidate, root: Path, *, repeated: bool = True
) -> tuple[CandidateTable, dict[Path, np.ndarray]]:
    """Reads files of candidates, one after the other.

    Args:
      repeated: an id may be there again, if it is with the same content.

    Returns:
      All candidates, and of each file the rows of those that it has: int32, rising.

    Raises:
      UserError: a file has no candidates or a wrong line, or two lines give one id to different candidates.
    """
    columns, bounds, starts, lengths = _ColumnBuilder(root), [0], array("q"), array("i")
    for number, file in enumerate(files):
        for place, start, line in iter_nonblank_lines(file):
            columns.add(parse(line, file, place), number)
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
        place = np.flatnonzero(wrong)[0]
        at = order[place]
        file = files[arrays["files"][at]]
        line = next(line for line, start, _ in iter_nonblank_lines(file) if start == starts[at])
        said = "is another one than in a pool read before" if repeated else "is there a second time"
        raise UserError(f"{file}:{line}: candidate {dids[place]} {said}")
    # Rows are counted from the last id.
    row = np.empty(len(order), np.int32)
    row[order] = number[-1] - number
    found = {file: np.unique(row[a:b]) for file, a, b in zip(files, bounds, bounds[1:], strict=False)}
    first = first[::-1]
    arrays = {name: values[first] for name, values in arrays.items()}
    places = (np.frombuffer(part, part.typecode)[first] for part in (starts, lengths))
    reader = _LineReader(files, arrays["files"], *places, parse)
    return CandidateTable(dids[new], arrays, root, [file.stem for file in files], reader), found


class _ColumnBuilder:
    """What is kept of candidates that come one after the other."""

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
        """Ids and the other columns, each [N]."""
        self._flush()
        dids, self._chunks = np.concatenate(self._chunks), []
        # The same memory: it is not there twice.
        return dids, {name: np.frombuffer(values, values.typecode) for name, values in self._arrays.items()}

    def _flush(self) -> None:
        self._chunks.append(np.array(self._ids, _STRINGS))
        self._ids = []


class _LineReader:
    """Reads a candidate's line again."""

    def __init__(
        self, files: Sequence[Path], number: np.ndarray, start: np.ndarray, length: np.ndarray, parse: ParseCandidate
    ):
        self._files, self._number, self._start, self._length = files, number, start, length
        self._parse = parse
        self._open = [os.open(file, os.O_RDONLY) for file in files]
        # Not __del__: when Python ends there is no os any more.
        for file in self._open:
            weakref.finalize(self, os.close, file)

    def __call__(self, row: int) -> Candidate:
        number, start = int(self._number[row]), int(self._start[row])
        return self._parse(os.pread(self._open[number], int(self._length[row]), start), self._files[number], 0)


@functools.lru_cache(16)
def _real_path(root: Path) -> str:
    return os.path.realpath(root)
