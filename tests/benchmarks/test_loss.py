"""The sides of `jfe bench loss` compute the same, which a formula in float64 confirms."""

import contextlib

import numpy as np
import pytest

from benchmarks.common import tables
from benchmarks.loss import gpu, loss
from jfe_jax.errors import UserError

PAIRS, WIDTH = 12, 8


@pytest.fixture(scope="module")
def embeddings():
    return loss.embeddings(PAIRS, WIDTH)


@pytest.mark.parametrize("side", loss.SIDES)
def test_every_side_computes_both_directions(side, embeddings):
    queries, candidates = (x.astype(np.float64) for x in embeddings)
    logits = queries @ candidates.T / loss.TEMPERATURE
    rows, columns = (np.exp(logits) / np.exp(logits).sum(axis=axis, keepdims=True) for axis in (1, 0))
    expected = -(np.log(np.diag(rows)) + np.log(np.diag(columns))).mean() / 2
    to_logits = ((rows + columns) / 2 - np.eye(PAIRS)) / PAIRS / loss.TEMPERATURE
    config = loss.third(PAIRS, WIDTH, 4000)
    value, to_queries, to_candidates = loss.make(side, *embeddings, config=config)()
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(to_queries), to_logits @ candidates, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.asarray(to_candidates), to_logits.T @ queries, rtol=1e-4, atol=1e-6)


def test_sides_are_timed_by_turns(embeddings):
    seconds, apart = loss._interleaved(
        {side: loss.make(side, *embeddings) for side in ("jfe", "torch")}, rounds=2, progress=lambda _: None
    )
    assert 0 < apart < 1e-5
    assert {side: len(own) for side, own in seconds.items()} == {"jfe": 2, "torch": 2}


def test_a_third_of_the_memory_is_kept_within():
    # 847 MiB is what `jit` of 8,192 pairs took; gradients 64 MiB, seven tiles of 2 MiB, 28 MiB of the process.
    config = loss.third(8192, 1024, 847 << 20)
    assert (config.tile_mib, config.keep_mib) == (2, 282 - 64 - 14 - 28)
    assert loss.words(config) == "--loss.keep_mib=176 --loss.tile_mib=2"
    assert loss.third(8192, 1024, 100 << 20).keep_mib == 0


def test_what_differs_is_not_compared():
    with pytest.raises(UserError, match="gradients of torch are not ours"):
        loss.check("torch", [1.0, np.ones(3)], [1.0, np.array([1.0, 1.0, 1.01])])


@contextlib.contextmanager
def silent(name, count):
    yield lambda done: None


def test_a_gpus_sides_are_processes_whose_answers_are_compared():
    # The same on the CPU, whose memory PyTorch does not count.
    result = gpu.run([16, 32], 8, 2, silent, device="cpu")
    (found,) = result.tables
    assert [row[1] for row in found.rows] == 2 * list(loss.LABELS.values())
    assert all(len(row[2]) == len(row[3]) == 2 for row in found.rows)
    memory = {(row[0], row[1]): row[4] for row in found.rows}
    assert memory["32", loss.LABELS["jit"]] > memory["16", loss.LABELS["jit"]] > 0
    assert memory["16", loss.LABELS["torch"]] is None
    assert result.device and "at B = 32" in tables.as_text(result)
    with pytest.raises(UserError, match="JAX sees no GPU"):
        gpu.run([16], 8, 2, silent)
