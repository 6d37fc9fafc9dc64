"""Ways to attend within segments, by name: "xla" (`layers.attend`), "cudnn" (GPU), "splash" (Pallas, TPU).

Axes: G groups, R rows, S tokens of a row, N heads, K kv heads, H head dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from jfe_jax.config import ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.models.layers import blocks
from jfe_jax.parallel.shard_kernel import shard_kernel
from jfe_jax.parallel.sharding import activation_spec

# The lanes of a TPU's vector unit: rows are split into blocks of a multiple of it.
LANES = 128
LONGEST_BLOCK = 1024


class Segments(NamedTuple):
    """What splash attention takes in place of a bias: it makes the mask itself.

    Attributes:
      ids: int32 [G, R, S]; tokens attend to those of their own number.
      window: and at most so many tokens away; 0 for any distance.
      near: bool scalar, whether the window counts; None: it does not.
    """

    ids: jax.Array
    window: int
    near: jax.Array | None


def check(cfg: ModelConfig, supported: tuple[str, ...]) -> None:
    """Raises UserError if the backbone does not support `cfg.attention`, or that cannot do what the model needs."""
    text = cfg.text
    h, patch_h = text.head_dim, cfg.vision.width // cfg.vision.num_heads
    conditions = {
        "cudnn": (
            (not text.attn_logit_softcap, "has no soft-cap, which model.text.attn_logit_softcap asks for"),
            (cfg.dtype == "bfloat16", f"needs model.dtype bfloat16, not {cfg.dtype}"),
            (h % 8 == 0 and h <= 256, f"needs model.text.head_dim to be a multiple of 8 up to 256, not {h}"),
            (
                patch_h % 8 == 0 and patch_h <= 256,
                f"needs model.vision.width / num_heads to be a multiple of 8 up to 256, not {patch_h}",
            ),
        ),
        "splash": ((h % LANES == 0, f"needs model.text.head_dim to be a multiple of {LANES}, not {h}"),),
    }
    for holds, problem in conditions.get(cfg.attention, ()):
        if not holds:
            raise UserError(f"model.attention: {cfg.attention} {problem}; take xla")
    if cfg.attention not in supported:
        raise UserError(f"model.attention: this backbone has {' and '.join(supported)} only, not {cfg.attention}")


def attend(
    how: str, query: jax.Array, key: jax.Array, value: jax.Array, mask: Any, scale: float, softcap: float = 0.0
) -> jax.Array:
    """Attention as of `layers.attend`, one way or the other.

    Args:
      how: "xla", "cudnn" or "splash".
      query: [G, R, S, N, H].
      key, value: [G, R, S, K, H].
      mask: for "splash" Segments, else a bias float32 [G, R, S, S], 0 or far below any logit, or None.
      scale, softcap: see `layers.attend`.
    """
    if how == "splash":
        return _splash(query, key, value, mask, scale, softcap)
    if how == "cudnn":
        return dot_product(query, key, value, mask, scale, "cudnn")
    return blocks.attend(query, key, value, mask, scale, softcap)


def dot_product(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, scale: float, implementation: str
) -> jax.Array:
    """`jax.nn.dot_product_attention` over rows; see `attend`."""
    groups, rows = query.shape[:2]
    flat = (x.reshape(groups * rows, *x.shape[2:]) for x in (query, key, value))
    seen = None if bias is None else (bias == 0).reshape(groups * rows, 1, *bias.shape[2:])
    out = jax.nn.dot_product_attention(*flat, mask=seen, scale=scale, implementation=implementation)
    return out.reshape(query.shape)


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Segments, scale: float, softcap: float
) -> jax.Array:
    length = query.shape[2]
    if length % LANES:
        raise UserError(
            f"model.attention: splash needs data.row_tokens, or data.bins, to be multiples of {LANES}, not {length}"
        )
    query = query * scale
    if mask.near is None:
        return _on_device(0, softcap, query, key, value, mask.ids)
    ways = (partial(_on_device, window, softcap) for window in (mask.window, 0))
    return jax.lax.cond(mask.near, *ways, query, key, value, mask.ids)


def _on_device(window: int, softcap: float, *args: jax.Array) -> jax.Array:
    # Interpreted where there is no TPU: slow, for tests. The program is chosen for what it is compiled for.
    def run(interpret: bool, *args: jax.Array) -> jax.Array:
        return _rows(window, softcap, interpret, *args)

    def choose(*args: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(*args, tpu=partial(run, False), default=partial(run, True))

    heads = ("group", None, None, "heads", None)
    kv_heads = ("group", None, None, "kv_heads", None)
    split = [activation_spec(axes, x.shape) for axes, x in zip((heads, kv_heads), args, strict=False)]
    if split[0] and split[0][3] and not split[1][3] and args[1].shape[3] > 1:
        raise UserError(
            f"model.attention: splash needs mesh.tensor to divide model.text.num_kv_heads, {args[1].shape[3]}; take xla"
        )
    # The compiler cannot split a kernel: every device runs it on its own groups and heads.
    return shard_kernel(choose, (heads, kv_heads, kv_heads, ("group", None, None)), heads)(*args)


def _rows(
    window: int, softcap: float, interpret: bool, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query.shape[2:4]
    block = max(size for size in range(LANES, LONGEST_BLOCK + 1, LANES) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    shape = (length, length)
    # A segment's tokens lie side by side, so that their distance in the row is that of their positions.
    one = masks.LocalMask(shape, (window, window), 0) if window else masks.FullMask(shape)
    single = key.shape[3] == 1
    kernel = (splash.make_splash_mqa_single_device if single else splash.make_splash_mha_single_device)(
        masks.MultiHeadMask([one] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )

    def row(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        query, key, value = (x.swapaxes(0, 1) for x in (query, key, value))
        if single:
            key, value = key[0], value[0]
        return kernel(query, key, value, segment_ids=splash.SegmentIds(ids, ids)).swapaxes(0, 1)

    return jax.vmap(jax.vmap(row))(query, key, value, ids).astype(value.dtype)
