"""One small M-BEIR directory and what `prepare` makes of it, shared by this directory's tests."""

import contextlib
from pathlib import Path

import pytest

from jfe_jax.config import Config, from_dict
from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.prepare.prepare import prepare_dataset
from tests.support.mbeir_directory import IMAGE_TOKEN, VOCAB_SIZE, make_mbeir


@contextlib.contextmanager
def silent(name: str, total: int):
    yield lambda done: None


@pytest.fixture(scope="session")
def mbeir_dir(tmp_path_factory) -> Path:
    return make_mbeir(tmp_path_factory.mktemp("mbeir"), queries_per_task=12)


@pytest.fixture(scope="session")
def prepared_dir(mbeir_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    list(prepare_dataset(Mbeir(mbeir_dir), out, progress=silent))
    return out


@pytest.fixture
def make_config(mbeir_dir, prepared_dir):
    def make(tokens=None, **data) -> Config:
        sizes = {"pairs": 16, "rows": 12, "row_tokens": 80, "image_slots": 32, "image_cache_mib": 16}
        return from_dict(
            {
                "model": {
                    "image_token": IMAGE_TOKEN,
                    "vision": {"image_size": 32, "patch_size": 16},
                    "text": {"vocab_size": VOCAB_SIZE},
                },
                "tokens": {"tokenizer": str(mbeir_dir / "tokenizer"), "max_text_tokens": 40, **(tokens or {})},
                "data": {"path": str(prepared_dir), **sizes, **data},
            }
        )

    return make
