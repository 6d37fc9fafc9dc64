"""What both towers are made of: parameters named by their axes, stacked blocks, attention.

A parameter's name ends in its axis letters, so `query_dnh` is [D, N, H]; `logical_axes` reads them back for sharding.

Axes: L layers, D width, N heads, K kv heads, J = N/K query heads of a kv head, H head dim, F mlp width, V vocabulary,
P patches, S tokens (T as keys), E embedding, C any input width, I one of several projections side by side, R rank of an
adapter. "…" are leading axes, G first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jfe_jax.models.layers.matmul import matmul, scores, weighted_mean
from jfe_jax.parallel import fsdp
from jfe_jax.parallel.sharding import constrain

LOGICAL = {
    "d": "embed",
    "n": "heads",
    "k": "kv_heads",
    "h": "head_dim",
    "f": "mlp",
    "v": "vocab",
    "p": "patch",
    "s": "position",
    "c": None,
    "e": None,
    "i": None,
    "r": "rank",
    "x": None,
    "y": None,
}
# The MLP's widest product, worth most of what its memory costs.
SAVED_UP = "mlp_up"
REMAT = {
    "full": None,
    "up": jax.checkpoint_policies.save_only_these_names(SAVED_UP),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
# Up to this depth layers are unrolled: a loop saves compile time but copies what the backward pass needs.
UNROLLED_DEPTH = 8


def weight(rngs: nnx.Rngs, *shape: int, fan_in: int) -> nnx.Param:
    """Float32 parameter drawn from a normal distribution of variance 1 / fan_in."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


def zeros(*shape: int) -> nnx.Param:
    """Float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def logical_axes(params: Any) -> Any:
    """Names of every parameter's axes.

    Args:
      params: the parameter tree of `nnx.split(model)`, of arrays or of abstract shapes, as State or as plain dict.

    Returns:
      The same tree with a tuple of names (None where there is nothing to name) in place of each leaf. Stacked blocks
      have "layers" in front.
    """

    def names(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
        axes = ("layers", *_axes(path)) if _stacked(path) else _axes(path)
        if len(axes) != len(leaf.shape):
            raise ValueError(f"{'.'.join(_keys(path))} has shape {leaf.shape} but axes {axes}")
        return axes

    return jax.tree_util.tree_map_with_path(names, params)


def _keys(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]


def _stacked(path: tuple[Any, ...]) -> bool:
    return any(key in ("blocks", "fusion_blocks") for key in _keys(path))


def _weight_name(path: tuple[Any, ...]) -> str:
    return next(key for key in reversed(_keys(path)) if "_" in key)


def _axes(path: tuple[Any, ...]) -> tuple[str | None, ...]:
    # Without "layers".
    return tuple(LOGICAL[letter] for letter in _weight_name(path).rpartition("_")[2])


def count_parameters(params: Any) -> int:
    """Number of parameters of a tree of arrays or abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def embed_groups(
    model: nnx.Module, method: Callable[[Any, Any], jax.Array], packed: Any, dtype: jnp.dtype
) -> jax.Array:
    """method(model, packed); under a mesh, with every device on its own groups and gathering weights as it needs them.

    Args:
      model: its blocks' matrices and its embedding table stay split until `run_stack` and `Embedder` use them; the
        others are few and gathered at once.
      method: (model, packed) → [G, …].
      packed: PackedBatch.
      dtype: of the computation.
    """
    if not fsdp.uses_batch_axes():
        return method(model, packed)
    graphdef, params = nnx.split(model)

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        axes = _axes(path)
        if "table_vd" in _keys(path) or (_stacked(path) and len(axes) > 1):
            return leaf
        return fsdp.all_gather_param(leaf, axes, dtype, _weight_name(path), stacked=_stacked(path))

    def own(params: nnx.State, packed: Any) -> jax.Array:
        return method(nnx.merge(graphdef, jax.tree_util.tree_map_with_path(one, params)), packed)

    return fsdp.fsdp_shard_map(own, params, logical_axes(params), packed)


def stack(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs, depth: int) -> nnx.Module:
    """`depth` equal blocks as one module whose parameters have a leading axis L."""
    return nnx.vmap(make)(rngs.split(depth))


def apart(params: Any) -> Any:
    """The parameter tree with a tuple of its layers' arrays in place of each stack that runs unrolled.

    For programs that only read them: a CPU's copies every layer out of its stack at every call.
    """

    def one(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        return tuple(leaf) if _stacked(path) and len(leaf) <= UNROLLED_DEPTH else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def together(params: Any) -> Any:
    """What `apart` took apart, in a program that takes it apart again: nothing is copied."""
    return jax.tree.map(
        lambda leaf: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf, params, is_leaf=lambda x: type(x) is tuple
    )


def run_stack(
    blocks: nnx.Module,
    x: jax.Array,
    *args: Any,
    depth: int,
    remat: str,
    per_layer: tuple[jax.Array, ...] = (),
    last: Callable[[nnx.Module, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Runs stacked blocks one after the other: x = block(x, *args, *(one[l] for one in per_layer)).

    Args:
      blocks: made by `stack`.
      x: [G, …, D].
      *args: what every block gets besides, unchanged from layer to layer.
      depth: number of blocks.
      remat: what the backward pass recomputes; see `ModelConfig`.
      per_layer: arrays [L, …], of which each block gets its own.
      last: what is done with the last block and its input in place of calling it; the result is returned.
    """
    graphdef, params = nnx.split(blocks)
    if not fsdp.in_fsdp_shard_map():
        # Once a step: the loop would read float32 in the forward pass, again where it is recomputed and in the backward
        # pass, and stack float32 gradients of what it multiplied in `x`'s type.
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(x.dtype) if len(_axes(path)) > 1 else leaf, params
        )
    groups = ("group", *[None] * (x.ndim - 1))

    def block(params: nnx.State) -> nnx.Module:
        if fsdp.in_fsdp_shard_map():
            params = jax.tree_util.tree_map_with_path(
                lambda path, leaf: (
                    fsdp.all_gather_param(leaf, _axes(path), x.dtype, _weight_name(path)) if leaf.ndim > 1 else leaf
                ),
                params,
            )
        return nnx.merge(graphdef, params)

    def layer(x: jax.Array, own: tuple[nnx.State, tuple[jax.Array, ...]]) -> tuple[jax.Array, None]:
        params, extra = own
        return constrain(block(params)(x, *args, *extra), groups), None

    def final(x: jax.Array, params: nnx.State) -> jax.Array:
        return last(block(params), x)

    if remat != "none":
        layer, final = (
            jax.checkpoint(one, policy=REMAT[remat], prevent_cse=depth <= UNROLLED_DEPTH) for one in (layer, final)
        )
    unroll = depth if depth <= UNROLLED_DEPTH else 1
    if last is None:
        return jax.lax.scan(layer, x, (params, per_layer), unroll=unroll)[0]
    before = jax.tree.map(lambda leaf: leaf[:-1], (params, per_layer))
    x = jax.lax.scan(layer, x, before, unroll=unroll)[0] if depth > 1 else x
    return final(x, jax.tree.map(lambda leaf: leaf[-1], params))


class Adaptable(nnx.Module):
    """A module whose kernels may have low-rank adapters beside them (models/lora.py)."""

    lora: nnx.Module | None = None

    def project(self, x: jax.Array, name: str, inner: int = 1) -> jax.Array:
        """`project` with the kernel of this name, plus what its adapter adds if it has one."""
        y = project(x, getattr(self, name)[...], inner)
        adapter = getattr(self.lora, name.rpartition("_")[0], None)
        return y if adapter is None else y + adapter(x)


class Linear(Adaptable):
    """x [..., C] → [..., D] with a bias; parameters float32, product in x's dtype."""

    def __init__(self, c: int, d: int, rngs: nnx.Rngs):
        self.kernel_cd = weight(rngs, c, d, fan_in=c)
        self.bias_d = zeros(d)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.project(x, "kernel_cd") + self.bias_d[...].astype(x.dtype)


def project(x: jax.Array, kernel: jax.Array, inner: int = 1) -> jax.Array:
    """Contracts the last `inner` axes of x with the first `inner` axes of a kernel, as one matrix product.

    x [..., *inner axes], kernel [*inner axes, *outer axes] → [..., *outer axes] in x's dtype. Reshaping the kernel
    rather than the product keeps it a plain product of two matrices.
    """
    outer = kernel.shape[inner:]
    lead = x.shape[: x.ndim - inner]
    size = 1
    for axis in kernel.shape[:inner]:
        size *= axis
    matrix = kernel.astype(x.dtype).reshape(size, -1)
    return matmul(x.reshape(*lead, size), matrix).reshape(*lead, *outer)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """Softmax attention, grouped if there are fewer key than query heads.

    Args:
      query: [..., S, N, H].
      key, value: [..., T, K, H]; query heads n·J … n·J+J-1 share kv head n.
      bias: float32 [..., S, T], added to every head's logits; or None.
      scale: of the queries; None for H^-0.5.
      softcap: if not 0, logits become softcap · tanh(logit / softcap) before the bias.

    Returns:
      [..., S, N, H] in the dtype of `value`. Logits and softmax are float32.
    """
    *lead, s, n, h = query.shape
    t, k = key.shape[-3:-1]
    # The query heads of a kv head stand side by side with the tokens, so that all of them are one matrix [S·J, H]; with
    # one kv head (Gemma's) that is a mere reshape. Both products then take their operands as they lie.
    query = (
        (query * (h**-0.5 if scale is None else scale))
        .reshape(*lead, s, k, n // k * h)
        .swapaxes(-3, -2)
        .reshape(*lead, k, s * n // k, h)
    )
    key, value = key.swapaxes(-3, -2), value.swapaxes(-3, -2)
    logits = scores(query, key)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = (logits.reshape(*lead, k, s, n // k, t) + bias[..., None, :, None, :]).reshape(logits.shape)
    out = weighted_mean(logits, value)
    return out.reshape(*lead, k, s, n // k * h).swapaxes(-3, -2).reshape(*lead, s, n, h)
