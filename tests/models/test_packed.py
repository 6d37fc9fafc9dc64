"""What holds for both kinds of model: layouts do not matter, items do not see each other, sizes are what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfe_jax.config import ModelConfig
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.errors import UserError
from jfe_jax.models.layers.blocks import logical_axes
from jfe_jax.models.registry import build_model, embedding_width
from tests.support import tiny_models as tiny

KINDS = list(tiny.KINDS)
ITEMS = [
    tiny.item(5, True, 0),
    tiny.item(7, False, 1),
    tiny.item(0, True, 2),
    tiny.item(1, False, 3),
    tiny.item(3, True, 4),
]


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("fusion", "last"), ("fusion", "mean"), ("score", "last"), ("score", "mean"), ("feature", "last")],
)
def test_packed_equals_padded(kind, pooling):
    embed = tiny.model(kind, pooling=pooling)
    one, other = embed(tiny.packed(ITEMS)), embed(tiny.packed(ITEMS, "padded"))
    assert one.shape == (1, len(ITEMS), embedding_width(tiny.config(kind)))
    np.testing.assert_allclose(one, other, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(one, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bins_equal_padded(kind):
    embed = tiny.model(kind)
    # Rows that items cross; one bin has room to spare.
    binned = pack(ITEMS, groups=1, rows=6, row_tokens=8, image_slots=6, image_size=tiny.SIDE, bins=((8, 2), (20, 2)))
    np.testing.assert_allclose(embed(binned), embed(tiny.packed(ITEMS, "padded")), atol=2e-6)


@pytest.mark.parametrize("kind", ["fusion", "score"])
def test_groups_are_independent_batches(kind):
    embed = tiny.model(kind)
    halves = [[*ITEMS[:2], None], ITEMS[2:]]
    together = embed(tiny.packed(halves[0] + halves[1], groups=2))
    for group, half in zip(together, halves, strict=True):
        np.testing.assert_allclose(group, embed(tiny.packed(half))[0], atol=2e-6)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_embedded_the_same_whatever_its_neighbours_are(kind):
    embed = tiny.model(kind)
    before = embed(tiny.packed(ITEMS))[0]
    other = tiny.item(5, True, 9)
    after = embed(tiny.packed([other, *ITEMS[1:]]))[0]
    np.testing.assert_array_equal(before[1:], after[1:])
    assert np.abs(before[0] - after[0]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_and_every_pixel_counts(kind):
    """Attention goes in both directions, and the image reaches the embedding."""
    embed = tiny.model(kind)
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
    embed = tiny.model(kind)
    texts = [ITEMS[1], ITEMS[3]]
    batch = tiny.packed(texts)
    bare = batch._replace(pixels=batch.pixels[:, :0], image_start=batch.image_start[:, :0])
    np.testing.assert_allclose(embed(bare), embed(batch), atol=1e-6)


def test_rows_shorter_than_an_image():
    embed = tiny.model("fusion")
    text = EncodedItem(np.array([tiny.BOS, 7, tiny.EOS], np.int32), None)
    batch = tiny.packed([text])
    short = batch._replace(
        tokens=batch.tokens[:, :1, :3],
        segments=batch.segments[:, :1, :3],
        positions=batch.positions[:, :1, :3],
        image_start=np.full_like(batch.image_start, 3),
    )
    np.testing.assert_allclose(embed(short), embed(batch), atol=1e-6)


@functools.cache
def gradient(kind: str, remat: str):
    graphdef, params = tiny.split(kind, remat=remat)
    batch = tiny.packed(ITEMS)

    def loss(params):
        # The first coordinate: a sum over all would hide errors that cancel.
        return jnp.sum(nnx.merge(graphdef, params)(batch)[..., 0])

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["full", "up", "dots", "offload"])
def test_recomputing_changes_no_gradient(remat):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient("fusion", "none"), gradient("fusion", remat)
    )


def test_the_last_layer_computes_no_token_that_is_not_pooled(monkeypatch):
    """With and without: the same vectors; and of the last MLP only the products of the pooled tokens."""
    graphdef, params = tiny.split("fusion")
    batch = tiny.packed(ITEMS)

    def lowered():
        return jax.jit(lambda params: nnx.merge(graphdef, params)(batch)).lower(params)

    early = lowered()
    monkeypatch.setattr("jfe_jax.models.paligemma.gemma.ends_early", lambda depth: False)
    whole = lowered()
    np.testing.assert_allclose(early.compile()(params), whole.compile()(params), atol=2e-6)
    # Width 16, MLP of 32, queries of 4 heads of 8 and their output: of 5 items instead of 96 tokens.
    saved = (96 - 5) * 2 * (3 * 16 * 32 + 2 * 16 * 32)
    counted = [each.cost_analysis()["flops"] for each in (early, whole)]
    assert counted[1] - counted[0] > saved


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind):
    for path, leaf in nnx.to_flat_state(gradient(kind, "none")):
        assert np.abs(leaf[...]).max() > 0, path


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(kind):
    embed = tiny.model(kind)
    abstract = nnx.eval_shape(lambda: build_model(tiny.config(kind, dtype="bfloat16"), nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(abstract))} == {jnp.dtype("float32")}
    exact, rounded = (model(tiny.packed(ITEMS)) for model in (embed, tiny.model(kind, dtype="bfloat16")))
    assert rounded.dtype == np.float32
    assert 1e-6 < np.abs(exact - rounded).max() < 0.1


def test_a_loop_over_layers_is_given_matrices_in_the_type_that_it_multiplies_in(monkeypatch):
    """Cast inside, each would be read as float32 in every pass over its layer, and its gradient be stacked as that."""
    monkeypatch.setattr("jfe_jax.models.layers.blocks.UNROLLED_DEPTH", 0)
    graphdef, params = tiny.split("fusion", dtype="bfloat16")
    traced = jax.make_jaxpr(lambda params: nnx.merge(graphdef, params)(tiny.packed(ITEMS)))(params)
    loops = [each for each in traced.eqns if each.primitive.name == "scan"]
    stacked = [x.aval for loop in loops for x in loop.invars[loop.params["num_consts"] + loop.params["num_carry"] :]]
    # Norms' scales are [L, D].
    given = [aval for aval in stacked if aval.ndim > 2]
    assert len(loops) == 2 and len(given) > 10
    assert {aval.dtype for aval in given} == {jnp.dtype("bfloat16")}


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
