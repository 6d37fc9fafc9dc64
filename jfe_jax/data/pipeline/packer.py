"""Packs items of different lengths into one batch of fixed shape.

Axes: G groups, R rows, S tokens of a row, M image slots, B items, H W pixels, W bins of L tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jfe_jax.data.batch import AttentionBins, Layout, PackedBatch
from jfe_jax.data.item import EncodedItem
from jfe_jax.errors import UserError

# A group with more items than this is not repacked: repacking would take longer than it saves.
MAX_REPACK_ITEMS = 512


class _Placement(NamedTuple):
    """Position of an item: its index in the group's B, its row (or bin), and its token offset in that row or bin."""

    index: int
    item: EncodedItem
    row: int
    offset: int


class Packer:
    """Assigns items to rows or bins, then builds the arrays.

    Each item goes into the fullest row or bin of its group that has room (best fit), or, in the padded layout, into
    a separate row. The assignment needs lengths only and takes microseconds. Tokens and pixels are copied once, in
    `finish`.

    Args:
      groups, rows, row_tokens, image_slots: G, and R, S and M of each group.
      image_size: H and W of the image slots.
      bins: (length, count) of each group's bins; empty to use rows.

    Attributes:
      free: number of tokens still free in each group.
    """

    def __init__(
        self,
        *,
        groups: int,
        rows: int,
        row_tokens: int,
        image_slots: int,
        image_size: int,
        layout: Layout,
        bins: Sequence[tuple[int, int]] = (),
    ):
        self.bins = sorted(bins)
        self._lengths = [length for length, count in self.bins for _ in range(count)] or [row_tokens] * rows
        self.groups, self.rows, self.row_tokens = groups, rows, row_tokens
        self.image_slots, self.image_size, self.layout = image_slots, image_size, layout
        self.free = [rows * row_tokens] * groups
        # Sorted (free tokens, row or bin) of each group.
        self._free_space = [self._empty() for _ in range(groups)]
        self._images = [0] * groups
        self._placements: list[list[_Placement]] = [[] for _ in range(groups)]

    def add(self, group: int, items: Sequence[tuple[int, EncodedItem]]) -> bool:
        """Adds all of `items` (each with its index in the group's B) to `group`, or none of them if they do not fit.

        If fragmentation alone keeps them from fitting, all items of the group are repacked.

        Returns:
          True if the items were added.
        """
        images = self._images[group] + sum(item.pixels is not None for _, item in items)
        total = sum(len(item.tokens) for _, item in items)
        if images > self.image_slots or total > self.free[group]:
            return False
        left, placed = self._free_space[group].copy(), self._placements[group]
        taken = self._place_items(left, items)
        if taken is None and self.layout == "packed" and len(placed) <= MAX_REPACK_ITEMS:
            left, placed = self._empty(), []
            taken = self._place_items(left, [*(one[:2] for one in self._placements[group]), *items])
        if taken is None:
            return False
        self._free_space[group], self._images[group], self._placements[group] = left, images, placed + taken
        self.free[group] -= total
        return True

    def _empty(self) -> list[tuple[int, int]]:
        return [(length, row) for row, length in enumerate(self._lengths)]

    def _place_items(
        self, left: list[tuple[int, int]], items: Sequence[tuple[int, EncodedItem]]
    ) -> "list[_Placement] | None":
        # Places the items into the free space `left`, which is modified. Returns None if they do not fit.
        taken = []
        # Longest first: this needs the fewest rows.
        for index, item in sorted(items, key=lambda one: -len(one[1].tokens)):
            length = len(item.tokens)
            at = bisect_left(left, (length, -1))
            if at == len(left):
                return None
            room, row = left.pop(at)
            if self.layout == "packed":
                insort(left, (room - length, row))
            taken.append(_Placement(index, item, row, self._lengths[row] - room))
        return taken

    def finish(self, items_per_group: int) -> PackedBatch:
        """Builds one batch of all added items, with B = `items_per_group`."""
        G, R, S, M, B = self.groups, self.rows, self.row_tokens, self.image_slots, items_per_group
        tokens, segments, positions = (np.zeros(G * R * S, np.int32) for _ in range(3))
        pixels = np.zeros((G, M, self.image_size, self.image_size, 3), np.uint8)
        image_start = np.full((G, M), R * S, np.int32)
        pool, pool_span = np.zeros((G, B), np.int32), np.zeros((G, B, 2), np.int32)
        valid = np.zeros((G, B), bool)
        bounds = np.cumsum([0, *self._lengths])
        token_index, inverse_index = np.full((G, bounds[-1]), R * S, np.int32), np.full(G * R * S, bounds[-1], np.int32)
        # In the order of their position in the group.
        placed = [
            (g, *one)
            for g, own in enumerate(self._placements)
            for one in sorted(own, key=lambda one: (one.row, one.offset))
        ]
        starts = ()
        if placed:
            group, item_index, items, row, offset = zip(*placed, strict=True)
            lengths = np.array([len(item.tokens) for item in items])
            ends = np.cumsum(lengths)
            inside = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
            group, item_index, place = np.array(group), np.array(item_index), bounds[list(row)] + np.array(offset)
            # With bins, the tokens of all items are contiguous, without the gaps that rows have.
            unit = group if self.bins else group * R + np.array(row)
            begins = ends - lengths
            starts = begins - begins[np.searchsorted(group, group)] if self.bins else place
            where = np.repeat(group * (R * S) + starts, lengths) + inside
            tokens[where] = np.concatenate([item.tokens for item in items])
            number = np.arange(len(unit)) - np.searchsorted(unit, unit) + 1
            segments[where] = np.repeat(number.astype(np.int32), lengths)
            positions[where] = inside
            inverse_index[where] = np.repeat(place, lengths) + inside
            token_index[np.repeat(group, lengths), inverse_index[where]] = np.repeat(starts, lengths) + inside
            pool[group, item_index] = starts + lengths - 1
            pool_span[group, item_index, 0] = starts
            pool_span[group, item_index, 1] = starts + lengths
            valid[group, item_index] = True
        used = [0] * G
        for (g, _, item, *_), start in zip(placed, starts, strict=True):
            if item.pixels is not None:
                pixels[g, used[g]] = item.pixels
                image_start[g, used[g]] = start
                used[g] += 1
        shape = (G, R, S)
        return PackedBatch(
            tokens.reshape(shape),
            segments.reshape(shape),
            positions.reshape(shape),
            pixels,
            image_start,
            pool,
            pool_span,
            valid,
            AttentionBins(self._split_by_length(token_index), inverse_index.reshape(shape)) if self.bins else None,
        )

    def _split_by_length(self, token_index: np.ndarray) -> tuple[np.ndarray, ...]:
        # [G, positions of all bins] → [G, W, L] for each length.
        ends = np.cumsum([length * count for length, count in self.bins])
        parts = np.split(token_index, ends[:-1], axis=1)
        return tuple(
            part.reshape(len(token_index), -1, length) for part, (length, _) in zip(parts, self.bins, strict=True)
        )


def pack(
    items: Sequence[EncodedItem | None],
    *,
    groups: int,
    rows: int,
    row_tokens: int,
    image_slots: int,
    layout: Layout = "packed",
    image_size: int | None = None,
    bins: Sequence[tuple[int, int]] = (),
) -> PackedBatch:
    """Packs a list: the first len(items) / groups items go into group 0, and so on; None gives a padding item.

    Args:
      rows, row_tokens, image_slots: R, S, M of each group.
      image_size: H and W of the image slots; only needed if no item has an image.
      bins: see `Packer`.

    Raises:
      UserError: the items do not fit.
      ValueError: their number is not divisible by `groups`, or the image size is unknown.
    """
    if len(items) % groups:
        raise ValueError(f"{len(items)} items cannot be split into {groups} equal groups")
    sizes = {item.pixels.shape[0] for item in items if item is not None and item.pixels is not None}
    if image_size is None and not sizes and image_slots:
        raise ValueError("no item has an image: give image_size")
    packer = Packer(
        groups=groups,
        rows=rows,
        row_tokens=row_tokens,
        image_slots=image_slots,
        image_size=image_size or max(sizes, default=0),
        layout=layout,
        bins=bins,
    )
    per_group = len(items) // groups
    for number, item in enumerate(items):
        if item is not None and not packer.add(number // per_group, [(number % per_group, item)]):
            raise UserError(
                f"item {number} ({len(item.tokens)} tokens) fits into no row: {rows} rows of {row_tokens} tokens and "
                f"{image_slots} image slots are too few for the {per_group} items of a group"
            )
    return packer.finish(per_group)
