"""The late-fusion baseline: what each kind of fusion can and cannot mix."""

import numpy as np
import pytest

from tests.support import tiny_models as tiny

BOTH = tiny.item(5, True, 0)
TEXT, IMAGE = tiny.without_image(BOTH), tiny.without_text(BOTH)
OTHER = tiny.item(5, True, 1)


def mixed(text, image):
    return BOTH._replace(tokens=text.tokens, pixels=image.pixels)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_score_fusion_is_the_sum_of_the_halves(pooling):
    embed = tiny.model("score", "embed", pooling=pooling)
    both, text, image = embed(tiny.packed([BOTH, TEXT, IMAGE]))[0]
    np.testing.assert_allclose(both, text + image, atol=1e-5)
    assert np.linalg.norm(text) > 0.1 and np.linalg.norm(image) > 0.1


def test_score_fusion_of_an_image_alone_does_not_depend_on_the_template():
    embed = tiny.model("score", "embed")
    image = embed(tiny.packed([IMAGE]))[0, 0]
    template = IMAGE.tokens.copy()
    template[tiny.PATCHES] = 40
    np.testing.assert_array_equal(embed(tiny.packed([IMAGE._replace(tokens=template)]))[0, 0], image)


def test_score_fusion_embeds_one_word_beside_an_image():
    embed = tiny.model("score", "embed")
    word = tiny.item(1, True, 2)
    both, image = embed(tiny.packed([word, tiny.without_text(word)]))[0]
    assert np.abs(both - image).max() > 1e-3


def test_score_fusion_cannot_mix_and_feature_fusion_does():
    """Interaction of text and image, as in a 2 x 2 design: zero for a sum."""
    cross = [mixed(text, image) for text in (BOTH, OTHER) for image in (BOTH, OTHER)]
    for kind, mixes in (("score", False), ("feature", True)):
        a, b, c, d = tiny.model(kind, "embed")(tiny.packed(cross))[0]
        interaction = np.abs(a - b - c + d).max()
        assert (interaction > 1e-2) == mixes, (kind, interaction)
        assert np.abs(a - b).max() > 1e-2 and np.abs(a - c).max() > 1e-2, "depends on both"


@pytest.mark.parametrize("kind", ["score", "feature"])
def test_an_item_with_neither_is_finite(kind):
    embed = tiny.model(kind)
    empty = tiny.item(0, False, 0)
    assert np.isfinite(embed(tiny.packed([empty, None]))).all()
