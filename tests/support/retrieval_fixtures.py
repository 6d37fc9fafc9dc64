"""A small M-BEIR directory and a model for it, once for all tests here."""

import pytest

from tests.support.mbeir_directory import IMAGE_TOKEN, VOCAB_SIZE, make_mbeir
from tests.support.tiny_retriever import random_retriever, tiny_config


@pytest.fixture(scope="session")
def mbeir_path(tmp_path_factory):
    """Read only: a test that plants a defect makes its own."""
    return make_mbeir(tmp_path_factory.mktemp("mbeir"), queries_per_task=6)


@pytest.fixture(scope="session")
def shapes_retriever(mbeir_path):
    config = tiny_config(mbeir_path / "tokenizer", image_token=IMAGE_TOKEN, vocab_size=VOCAB_SIZE)
    return random_retriever(config, mbeir_path / "model", seed=0)
