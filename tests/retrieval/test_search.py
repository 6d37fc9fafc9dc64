"""The blocked search against a plain sort of all scores."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jfe_jax.errors import UserError
from jfe_jax.retrieval.search import require_finite, search


def plain(queries, candidates):
    # Stable: equals keep their position.
    return np.argsort(-(queries @ candidates.T), axis=1, kind="stable")


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_equals_a_stable_sort_with_ties(queries, candidates, k, seed):
    random = np.random.default_rng(seed)
    # Small whole numbers: scores are exact and most of them tie.
    questions, pool = (random.integers(-1, 2, (n, 4)).astype(np.float32) for n in (queries, candidates))
    targets = random.integers(-1, candidates, (queries, 3))
    found = search(questions, pool, k, targets, query_block=4, candidate_block=8)
    order = plain(questions, pool)
    np.testing.assert_array_equal(found.rows, order[:, :k])
    np.testing.assert_array_equal(found.scores, np.take_along_axis(questions @ pool.T, order, 1)[:, :k])
    rank = np.argsort(order, axis=1) + 1
    wanted = np.where(targets < 0, 0, np.take_along_axis(rank, np.maximum(targets, 0), 1))
    np.testing.assert_array_equal(found.ranks, wanted)


def test_the_answer_does_not_depend_on_the_blocks():
    random = np.random.default_rng(0)
    questions, pool = (random.normal(size=(n, 16)).astype(np.float32) for n in (70, 700))
    pool[350:] = pool[:350]
    targets = random.integers(0, 700, (70, 2))
    whole = search(questions, pool, 20, targets)
    parts = search(questions, pool, 20, targets, query_block=32, candidate_block=128)
    np.testing.assert_array_equal(whole.rows, parts.rows)
    np.testing.assert_array_equal(whole.ranks, parts.ranks)


def test_reads_half_precision_memory_maps(tmp_path):
    random = np.random.default_rng(1)
    pool = random.normal(size=(300, 8)).astype(np.float16)
    np.save(tmp_path / "pool.npy", pool)
    questions = random.normal(size=(3, 8)).astype(np.float32)
    found = search(questions, np.load(tmp_path / "pool.npy", mmap_mode="r"), 5, candidate_block=128)
    np.testing.assert_array_equal(found.rows, plain(questions, pool.astype(np.float32))[:, :5])


def test_bad_input():
    with pytest.raises(UserError, match="empty"):
        search(np.zeros((1, 4), np.float32), np.zeros((0, 4), np.float32), 3)
    with pytest.raises(UserError, match="width 4, candidates 5"):
        search(np.zeros((1, 4), np.float32), np.zeros((2, 5), np.float32), 3)
    with pytest.raises(UserError, match="local pool: the embedding of d:1 is not finite"):
        require_finite(np.array([[1.0], [np.nan]]), ["d:0", "d:1"], "local pool")
