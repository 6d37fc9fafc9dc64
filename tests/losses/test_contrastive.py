"""Axes as in train/losses.py: G groups, N pairs of a group, K hard negatives, P right answers, E embedding."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfe_jax.config import LossConfig, MeshConfig
from jfe_jax.losses import contrastive, logit_cache
from jfe_jax.losses.contrastive import ContrastiveInputs, contrastive_loss
from jfe_jax.parallel import sharding
from tests.support.plain_loss import plain

G, N, E, P = 8, 4, 16, 3
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
KINDS = {
    "infonce": LossConfig(temperature=0.1),
    "one direction": LossConfig(temperature=0.1, directions="query_to_candidate"),
    "wanted modality": LossConfig(temperature=0.1, negatives="same_modality"),
    "unmasked": LossConfig(temperature=0.1, mask_false_negatives=False),
    "matryoshka": LossConfig(temperature=0.1, matryoshka={4: 0.5, 8: 2.0}),
    "sigmoid": LossConfig(kind="sigmoid", temperature=0.1, bias=-3.0, matryoshka={8: 2.0}),
    "sigmoid, wanted modality": LossConfig(
        kind="sigmoid", temperature=0.1, bias=-3.0, negatives="same_modality", mask_false_negatives=False
    ),
}
# Eight rows of logits, the fewest that a tile has.
SMALL = 1e-6


def pairs(seed: int = 0, k: int = 1, groups: int = G) -> ContrastiveInputs:
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


def _grouped(queries, candidates, ids, positives, valid, groups) -> ContrastiveInputs:
    def candidates_first(x):
        # [G·N, 1 + K, …] → [G, N positives and then N·K negatives, …]
        x = x.reshape(groups, -1, *x.shape[1:])
        tail = x.shape[3:]
        return np.concatenate([x[:, :, 0], x[:, :, 1:].reshape(groups, -1, *tail)], axis=1)

    k = ids.shape[1]
    return ContrastiveInputs(
        queries.reshape(groups, -1, E),
        candidates_first(candidates),
        candidates_first(ids),
        candidates_first(np.where(ids < 0, -1, ids % 3)),
        positives.reshape(groups, -1, P),
        valid.reshape(groups, -1),
        candidates_first(np.repeat(valid[:, None], k, axis=1)),
    )


def _unit(random, *shape):
    x = random.normal(size=(*shape, E))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_and_gradients(kind, kept_rows, queries, candidates, parameters, rest):
    keep_mib = kept_rows * logit_cache.BYTES * candidates.shape[0] * candidates.shape[1] / 2**20
    config = replace(KINDS[kind], tile_mib=SMALL, keep_mib=keep_mib, keep_logits=kept_rows < 0)

    def loss(queries, candidates, parameters):
        return contrastive_loss(ContrastiveInputs(queries, candidates, *rest), parameters, config)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(queries, candidates, parameters)


def value_and_gradients(pairs: ContrastiveInputs, sizes=None, kind="infonce", kept_rows=0):
    """((loss, metrics), gradients to queries, candidates and the loss's parameters), on a mesh or without."""
    parameters = contrastive.initial_parameters(KINDS[kind])
    if sizes is None:
        return _value_and_gradients(kind, kept_rows, pairs.queries, pairs.candidates, parameters, tuple(pairs[2:]))
    mesh = sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    with jax.set_mesh(mesh):
        there = sharding.put_batch(pairs, mesh)
        return _value_and_gradients(kind, kept_rows, there.queries, there.candidates, parameters, tuple(there[2:]))


@pytest.mark.parametrize("kind, k", [*((kind, 2) for kind in KINDS), ("infonce", 0)])
def test_equals_the_plain_float64_loss(kind, k):
    given = pairs(k=k)
    (loss, metrics), _ = value_and_gradients(given, kind=kind)
    expected, accuracy = plain(given, KINDS[kind])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert metrics["pairs"] == G * N - 3


@pytest.mark.parametrize("sizes", [None, *MESHES])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_gradients_are_those_of_the_plain_loss_on_every_mesh(kind, sizes):
    given = pairs(k=2)
    (loss, _), gradients = value_and_gradients(given, sizes, kind)
    np.testing.assert_allclose(loss, plain(given, KINDS[kind])[0], rtol=1e-6)
    for gradient, (way, expected) in zip(jax.tree.leaves(gradients), plain_slopes(kind), strict=True):
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * way), expected, rtol=1e-4)


@functools.cache
def plain_slopes(kind):
    """A direction for each of queries, candidates and parameters in turn, and the plain loss's slope along it."""
    given, config, random, step = pairs(k=2), KINDS[kind], np.random.default_rng(2), 1e-5
    slopes = []
    for name in ("queries", "candidates"):
        x = getattr(given, name).astype(np.float64)
        way = random.normal(size=x.shape)
        up, down = (plain(given._replace(**{name: x + d * way}), config)[0] for d in (step, -step))
        slopes.append((way, (up - down) / (2 * step)))
    for name, value in sorted(contrastive.initial_parameters(config).items()):
        up, down = (plain(given, config, {name: float(value) + d})[0] for d in (step, -step))
        slopes.append((1.0, (up - down) / (2 * step)))
    return slopes


@pytest.mark.parametrize("kind", ["infonce", "matryoshka", "sigmoid, wanted modality"])
def test_tiles_and_devices_change_nothing(kind):
    cached = value_and_gradients(pairs(k=2), kind=kind, kept_rows=-1)
    # No logits kept, or those of the first of a device's tiles.
    for sizes, kept_rows in ((None, 0), (None, 9), ((1, 2, 4), 0), ((1, 2, 4), 9)):
        tiled = value_and_gradients(pairs(k=2), sizes, kind, kept_rows)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), cached, tiled)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_what_blocks_do_not_divide_is_filled_up(kind):
    # 31 queries and as many candidates, in blocks of up to 8.
    given = jax.tree.map(lambda x: x[:, :31], pairs(k=0, groups=1))
    parameters = contrastive.initial_parameters(KINDS[kind])

    def gradients(config):
        def loss(queries, candidates, parameters):
            return contrastive_loss(given._replace(queries=queries, candidates=candidates), parameters, config)

        grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        return grad(given.queries, given.candidates, parameters)

    small, whole = (gradients(replace(KINDS[kind], **sizes)) for sizes in ({"tile_mib": SMALL, "keep_mib": 1e-3}, {}))
    np.testing.assert_allclose(small[0][0], plain(given, KINDS[kind])[0], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), small, whole)


def test_memory_does_not_grow_with_the_square_of_the_batch():
    config = LossConfig(tile_mib=1, keep_mib=0)

    def temporary(total, config=config):
        shapes = ContrastiveInputs(
            *(jax.ShapeDtypeStruct((1, total, 8), jnp.float32),) * 2,
            *(jax.ShapeDtypeStruct((1, total), jnp.int32),) * 2,
            jax.ShapeDtypeStruct((1, total, 1), jnp.int32),
            *(jax.ShapeDtypeStruct((1, total), jnp.bool_),) * 2,
        )
        parameters = contrastive.initial_parameters(config)

        def loss(queries, candidates, rest):
            return contrastive_loss(ContrastiveInputs(queries, candidates, *rest), parameters, config)[0]

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes[:2], shapes[2:]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # From 4,096 to 16,384 pairs the logits grow from 64 MiB to 1 GiB.
    small, large = temporary(4096), temporary(16384)
    assert large < 4 * small and large < 64 << 20
    # As much more as is kept, three bytes of a logit's four at most.
    for sizes, more in (({"keep_logits": True}, 48), ({"keep_mib": 18}, 18)):
        assert more - 1 < (temporary(4096, LossConfig(tile_mib=1, **sizes)) - small) / 2**20 < more + 2


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


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_a_batch_of_fillers_has_no_loss_and_no_gradient(kind, sizes):
    given = pairs()
    empty = given._replace(
        query_valid=np.zeros_like(given.query_valid), candidate_valid=np.zeros_like(given.candidate_valid)
    )
    (loss, metrics), gradients = value_and_gradients(empty, sizes, kind)
    assert loss == 0 and metrics["pairs"] == 0
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(gradients))


def test_a_query_without_negatives_has_no_loss():
    given = pairs(k=0)
    alone = given._replace(candidate_ids=np.full_like(given.candidate_ids, 7))
    (loss, metrics), gradients = value_and_gradients(alone)
    assert loss == 0 and metrics["accuracy"] == 1
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(gradients))


def test_equal_embeddings_are_no_hits():
    given = pairs()
    (_, metrics), _ = value_and_gradients(
        given._replace(queries=np.ones_like(given.queries), candidates=np.ones_like(given.candidates))
    )
    assert metrics["accuracy"] == 0


def test_temperature_is_clamped():
    config = LossConfig(kind="sigmoid", temperature=0.05, min_temperature=0.02)
    first = contrastive.initial_parameters(config)
    assert np.isclose(np.exp(-first["log_inverse_temperature"]), 0.05)
    held = contrastive.clamp(first | {"log_inverse_temperature": jnp.float32(9.0)}, config)
    assert np.isclose(np.exp(-held["log_inverse_temperature"]), 0.02)
    assert held["bias"] == -10
