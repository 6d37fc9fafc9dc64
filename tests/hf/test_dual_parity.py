"""The dual encoder against transformers' SiglipModel and CLIPModel: states, embeddings, gradients."""

import pytest

from tests.support import siglip_clip_oracle as oracle
from tests.support import siglip_clip_parity as parity


@pytest.fixture(scope="module", params=oracle.MODELS)
def two(request, tmp_path_factory):
    return parity.pair(request.param, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("layout", parity.LAYOUTS)
def test_states_and_embeddings_agree(two, layout):
    found = list(parity.errors(two, layout))
    assert {measure for _, measure, _ in found} == {
        "text states",
        "text features",
        "image states",
        "image features",
        "embedding",
    }
    for name, measure, error in found:
        assert error <= 1e-5, (name, measure)


def test_gradients_agree(two):
    for name, error in parity.gradient_errors(two):
        assert error <= 1e-4, name


@pytest.mark.parametrize("name", ["SigLIP, 60 px", "CLIP, 56 px, quick GELU"])
def test_bfloat16_stays_close(name, tmp_path):
    for item, error, cosine in parity.bfloat16_errors(parity.pair(name, tmp_path)):
        assert error <= 2e-2, item
        assert cosine >= 0.999, item
