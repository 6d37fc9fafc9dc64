"""Query record → drawn pair → encoded pair → packed batch: the steps of the loader's chain.

Axes: G groups, N pairs of a group, K hard negatives of a pair, P positives of a query.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from jfe_jax.data.cache import ByteCache
from jfe_jax.data.images import to_pixels
from jfe_jax.data.items import EncodedItem
from jfe_jax.data.mbeir import MODALITIES
from jfe_jax.data.packing import ContrastiveBatch, Layout, Packer
from jfe_jax.data.prepared import Prepared, QueryRecord, parse_query
from jfe_jax.data.tokens import ItemEncoder
from jfe_jax.errors import UserError

# What an entry of the cache costs besides its arrays.
_OVERHEAD = 300


class DrawnPair(NamedTuple):
    """A query with the instruction and the candidates chosen for it; `negatives` has at most K, `positives` all."""

    query: QueryRecord
    instruction: str | None
    positive: int
    negatives: list[int]


class EncodedPair(NamedTuple):
    """A pair as it enters a batch: `items` are the query, the positive and the negatives, `numbers` the candidates'."""

    qid: str
    items: tuple[EncodedItem, ...]
    numbers: tuple[int, ...]
    positives: list[int]


class DrawPair(grain.transforms.RandomMap):
    """Draws instruction, positive and negatives of a serialized query, with the example's own generator."""

    def __init__(self, instructions: Iterable[list[str]], probability: float, negatives: int):
        # (query's, positive's modality) by index → prompts
        self._prompts = {
            (MODALITIES.index(query), MODALITIES.index(candidate)): prompts
            for query, candidate, *prompts in instructions
        }
        self._probability, self._negatives = probability, negatives

    def random_map(self, element: bytes, rng: np.random.Generator) -> DrawnPair:
        query = parse_query(element)
        # One call for all that is drawn, always as many numbers: a generator's call costs more than the drawing.
        with_instruction, prompt, positive, *others = rng.random(3 + self._negatives).tolist()
        chosen = int(positive * len(query.positives))
        prompts = self._prompts.get((query.modality, query.positive_modalities[chosen]), ())
        instruction = None
        if prompts and with_instruction < self._probability:
            instruction = prompts[int(prompt * len(prompts))]
        left = list(query.negatives)
        negatives = [left.pop(int(other * len(left))) for other in others[: len(left)]]
        return DrawnPair(query, instruction, query.positives[chosen], negatives)


class EncodePair(grain.transforms.Map):
    """Tokens and pixels of a drawn pair; candidates and images that were seen lately come from a cache."""

    def __init__(self, prepared: Prepared, encoder: ItemEncoder, cache_bytes: int):
        self._prepared, self._encoder = prepared, encoder
        self._cache: ByteCache[Any] = ByteCache(cache_bytes)

    def map(self, element: DrawnPair) -> EncodedPair:
        query = element.query
        pixels = self._pixels(query.image_id, query.image, f"image of query {query.qid}") if query.image else None
        tokens = self._encoder.tokens(query.text, element.instruction, pixels is not None)
        numbers = (element.positive, *element.negatives)
        items = (EncodedItem(tokens, pixels), *(self._candidate(number) for number in numbers))
        return EncodedPair(query.qid, items, numbers, query.positives)

    def _candidate(self, number: int) -> EncodedItem:
        # The record is only read when its tokens or its pixels have left the cache.
        record = None

        def tokens() -> tuple[np.ndarray, int, bool]:
            nonlocal record
            record = self._prepared.candidate(number)
            return self._encoder.tokens(record.text, None, bool(record.image)), record.image_id, bool(record.image)

        def pixels() -> np.ndarray:
            there = record or self._prepared.candidate(number)
            return to_pixels(there.image, self._encoder.image_size, f"image of candidate {there.did}")

        ids, image_id, has_image = self._cache.get(("tokens", number), tokens, lambda one: one[0].nbytes + _OVERHEAD)
        if not has_image:
            return EncodedItem(ids, None)
        return EncodedItem(ids, self._cache.get(("pixels", image_id), pixels, lambda one: one.nbytes + _OVERHEAD))

    def _pixels(self, image_id: int, image: bytes, name: str) -> np.ndarray:
        return self._cache.get(
            ("pixels", image_id),
            lambda: to_pixels(image, self._encoder.image_size, name),
            lambda one: one.nbytes + _OVERHEAD,
        )


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Static sizes of a process's batches: G, N, K, P, and R, S, M and H = W of the packed batch."""

    groups: int
    pairs: int
    negatives: int
    positives: int
    rows: int
    row_tokens: int
    image_slots: int
    image_size: int
    layout: Layout


class PackPairs(grain.IterDataset):
    """Pairs from a random-access data set → ContrastiveBatch of one shape.

    Pairs are taken in order and go into the first group that has a place and room for them. A pair that fits nowhere
    waits for the next step, where it comes first. So the state is the next index and the indices that wait.

    Args:
      pairs: EncodedPair by index, endless.
      start, stride: this process reads the pairs start, start + stride, …
    """

    def __init__(self, pairs: grain.MapDataset, shape: BatchShape, start: int, stride: int):
        super().__init__(pairs)
        self.shape, self.start, self.stride = shape, start, stride

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by grain in a worker process, which makes every `sl.step`-th batch from its own share of the pairs."""
        self.start += self.stride * (sl.start or 0)
        self.stride *= sl.step or 1

    def __iter__(self) -> "_PackPairsIterator":
        return _PackPairsIterator(self._parent, self.shape, self.start, self.stride)


class _PackPairsIterator(grain.DatasetIterator):
    def __init__(self, pairs: grain.MapDataset, shape: BatchShape, start: int, stride: int):
        super().__init__()
        self._pairs, self._shape, self._start, self._stride = pairs, shape, start, stride
        self._next = 0
        self._waiting: list[int] = []
        # Encoded pairs of the indices that wait; a restored iterator makes them anew.
        self._held: dict[int, EncodedPair] = {}

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "waiting": list(self._waiting)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._waiting, self._held = state["next"], list(state["waiting"]), {}

    def __next__(self) -> ContrastiveBatch:
        filling = _Filling(self._shape)
        total = self._shape.groups * self._shape.pairs
        # Looking a little further finds small pairs that still fit; the bound keeps what waits, and the state, small.
        most_waiting = max(1, total // 8)
        queue, waiting, held = deque(self._waiting), [], {}
        while filling.count < total and len(waiting) < most_waiting:
            if queue:
                index = queue.popleft()
            else:
                index, self._next = self._next, self._next + 1
            pair = self._held.get(index) or self._pairs[self._start + self._stride * index]
            if not filling.add(pair):
                waiting.append(index)
                held[index] = pair
        self._waiting, self._held = (
            [*waiting, *queue],
            held | {index: self._held[index] for index in queue if index in self._held},
        )
        return filling.finish()


class _Filling:
    """A batch while it fills.

    Attributes:
      count: pairs in it so far.
    """

    def __init__(self, shape: BatchShape):
        self.count = 0
        self._shape = shape
        self._counts = [0] * shape.groups
        self._packer = Packer(
            groups=shape.groups,
            rows=shape.rows,
            row_tokens=shape.row_tokens,
            image_slots=shape.image_slots,
            image_size=shape.image_size,
            layout=shape.layout,
        )
        G, N, K, P = shape.groups, shape.pairs, shape.negatives, shape.positives
        self._candidates = np.full((G, N * (1 + K)), -1, np.int32)
        self._positives = np.full((G, N, P), -1, np.int32)

    def add(self, pair: EncodedPair) -> bool:
        """Takes the pair into the first group that can hold it, or says that none can.

        Raises:
          UserError: not even an empty batch can.
        """
        N, K, P = self._shape.pairs, self._shape.negatives, self._shape.positives
        for g, n in enumerate(self._counts):
            if n == N:
                continue
            # The places of the group's queries, positives and negatives in B (see ContrastiveBatch).
            places = (n, N + n, *range(2 * N + n * K, 2 * N + n * K + len(pair.items) - 2))
            if self._packer.add(g, list(zip(places, pair.items, strict=True))):
                for place, number in zip(places[1:], pair.numbers, strict=True):
                    self._candidates[g, place - N] = number
                # The drawn one first: it is there whatever P is.
                right = pair.positives[:P]
                if pair.numbers[0] not in right:
                    right = [pair.numbers[0], *right[: P - 1]]
                self._positives[g, n, : len(right)] = right
                self._counts[g] = n + 1
                self.count += 1
                return True
        if self.count == 0:
            sizes = ", ".join(str(len(item.tokens)) for item in pair.items)
            images = sum(item.pixels is not None for item in pair.items)
            raise UserError(
                f"query {pair.qid} with its candidates ({sizes} tokens, {images} images) does not fit into a group "
                f"({self._shape.rows} rows of {self._shape.row_tokens} tokens, {self._shape.image_slots} image slots): "
                "raise data.rows or data.image_slots"
            )
        return False

    def finish(self) -> ContrastiveBatch:
        packed = self._packer.finish(self._shape.pairs * (2 + self._shape.negatives))
        return ContrastiveBatch(packed, self._candidates, self._positives)
