"""faiss indices beside an embedded pool: their recall is what it is, and a stale one is never used."""

import builtins
import hashlib

import faiss
import numpy as np
import pytest

from jfe_jax.embedding.index import Index, Manifest
from jfe_jax.embedding.shard_store import ShardStore
from jfe_jax.errors import UserError
from jfe_jax.search.exact import search
from jfe_jax.search.faiss_index import FaissIndex, measure


def make_index(folder, rows):
    store = ShardStore(folder, {"items": len(rows), "width": rows.shape[1], "dtype": "float32", "shard": len(rows)})
    store.begin()
    store.write(0, rows)
    shards = store.finish()
    names = "".join(f"{number}\n" for number in range(len(rows))).encode()
    (folder / "ids.txt").write_bytes(names)
    made = {"checkpoint": "c", "step": 0, "fingerprint": "f", "source": "s", "source_digest": "d"}
    digest = hashlib.sha256(names).hexdigest()
    Manifest(**store.plan, **made, ids_digest=digest, norm=1.01, score_error=0, shards=shards).write(folder)
    return Index.open(folder)


# Threads that wait for each other cost more here than they save.
faiss.omp_set_num_threads(1)


def unit_rows(seed, count):
    rows = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("pool"), unit_rows(0, 2000))


@pytest.mark.parametrize("kind, least", [("HNSW32", 0.95), ("IVF4,PQ4x4", 0.05), ("IVF16,Flat", 0.2)])
def test_the_recall_is_measured_and_kept(pool, kind, least, monkeypatch):
    added = []
    built = FaissIndex(pool, kind, added.append)
    assert sum(added) == 2000
    queries = unit_rows(1, 100)
    exact = search(queries, pool.rows, 10).rows
    own = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(built.search(queries, 10)[1], exact, strict=True)])
    assert least < built.measured <= 1 and abs(own - built.measured) < 0.1
    again = FaissIndex(pool, kind, lambda _: pytest.fail("built again"))
    np.testing.assert_array_equal(again.search(queries, 10)[1], built.search(queries, 10)[1])
    assert again.measured == built.measured


def test_an_index_of_other_rows_is_built_anew(tmp_path):
    FaissIndex(make_index(tmp_path, unit_rows(0, 300)), "HNSW8")
    for file in tmp_path.glob("*.*"):
        file.unlink()
    rows = unit_rows(1, 300)
    found = FaissIndex(make_index(tmp_path, rows), "HNSW8").search(rows[:5], 1)[1]
    np.testing.assert_array_equal(found[:, 0], np.arange(5))


def test_measure_tells_exact_from_wrong(pool):
    assert measure(pool, lambda queries, k: search(queries, pool.rows, k)[:2]) == 1
    assert measure(pool, lambda queries, k: (None, np.full((len(queries), k), -1))) == 0


def test_bad_kinds_and_no_faiss(pool, monkeypatch):
    with pytest.raises(UserError, match="faiss:HNSWX: could not parse"):
        FaissIndex(pool, "HNSWX")
    with pytest.raises(UserError, match=r"faiss:IVF4096,Flat: .*training points"):
        FaissIndex(pool, "IVF4096,Flat")
    real = builtins.__import__

    def without_faiss(name, *others, **more):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        FaissIndex(pool, "HNSW32")
