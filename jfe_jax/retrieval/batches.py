"""Items → packed batches: rows well filled, few shapes, images decoded by all cores while the devices compute.

Axes: B items; G groups, R rows, S tokens of a row, M image slots.
"""

import collections
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jfe_jax.config import Config, ModelConfig
from jfe_jax.data.fitting import Room, Size, fill
from jfe_jax.data.items import EncodedItem, Item
from jfe_jax.data.packing import PackedBatch, Packer
from jfe_jax.data.tokens import ItemEncoder
from jfe_jax.errors import UserError

# Tokens of a group, about.
BATCH_TOKENS = 4096
# Items that are laid out at once, for each group; those that do not fill a batch wait for the next ones.
WINDOW = 1024
PIXEL_CACHE_MIB = 256
# Rows are a multiple of so many tokens, and longer than this only if an item is.
ROW_STEP, LONGEST_ROW = 128, 2048
# Rows of another length than those compiled for have to save so much, and on more than a few items.
WORTH, FEW = 0.1, 256
# A batch computes a quarter, a half, three quarters or all of its image slots, whichever is enough, and pools a quarter
# or all of its items: few shapes in all, so few compilations.
_SLOT_STEPS, _ITEM_STEPS = 4, 4
# Time of a FLOP in attention beside that of one in a matrix: measured on a CPU, with rows of 640 and 1,280 tokens.
_ATTENTION = 3.0
# Batches whose images are being decoded.
_DECODED_AHEAD = 2


class _Plan(NamedTuple):
    """A batch of items: their numbers, group by group in the order that the packer needs; and each one's tokens."""

    room: Room
    groups: list[list[int]]
    tokens: dict[int, np.ndarray]


class BatchMaker:
    """Makes batches for one model.

    Attributes:
      encoder: of the items.
    """

    def __init__(self, config: Config, groups: int):
        self.encoder = ItemEncoder(config.tokens, config.model.vision, config.model.image_token)
        self._model, self._groups = config.model, groups
        self._shortest_with_image = config.model.vision.patches + 2
        self._row_lengths: list[int] = []
        self._pixels: collections.OrderedDict[Path, Future[np.ndarray]] = collections.OrderedDict()

    def batches(self, items: Sequence[Item], names: Sequence[str] | None) -> Iterator[tuple[PackedBatch, np.ndarray]]:
        """All items, with int64 [G, B]: the number of the item that each place holds, -1 for fillers.

        Args:
          items: at most a few thousand of them are looked at ahead.
          names: what errors call each item; its number if not given.

        Raises:
          UserError: an item is empty or its image cannot be read.
        """
        waiting: collections.deque[tuple[_Plan, dict[int, Future[np.ndarray]]]] = collections.deque()
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")
        try:
            for plan in self._plans(items, names):
                pictures = ((number, items[number].image) for number in plan.tokens)
                images = {n: self._decoded(pool, image, _name(n, names)) for n, image in pictures if image is not None}
                waiting.append((plan, images))
                if len(waiting) > _DECODED_AHEAD:
                    yield self._packed(*waiting.popleft())
            while waiting:
                yield self._packed(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _plans(self, items: Sequence[Item], names: Sequence[str] | None) -> Iterator[_Plan]:
        tokens: dict[int, np.ndarray] = {}
        window = WINDOW * self._groups
        for start in range(0, len(items), window):
            for number in range(start, min(start + window, len(items))):
                item = items[number]
                if item.image is None and not item.text and not item.instruction:
                    raise UserError(f"{_name(number, names)}: neither text nor image; give it one of them")
                tokens[number] = self.encoder.tokens(item.text, item.instruction, item.image is not None)
            last = start + window >= len(items)
            numbers = list(tokens)
            sizes = [Size(len(tokens[number]), items[number].image is not None) for number in numbers]
            room = self._room(sizes, everything=last and not start)
            groups = [[numbers[index] for row in rows for index in row] for rows in fill(sizes, room)]
            for first in range(0, len(groups), self._groups):
                if not last and first + self._groups >= len(groups):
                    break
                batch = groups[first : first + self._groups]
                yield _Plan(room, batch, {number: tokens.pop(number) for group in batch for number in group})

    def _room(self, sizes: Sequence[Size], everything: bool) -> Room:
        """For items of these sizes; a single row if they are `everything` and fit into one."""
        length = self._row_length(sizes)
        one = self._room_of(1, length)
        tokens, images = (sum(column) for column in zip(*sizes, strict=True))
        if everything and tokens <= length and images <= one.image_slots and len(sizes) <= one.items:
            return one
        return self._room_of(max(1, BATCH_TOKENS // length), length)

    def _room_of(self, rows: int, length: int) -> Room:
        slots = rows * (length // self._shortest_with_image)
        if self._model.kind == "dual":
            # An image takes no tokens there: as many as would fit if it did.
            slots = rows * length // self._shortest_with_image
        return Room(rows, length, max(1, slots), rows * length // 8)

    def _row_length(self, sizes: Sequence[Size]) -> int:
        """S: the one that costs least, unless one that was used before is nearly as good."""

        def cost(length: int) -> float:
            room = self._room_of(max(1, BATCH_TOKENS // length), length)
            groups = list(fill(sizes, room))
            rows = (len(groups) - 1) * room.rows + sum(map(bool, groups[-1]))
            return rows * length * _token_cost(self._model, length)

        longest = max(size.tokens for size in sizes)
        shortest = -(-longest // ROW_STEP) * ROW_STEP
        longest_row = max(shortest, min(LONGEST_ROW, BATCH_TOKENS))
        costs = {length: cost(length) for length in range(shortest, longest_row + 1, ROW_STEP)}
        best = min(costs, key=costs.__getitem__)
        known = [length for length in self._row_lengths if length in costs]
        kept = min(known, key=costs.__getitem__, default=best)
        if len(sizes) <= FEW or costs[kept] * (1 - WORTH) <= costs[best]:
            best = kept
        if best not in self._row_lengths:
            self._row_lengths.append(best)
        return best

    def _packed(self, plan: _Plan, images: dict[int, Future[np.ndarray]]) -> tuple[PackedBatch, np.ndarray]:
        room = plan.room
        most_images = max(sum(number in images for number in group) for group in plan.groups)
        most_items = max(map(len, plan.groups))
        # The dual encoders and the late-fusion baseline need at least one slot.
        least = 0 if self._model.kind == "fusion" else 1
        slots = max(least, _stepped(most_images, room.image_slots, _SLOT_STEPS if room.rows > 1 else 1))
        quarter = -(-room.items // (_ITEM_STEPS if room.rows > 1 else 1))
        places = room.items if most_items > quarter else quarter
        packer = Packer(
            groups=self._groups,
            rows=room.rows,
            row_tokens=room.row_tokens,
            image_slots=slots,
            image_size=self._model.vision.image_size,
            layout="packed",
        )
        numbers = np.full((self._groups, places), -1, np.int64)
        for g, group in enumerate(plan.groups):
            for place, number in enumerate(group):
                pixels = images[number].result() if number in images else None
                if not packer.add(g, [(place, EncodedItem(plan.tokens[number], pixels))]):
                    raise AssertionError(f"item {number} was to fit into group {g}")
                numbers[g, place] = number
        return packer.finish(places), numbers

    def _decoded(self, pool: ThreadPoolExecutor, image: bytes | Path | np.ndarray, name: str) -> Future[np.ndarray]:
        if isinstance(image, bytes | np.ndarray):
            return pool.submit(self.encoder.pixels, image, name)
        future = self._pixels.get(image)
        if future is None or future.cancelled() or (future.done() and future.exception()):
            future = self._pixels[image] = pool.submit(self.encoder.pixels, image, name)
            if len(self._pixels) * 3 * self.encoder.image_size**2 > PIXEL_CACHE_MIB * 2**20:
                self._pixels.popitem(last=False)
        self._pixels.move_to_end(image)
        return future


def _token_cost(model: ModelConfig, length: int) -> float:
    """Of a token in a layer of the text tower, in rows of this length: FLOPs, those of attention weighed."""
    text, dual = model.text, model.kind == "dual"
    heads = text.width if dual else text.num_heads * text.head_dim
    keys = text.width if dual else text.num_kv_heads * text.head_dim
    weights = text.width * (2 * heads + 2 * keys + (2 if dual else 3) * text.mlp_dim)
    return 2.0 * weights + _ATTENTION * 4.0 * length * heads


def _name(number: int, names: Sequence[str] | None) -> str:
    return f"item {number}" if names is None else names[number]


def _stepped(used: int, most: int, steps: int) -> int:
    """`used`, rounded up to a multiple of a step, of which `most` has so many."""
    step = -(-most // steps)
    return min(most, -(-used // step) * step)
