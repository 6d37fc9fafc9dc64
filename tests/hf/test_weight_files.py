"""The weights that are read are those that transformers reads, whatever else is in the directory."""

import logging
import shutil

import numpy as np
import torch
from transformers import PaliGemmaForConditionalGeneration

from jfe_jax.hf.load import open_hf
from jfe_jax.hf.safetensors_io import INDEX, SINGLE
from tests.support import paligemma_oracle as oracle

NAME = "tower.norm.scale_d"


def ours(directory):
    array = open_hf(directory).arrays[NAME]
    return array.read((slice(0, array.shape[0]),))


def norm(directory):
    model = PaliGemmaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return model.model.language_model.norm.weight.detach().numpy()


def test_a_single_file_comes_before_stale_shards_and_that_is_logged(tmp_path, caplog):
    old = oracle.save(oracle.tiny(seed=0), tmp_path / "old", max_shard_size="60KB")
    new = oracle.save(oracle.tiny(seed=1), tmp_path / "new")
    assert (old / INDEX).exists()
    before = ours(old)
    assert not caplog.records, "shards alone are no reason for a note"
    np.testing.assert_array_equal(before, norm(old))
    shutil.copy(new / SINGLE, old / SINGLE)
    with caplog.at_level(logging.WARNING):
        after = ours(old)
    np.testing.assert_array_equal(after, norm(old))
    np.testing.assert_array_equal(after, norm(new))
    assert not np.array_equal(before, after)
    (record,) = caplog.records
    assert SINGLE in record.getMessage() and "not read: model-00001-of-" in record.getMessage()


def test_shards_that_the_index_does_not_name_are_passed_over(tmp_path, caplog):
    directory = oracle.save(oracle.tiny(seed=0), tmp_path / "model", max_shard_size="60KB")
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shutil.copy(shard, directory / "model-00009-of-00009.safetensors")
    np.testing.assert_array_equal(ours(directory), norm(directory))
    assert "not read: model-00009-of-00009.safetensors" in caplog.text
