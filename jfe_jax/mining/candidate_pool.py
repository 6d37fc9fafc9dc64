"""A pool of candidates, embedded, in which each modality is searched on its own.

Axes: N candidates, E embedding, Q queries.
"""

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jfe_jax.data.formats.candidate_table import read_candidate_table
from jfe_jax.data.formats.mbeir import MODALITIES, Candidate, Mbeir
from jfe_jax.data.ids import image_id
from jfe_jax.data.item import Item
from jfe_jax.data.storage.image_store import ImageLookup, resolve_image
from jfe_jax.embedding.embed import embed
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.embedding.row_source import RowSlice, RowSource
from jfe_jax.embedding.string_table import LazyNames
from jfe_jax.errors import UserError
from jfe_jax.search.exact import Searcher


class PoolFile:
    """The candidates of a pool file, by modality and id: what `embed` takes. Rows are read when asked for.

    A candidate takes some 60 bytes.

    Attributes:
      images: where the images are.
      missing: how many candidates are left out, as their image is missing.
      ranges: modality → first position and the one after the last.
      path, ids, digest: as embed.Source.

    Raises:
      UserError: a row is wrong, two rows give one id to different candidates, or there is none with its image.
    """

    def __init__(self, mbeir: Mbeir, path: Path, images: ImageLookup):
        self.path, self.images, lost = path, images, array("q")

        def parse(line: bytes, file: Path, number: int) -> Candidate:
            one = mbeir.candidate(line, file, number)
            # Number 0: read again.
            if number and one.image is not None and images.find(one.image) is None:
                lost.append(image_id(one.image, mbeir.path))
            return one

        self._table, _ = read_candidate_table([path], parse, mbeir.path)
        there = ~np.isin(self._table.images, np.array(lost, np.int64))
        self.missing = int(len(there) - there.sum())
        if not there.any():
            raise UserError(f"{path}: no candidate ({self.missing} have an image that is missing)")
        # Rising ids, those of one modality together.
        rows = np.flatnonzero(there)[::-1].astype(np.int32)
        self._rows = rows[np.argsort(self._table.modalities[rows], kind="stable")]
        self._positions = np.full(len(there), -1, np.int32)
        self._positions[self._rows] = np.arange(len(self._rows), dtype=np.int32)
        bounds = np.searchsorted(self._table.modalities[self._rows], np.arange(len(MODALITIES) + 1))
        self.ranges = {
            name: (int(start), int(stop))
            for name, start, stop in zip(MODALITIES, bounds[:-1], bounds[1:], strict=True)
            if start < stop
        }
        self.ids, self.digest = LazyNames(self._rows, self._table.did), self._table.digest(self._rows)

    def find(self, did: str) -> int:
        """Where the candidate of that id stands; -1 if there is none."""
        row = self._table.row(did)
        return int(self._positions[row]) if row >= 0 else -1

    def candidate(self, position: int) -> Candidate:
        """A candidate."""
        return self._table[self._rows[position]]

    def modality(self, position: int) -> str:
        """One of MODALITIES."""
        return self._table.modality(self._rows[position])

    def items(self, start: int, stop: int) -> list[Item]:
        """As embed.Source."""
        stop = min(stop, len(self._rows))
        return [resolve_image(self.candidate(position).item(), self.images) for position in range(start, stop)]


class EmbeddedPool:
    """An embedded pool.

    Args:
      file: its candidates.
      out: where the index is, or is made; `dtype`, `shard` and `overwrite` as for `embed`.
    """

    def __init__(
        self,
        retriever: Retriever,
        file: PoolFile,
        out: Path,
        dtype: str,
        shard: int,
        overwrite: bool,
        progress: Callable[[int], None] | None,
    ):
        self.file = file
        done = embed(retriever, file, out, dtype=dtype, shard=shard, overwrite=overwrite, progress=progress)
        self.rows: RowSource = done.index.rows
        self._searchers: dict[str, Searcher] = {}

    def best(self, queries: np.ndarray, k: int, modalities: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions [Q, up to k] of the best candidates of these modalities, together; all processes ask."""
        scores, rows = [np.zeros((len(queries), 0), np.float32)], [np.zeros((len(queries), 0), np.int64)]
        for name in modalities:
            if name not in self.file.ranges:
                continue
            start, stop = self.file.ranges[name]
            if name not in self._searchers:
                self._searchers[name] = Searcher(RowSlice(self.rows, start, stop))
            found = self._searchers[name].search(queries, k)
            scores.append(found.scores)
            rows.append(found.rows.astype(np.int64) + start)
        all_scores, all_rows = np.concatenate(scores, 1), np.concatenate(rows, 1)
        order = np.lexsort((all_rows, -all_scores), axis=1)[:, :k]
        return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
