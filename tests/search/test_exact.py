"""The blocked search against a plain sort of all scores."""

import faiss
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jfe_jax.config import MeshConfig
from jfe_jax.embedding.row_source import FileRows, require_finite
from jfe_jax.errors import UserError
from jfe_jax.parallel.sharding import make_mesh
from jfe_jax.search.exact import Searcher, recall, search


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


@pytest.fixture(scope="module")
def hard_pool():
    """Pool with equal and all but equal rows, queries that like those best, and the order in float64."""
    random = np.random.default_rng(0)
    pool = random.normal(size=(900, 24)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    pool[450:] = pool[:450]
    # Many more than are kept to spare, nearer to each other than float32 sums are exact.
    pool[100:160] = pool[100] + random.normal(size=(60, 24)).astype(np.float32) * 1e-8
    queries = np.concatenate([random.normal(size=(37, 24)), pool[100:103]]).astype(np.float32)
    scores = (queries.astype(np.float64) @ pool.T.astype(np.float64)).astype(np.float32)
    return queries, pool, scores, np.argsort(-scores, axis=1, kind="stable")


@pytest.mark.parametrize("select", ["host", "device"])
@pytest.mark.parametrize("devices, block", [(1, 4096), (1, 64), (8, 64)])
def test_the_answer_depends_neither_on_blocks_nor_on_devices(hard_pool, devices, block, select):
    queries, pool, scores, order = hard_pool
    mesh = make_mesh(MeshConfig(data=devices))
    targets = np.concatenate([order[:, [0, 3, 25]], np.tile([100, 130, 899], (len(queries), 1))], 1)
    found = Searcher(pool, mesh=mesh, candidate_block=block, select=select).search(queries, 20, targets)
    np.testing.assert_array_equal(found.rows, order[:, :20])
    np.testing.assert_array_equal(found.scores, np.take_along_axis(scores, order, 1)[:, :20])
    np.testing.assert_array_equal(found.ranks, np.take_along_axis(np.argsort(order, 1) + 1, targets, 1))


def test_a_query_finds_the_same_alone(hard_pool):
    queries, pool, _, order = hard_pool
    searcher = Searcher(pool)
    for one in (0, 38):
        found = searcher.search(queries[one : one + 1], 30)
        np.testing.assert_array_equal(found.rows[0], order[one, :30])


def test_equal_scores_everywhere():
    found = search(np.ones((2, 4), np.float32), np.ones((500, 4), np.float32), 10, np.array([[499], [0]]))
    np.testing.assert_array_equal(found.rows, np.tile(np.arange(10), (2, 1)))
    np.testing.assert_array_equal(found.ranks, [[500], [1]])


def test_faiss_finds_the_same():
    random = np.random.default_rng(3)
    pool, queries = (random.normal(size=(n, 32)).astype(np.float32) for n in (3000, 50))
    index = faiss.IndexFlatIP(32)
    index.add(pool)
    scores, rows = index.search(queries, 50)
    found = search(queries, pool, 50, candidate_block=256)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    assert (found.rows == rows).mean() > 0.999


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_rows_in_a_file(tmp_path, dtype):
    random = np.random.default_rng(1)
    stored = (
        random.normal(size=(300, 8)).astype(dtype) if dtype != np.int8 else random.integers(-127, 127, (300, 8), dtype)
    )
    scales = random.uniform(0.5, 2, 300).astype(np.float32) if dtype == np.int8 else None
    np.save(tmp_path / "pool.npy", stored)
    rows = FileRows(tmp_path / "pool.npy", scales)
    questions = random.normal(size=(3, 8)).astype(np.float32)
    found = search(questions, rows, 5, candidate_block=16)
    whole = stored.astype(np.float32) * (1 if scales is None else scales[:, None])
    np.testing.assert_array_equal(found.rows, plain(questions, whole)[:, :5])
    (tmp_path / "pool.npy").write_bytes((tmp_path / "pool.npy").read_bytes()[:-3])
    with pytest.raises(UserError, match=r"pool\.npy: no embeddings, or cut short"):
        FileRows(tmp_path / "pool.npy")


def test_rows_beyond_two_gigabytes(tmp_path):
    shape = (70_000, 16384)
    with open(tmp_path / "pool.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
        # A hole, which takes no place on the disk.
        stream.seek(shape[0] * shape[1] * 2 - shape[1] * 2, 1)
        stream.write(np.arange(shape[1], dtype=np.float16) % 7)
    rows = FileRows(tmp_path / "pool.npy")
    taken = rows.take(np.array([0, 69_999], np.int32))
    assert not taken[0].any() and taken[1].max() == 6
    np.testing.assert_array_equal(rows.read(np.int32(69_999), np.int32(70_000))[0][0], taken[1])


def test_approximate_selection_says_what_it_found(hard_pool):
    queries, pool, _, order = hard_pool
    # On the CPU approx_max_k is exact; what is tested is that its way through leads to the exact scores.
    found = Searcher(pool, recall=0.9, candidate_block=64).search(queries, 10)
    assert recall(found.rows, order[:, :10]) > 0.9
    assert recall(np.array([[1, 2], [5, 6]]), np.array([[2, 3], [6, 5]])) == 0.75


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
    pool = np.ones((300, 4), np.float32)
    pool[200, 1] = np.nan
    for select in ("host", "device"):
        with pytest.raises(UserError, match="row 200 is not finite"):
            Searcher(pool, select=select, candidate_block=16).search(np.ones((1, 4), np.float32), 3)
    with pytest.raises(UserError, match="query 1 is not finite"):
        search(np.array([[0.0], [np.inf]], np.float32), np.ones((2, 1), np.float32), 3)
    with pytest.raises(UserError, match="local pool: the embedding of d:1 is not finite"):
        require_finite(np.array([[1.0], [np.nan]]), ["d:0", "d:1"], "local pool")
