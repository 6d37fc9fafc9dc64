"""What holds for both kinds of model: layouts do not matter, items do not see each other, sizes are what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.data.items import EncodedItem
from jfe_jax.errors import UserError
from jfe_jax.models import build_model, embedding_width, logical_axes
from tests.models import tiny

KINDS = list(tiny.KINDS)
ITEMS = [
    tiny.item(5, True, 0),
    tiny.item(7, False, 1),
    tiny.item(0, True, 2),
    tiny.item(1, False, 3),
    tiny.item(3, True, 4),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_packed_equals_padded(kind, pooling):
    embed, _ = tiny.model(kind, pooling=pooling)
    one, other = embed(tiny.packed(ITEMS)), embed(tiny.packed(ITEMS, "padded"))
    assert one.shape == (1, len(ITEMS), embedding_width(tiny.config(kind)))
    np.testing.assert_allclose(one, other, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(one, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_independent_batches(kind):
    embed, _ = tiny.model(kind)
    halves = [[*ITEMS[:2], None], ITEMS[2:]]
    together = embed(tiny.packed(halves[0] + halves[1], groups=2))
    for group, half in zip(together, halves, strict=True):
        np.testing.assert_allclose(group, embed(tiny.packed(half))[0], atol=2e-6)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_embedded_the_same_whatever_its_neighbours_are(kind):
    embed, _ = tiny.model(kind)
    before = embed(tiny.packed(ITEMS))[0]
    other = tiny.item(5, True, 9)
    after = embed(tiny.packed([other, *ITEMS[1:]]))[0]
    np.testing.assert_array_equal(before[1:], after[1:])
    assert np.abs(before[0] - after[0]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_and_every_pixel_counts(kind):
    """Attention goes in both directions, and the image reaches the embedding."""
    embed, _ = tiny.model(kind)
    base = embed(tiny.packed(ITEMS))[0, 0]
    item = ITEMS[0]
    first_word = item.tokens.copy()
    first_word[tiny.PATCHES + 1] += 1
    last_pixel = item.pixels.copy()
    last_pixel[-1, -1] ^= 0x80
    for changed in (EncodedItem(first_word, item.pixels), EncodedItem(item.tokens, last_pixel)):
        moved = embed(tiny.packed([changed, *ITEMS[1:]]))[0, 0]
        assert np.abs(moved - base).max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_image_slots(kind):
    embed, _ = tiny.model(kind)
    texts = [ITEMS[1], ITEMS[3]]
    batch = tiny.packed(texts)
    bare = batch._replace(pixels=batch.pixels[:, :0], image_start=batch.image_start[:, :0])
    np.testing.assert_allclose(embed(bare), embed(batch), atol=1e-6)


def test_rows_shorter_than_an_image():
    embed, _ = tiny.model("fusion")
    text = EncodedItem(np.array([tiny.BOS, 7, tiny.EOS], np.int32), None)
    batch = tiny.packed([text])
    short = batch._replace(
        tokens=batch.tokens[:, :1, :3],
        segments=batch.segments[:, :1, :3],
        positions=batch.positions[:, :1, :3],
        image_start=np.full_like(batch.image_start, 3),
    )
    np.testing.assert_allclose(embed(short), embed(batch), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_gradient(kind):
    batch = tiny.packed(ITEMS)

    def gradient(remat):
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: build_model(tiny.config(kind, remat=remat), nnx.Rngs(0))))
        # The first coordinate: a sum over all would hide errors that cancel.
        loss = lambda params: jnp.sum(nnx.merge(graphdef, params)(batch)[..., 0])  # noqa: E731
        return jax.jit(jax.grad(loss))(tiny.model(kind)[1])

    plain = gradient("none")
    for remat in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, gradient(remat))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain)), "a parameter that nothing depends on"


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(kind):
    embed, _ = tiny.model(kind)
    low, params = tiny.model(kind, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact, rounded = embed(tiny.packed(ITEMS)), low(tiny.packed(ITEMS))
    assert rounded.dtype == np.float32
    assert 1e-6 < np.abs(exact - rounded).max() < 0.1


def test_every_dimension_of_every_parameter_has_a_name():
    for kind in KINDS:
        _, params = nnx.split(nnx.eval_shape(lambda kind=kind: build_model(tiny.config(kind), nnx.Rngs(0))))
        axes = logical_axes(params)
        jax.tree.map(
            lambda leaf, names: None if len(leaf.shape) == len(names) else pytest.fail(str(names)), params, axes
        )
        assert axes.vision.blocks.attention.query_dnh.get_value() == ("layers", "embed", "heads", "head_dim")
        assert logical_axes(nnx.to_pure_dict(params))["embedder"]["table_vd"] == ("vocab", "embed")


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("vision", {"patch_size": 5}, "patch_size 5"),
        ("vision", {"num_heads": 5}, "num_heads 5"),
        ("text", {"num_kv_heads": 3}, "num_kv_heads 3"),
        ("text", {"head_dim": 7}, "head_dim 7"),
    ],
)
def test_sizes_that_do_not_fit_are_named(section, change, named):
    cfg = tiny.config("fusion")
    broken = dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **change)})
    with pytest.raises(UserError, match=named):
        build_model(broken, nnx.Rngs(0))


def test_the_fusion_model_has_no_embed_dim_of_its_own():
    with pytest.raises(UserError, match="embed_dim 5"):
        build_model(ModelConfig(embed_dim=5), nnx.Rngs(0))
