"""Messages of a worker's pipe, with a thread instead of a process at the other end."""

import os
import threading

import numpy as np
import pytest

from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline import worker_pool
from jfe_jax.data.pipeline.batch_builder import EncodedPair
from jfe_jax.data.pipeline.pair_dataset import BadPair
from jfe_jax.errors import UserError


class Pairs:
    """Of every kind: the items of a pair with and without images, pairs that cannot be read, at last an error."""

    def __init__(self, last=1 << 62):
        self.last = last

    def __getitem__(self, index):
        if index == self.last:
            raise UserError(f"nothing at {index}")
        if index % 5 == 3 or index // 8 == 2:
            return BadPair("a_task0", f"problem {index}")
        rng = np.random.default_rng(index)
        items = tuple(
            EncodedItem(
                rng.integers(0, 99, rng.integers(1, 9)).astype(np.int32),
                rng.integers(0, 256, (200, 200, 3), np.uint8)[::-1] if (index + place) % 3 else None,
            )
            for place in range(2 + index % 3)
        )
        return EncodedPair(f"0:{index}", items, (index,), (0,), (index, 7))


@pytest.fixture
def serve():
    opened = []

    def start(pairs, turn, count):
        theirs, ours = os.pipe()
        thread = threading.Thread(target=worker_pool._serve, args=(ours, pairs, turn, count))
        thread.start()
        opened.append((theirs, ours, thread))
        return theirs

    yield start
    for theirs, ours, thread in opened:
        # It stops because nobody reads any more.
        os.close(theirs)
        thread.join(30)
        assert not thread.is_alive()
        os.close(ours)


def same(one, other):
    if isinstance(one, BadPair):
        return one == other
    for left, right in zip(one.items, other.items, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens, strict=True)
        assert (left.pixels is None) == (right.pixels is None)
        if left.pixels is not None:
            np.testing.assert_array_equal(left.pixels, right.pixels, strict=True)
    return one._replace(items=()) == other._replace(items=())


def test_sent_chunks_arrive_unchanged(serve):
    pipe = serve(Pairs(), 1, 2)
    for chunk in (1, 3, 5):
        got = worker_pool._next_chunk(pipe)
        assert len(got) == 8
        assert all(same(Pairs()[8 * chunk + i], pair) for i, pair in enumerate(got))


def test_a_chunk_of_bad_pairs_alone_arrives(serve):
    assert worker_pool._next_chunk(serve(Pairs(), 2, 1)) == [Pairs()[i] for i in range(16, 24)]


def test_worker_error_arrives_in_order_and_ends_the_stream(serve):
    pipe = serve(Pairs(last=11), 0, 1)
    assert len(worker_pool._next_chunk(pipe)) == 8
    with pytest.raises(UserError, match="nothing at 11"):
        worker_pool._next_chunk(pipe)
