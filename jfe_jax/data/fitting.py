"""Which items share which rows, decided for many at once where `packing.Packer` takes them as they come.

Only lengths count, so that it can be decided before an image is read.

Axes: R rows, S tokens of a row, M image slots, B items.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """What an item takes: tokens, and an image slot or none."""

    tokens: int
    image: bool


class Room(NamedTuple):
    """What a group has: R, S, M, B."""

    rows: int
    row_tokens: int
    image_slots: int
    items: int


def fill(sizes: Sequence[Size], room: Room) -> Iterator[list[list[int]]]:
    """Fills group after group, each row with the longest item that still fits, again and again.

    Long items with an image come first, and short texts fill the gaps that they leave; what is left are groups of texts
    alone. A `packing.Packer` that is given a group's items in this order puts them into the same rows.

    Args:
      sizes: of the items; none has more tokens than a row.

    Yields:
      The items' indices in each of a group's R rows.
    """
    # Without and with an image: the different lengths, ascending, and the items of each length.
    lengths: tuple[list[int], list[int]] = ([], [])
    items: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    for index in reversed(range(len(sizes))):
        tokens, image = sizes[index]
        if tokens not in items[image]:
            items[image][tokens] = []
            insort(lengths[image], tokens)
        items[image][tokens].append(index)

    def longest(image: bool, free: int) -> int:
        place = bisect_right(lengths[image], free)
        return lengths[image][place - 1] if place else 0

    def take(image: bool, tokens: int) -> int:
        alike = items[image][tokens]
        index = alike.pop()
        if not alike:
            del items[image][tokens]
            lengths[image].remove(tokens)
        return index

    left = len(sizes)
    while left:
        rows: list[list[int]] = []
        slots, places = room.image_slots, room.items
        for _ in range(room.rows):
            row: list[int] = []
            free = room.row_tokens
            while places:
                text, pictured = longest(False, free), longest(True, free) if slots else 0
                tokens, image = max(text, pictured), pictured >= text
                if not tokens:
                    break
                row.append(take(image, tokens))
                free, slots, places = free - tokens, slots - image, places - 1
            rows.append(row)
            left -= len(row)
        yield rows
