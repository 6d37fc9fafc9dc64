import json

import pytest

from jfe_jax.cli.main import main
from tests.support.mbeir_directory import edit_row, make_mbeir


@pytest.fixture
def own(tmp_path):
    """A directory that a test may spoil."""
    return make_mbeir(tmp_path / "mbeir", queries_per_task=2)


def test_check_prints_counts_and_exits_by_what_it_found(own, capsys):
    assert main(["data", "check", str(own)]) == 0
    out, err = capsys.readouterr()
    assert "0 errors, 0 warnings" in out and err == ""
    file, line = edit_row(own / "query/val/mbeir_shapes_task7_val.jsonl", 2, query_modality="smell")
    assert main(["data", "check", str(own)]) == 1
    out, err = capsys.readouterr()
    assert f"error: {file}:{line}: unknown query_modality 'smell'" in out
    assert err.count("\n") == 1 and f"1 error; the first: {file}:{line}" in err


def test_check_as_json_is_one_object(own, capsys):
    edit_row(own / "query/val/mbeir_shapes_task7_val.jsonl", 2, pos_cand_list=["0:999"])
    assert main(["data", "check", str(own), "--json", "--images"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["errors"], report["warnings"]) == (0, 1)
    assert report["dangling"][0]["list"] == "pos_cand_list" and report["dangling"][0]["ids"] == 1
    assert {"rows", "where", "dataset", "task", "modality", "count"} == report["counts"][0].keys()


def test_prepare_says_what_became_of_each_part(own, tmp_path, capsys):
    command = ["data", "prepare", str(own), "--out", str(tmp_path / "out"), "--units", "facts_task1", "facts_task6"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mbeir_queries/facts_task1: written, 4 records",
        "mbeir_queries/facts_task6: written, 4 records",
        "mbeir_candidates/dataset2: written, 80 records",
        "mbeir_images/dataset2: written, 40 records",
    ]
    assert main(command) == 0
    assert [line.split(": ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["kept"] * 4


def test_prepare_names_what_is_wrong_in_one_line(own, tmp_path, capsys):
    command = ["data", "prepare", str(own), "--out", str(tmp_path / "out")]
    broken = own / "mbeir_images/circle/red_filled.jpg"
    broken.write_bytes(broken.read_bytes()[:50])
    assert main(command) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"jfe data: {broken}: cannot be read as an image")
    assert main(["data", "prepare", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "no M-BEIR directory" in capsys.readouterr().err


def test_a_verb_without_what_it_needs_is_wrong_usage(capsys):
    for command in (["data"], ["data", "prepare", "somewhere"], ["data", "check"]):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
    assert "usage: jfe data" in capsys.readouterr().err
