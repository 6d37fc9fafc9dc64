"""Paths that storage would take for something else are refused before any work; all others work."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jfe_jax.checkpoint.model_io import load_model, open_model
from jfe_jax.cli.main import main
from jfe_jax.errors import UserError
from jfe_jax.models.abstract_model import named_leaves
from jfe_jax.train import validate
from jfe_jax.utils.local_paths import require_checkpoint_path, require_local
from tests.support.tiny_retriever import save, tiny_retriever


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return tiny_retriever(tmp_path_factory.mktemp("retriever"))


@pytest.mark.parametrize("name", ["a#b", "a|b", "a%b", "a%20b", "a b", "ä", "a{b}", "a;b", "a'b", "100%", "a\nb", "~x"])
def test_a_checkpoint_under_any_other_name_comes_back_the_same(retriever, tmp_path, name):
    path = save(retriever, tmp_path / name)
    loaded = load_model(path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, retriever._params)
    expected = {name: np.asarray(leaf) for name, leaf in named_leaves(nnx.to_pure_dict(retriever._params))}
    arrays = open_model(path).arrays
    assert arrays.keys() == expected.keys()
    for array_name, array in arrays.items():
        stored = array.read(tuple(slice(0, size) for size in array.shape))
        np.testing.assert_array_equal(stored, expected[array_name])


@pytest.mark.parametrize("name", ["br[1]", "a*b", "a?b", "a\\b", "]"])
def test_patterns_are_refused_before_anything_is_written(retriever, tmp_path, name):
    for path in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(UserError, match="takes for a file name pattern"):
            save(retriever, path)
        with pytest.raises(UserError, match="takes for a file name pattern"):
            load_model(path)
        with pytest.raises(UserError, match=r"^output: .* takes for a file name pattern"):
            validate.check(dataclasses.replace(retriever.config, output=str(path)))
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "hf://x/y", "file:///tmp/x"])
def test_urls_are_refused(tmp_path, url, capsys):
    for given in (url, Path(url)):
        with pytest.raises(UserError, match=r"output: .* is a URL"):
            require_local(given, "output")
    config = tmp_path / "c.yaml"
    config.write_text("")
    for key in ("output", "init", "data.path", "tokens.tokenizer"):
        assert main(["train", "--config", str(config), f"--{key}={url}"]) == 1
        assert f"{key}: {url} is a URL" in capsys.readouterr().err
    assert main(["convert", "from-hf", str(tmp_path), url]) == 1
    assert "is a URL" in capsys.readouterr().err


def test_paths_with_a_colon_are_local(tmp_path):
    for name in ("a:b", "c:", "x:y/z", "12:30", "runs/a:/b"):
        require_local(name, "output")
        require_checkpoint_path(tmp_path / name, "output")
