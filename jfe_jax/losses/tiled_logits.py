"""Logits of all pairs of queries and candidates in tiles, so that no [J, I] array is ever materialized.

Axes: I queries of this device, J candidates of all devices, A blocks of T queries, B blocks of U candidates, P
positives of a query, E embedding. The logits of a tile, one block of each, are [U, T].

`forward` reduces over the tiles and `backward` returns the gradients. The backward pass recomputes a tile's logits, or
loads them from the cache for as many tiles as the cache has room. It needs nothing else of the forward pass but its
results. It accumulates all gradients, those of the positives too, in the arrays that it returns. Temporary memory is
that of a few tiles, whatever I and J.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfe_jax.losses import logit_cache


class QueryInfo(NamedTuple):
    """Metadata of the queries that decides which candidates are their negatives.

    Attributes:
      own_column: int32 [I], the column of the query's own positive.
      own_id: int32 [I], candidate id of that positive.
      positive_ids: int32 [I, P], candidate ids of all positives, padded with -1.
      modality: int32 [I], modality of the query's own positive.
      valid: bool [I].
    """

    own_column: jax.Array
    own_id: jax.Array
    positive_ids: jax.Array
    modality: jax.Array
    valid: jax.Array


class CandidateInfo(NamedTuple):
    """Metadata of the candidates that decides which queries they are negatives of.

    Attributes:
      column: int32 [J], 0 to J - 1.
      ids: int32 [J], candidate ids, -1 for padding.
      modality: int32 [J].
      valid: bool [J].
    """

    column: jax.Array
    ids: jax.Array
    modality: jax.Array
    valid: jax.Array


class TileConfig(NamedTuple):
    """Settings that are static when the loss is compiled.

    Attributes:
      columns: also reduce over the rows of each column, as log Σ exp.
      mask: exclude other positives of the query from its negatives.
      same_modality: exclude candidates whose modality is not that of the query's own positive.
      tile_bytes: size of a tile's logits.
      cache_bytes: size of the quantized logits that are cached for the backward pass, which then does not recompute
        them. The buffer of the queries' gradients caches some more, see `logit_cache`.
      axes: mesh axes of a surrounding shard_map.
    """

    columns: bool
    mask: bool
    same_modality: bool
    tile_bytes: int
    cache_bytes: int
    axes: tuple[str, ...]


class LogitInputs(NamedTuple):
    """Inputs of s_ij = scale · <q_i, c_j>, and the metadata that decides which pairs are negatives.

    Attributes:
      queries, candidates: float32 [I, E], [J, E]: rows of unit length, except those that are not valid.
      scale: float32 scalar, above 0.
      rows, columns: see QueryInfo, CandidateInfo.
    """

    queries: jax.Array
    candidates: jax.Array
    scale: jax.Array
    rows: QueryInfo
    columns: CandidateInfo


def forward(
    settings: TileConfig, reduce_tile: Callable[..., Any], inputs: LogitInputs, *init: tuple[float, ...]
) -> Any:
    """Reduces the logits over rows and columns, tile by tile.

    Args:
      settings, inputs: see TileConfig, LogitInputs.
      reduce_tile: (logits [U, T], by_row, by_column) → by_row, by_column. Adds a tile's logits, -inf for pairs that are
        no negatives, to the running values of its rows and columns: tuples of [T] and of [U].
      init: initial running values, a number for each of by_row and of by_column.

    Returns:
      Tuples of [I] and of [J], and the logit cache.
    """
    rows, columns = _make_blocks(settings, inputs)
    row_init, by_column = (
        tuple(_pcast_varying(settings, jnp.full(shape, value)) for value in values)
        for shape, values in zip((rows.info.valid.shape[1:], columns.info.valid.shape), init, strict=True)
    )
    ranges = _plan_ranges(settings, rows, columns)
    cache = logit_cache.allocate(ranges, rows.vectors.shape, columns.vectors.shape[1])
    cache = jax.tree.map(partial(_pcast_varying, settings), cache)

    def scan_queries(carry, xs):
        cache, by_column = carry
        index, block = xs
        queries_t, by_row, column_values = _transpose(block.vectors), row_init, []

        def scan_tile(block_range, carry, xs):
            cache, by_row = carry
            candidate_index, by_column = xs
            column = _select_block(columns, candidate_index)
            logits = _masked_logits(settings, inputs.scale, queries_t, block.info, column)
            by_row, by_column = reduce_tile(logits, by_row, by_column)
            cache = logit_cache.store(cache, block_range, index, candidate_index, logits, inputs.scale)
            return (cache, by_row), by_column

        for block_range in ranges:
            (cache, by_row), values = _scan_range(scan_tile, (cache, by_row), block_range, by_column)
            column_values.append(values)
        return (cache, jax.tree.map(lambda *values: jnp.concatenate(values), *column_values)), by_row

    xs = jnp.arange(len(rows.vectors)), rows
    (cache, by_column), by_row = jax.lax.scan(scan_queries, (cache, by_column), xs)
    return _merge_blocks(by_row, len(inputs.queries)), _merge_blocks(by_column, len(inputs.candidates)), cache


def backward(
    settings: TileConfig,
    dlogits_fn: Callable[..., Any],
    inputs: LogitInputs,
    cache: logit_cache.LogitCache,
    d_positive: jax.Array,
    by_row: Any,
    by_column: Any,
) -> tuple[LogitInputs, jax.Array]:
    """Returns the cotangents of the inputs.

    Args:
      settings, inputs: see TileConfig, LogitInputs.
      dlogits_fn: (logits [U, T], by_row, by_column) → the cotangents [U, T] of a tile's <q_i, c_j>, from its logits as
        `forward` computed them.
      cache: the last result of `forward`.
      d_positive: [I], cotangents of s_ij of the positives, which are no negatives.
      by_row, by_column: tuples of [I] and of [J]; `dlogits_fn` receives those of its tile.

    Returns:
      The cotangents, and the sum of the results of `dlogits_fn`.
    """
    rows, columns = _make_blocks(settings, inputs)
    d_positive, by_row = _split_blocks((inputs.scale * d_positive, by_row), len(rows.vectors))
    by_column = _split_blocks(by_column, len(columns.vectors))

    def scan_queries(carry, xs):
        cache, *sums = carry
        index, block, d_positive, by_row = xs
        queries_t = _transpose(block.vectors)

        def scan_tile(block_range, carry, xs):
            d_block, d_candidates, total = carry
            candidate_index, by_column = xs
            column = _select_block(columns, candidate_index)
            if block_range.storage != "recompute":
                logits = logit_cache.load(cache, block_range, index, candidate_index, inputs.scale)
            else:
                logits = _masked_logits(settings, inputs.scale, queries_t, block.info, column)
            d_logits = dlogits_fn(logits, by_row, by_column)
            total += jnp.sum(d_logits)
            # XLA computes a sum once for all of its uses, and other simple operations again for each use.
            d_logits += jnp.where(_is_own_positive(block.info, column.info), d_positive, 0.0)
            d_block += _matmul(_transpose(d_logits), column.vectors)
            updated = d_candidates[candidate_index] + _matmul(d_logits, block.vectors)
            d_candidates = jax.lax.dynamic_update_index_in_dim(d_candidates, updated, candidate_index, 0)
            return (d_block, d_candidates, total), None

        sums = (_pcast_varying(settings, jnp.zeros(block.vectors.shape)), *sums)
        # Recomputed ranges come first: their temporaries are then not in memory together with those of cached ranges.
        for block_range in reversed(_plan_ranges(settings, rows, columns)):
            sums, _ = _scan_range(scan_tile, sums, block_range, by_column)
        d_block, *sums = sums
        return (logit_cache.write_gradients(cache, index, d_block), *sums), None

    sums = (_pcast_varying(settings, jnp.zeros(shape)) for shape in (columns.vectors.shape, ()))
    xs = jnp.arange(len(rows.vectors)), rows, d_positive, by_row
    (cache, d_candidates, total), _ = jax.lax.scan(scan_queries, (cache, *sums), xs)
    d_queries = cache.grad_scratch.reshape(rows.vectors.shape)
    # Σ_j d_ij <q_i, c_j> = <q_i, d_q_i>, with d_ij the cotangent of <q_i, c_j>.
    d_scale = jnp.sum(d_queries * rows.vectors) / inputs.scale
    d_queries = _merge_blocks(d_queries, len(inputs.queries))
    d_candidates = _merge_blocks(d_candidates, len(inputs.candidates))
    return LogitInputs(d_queries, d_candidates, d_scale, None, None), total


class _Blocks(NamedTuple):
    # Queries or candidates in blocks: vectors [A, T, E] or [B, U, E], and their QueryInfo or CandidateInfo.
    vectors: jax.Array
    info: Any


def _make_blocks(settings: TileConfig, inputs: LogitInputs) -> tuple[_Blocks, _Blocks]:
    # Nearly square tiles, which need the fewest additions to the gradients, with rather more queries than candidates,
    # since adding to the queries' gradients is cheaper. Rows that are not valid pad the last blocks.
    tile_size, (queries, candidates) = settings.tile_bytes // 4, map(len, inputs[:2])
    a = _num_blocks(queries, max(8, math.isqrt(2 * tile_size)))
    b = _num_blocks(candidates, max(8, tile_size // -(-queries // a)))
    query_blocks = _Blocks(*_split_blocks((inputs.queries, inputs.rows), a))
    return query_blocks, _Blocks(*_split_blocks((inputs.candidates, inputs.columns), b))


def _num_blocks(count: int, max_size: int) -> int:
    # The fewest blocks of up to `max_size`, or a few more, less than twice as many, if that number divides the count.
    least = -(-count // max_size)
    return next((number for number in range(least, 2 * least) if count % number == 0), least)


def _split_blocks(tree: Any, num_blocks: int) -> Any:
    def split(x):
        size = -(-len(x) // num_blocks)
        padded = jnp.pad(x, [(0, num_blocks * size - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return padded.reshape(num_blocks, size, *x.shape[1:])

    return jax.tree.map(split, tree)


def _merge_blocks(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], tree)


def _plan_ranges(settings: TileConfig, rows: _Blocks, columns: _Blocks) -> list[logit_cache.BlockRange]:
    num_blocks, u = columns.info.valid.shape
    max_quantized = settings.cache_bytes // (logit_cache.BYTES * rows.info.valid.size * u)
    return logit_cache.plan_cache(num_blocks, max_quantized, max_in_grad_buffer=rows.vectors.shape[2] // u)


def _scan_range(scan_tile: Callable[..., Any], carry: Any, block_range: logit_cache.BlockRange, by_column: Any) -> Any:
    start, stop = block_range.indices.start, block_range.indices.stop
    values = jax.tree.map(lambda x: x[start:stop], by_column)
    return jax.lax.scan(partial(scan_tile, block_range), carry, (jnp.arange(start, stop), values))


def _select_block(blocks: _Blocks, index: jax.Array) -> _Blocks:
    return jax.tree.map(lambda x: x[index], blocks)


def _masked_logits(
    settings: TileConfig, scale: jax.Array, queries_t: jax.Array, rows: QueryInfo, column: _Blocks
) -> jax.Array:
    # [U, T] from the transposed queries [E, T]; -inf where the pair is no negative.
    return jnp.where(_is_negative(settings, rows, column.info), scale * _matmul(column.vectors, queries_t), -jnp.inf)


def _is_negative(settings: TileConfig, rows: QueryInfo, columns: CandidateInfo) -> jax.Array:
    # bool [U, T].
    ids = columns.ids[:, None]
    negative = rows.valid & columns.valid[:, None] & ~_is_own_positive(rows, columns)
    if settings.mask:
        # Padding of `positive_ids` is -1, and so is the id of a padding candidate, which is not valid anyway. Unrolled
        # over P because a reduction would hold [U, T, P] in memory.
        matches = (rows.positive_ids[:, p] == ids for p in range(rows.positive_ids.shape[1]))
        negative &= ~functools.reduce(jnp.logical_or, matches, rows.own_id == ids)
    if settings.same_modality:
        negative &= rows.modality == columns.modality[:, None]
    return negative


def _is_own_positive(rows: QueryInfo, columns: CandidateInfo) -> jax.Array:
    # bool [U, T].
    return columns.column[:, None] == rows.own_column


def _matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _transpose(x: jax.Array) -> jax.Array:
    # On the CPU an explicit transpose before the product is faster than a product with a transposed operand.
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.optimization_barrier(x.T), default=jnp.transpose)


def _pcast_varying(settings: TileConfig, x: jax.Array) -> jax.Array:
    # A scan's carry needs one type from the start: varying over the devices.
    return jax.lax.pcast(x, settings.axes, to="varying") if settings.axes else x
