"""Training with adapters: what moves, what is kept, what it stands on."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfe_jax.checkpoint import base_model, model_io
from jfe_jax.checkpoint.streaming import read_stored_names
from jfe_jax.config import CheckpointConfig, LoraConfig, MeshConfig, OptimizerConfig
from jfe_jax.data.item import EncodedItem
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.errors import UserError
from jfe_jax.models import lora
from jfe_jax.models.abstract_model import blueprint, random_parameters
from jfe_jax.parallel import sharding
from jfe_jax.train import train_state as states
from jfe_jax.train.init_from import load_initial_weights
from jfe_jax.train.optimizer import trained_mask
from jfe_jax.train.train_step import gradients, make_train_step
from jfe_jax.train.trainer import train
from jfe_jax.utils import pytrees
from tests.support import tiny_training as tiny
from tests.support.mbeir_directory import IMAGE_TOKEN
from tests.train.test_trainer import assert_same_run, end_at

LORA = LoraConfig(rank=2, alpha=4, targets=("attention", "mlp", "vision.mlp"))


@pytest.fixture(scope="module")
def adapted(config, tmp_path_factory):
    """A config of four steps over a base that is saved beside the runs."""
    runs = tmp_path_factory.mktemp("lora")
    params = jax.jit(lambda: random_parameters(config.model, 5))()
    model_io.save_model(runs / "base", config, params, config.tokens.tokenizer)
    return replace(
        config,
        init=str(runs / "base"),
        output=str(runs / "whole"),
        model=replace(config.model, lora=LORA),
        optimizer=replace(config.optimizer, steps=4, learning_rate=1e-2, train=("tower.norm",)),
        checkpoint=CheckpointConfig(every_steps=2),
        val_every_steps=0,
    )


@pytest.fixture(scope="module")
def whole(adapted):
    train(adapted, "auto", lambda line: None)
    return Path(adapted.output)


def parameters(run) -> dict[str, np.ndarray]:
    return pytrees.flatten(jax.device_get(nnx.to_pure_dict(model_io.load_model(run).params)))


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_only_adapters_and_chosen_parts_move_and_are_kept(adapted, whole):
    before, after = parameters(adapted.init), parameters(whole)
    moved = {name for name in after if name not in before or (before[name] != after[name]).any()}
    assert moved == {name for name in after if lora.is_adapter(name)} | {"tower.norm.scale_d"}
    assert all(leaf.any() for name, leaf in after.items() if lora.is_adapter(name))
    assert len([name for name in moved if lora.is_adapter(name)]) == 2 * (4 + 3 + 2)
    place = whole / "checkpoints" / "4"
    assert set(read_stored_names(place / "params")) == moved
    # A tenth of the parameters here; of a real model it is a hundredth.
    kept, count = sum(after[name].size for name in moved), sum(leaf.size for leaf in before.values())
    assert kept < count / 4
    assert size(place / "params") < size(Path(adapted.init) / "checkpoints" / "0" / "params") / 2


def test_moments_are_of_what_moves(adapted):
    there = states.make_train_setup(adapted, sharding.make_mesh(adapted.mesh))
    moving = pytrees.flatten(pytrees.select(there.abstract.params, there.checkpointed_mask))
    shapes = [leaf.shape for leaf in jax.tree.leaves(there.abstract.optimizer) if leaf.ndim]
    assert sorted(shapes) == sorted(2 * [leaf.shape for leaf in moving.values()])


def test_the_compiled_step_has_no_gradients_of_what_stays():
    """Of three equal products of a kernel, forward, to its input and to itself, the last is not there."""

    def cost(cfg):
        config = tiny.config()
        wide = replace(config.model.text, width=64, mlp_dim=512)
        config = replace(config, model=replace(config.model, text=wide, lora=cfg))
        there = states.make_train_setup(config, sharding.make_mesh(MeshConfig(data=1)))
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.batch(config, 1)))
        compiled = make_train_step(there).lower(there.abstract, batch).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis()

    (some, small), (every, large) = cost(replace(LORA, rank=1, targets=("mlp",))), cost(LoraConfig())
    assert some < 0.75 * every
    # Parameters stay one copy, in place; of two moments each next to nothing is left.
    assert small.argument_size_in_bytes < 0.45 * large.argument_size_in_bytes
    assert small.alias_size_in_bytes > 0.95 * small.output_size_in_bytes


def test_stopped_it_continues_to_the_bit(adapted, whole, tmp_path):
    mine = replace(adapted, output=str(tmp_path / "run"))
    assert train(mine, "auto", end_at("step 1/4")).step < 4
    said = []
    assert train(mine, "auto", said.append).step == 4
    assert said[0].startswith("continuing from step")
    assert_same_run(tmp_path / "run", whole)


def test_both_directories_may_move_together(adapted, whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path / "moved")
    file = tmp_path / "moved" / "whole" / base_model.BASE_REF_FILE
    file.write_text(file.read_text().replace(str(whole.parent), "/nowhere"))
    np.testing.assert_equal(parameters(tmp_path / "moved" / "whole"), parameters(whole))


def test_another_base_is_refused_and_a_missing_one_named(adapted, whole, tmp_path):
    params = nnx.to_pure_dict(model_io.load_model(adapted.init).params)
    kernel = params["tower"]["blocks"]["up_df"]
    params["tower"]["blocks"]["up_df"] = kernel.at[0, 3, 4].set(kernel[0, 4, 3]).at[0, 4, 3].set(kernel[0, 3, 4])
    model_io.save_model(
        tmp_path / "other",
        replace(adapted, model=replace(adapted.model, lora=LoraConfig())),
        params,
        adapted.tokens.tokenizer,
    )
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    found = base_model.read_base_ref(run)
    base_model.write_base_ref(run, found._replace(path=tmp_path / "other" / "checkpoints" / "0"))
    with pytest.raises(UserError, match=r"other/checkpoints/0: not the weights that the adapters of .*run were"):
        model_io.load_model(run)
    more = replace(adapted, output=str(run), optimizer=replace(adapted.optimizer, steps=6))
    with pytest.raises(UserError, match="not the weights"):
        train(more, "auto", lambda line: None)
    base_model.write_base_ref(run, found._replace(path=tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone: base model not found; the adapters of .*base\.json"):
        model_io.load_model(run)


def started(config, note):
    there = states.make_train_setup(config, sharding.make_mesh(config.mesh))
    start = load_initial_weights(config.init, there)
    assert note in start.message
    return there, start


def test_stage_two_trains_the_same_adapters_on(adapted, whole):
    second = replace(adapted, init=str(whole))
    _, start = started(second, "trained on")
    np.testing.assert_equal(pytrees.flatten(jax.device_get(start.params)), parameters(whole))
    assert start.base == base_model.read_base_ref(whole)
    with pytest.raises(UserError, match=r"trained tower\.norm\.scale_d, which this run would not keep"):
        started(replace(second, optimizer=replace(second.optimizer, train=())), "")


@pytest.mark.parametrize("rank", [0, 3])
def test_stage_two_with_other_adapters_merges_the_first(adapted, whole, rank, tmp_path):
    other = replace(LORA, rank=rank)
    second = replace(adapted, init=str(whole), model=replace(adapted.model, lora=other), output=str(tmp_path / "two"))
    second = replace(second, optimizer=replace(second.optimizer, train=()))
    there, start = started(second, "merged")
    state = states.init_train_state(there, start.params)
    item = EncodedItem(np.array([IMAGE_TOKEN] * 4 + [2, 7, 9, 1], np.int32), np.eye(16)[..., None].repeat(3, -1) * 200)
    batch = pack([item], groups=1, rows=1, row_tokens=8, image_slots=1, image_size=16)
    loaded = model_io.load_model(whole)
    wanted = jax.jit(lambda params: nnx.merge(loaded.graphdef, params)(batch))(loaded.params)
    given = jax.jit(lambda params: nnx.merge(there.model.graphdef, params)(batch))(state.params)
    np.testing.assert_allclose(given, wanted, atol=1e-6)
    if rank:
        # What the new adapters stand on is the first run, adapters included; it is found and merged again.
        (tmp_path / "two").mkdir()
        base_model.write_base_ref(tmp_path / "two", start.base)
        again = pytrees.flatten(model_io.restore_base_params(tmp_path / "two", there.mesh))
        np.testing.assert_equal(jax.device_get(again), jax.device_get(pytrees.flatten(start.params)))
    else:
        assert start.base is None


def test_gradients_on_a_mesh_equal_those_of_one_device():
    def of(sizes):
        config = tiny.config(optimizer=OptimizerConfig(train=("projector.bias_d",)))
        config = replace(
            config, model=replace(config.model, lora=replace(LORA, targets=("attention", "mlp", "vision")))
        )
        there = states.make_train_setup(
            config, sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
        )
        batch = sharding.put_batch(tiny.batch(config, sharding.group_count(there.mesh)), there.mesh)
        state = states.init_train_state(there)
        # With B at zero A's gradient is zero.
        params = jax.tree.map(lambda leaf: leaf + 0.01, state.params)
        trained = trained_mask(config, there.model.axes)
        with jax.set_mesh(there.mesh):
            return jax.device_get(
                jax.jit(lambda tree: gradients(there, tree, batch, trained)[0])(states.trainable(params, state.loss))
            )

    alone, spread = of((1, 1, 1)), of((2, 2, 2))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(alone["model"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), alone, spread)


def test_a_fingerprint_is_the_same_on_every_mesh():
    model = tiny.config().model
    meshes = (sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1])) for sizes in ((1, 1), (2, 4)))
    one, other = (
        sharding.init_sharded(
            lambda: random_parameters(model, 0), jax.tree.map(lambda x: x.sharding, blueprint(model, mesh).abstract)
        )
        for mesh in meshes
    )
    assert base_model.fingerprint_params(one) == base_model.fingerprint_params(other)
    other["tower"]["norm"]["scale_d"] = other["tower"]["norm"]["scale_d"].at[3].add(1e-7)
    assert base_model.fingerprint_params(one) != base_model.fingerprint_params(other)


@pytest.mark.parametrize(
    "changes, optimizer, says",
    [
        ({"targets": ("atention",)}, {}, r"model\.lora\.targets: no 'atention'; there are attention, mlp, vision, "),
        ({"targets": ()}, {}, "targets is empty"),
        ({"rank": -1}, {}, "rank has to be 0 or more"),
        ({"alpha": 0.0}, {}, "alpha above 0"),
        ({}, {"train": ("tower.blocks",)}, r"tower\.blocks\.attention\.query_dnh.* both whole and by an adapter"),
        ({}, {"train": ("projektor",)}, r"optimizer\.train: no parameters under 'projektor'"),
        ({"rank": 0}, {"train": ("projector",)}, r"optimizer\.train goes with model\.lora"),
    ],
)
def test_what_cannot_work_is_said(adapted, changes, optimizer, says):
    wrong = replace(
        adapted,
        model=replace(adapted.model, lora=replace(LORA, **changes)),
        optimizer=replace(adapted.optimizer, **optimizer),
    )
    if not wrong.model.lora.rank and not optimizer:
        wrong = replace(wrong, optimizer=replace(wrong.optimizer, train=()))
    with pytest.raises(UserError, match=says):
        states.make_train_setup(wrong, sharding.make_mesh(wrong.mesh))


def test_adapters_on_random_weights_are_refused(adapted, tmp_path):
    with pytest.raises(UserError, match="adapters stand on trained weights; give a checkpoint as init"):
        train(replace(adapted, init="", output=str(tmp_path / "run")), "auto", lambda line: None)
