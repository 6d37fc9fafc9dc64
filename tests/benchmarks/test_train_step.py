"""`jfe bench train-step` times two sides that compute the same on the same items, and refuses any others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.data.mbeir_units import UNITS, UPSAMPLE, shares
from benchmarks.train_step import backend, compare, weights
from benchmarks.train_step import batches as mix
from benchmarks.train_step.workload import Settings, batches, config
from jfe_jax.config import DataConfig
from jfe_jax.data.pipeline import mixture
from jfe_jax.errors import UserError

SETTINGS = Settings(geometry="tiny", rows=2, row_tokens=448, attend="bins", batches=2)


@pytest.fixture(scope="module")
def sides():
    torch.set_num_threads(2)
    return [backend.make(side, SETTINGS) for side in ("jfe", "torch")]


def test_both_sides_start_from_the_same_weights(sides):
    ours, theirs = sides
    for parameter, piece in weights.pieces(theirs.model, ours.shapes):
        mine, other = ours.parameter(piece), weights.ours(piece, parameter.detach()).numpy()
        np.testing.assert_array_equal(mine, other, err_msg=piece.entry.ours)
        if piece.entry.ours in ("tower.blocks.gate_df", "embedder.table_vd"):
            assert mine.std() == pytest.approx(config(SETTINGS).model.text.width ** -0.5, rel=0.02)


@pytest.mark.slow
def test_what_is_timed_computes_the_same_or_is_refused(sides):
    ours, theirs = sides
    made = batches(SETTINGS, "mix")
    found = compare.compare(ours, theirs, made)
    assert 0 < found.gradients < 1e-4 and found.loss < 1e-5
    seconds = backend.time_rounds(
        [(side, backend.put(name, side, made)) for name, side in zip(("jfe", "torch"), sides, strict=True)], 2
    )
    assert [len(own) for own in seconds] == [4, 4], "a round is a step on each batch"
    with torch.no_grad():
        theirs.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(UserError, match="do not compute the same"):
        compare.compare(ours, theirs, made)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_takes_the_steps_it_is_told_to_and_says_when_it_cannot(tmp_path):
    side = backend.Apart("jfe", replace(SETTINGS, batches=1), str(tmp_path))
    seconds = backend.time_rounds([(side, side.put("mix", 1))], 2)
    assert [len(own) for own in seconds] == [2] and min(seconds[0]) > 0
    with pytest.raises(UserError, match="jfe's process ended with status 1"):
        side.step("no 0")
    side.close()


def test_both_layouts_hold_the_same_items():
    for kind in ("mix", "equal"):
        for batch in batches(SETTINGS, kind):
            packed, padded = batch.packed.packed, batch.padded
            n = packed.valid.shape[1] // 2
            assert (packed.bins is not None) == (kind == "mix")
            where = [*np.flatnonzero(packed.valid[0, :n]), *(n + np.flatnonzero(packed.valid[0, n:]))]
            assert len(where) == 2 * batch.pairs == len(padded.tokens)
            tokens = packed.tokens.reshape(-1)
            for row, length, place in zip(padded.tokens, padded.lengths, where, strict=True):
                start, end = packed.pool_span[0, place]
                assert end - start == length
                np.testing.assert_array_equal(tokens[start:end], row[:length])
                assert not row[length:].any()
            assert padded.mask.sum() == padded.lengths.sum() == batch.load.tokens == (packed.segments > 0).sum()
            used = packed.pixels[packed.image_start < tokens.size]
            assert len(used) == len(padded.pixels) == batch.load.images
            # In the order of the items; the packer's slots are in the order of the pairs.
            one, other = (
                sorted(float(image.mean()) for image in images) for images in (used / 127.5 - 1, padded.pixels)
            )
            np.testing.assert_allclose(one, other, atol=1e-5)
            assert (kind == "equal") == (batch.real == (1.0, 1.0))


def test_units_come_as_often_as_in_training():
    sizes = {f"{unit.dataset}_task{unit.task}": 1000 * unit.queries for unit in UNITS}
    wanted = mixture.weights(DataConfig(upsample=UPSAMPLE), sizes, "M-BEIR")
    total = sum(wanted.values())
    for unit, share in zip(UNITS, shares(), strict=True):
        assert share == pytest.approx(wanted[f"{unit.dataset}_task{unit.task}"] / total)
    run = config(replace(SETTINGS, geometry="3b"))
    small = replace(run, model=config(SETTINGS).model)
    pairs = mix.mixed(small, 3000, seed=1)
    images = np.mean([[item.pixels is not None for item in pair.items] for pair in pairs], axis=0)
    wanted = [sum(s for unit, s in zip(UNITS, shares(), strict=True) if unit.task in tasks)
              for tasks in ((3, 4, 6, 7, 8), (0, 2, 4, 7, 8))]  # fmt: skip
    np.testing.assert_allclose(images, wanted, atol=0.03)


def test_a_geometry_that_is_not_there_is_named():
    with pytest.raises(UserError, match="there are tiny, 30m, 150m, 3b"):
        config(replace(SETTINGS, geometry="7b"))
