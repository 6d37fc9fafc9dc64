"""What is written is read back, on any mesh; what cannot be read is named."""

import gc
import json
import resource
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from jfe_jax.checkpoint import model_io
from jfe_jax.checkpoint.manager import CheckpointManager
from jfe_jax.config import MeshConfig, OptimizerConfig
from jfe_jax.data.processor import train_tokenizer
from jfe_jax.errors import UserError
from jfe_jax.parallel import sharding
from jfe_jax.train import train_state as states
from jfe_jax.train.init_from import load_initial_weights
from tests.support import tiny_training as tiny

CONFIG = tiny.config(optimizer=OptimizerConfig(freeze=("vision",)))


def training(config=CONFIG, sizes=(1, 1, 1)):
    mesh = sharding.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    return states.make_train_setup(config, mesh)


@pytest.fixture(scope="module")
def state():
    return states.init_train_state(training())


@pytest.fixture
def warnings():
    return []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a text"], 261, path)
    return path


def rest(state):
    return state._replace(params={})._asdict()


def save(run, state, steps, warnings, keep=3):
    checkpoints = CheckpointManager(run, keep, warnings.append)
    for step in steps:
        checkpoints.save(step, CONFIG, state.params, rest(state), {"next": step})
    checkpoints.close()


def restore(run, warnings, config=CONFIG, sizes=(1, 1, 1)):
    abstract = training(config, sizes).abstract
    checkpoints = CheckpointManager(run, 3, warnings.append)
    try:
        return checkpoints.restore(config, abstract.params, rest(abstract))
    finally:
        checkpoints.close()


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_restore_returns_the_newest_checkpoint_on_any_mesh(tmp_path, state, warnings, sizes):
    save(tmp_path, state, [2, 4], warnings)
    saved = restore(tmp_path, warnings, sizes=sizes)
    assert (saved.step, saved.data) == (4, {"next": 4})
    assert_equal(saved.params, state.params)
    assert_equal(saved.train, rest(state))
    wanted = training(CONFIG, sizes).abstract.params
    assert jax.tree.map(lambda x: x.sharding, saved.params) == jax.tree.map(lambda x: x.sharding, wanted)
    assert warnings == []


def test_restore_without_checkpoints_returns_none(tmp_path, warnings):
    assert restore(tmp_path, warnings) is None


def test_only_the_newest_checkpoints_are_kept(tmp_path, state, warnings):
    save(tmp_path, state, [1, 2, 3], warnings, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_checkpoints_are_retained_by_number_interval_and_loss(tmp_path, state, warnings):
    losses = {1: 3.0, 2: 0.5, 3: 0.7, 4: 2.0, 5: float("nan"), 6: 0.9, 7: None}

    def kept(first, last):
        checkpoints = CheckpointManager(tmp_path, 1, warnings.append, keep_every=4, keep_best=2)
        for step in range(first, last + 1):
            checkpoints.save(step, CONFIG, state.params, rest(state), {"next": step}, losses[step])
        checkpoints.wait()
        checkpoints.close()
        best = (tmp_path / "best").resolve().name
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir()), best

    assert kept(1, 3) == (["2", "3"], "2")
    # A process that continues knows the losses of what is there.
    assert kept(4, 7) == (["2", "3", "4", "7"], "2")
    assert model_io.load_model(tmp_path / "best").step == 2
    assert model_io.load_model(tmp_path).step == 7


@pytest.fixture
def unfinished_reads():
    """Orbax leaves the reads of the other arrays unfinished when one fails: they go here, and not in a later test."""
    yield
    gc.collect()


def damaged(test):
    """Marks a test that reads a damaged checkpoint."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("unfinished_reads")(ignored(test))


def cut(path):
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def lose_iterator(path):
    for file in (path / "data").glob("process_*"):
        file.unlink()


def lose_config(path):
    (path / "config" / "data.json").write_text("{")


@damaged
@pytest.mark.parametrize("damage", [cut, lose_iterator, lose_config])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, state, warnings, damage):
    save(tmp_path, state, [2, 4], warnings)
    damage(tmp_path / "checkpoints" / "4")
    assert restore(tmp_path, warnings).step == 2
    assert len(warnings) == 1 and "checkpoints/4 is damaged" in warnings[0] and "\n" not in warnings[0]
    # The step can be written again, and the damaged files are still there.
    save(tmp_path, state, [4], warnings)
    assert restore(tmp_path, warnings).step == 4
    assert (tmp_path / "damaged" / "4").exists()


def test_an_incomplete_checkpoint_is_named_and_the_previous_one_used(tmp_path, state, warnings):
    save(tmp_path, state, [2], warnings)
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    assert restore(tmp_path, warnings).step == 2
    assert len(warnings) == 1 and "incomplete" in warnings[0]


@damaged
def test_restore_fails_if_all_checkpoints_are_damaged(tmp_path, state, warnings):
    save(tmp_path, state, [2], warnings)
    cut(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        restore(tmp_path, warnings)


def test_a_different_model_is_rejected_with_the_differing_keys(tmp_path, state, warnings):
    save(tmp_path, state, [2], warnings)
    model = replace(CONFIG.model, pooling="mean", text=replace(CONFIG.model.text, width=64), dtype="bfloat16")
    with pytest.raises(UserError, match=r"different model: model.pooling: last != mean; model.text.width: 32 != 64$"):
        restore(tmp_path, warnings, replace(CONFIG, model=model))
    assert restore(tmp_path, warnings).step == 2


def test_different_frozen_groups_are_rejected(tmp_path, state, warnings):
    save(tmp_path, state, [2], warnings)
    with pytest.raises(UserError, match=r"optimizer\.freeze"):
        restore(tmp_path, warnings, replace(CONFIG, optimizer=OptimizerConfig()))


def test_the_state_of_a_different_optimizer_is_rejected_and_not_called_damaged(tmp_path, state, warnings):
    save(tmp_path, state, [2], warnings)
    changed = replace(CONFIG, optimizer=replace(CONFIG.optimizer, clip_norm=0.0))
    with pytest.raises(UserError, match=r"contains the state of a different optimizer \(optimizer\..*differ\)"):
        restore(tmp_path, warnings, changed)
    with pytest.raises(UserError, match=r"optimizer\.name: adamw != muon"):
        restore(tmp_path, warnings, replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="muon")))
    assert restore(tmp_path, warnings).step == 2


def test_a_checkpoint_without_skipped_counter_restores_zero(tmp_path, state, warnings):
    checkpoints = CheckpointManager(tmp_path, 3, warnings.append)
    old = {name: value for name, value in rest(state).items() if name != "skipped"}
    checkpoints.save(2, CONFIG, state.params, old, {"next": 2})
    checkpoints.close()
    assert_equal(restore(tmp_path, warnings).train, rest(state))


def test_moments_are_restored_in_a_different_dtype(tmp_path, state, warnings):
    save(tmp_path, state, [2], warnings)
    optimizer = replace(CONFIG.optimizer, first_moment_dtype="bfloat16", second_moment_dtype="bfloat16")
    saved = restore(tmp_path, warnings, replace(CONFIG, optimizer=optimizer), (1, 2, 1))
    for one, other in zip(jax.tree.leaves(saved.train), jax.tree.leaves(rest(state)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other.astype(one.dtype)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(saved.train["optimizer"])} == {"bfloat16", "int32"}


def test_a_model_without_training_state_cannot_be_resumed(tmp_path, state, warnings, tokenizer):
    model_io.save_model(tmp_path / "model", CONFIG, state.params, tokenizer)
    with pytest.raises(UserError, match="contains a model without training state"):
        restore(tmp_path / "model", warnings)


@damaged
def test_a_different_number_of_processes_takes_over_the_remaining_data(tmp_path, state, warnings):
    one = {"base": 0, "next": 3, "waiting": [4], "taken": 2, "bad": {}}
    save(tmp_path, state, [2, 4], warnings)
    for step in (2, 4):
        data = tmp_path / "checkpoints" / str(step) / "data"
        (data / "process_0-of-1.json").rename(data / "process_0-of-2.json")
        (data / "process_0-of-2.json").write_text(json.dumps(one))
        (data / "process_1-of-2.json").write_text(json.dumps(one | {"next": 2, "waiting": []}))
    # Of the first 6 the second process, which takes every odd one, has had two.
    saved = restore(tmp_path, warnings).data
    assert (saved["base"], saved["waiting"], saved["taken"]) == (6, [4, 5], 4)
    assert warnings == []
    (tmp_path / "checkpoints" / "4" / "data" / "process_1-of-2.json").unlink()
    assert restore(tmp_path, warnings).step == 2
    # Orbax leaves the reason out.
    assert len(warnings) == 1 and "checkpoints/4 is damaged" in warnings[0]


@contextmanager
def little_disk(size):
    # Files that cannot grow: what a full disk is to a writer, without needing one.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(tmp_path, state, warnings):
    save(tmp_path, state, [2], warnings, keep=1)
    checkpoints = CheckpointManager(tmp_path, 1, warnings.append)
    with little_disk(8000):
        with pytest.raises(UserError, match=r"cannot write the checkpoint .*step 2 is intact") as caught:
            checkpoints.save(4, CONFIG, state.params, rest(state), {"next": 4})
            checkpoints.wait()
        assert "\n" not in str(caught.value)
        checkpoints.close()
    assert restore(tmp_path, warnings).step == 2


@pytest.mark.parametrize("step_directory", [False, True])
def test_a_model_is_saved_and_opened(tmp_path, state, tokenizer, step_directory):
    run = tmp_path / "model"
    model_io.save_model(run, CONFIG, nnx.State(state.params), tokenizer)
    loaded = model_io.load_model(run / "checkpoints" / "0" if step_directory else run)
    assert loaded.config == CONFIG and loaded.step == 0
    assert_equal(nnx.to_pure_dict(loaded.params), state.params)
    assert (loaded.tokenizer_dir / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    packed = tiny.batch(CONFIG, 1).packed
    embeddings = jax.eval_shape(lambda params: nnx.merge(loaded.graphdef, params)(packed), loaded.params)
    assert embeddings.shape == (1, 32, 32)
    with pytest.raises(UserError, match="already exists"):
        model_io.save_model(run, CONFIG, loaded.params, tokenizer)


def test_a_model_opens_on_a_mesh(tmp_path, state, tokenizer):
    model_io.save_model(tmp_path / "model", CONFIG, state.params, tokenizer)
    loaded = model_io.load_model(tmp_path / "model", sharding.make_mesh(MeshConfig(data=1, fsdp=8)))
    assert not loaded.params["tower"]["blocks"]["down_fd"].sharding.is_fully_replicated


def test_a_model_opens_in_another_type(tmp_path, state, tokenizer):
    model_io.save_model(tmp_path / "model", CONFIG, state.params, tokenizer)
    params = nnx.to_pure_dict(model_io.load_model(tmp_path / "model", dtype="bfloat16").params)
    assert_equal(params, jax.tree.map(lambda x: x.astype("bfloat16"), state.params))


@damaged
def test_a_training_checkpoint_opens_as_a_model(tmp_path, state, warnings):
    save(tmp_path, state, [2, 4], warnings)
    assert model_io.load_model(tmp_path).step == 4
    cut(tmp_path / "checkpoints" / "4" / "params")
    assert model_io.load_model(tmp_path).step == 2


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        model_io.load_model(tmp_path / "nowhere")


def test_parameters_start_another_run_of_the_same_model_only(tmp_path, state, tokenizer):
    model_io.save_model(tmp_path / "one", CONFIG, state.params, tokenizer)
    assert_equal(load_initial_weights(str(tmp_path / "one"), training()).params, state.params)
    other = replace(CONFIG, model=replace(CONFIG.model, text=replace(CONFIG.model.text, mlp_dim=128)))
    with pytest.raises(UserError, match=r"model\.text\.mlp_dim: 64 != 128"):
        load_initial_weights(str(tmp_path / "one"), training(other))
