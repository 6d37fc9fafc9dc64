"""The fusion model against transformers' PaliGemma: states, embeddings, gradients."""

import pytest

from tests.support import paligemma_oracle, paligemma_parity


@pytest.fixture(scope="module", params=paligemma_oracle.MODELS)
def two(request, tmp_path_factory):
    return paligemma_parity.pair(request.param, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("layout", paligemma_parity.LAYOUTS)
def test_states_and_embeddings_agree(two, layout):
    found = list(paligemma_parity.errors(two, layout))
    assert {measure for _, measure, _ in found} == {"states", "last pooled", "mean pooled"}
    for name, measure, error in found:
        assert error <= 1e-5, (name, measure)


def test_gradients_agree(two):
    for name, error in paligemma_parity.gradient_errors(two):
        assert error <= 1e-4, name


def test_bfloat16_stays_close(two):
    for name, error, cosine in paligemma_parity.bfloat16_errors(two):
        assert error <= 2e-2, name
        assert cosine >= 0.999, name
