"""Turns a stored query into an encoded pair with a sampled positive: the middle of the loader's chain.

Candidates and images occur many times in an epoch, so both are cached.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from jfe_jax.data.formats.mbeir import MODALITIES
from jfe_jax.data.ids import IDS_PER_DATASET
from jfe_jax.data.image_transforms import shift
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.batch_builder import EncodedPair
from jfe_jax.data.pipeline.lru_cache import ByteCache
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.data.storage.prepared_dataset import PreparedDataset, QueryRecord, RawRecords, parse_query
from jfe_jax.errors import UserError

# Bytes that a cache entry takes in addition to its array.
_OVERHEAD = 400


class Caches:
    """Caches of one reader: images up to `image_bytes`, and candidates' tokens up to a quarter of that in addition.

    Queries are not cached: they occur once in an epoch and would evict candidates and images, which occur often.
    """

    def __init__(self, image_bytes: int):
        self.pixels: ByteCache[np.ndarray] = ByteCache(image_bytes)
        self.tokens: ByteCache[tuple[np.ndarray, int]] = ByteCache(image_bytes // 4)


class StoredQuery(NamedTuple):
    """A query with its task's prompts by (query's, positive's modality), and the image parts that may hold its image.

    The first of `image_parts` is the task's.
    """

    record: QueryRecord
    prompts: dict[tuple[int, int], list[str]]
    image_parts: tuple[str, ...]

    @property
    def unit(self) -> str:
        return self.image_parts[0]


class TaskQueries(grain.MapDataset):
    """Reads the queries of a task by index.

    A dataset rather than a source for `grain.MapDataset.source`, whose metrics cost as much as reading the record.

    Args:
      records: serialized queries.
      instructions: rows of query's modality, positive's modality, prompts.
      image_parts: names of the parts that hold the images, the task's name first.
    """

    def __init__(self, records: RawRecords, instructions: Iterable[list[str]], image_parts: Iterable[str]):
        super().__init__()
        self._records, self._image_parts = records, tuple(image_parts)
        # Cached, because grain calls `len` several times at every read.
        self._count = len(records)
        self._prompts = {
            (MODALITIES.index(query), MODALITIES.index(candidate)): prompts
            for query, candidate, *prompts in instructions
        }

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> StoredQuery:
        query = parse_query(self._records[index % self._count])
        return StoredQuery(query, self._prompts, self._image_parts)


@dataclass(frozen=True)
class EncodePair(grain.transforms.MapWithIndex):
    """Samples instruction, positive and negatives for the stream's i-th query, and encodes them.

    Attributes:
      seed: the samples are a function of the seed and of the index in the stream.
      instruction_probability: probability that the query gets an instruction.
      negatives: K, the maximum number of negatives; a query with fewer in its list gets all of them.
      wanted_modality: only negatives of the drawn positive's modality.
      image_shift: maximum random shift of each image, in pixels.
    """

    prepared: PreparedDataset
    encoder: ItemEncoder
    caches: Caches
    seed: int
    instruction_probability: float
    negatives: int
    wanted_modality: bool = False
    image_shift: int = 0

    def map_with_index(self, index: int, element: StoredQuery) -> "EncodedPair | BadPair":
        try:
            return self._pair(index, element)
        except UserError as error:
            return BadPair(element.unit, str(error))

    def _pair(self, index: int, element: StoredQuery) -> "EncodedPair":
        query = element.record
        drawn = uniform(self.seed, index, 3 + self.negatives + 2 * (2 + self.negatives))
        with_instruction, prompt, positive, *others = drawn[: 3 + self.negatives]
        chosen = int(positive * len(query.positives))
        prompts = element.prompts.get((query.modality, query.positive_modalities[chosen]), ())
        instruction = None
        if prompts and with_instruction < self.instruction_probability:
            instruction = prompts[int(prompt * len(prompts))]
        wanted = query.positive_modalities[chosen]
        numbers, modalities = [query.positives[chosen]], [wanted]
        if self.negatives:
            left = list(zip(query.negatives, query.negative_modalities, strict=True))
            if self.wanted_modality:
                left = [one for one in left if one[1] == wanted]
            for other in others[: len(left)]:
                number, modality = left.pop(int(other * len(left)))
                numbers.append(number)
                modalities.append(modality)
        items = (self._query(element, instruction), *map(self._candidate, numbers))
        if self.image_shift:
            ways = iter(drawn[3 + self.negatives :])
            items = tuple(self._shifted(item, next(ways), next(ways)) for item in items)
        return EncodedPair(query.qid, items, tuple(numbers), tuple(modalities), query.positives)

    def _query(self, element: StoredQuery, instruction: str | None) -> EncodedItem:
        query = element.record
        tokens = self.encoder.tokens(query.text, instruction, bool(query.image_id))
        if not query.image_id:
            return EncodedItem(tokens, None)
        return EncodedItem(tokens, self._pixels(query.image_id, element.image_parts, f"image of query {query.qid}"))

    def _candidate(self, number: int) -> EncodedItem:
        # The record is read if its tokens or its pixels are not cached, and only once if neither is.
        record = None

        def tokens() -> tuple[np.ndarray, int]:
            nonlocal record
            record = self.prepared.candidate(number)
            return self.encoder.tokens(record.text, None, bool(record.image_id)), record.image_id

        ids, image_id = self.caches.tokens.get(number, tokens, lambda one: one[0].nbytes + _OVERHEAD)
        if not image_id:
            return EncodedItem(ids, None)
        pixels = self.caches.pixels.find(image_id)
        if pixels is None:
            record = record or self.prepared.candidate(number)
            pixels = self._pixels(
                image_id, (f"dataset{number // IDS_PER_DATASET}",), f"image of candidate {record.did}"
            )
        return EncodedItem(ids, pixels)

    def _shifted(self, item: EncodedItem, down: float, right: float) -> EncodedItem:
        """Moves the item's image; `down` and `right` in [0, 1) span the full range of shifts."""
        if item.pixels is None:
            return item
        moves = (int(way * (2 * self.image_shift + 1)) - self.image_shift for way in (down, right))
        return item._replace(pixels=shift(item.pixels, *moves))

    def _pixels(self, image_id: int, parts: tuple[str, ...], name: str) -> np.ndarray:
        def make() -> np.ndarray:
            try:
                content = self.prepared.image(image_id, parts)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            return self.encoder.pixels(content, name)

        return self.caches.pixels.get(image_id, make, lambda pixels: pixels.nbytes + _OVERHEAD)


class BadPair(NamedTuple):
    """A pair that cannot be read: the task of its query, and the reason."""

    unit: str
    problem: str


def uniform(seed: int, index: int, count: int) -> list[float]:
    """Returns `count` numbers in [0, 1): a function of seed and index, cheaper than seeding a generator per index."""
    digest = hashlib.shake_128(b"%d:%d" % (seed, index)).digest(4 * count)
    return [int.from_bytes(digest[at : at + 4], "little") * 2.0**-32 for at in range(0, 4 * count, 4)]
