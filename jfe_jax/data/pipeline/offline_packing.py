"""Assigns many items to rows at once, while `packer.Packer` takes them one pair at a time.

Only lengths matter, so the assignment can be computed before any image is read.

Axes: R rows, S tokens of a row, M image slots, B items.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """Space that an item takes: its tokens, and an image slot if it has an image."""

    tokens: int
    image: bool


class GroupShape(NamedTuple):
    """Capacity of a group: R, S, M, B."""

    rows: int
    row_tokens: int
    image_slots: int
    items: int


def pack_offline(
    sizes: Sequence[Size], shapes: Sequence[GroupShape], together: int = 1
) -> Iterator[tuple[GroupShape, list[list[int]]]]:
    """Fills one group after another; each row repeatedly takes the longest item that still fits.

    Long items with an image come first, and short texts fill the gaps that they leave. The last groups hold only texts.
    A `packer.Packer` that gets a group's items in this order puts them into the same rows.

    Args:
      sizes: Sizes of the items. At least one shape must have rows long enough for the longest item.
      shapes: Allowed group shapes. Each group takes the one with the shortest rows that the longest remaining item fits
        into. So items of similar length share a group, and the last group of long rows is filled up with shorter items.
      together: Number of consecutive groups that must have the same shape.

    Yields:
      The group's shape, and the indices of the items in each of its R rows.
    """
    # For items without and with an image: the distinct lengths in ascending order, and the items of each length.
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

    shapes = sorted(shapes, key=lambda shape: shape.row_tokens)
    left, made = len(sizes), 0
    while left:
        if made % together == 0:
            longest_left = max(own[-1] for own in lengths if own)
            shape = next(shape for shape in shapes if shape.row_tokens >= longest_left)
        made += 1
        rows: list[list[int]] = []
        slots, places = shape.image_slots, shape.items
        for _ in range(shape.rows):
            row: list[int] = []
            free = shape.row_tokens
            while places:
                text, pictured = longest(False, free), longest(True, free) if slots else 0
                tokens, image = max(text, pictured), pictured >= text
                if not tokens:
                    break
                row.append(take(image, tokens))
                free, slots, places = free - tokens, slots - image, places - 1
            rows.append(row)
            left -= len(row)
        yield shape, rows
