"""Gemma's text tower, run in both directions within a segment.

Axes: G groups, R rows, S tokens of a row (T as keys), D width, N heads, K kv heads, H head dim, F mlp width,
V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jfe_jax.config import TextConfig
from jfe_jax.data.batch import AttentionBins
from jfe_jax.models.layers import attention_bins, blocks
from jfe_jax.models.layers.attention import Segments, attend
from jfe_jax.models.layers.blocks import SAVED_UP, UNROLLED_DEPTH, Adaptable, run_stack, stack, weight, zeros
from jfe_jax.parallel import fsdp
from jfe_jax.parallel.sharding import constrain

# Far below any logit, yet finite: a row of nothing else still has a softmax.
MASKED = -1e30
# Layouts of what a block computes inside.
HEADS = ("group", None, None, "heads", None)
KV_HEADS = ("group", None, None, "kv_heads", None)
MLP = ("group", None, None, "mlp")


def ends_early(depth: int) -> bool:
    """Whether a tower's last layer computes only what is asked for. In a loop over layers it would need a copy of all
    the others' weights."""
    return depth <= UNROLLED_DEPTH


def take(x: jax.Array, where: jax.Array) -> jax.Array:
    """Tokens [G, R, S, …] at the places `where` [G, B] of the flattened R·S: [G, B, 1, …]."""
    flat = x.reshape(x.shape[0], -1, *x.shape[3:])
    index = where.reshape(*where.shape, *[1] * (x.ndim - 3))
    return jnp.take_along_axis(flat, index, axis=1, mode="clip")[:, :, None]


def rows_of(x: jax.Array, where: jax.Array) -> jax.Array:
    """The rows [S, …] of [G, R, S, …] that the places `where` [G, B] of the flattened R·S lie in: [G, B, S, …]."""
    index = (where // x.shape[2]).reshape(*where.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="clip")


def before(x: jax.Array, where: jax.Array, length: int) -> jax.Array:
    """The last `length` tokens of the flattened R·S of [G, R, S, …] up to each place `where` [G, B], or the first, or
    all there are: [G, B, length, …]."""
    flat = x.reshape(x.shape[0], -1, *x.shape[3:])
    length = min(length, flat.shape[1])
    start = jnp.maximum(where + 1 - length, 0)
    one = partial(jax.lax.dynamic_slice_in_dim, slice_size=length)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(flat, start)


class Masks(NamedTuple):
    """Who attends to whom.

    Attributes:
      each: a mask as of `attention.attend` of the rows, or of each length of bins.
      bins: None if attention works on rows.
    """

    each: tuple[Any, ...]
    bins: AttentionBins | None


class RMSNorm(nnx.Module):
    """x / rms(x) · (1 + scale) in float32; the result has the input's dtype.

    The scale is kept as Gemma's files keep it, around zero: storing 1 + scale would round it.
    """

    def __init__(self, d: int, eps: float):
        self.eps = eps
        self.scale_d = zeros(d)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (1 + self.scale_d[...])).astype(x.dtype)


class GemmaAttention(Adaptable):
    """Grouped-query attention with rotary positions and no biases."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs, attention: str = "xla"):
        d, n, k, h = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.query_dnh = weight(rngs, d, n, h, fan_in=d)
        self.key_dkh = weight(rngs, d, k, h, fan_in=d)
        self.value_dkh = weight(rngs, d, k, h, fan_in=d)
        self.out_nhd = weight(rngs, n, h, d, fan_in=n * h)
        self.scale = (cfg.query_pre_attn_scalar or h) ** -0.5
        self.softcap = cfg.attn_logit_softcap
        self.how = attention

    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], masks: Masks) -> jax.Array:
        """[G, R, S, D] → [G, R, S, D]; `angles` are those of the tokens' positions."""
        query = constrain(rotate(self.project(x, "query_dnh"), *angles), HEADS)
        key = constrain(rotate(self.project(x, "key_dkh"), *angles), KV_HEADS)
        value = constrain(self.project(x, "value_dkh"), KV_HEADS)
        parts = [(x,) if masks.bins is None else attention_bins.split(x, masks.bins) for x in (query, key, value)]
        outs = [
            constrain(attend(self.how, *own, mask, self.scale, self.softcap), HEADS)
            for *own, mask in zip(*parts, masks.each, strict=True)
        ]
        out = outs[0] if masks.bins is None else constrain(attention_bins.join(outs, masks.bins), HEADS)
        return self.project(out, "out_nhd", inner=2)

    def at(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        where: jax.Array,
        around: Callable[[jax.Array], jax.Array],
        bias: jax.Array,
    ) -> jax.Array:
        """What the tokens `where` [G, B] of the flattened R·S get from those `around` them: [G, B, 1, D]."""
        query = self.project(take(x, where), "query_dnh")
        query = constrain(rotate(query, *(take(angle, where) for angle in angles)), HEADS)
        key = constrain(rotate(self.project(x, "key_dkh"), *angles), KV_HEADS)
        value = constrain(self.project(x, "value_dkh"), KV_HEADS)
        key, value = around(key), around(value)
        out = constrain(blocks.attend(query, key, value, bias, self.scale, self.softcap), HEADS)
        return self.project(out, "out_nhd", inner=2)


class GemmaBlock(Adaptable):
    """Pre-norm transformer block with a gated tanh-GELU MLP; Gemma 2's normalises what it adds as well."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs, attention: str = "xla"):
        d, f = cfg.width, cfg.mlp_dim
        self.attention_norm = RMSNorm(d, cfg.norm_eps)
        self.attention = GemmaAttention(cfg, rngs, attention)
        self.mlp_norm = RMSNorm(d, cfg.norm_eps)
        self.gate_df = weight(rngs, d, f, fan_in=d)
        self.up_df = weight(rngs, d, f, fan_in=d)
        self.down_fd = weight(rngs, f, d, fan_in=f)
        self.attention_post_norm = RMSNorm(d, cfg.norm_eps) if cfg.post_norms else None
        self.mlp_post_norm = RMSNorm(d, cfg.norm_eps) if cfg.post_norms else None

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        masks: Masks,
        near_masks: Masks | None = None,
        near: jax.Array | None = None,
    ) -> jax.Array:
        """[G, R, S, D] → [G, R, S, D]; where the bool `near` is true, `near_masks` take the place of `masks`."""
        if near is not None:
            masks = masks._replace(each=tuple(map(partial(_chosen, near), near_masks.each, masks.each)))
        return self._added(x, self.attention(self.attention_norm(x), angles, masks))

    def at(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], where: jax.Array, *seen: Any) -> jax.Array:
        """Only of the tokens `where`, see `GemmaAttention.at`: [G, B, 1, D]."""
        return self._added(take(x, where), self.attention.at(self.attention_norm(x), angles, where, *seen))

    def _added(self, x: jax.Array, y: jax.Array) -> jax.Array:
        # x and attention's y, then the MLP.
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp_norm(x)
        gate = jax.nn.gelu(self.project(y, "gate_df"), approximate=True)
        up = checkpoint_name(self.project(y, "up_df"), SAVED_UP)
        hidden = constrain(gate * up, MLP)
        y = self.project(hidden, "down_fd")
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))


def _chosen(near: jax.Array, near_mask: Any, mask: Any) -> Any:
    return mask._replace(near=near) if isinstance(mask, Segments) else jnp.where(near, near_mask, mask)


class GemmaTower(nnx.Module):
    """Embedded tokens [G, R, S, D] → hidden states [G, R, S, D] after the final norm.

    Also runs the feature-fusion layers of the late-fusion baseline, with another depth.
    """

    def __init__(self, cfg: TextConfig, remat: str, rngs: nnx.Rngs, depth: int | None = None, attention: str = "xla"):
        self.cfg, self.remat, self.how = cfg, remat, attention
        self.depth = cfg.depth if depth is None else depth
        self.blocks = stack(lambda rngs: GemmaBlock(cfg, rngs, attention), rngs, self.depth)
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)

    @jax.named_scope("tower")
    def __call__(
        self,
        x: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        where: jax.Array | None = None,
        within: AttentionBins | None = None,
    ) -> jax.Array:
        """Runs the blocks.

        Args:
          x: [G, R, S, D] in the compute dtype.
          segments: int32 [G, R, S]; a token attends to the tokens of its own number, in both directions.
          positions: int32 [G, R, S], from 0; PaliGemma counts from 1.
          where: int32 [G, B], places in the flattened R·S, with `within` of items' last tokens. If given, only their
            states [G, B, D] are returned, and the last of a few layers computes no others: their queries and MLP, of
            all tokens only key and value.
          within: bins that attention works on; None for rows.
        """
        # No item is longer.
        length = x.shape[2] if within is None else attention_bins.longest(within)
        # Looked up: on the CPU, XLA would compute sines and cosines again for every head of every layer.
        table = rotary_angles(jnp.arange(1, length + 1), self.cfg.head_dim, self.cfg.rope_theta, x.dtype)
        angles = tuple(jnp.take(each, positions, axis=0, mode="clip") for each in table)
        window = self.cfg.sliding_window
        # A window that no row is longer than hides nothing.
        windowed = 0 < window < length - 1
        masks, near_masks = self._masks(segments, positions, windowed, within)
        near = (jnp.arange(self.depth) % 2 == 0,) if windowed else ()
        last = None
        if where is not None and ends_early(self.depth):
            around = partial(rows_of, where=where) if within is None else partial(before, where=where, length=length)
            seen = around(segments) == take(segments, where)
            if windowed and self.depth % 2:
                seen &= jnp.abs(around(positions) - take(positions, where)) <= window
            nearby = jnp.where(seen, 0.0, MASKED)[:, :, None]

            def last(block: nnx.Module, x: jax.Array) -> jax.Array:
                return block.at(x, angles, where, around, nearby)

        masks = (masks, near_masks) if windowed else (masks,)
        x = run_stack(self.blocks, x, angles, *masks, depth=self.depth, remat=self.remat, per_layer=near, last=last)
        if where is None:
            return self.norm(x)
        return self.norm(x if last else take(x, where))[:, :, 0]

    def _masks(
        self, segments: jax.Array, positions: jax.Array, windowed: bool, within: AttentionBins | None
    ) -> tuple[Masks, Masks | None]:
        # Padding attends to padding: no row is empty, and no item sees it.
        window = self.cfg.sliding_window
        ids = (segments,) if within is None else attention_bins.split_ids(segments, within)
        if self.how == "splash":
            masks = Masks(tuple(Segments(own, window if windowed else 0, None) for own in ids), within)
            return masks, masks
        biases = tuple(jnp.where(own[..., :, None] == own[..., None, :], 0.0, MASKED) for own in ids)
        if not windowed:
            return Masks(biases, within), None
        places = (positions,) if within is None else attention_bins.split_ids(positions, within)
        distances = (jnp.abs(own[..., :, None] - own[..., None, :]) for own in places)
        near = (jnp.where(far <= window, bias, MASKED) for far, bias in zip(distances, biases, strict=True))
        return Masks(biases, within), Masks(tuple(near), within)


class Embedder(nnx.Module):
    """Token embeddings, scaled by sqrt(D)."""

    def __init__(self, cfg: TextConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.table_vd = weight(rngs, cfg.vocab_size, cfg.width, fan_in=cfg.width)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [G, R, S] → [G, R, S, D]; ids past the vocabulary (an image placeholder may be) give its last row."""
        if fsdp.in_fsdp_shard_map():
            x = fsdp.sharded_embedding_lookup(self.table_vd[...], tokens, self.dtype)
        else:
            x = jnp.take(self.table_vd[...], tokens, axis=0, mode="clip").astype(self.dtype)
        return x * jnp.asarray(x.shape[-1] ** 0.5, self.dtype)


def rotary_angles(positions: jax.Array, h: int, theta: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """int [..., S] → cosine and sine [..., S, 1, H/2] of the split-half rotation."""
    frequency = 1 / theta ** (jnp.arange(0, h, 2, dtype=jnp.float32) / h)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotates the halves of x [..., S, N, H] by the angles of `rotary_angles`."""
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)
