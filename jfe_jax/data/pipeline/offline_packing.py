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


def fill(sizes: Sequence[Size], rooms: Sequence[Room], together: int = 1) -> Iterator[tuple[Room, list[list[int]]]]:
    """Fills group after group, each row with the longest item that still fits, again and again.

    Long items with an image come first, and short texts fill the gaps that they leave; what is left are groups of texts
    alone. A `packing.Packer` that is given a group's items in this order puts them into the same rows.

    Args:
      sizes: of the items; one of the rooms has rows for the longest.
      rooms: what a group may be: the one with the shortest rows that the longest item left fits into. So items of about
        a length come together, and the last group of long rows is filled up with what is shorter.
      together: so many groups, one after the other, are of one room.

    Yields:
      A group's room, and the items' indices in each of its R rows.
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

    rooms = sorted(rooms, key=lambda room: room.row_tokens)
    left, made = len(sizes), 0
    while left:
        if made % together == 0:
            longest_left = max(own[-1] for own in lengths if own)
            room = next(room for room in rooms if room.row_tokens >= longest_left)
        made += 1
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
        yield room, rows
