"""Every way to attend gives what `layers.attend` gives; what one cannot do is refused by name.

Splash runs interpreted here. cuDNN needs a GPU: of it the call is tested with XLA behind it, and itself where one is.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jfe_jax.config import MeshConfig, TextConfig
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.errors import UserError
from jfe_jax.models.layers import attention, blocks
from jfe_jax.models.layers.attention import Segments, dot_product
from jfe_jax.models.paligemma.gemma import MASKED, GemmaTower
from jfe_jax.models.registry import build_model
from jfe_jax.parallel import sharding
from tests.support import tiny_models as tiny

G, R, S, N, H = 2, 1, 128, 4, 128


def given(k: int, seed: int = 0):
    """Query, key, value, segments of different lengths with padding behind them, and positions in them."""
    random = np.random.default_rng(seed)
    shapes = ((G, R, S, heads, H) for heads in (N, k, k))
    query, key, value = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    lengths = [(40, 3, 70), (100, 17)]
    segments = np.zeros((G, R, S), np.int32)
    positions = np.zeros((G, R, S), np.int32)
    for group, parts in enumerate(lengths):
        start = 0
        for number, length in enumerate(parts, 1):
            segments[group, 0, start : start + length] = number
            positions[group, 0, start : start + length] = np.arange(length)
            start += length
    return query, key, value, segments, positions


def bias_of(segments, positions=None, window=0):
    same = segments[..., :, None] == segments[..., None, :]
    if window:
        same &= np.abs(positions[..., :, None] - positions[..., None, :]) <= window
    return jnp.where(same, 0.0, MASKED)


def value_and_gradients(function, query, key, value, real):
    """Output and gradients at tokens that are no padding."""

    def loss(query, key, value):
        out = function(query, key, value)
        return jnp.sum(jnp.where(real, jnp.sin(out), 0.0)), jnp.where(real, out, 0.0)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)


@pytest.mark.parametrize(
    "k, softcap, window, sizes",
    [(1, 0.0, 0, None), (1, 2.0, 0, (2, 1, 2)), (2, 0.0, 5, (1, 2, 2)), (2, 2.0, 5, None)],
)
def test_splash_attends_as_xla_does(k, softcap, window, sizes):
    query, key, value, segments, positions = given(k)
    real = (segments > 0)[..., None, None]
    expected = value_and_gradients(
        lambda *qkv: blocks.attend(*qkv, bias_of(segments, positions, window), 0.1, softcap), query, key, value, real
    )
    near = jnp.array(True) if window else None

    def splash(*qkv):
        return attention.attend("splash", *qkv, Segments(jnp.asarray(segments), window, near), 0.1, softcap)

    if sizes is None:
        found = value_and_gradients(splash, query, key, value, real)
    else:
        mesh = sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
        with jax.set_mesh(mesh):
            found = value_and_gradients(splash, query, key, value, real)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), found, expected)


def test_splash_attends_inside_a_shard_map_over_the_batch():
    query, key, value, segments, _ = given(1)
    real = (segments > 0)[..., None, None]

    def spread(function):
        batch = P(("data", "fsdp"))
        run = jax.shard_map(function, in_specs=(batch,) * 4, out_specs=batch, axis_names=frozenset({"data", "fsdp"}))
        return lambda *qkv: run(*qkv, segments)

    def splash(query, key, value, ids):
        return attention.attend("splash", query, key, value, Segments(ids, 0, None), 0.1, 0.0)

    expected = value_and_gradients(lambda *qkv: blocks.attend(*qkv, bias_of(segments), 0.1), query, key, value, real)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))):
        found = value_and_gradients(spread(splash), query, key, value, real)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), found, expected)


def test_a_tower_with_alternating_windows_gives_the_same_either_way():
    cfg = TextConfig(
        width=8, depth=2, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=H, sliding_window=4, attn_logit_softcap=3.0
    )
    _, _, _, segments, positions = given(1)
    x = np.random.default_rng(1).normal(size=(G, R, S, 8)).astype(np.float32)
    real = (segments > 0)[..., None]

    def hidden(how, cfg=cfg):
        tower = GemmaTower(cfg, "full", nnx.Rngs(0), attention=how)
        graphdef, params = nnx.split(tower)
        return jax.jit(lambda params: jnp.where(real, nnx.merge(graphdef, params)(x, segments, positions), 0))(params)

    splash = hidden("splash")
    np.testing.assert_allclose(splash, hidden("xla"), atol=2e-5)
    assert np.abs(splash - hidden("xla", replace(cfg, sliding_window=0))).max() > 1e-3


@pytest.mark.parametrize("how, depth", [("xla", 2), ("xla", 3), ("splash", 2)])
def test_a_tower_with_alternating_windows_gives_the_same_in_bins(how, depth):
    cfg = TextConfig(width=8, depth=depth, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=H, sliding_window=4)
    random = np.random.default_rng(1)
    items = [EncodedItem(random.integers(0, 9, length).astype(np.int32), None) for length in (90, 30, 60, 64)]
    graphdef, params = nnx.split(GemmaTower(cfg, "none", nnx.Rngs(0), attention=how))
    table = random.normal(size=(9, 8)).astype(np.float32)

    def pooled(**shape):
        packed = pack(items, groups=1, image_slots=0, image_size=1, **shape)
        arguments = (packed.segments, packed.positions, packed.pool, packed.bins)
        return jax.jit(lambda params: nnx.merge(graphdef, params)(table[packed.tokens], *arguments))(params)

    rows = pooled(rows=2, row_tokens=128)
    np.testing.assert_allclose(pooled(rows=4, row_tokens=64, bins=((128, 3),)), rows, atol=2e-5)


@pytest.mark.parametrize("k, masked", [(1, True), (2, True), (2, False)])
def test_the_call_of_cudnn_means_what_ours_does(k, masked):
    query, key, value, segments, positions = given(k)
    real = (segments > 0)[..., None, None]
    bias = bias_of(segments, positions, 5) if masked else None
    expected = value_and_gradients(lambda *qkv: blocks.attend(*qkv, bias, 0.1), query, key, value, real)
    found = value_and_gradients(lambda *qkv: dot_product(*qkv, bias, 0.1, "xla"), query, key, value, real)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("s, n, k, h", [(S, N, 1, H), (512, 8, 1, 256), (256, 8, 4, 256), (256, 16, 16, 72)])
@pytest.mark.parametrize("masked", [True, False])
def test_cudnn_attends_as_float32_does(s, n, k, h, masked):
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(G, 2, s, heads, h)).astype(np.float32) for heads in (n, k, k))
    segments = np.sort(random.integers(1, 6, (G, 2, s)), axis=-1)
    # Segments number upwards, with padding behind them.
    segments = np.where(np.arange(s) < s - 20, segments, 0)
    real, bias = (segments > 0)[..., None, None], bias_of(segments) if masked else None
    scale = h**-0.5
    # What bfloat16 makes of the inputs is given to both sides.
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in (query, key, value))
    with jax.default_matmul_precision("highest"):
        exact = (x.astype(jnp.float32) for x in (query, key, value))
        expected = value_and_gradients(lambda *qkv: blocks.attend(*qkv, bias, scale), *exact, real)
    for how in ("cudnn", "xla"):
        found = value_and_gradients(lambda *qkv: attention.attend(how, *qkv, bias, scale, 0.0), query, key, value, real)  # noqa: B023
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            x, y = np.asarray(x, np.float32), np.asarray(y)
            assert np.linalg.norm(x - y) <= 2e-2 * np.linalg.norm(y), how


@pytest.mark.parametrize(
    "how, text, dtype, says",
    [
        ("cudnn", {"attn_logit_softcap": 50.0}, "bfloat16", r"cudnn has no soft-cap, which model\.text\.attn_logit"),
        ("cudnn", {}, "float32", r"cudnn needs model\.dtype bfloat16"),
        ("cudnn", {"head_dim": 260}, "bfloat16", r"head_dim to be a multiple of 8 up to 256, not 260"),
        ("cudnn", {}, "bfloat16", r"model\.vision\.width / num_heads to be a multiple of 8 up to 256, not 12"),
        ("splash", {}, "float32", r"splash needs model\.text\.head_dim to be a multiple of 128, not 8"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(how, text, dtype, says):
    config = tiny.config("fusion", attention=how, dtype=dtype)
    with pytest.raises(UserError, match=says):
        build_model(replace(config, text=replace(config.text, **text)), nnx.Rngs(0))


def test_rows_and_heads_that_splash_cannot_split_are_refused():
    query, key, value, segments, _ = given(2)
    mask = Segments(jnp.asarray(segments), 0, None)
    with pytest.raises(UserError, match=r"data\.row_tokens, or data\.bins, to be multiples of 128, not 96"):
        attention.attend("splash", query[:, :, :96], key, value, mask, 1.0, 0.0)
    with (
        jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))),
        pytest.raises(UserError, match=r"splash needs mesh\.tensor to divide model\.text\.num_kv_heads, 2"),
    ):
        jax.jit(lambda: attention.attend("splash", query, key, value, mask, 1.0, 0.0))()


def test_for_a_tpu_splash_is_its_kernel():
    query, key, value, segments, _ = given(1)

    def loss(query, key, value):
        return jnp.sum(attention.attend("splash", query, key, value, Segments(segments, 0, None), 0.1, 0.0))

    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))):
        lowered = jax.jit(jax.grad(loss)).trace(query, key, value).lower(lowering_platforms=("tpu",)).as_text()
    # Forward, and backward to queries and to keys and values.
    assert lowered.count("@tpu_custom_call") == 3
