"""`jfe bench`: what a benchmark measured is printed, stored, read again and put between a page's markers."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.common import result as results
from benchmarks.common import results_store, summary, tables
from benchmarks.common.interleaved import by_turns
from benchmarks.common.result import Column, Result, Table, table
from jfe_jax.cli import main as cli
from jfe_jax.cli.bench import PAGES
from jfe_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PAGE = "before\n\n<!-- bench:cheap -->\nold figures\n<!-- /bench:cheap -->\n\nafter\n"


@pytest.fixture
def cheap(monkeypatch):
    """A benchmark of its own, `jfe bench cheap`."""

    class Module:
        @staticmethod
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--rounds", type=int, default=3)

        @staticmethod
        def run(args: argparse.Namespace, progress: results.Progress) -> Result:
            if args.rounds == 0:
                raise UserError("--rounds is 0: give at least 1")
            with progress("rounds", args.rounds) as done:
                done(args.rounds)
            seconds = [float(turn) for turn in range(args.rounds)]
            return Result(
                tables=[table({"side": "", "s": ".1f"}, [["ours", seconds], ["a|b", None]], "Times")],
                packages=["pytest", "no-such-package"],
                method="by turns",
                checked="nothing",
                notes=["It is cheap."],
            )

    monkeypatch.setitem(benchmarks.BENCHMARKS, "cheap", benchmarks.Benchmark("benchmarks.cheap", "costs nothing"))
    monkeypatch.setitem(sys.modules, "benchmarks.cheap", Module)


def test_a_result_is_printed_and_stored_with_its_settings(cheap, tmp_path, capsys):
    file = tmp_path / "new" / "cheap.json"
    assert cli.main(["bench", "cheap", "--json", str(file), "--rounds", "5"]) == 0
    printed, result = capsys.readouterr().out, results.read(file)
    assert printed == tables.as_text(result)
    assert result.command == "jfe bench cheap --rounds 5"
    assert result.threads >= 1 and "cores" in result.machine and len(result.date) == 10
    assert result.versions["pytest"] == pytest.__version__ and result.versions["no-such-package"] == "not installed"
    assert result.tables[0].rows[0] == ["ours", [0.0, 1.0, 2.0, 3.0, 4.0]], "every round is kept"
    assert printed.splitlines()[2:] == [
        "Times",
        "side                 s",
        "ours  2.0 (0.0 to 4.0)",
        "a|b                  –",
        "",
        "It is cheap.",
    ]


def test_the_command_is_what_was_measured_not_where():
    assert results.command("x", ["--dir", "/a b", "-k", "3 4", "--json=/c"]) == "jfe bench x -k '3 4'"


def test_sections_are_made_from_stored_results_and_nothing_else_changes(cheap, tmp_path):
    page, file = tmp_path / "page.md", tmp_path / "cheap.json"
    page.write_text(PAGE)
    cli.main(["bench", "cheap", "--json", str(file)])
    assert cli.main(["bench", "readme", "--pages", str(page), "--results", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith("before\n\n<!-- bench:cheap -->\n") and text.endswith("<!-- /bench:cheap -->\n\nafter\n")
    assert "old figures" not in text
    assert "| side | s |\n|---|---:|\n| ours | 1.0 (0.0 to 2.0) |\n| a\\|b | – |\n" in text
    assert "`jfe bench cheap` (" in text and "Compared first: nothing. By turns." in text and "It is cheap." in text
    # Again, from a result by hand: figures follow the file.
    stored_fields = json.loads(file.read_text())
    stored_fields["tables"][0]["rows"][0][1] = [7.25]
    file.write_text(json.dumps(stored_fields))
    results_store.fill([page], tmp_path)
    assert page.read_text() == text.replace("1.0 (0.0 to 2.0)", "7.2")


def test_all_runs_the_stored_commands_again(cheap, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for name in ("cheap", "other"):
        cli.main(["bench", "cheap", "--rounds", "2", "--json", str(tmp_path / f"{name}.json")])
    called = []

    def run(words: list[str]) -> subprocess.CompletedProcess:
        assert words[1:3] == ["-m", "jfe_jax.cli.main"]
        called.append(words[3:])
        more = words[3:-3] + (["4"] if "cheap" in words[-1] else ["0"]) + words[-2:]
        return subprocess.CompletedProcess(words, cli.main(more))

    monkeypatch.setattr(results_store.subprocess, "run", run)
    before = (tmp_path / "other.json").read_text()
    flags = ["--pages", str(page), "--results", str(tmp_path)]
    assert cli.main(["bench", "all", *flags]) == 1, "one failed"
    assert capsys.readouterr().err.splitlines()[-1].startswith("jfe bench: other: did not run to the end")
    assert [words[:4] for words in called] == [["bench", "cheap", "--rounds", "2"]] * 2
    assert "1.5 (0.0 to 3.0)" in page.read_text() and (tmp_path / "other.json").read_text() == before
    assert cli.main(["bench", "all", *flags, "--skip", "other"]) == 0 and len(called) == 3
    assert cli.main(["bench", "all", *flags, "--only", "nothing"]) == 1 and len(called) == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (PAGE.replace("/bench:cheap", "/bench:other"), "has no <!-- /bench:NAME -->"),
        (PAGE.replace("cheap", "missing"), "missing.json: no such file"),
        (PAGE.replace("cheap", "broken"), "broken.json: not a result"),
    ],
)
def test_a_page_that_cannot_be_filled_stays_as_it_is(text, named, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    (tmp_path / "broken.json").write_text('{"tables": [{"columns": [], "rows": [], "colour": 1}]}')
    assert cli.main(["bench", "readme", "--pages", str(page), "--results", str(tmp_path)]) == 1
    assert named in capsys.readouterr().err
    assert page.read_text() == text


def test_bad_input_of_a_benchmark_is_one_line(cheap, capsys, tmp_path):
    assert cli.main(["bench", "cheap", "--rounds", "0"]) == 1
    assert capsys.readouterr().err == "jfe bench: --rounds is 0: give at least 1\n"
    for words in (["cheap", "--nonsense"], ["nonsense"], ["readme", "--rounds", "3"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *words])
        assert stop.value.code == 2
    with pytest.raises(ValueError, match="2 columns"):
        Table(columns=[Column(name="a"), Column(name="b")], rows=[["x"]])


def test_sides_take_turns_and_neither_always_follows_the_other():
    order, told = [], []
    seconds = by_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, told.append)
    assert order == ["a", "b", "b", "a", "a", "b"] and sum(told) == 6
    assert {name: len(own) for name, own in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_every_benchmark_is_of_one_form(name):
    module = importlib.import_module(benchmarks.BENCHMARKS[name].module)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert callable(module.run) and "--json" not in parser.format_help()


def test_a_page_that_cannot_be_filled_leaves_the_other_pages_as_they_are(cheap, tmp_path, capsys):
    for name, text in (("a.md", PAGE), ("b.md", PAGE.replace("cheap", "missing"))):
        (tmp_path / name).write_text(text)
    cli.main(["bench", "cheap", "--json", str(tmp_path / "cheap.json")])
    assert cli.main(["bench", "readme", "--pages", str(tmp_path), "--results", str(tmp_path)]) == 1
    assert "b.md: " in capsys.readouterr().err and (tmp_path / "a.md").read_text() == PAGE
    assert cli.main(["bench", "readme", "--pages", str(tmp_path / "c.md"), "--results", str(tmp_path)]) == 1
    assert "c.md: no such file" in capsys.readouterr().err


def test_the_pages_show_what_is_stored():
    shown = []
    for page in results_store.page_files([ROOT / path for path in PAGES]):
        text = page.read_text()
        made = tables.filled(text, lambda name: results.read(ROOT / "docs" / "bench" / f"{name}.json"))
        assert made == text, f"{page.name}: run jfe bench readme"
        shown += tables.names(text)
    assert len(shown) == len(set(shown))
    stems = {file.stem for file in (ROOT / "docs" / "bench").glob("*.json")}
    assert set(shown) == stems | {summary.NAME}, "every stored result is shown"


def test_stored_commands_are_of_benchmarks_that_there_are():
    for file in sorted((ROOT / "docs" / "bench").glob("*.json")):
        words = results.read(file).command.split()
        assert words[:2] == ["jfe", "bench"] and words[2] in benchmarks.BENCHMARKS
        module = importlib.import_module(benchmarks.BENCHMARKS[words[2]].module)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args(words[3:])
