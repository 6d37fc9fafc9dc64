"""The late-fusion baseline: an image tower and a text tower that meet only at, or near, the embedding.

It has the same blocks as the fusion model and takes the same batch. The placeholders of an image are no text: the text
tower's words do not attend to them.

Axes: G groups, R rows, S tokens of a row, M image slots, P patches, D width, N heads, H head dim, B items, E embedding.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jfe_jax.config import ModelConfig, VisionConfig
from jfe_jax.data.batch import PackedBatch
from jfe_jax.models.heads.pooling import in_span, pool, unit
from jfe_jax.models.layers.blocks import Linear, embed_groups, weight, zeros
from jfe_jax.models.paligemma.gemma import Embedder, GemmaTower
from jfe_jax.models.paligemma.model import place
from jfe_jax.models.paligemma.siglip_vision import LayerNorm, VisionTower


class AttentionPool(nnx.Module):
    """Patches [..., P, D] → one vector [..., E]: each head takes its own weighted mean. Starts as the plain mean.

    One learnt query per head stands for query and key projection together: with a fixed query they are one vector.
    """

    def __init__(self, cfg: VisionConfig, e: int, rngs: nnx.Rngs):
        d, n = cfg.width, cfg.num_heads
        self.probe_dn = zeros(d, n)
        self.value_dnh = weight(rngs, d, n, d // n, fan_in=d)
        self.norm = LayerNorm(d, cfg.norm_eps)
        self.projection = Linear(d, e, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = jnp.einsum(
            "...pd,dn->...pn", x, self.probe_dn[...].astype(x.dtype), preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(logits, axis=-2).astype(x.dtype)
        # Mean first, value projection after: N vectors to project instead of P.
        mean = jnp.einsum("...pn,...pd->...nd", weights, x)
        heads = jnp.einsum("...nd,dnh->...nh", mean, self.value_dnh[...].astype(x.dtype))
        return self.projection(self.norm(heads.reshape(*heads.shape[:-2], x.shape[-1])))


class TwoTowerEncoder(nnx.Module):
    """Packed items → unit vectors, float32 [G, B, E].

    "score": the sum of the two towers' embeddings, as UniIR's CLIP_SF; an item with only a text or only an image has
    that tower's embedding alone. "feature": `fusion_depth` layers over all output tokens of both towers, then pooled,
    as UniIR's CLIP_FF.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, d = jnp.dtype(cfg.dtype), cfg.text.width
        e = cfg.embed_dim or d
        self.vision = VisionTower(cfg.vision, dtype, cfg.remat, rngs, cfg.attention)
        self.embedder = Embedder(cfg.text, dtype, rngs)
        self.tower = GemmaTower(cfg.text, cfg.remat, rngs, attention=cfg.attention)
        if cfg.fusion == "score":
            self.image_pool = AttentionPool(cfg.vision, e, rngs)
        else:
            self.projector = Linear(cfg.vision.width, d, rngs)
            self.image_mark_d, self.text_mark_d = zeros(d), zeros(d)
            self.fusion = GemmaTower(cfg.text, cfg.remat, rngs, depth=cfg.fusion_depth, attention=cfg.attention)
        self.projection = Linear(d, e, rngs)

    def __call__(self, packed: PackedBatch) -> jax.Array:
        return unit(embed_groups(self, TwoTowerEncoder.embed, packed, jnp.dtype(self.cfg.dtype)))

    def embed(self, packed: PackedBatch) -> jax.Array:
        """Embeddings before the norm, float32 [G, B, E]."""
        placeholder = packed.tokens == self.cfg.image_token
        words = jnp.where(placeholder, 0, packed.segments)
        text = self.tower(self.embedder(packed.tokens), words, packed.positions, within=packed.bins)
        patches = self.vision(packed.pixels)
        if self.cfg.fusion == "score":
            return self._sum(text, patches, placeholder, packed)
        mark = jnp.where(placeholder[..., None], self.image_mark_d[...], self.text_mark_d[...]).astype(text.dtype)
        tokens = place(self.projector(patches), text, packed.image_start) + mark
        fused = self.fusion(tokens, packed.segments, packed.positions, within=packed.bins)
        return self.projection(pool(fused, packed, self.cfg.pooling))

    def _sum(self, text: jax.Array, patches: jax.Array, placeholder: jax.Array, packed: PackedBatch) -> jax.Array:
        texts = self.projection(pool(text, packed, self.cfg.pooling, mask=~placeholder))
        owner = in_span(packed.image_start, packed.pool_span)
        images = jnp.einsum("gbm,gme->gbe", owner.astype(jnp.float32), self.image_pool(patches).astype(jnp.float32))
        # What an item has besides its patches: only the template's own tokens if nobody wrote anything.
        count = jnp.sum(owner, axis=-1)
        length = packed.pool_span[..., 1] - packed.pool_span[..., 0] - count * self.cfg.vision.patches
        wordless = (count > 0) & (length <= self.cfg.template_tokens)
        return images + jnp.where(wordless[..., None], 0.0, texts)
