"""Stored query → pair of a drawn positive with its query, encoded: the middle of the loader's chain.

Most of a step's rows, texts and images were seen in an earlier epoch: three caches make them cheap.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from jfe_jax.data.cache import ByteCache
from jfe_jax.data.images import to_pixels
from jfe_jax.data.items import EncodedItem
from jfe_jax.data.mbeir import MODALITIES
from jfe_jax.data.prepared import Prepared, QueryRecord, RawRecords, parse_query
from jfe_jax.data.tokens import ItemEncoder

# What an entry of a cache costs besides its arrays and texts.
_OVERHEAD = 500


class Caches:
    """What one reader keeps: images for `image_bytes`, and rows and tokens for a quarter as much again."""

    def __init__(self, image_bytes: int):
        self.pixels: ByteCache[np.ndarray] = ByteCache(image_bytes)
        self.tokens: ByteCache[Any] = ByteCache(image_bytes // 8)
        self.rows: ByteCache[QueryRecord] = ByteCache(image_bytes // 8)


class StoredQuery(NamedTuple):
    """A parsed query and where it is from; `record.image` is empty if it came from the cache."""

    unit: "UnitQueries"
    index: int
    record: QueryRecord


class UnitQueries(grain.MapDataset):
    """A unit's queries by index.

    A data set rather than a source for `grain.MapDataset.source`, whose metrics cost as much as reading the record.

    Args:
      records: the serialized queries.
      instructions: rows of query's modality, positive's modality, prompts.
      rows: cache of parsed queries, shared by all units.
    """

    def __init__(self, records: RawRecords, instructions: Iterable[list[str]], rows: ByteCache[QueryRecord]):
        super().__init__()
        self.records, self._rows, self._name = records, rows, str(records)
        # (query's, positive's modality) by index → prompts
        self.prompts = {
            (MODALITIES.index(query), MODALITIES.index(candidate)): prompts
            for query, candidate, *prompts in instructions
        }

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> StoredQuery:
        index %= len(self.records)
        fresh = None

        def parse() -> QueryRecord:
            nonlocal fresh
            fresh = parse_query(self.records[index])
            return fresh._replace(image=b"")

        kept = self._rows.get((self._name, index), parse, _record_bytes)
        return StoredQuery(self, index, fresh or kept)

    def image(self, index: int) -> bytes:
        """The query's encoded image."""
        return parse_query(self.records[index]).image


@dataclass(frozen=True)
class EncodePair(grain.transforms.MapWithIndex):
    """Draws instruction, positive and negatives for the stream's i-th query, and encodes what was drawn.

    Attributes:
      seed: the draws are a function of it and of the index in the stream.
      instruction_probability: how often the query gets an instruction.
      negatives: K at most; a query with fewer in its list gets those.
    """

    prepared: Prepared
    encoder: ItemEncoder
    caches: Caches
    seed: int
    instruction_probability: float
    negatives: int

    def map_with_index(self, index: int, element: StoredQuery) -> "EncodedPair":
        query = element.record
        with_instruction, prompt, positive, *others = uniform(self.seed, index, 3 + self.negatives)
        chosen = int(positive * len(query.positives))
        prompts = element.unit.prompts.get((query.modality, query.positive_modalities[chosen]), ())
        instruction = None
        if prompts and with_instruction < self.instruction_probability:
            instruction = prompts[int(prompt * len(prompts))]
        left = list(query.negatives)
        numbers = [query.positives[chosen], *(left.pop(int(other * len(left))) for other in others[: len(left)])]
        items = (self._query(element, instruction), *map(self._candidate, numbers))
        return EncodedPair(query.qid, items, tuple(numbers), query.positives)

    def _query(self, stored: StoredQuery, instruction: str | None) -> EncodedItem:
        query = stored.record
        tokens = self.caches.tokens.get(
            (query.text, instruction, bool(query.image_id)),
            lambda: self.encoder.tokens(query.text, instruction, bool(query.image_id)),
            _array_bytes,
        )
        if not query.image_id:
            return EncodedItem(tokens, None)

        def pixels() -> np.ndarray:
            image = query.image or stored.unit.image(stored.index)
            return to_pixels(image, self.encoder.image_size, f"image of query {query.qid}")

        return EncodedItem(tokens, self.caches.pixels.get(query.image_id, pixels, _array_bytes))

    def _candidate(self, number: int) -> EncodedItem:
        # The record is read if its tokens or its pixels are not there, and once if neither is.
        record = None

        def tokens() -> tuple[np.ndarray, int]:
            nonlocal record
            record = self.prepared.candidate(number)
            return self.encoder.tokens(record.text, None, bool(record.image_id)), record.image_id

        def pixels() -> np.ndarray:
            there = record or self.prepared.candidate(number)
            return to_pixels(there.image, self.encoder.image_size, f"image of candidate {there.did}")

        ids, image_id = self.caches.tokens.get(number, tokens, lambda one: _array_bytes(one[0]))
        return EncodedItem(ids, self.caches.pixels.get(image_id, pixels, _array_bytes) if image_id else None)


class EncodedPair(NamedTuple):
    """A pair as it enters a batch: `items` are the query, the positive and the negatives, `numbers` the candidates'."""

    qid: str
    items: tuple[EncodedItem, ...]
    numbers: tuple[int, ...]
    positives: tuple[int, ...]


def uniform(seed: int, index: int, count: int) -> list[float]:
    """`count` numbers in [0, 1): a function of seed and index, and cheaper than to seed a generator for each index."""
    digest = hashlib.shake_128(b"%d:%d" % (seed, index)).digest(4 * count)
    return [int.from_bytes(digest[at : at + 4], "little") * 2.0**-32 for at in range(0, 4 * count, 4)]


def _array_bytes(array: np.ndarray) -> int:
    return array.nbytes + _OVERHEAD


def _record_bytes(record: QueryRecord) -> int:
    numbers = 2 * len(record.positives) + len(record.negatives)
    return len(record.text) + 40 * numbers + _OVERHEAD
