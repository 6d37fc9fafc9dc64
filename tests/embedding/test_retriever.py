"""Items in, unit rows out: order, shapes, packing and errors."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jfe_jax.config import MeshConfig, ModelConfig, TextConfig
from jfe_jax.data.item import Item
from jfe_jax.data.pipeline.offline_packing import Size
from jfe_jax.embedding import batching
from jfe_jax.embedding.batch_shapes import ACCELERATOR, CPU, BatchShapePlanner, ShapePolicy
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.errors import UserError
from jfe_jax.models.abstract_model import blueprint, shardings_of
from jfe_jax.parallel.sharding import make_mesh
from tests.support.tiny_retriever import picture, tiny_retriever


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return tiny_retriever(tmp_path_factory.mktemp("model"))


def mixed(count):
    kinds = [
        lambda i: Item(text=f"text {i} " + "word " * (i % 7)),
        lambda i: Item(image=picture(i)),
        lambda i: Item(text=f"turn it {i}", image=picture(i), instruction="find it"),
    ]
    return [kinds[i % 3](i) for i in range(count)]


def test_rows_are_unit_and_in_input_order(retriever, monkeypatch):
    items = mixed(30)
    together = retriever.encode(items)
    assert together.dtype == np.float32 and together.shape == (30, 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([retriever.encode([item]) for item in items])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len({row.tobytes() for row in np.round(together, 4)}) == 30


def test_many_batches_with_a_ragged_end_compile_few_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr("jfe_jax.embedding.retriever.CPU", ShapePolicy(512, 128, 1, 256))
    small = tiny_retriever(tmp_path)
    texts = [Item(text=f"{i} words") for i in range(150)]
    done = []
    first = small.encode(texts[:100], progress=done.append)
    assert sum(done) == 100
    compiled = small._forward._cache_size()
    assert compiled == 1
    np.testing.assert_allclose(small.encode(texts)[:100], first, atol=1e-5)
    assert small._forward._cache_size() == compiled
    small.encode(mixed(200))
    # At most, beside those of short texts: none, a quarter, a half, three quarters and all of the image slots.
    assert small._forward._cache_size() <= 6


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)], ids=["whole on each", "split over four"])
def test_all_devices_give_what_one_gives(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr("jfe_jax.embedding.retriever.CPU", ShapePolicy(128, 128, 1, 256))
    items = mixed(70)
    alone = tiny_retriever(tmp_path)
    one = Retriever(alone.config, alone._graphdef, alone._params, path=tmp_path, mesh=make_mesh(MeshConfig(data=1)))
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1]))
    shardings = shardings_of(blueprint(alone.config.model, mesh).abstract)
    params = nnx.State(jax.device_put(nnx.to_pure_dict(alone._params), shardings))
    many = Retriever(alone.config, alone._graphdef, params, path=tmp_path, mesh=mesh)
    used = []
    embed = many._embed
    monkeypatch.setattr(many, "_embed", lambda packed: used.append(packed.valid.any(1)) or embed(packed))
    np.testing.assert_allclose(many.encode(items), one.encode(items), atol=1e-5)
    assert used[0].all() and len(used[0]) == 8 and not used[-1].all(), "the last batch is ragged"
    assert many.fingerprint == one.fingerprint


def test_layers_apart_are_the_same_program_without_their_stack(retriever):
    packed, _ = next(retriever._batches.batches(mixed(2), None))
    whole, apart = (len(jax.tree.leaves(params)) for params in (retriever._params, retriever._alone))
    assert apart > whole
    stack = f"f32[{','.join(map(str, retriever._params['tower']['blocks']['gate_df'].shape))}]"
    texts = [
        retriever._forward.lower(each, packed).compile().as_text() for each in (retriever._params, retriever._alone)
    ]
    assert stack in texts[0] and stack not in texts[1]
    one, other = (retriever._forward(params, packed) for params in (retriever._params, retriever._alone))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_nothing_to_embed(retriever):
    assert retriever.encode([]).shape == (0, 16)


def test_an_image_on_disk_is_read_once(retriever, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(1)).save(path)
    first = retriever.encode([Item(image=path)])
    path.unlink()
    np.testing.assert_array_equal(first, retriever.encode([Item(image=path)]))
    np.testing.assert_allclose(first, retriever.encode([Item(image=picture(1))]), atol=1e-6)


def test_a_window_hands_on_what_fills_no_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("jfe_jax.embedding.retriever.CPU", ShapePolicy(512, 128, 1, 256))
    items, alone = mixed(90), tiny_retriever(tmp_path)
    mesh = make_mesh(MeshConfig(data=1))
    small = Retriever(alone.config, alone._graphdef, alone._params, path=tmp_path, mesh=mesh)
    expected, made = small.encode(items), []
    monkeypatch.setattr(batching, "WINDOW", 20)
    embed = small._embed
    monkeypatch.setattr(small, "_embed", lambda packed: made.append(packed) or embed(packed))
    np.testing.assert_allclose(small.encode(items), expected, atol=1e-5)
    assert sum(packed.valid.sum() for packed in made) == 90
    # All but the last are as full as the longest item allows.
    assert min((packed.segments > 0).mean() for packed in made[:-1]) > 0.8


def lengths(planner, sizes):
    return [room.row_tokens for room in planner.several(sizes)]


def test_rows_are_as_long_as_items_fill_best():
    planner = BatchShapePlanner(ModelConfig(), ACCELERATOR)
    # Rows of 512 would be half empty, rows of 640 hold two of them.
    assert lengths(planner, [Size(310, True)] * 400) == [640]
    assert lengths(planner, [Size(100, False)] * 400) == [640], "what is compiled is kept for a small gain"
    assert lengths(planner, [Size(500, True)] * 400) == [512], "and not for a large one"
    assert lengths(planner, [Size(12, False)]) == [512, 640], "few items are not worth a compilation"
    assert lengths(planner, [Size(700, False)]) == [512, 640, 768], "but if they fit into none"


def test_on_a_cpu_pools_have_rows_of_several_lengths():
    planner = BatchShapePlanner(ModelConfig(), CPU)
    pool = [Size(270 + n % 3, True) for n in range(200)] + [Size(400 + n % 9, True) for n in range(200)]
    assert lengths(planner, pool) == [272, 416]
    assert lengths(planner, pool[:390]) == [272, 416] and lengths(planner, pool[200:]) == [272, 416]
    small = dataclasses.replace(
        ModelConfig(), text=TextConfig(width=64, depth=2, mlp_dim=256, num_heads=2, head_dim=32)
    )
    assert len(lengths(BatchShapePlanner(small, CPU), pool)) == 1, "sooner computed than compiled for"


def test_few_items_are_one_row():
    planner = BatchShapePlanner(ModelConfig(), CPU)
    assert planner.single([Size(12, False), Size(90, False)]) == (1, 128, 1, 16)
    assert planner.single([Size(12, False), Size(300, True)]) == (1, 384, 1, 48)
    assert planner.single([Size(900, False)]).row_tokens == 1024
    assert planner.single([Size(300, True)] * 2) is None and planner.single([Size(8, False)] * 70) is None


def test_what_a_pool_leaves_for_the_end_is_one_row(retriever):
    maker = batching.BatchMaker(retriever.config, 1, ShapePolicy(512, 16, 2, 8))
    sizes = {number: Size(60, False) for number in range(17)}
    made = list(maker._batched(sizes))
    assert [room[:2] for room, _ in made] == [(8, 64), (8, 64), (1, 128)], "not seven rows of padding"
    assert sorted(number for _, groups in made for group in groups for number in group) == list(range(17))


def test_bad_items_are_named(retriever, tmp_path):
    with pytest.raises(UserError, match="query 7: neither text nor image"):
        retriever.encode([Item()], names=["query 7"])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        retriever.encode([Item(image=tmp_path / "bad.png")])


def test_fingerprint_tells_models_apart(retriever, tmp_path):
    assert tiny_retriever(tmp_path, seed=0).fingerprint == retriever.fingerprint
    assert tiny_retriever(tmp_path, seed=1).fingerprint != retriever.fingerprint
    assert tiny_retriever(tmp_path, kind="two_tower").fingerprint != retriever.fingerprint


def test_importing_the_package_does_not_import_jax():
    code = "import sys, jfe_jax, jfe_jax.cli.search, jfe_jax.cli.embed; jfe_jax.Item; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_attribute():
    import jfe_jax

    with pytest.raises(AttributeError, match="no attribute 'Encoder'"):
        _ = jfe_jax.Encoder
