"""Contrastive loss over the global batch, computed on the devices that hold the embeddings.

Axes: G groups, N pairs of a group, C = N·(1 + K) candidates of a group (N positives, then K hard negatives of each
pair), P positives of a query, E embedding. Each device computes its groups' rows of the logits and all-gathers the
candidates over the batch axes of the mesh, never over `tensor`, where embeddings are replicated.
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
    """Embedded pairs and their metadata. Padding rows are finite and ignored.

    Attributes:
      queries: float32 [G, N, E], unit rows.
      candidates: float32 [G, C, E], unit rows. The positive of query i is row i.
      candidate_ids: int32 [G, C]; equal for equal candidates, -1 for padding.
      candidate_modality: int32 [G, C]; equal for candidates of one modality.
      positive_ids: int32 [G, N, P]; candidate ids of all positives of the query, padded with -1.
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
    """Initializes the loss's parameters: the log of the inverse temperature, as in CLIP (Radford et al. 2021, 2.4).

    The sigmoid loss adds a bias (Zhai et al. 2023, "Sigmoid loss for language image pre-training", 3.2).
    """
    parameters = {"log_inverse_temperature": jnp.asarray(-math.log(config.temperature or 1.0), jnp.float32)}
    return parameters | ({"bias": jnp.asarray(config.bias, jnp.float32)} if config.kind == "sigmoid" else {})


def trainable_mask(config: LossConfig) -> dict[str, bool]:
    """Returns True for each of `initial_parameters` that is trained."""
    parameters = {"log_inverse_temperature": config.learn_temperature}
    return parameters | ({"bias": config.learn_bias} if config.kind == "sigmoid" else {})


def clamp(parameters: dict[str, jax.Array], config: LossConfig) -> dict[str, jax.Array]:
    """Clamps the temperature to `min_temperature` or above; applied after each update."""
    limit = -math.log(config.min_temperature)
    return parameters | {"log_inverse_temperature": jnp.minimum(parameters["log_inverse_temperature"], limit)}


@jax.named_scope("loss")
def contrastive_loss(
    pairs: ContrastiveInputs, parameters: dict[str, jax.Array], config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """Computes the loss against all candidates of the global batch.

    Let s_ij = <q_i, c_j> / temperature. The negatives of query i are all valid candidates except its own positive, its
    other positives, and, with `negatives: same_modality`, candidates whose modality is not that of its own positive.

    "infonce" (van den Oord et al. 2018, equation 4): -s_ii + log(exp(s_ii) + Σ_j exp(s_ij)), j over the negatives.
    "both" averages this with the same over the queries that positive i is a negative of (CLIP: Radford et al. 2021,
    figure 3). Hard negatives are candidates like any other, but they are not rows of the second direction.

    "sigmoid" (Zhai et al. 2023, equation 1): log(1 + exp(-s_ii - b)) + Σ_j log(1 + exp(s_ij + b)).

    `matryoshka` adds the same loss of renormalized embedding prefixes to a weighted mean (Kusupati et al. 2022,
    equation 1).

    Under a mesh in context (`jax.set_mesh`) G is sharded over the batch axes, and the value is the same.

    Args:
      pairs: see ContrastiveInputs.
      parameters: tree like that of `initial_parameters`.
      config: kind of loss and its settings.

    Returns:
      The loss, a float32 scalar, mean over the valid pairs, and metrics: "loss", "accuracy" (fraction of queries whose
      own positive scores above every negative), "pairs" (number of valid pairs), and for a `matryoshka` prefix of 64
      dimensions "loss_64" and "accuracy_64".
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
    # This device's rows against the columns of all devices, by prefix width (0: all). Only sums leave the device.
    g, n, _ = pairs.queries.shape
    c = pairs.candidates.shape[1]
    gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True) if axes else lambda x: x
    # The parameters vary over the devices from here on, so that their gradients are summed over the devices here.
    parameters = jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying") if axes else x, parameters)
    first_column = (jax.lax.axis_index(axes) if axes else 0) * g * c
    group_index, pair_index = jnp.divmod(jnp.arange(g * n), n)
    positive_columns = group_index * c + pair_index
    ids, modality = (x[:, :n].reshape(-1) for x in (pairs.candidate_ids, pairs.candidate_modality))
    rows = tiled_logits.QueryInfo(
        first_column + positive_columns,
        ids,
        pairs.positive_ids.reshape(g * n, -1),
        modality,
        pairs.query_valid.reshape(-1),
    )
    metadata = (pairs.candidate_ids, pairs.candidate_modality, pairs.candidate_valid)
    metadata = [gather(x).reshape(-1) for x in metadata]
    columns = tiled_logits.CandidateInfo(jnp.arange(len(metadata[0])), *metadata)
    settings = tiled_logits.TileConfig(
        columns=config.kind == "infonce" and config.directions == "both",
        mask=config.mask_false_negatives,
        same_modality=config.negatives == "same_modality",
        tile_bytes=int(config.tile_mib * 2**20),
        cache_bytes=sys.maxsize if config.keep_logits else int(config.keep_mib * 2**20),
        axes=axes,
    )
    all_candidates = gather(pairs.candidates)

    def sums(width: int) -> Sums:
        queries, candidates = pairs.queries, all_candidates
        positives = pairs.candidates[:, :n]
        if width:
            queries, candidates, positives = (unit(x[..., :width]) for x in (queries, candidates, positives))
        queries, candidates, positives = (x.reshape(-1, x.shape[-1]) for x in (queries, candidates, positives))
        inputs = tiled_logits.LogitInputs(
            queries, candidates, jnp.exp(parameters["log_inverse_temperature"]), rows, columns
        )
        # The positives are on this device, so they need not be selected from the all-gathered candidates.
        loss, correct = _row_losses(settings, inputs, positives, parameters, config)
        totals = Sums(*(jnp.sum(jnp.where(rows.valid, x, 0.0)) for x in (loss, correct)))
        return jax.lax.psum(totals, axes) if axes else totals

    return {width: sums(width) for width in (0, *config.matryoshka)}


def _row_losses(
    settings: tiled_logits.TileConfig,
    inputs: tiled_logits.LogitInputs,
    positives: jax.Array,
    parameters: dict[str, jax.Array],
    config: LossConfig,
) -> tuple[jax.Array, jax.Array]:
    # Loss of each row and whether its positive ranks first, [I].
    if config.kind == "sigmoid":
        bias = parameters["bias"]
        positive_logits, total, highest = streaming_reductions.softplus_sums(settings, inputs, positives, bias)
        return jax.nn.softplus(-positive_logits - bias) + total, (positive_logits > highest).astype(jnp.float32)
    positive_logits, log_sum, column_sums, highest = streaming_reductions.log_sums(settings, inputs, positives)
    # -positive_logits + log(exp(positive_logits) + exp(log_sum))
    loss = jax.nn.softplus(log_sum - positive_logits)
    if settings.columns:
        column_sums = _log_sum_over_devices(column_sums, settings.axes)
        loss = (loss + jax.nn.softplus(column_sums[inputs.rows.own_column] - positive_logits)) / 2
    return loss, (positive_logits > highest).astype(jnp.float32)


def _log_sum_over_devices(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    # log Σ exp(x) over the devices, [J] on each; -inf where x is -inf on all of them.
    if not axes:
        return x
    highest = jax.lax.pmax(jax.lax.stop_gradient(x), axes)
    total = jax.lax.psum(jnp.exp(x - jnp.where(highest == -jnp.inf, 0.0, highest)), axes)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + highest, -jnp.inf)
