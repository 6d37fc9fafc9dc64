"""Axes as in train/losses.py: G groups, N pairs of a group, K hard negatives, P right answers, E embedding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax import sharding
from jfe_jax.config import LossConfig, MeshConfig
from jfe_jax.train import losses
from jfe_jax.train.losses import Pairs, contrastive_loss

G, N, E, P = 8, 4, 16, 3
TEMPERATURE = 0.1
LOG_INVERSE = np.float32(-np.log(TEMPERATURE))
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def pairs(seed: int = 0, k: int = 1, groups: int = G) -> Pairs:
    """Random pairs with equal candidates on different devices, several right answers, and fillers."""
    random = np.random.default_rng(seed)
    total = G * N
    ids = random.integers(0, 40, (total, 1 + k)).astype(np.int32)
    positives = np.full((total, P), -1, np.int32)
    positives[:, 0] = ids[:, 0]
    positives[::2, 1] = random.integers(0, 40, total // 2)
    valid = np.ones(total, bool)
    valid[[5, 17, 31]] = False
    ids[~valid], positives[~valid] = -1, -1
    return _grouped(_unit(random, total), _unit(random, total, 1 + k), ids, positives, valid, groups)


def _grouped(queries, candidates, ids, positives, valid, groups) -> Pairs:
    def candidates_first(x):
        # [G·N, 1 + K, …] → [G, N positives and then N·K negatives, …]
        x = x.reshape(groups, -1, *x.shape[1:])
        tail = x.shape[3:]
        return np.concatenate([x[:, :, 0], x[:, :, 1:].reshape(groups, -1, *tail)], axis=1)

    k = ids.shape[1]
    return Pairs(
        queries.reshape(groups, -1, E),
        candidates_first(candidates),
        candidates_first(ids),
        positives.reshape(groups, -1, P),
        valid.reshape(groups, -1),
        candidates_first(np.repeat(valid[:, None], k, axis=1)),
    )


def _unit(random, *shape):
    x = random.normal(size=(*shape, E))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def plain(pairs: Pairs, *, both: bool = True, mask: bool = True) -> tuple[float, float]:
    """The same loss and accuracy, pair by pair in float64."""
    groups, n, _ = pairs.queries.shape
    queries, candidates = pairs.queries.astype(np.float64), pairs.candidates.astype(np.float64)
    own_id = pairs.candidate_ids[:, :n]
    forward, backward, correct = [], [], []
    for g in range(groups):
        for i in range(n):
            if not pairs.query_valid[g, i]:
                continue
            right = {*pairs.positive_ids[g, i], own_id[g, i]} - {-1}
            own = queries[g, i] @ candidates[g, i] / TEMPERATURE
            rivals = [
                queries[g, i] @ candidates[h, j] / TEMPERATURE
                for h in range(groups)
                for j in range(candidates.shape[1])
                if (h, j) != (g, i)
                and pairs.candidate_valid[h, j]
                and not (mask and pairs.candidate_ids[h, j] in right)
            ]
            forward.append(np.log(np.sum(np.exp([own, *rivals]))) - own)
            correct.append(own > max(rivals))
            rivals = [
                queries[h, j] @ candidates[g, i] / TEMPERATURE
                for h in range(groups)
                for j in range(n)
                if (h, j) != (g, i)
                and pairs.query_valid[h, j]
                and not (mask and own_id[g, i] in {*pairs.positive_ids[h, j], own_id[h, j]})
            ]
            backward.append(np.log(np.sum(np.exp([own, *rivals]))) - own)
    loss = (np.mean(forward) + np.mean(backward)) / 2 if both else np.mean(forward)
    return float(loss), float(np.mean(correct))


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def _value_and_gradients(queries, candidates, log_inverse, rest):
    return contrastive_loss(Pairs(queries, candidates, *rest), log_inverse, LossConfig())


def value_and_gradients(pairs: Pairs, sizes=None):
    """((loss, metrics), gradients to queries, candidates and the log inverse temperature), on a mesh or without."""
    if sizes is None:
        return _value_and_gradients(pairs.queries, pairs.candidates, LOG_INVERSE, tuple(pairs[2:]))
    mesh = sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    with jax.set_mesh(mesh):
        there = sharding.put_batch(pairs, mesh)
        return _value_and_gradients(there.queries, there.candidates, LOG_INVERSE, tuple(there[2:]))


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_equals_the_plain_float64_loss(k, both, mask):
    config = LossConfig(directions="both" if both else "query_to_candidate", mask_false_negatives=mask)
    given = pairs(k=k)
    loss, metrics = contrastive_loss(given, LOG_INVERSE, config)
    expected, accuracy = plain(given, both=both, mask=mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert metrics["pairs"] == G * N - 3


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(sizes):
    alone, spread = value_and_gradients(pairs()), value_and_gradients(pairs(), sizes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), alone, spread)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_gathered_positives_stay_with_their_queries(sizes):
    # Queries that equal their positives, all different: everything is found, wherever it lies.
    given = pairs(k=1)
    own = np.concatenate([given.queries, given.candidates[:, N:]], axis=1)
    (_, metrics), _ = value_and_gradients(given._replace(candidates=own), sizes)
    assert metrics["accuracy"] == 1.0
    # Shifted by one device, nothing is.
    shifted = np.concatenate([np.roll(given.queries, 1, axis=0), given.candidates[:, N:]], axis=1)
    (_, metrics), _ = value_and_gradients(given._replace(candidates=shifted), sizes)
    assert metrics["accuracy"] < 0.1


@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (2, 2, 2)])
def test_equal_candidates_on_other_devices_are_no_negatives(sizes):
    random = np.random.default_rng(0)
    total = G * N
    queries, candidates = _unit(random, total), _unit(random, total, 1)
    ids = np.arange(total, dtype=np.int32)[:, None]
    positives = np.concatenate([ids, np.full((total, P - 1), -1, np.int32)], axis=1)
    ids[-1], positives[-1, 0], candidates[-1] = ids[0], ids[0, 0], candidates[0]
    valid = np.ones(total, bool)
    _, (_, to_candidates, _) = value_and_gradients(_grouped(queries, candidates, ids, positives, valid, G), sizes)
    # What the last candidate is pulled and pushed by has nothing of the first query in it: moving that query's
    # embedding along the last candidate changes nothing.
    moved = queries.copy()
    moved[0] = queries[0] + 0.1 * candidates[-1, 0]
    _, (_, after, _) = value_and_gradients(_grouped(moved, candidates, ids, positives, valid, G), sizes)
    np.testing.assert_allclose(np.asarray(after)[-1, -1], np.asarray(to_candidates)[-1, -1], atol=1e-7)
    assert np.abs(np.asarray(after)[-1, -2] - np.asarray(to_candidates)[-1, -2]).max() > 1e-6


@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (2, 2, 2)])
def test_temperature_gradient_is_summed_once(sizes):
    given, step = pairs(), 1e-3

    def loss(log_inverse):
        scaled = given._replace(queries=(given.queries * np.exp(log_inverse) * TEMPERATURE).astype(np.float64))
        return plain(scaled)[0]

    numeric = (loss(LOG_INVERSE + step) - loss(LOG_INVERSE - step)) / (2 * step)
    _, (_, _, analytic) = value_and_gradients(given, sizes)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-3)


def test_order_of_the_batch_does_not_matter():
    random = np.random.default_rng(1)
    total = G * N
    queries, candidates = _unit(random, total), _unit(random, total, 2)
    ids = random.integers(0, 40, (total, 2)).astype(np.int32)
    positives = np.stack([ids[:, 0], ids[:, 0], random.integers(0, 40, total)], axis=1).astype(np.int32)
    valid = random.random(total) > 0.1
    order = random.permutation(total)
    one = _grouped(queries, candidates, ids, positives, valid, G)
    other = _grouped(*(x[order] for x in (queries, candidates, ids, positives, valid)), G)
    for sizes in (None, (2, 2, 2)):
        (first, _), grads = value_and_gradients(one, sizes)
        (second, _), permuted = value_and_gradients(other, sizes)
        np.testing.assert_allclose(first, second, rtol=1e-6)
        flat = np.asarray(grads[0]).reshape(total, E)[order]
        np.testing.assert_allclose(np.asarray(permuted[0]).reshape(total, E), flat, atol=1e-6)


def test_fillers_count_for_nothing():
    given = pairs()
    (loss, _), (to_queries, to_candidates, _) = value_and_gradients(given)
    rubbish = np.where(given.query_valid[..., None], given.queries, 7.0).astype(np.float32)
    (again, _), _ = value_and_gradients(given._replace(queries=rubbish))
    assert loss == again
    assert not np.asarray(to_queries)[~given.query_valid].any()
    assert not np.asarray(to_candidates)[~given.candidate_valid].any()


def test_a_batch_of_fillers_has_no_loss():
    given = pairs()
    empty = given._replace(
        query_valid=np.zeros_like(given.query_valid), candidate_valid=np.zeros_like(given.candidate_valid)
    )
    loss, metrics = contrastive_loss(empty, LOG_INVERSE, LossConfig())
    assert loss == 0 and metrics["pairs"] == 0


def test_equal_embeddings_are_no_hits():
    given = pairs()
    (_, metrics), _ = value_and_gradients(
        given._replace(queries=np.ones_like(given.queries), candidates=np.ones_like(given.candidates))
    )
    assert metrics["accuracy"] == 0


def test_temperature_is_clamped():
    config = LossConfig(temperature=0.05, min_temperature=0.02)
    assert np.isclose(np.exp(-losses.initial_parameters(config)["log_inverse_temperature"]), 0.05)
    held = losses.clamp({"log_inverse_temperature": jnp.float32(9.0)}, config)
    assert np.isclose(np.exp(-held["log_inverse_temperature"]), 0.02)
