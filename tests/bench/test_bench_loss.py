"""The sides of `jfe bench loss` compute the same, which a formula in float64 confirms."""

import numpy as np
import pytest

from jfe_jax.bench import loss

PAIRS, WIDTH = 12, 8


@pytest.fixture(scope="module")
def embeddings():
    return loss._embeddings(PAIRS, WIDTH)


@pytest.mark.parametrize("side", loss.SIDES)
def test_every_side_computes_both_directions(side, embeddings):
    queries, candidates = (x.astype(np.float64) for x in embeddings)
    logits = queries @ candidates.T / loss.TEMPERATURE
    rows, columns = (np.exp(logits) / np.exp(logits).sum(axis=axis, keepdims=True) for axis in (1, 0))
    expected = -(np.log(np.diag(rows)) + np.log(np.diag(columns))).mean() / 2
    to_logits = ((rows + columns) / 2 - np.eye(PAIRS)) / PAIRS / loss.TEMPERATURE
    value, to_queries, to_candidates = loss.make(side, *embeddings)()
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(to_queries), to_logits @ candidates, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.asarray(to_candidates), to_logits.T @ queries, rtol=1e-4, atol=1e-6)


def test_sides_are_timed_by_turns(embeddings):
    seconds = loss._interleaved(
        {side: loss.make(side, *embeddings) for side in ("jfe", "torch")}, rounds=2, progress=lambda _: None
    )
    assert {side: len(own) for side, own in seconds.items()} == {"jfe": 2, "torch": 2}
