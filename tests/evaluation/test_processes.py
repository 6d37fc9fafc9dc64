"""Two real processes on one machine embed their shares into one index, and search it together; so they evaluate."""

import json

import numpy as np
import pytest

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.embedding.embed import embed
from jfe_jax.embedding.items_jsonl import ItemsFile
from jfe_jax.evaluation.evaluator import evaluate
from jfe_jax.search.exact import search
from tests.support.launched import launched
from tests.support.tiny_retriever import quiet, save, tiny_retriever

SCRIPT = """
import sys
import jax
import numpy as np
from jfe_jax.cli.main import main
run, items, out, told, shapes, data = sys.argv[1:]
assert main(["embed", "--checkpoint", run, "--items", items, "--out", out, "--shard", "8"]) == 0
from jfe_jax.embedding.index import Index
from jfe_jax.search.exact import search
rows = Index.open(out).rows
asked = rows.take(np.array([3, 20])).astype(np.float32)
words = ["--data", data, "--units", "shapes_task7", "--shard", "8", "--out", f"{told}/eval"]
assert main(["eval", "--checkpoint", shapes, *words]) == 0
np.savez(f"{told}/{jax.process_index()}.npz", **search(asked, rows, 30, np.array([[25, 0], [20, -1]]))._asdict())
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_what_one_gives(shapes_retriever, mbeir_path, tmp_path):
    retriever = tiny_retriever(tmp_path)
    run = save(retriever, tmp_path / "run")
    items = tmp_path / "items.jsonl"
    # Equal texts: ties between the two shares.
    items.write_text("".join(json.dumps({"id": f"t{i}", "text": f"text {i % 25}"}) + "\n" for i in range(40)))
    shapes = str(save(shapes_retriever, tmp_path / "shapes"))
    arguments = [str(run), str(items), str(tmp_path / "two"), str(tmp_path), shapes, str(mbeir_path)]
    said = launched(SCRIPT, arguments, options=["--devices", "2"])
    assert said.count("40 embeddings") == 1 == said.count("report.html"), "one process speaks"
    one = embed(retriever, ItemsFile(items), tmp_path / "one", shard=8).index
    two = np.load(tmp_path / "two" / "embeddings.npy")
    np.testing.assert_allclose(two, one.embeddings, atol=1e-5)
    assert (tmp_path / "two" / "ids.txt").read_bytes() == (tmp_path / "one" / "ids.txt").read_bytes()
    expected = search(two[[3, 20]], two, 30, np.array([[25, 0], [20, -1]]))
    for number in range(2):
        found = np.load(tmp_path / f"{number}.npz")
        for name, value in expected._asdict().items():
            np.testing.assert_array_equal(found[name], value)
    alone = evaluate(shapes_retriever, Mbeir(mbeir_path), units=["shapes_task7"], progress=quiet)
    for answers in alone.answers:
        lines = (tmp_path / f"eval/runs/shapes_task7.{answers.pool}.trec").read_text().split()
        np.testing.assert_allclose(np.array(lines[4::6], float), answers.scores.reshape(-1), atol=1e-5)
    told = json.loads((tmp_path / "eval/results.json").read_text())
    assert told["units"]["shapes_task7"]["pools"]["global"]["size"] == alone.answers[1].pool_size


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_mine_what_one_mines(shapes_retriever, mbeir_path, tmp_path):
    run = str(save(shapes_retriever, tmp_path / "shapes"))
    # Of six queries each of two processes has three, and more candidates than one shard.
    words = ["--pool", "global", "--units", "shapes_task7", "--wrong-modality", "2", "--near", "0", "--shard", "3"]
    program = "import sys; from jfe_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    told = []
    for processes in (1, 2):
        out = str(tmp_path / str(processes))
        command = ["mine", "--checkpoint", run, "--data", str(mbeir_path), "--out", out, *words]
        said = launched(program, command, processes=processes)
        told.append([line for line in said.splitlines() if "48 negatives" in line])
    assert told[0][0] == told[1][0] and [len(one) for one in told] == [2, 2], "one process speaks"
    files = [tmp_path / number / "query/train/mbeir_shapes_task7_train.jsonl" for number in ("1", "2")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(len(json.loads(line)["neg_cand_list"]) == 8 for line in files[0].read_text().splitlines())
    counts = [json.loads((tmp_path / number / "mining/mining.json").read_text())["units"] for number in ("1", "2")]
    assert counts[0] == counts[1] and counts[0]["shapes_task7"]["wrong_modality"] == 12
    assert not list((tmp_path / "2").rglob("*.part")), "nothing half-written is left"
