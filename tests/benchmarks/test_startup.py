"""What `jfe bench startup` starts is a whole run: its config loads, its data gives the batch of the first step."""

import contextlib
import subprocess
import sys

import pytest

from benchmarks import startup
from jfe_jax import config as configs
from jfe_jax.data.pipeline.loader import training_batches


@contextlib.contextmanager
def quiet(name, total):
    yield lambda count: None


@pytest.mark.filterwarnings("ignore")
def test_the_run_is_whole(tmp_path):
    config = configs.load(str(startup.make_run(tmp_path, quiet)))
    batches = training_batches(config, groups=1, split="train")
    try:
        packed = next(batches).packed
    finally:
        batches.close()
    assert packed.tokens.shape == (1, config.data.rows, config.data.row_tokens)
    assert packed.valid.sum() >= config.data.pairs


@pytest.mark.parametrize("says", ["step 1/1 loss 5.3, in-batch accuracy 6%, temperature 0.05, 3 items/s", "jfe: no"])
def test_the_first_step_is_what_is_waited_for(says, tmp_path, monkeypatch):
    start = subprocess.Popen

    def pretend(command, **settings):
        assert command[3:5] == ["train", "--config"]
        code = f"import sys, time; print('before', file=sys.stderr); print({says!r}, file=sys.stderr, flush=True)"
        wait = "; time.sleep(60)" if says.startswith("step") else ""
        return start([sys.executable, "-c", code + wait], **settings)

    monkeypatch.setattr(startup.subprocess, "Popen", pretend)
    if says.startswith("step"):
        assert startup.train(tmp_path / "config.yaml", {}) == "step 1/1 loss 5.3, in-batch accuracy 6%"
    else:
        with pytest.raises(RuntimeError, match="jfe: no"):
            startup.train(tmp_path / "config.yaml", {})
