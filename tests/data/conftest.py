"""One small M-BEIR directory and what `prepare` makes of it, shared by this directory's tests."""

import contextlib
from pathlib import Path

import pytest

from jfe_jax.data.mbeir import Mbeir
from jfe_jax.data.prepare import prepare
from tests.data.mbeir_maker import make_mbeir


@contextlib.contextmanager
def silent(name: str, total: int):
    yield lambda done: None


@pytest.fixture(scope="session")
def mbeir_dir(tmp_path_factory) -> Path:
    return make_mbeir(tmp_path_factory.mktemp("mbeir"), queries_per_task=12)


@pytest.fixture(scope="session")
def prepared_dir(mbeir_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    list(prepare(Mbeir(mbeir_dir), out, progress=silent))
    return out
