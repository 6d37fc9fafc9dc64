"""Embeddings by what was embedded: a directory of indices that one checkpoint made, shared by its evaluations.

    checkpoint.json              which checkpoint
    {name}.{dtype}.{digest}/     an index as `jfe embed` writes it, finished or not
      contents.npy               int64 [B]: candidate_table.content_id of its items

What any finished index holds is not embedded again; what none holds becomes a new one. The same items with the same
indices beside them make the same new one, so that a killed run goes on with it.

Axes: N items, B items of one index, E embedding.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jfe_jax.data.item import Item
from jfe_jax.embedding.embed import SHARD, embed
from jfe_jax.embedding.index import MANIFEST, Index
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.embedding.row_source import FileRows
from jfe_jax.embedding.shard_store import PLAN, write_json
from jfe_jax.embedding.string_table import LazyNames
from jfe_jax.errors import UserError
from jfe_jax.parallel.distributed import all_or_none, is_process_zero

CHECKPOINT, CONTENTS = "checkpoint.json", "contents.npy"
# Rows of a file that lie no further apart are read together.
_GAP = 8


class EmbeddingRequest(Protocol):
    """Items to have embeddings of.

    Attributes:
      kind: what they are, for people.
      contents: int64 [N]; candidate_table.content_id.
      files: int16 [N]; which of `names` the index is named after that an item goes into.
      path: where they are from, for people.
    """

    kind: str
    contents: np.ndarray
    files: np.ndarray
    names: Sequence[str]
    path: Path

    def id(self, number: int) -> str:
        """What an item is called."""

    def item(self, number: int) -> Item:
        """An item."""


class EmbeddingLocation(NamedTuple):
    """Where embeddings are: of each of the N items its index, int16, and its row there, int32."""

    index: np.ndarray
    row: np.ndarray


class EmbeddingCache:
    """The directory, opened for one checkpoint.

    Args:
      form: of the images, as image_store.ImageLookup has it.
      overwrite: if another checkpoint's embeddings are there, or damaged ones, remove them.

    Raises:
      UserError: another checkpoint's embeddings are there, or another evaluation is at work there.
    """

    def __init__(
        self,
        folder: Path,
        retriever: Retriever,
        *,
        form: str = "as published",
        overwrite: bool = False,
        shard: int = SHARD,
    ):
        self.folder, self._retriever, self._form, self._shard = folder, retriever, form, shard
        self._lock = None
        self.indices: list[Index] = []
        self._contents: list[np.ndarray] = []
        try:
            with all_or_none():
                if is_process_zero():
                    folder.mkdir(parents=True, exist_ok=True)
                    self._lock = _locked(folder)
                    self._claim(overwrite)
            with all_or_none():
                for number, place in enumerate(sorted(folder.glob(f"*/{MANIFEST}"))):
                    self._add(place.parent, verify=number % jax.process_count() == jax.process_index())
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets other evaluations embed here; what is there can still be read."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def missing(self, wanted: EmbeddingRequest, dtype: str) -> np.ndarray:
        """int64, rising: numbers of items, each content once, that no index of that type holds."""
        found = self._find(wanted.contents, dtype)
        left = np.flatnonzero(found.index < 0)
        return left[np.sort(np.unique(wanted.contents[left], return_index=True)[1])]

    def ensure(
        self, wanted: EmbeddingRequest, dtype: str, progress: Callable[[int], None] | None = None
    ) -> EmbeddingLocation:
        """Embeds what is missing.

        Raises:
          UserError: as `embed`.
        """
        missing = self.missing(wanted, dtype)
        for number in np.unique(wanted.files[missing]):
            chosen = missing[wanted.files[missing] == number]
            part = _Part(wanted, chosen)
            folder = self.folder / f"{wanted.names[number]}.{dtype}.{part.digest[:12]}"
            with all_or_none():
                if is_process_zero():
                    folder.mkdir(exist_ok=True)
                    np.save(folder / CONTENTS, wanted.contents[chosen])
            embed(self._retriever, part, folder, dtype=dtype, shard=self._shard, progress=progress)
            with all_or_none():
                self._add(folder)
        return self._find(wanted.contents, dtype)

    def rows(self, stored: EmbeddingLocation) -> "CachedRows":
        """The embeddings, for `search`."""
        return CachedRows([index.rows for index in self.indices], stored)

    def score_error(self, stored: EmbeddingLocation) -> float:
        """No score of these with a query of length 1 is further from that of the unrounded rows."""
        return max((self.indices[number].manifest.score_error for number in np.unique(stored.index)), default=0.0)

    def cut_texts(self, stored: EmbeddingLocation) -> int:
        """Texts that were cut, in the shards that hold any of these."""
        total = 0
        for number in np.unique(stored.index):
            told = self.indices[number].manifest
            shards = np.unique(stored.row[stored.index == number] // told.shard)
            total += sum(told.shards[shard].cut for shard in shards)
        return total

    def _claim(self, overwrite: bool) -> None:
        mine = {
            "fingerprint": self._retriever.fingerprint,
            "checkpoint": str(self._retriever.path.resolve()),
            "step": self._retriever.step,
            "images": self._form,
        }
        try:
            told = json.loads((self.folder / CHECKPOINT).read_text(encoding="utf-8"))
            told = {name: told[name] for name in mine}
        except (OSError, ValueError, KeyError, TypeError):
            # Each index says itself which checkpoint made it.
            told = mine
        if told["fingerprint"] != mine["fingerprint"] and not overwrite:
            raise UserError(
                f"{self.folder}: holds embeddings of {told['checkpoint']} step {told['step']} ({told['fingerprint']}), "
                f"not of {mine['checkpoint']} step {mine['step']} ({mine['fingerprint']}); take another directory, or "
                "replace them with --overwrite"
            )
        if told["images"] != mine["images"] and not overwrite:
            raise UserError(
                f"{self.folder}: holds embeddings of images in another form ({told['images']}, not {mine['images']}); "
                "take another directory, or replace them with --overwrite"
            )
        if overwrite:
            for place in [*self.folder.glob(f"*/{MANIFEST}"), *self.folder.glob(f"*/{PLAN}")]:
                shutil.rmtree(place.parent, ignore_errors=True)
        write_json(self.folder / CHECKPOINT, mine)

    def _add(self, folder: Path, verify: bool = False) -> None:
        index = Index.open(folder)
        index.require_made_by(self._retriever)
        if verify:
            index.require_undamaged()
        try:
            contents = np.load(folder / CONTENTS)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder / CONTENTS}: cannot be read ({error}); begin anew with --overwrite") from error
        if _digest(contents) != index.manifest.source_digest:
            raise UserError(f"{folder / CONTENTS}: damaged; begin anew with --overwrite")
        self.indices.append(index)
        self._contents.append(contents)

    def _find(self, contents: np.ndarray, dtype: str) -> EmbeddingLocation:
        found = EmbeddingLocation(np.full(len(contents), -1, np.int16), np.zeros(len(contents), np.int32))
        for number, known in enumerate(self._contents):
            if self.indices[number].manifest.dtype != dtype:
                continue
            order = np.argsort(known, kind="stable")
            at = np.minimum(np.searchsorted(known, contents, sorter=order), len(known) - 1)
            here = (known[order[at]] == contents) & (found.index < 0)
            found.index[here], found.row[here] = number, order[at[here]]
        return found


class CachedRows:
    """Rows of several files in an order of their own; as row_source.RowSource.

    Args:
      files: of one type and width.
    """

    def __init__(self, files: Sequence[FileRows], stored: EmbeddingLocation):
        self._files, self._stored = files, stored
        used = [files[number] for number in np.unique(stored.index)]
        self.shape = len(stored.row), files[0].shape[1]
        self.norm = max((file.norm for file in used), default=None)
        self._dtype, self._scaled = (used[0].dtype, used[0].scales is not None) if used else (np.dtype("f4"), False)

    @property
    def row_bytes(self) -> int:
        """Of a row as stored."""
        return self.shape[1] * self._dtype.itemsize

    def __getitem__(self, rows: np.ndarray) -> "CachedRows":
        """Some of the rows, in another order."""
        return CachedRows(self._files, EmbeddingLocation(*(part[rows] for part in self._stored)))

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        index, row = (part[start:stop] for part in self._stored)
        rows = np.empty((len(row), self.shape[1]), self._dtype)
        scales = np.empty(len(row), np.float32) if self._scaled else None
        for number, places in _runs(index, row):
            first, last = int(row[places[0]]), int(row[places[-1]])
            stored, multiplied = self._files[number].read(first, last + 1)
            rows[places] = stored[row[places] - first]
            if scales is not None:
                scales[places] = multiplied[row[places] - first]
        return rows, scales

    def take(self, rows: np.ndarray) -> np.ndarray:
        index, row = (part[rows] for part in self._stored)
        taken = np.empty((len(row), self.shape[1]), np.float64)
        for number in np.unique(index):
            here = index == number
            taken[here] = self._files[number].take(row[here])
        return taken


class _Part:
    """Some of what is wanted, as embed.Source."""

    def __init__(self, wanted: EmbeddingRequest, chosen: np.ndarray):
        self._wanted, self._chosen, self.path = wanted, chosen, wanted.path
        self.digest = _digest(wanted.contents[chosen])
        self.ids = LazyNames(chosen, wanted.id)

    def items(self, start: int, stop: int) -> list[Item]:
        return [self._wanted.item(number) for number in self._chosen[start:stop]]


def _runs(index: np.ndarray, row: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """A file's number and places whose rows there lie close together, rising."""
    order = np.lexsort((row, index))
    breaks = (np.diff(index[order]) != 0) | (np.diff(row[order]) > _GAP)
    for places in np.split(order, np.flatnonzero(breaks) + 1):
        if len(places):
            yield int(index[places[0]]), places


def _digest(contents: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(contents)).hexdigest()


def _locked(folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(
            f"{folder}: another evaluation is embedding there; wait until it is done, or take another --embeddings"
        ) from error
    return lock
