"""The contrastive loss over the global batch, computed where the embeddings lie.

Axes: G groups, N pairs of a group, C = N·(1 + K) candidates of a group (N positives, then K hard negatives of each
pair), P right answers of a query, E embedding. Each device holds its groups' rows of the logits and gathers the
candidates over the batch axes of the mesh, never over `tensor`, where embeddings are whole.
"""

import math
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jfe_jax.config import LossConfig
from jfe_jax.losses import streaming_reductions, tiled_logits
from jfe_jax.models.heads.pooling import unit
from jfe_jax.parallel.sharding import BATCH_AXES

Metrics = dict[str, jax.Array]


class ContrastiveInputs(NamedTuple):
    """Embedded pairs and what is known of them; rows of fillers are finite and count for nothing.

    Attributes:
      queries: float32 [G, N, E], unit rows.
      candidates: float32 [G, C, E], unit rows; the positive of query i is row i.
      candidate_ids: int32 [G, C]; equal for equal candidates, -1 for a filler.
      candidate_modality: int32 [G, C]; equal for candidates of one modality.
      positive_ids: int32 [G, N, P]; every candidate that is right for the query, padded with -1.
      query_valid: bool [G, N].
      candidate_valid: bool [G, C].
    """

    queries: jax.Array
    candidates: jax.Array
    candidate_ids: jax.Array
    candidate_modality: jax.Array
    positive_ids: jax.Array
    query_valid: jax.Array
    candidate_valid: jax.Array


class Sums(NamedTuple):
    """Sums over the valid pairs of the global batch: float32 scalars."""

    loss: jax.Array
    correct: jax.Array


def initial_parameters(config: LossConfig) -> dict[str, jax.Array]:
    """The loss's own parameters: the logarithm of the inverse temperature, as in CLIP (Radford et al. 2021, 2.4).

    The sigmoid loss adds a bias (Zhai et al. 2023, "Sigmoid loss for language image pre-training", 3.2).
    """
    parameters = {"log_inverse_temperature": jnp.asarray(-math.log(config.temperature or 1.0), jnp.float32)}
    return parameters | ({"bias": jnp.asarray(config.bias, jnp.float32)} if config.kind == "sigmoid" else {})


def trainable_mask(config: LossConfig) -> dict[str, bool]:
    """Which of `initial_parameters` are trained."""
    parameters = {"log_inverse_temperature": config.learn_temperature}
    return parameters | ({"bias": config.learn_bias} if config.kind == "sigmoid" else {})


def clamp(parameters: dict[str, jax.Array], config: LossConfig) -> dict[str, jax.Array]:
    """The parameters after an update, with the temperature held at `min_temperature` or above."""
    limit = -math.log(config.min_temperature)
    return parameters | {"log_inverse_temperature": jnp.minimum(parameters["log_inverse_temperature"], limit)}


@jax.named_scope("loss")
def contrastive_loss(
    pairs: ContrastiveInputs, parameters: dict[str, jax.Array], config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """The loss against all candidates of the global batch.

    With s_ij = <q_i, c_j> / temperature, and the negatives of query i being every valid candidate but its own positive,
    what is right for it, and, with `negatives: same_modality`, what is of another modality than its positive:

    "infonce" (van den Oord et al. 2018, equation 4): -s_ii + log(exp(s_ii) + Σ_j exp(s_ij)), j over the negatives.
    "both" averages this with the same over the queries that positive i is a negative of (CLIP: Radford et al. 2021,
    figure 3). Hard negatives are candidates like any other, but no rows of the second direction.

    "sigmoid" (Zhai et al. 2023, equation 1): log(1 + exp(-s_ii - b)) + Σ_j log(1 + exp(s_ij + b)).

    `matryoshka` averages, by weight, with the same loss of the embeddings' first dimensions, renormalised (Kusupati et
    al. 2022, equation 1).

    Under a mesh in context (`jax.set_mesh`) G is split over the batch axes, and the value is the same.

    Args:
      pairs: see ContrastiveInputs.
      parameters: as `initial_parameters` makes them.
      config: what to compute.

    Returns:
      The loss, a float32 scalar, mean over the valid pairs, and metrics: "loss", "accuracy" (share of queries whose own
      positive scores above every negative), "pairs" (their number), and "loss_64" and "accuracy_64" of a prefix of 64.
    """
    axes = BATCH_AXES if BATCH_AXES[0] in jax.sharding.get_abstract_mesh().axis_names else ()
    local = partial(_local_sums, config=config, axes=axes)
    if axes:
        local = jax.shard_map(
            local, in_specs=(ContrastiveInputs(*[P(axes)] * len(ContrastiveInputs._fields)), P()), out_specs=P()
        )
    sums = local(pairs, parameters)
    count = jnp.sum(pairs.query_valid, dtype=jnp.float32)
    means = jax.tree.map(lambda total: total / jnp.maximum(count, 1.0), sums)
    weights = {0: 1.0, **config.matryoshka}
    loss = sum(weight * means[width].loss for width, weight in weights.items()) / sum(weights.values())
    metrics = {"loss": loss, "accuracy": means[0].correct, "pairs": count}
    for width in config.matryoshka:
        metrics |= {f"loss_{width}": means[width].loss, f"accuracy_{width}": means[width].correct}
    return loss, metrics


def _local_sums(
    pairs: ContrastiveInputs, parameters: dict[str, jax.Array], *, config: LossConfig, axes: tuple[str, ...]
) -> dict[int, Sums]:
    # This device's rows against everybody's columns, by width of the prefix (0: all); only sums leave the device.
    g, n, _ = pairs.queries.shape
    c = pairs.candidates.shape[1]
    gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True) if axes else lambda x: x
    # Each device uses the parameters for itself: the sum over devices of what comes back is taken here.
    parameters = jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying") if axes else x, parameters)
    first = (jax.lax.axis_index(axes) if axes else 0) * g * c
    groups, places = jnp.divmod(jnp.arange(g * n), n)
    own = groups * c + places
    ids, modality = (x[:, :n].reshape(-1) for x in (pairs.candidate_ids, pairs.candidate_modality))
    rows = tiled_logits.QueryInfo(
        first + own, ids, pairs.positive_ids.reshape(g * n, -1), modality, pairs.query_valid.reshape(-1)
    )
    known = (pairs.candidate_ids, pairs.candidate_modality, pairs.candidate_valid)
    known = [gather(x).reshape(-1) for x in known]
    columns = tiled_logits.CandidateInfo(jnp.arange(len(known[0])), *known)
    settings = tiled_logits.TileConfig(
        columns=config.kind == "infonce" and config.directions == "both",
        mask=config.mask_false_negatives,
        same_modality=config.negatives == "same_modality",
        tile_bytes=int(config.tile_mib * 2**20),
        keep_bytes=sys.maxsize if config.keep_logits else int(config.keep_mib * 2**20),
        axes=axes,
    )
    everyone = gather(pairs.candidates)

    def sums(width: int) -> Sums:
        queries, candidates = pairs.queries, everyone
        mine = pairs.candidates[:, :n]
        if width:
            queries, candidates, mine = (unit(x[..., :width]) for x in (queries, candidates, mine))
        queries, candidates, mine = (x.reshape(-1, x.shape[-1]) for x in (queries, candidates, mine))
        scores = tiled_logits.LogitInputs(
            queries, candidates, jnp.exp(parameters["log_inverse_temperature"]), rows, columns
        )
        # The positive is this device's own: no need to look for it among the gathered.
        loss, correct = _terms(settings, scores, mine, parameters, config)
        both = Sums(*(jnp.sum(jnp.where(rows.valid, x, 0.0)) for x in (loss, correct)))
        return jax.lax.psum(both, axes) if axes else both

    return {width: sums(width) for width in (0, *config.matryoshka)}


def _terms(
    settings: tiled_logits.TileConfig,
    scores: tiled_logits.LogitInputs,
    positives: jax.Array,
    parameters: dict[str, jax.Array],
    config: LossConfig,
) -> tuple[jax.Array, jax.Array]:
    # Loss and hit of each row, [I].
    if config.kind == "sigmoid":
        bias = parameters["bias"]
        own, total, highest = streaming_reductions.softplus_sums(settings, scores, positives, bias)
        return jax.nn.softplus(-own - bias) + total, (own > highest).astype(jnp.float32)
    own, log_sum, column_sums, highest = streaming_reductions.log_sums(settings, scores, positives)
    # -own + log(exp(own) + exp(log_sum))
    loss = jax.nn.softplus(log_sum - own)
    if settings.columns:
        column_sums = _log_sum_over_devices(column_sums, settings.axes)
        loss = (loss + jax.nn.softplus(column_sums[scores.rows.own_column] - own)) / 2
    return loss, (own > highest).astype(jnp.float32)


def _log_sum_over_devices(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    # log Σ exp(x) over the devices, [J] on each; -inf where all are.
    if not axes:
        return x
    highest = jax.lax.pmax(jax.lax.stop_gradient(x), axes)
    total = jax.lax.psum(jnp.exp(x - jnp.where(highest == -jnp.inf, 0.0, highest)), axes)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + highest, -jnp.inf)
