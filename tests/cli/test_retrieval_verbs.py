"""jfe embed, search, eval and compare from the command line, on a run directory."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jfe_jax.cli.main import main
from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.item import Item
from jfe_jax.data.storage.prepared_dataset import PreparedDataset, parse_query
from jfe_jax.embedding.retriever import Retriever
from tests.support.mbeir_directory import IMAGE_TOKEN, VOCAB_SIZE, make_mbeir
from tests.support.tiny_retriever import picture, random_retriever, save, tiny_config


@pytest.fixture(scope="module")
def mbeir(tmp_path_factory):
    return make_mbeir(tmp_path_factory.mktemp("mbeir"), queries_per_task=4)


@pytest.fixture(scope="module")
def runs(mbeir, tmp_path_factory):
    """Two run directories of one architecture and other weights."""
    out = tmp_path_factory.mktemp("runs")
    config = tiny_config(mbeir / "tokenizer", image_token=IMAGE_TOKEN, vocab_size=VOCAB_SIZE)
    return [save(random_retriever(config, out / name, seed), out / name) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    Image.fromarray(picture(0)).save(folder / "a.png")
    rows = [{"id": f"t{i}", "text": f"thing {i}"} for i in range(8)] + [{"id": "image", "image": "a.png"}]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "items.jsonl"


@pytest.fixture(scope="module")
def index(runs, items, tmp_path_factory):
    out = tmp_path_factory.mktemp("index")
    assert main(["embed", "--checkpoint", str(runs[0]), "--items", str(items), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def evaluations(mbeir, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations")
    for run in runs:
        words = ["eval", "--checkpoint", str(run), "--data", str(mbeir), "--out", str(out / run.name), "--controls"]
        assert main(words) == 0
    return out


def failed(capsys, *words):
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_embed_writes_unit_rows_in_input_order(index, runs):
    embeddings = np.load(index / "embeddings.npy")
    assert embeddings.dtype == np.float32 and embeddings.shape == (9, 16)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert (index / "ids.txt").read_text().split() == [*(f"t{i}" for i in range(8)), "image"]
    manifest = json.loads((index / "manifest.json").read_text())
    assert manifest["fingerprint"] == Retriever.load(runs[0]).fingerprint and manifest["checkpoint"] == str(runs[0])


def test_a_step_directory_is_the_same_model(runs):
    assert Retriever.load(runs[0] / "checkpoints" / "0").fingerprint == Retriever.load(runs[0]).fingerprint


def test_an_exported_model_says_what_it_reached(runs, evaluations, tmp_path):
    for run in runs:
        shutil.copytree(evaluations / run.name, runs[0].parent / f"eval-{run.name}")
    assert main(["convert", "to-hf", str(runs[0]), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.count("## Results on") == 1, "of this run, not of the one beside it"
    tree = json.loads((evaluations / runs[0].name / "results.json").read_text())
    metrics = tree["groups"]["local"]["all units"]["metrics"]
    numbers = " | ".join(f"{100 * metrics[f'hit@{k}']:.1f}" for k in (1, 5, 10))
    assert f"| local | all units | {numbers} |" in card


def test_the_converted_model_searches_the_same_index(runs, index, tmp_path, capsys):
    assert main(["convert", "to-hf", str(runs[0]), str(tmp_path / "hf")]) == 0
    converted, own = Retriever.load(tmp_path / "hf"), Retriever.load(runs[0])
    items = [Item(text="thing 3"), Item(image=picture(0), text="turn it", instruction="find it")]
    np.testing.assert_allclose(converted.encode(items), own.encode(items), atol=1e-5)
    capsys.readouterr()
    assert main(["search", "--index", str(index), "--text", "thing 3", "--checkpoint", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "t3"


def test_search_finds_the_item_itself_first(index, items, capsys):
    assert main(["search", "--index", str(index), "--image", str(items.parent / "a.png"), "-k", "3"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.split() == ["1", "1.0000", "image"] and len(others) == 2
    words = ["search", "--index", str(index), "--text", "thing 3", "--json"]
    assert main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["id"] == "t3" and [row["rank"] for row in rows] == list(range(1, 10))


@pytest.mark.parametrize(
    "words, says",
    [(["--index", "faiss:HNSW8"], "faiss:HNSW8: recall@10 1.000"), (["--device-approx", "0.9"], "for 0.9:")],
)
def test_approximate_search_says_its_recall(index, capsys, words, says):
    assert main(["search", "--index", str(index), *words, "--text", "thing 3", "-k", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.split()[2] == "t3" and says in said.err and "against exact search" in said.err


def test_search_refuses_what_it_cannot_answer(index, runs, tmp_path, capsys):
    assert "needs --text or --image" in failed(capsys, "search", "--index", index)
    assert "at least one" in failed(capsys, "search", "--index", index, "--text", "x", "-k", 0)
    assert "no index" in failed(capsys, "search", "--index", tmp_path, "--text", "x")
    assert "none.png" in failed(capsys, "search", "--index", index, "--image", tmp_path / "none.png")
    assert "one directory" in failed(capsys, "search", "--index", index, "--index", index, "--text", "x")
    assert "between 0 and 1" in failed(capsys, "search", "--index", index, "--text", "x", "--device-approx", 2)
    other = failed(capsys, "search", "--index", index, "--text", "x", "--checkpoint", runs[1])
    assert "embed it again" in other
    moved = shutil.copytree(index, tmp_path / "moved")
    told = json.loads((moved / "manifest.json").read_text()) | {"checkpoint": str(tmp_path / "gone")}
    (moved / "manifest.json").write_text(json.dumps(told))
    assert "gone, which is not there; say where it is" in failed(capsys, "search", "--index", moved, "--text", "x")


def test_embed_names_a_bad_line_and_a_missing_checkpoint(runs, items, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "text": "x"}\n{"id": "b"}\n')
    assert "bad.jsonl:2" in failed(capsys, "embed", "--checkpoint", runs[0], "--items", bad, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    said = failed(capsys, "embed", "--checkpoint", tmp_path / "none", "--items", items, "--out", tmp_path / "o")
    assert "no checkpoint" in said


def test_embed_names_an_unreadable_image(runs, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "items.jsonl").write_text('{"id": "a", "image": "broken.png"}\n')
    words = ("embed", "--checkpoint", runs[0], "--items", tmp_path / "items.jsonl", "--out", tmp_path / "o")
    assert main([str(word) for word in words]) == 1
    assert "broken.png" in capsys.readouterr().err


def test_mined_negatives_are_what_training_reads(mbeir, runs, tmp_path, capsys):
    words = ["mine", "--checkpoint", runs[0], "--data", mbeir, "--out", tmp_path / "mined", "--units", "shapes_task7"]
    assert (
        main(
            [
                str(word)
                for word in [*words, "--negatives", "3", "--ranks", "2:9", "--near", "0", "--image-difference", "-1"]
            ]
        )
        == 0
    )
    assert "shapes_task7: 12 negatives for 4 queries" in capsys.readouterr().out
    assert main(["data", "prepare", str(tmp_path / "mined"), "--out", str(tmp_path / "prepared")]) == 0
    prepared = PreparedDataset(tmp_path / "prepared")
    records = prepared.queries("shapes_task7", "train")
    read = [parse_query(records[number]) for number in range(len(records))]
    queries = Mbeir(tmp_path / "mined").queries("train", Mbeir(mbeir).unit("train", "shapes_task7"))
    assert [[prepared.candidate(number).did for number in one.negatives] for one in read] == [
        list(one.neg) for one in queries
    ]
    assert all(len(one.negatives) == 3 for one in read)
    capsys.readouterr()
    assert "1:100" in failed(capsys, *words, "--ranks", "9")


def test_eval_writes_everything(evaluations):
    out = evaluations / "one"
    results = json.loads((out / "results.json").read_text())
    assert len(results["units"]) == 8 and results["given"] == ["all", "text", "image"]
    assert len(list((out / "runs").iterdir())) == 16 and len(list((out / "qrels").iterdir())) == 8
    # Eight units on two pools, and three of them with either half alone.
    assert len((out / "queries.jsonl").read_text().splitlines()) == 4 * 2 * (8 + 3 * 2)
    assert "</html>" in (out / "report.html").read_text()


def test_eval_of_one_half_of_chosen_units(mbeir, runs, tmp_path, capsys):
    words = ["eval", "--checkpoint", runs[0], "--data", mbeir, "--out", tmp_path, "--queries", "text"]
    words += ["--pool", "local", "--units", "shapes_task7,facts_task6", "--instruction", "none"]
    assert main([str(word) for word in words]) == 0
    assert "shapes_task7 (4)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert {line["given"] for line in lines} == {"text"} and len(lines) == 8


def test_eval_refuses_unknown_names(mbeir, runs, tmp_path, capsys):
    words = ("eval", "--checkpoint", runs[0], "--out", tmp_path, "--data")
    assert "--pool union" in failed(capsys, *words, mbeir, "--pool", "union")
    assert "--dtype half: it is float32" in failed(capsys, *words, mbeir, "--dtype", "half")
    assert "--depth 0: at least 10" in failed(capsys, *words, mbeir, "--depth", 0)
    assert "--instruction two" in failed(capsys, *words, mbeir, "--instruction", "two")
    assert "no M-BEIR directory" in failed(capsys, *words, tmp_path / "none")


def test_compare_writes_table_report_and_picture(evaluations, tmp_path, capsys):
    words = ["compare", "--out", str(tmp_path), "--replicates", "50"]
    assert main([*words, f"jfe={evaluations / 'one'}", f"late={evaluations / 'two'}"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed and "jfe over late" in printed
    told = json.loads((tmp_path / "compare.json").read_text())
    assert set(told["pools"]) == {"local", "global"} and set(told["pools"]["global"]["controls"]) == {"text", "image"}
    assert "</html>" in (tmp_path / "report.html").read_text() and (tmp_path / "comparison.png").stat().st_size > 5000


def test_compare_refuses_what_does_not_match(evaluations, tmp_path, capsys):
    one = evaluations / "one"
    assert "NAME=EVAL_DIR" in failed(capsys, "compare", "--out", tmp_path, str(one))
    assert "given twice" in failed(capsys, "compare", "--out", tmp_path, f"a={one}", f"a={one}")
    assert "same number" in failed(capsys, "compare", "--out", tmp_path, f"a={one}", f"b={one},{one}")
    assert "finished `jfe eval`" in failed(capsys, "compare", "--out", tmp_path, f"a={tmp_path / 'none'}")
