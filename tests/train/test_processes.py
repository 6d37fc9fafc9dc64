"""Real processes on one machine: the same training as one process, killed in the middle or not."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jfe_jax.checkpoint import model_io
from jfe_jax.cli.main import main
from jfe_jax.config import Config, from_dict, to_yaml
from jfe_jax.train.trainer import train
from tests.support.mbeir_directory import IMAGE_TOKEN, VOCAB_SIZE, make_mbeir

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
STEPS = 6
# Process 1 dies while step 4's checkpoint is being written; or nothing happens.
PROGRAM = """
import os, signal, sys
import jax
from jfe_jax.cli.main import main
from jfe_jax.checkpoint.manager import CheckpointManager
event, step_of_it, *arguments = sys.argv[1:]
save = CheckpointManager.save
def save_and_die(self, step, *rest):
    save(self, step, *rest)
    if event == "kill" and step == int(step_of_it) and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointManager.save = save_and_die
sys.exit(main(arguments))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    source, data = tmp_path_factory.mktemp("mbeir"), tmp_path_factory.mktemp("data")
    make_mbeir(source, queries_per_task=8)
    assert main(["data", "prepare", str(source), "--out", str(data)]) == 0
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2}
    text = {"vocab_size": VOCAB_SIZE, "width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2, "head_dim": 16}
    tree = {
        "log_every_steps": 1,
        "val_every_steps": STEPS,
        "model": {"vision": vision, "text": text, "image_token": IMAGE_TOKEN},
        "tokens": {"tokenizer": str(source / "tokenizer"), "max_text_tokens": 40},
        "data": {"path": str(data), "val_split": "val", "pairs": 16, "rows": 16, "row_tokens": 64, "image_slots": 32},
        "optimizer": {"steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "mesh": {"data": 2, "fsdp": 4},
    }
    return from_dict(tree)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One process with eight devices."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(replace(config, output=str(run)), "auto", lambda line: None)
    return run


def start(config: Config, run: Path, processes: int, event: str = "none", step: int = 0) -> tuple[int, str]:
    file = run.with_suffix(".yaml")
    file.write_text(to_yaml(replace(config, output=str(run))))
    command = [sys.executable, str(LOCAL), "--processes", str(processes), "--devices", str(8 // processes), "--"]
    command += [sys.executable, "-c", PROGRAM, event, str(step), "train", "--config", str(file)]
    # Its own count of devices, not the eight of the tests.
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def losses(run: Path) -> list[float]:
    """Of every step, and at last of what the run has made of the model."""
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1), STEPS]
    return [line.get("loss", line.get("val_loss")) for line in lines]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("processes", "again"), [(4, 2)])
def test_processes_train_as_one_and_one_may_be_killed(config, whole, tmp_path, processes, again):
    run = tmp_path / "run"
    status, said = start(config, run, processes, "kill", step=4)
    assert status == 128 + signal.SIGKILL, said
    assert model_io.find_latest_step(run) in (2, 4)
    status, said = start(config, run, again)
    assert status == 0, said
    assert "continuing from step" in said and f"{run}: finished at step {STEPS}" in said
    assert not any(line.startswith("[1] step") for line in said.splitlines()), "one of them speaks"
    # To rounding: other processes add up in another order.
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-5)
