"""Items → packed batches: rows well filled, few shapes, images decoded by all cores while the devices compute.

Axes: B items; G groups, R rows, S tokens of a row, M image slots.
"""

import collections
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jfe_jax.config import Config
from jfe_jax.data.batch import PackedBatch
from jfe_jax.data.item import EncodedItem, Item
from jfe_jax.data.pipeline.offline_packing import GroupShape, Size, pack_offline
from jfe_jax.data.pipeline.packer import Packer
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.embedding.batch_shapes import ACCELERATOR, BatchShapePlanner, ShapePolicy
from jfe_jax.errors import UserError
from jfe_jax.models.registry import get_backbone

# Items that are laid out at once, for each group; those that do not fill a batch wait for the next ones.
WINDOW = 1024
PIXEL_CACHE_MIB = 256
# A batch computes a quarter, a half, three quarters or all of its image slots, whichever is enough, and pools a
# sixteenth, a quarter or all of its items: few shapes in all, so few compilations.
_SLOT_STEPS, _ITEM_PARTS = 4, (16, 4, 1)
# Batches whose images are being decoded.
_DECODED_AHEAD = 2


class _Plan(NamedTuple):
    """A batch of items: their numbers, group by group in the order that the packer needs; and each one's tokens."""

    room: GroupShape
    groups: list[list[int]]
    tokens: dict[int, np.ndarray]


class BatchMaker:
    """Makes batches for one model.

    Attributes:
      encoder: of the items.
    """

    def __init__(self, config: Config, groups: int, scale: ShapePolicy = ACCELERATOR):
        self.encoder = ItemEncoder(config.tokens, config.model.vision, config.model.image_token)
        self._model, self._groups = config.model, groups
        self._shape_planner = BatchShapePlanner(config.model, scale)
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
            sizes = {number: Size(len(own), items[number].image is not None) for number, own in tokens.items()}
            for batch in self._batched(sizes):
                room, groups = batch
                # What is left over waits for more, but for the last.
                if not last and sum(map(len, groups)) == len(tokens):
                    break
                yield _Plan(room, groups, {number: tokens.pop(number) for group in groups for number in group})

    def _batched(self, sizes: dict[int, Size]) -> Iterator[tuple[GroupShape, list[list[int]]]]:
        """The items' numbers, group by group of a batch; those that are left for the last fit into a row, perhaps."""
        numbers, left = list(sizes), dict(sizes)
        filled: Iterator[tuple[GroupShape, list[list[int]]]] = iter(())
        while left:
            if room := self._shape_planner.single(left.values()):
                yield room, [list(left)]
                return
            if len(left) == len(numbers):
                filled = pack_offline(
                    list(sizes.values()), self._shape_planner.several(list(sizes.values())), self._groups
                )
            made = list(itertools.islice(filled, self._groups))
            groups = [[numbers[index] for row in rows for index in row] for _, rows in made]
            for number in itertools.chain.from_iterable(groups):
                del left[number]
            yield made[0][0], groups

    def _packed(self, plan: _Plan, images: dict[int, Future[np.ndarray]]) -> tuple[PackedBatch, np.ndarray]:
        room = plan.room
        most_images = max(sum(number in images for number in group) for group in plan.groups)
        most_items = max(map(len, plan.groups))
        least = get_backbone(self._model).min_image_slots
        slots = max(least, _stepped(most_images, room.image_slots, _SLOT_STEPS if room.rows > 1 else 1))
        parts = (-(-room.items // part) for part in (_ITEM_PARTS if room.rows > 1 else (1,)))
        places = next(part for part in parts if part >= most_items)
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


def _name(number: int, names: Sequence[str] | None) -> str:
    return f"item {number}" if names is None else names[number]


def _stepped(used: int, most: int, steps: int) -> int:
    """`used`, rounded up to a multiple of a step, of which `most` has so many."""
    step = -(-most // steps)
    return min(most, -(-used // step) * step)
