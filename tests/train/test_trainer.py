"""`jfe train` from a config to a run directory: stopped, killed, continued, refused."""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from jfe_jax.checkpoint import model_io
from jfe_jax.checkpoint.manager import CheckpointManager
from jfe_jax.config import CheckpointConfig, to_yaml
from jfe_jax.errors import UserError
from jfe_jax.parallel import sharding
from jfe_jax.train import train_state as states
from jfe_jax.train import trainer
from jfe_jax.train.trainer import starting_point, train, with_tokenizer
from tests.train.conftest import STEPS


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run without interruption: its directory."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    said = []
    outcome = train(replace(config, output=str(run)), "auto", said.append)
    assert outcome == (STEPS, f"{run}: finished at step {STEPS}")
    assert any(line.startswith("step 1/8 loss") and "items/s" in line for line in said)
    assert any(line.startswith("step 8/8 loss") and line.endswith("0:00 left") for line in said)
    assert not any("warning" in line for line in said)
    return run


def lines(run):
    """Everything of the log but how fast it went."""
    read = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in ("items_per_second", "data_wait")} for one in read]


def parameters(run):
    return jax.device_get(nnx.to_pure_dict(model_io.load_model(run).params))


def assert_same_run(one, other):
    assert lines(one) == lines(other)
    assert model_io.find_latest_step(one) == model_io.find_latest_step(other)
    np.testing.assert_equal(parameters(one), parameters(other))


def test_a_run_directory_is_complete(config, whole):
    valued = {one["step"]: one["val_loss"] for one in lines(whole) if "val_loss" in one}
    assert list(valued) == [3, 4, 6, 8]
    best = min((3, 6, 8), key=valued.get)
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"6", "8", str(best)}
    assert (whole / "best").resolve().name == str(best)
    assert model_io.load_model(whole).config == replace(config, output=str(whole))
    assert (whole / "config.yaml").read_text() == to_yaml(replace(config, output=str(whole)))
    assert (whole / "tokenizer" / "tokenizer.json").exists()
    assert [one["step"] for one in lines(whole) if "loss" in one] == list(range(1, STEPS + 1))
    assert list((whole / "logs").glob("events.out.tfevents.*"))
    assert {"loss", "accuracy", "temperature", "learning_rate", "gradient_norm"} < set(lines(whole)[0])


def test_a_finished_run_is_left_as_it_is(config, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    outcome = train(replace(config, output=str(whole)), "auto", lambda line: None)
    assert outcome == (STEPS, f"{whole}: finished at step {STEPS}; nothing to do")
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


KILLED = """
import os, signal, sys
from jfe_jax.cli.main import main
from jfe_jax.checkpoint.manager import CheckpointManager
save = CheckpointManager.save
def save_and_die(self, step, *rest):
    save(self, step, *rest)
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointManager.save = save_and_die
sys.exit(main(sys.argv[1:]))
"""


def test_killed_while_it_writes_a_checkpoint_it_continues_to_the_bit(config, whole, tmp_path):
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(to_yaml(replace(config, output=str(run))))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "train", "--config", str(file)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # What it was doing is lost, and a log line may have been cut.
    with (run / "logs" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    again = subprocess.run(
        [sys.executable, "-m", "jfe_jax.cli.main", "train", "--config", str(file)], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{run}: finished at step {STEPS}\n"
    assert "continuing from step 3" in again.stderr or "continuing from step 6" in again.stderr
    assert_same_run(run, whole)


def end_at(text):
    """A `say` that has the process told to end when a line begins with `text`."""
    return lambda line: os.kill(os.getpid(), signal.SIGTERM) if line.startswith(text) else None


def test_told_to_end_it_saves_and_continues_to_the_bit(config, whole, tmp_path):
    mine = replace(config, output=str(tmp_path / "run"))
    outcome = train(mine, "auto", end_at("step 4: validation"))
    assert outcome.step == 4 and "stopped at step 4 of 8, saved" in outcome.message
    assert train(mine, "auto", lambda line: None).step == STEPS
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_chunks_and_narrow_moments_of_another_rule_continue_to_the_bit(config, tmp_path):
    optimizer = replace(config.optimizer, name="adafactor", steps=4, first_moment_dtype="bfloat16", schedule="wsd")
    mine = replace(
        config,
        optimizer=optimizer,
        loss=replace(config.loss, grad_cache_chunks=2),
        val_every_steps=0,
        checkpoint=CheckpointConfig(every_steps=2),
    )
    one, other = (replace(mine, output=str(tmp_path / name)) for name in ("one", "other"))
    assert train(one, "auto", lambda line: None).step == 4
    assert train(other, "auto", end_at("step 1/4")).step < 4
    assert train(other, "auto", lambda line: None).step == 4
    assert_same_run(tmp_path / "other", tmp_path / "one")


def test_it_continues_on_another_mesh(config, whole, tmp_path):
    mine = replace(config, output=str(tmp_path / "run"), val_every_steps=0, checkpoint=CheckpointConfig(every_steps=3))
    stopped = train(replace(mine, mesh=replace(config.mesh, fsdp=2)), "auto", end_at("step 1/8")).step
    assert stopped < STEPS
    said = []
    assert train(mine, "auto", said.append).step == STEPS
    assert said[0] == f"continuing from step {stopped}"
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_never_resuming_spares_what_is_there(config, whole):
    with pytest.raises(UserError, match=r"holds checkpoints up to step 8; remove it, choose another output"):
        train(replace(config, output=str(whole)), "never", lambda line: None)


@pytest.fixture(scope="module")
def broken(whole, tmp_path_factory):
    """A model whose every parameter is NaN."""
    loaded, path = model_io.load_model(whole), tmp_path_factory.mktemp("broken") / "model"
    nan = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), nnx.to_pure_dict(loaded.params))
    model_io.save_model(path, loaded.config, nan, loaded.tokenizer_dir)
    return path


def test_a_loss_that_stays_not_finite_stops_and_keeps_what_was_there(config, broken, tmp_path):
    run, said = tmp_path / "run", []
    optimizer = replace(config.optimizer, max_skipped_steps=2)
    mine = replace(config, output=str(run), init=str(broken), optimizer=optimizer)
    with pytest.raises(UserError, match=r"step 2: loss nan, .*not finite for 2 steps; stopped, there is no checkpoint"):
        train(mine, "auto", said.append)
    assert model_io.find_latest_step(run) is None
    assert any(line.startswith("warning: step 1 is skipped: loss nan") for line in said)
    assert json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None


def test_a_program_compiled_again_and_skipped_pairs_are_said(config, tmp_path, monkeypatch, caplog):
    def widened(batch):
        # One more empty row in each group.
        more = [np.pad(x, [(0, 0), (0, 1), (0, 0)]) for x in batch.packed[:3]]
        return batch._replace(packed=batch.packed._replace(tokens=more[0], segments=more[1], positions=more[2]))

    class Batches:
        def __init__(self, batches):
            self.batches, self.shape, self.count = batches, batches.shape, 0
            self.set_state, self.close = batches.set_state, batches.close

        def get_state(self):
            return self.batches.get_state() | {"bad": {"facts_task1": self.count}}

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            return widened(next(self.batches)) if self.count == 2 else next(self.batches)

    made = trainer._batches
    monkeypatch.setattr(trainer, "_batches", lambda *args: Batches(made(*args)))
    said = []
    mine = replace(config, output=str(tmp_path / "run"), val_every_steps=0, checkpoint=CheckpointConfig())
    caplog.set_level(logging.DEBUG, "jax")
    train(replace(mine, optimizer=replace(config.optimizer, steps=3)), "auto", said.append)
    compiled = [one.threadName for one in caplog.records if "Finished XLA compilation of jit(step)" in one.message]
    assert compiled == ["compile_0", "MainThread"], "ahead of the first step; and where its batch has another shape"
    warned = [line for line in said if "compiled again" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: step 2 was compiled again")
    assert [one["skipped_facts_task1"] for one in lines(tmp_path / "run")] == [1, 2, 3]


def test_stage_two_starts_from_stage_one_and_inherits_its_tokenizer(config, whole, tmp_path):
    second = replace(config, output=str(tmp_path / "two"), init=str(whole), tokens=replace(config.tokens, tokenizer=""))
    second = with_tokenizer(second)
    assert second.tokens.tokenizer == str(whole / "tokenizer")
    training = states.make_train_setup(second, sharding.make_mesh(second.mesh))
    checkpoints = CheckpointManager(tmp_path / "two", 1, lambda line: None)
    step, state = starting_point(training, checkpoints, None, lambda line: None)
    checkpoints.close()
    assert step == state.step == 0
    np.testing.assert_equal(jax.device_get(state.params), parameters(whole))


def test_stage_two_of_another_model_is_refused(config, whole, tmp_path):
    wider = replace(config.model, text=replace(config.model.text, mlp_dim=128))
    with pytest.raises(UserError, match=r"different model: model\.text\.mlp_dim: 64 != 128"):
        train(replace(config, output=str(tmp_path / "two"), init=str(whole), model=wider), "auto", lambda line: None)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"mesh": {"data": 3, "fsdp": 3}}, "needs 9 devices; there are 8"),
        ({"mesh": {"data": 3}}, r"data\.pairs: 8 is not divisible by the batch's 3 groups"),
        ({"tokens": {"tokenizer": ""}}, r"tokens\.tokenizer is empty"),
        ({"tokens": {"tokenizer": "/nowhere"}}, "/nowhere"),
        ({"data": {"path": "/nowhere"}}, "/nowhere"),
        ({"loss": {"min_temperature": 0.5}}, r"loss\.temperature is 0\.05"),
        ({"loss": {"matryoshka": {32: 1.0}}}, r"loss\.matryoshka: {32: 1\.0} has widths"),
        ({"optimizer": {"warmup_steps": 20}}, r"optimizer\.warmup_steps is 20"),
        ({"optimizer": {"freeze": ("visoin",)}}, "no parameters under 'visoin'"),
        ({"checkpoint": {"keep_every_steps": 4}}, r"keep_every_steps is 4; it has to be 0 \(none\) or a multiple"),
        ({"init": "/nowhere"}, "/nowhere: no checkpoint there"),
        ({"data": {"val_split": ""}}, r"data\.val_split names no split"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(config, tmp_path, changes, says):
    wrong = replace(config, output=str(tmp_path / "run"))
    for section, values in changes.items():
        value = replace(getattr(wrong, section), **values) if isinstance(values, dict) else values
        wrong = replace(wrong, **{section: value})
    with pytest.raises(UserError, match=says) as caught:
        train(wrong, "auto", lambda line: None)
    assert "\n" not in str(caught.value)
    assert model_io.find_latest_step(tmp_path / "run") is None
