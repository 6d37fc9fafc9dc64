"""Offline packing: no item is lost, no group is over capacity, and the packer gives the same rows."""

import numpy as np
import pytest

from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.offline_packing import GroupShape, Size, pack_offline
from jfe_jax.data.pipeline.packer import Packer


@pytest.fixture(scope="module")
def sizes():
    rng = np.random.default_rng(0)
    images = rng.random(500) < 0.5
    lengths = rng.integers(3, 90, 500) + np.where(images, 64, 0)
    return [Size(int(length), bool(image)) for length, image in zip(lengths, images, strict=True)]


@pytest.mark.parametrize(
    "room", [GroupShape(4, 160, 8, 80), GroupShape(3, 200, 2, 9)], ids=["roomy", "few slots and items"]
)
def test_every_item_is_packed_once_within_group_capacity(sizes, room):
    groups = [rows for _, rows in pack_offline(sizes, [room])]
    assert sorted(index for rows in groups for row in rows for index in row) == list(range(500))
    for rows in groups:
        assert len(rows) <= room.rows
        assert max(sum(sizes[index].tokens for index in row) for row in rows) <= room.row_tokens
        assert sum(sizes[index].image for row in rows for index in row) <= room.image_slots
        assert sum(map(len, rows)) <= room.items


def test_rows_are_filled_better_than_in_the_order_that_items_come(sizes):
    room = GroupShape(4, 160, 8, 80)
    least = sum(size.tokens for size in sizes) / (room.rows * room.row_tokens)
    assert len(list(pack_offline(sizes, [room]))) <= 1.06 * least + 1


@pytest.mark.parametrize(
    "room", [GroupShape(4, 160, 8, 80), GroupShape(3, 200, 2, 9)], ids=["roomy", "few slots and items"]
)
def test_packer_assigns_items_to_the_same_rows(sizes, room):
    for _, rows in pack_offline(sizes, [room]):
        packer = Packer(
            groups=1,
            rows=room.rows,
            row_tokens=room.row_tokens,
            image_slots=room.image_slots,
            image_size=1,
            layout="packed",
        )
        order = [index for row in rows for index in row]
        for place, index in enumerate(order):
            pixels = np.zeros((1, 1, 3), np.uint8) if sizes[index].image else None
            assert packer.add(0, [(place, EncodedItem(np.ones(sizes[index].tokens, np.int32), pixels))])
        pool = packer.finish(room.items).pool[0, : len(order)]
        expected = [number for number, row in enumerate(rows) for _ in row]
        assert (pool // room.row_tokens).tolist() == expected


@pytest.mark.parametrize("together", [1, 3])
def test_groups_have_the_shortest_rows_that_hold_the_remaining_items(sizes, together):
    rooms = [GroupShape(3, 160, 6, 60), GroupShape(8, 70, 8, 70), GroupShape(5, 100, 5, 62)]
    found = list(pack_offline(sizes, rooms, together))
    assert sorted(index for _, rows in found for row in rows for index in row) == list(range(500))
    left = {index: size.tokens for index, size in enumerate(sizes)}
    for number, (room, rows) in enumerate(found):
        assert max(sum(sizes[index].tokens for index in row) for row in rows) <= room.row_tokens
        if number % together:
            assert room == found[number - 1][0]
        else:
            longest = max(left.values())
            assert room.row_tokens == min(one.row_tokens for one in rooms if one.row_tokens >= longest)
        for row in rows:
            for index in row:
                del left[index]
    assert len({room for room, _ in found}) == 3
