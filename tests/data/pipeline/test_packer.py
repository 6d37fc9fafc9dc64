import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.errors import UserError

SIZE, PATCHES, IMAGE = 2, 3, 9


def item(number: int, length: int, image: bool) -> EncodedItem:
    """Builds an item with unique tokens, whose pixels hold its number."""
    tokens = 100 * (number + 1) + np.arange(length, dtype=np.int32)
    if not image:
        return EncodedItem(tokens, None)
    return EncodedItem(
        np.concatenate([np.full(PATCHES, IMAGE, np.int32), tokens]), np.full((SIZE, SIZE, 3), number % 256, np.uint8)
    )


def check_placed(batch, group: int, index: int, one: EncodedItem) -> None:
    """Checks all entries of the batch for one item against that item."""
    start, end = batch.pool_span[group, index]
    row_tokens = batch.tokens.shape[2]
    assert batch.valid[group, index]
    assert start // row_tokens == (end - 1) // row_tokens, "the segment crosses a row"
    np.testing.assert_array_equal(batch.tokens[group].ravel()[start:end], one.tokens)
    np.testing.assert_array_equal(batch.positions[group].ravel()[start:end], np.arange(end - start))
    assert batch.pool[group, index] == end - 1
    segments = batch.segments[group].ravel()
    number = segments[start]
    assert number > 0
    row = segments[start // row_tokens * row_tokens : (start // row_tokens + 1) * row_tokens]
    assert (row == number).sum() == end - start, "another item has the same number"
    slots = np.flatnonzero(batch.image_start[group] == start)
    assert len(slots) == (one.pixels is not None)
    for slot in slots:
        np.testing.assert_array_equal(batch.pixels[group, slot], one.pixels)
        np.testing.assert_array_equal(batch.tokens[group].ravel()[start : start + PATCHES], IMAGE)


ITEMS = st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=0, max_size=24)


@given(ITEMS, st.integers(1, 3), st.sampled_from(["packed", "padded"]))
@settings(deadline=None, max_examples=80)
def test_every_item_is_packed_once_in_one_row_with_its_image(drawn, groups, layout):
    items = [item(number, *one) for number, one in enumerate(drawn)]
    items += [None] * (-len(items) % groups)
    per_group = len(items) // groups
    batch = pack(
        items, groups=groups, rows=per_group, row_tokens=23, image_slots=per_group, layout=layout, image_size=SIZE
    )
    for number, one in enumerate(items):
        group, index = divmod(number, per_group)
        if one is None:
            assert not batch.valid[group, index]
        else:
            check_placed(batch, group, index, one)
    tokens = sum(len(one.tokens) for one in items if one is not None)
    assert (batch.segments > 0).sum() == tokens
    assert (batch.image_start < batch.tokens.shape[1] * batch.tokens.shape[2]).sum() == sum(
        one is not None and one.pixels is not None for one in items
    )
    assert not batch.tokens[batch.segments == 0].any()
    if layout == "padded":
        assert batch.segments.max(initial=0) <= 1


def test_items_share_rows_first_fit():
    batch = pack(
        [item(n, length, False) for n, length in enumerate([6, 5, 4, 3, 2])],
        groups=1,
        rows=2,
        row_tokens=10,
        image_slots=0,
        layout="packed",
    )
    np.testing.assert_array_equal(batch.segments[0], [[1] * 6 + [2] * 4, [1] * 5 + [2] * 3 + [3] * 2])


def test_group_is_repacked_if_another_item_then_fits():
    items = [item(n, length, False) for n, length in enumerate([3, 3, 7, 7])]
    batch = pack(items, groups=1, rows=2, row_tokens=10, image_slots=0)
    for index, one in enumerate(items):
        check_placed(batch, 0, index, one)
    assert (batch.segments > 0).all()


@pytest.mark.parametrize(("lengths", "image"), [([11], False), ([6, 6, 6], False), ([1, 1], True)])
def test_item_that_does_not_fit_raises(lengths, image):
    with pytest.raises(UserError, match="fits into no row"):
        pack(
            [item(n, length, image) for n, length in enumerate(lengths)],
            groups=1,
            rows=2,
            row_tokens=10,
            image_slots=1,
            layout="packed",
            image_size=SIZE,
        )


def test_uneven_split_and_unknown_image_size_raise_value_error():
    with pytest.raises(ValueError, match="equal groups"):
        pack([item(0, 3, False)], groups=2, rows=2, row_tokens=10, image_slots=0)
    with pytest.raises(ValueError, match="image_size"):
        pack([item(0, 3, False)], groups=1, rows=2, row_tokens=10, image_slots=1)


@given(ITEMS.filter(bool), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_bins_leave_no_token_gaps_and_hold_each_item_entirely(drawn, groups):
    items = [item(number, *one) for number, one in enumerate(drawn)]
    items += [None] * (-len(items) % groups)
    per_group = len(items) // groups
    # Rows of 8 tokens, which items cross.
    batch = pack(
        items,
        groups=groups,
        rows=3 * per_group,
        row_tokens=8,
        image_slots=per_group,
        image_size=SIZE,
        bins=((23, per_group), (40, 1)),
    )
    home = batch.bins.inverse_index.reshape(groups, -1)
    sizes = [part.shape[1:] for part in batch.bins.token_index]
    assert sizes == [(per_group, 23), (1, 40)]
    index = np.concatenate([part.reshape(groups, -1) for part in batch.bins.token_index], axis=1)
    ends = np.cumsum([length for count, length in sizes for _ in range(count)])
    for group in range(groups):
        real = np.flatnonzero(batch.segments[group].ravel())
        np.testing.assert_array_equal(real, np.arange(len(real)), "tokens have gaps between them")
        np.testing.assert_array_equal(index[group, home[group, real]], real)
        assert (np.delete(home[group], real) == index.shape[1]).all()
        assert (index[group] == home.shape[1]).sum() == index.shape[1] - len(real)
        own = [number for number in range(group * per_group, (group + 1) * per_group) if items[number] is not None]
        for number in own:
            start, end = batch.pool_span[group, number % per_group]
            places = home[group, start:end]
            np.testing.assert_array_equal(places, places[0] + np.arange(len(items[number].tokens)))
            assert np.searchsorted(ends, places[0], "right") == np.searchsorted(ends, places[-1], "right")
            np.testing.assert_array_equal(batch.tokens[group].ravel()[start:end], items[number].tokens)
            assert len(np.unique(batch.segments[group].ravel()[start:end])) == 1
            assert (batch.image_start[group] == start).any() == (items[number].pixels is not None)
        assert batch.segments[group].max() == len(own)
