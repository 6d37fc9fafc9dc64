"""Two commands on one output: the second is refused with the name of the first, and a kill leaves no lock behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jfe_jax.cli.main import main
from jfe_jax.errors import UserError
from jfe_jax.utils.output_lock import output_lock

HOLDER = """
import sys, time
from jfe_jax.utils.output_lock import output_lock
with output_lock(sys.argv[1], "jfe train"):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_lock_ends_with_its_process(tmp_path, end):
    process = start_holder(tmp_path / "run")
    with (
        pytest.raises(UserError, match=rf"in use by `jfe train` \(process {process.pid} on .*, since \d+-"),
        output_lock(tmp_path / "run", "jfe embed"),
    ):
        raise AssertionError("not reached")
    process.send_signal(end)
    process.communicate()
    with output_lock(tmp_path / "run", "jfe embed"):
        pass
    assert not list(tmp_path.iterdir()), "nothing is left, and the output itself was not made"


def test_names_of_one_place_share_a_lock(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with output_lock(tmp_path / "real", "jfe train"):
        for other in (tmp_path / "link", f"{tmp_path}/real/", os.path.relpath(tmp_path / "real")):
            with pytest.raises(UserError, match="in use by"), output_lock(other, "jfe train"):
                pass
        with output_lock(tmp_path / "real" / "inner", "jfe embed"), output_lock(tmp_path / "other", "jfe embed"):
            pass


def test_every_verb_that_writes_is_refused_an_output_in_use(mbeir_path, tmp_path, capsys):
    config, items, out = tmp_path / "c.yaml", tmp_path / "items.jsonl", tmp_path / "out"
    config.write_text(f"output: {out}\n")
    items.write_text('{"id": "a", "text": "b"}\n')
    commands = {
        "train": ["train", "--config", config],
        "embed": ["embed", "--checkpoint", tmp_path, "--items", items, "--out", out],
        "eval": ["eval", "--checkpoint", tmp_path, "--data", mbeir_path, "--out", out],
        "mine": ["mine", "--checkpoint", tmp_path, "--data", mbeir_path, "--out", out],
        "data prepare": ["data", "prepare", mbeir_path, "--out", out],
        "data emoji": ["data", "emoji", "--out", out],
        "convert from-hf": ["convert", "from-hf", tmp_path, out],
        "convert to-hf": ["convert", "to-hf", tmp_path, out],
    }
    with output_lock(out, "jfe mine"):
        for name, words in commands.items():
            assert main([str(word) for word in words]) == 1, name
            error = capsys.readouterr().err
            assert f"{out}: in use by `jfe mine` (process {os.getpid()}" in error and error.count("\n") == 1, name
    assert not out.exists()
    # The lock is free again for each of them: the next error is another one.
    assert main(["embed", "--checkpoint", str(tmp_path), "--items", str(items), "--out", str(out)]) == 1
    assert "in use" not in capsys.readouterr().err


def test_compare_is_refused_an_output_in_use(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jfe_jax.reports.comparison.load_models", lambda named: [])
    monkeypatch.setattr("jfe_jax.reports.comparison.compare", lambda models, **_: {})
    with output_lock(tmp_path / "out", "jfe compare"):
        assert main(["compare", "--out", str(tmp_path / "out"), f"a={tmp_path}"]) == 1
    assert "in use by `jfe compare`" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for inner in ("out", "deep/out"):
        refused = pytest.raises(UserError, match=f"{tmp_path}/file/{inner}: cannot write there")
        with refused, output_lock(tmp_path / "file" / inner, "jfe embed"):
            pass
