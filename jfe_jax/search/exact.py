"""Exact nearest neighbours by inner product, over all devices and processes, a block of scores at a time.

Results are sorted by the exact score (exact_scores.py). Ties go to the candidate that comes first. So results depend
neither on block sizes, nor on devices, nor on which queries are searched together.

Axes: Q queries, N candidates, C candidates of a block, E embedding, T targets of a query, K kept for a query.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jfe_jax.config import MeshConfig
from jfe_jax.embedding.row_source import ArrayRows, RowSource, largest_norm
from jfe_jax.errors import UserError
from jfe_jax.parallel.distributed import all_or_none
from jfe_jax.parallel.sharding import group_count, make_mesh
from jfe_jax.search import bf16_prefilter, topk
from jfe_jax.search.query_block import QueryBlock

QUERY_BLOCK = 1024
# Rows of a block on one device.
CANDIDATE_BLOCK = 4096
# Blocks that are asked in one call at most.
_TOGETHER = 16
# Candidates are kept on the devices between searches if each device has no more of them than this.
RESIDENT_BYTES = 4 << 30


class Found(NamedTuple):
    """What `search` found.

    Attributes:
      scores: float32 [Q, k], falling.
      rows: int32 [Q, k]; positions in the candidates.
      ranks: int32 [Q, T]; rank from 1 of each target among all N candidates; 0 for a target of -1.
    """

    scores: np.ndarray
    rows: np.ndarray
    ranks: np.ndarray


def search(
    queries: np.ndarray,
    candidates: np.ndarray | RowSource,
    k: int,
    targets: np.ndarray | None = None,
    *,
    query_block: int = QUERY_BLOCK,
    candidate_block: int = CANDIDATE_BLOCK,
    mesh: Mesh | None = None,
) -> Found:
    """The k best candidates of each query, and the exact ranks of given targets.

    Candidates are read a block at a time, so they may be larger than memory. To ask the same ones again and again, make
    a `Searcher`.

    Args:
      queries: float [Q, E].
      candidates: float [N, E]; N at least 1.
      k: results per query; N if there are fewer.
      targets: int [Q, T]; positions in the candidates, padded with -1.

    Raises:
      UserError: there are no candidates, the widths differ, or something is not finite.
    """
    searcher = Searcher(candidates, mesh=mesh, resident=False, candidate_block=candidate_block)
    return searcher.search(queries, k, targets, query_block=query_block)


class Searcher:
    """Candidates that are searched more than once; of several processes, each searches its share of them.

    Args:
      candidates: float [N, E], or a RowSource. An array must not be changed afterwards.
      mesh: of this process's devices; all of them if not given.
      resident: keep the candidates on the devices; by default if they are small enough.
      select: "host" or "device", see topk.py; by default what suits the devices.
      recall: below 1, the devices may miss some of the best: see topk.DeviceTopK.
      prefilter: run a first pass in bfloat16 (bf16_prefilter.py) when ranks are not requested. By default, on a CPU
        where that is faster, for large blocks of queries. It changes no result.

    Raises:
      UserError: there are no candidates.
    """

    def __init__(
        self,
        candidates: np.ndarray | RowSource,
        *,
        mesh: Mesh | None = None,
        resident: bool | None = None,
        candidate_block: int = CANDIDATE_BLOCK,
        select: str | None = None,
        recall: float = 1.0,
        prefilter: bool | None = None,
    ):
        self.rows: RowSource = ArrayRows(candidates) if isinstance(candidates, np.ndarray) else candidates
        total = self.rows.shape[0]
        if not total:
            raise UserError("the pool of candidates is empty: there is nothing to search")
        self.mesh = mesh or make_mesh(MeshConfig(data=-1), jax.local_devices())
        devices = group_count(self.mesh)
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self._select = "device" if recall < 1 else select or ("host" if on_cpu else "device")
        self.recall, self.prefilter = recall, prefilter
        self.norm = self.rows.norm
        share = [total * number // jax.process_count() for number in range(jax.process_count() + 1)]
        self.first, self.last = share[jax.process_index()], share[jax.process_index() + 1]
        self._size = devices * min(
            -(-candidate_block // topk.GROUP) * topk.GROUP, _block_length(-(-max(1, self.last - self.first) // devices))
        )
        if resident is None:
            row_bytes = self.rows.shape[1] * self.rows.read(0, 1)[0].itemsize
            resident = (self.last - self.first) * row_bytes <= RESIDENT_BYTES * devices
        self._resident = None
        self._resident = list(self.blocks()) if resident else None

    def search(
        self,
        queries: np.ndarray,
        k: int,
        targets: np.ndarray | None = None,
        *,
        query_block: int = QUERY_BLOCK,
        progress: Callable[[int], None] | None = None,
    ) -> Found:
        """As the function `search`; `progress` is called with the number of candidates done since its last call."""
        if queries.shape[1] != self.rows.shape[1]:
            raise UserError(
                f"queries have width {queries.shape[1]}, candidates {self.rows.shape[1]}: "
                "they were embedded by different checkpoints"
            )
        bad = np.flatnonzero(~np.isfinite(queries).all(1))
        if len(bad):
            raise UserError(f"query {bad[0]} is not finite ({len(bad)} of {len(queries)} are so)")
        if self.norm is None:
            self.norm = largest_norm(self.rows)
        k = min(k, self.rows.shape[0])
        targets = np.full((len(queries), 0), -1) if targets is None else targets
        parts = [
            QueryBlock(self, queries[at : at + query_block], targets[at : at + query_block], k)
            for at in range(0, len(queries), query_block)
        ]
        # A row that is not finite is met by one process only.
        with all_or_none():
            waiting = None
            for several in self._coalesced_blocks(max(part.length for part in parts)) if parts else ():
                for part in parts:
                    asked = part.ask(several)
                    # The devices compute these scores while the host looks at the last.
                    if waiting is not None:
                        waiting()
                    waiting = asked
                if progress:
                    progress(sum(block.count for block in several))
            if waiting is not None:
                waiting()
        results = [part.finish() for part in parts]
        empty = np.zeros((0, k), np.float32), np.zeros((0, k), np.int32), np.zeros((0, targets.shape[1]), np.int32)
        return Found(*(np.concatenate(columns) for columns in zip(*(results or [empty]), strict=True)))

    def blocks(self) -> Iterable[topk.Block]:
        """This process's share of the candidates."""
        return self._resident or topk.blocks(self.rows, self._size, self.mesh, self.first, self.last)

    def _coalesced_blocks(self, queries: int) -> Iterator[list[topk.Block]]:
        """The blocks, as many together as make up a block of scores: few queries are asked in few calls."""
        most = max(1, min(_TOGETHER, CANDIDATE_BLOCK * QUERY_BLOCK // (self._size * queries)))
        # Rows that are split over devices are not in order once blocks are joined; what is read is read block by block.
        most = most if group_count(self.mesh) == 1 and self._resident else 1
        several: list[topk.Block] = []
        for block in self.blocks():
            several.append(block)
            if len(several) == most:
                yield several
                several = []
        if several:
            yield several

    def uses_prefilter(self, queries: int) -> bool:
        """Whether so many are to be asked in bfloat16 first."""
        if self.prefilter is not None or self._select == "device":
            return bool(self.prefilter) and self._select == "host"
        return queries >= bf16_prefilter.FEWEST and bf16_prefilter.is_faster()

    def new_top(self, queries: int, k: int, keep: int) -> topk.HostTopK | topk.DeviceTopK:
        """What selects the k best of so many queries, and keeps some more."""
        if self._select == "host":
            return topk.HostTopK(queries, k, keep)
        return topk.DeviceTopK(queries, keep, self.mesh, self.recall)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the rows [Q, k] that an exact search found which another one found too."""
    return float(np.mean([len(np.intersect1d(*pair)) / exact.shape[1] for pair in zip(found, exact, strict=True)]))


def _block_length(length: int) -> int:
    return -(-length // 1024) * 1024 if length > 1024 else max(128, 1 << max(length - 1, 0).bit_length())
