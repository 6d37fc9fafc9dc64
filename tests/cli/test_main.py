"""The command line's contract: exit statuses, one clear line, nothing heavy imported to answer `--help`."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

import jfe_jax
from benchmarks import BENCHMARKS
from jfe_jax.cli import main as cli
from jfe_jax.errors import UserError


@pytest.mark.parametrize("verb", [[], ["bench"]])
def test_help_imports_nothing_heavy(verb):
    code = (
        "import sys\n"
        "from jfe_jax.cli.main import main\n"
        f"try: main({[*verb, '--help']})\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'flax', 'grain', 'tensorflow_datasets', 'transformers', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in (BENCHMARKS if verb else cli.VERBS))


def test_the_bare_command_prints_the_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: jfe") and not printed.err
    assert all(name in printed.out for name in cli.VERBS)


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"jfe {metadata.version('jfe-jax')}\n" == f"jfe {jfe_jax.__version__}\n"


@pytest.mark.parametrize("words", [["fly"], ["--fly"], ["eval", "--no-such-flag"], ["train"]])
def test_wrong_usage_exits_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "--config", "no/such.yaml"], "no/such.yaml"),
        (["data", "check", "no/such/dir"], "no/such/dir"),
        (["convert", "to-hf", "no/such/run", "out"], "no/such/run"),
        (["convert", "from-hf", "no/such/model", "out"], "no/such/model"),
        (["eval", "--checkpoint", "no/such/run", "--data", "no/such/dir", "--out", "out"], "no/such"),
        (["search", "--index", "no/such/index", "--text", "apple"], "no/such/index"),
    ],
)
def test_bad_input_is_one_line_that_names_it(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"jfe {words[0]}: ")
    assert named in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", cli.RUNNING)
def test_what_runs_a_model_keeps_what_it_compiled(verb, monkeypatch, tmp_path):
    words = {
        "train": ["--config", "no.yaml"],
        "embed": ["--checkpoint", "no", "--items", "no.jsonl", "--out", "out"],
        "eval": ["--checkpoint", "no", "--data", "no", "--out", "out"],
        "mine": ["--checkpoint", "no", "--data", "no", "--out", "out"],
        "search": ["--index", "no", "--text", "apple"],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # jax has been imported already: what a command would find is in the environment.
    for given, expected in (("", str(tmp_path / "jfe_jax" / "xla")), ("mine", "mine")):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
        assert cli.main([verb, *words[verb]]) == 1
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == expected


def test_debug_shows_where_it_came_from():
    with pytest.raises(UserError):
        cli.main(["train", "--config", "no/such.yaml", "--debug"])


def test_full_disk_is_one_line(capsys, monkeypatch):
    def run(_):
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("jfe_jax.cli.train.run", run)
    assert cli.main(["train", "--config", "x.yaml"]) == 1
    assert capsys.readouterr().err == "jfe train: runs/x: No space left on device\n"
