"""Approximate indices over an embedded pool, for use and not for evaluation: faiss's, built once and kept beside it.

    INDEX/faiss/{kind}.index    as faiss writes it
    INDEX/faiss/{kind}.json     of which rows it was built, and its recall

Recall is measured against the exact search, with rows of the pool as queries and the row itself left out. Queries of
another kind than the pool's rows (an image with an instruction, say) may have less.

Axes: Q queries, N rows of the pool, E embedding.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jfe_jax.embedding.index import Index
from jfe_jax.embedding.shard_store import decode, write_json
from jfe_jax.errors import UserError
from jfe_jax.search.exact import Searcher, recall

RECALL_AT, RECALL_QUERIES = 10, 200
_BLOCK = 65536
# Rows that faiss's training looks at: it draws 256 for each centroid itself.
_MOST_TRAINING = 1 << 20
# How thoroughly is searched: candidates of HNSW's walk, and the share of an inverted file's lists.
_EF_SEARCH, _LISTS = 128, 1 / 16


class FaissIndex:
    """A faiss index of an embedded pool.

    Args:
      pool: what it is of.
      kind: as faiss's index_factory takes it, "HNSW32" or "IVF1024,PQ64".
      progress: called with the number of rows added since its last call, if it has to be built.

    Attributes:
      measured: recall at RECALL_AT.

    Raises:
      UserError: faiss is not installed, does not know the kind, or has too few rows to train it.
    """

    def __init__(self, pool: Index, kind: str, progress: Callable[[int], None] | None = None):
        try:
            import faiss
        except ImportError as error:
            raise UserError(
                f"faiss:{kind}: faiss is not installed; pip install faiss-cpu, or search exactly without it"
            ) from error
        self._faiss, self.pool, self.kind = faiss, pool, kind
        name = re.sub(r"[^A-Za-z0-9,_-]", "_", kind)
        file, about = (pool.path / "faiss" / f"{name}.{end}" for end in ("index", "json"))
        of = {"kind": kind, "rows": rows_digest(pool)}
        told = _read(about)
        try:
            if file.is_file() and {key: told.get(key) for key in of} == of:
                self._index, self.measured = faiss.read_index(str(file)), told["recall"]
                return
            self._index = self._built(progress)
        except RuntimeError as error:
            # faiss puts its function and source line first.
            reason = re.sub(r"^Error in .* at \S+:\d+: ", "", " ".join(str(error).split()))
            raise UserError(f"faiss:{kind}: {reason}") from error
        self.measured = measure(pool, self.search)
        file.parent.mkdir(exist_ok=True)
        about.unlink(missing_ok=True)
        part = file.with_suffix(".part")
        faiss.write_index(self._index, str(part))
        os.replace(part, file)
        write_json(about, of | {"recall": self.measured, "at": RECALL_AT})

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 scores and int64 rows [Q, k]; rows are -1 where it found fewer."""
        faiss = self._faiss
        if isinstance(self._index, faiss.IndexHNSW):
            self._index.hnsw.efSearch = max(_EF_SEARCH, 2 * k)
        inverted = faiss.try_extract_index_ivf(self._index)
        if inverted is not None:
            inverted.nprobe = max(1, round(inverted.nlist * _LISTS))
        return self._index.search(np.ascontiguousarray(queries, np.float32), k)

    def _built(self, progress: Callable[[int], None] | None) -> Any:
        total, width = self.pool.rows.shape
        index = self._faiss.index_factory(width, self.kind, self._faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            # From all of the pool: its order may be by data set.
            chosen = np.unique(np.linspace(0, total - 1, min(total, _MOST_TRAINING)).astype(np.int64))
            index.train(self.pool.rows.take(chosen).astype(np.float32))
        for start in range(0, total, _BLOCK):
            index.add(decode(*self.pool.rows.read(start, start + _BLOCK)))
            if progress:
                progress(min(_BLOCK, total - start))
        return index


def measure(pool: Index, search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]) -> float:
    """Recall at RECALL_AT (or N - 1) of a way to search the pool, against the exact one."""
    total = pool.rows.shape[0]
    k = min(RECALL_AT, total - 1)
    if k < 1:
        return 1.0
    chosen = np.unique(np.linspace(0, total - 1, min(total, RECALL_QUERIES)).astype(np.int64))
    queries = pool.rows.take(chosen).astype(np.float32)
    exact, found = Searcher(pool.rows, resident=False).search(queries, k + 1).rows, search(queries, k + 1)[1]
    return recall(_without(found, chosen, k), _without(exact, chosen, k))


def rows_digest(pool: Index) -> str:
    """Changes with the stored rows."""
    return hashlib.sha256("".join(shard.sha256 for shard in pool.manifest.shards).encode()).hexdigest()


def _without(rows: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """The first k of each row that are not the query itself."""
    return np.stack([one[one != number][:k] for one, number in zip(rows, own, strict=True)])


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
