"""A pool of candidates, embedded, in which each modality is searched on its own.

Axes: N candidates, E embedding, Q queries.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jfe_jax.data.items import Item
from jfe_jax.data.mbeir import MODALITIES, Candidate, Mbeir
from jfe_jax.data.stored_images import Images, opened
from jfe_jax.errors import UserError
from jfe_jax.retrieval.embed import embed
from jfe_jax.retrieval.retriever import Retriever
from jfe_jax.retrieval.rows import Rows, RowsPart
from jfe_jax.retrieval.search import Searcher


class PoolFile:
    """The candidates of a pool file, by modality and id: what `embed` takes.

    Attributes:
      images: where the images are.
      candidates: N; those whose image is missing are left out, and counted in `missing`.
      row: candidate id → position.
      ranges: modality → first position and the one after the last.

    Raises:
      UserError: a row is wrong, or there is no candidate with its image.
    """

    def __init__(self, mbeir: Mbeir, path: Path, images: Images):
        self.path, self.images = path, images
        there: dict[str, Candidate] = {}
        self.missing = 0
        for candidate in mbeir.candidates(path):
            if candidate.image is not None and images.find(candidate.image) is None:
                self.missing += 1
            else:
                there[candidate.did] = candidate
        if not there:
            raise UserError(f"{path}: no candidate ({self.missing} have an image that is missing)")
        self.candidates = sorted(there.values(), key=lambda one: (MODALITIES.index(one.modality), one.did))
        self.ids = [one.did for one in self.candidates]
        self.row = {did: number for number, did in enumerate(self.ids)}
        of = np.array([MODALITIES.index(one.modality) for one in self.candidates])
        bounds = np.searchsorted(of, np.arange(len(MODALITIES) + 1))
        self.ranges = {
            name: (int(start), int(stop))
            for name, start, stop in zip(MODALITIES, bounds[:-1], bounds[1:], strict=True)
            if start < stop
        }
        told = repr([(one.did, one.text, str(one.image)) for one in self.candidates])
        self.digest = hashlib.sha256(told.encode()).hexdigest()

    def items(self, start: int, stop: int) -> list[Item]:
        """As embed.Source."""
        return [opened(one.item(), self.images) for one in self.candidates[start:stop]]


class Pool:
    """An embedded pool.

    Args:
      file: its candidates.
      out: where the index is, or is made; `dtype` and `overwrite` as for `embed`.
    """

    def __init__(
        self,
        retriever: Retriever,
        file: PoolFile,
        out: Path,
        dtype: str,
        overwrite: bool,
        progress: Callable[[int], None] | None,
    ):
        self.file = file
        done = embed(retriever, file, out, dtype=dtype, overwrite=overwrite, progress=progress)
        self.rows: Rows = done.index.rows
        self._searchers: dict[str, Searcher] = {}

    def best(self, queries: np.ndarray, k: int, modalities: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions [Q, up to k] of the best candidates of these modalities, together."""
        scores, rows = [np.zeros((len(queries), 0), np.float32)], [np.zeros((len(queries), 0), np.int64)]
        for name in modalities:
            if name not in self.file.ranges:
                continue
            start, stop = self.file.ranges[name]
            if name not in self._searchers:
                self._searchers[name] = Searcher(RowsPart(self.rows, start, stop))
            found = self._searchers[name].search(queries, k)
            scores.append(found.scores)
            rows.append(found.rows.astype(np.int64) + start)
        all_scores, all_rows = np.concatenate(scores, 1), np.concatenate(rows, 1)
        order = np.lexsort((all_rows, -all_scores), axis=1)[:, :k]
        return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
