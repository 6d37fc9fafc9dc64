"""SigLIP's and CLIP's dual encoders: a text tower and an image tower, whose embeddings are summed.

The late-fusion baseline that starts from published weights. In a PackedBatch a row holds the texts alone; an image has
its slot, and `image_start` says whose it is. An item without text is one placeholder token.

Axes: G groups, R rows, S tokens of a row, M image slots, P patches, D width, N heads, H head dim, F mlp width, B items,
E embedding, I query, key and value.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jfe_jax.config import ModelConfig, TextConfig, VisionConfig
from jfe_jax.data.batch import PackedBatch
from jfe_jax.models.heads.pooling import in_span, pool, unit
from jfe_jax.models.layers.blocks import Linear, attend, project, run_stack, stack, weight, zeros
from jfe_jax.models.paligemma.gemma import MASKED
from jfe_jax.models.paligemma.siglip_vision import ACTIVATIONS, LayerNorm, VisionBlock, VisionTower, embed_patches


class TextTower(nnx.Module):
    """Token ids → hidden states [G, R, S, D] after the final norm; learned positions, SigLIP's blocks."""

    def __init__(self, cfg: TextConfig, causal: bool, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs):
        self.cfg, self.causal, self.dtype, self.remat = cfg, causal, dtype, remat
        self.table_vd = weight(rngs, cfg.vocab_size, cfg.width, fan_in=cfg.width)
        self.position_sd = weight(rngs, cfg.positions, cfg.width, fan_in=cfg.width)
        self.blocks = stack(lambda rngs: VisionBlock(cfg, rngs), rngs, cfg.depth)
        self.norm = LayerNorm(cfg.width, cfg.norm_eps)

    def __call__(self, tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        """int32 [G, R, S] each; a token attends within its segment, if causal to what is not after it."""
        x = jnp.take(self.table_vd[...], tokens, axis=0, mode="clip").astype(self.dtype)
        x = x + jnp.take(self.position_sd[...], positions, axis=0, mode="clip").astype(self.dtype)
        seen = segments[..., :, None] == segments[..., None, :]
        if self.causal:
            seen &= jnp.tri(tokens.shape[-1], dtype=bool)
        bias = jnp.where(seen, 0.0, MASKED)
        return self.norm(run_stack(self.blocks, x, bias, depth=self.cfg.depth, remat=self.remat))


class ClipVisionTower(nnx.Module):
    """pixels uint8 [G, M, H, W, 3] → hidden states [G, M, 1 + P, D] in `dtype`: the class token, then the patches.

    The last norm is for the class token alone, so it is left to `DualEncoder`.
    """

    def __init__(self, cfg: VisionConfig, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs):
        self.cfg, self.dtype, self.remat = cfg, dtype, remat
        side, d = cfg.patch_size, cfg.width
        self.class_d = weight(rngs, d, fan_in=d)
        self.patch_yxcd = weight(rngs, side, side, 3, d, fan_in=side * side * 3)
        self.position_pd = weight(rngs, 1 + cfg.patches, d, fan_in=d)
        self.first_norm = LayerNorm(d, cfg.norm_eps)
        self.blocks = stack(lambda rngs: VisionBlock(cfg, rngs), rngs, cfg.depth)
        self.norm = LayerNorm(d, cfg.norm_eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = embed_patches(pixels, self.patch_yxcd[...], self.cfg, self.dtype)
        first = jnp.broadcast_to(self.class_d[...].astype(self.dtype), (*x.shape[:2], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=2) + self.position_pd[...].astype(self.dtype)
        return run_stack(self.blocks, self.first_norm(x), depth=self.cfg.depth, remat=self.remat)


class AttentionHead(nnx.Module):
    """SigLIP's pooling: a learnt probe attends to the patches, then an MLP. [G, M, P, D] → [G, M, D].

    (Multihead attention pooling: Zhai et al. 2022, "Scaling Vision Transformers", section 3.)
    """

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        self.activation = cfg.activation
        d, n, f = cfg.width, cfg.num_heads, cfg.mlp_dim
        # Leading ones, as in the files.
        self.probe_eed = weight(rngs, 1, 1, d, fan_in=d)
        self.in_dinh = weight(rngs, d, 3, n, d // n, fan_in=d)
        self.in_bias_inh = zeros(3, n, d // n)
        self.out_nhd = weight(rngs, n, d // n, d, fan_in=d)
        self.out_bias_d = zeros(d)
        self.norm = LayerNorm(d, cfg.norm_eps)
        self.up_df = weight(rngs, d, f, fan_in=d)
        self.up_bias_f = zeros(f)
        self.down_fd = weight(rngs, f, d, fan_in=f)
        self.down_bias_d = zeros(d)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.in_dinh[...], self.in_bias_inh[...].astype(x.dtype)
        probe = jnp.broadcast_to(self.probe_eed[...].astype(x.dtype), (*x.shape[:2], 1, x.shape[-1]))
        query = project(probe, kernel[:, 0]) + bias[0]
        key, value = (project(x, kernel[:, i]) + bias[i] for i in (1, 2))
        x = attend(query, key, value, bias=None)[..., 0, :, :]
        x = project(x, self.out_nhd[...], inner=2) + self.out_bias_d[...].astype(x.dtype)
        y = project(self.norm(x), self.up_df[...]) + self.up_bias_f[...].astype(x.dtype)
        y = ACTIVATIONS[self.activation](y)
        return x + project(y, self.down_fd[...]) + self.down_bias_d[...].astype(x.dtype)


class DualEncoder(nnx.Module):
    """Packed items → unit vectors, float32 [G, B, E].

    An item's vector is the sum of its text's and its image's embedding as the towers give them, without a norm of their
    own, scaled to unit norm in the end (UniIR's CLIP_SF, and `two_tower`'s "score"); of an item with one of the two, it
    is that one.

    `logit_scale_…` and `logit_bias_…` are in the files beside the towers; no embedding depends on them.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, e = jnp.dtype(cfg.dtype), cfg.embed_dim or cfg.vision.width
        clip = cfg.family == "clip"
        self.vision = (ClipVisionTower if clip else VisionTower)(cfg.vision, dtype, cfg.remat, rngs)
        self.text = TextTower(cfg.text, clip, dtype, cfg.remat, rngs)
        if clip:
            self.image_projection_de = weight(rngs, cfg.vision.width, e, fan_in=cfg.vision.width)
            self.text_projection_de = weight(rngs, cfg.text.width, e, fan_in=cfg.text.width)
            self.logit_scale_ = nnx.Param(jnp.asarray(2.6592, jnp.float32))
        else:
            self.image_head = AttentionHead(cfg.vision, rngs)
            self.text_head = Linear(cfg.text.width, e, rngs)
            self.logit_scale_e, self.logit_bias_e = zeros(1), zeros(1)

    def __call__(self, packed: PackedBatch) -> jax.Array:
        return unit(self.embed(packed))

    def embed(self, packed: PackedBatch) -> jax.Array:
        """Embeddings before the norm, float32 [G, B, E]."""
        texts = self.text_embeddings(self.text_states(packed), packed)
        return self.combine(texts, self.image_embeddings(self.image_states(packed.pixels)), packed)

    def combine(self, texts: jax.Array, images: jax.Array, packed: PackedBatch) -> jax.Array:
        """The texts' embeddings [G, B, E] plus those of the image slots [G, M, E], where they belong: [G, B, E]."""
        owner = in_span(packed.image_start, packed.pool_span)
        images = jnp.einsum("gbm,gme->gbe", owner.astype(jnp.float32), images, precision=jax.lax.Precision.HIGHEST)
        # Any text is longer than the placeholder.
        length = packed.pool_span[..., 1] - packed.pool_span[..., 0]
        wordless = jnp.any(owner, axis=-1) & (length == 1)
        return images + jnp.where(wordless[..., None], 0.0, texts)

    def text_states(self, packed: PackedBatch) -> jax.Array:
        """Last hidden states of the text tower, [G, R, S, D] in the compute dtype."""
        return self.text(packed.tokens, packed.segments, packed.positions)

    def image_states(self, pixels: jax.Array) -> jax.Array:
        """Last hidden states of the image tower, [G, M, P, D] (CLIP: 1 + P, before the norm) in the compute dtype."""
        return self.vision(pixels)

    def text_embeddings(self, states: jax.Array, packed: PackedBatch) -> jax.Array:
        """Pooled and projected, float32 [G, B, E]."""
        pooled = pool(states, packed, self.cfg.pooling).astype(states.dtype)
        if self.cfg.family == "clip":
            return project(pooled, self.text_projection_de[...]).astype(jnp.float32)
        return self.text_head(pooled).astype(jnp.float32)

    def image_embeddings(self, states: jax.Array) -> jax.Array:
        """Pooled and projected, float32 [G, M, E]."""
        if self.cfg.family == "clip":
            return project(self.vision.norm(states[..., 0, :]), self.image_projection_de[...]).astype(jnp.float32)
        return self.image_head(states).astype(jnp.float32)


def dual_logits(params: dict[str, Any]) -> dict[str, jax.Array]:
    """What a dual encoder's weights say of the loss that they were trained with, float32 scalars.

    Args:
      params: the parameters as a plain dict.

    Returns:
      "log_inverse_temperature", and SigLIP's "bias".
    """
    names = {"logit_scale_": "log_inverse_temperature", "logit_scale_e": "log_inverse_temperature"}
    names["logit_bias_e"] = "bias"
    return {ours: params[name].reshape(()) for name, ours in names.items() if name in params}
