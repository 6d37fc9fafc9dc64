"""InfoNCE over the global batch, computed where the embeddings lie.

Axes: G groups, N pairs of a group, C = N·(1 + K) candidates of a group (N positives, then K hard negatives of each
pair), P right answers of a query, E embedding. Each device holds its groups' rows of the logits and gathers the other
side over the batch axes of the mesh, never over `tensor`, where embeddings are whole.
"""

import functools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jfe_jax.config import LossConfig
from jfe_jax.sharding import BATCH_AXES


class Pairs(NamedTuple):
    """Embedded pairs and what is known of them; rows of fillers are finite and count for nothing.

    Attributes:
      queries: float32 [G, N, E], unit rows.
      candidates: float32 [G, C, E], unit rows; the positive of query i is row i.
      candidate_ids: int32 [G, C]; equal for equal candidates, -1 for a filler.
      positive_ids: int32 [G, N, P]; every candidate that is right for the query, padded with -1.
      query_valid: bool [G, N].
      candidate_valid: bool [G, C].
    """

    queries: jax.Array
    candidates: jax.Array
    candidate_ids: jax.Array
    positive_ids: jax.Array
    query_valid: jax.Array
    candidate_valid: jax.Array


class Sums(NamedTuple):
    """Sums over the valid pairs of the global batch, with their count: float32 scalars."""

    query_to_candidate: jax.Array
    candidate_to_query: jax.Array
    correct: jax.Array
    count: jax.Array


def split_embeddings(
    embeddings: jax.Array, valid: jax.Array, candidate_ids: jax.Array, positive_ids: jax.Array
) -> Pairs:
    """Takes a ContrastiveBatch's embeddings [G, B, E] apart; B = N + C."""
    n = positive_ids.shape[1]
    return Pairs(embeddings[:, :n], embeddings[:, n:], candidate_ids, positive_ids, valid[:, :n], valid[:, n:])


def initial_parameters(config: LossConfig) -> dict[str, jax.Array]:
    """The loss's own parameter: the logarithm of the inverse temperature, as in CLIP (Radford et al. 2021, 2.4)."""
    return {"log_inverse_temperature": jnp.asarray(-math.log(config.temperature), jnp.float32)}


def clamp(parameters: dict[str, jax.Array], config: LossConfig) -> dict[str, jax.Array]:
    """The parameters after an update, with the temperature held at `min_temperature` or above."""
    limit = -math.log(config.min_temperature)
    return {"log_inverse_temperature": jnp.minimum(parameters["log_inverse_temperature"], limit)}


def contrastive_loss(
    pairs: Pairs, log_inverse_temperature: jax.Array, config: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE (van den Oord et al. 2018, equation 4) against all candidates of the global batch.

    With s_ij = <q_i, c_j> / temperature, the query's term is -s_ii + log Σ_j exp(s_ij), j over its own positive and
    every valid candidate that is not right for it. "both" averages this with the same from positives to queries (CLIP:
    Radford et al. 2021, figure 3); there a query that the candidate is right for is left out of the sum. Hard negatives
    are candidates like any other, but no rows of the second direction.

    Under a mesh in context (`jax.set_mesh`) G is split over the batch axes, and the value is the same.

    Args:
      pairs: see Pairs.
      log_inverse_temperature: float32 scalar.
      config: directions and masking.

    Returns:
      The loss, a float32 scalar, mean over the valid pairs, and metrics: "loss", "accuracy" (share of queries whose own
      positive scores above every negative), "pairs" (their number).
    """
    local = partial(_local_sums, both=config.directions == "both", mask=config.mask_false_negatives)
    if BATCH_AXES[0] in jax.sharding.get_abstract_mesh().axis_names:
        sums = jax.shard_map(
            partial(local, axes=BATCH_AXES),
            in_specs=(Pairs(*[P(BATCH_AXES)] * len(Pairs._fields)), P()),
            out_specs=Sums(P(), P(), P(), P()),
        )(pairs, log_inverse_temperature)
    else:
        sums = local(pairs, log_inverse_temperature, axes=())
    count = jnp.maximum(sums.count, 1.0)
    total = sums.query_to_candidate
    if config.directions == "both":
        total = (total + sums.candidate_to_query) / 2
    loss = total / count
    return loss, {"loss": loss, "accuracy": sums.correct / count, "pairs": sums.count}


def _local_sums(
    pairs: Pairs, log_inverse_temperature: jax.Array, *, both: bool, mask: bool, axes: tuple[str, ...]
) -> Sums:
    # This device's rows against everybody's columns; only sums leave the device.
    g, n, e = pairs.queries.shape
    c = pairs.candidates.shape[1]
    scale = jnp.exp(log_inverse_temperature)
    first = jax.lax.axis_index(axes) * g if axes else 0
    everyone = jax.tree.map(partial(jax.lax.all_gather, axis_name=axes, tiled=True), pairs) if axes else pairs
    groups, rows = jnp.divmod(jnp.arange(g * n), n)

    queries, positives = pairs.queries.reshape(-1, e), pairs.candidates[:, :n].reshape(-1, e)
    valid = pairs.query_valid.reshape(-1)
    row_ids, row_positives = pairs.candidate_ids[:, :n].reshape(-1), pairs.positive_ids.reshape(g * n, -1)
    column_ids = everyone.candidate_ids.reshape(-1)

    negative = everyone.candidate_valid.reshape(1, -1)
    if mask:
        right = _contains(row_positives[:, None], column_ids[None])
        negative &= ~(right | (column_ids[None] == row_ids[:, None]))
    forward, own, rival = _rows(
        queries, everyone.candidates.reshape(-1, e), negative, (first + groups) * c + rows, scale
    )
    backward = jnp.zeros_like(forward)
    if both:
        negative = everyone.query_valid.reshape(1, -1)
        if mask:
            column_positives = everyone.positive_ids.reshape(negative.shape[1], -1)
            same = everyone.candidate_ids[:, :n].reshape(1, -1) == row_ids[:, None]
            negative &= ~(_contains(column_positives[None], row_ids[:, None]) | same)
        backward, _, _ = _rows(positives, everyone.queries.reshape(-1, e), negative, (first + groups) * n + rows, scale)
    sums = Sums(
        *(jnp.sum(jnp.where(valid, x, 0.0)) for x in (forward, backward, (own > rival).astype(jnp.float32))),
        jnp.sum(valid, dtype=jnp.float32),
    )
    return jax.lax.psum(sums, axes) if axes else sums


def _rows(
    rows: jax.Array, columns: jax.Array, negative: jax.Array, own_column: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # [I, E], [J, E], bool [I or 1, J], int [I], scalar → loss [I], own logit [I], highest negative logit [I].
    logits = scale * jnp.einsum(
        "ie,je->ij", rows, columns, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    is_own = jnp.arange(columns.shape[0])[None] == own_column[:, None]
    others = jnp.where(negative & ~is_own, logits, -jnp.inf)
    own = jnp.sum(jnp.where(is_own, logits, 0.0), axis=1)
    loss = jax.nn.logsumexp(jnp.where(is_own, logits, others), axis=1) - own
    return loss, own, jnp.max(jax.lax.stop_gradient(others), axis=1)


def _contains(sets: jax.Array, value: jax.Array) -> jax.Array:
    # [..., P], broadcastable [...] → bool [...]. Padding of a set is -1 and so is a filler's id: fillers are members
    # of nothing. Written out over P because a reduction would hold [I, J, P] in memory.
    hits = (sets[..., p] == value for p in range(sets.shape[-1]))
    return functools.reduce(jnp.logical_or, hits) & (value >= 0)
