"""SigLIP's vision transformer: uint8 images → one feature per patch. No pooling head, as in PaliGemma.

Its blocks are those of the dual encoders' towers too, of images and of texts.

Axes: G groups, M image slots, P patches, D width, N heads, H head dim, F mlp width; y, x pixels of a patch, c colours.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jfe_jax.config import TextConfig, VisionConfig
from jfe_jax.models.layers.attention import attend
from jfe_jax.models.layers.blocks import Adaptable, project, run_stack, stack, weight, zeros
from jfe_jax.models.layers.matmul import settled
from jfe_jax.parallel.sharding import constrain

# Layouts of what a block computes inside.
HEADS = ("group", None, None, "heads", None)
MLP = ("group", None, None, "mlp")


ACTIVATIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class LayerNorm(nnx.Module):
    """Over the last axis, in float32; the result has the input's dtype."""

    def __init__(self, d: int, eps: float):
        self.eps = eps
        self.scale_d = nnx.Param(jnp.ones(d, jnp.float32))
        self.bias_d = zeros(d)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale_d[...] + self.bias_d[...]).astype(x.dtype)


class VisionAttention(Adaptable):
    """Every patch attends to every patch of its image; all projections have biases."""

    def __init__(self, cfg: VisionConfig | TextConfig, rngs: nnx.Rngs, attention: str = "xla"):
        d, n = cfg.width, cfg.num_heads
        h = d // n
        self.query_dnh, self.key_dnh, self.value_dnh = (weight(rngs, d, n, h, fan_in=d) for _ in range(3))
        self.query_bias_nh, self.key_bias_nh, self.value_bias_nh = (zeros(n, h) for _ in range(3))
        self.out_nhd = weight(rngs, n, h, d, fan_in=d)
        self.out_bias_d = zeros(d)
        # SigLIP's heads are of 64 and 72: none that splash attention could split.
        self.how = "xla" if attention == "splash" else attention
        self.scale = h**-0.5

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """[G, M, P, D] → [G, M, P, D]; `bias` as in `layers.attend`."""
        query = self.project(x, "query_dnh") + self.query_bias_nh[...].astype(x.dtype)
        key = self.project(x, "key_dnh") + self.key_bias_nh[...].astype(x.dtype)
        value = self.project(x, "value_dnh") + self.value_bias_nh[...].astype(x.dtype)
        query, key, value = (constrain(heads, HEADS) for heads in (query, key, value))
        out = constrain(attend(self.how, query, key, value, bias, self.scale), HEADS)
        return self.project(out, "out_nhd", inner=2) + self.out_bias_d[...].astype(x.dtype)


class VisionBlock(Adaptable):
    """Pre-norm transformer block."""

    def __init__(self, cfg: VisionConfig | TextConfig, rngs: nnx.Rngs, attention: str = "xla"):
        self.activation = cfg.activation
        d, f = cfg.width, cfg.mlp_dim
        self.attention_norm = LayerNorm(d, cfg.norm_eps)
        self.attention = VisionAttention(cfg, rngs, attention)
        self.mlp_norm = LayerNorm(d, cfg.norm_eps)
        self.up_df = weight(rngs, d, f, fan_in=d)
        self.up_bias_f = zeros(f)
        self.down_fd = weight(rngs, f, d, fan_in=f)
        self.down_bias_d = zeros(d)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """[G, M, P, D] → [G, M, P, D]; `bias` as in `layers.attend`."""
        x = x + self.attention(self.attention_norm(x), bias)
        hidden = self.project(self.mlp_norm(x), "up_df") + self.up_bias_f[...].astype(x.dtype)
        hidden = constrain(ACTIVATIONS[self.activation](hidden), MLP)
        return x + self.project(hidden, "down_fd") + self.down_bias_d[...].astype(x.dtype)


class VisionTower(nnx.Module):
    """pixels uint8 [G, M, H, W, 3] → features [G, M, P, D] in `dtype`, patches row by row."""

    def __init__(self, cfg: VisionConfig, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs, attention: str = "xla"):
        self.cfg, self.dtype, self.remat = cfg, dtype, remat
        side, d = cfg.patch_size, cfg.width
        self.patch_yxcd = weight(rngs, side, side, 3, d, fan_in=side * side * 3)
        self.patch_bias_d = zeros(d)
        self.position_pd = weight(rngs, cfg.patches, d, fan_in=d)
        self.blocks = stack(lambda rngs: VisionBlock(cfg, rngs, attention), rngs, cfg.depth)
        self.norm = LayerNorm(d, cfg.norm_eps)

    @jax.named_scope("vision")
    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = embed_patches(pixels, self.patch_yxcd[...], self.cfg, self.dtype)
        # Its gradient is summed over patches, over images, and multiplied.
        x = settled(x + self.patch_bias_d[...].astype(self.dtype) + self.position_pd[...].astype(self.dtype))
        x = run_stack(self.blocks, x, depth=self.cfg.depth, remat=self.remat)
        return self.norm(x)


def embed_patches(pixels: jax.Array, kernel_yxcd: jax.Array, cfg: VisionConfig, dtype: jnp.dtype) -> jax.Array:
    """uint8 [G, M, H, W, 3] → [G, M, P, D] in `dtype`: each patch's pixels times the kernel, no bias.

    Pixels are normalised in float32, as the image processor's (x / 255 - mean) / std.
    """

    def embed(patches: jax.Array, kernel: jax.Array) -> jax.Array:
        mean, std = (jnp.tile(jnp.asarray(each, jnp.float32), cfg.patch_size**2) for each in (cfg.mean, cfg.std))
        return project(((patches.astype(jnp.float32) / 255 - mean) / std).astype(dtype), kernel)

    patches, kernel = _patches(pixels, cfg.patch_size), kernel_yxcd.reshape(-1, kernel_yxcd.shape[-1])
    if dtype == jnp.float32:
        return embed(patches, kernel)
    # Laid out once, as bytes; the backward pass normalises again rather than keep or move them wider: on TPU, the move
    # takes the compiler minutes.
    return jax.checkpoint(embed)(jax.lax.optimization_barrier(patches), kernel)


def _patches(pixels: jax.Array, side: int) -> jax.Array:
    """[G, M, H, W, 3] → [G, M, P, side·side·3]; moved while still uint8, a quarter of the bytes."""
    g, m, height, width, colours = pixels.shape
    rows, columns = height // side, width // side
    grid = pixels[:, :, : rows * side, : columns * side].reshape(g, m, rows, side, columns, side * colours)
    return grid.transpose(0, 1, 2, 4, 3, 5).reshape(g, m, rows * columns, side * side * colours)
