"""The batch that `jfe bench gradcache` times, and the shapes that it compiles for."""

import argparse

import jax
import numpy as np
import pytest

from benchmarks import gradcache
from jfe_jax.errors import UserError
from jfe_jax.parallel import sharding


def test_items_are_as_the_packer_lays_them_out():
    batch = gradcache.batch(gradcache.config(8, 2), 2)
    packed, length = batch.packed, gradcache.ROW_TOKENS // 2
    flat = packed.segments.reshape(2, -1)
    patches = gradcache.config(8, 2).model.vision.patches
    for group in range(2):
        for start, stop in packed.pool_span[group]:
            assert stop - start == length and len(set(flat[group, start:stop])) == 1
            tokens = packed.tokens.reshape(2, -1)[group, start:stop]
            assert (tokens[:patches] == 4095).all() and not (tokens[patches:] == 4095).any()
        # All queries, then all candidates: segment 1 of each row, then segment 2.
        assert list(flat[group, packed.pool_span[group, :, 0]]) == [1] * 4 + [2] * 4
    assert (packed.pool == packed.pool_span[..., 1] - 1).all() and (
        packed.image_start == packed.pool_span[..., 0]
    ).all()


def test_what_is_compiled_is_what_would_run():
    settings = gradcache.config(64, 2, gradcache.DEVICES)
    mesh = sharding.make_mesh(settings.mesh)
    there = sharding.put_batch(gradcache.batch(settings, 16), mesh, 2)
    abstract = gradcache._abstract(settings, 2, sharding.batch_sharding(mesh, 2))
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding), there, abstract)
    assert all(jax.tree.leaves(same))
    assert np.asarray(there.packed.valid).all()


def test_a_gpu_that_is_not_there_is_told_at_once():
    parser = argparse.ArgumentParser()
    gradcache.add_arguments(parser)
    with pytest.raises(UserError, match="no GPU, but a cpu"):
        gradcache.run(parser.parse_args(["--device", "gpu"]), progress=None)
