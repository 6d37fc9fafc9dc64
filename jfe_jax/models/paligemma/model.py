"""JFE, the joint fusion encoder: image patches and text tokens meet in one tower from its first layer on.

Axes: G groups, R rows, S tokens of a row, M image slots, P patches, D width, B items.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.data.batch import PackedBatch
from jfe_jax.models.heads.pooling import pool, unit
from jfe_jax.models.layers.blocks import Linear, embed_groups
from jfe_jax.models.paligemma.gemma import Embedder, GemmaTower
from jfe_jax.models.paligemma.siglip_vision import VisionTower
from jfe_jax.parallel.sharding import constrain


class FusionEncoder(nnx.Module):
    """PaliGemma without its logits: packed items → unit vectors, float32 [G, B, D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype)
        self.vision = VisionTower(cfg.vision, dtype, cfg.remat, rngs, cfg.attention)
        self.projector = Linear(cfg.vision.width, cfg.text.width, rngs)
        self.embedder = Embedder(cfg.text, dtype, rngs)
        self.tower = GemmaTower(cfg.text, cfg.remat, rngs, attention=cfg.attention)

    def __call__(self, packed: PackedBatch) -> jax.Array:
        return embed_groups(self, FusionEncoder._embed, packed, jnp.dtype(self.cfg.dtype))

    def _embed(self, packed: PackedBatch) -> jax.Array:
        if self.cfg.pooling == "last":
            return unit(self._run(packed, packed.pool).astype(jnp.float32))
        return unit(pool(self.hidden(packed), packed, self.cfg.pooling))

    def hidden(self, packed: PackedBatch) -> jax.Array:
        """Hidden state of every token after the final norm, [G, R, S, D] in the compute dtype."""
        return self._run(packed)

    def _run(self, packed: PackedBatch, where: jax.Array | None = None) -> jax.Array:
        x = self.embedder(packed.tokens)
        if packed.pixels.shape[1]:
            x = place(self.projector(self.vision(packed.pixels)), x, packed.image_start)
        return self.tower(x, packed.segments, packed.positions, where, packed.bins)


def place(features: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
    """Writes each image's features over its run of placeholders.

    Args:
      features: [G, M, P, D].
      x: [G, R, S, D], embedded tokens.
      start: int32 [G, M], where the run starts in the group's flattened R·S; out of range for an empty slot.

    Returns:
      [G, R, S, D]. Batched over G, so that nothing crosses a device that holds whole groups.
    """
    g, r, s, d = x.shape
    if features.shape[2] > r * s:
        # Rows too short for a single image hold none.
        return x
    window = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )

    def one_group(features: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.scatter(
            x,
            start[:, None],
            features,
            window,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )

    placed = jax.vmap(one_group)(features, x.reshape(g, r * s, d), start).reshape(g, r, s, d)
    return constrain(placed, ("group", None, None, None))
