"""The first pass in bfloat16: its scores are as near as it says, and it changes no result."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jfe_jax.config import MeshConfig
from jfe_jax.embedding.row_source import ArrayRows, FileRows
from jfe_jax.parallel.sharding import make_mesh
from jfe_jax.search import bf16_prefilter, topk
from jfe_jax.search.exact import Searcher

ONE = make_mesh(MeshConfig(data=1))


def rows_in(tmp_path, kind):
    """Rows that are stored in a way; what they stand for, float64; and queries."""
    random = np.random.default_rng(0)
    pool, queries = (random.normal(size=(n, 24)).astype(np.float32) for n in (900, 9))
    if kind == "worst":
        # Each component half a step from what bfloat16 has, all to one side: errors add up.
        pool, queries = (np.full_like(part, 1 + 2**-8 - 2**-20) for part in (pool, queries))
    if kind == "tiny":
        pool *= 1e-25
    if kind == "close":
        # Nothing that bfloat16 could tell apart.
        pool = 1 + pool * 1e-4
    if kind == "equal":
        pool[450:] = pool[:450]
    if kind == "int8":
        stored, scales = random.integers(-127, 128, pool.shape, np.int8), random.uniform(0.5, 2, 900).astype(np.float32)
        np.save(tmp_path / "pool.npy", stored)
        return FileRows(tmp_path / "pool.npy", scales), (stored * scales[:, None]).astype(np.float64), queries
    pool = pool.astype(np.float16) if kind == "float16" else pool
    return ArrayRows(pool), pool.astype(np.float64), queries


KINDS = ["float32", "float16", "int8", "worst", "tiny", "close", "equal"]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_as_near_as_it_says(tmp_path, kind):
    rows, pool, queries = rows_in(tmp_path, kind)
    norm = np.linalg.norm(pool, axis=1).max()
    asked = bf16_prefilter.Bf16Queries(queries, norm)
    (block,) = topk.blocks(rows, 1024, ONE, 0, 900)
    found = topk.scores_of(jax.device_put(asked.rounded), [block], ONE)
    off = np.abs(np.asarray(found.scores)[:900].T - queries.astype(np.float64) @ pool.T).max(1)
    allowed = asked.tolerance(float(found.rounding))
    assert (off <= allowed).all()
    assert kind == "tiny" or (allowed <= 2**-7 * np.linalg.norm(queries, axis=1) * norm * 1.01).all()
    if kind == "worst":
        assert (off > 0.9 * allowed).all(), "no larger than it must be"
    if kind != "int8":
        changed = np.linalg.norm(pool - pool.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64), axis=1)
        assert found.rounding >= changed.max()


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_the_exact_scores(tmp_path, kind):
    rows, pool, queries = rows_in(tmp_path, kind)
    scores = np.float32([[np.vecdot(row, query) for row in pool] for query in queries.astype(np.float64)])
    order = np.argsort(-scores, axis=1, kind="stable")
    for devices, block, k in ((1, 4096, 10), (1, 64, 10), (8, 16, 10), (1, 64, 899), (1, 64, 1000)):
        searcher = Searcher(rows, mesh=make_mesh(MeshConfig(data=devices)), candidate_block=block, prefilter=True)
        found = searcher.search(queries, k)
        np.testing.assert_array_equal(found.rows, order[:, :k])
        np.testing.assert_array_equal(found.scores, np.take_along_axis(scores, order, 1)[:, :k])
    # Ranks are counted in float32, whatever is asked for besides.
    ranks = searcher.search(queries, 3, order[:, [0, 40, 899]]).ranks
    np.testing.assert_array_equal(ranks, np.tile([1, 41, 900], (len(queries), 1)))


def test_a_pool_that_is_too_dense_is_not_looked_at_roughly_again(tmp_path):
    for kind, stays in (("float32", True), ("close", False)):
        rows, _, queries = rows_in(tmp_path, kind)
        searcher = Searcher(rows, candidate_block=64, prefilter=True)
        searcher.search(queries, 10)
        assert searcher.prefilter is stays


def test_many_queries_are_looked_at_roughly_where_that_is_faster(monkeypatch):
    searcher = Searcher(np.ones((300, 4), np.float32))
    for faster in (True, False):
        monkeypatch.setattr(bf16_prefilter, "is_faster", lambda faster=faster: faster)
        assert [searcher.uses_prefilter(many) for many in (1, 255, 256, 1024)] == [False, False, faster, faster]
    assert not Searcher(np.ones((300, 4), np.float32), select="device", prefilter=True).uses_prefilter(1024)
