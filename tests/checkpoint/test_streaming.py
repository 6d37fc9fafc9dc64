"""Arrays written in pieces are what they would be written whole, and no piece is large."""

import dataclasses
import math
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jfe_jax.checkpoint import model_io, streaming
from jfe_jax.checkpoint.streaming import StreamedArray
from jfe_jax.config import Config
from jfe_jax.errors import UserError

CHUNK = 20_000


def split(name):
    """Layers are stacked in what is called "blocks"."""
    return name.split(".")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Saves arrays as a model; gives its checkpoint's directory and the indices that were read of each."""
    monkeypatch.setattr(streaming, "CHUNK_BYTES", CHUNK)
    (tmp_path / "tokenizer").mkdir()

    def save(arrays):
        asked = {name: [] for name in arrays}

        def streamed(name):
            def read(index):
                asked[name].append(index)
                return arrays[name][index]

            return StreamedArray(arrays[name].shape, arrays[name].dtype, read)

        tree = {part: {rest: streamed(f"{part}.{rest}")} for part, rest in map(split, arrays)}
        model_io.save_model(tmp_path / "run", Config(), tree, tmp_path / "tokenizer")
        return tmp_path / "run" / "checkpoints" / "0", asked

    return save


def test_what_is_written_in_pieces_is_read_whole(written):
    rng = np.random.default_rng(0)
    arrays = {
        "blocks.stacked": rng.normal(size=(6, 50, 70)).astype(np.float32),
        "first.table": rng.normal(size=(1000, 13)).astype(np.float32).astype(ml_dtypes.bfloat16),
        "second.vector": rng.normal(size=7).astype(np.float32),
    }
    place, asked = written(arrays)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        part: {rest: jax.ShapeDtypeStruct(arrays[f"{part}.{rest}"].shape, np.float32, sharding=device)}
        for part, rest in map(split, arrays)
    }
    back = model_io.restore_checkpointable(place, "params", abstract)
    stored = streaming.open_stored_arrays(place / "params")
    for name, array in arrays.items():
        part, rest = split(name)
        np.testing.assert_array_equal(back[part][rest], array.astype(np.float32), name)
        inner = tuple(slice(1, size - 1) for size in array.shape)
        assert (stored[name].shape, stored[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(stored[name].read(inner), array[inner], name)
        sizes = [math.prod(one.stop - one.start for one in index) for index in asked[name]]
        assert sum(sizes) == array.size, "every number once"
        assert max(sizes) * array.itemsize <= CHUNK
    # Whole layers where one fits: they lie together in the files of Hugging Face.
    assert all(one.stop - one.start == 1 for one, *_ in asked["blocks.stacked"])
    # And no more parts than it takes: each is a write of its own.
    assert len(asked["second.vector"]) == 1 and len(asked["first.table"]) == 2
    # What knows nothing of us reads it too.
    plain = ocp.load_checkpointables(place)["params"]
    for name, array in arrays.items():
        part, rest = split(name)
        np.testing.assert_array_equal(plain[part][rest], array, name)


def test_small_layers_are_read_and_written_together(written):
    norms = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    _, asked = written({"blocks.norms": norms})
    assert asked["blocks.norms"] == [(slice(0, 6), slice(0, 50))]


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 100), os.remove], ids=["cut short", "gone"])
def test_a_damaged_chunk_is_never_read_as_zeros(written, damage):
    place, _ = written({"blocks.norms": np.ones((6, 50), np.float32)})
    (chunk,) = (place / "params" / "blocks.norms").glob("[0-9]*")
    damage(chunk)
    stored = streaming.open_stored_arrays(place / "params")["blocks.norms"]
    with pytest.raises(UserError, match=r"params: cannot read blocks\.norms"):
        stored.read((slice(2, 3), slice(0, 50)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(Exception, match="params"):
        model_io.restore_checkpointable(
            place, "params", {"blocks": {"norms": jax.ShapeDtypeStruct((6, 50), np.float32, sharding=device)}}
        )


def test_a_source_that_fails_leaves_nothing(written, tmp_path):
    class Failing:
        shape, dtype, ndim = (6, 50, 70), np.dtype(np.float32), 3

        def __getitem__(self, index):
            if index[0].start == 4:
                raise UserError("model-00002-of-00003.safetensors: cannot read x")
            return np.zeros([one.stop - one.start for one in index], np.float32)

    with pytest.raises(UserError, match="model-00002"):
        written({"blocks.failing": Failing()})
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_streamed_array_says_how_large_it_is():
    array = StreamedArray((2, 3), np.dtype(np.float32), dataclasses.MISSING)
    assert array.size == 6 and array.ndim == 2
