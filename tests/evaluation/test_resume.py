"""What an evaluation keeps: it goes on after a kill, shares embeddings, and never mixes two checkpoints' in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from jfe_jax.cli.main import main
from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.prepare.prepare import prepare_dataset
from jfe_jax.embedding.embedding_cache import CachedRows, EmbeddingCache, EmbeddingLocation
from jfe_jax.embedding.row_source import FileRows
from jfe_jax.embedding.shard_store import encode
from jfe_jax.errors import UserError
from jfe_jax.evaluation import results
from jfe_jax.evaluation.evaluator import Keep, evaluate
from jfe_jax.mining.miner import mine
from jfe_jax.mining.select_negatives import MiningConfig
from jfe_jax.reports import comparison_report, evaluation_report
from jfe_jax.reports.comparison import compare, load_models
from jfe_jax.search.exact import Searcher
from tests.support.mbeir_directory import IMAGE_TOKEN, VOCAB_SIZE, archive_images, edit_row
from tests.support.tiny_retriever import quiet, random_retriever, save, tiny_config

UNITS = ["shapes_task0", "shapes_task7"]


def ask(retriever, path, keep, **options):
    told = evaluate(retriever, Mbeir(path), keep=keep, progress=quiet, **({"units": UNITS} | options))
    return told.results | {"seconds": 0}, told.answers


@pytest.fixture
def calls(monkeypatch, shapes_retriever):
    """Counts items encoded and searches made; `calls.dies` after so many of a kind raises KeyboardInterrupt."""
    counts, dies = Counter(), {}

    def counting(kind, function, many):
        def counted(*args, **others):
            if dies.get(kind, 1) == 0:
                raise KeyboardInterrupt
            dies[kind] = dies.get(kind, -1) - 1
            counts[kind] += many(args)
            return function(*args, **others)

        return counted

    monkeypatch.setattr(shapes_retriever, "encode", counting("encode", shapes_retriever.encode, lambda a: len(a[0])))
    monkeypatch.setattr(Searcher, "search", counting("search", Searcher.search, lambda _: 1))
    counts.dies = dies
    return counts


def test_a_killed_evaluation_goes_on(shapes_retriever, mbeir_path, tmp_path, calls):
    options = {"instruction": "all"}
    whole, answers = ask(shapes_retriever, mbeir_path, Keep(folder=tmp_path / "whole", shard=16), **options)
    items, searches = calls["encode"], calls["search"]
    assert searches == 2 * 2 * 4, "a search for each unit, pool and prompt"
    keep = Keep(folder=tmp_path / "killed", shard=16)
    calls.clear()
    for dies in ({"encode": 3}, {"search": 5}):
        calls.dies.update(dies)
        with pytest.raises(KeyboardInterrupt):
            ask(shapes_retriever, mbeir_path, keep, **options)
        calls.dies.clear()
    told, again = ask(shapes_retriever, mbeir_path, keep, **options)
    assert told == whole and calls == {"encode": items, "search": searches}, "nothing was done twice"
    for one, other in zip(answers, again, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.rows, other.rows)
    calls.clear()
    # Deeper than before: searched again, not embedded again. A file cut short: searched again.
    ask(shapes_retriever, mbeir_path, keep, depth=60, **options)
    assert calls == {"search": searches}
    file = tmp_path / "killed/searches/shapes_task7.local.all.prompt2.npz"
    file.write_bytes(file.read_bytes()[:-30])
    ask(shapes_retriever, mbeir_path, keep, depth=60, **options)
    assert calls == {"search": searches + 1}


def test_evaluations_share_embeddings(shapes_retriever, mbeir_path, tmp_path, calls):
    shared = tmp_path / "shared"

    def again(name, **options):
        calls.clear()
        told = ask(shapes_retriever, mbeir_path, Keep(folder=tmp_path / name, embeddings=shared), **options)[0]
        return told, calls["encode"]

    mbeir = Mbeir(mbeir_path)
    pool = mbeir.pool("test", mbeir.unit("test", UNITS[0]), "global")
    candidates = len({(one.text, one.image) for one in pool})
    _, local = again("local", pools=["local"])
    told, rest = again("global", pools=["local", "global"])
    assert local + rest == candidates + 12, "each candidate once, whatever pools it stands in, and each query"
    assert again("again", pools=["global", "local"])[1] == 0
    assert again("prompt", pools=["local"], instruction=1)[1] == 12, "only the queries are other ones"
    alone = evaluate(shapes_retriever, Mbeir(mbeir_path), units=UNITS, progress=quiet).results
    assert [told["units"][unit]["pools"] for unit in UNITS] == [alone["units"][unit]["pools"] for unit in UNITS]


def test_other_items_are_embedded_and_another_checkpoint_is_refused(shapes_retriever, mbeir_path, tmp_path, calls):
    path = shutil.copytree(mbeir_path, tmp_path / "data", ignore=shutil.ignore_patterns("model"))
    keep = Keep(folder=tmp_path / "out")
    ask(shapes_retriever, path, keep)
    for file in ("local/mbeir_facts_task1", "global/mbeir_union_test"):
        edit_row(path / f"cand_pool/{file}_cand_pool.jsonl", 1 if "facts" in file else 41, txt="Another text.")
    calls.clear()
    lines = (path / "cand_pool/global/mbeir_union_test_cand_pool.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sum(row["txt"] == "Another text." for row in rows) == 1
    ask(shapes_retriever, path, keep)
    assert calls["encode"] == 1 and calls["search"] == 2, "the one candidate, and the pool it is in"
    config = tiny_config(mbeir_path / "tokenizer", image_token=IMAGE_TOKEN, vocab_size=VOCAB_SIZE)
    other = random_retriever(config, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"holds embeddings of .*model step 0 .*, not of .*other step 1 .*--overwrite"):
        ask(other, path, keep)
    (tmp_path / "out/embeddings/checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"made by .*model step 0"):
        ask(other, path, keep)
    anew = ask(other, path, Keep(folder=tmp_path / "out", overwrite=True))[0]
    assert anew == ask(other, path, Keep(folder=tmp_path / "new"))[0]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_types_say_what_they_cost(shapes_retriever, mbeir_path, tmp_path, dtype):
    exact, answers = ask(shapes_retriever, mbeir_path, Keep(folder=tmp_path / "exact"))
    told, rounded = ask(shapes_retriever, mbeir_path, Keep(folder=tmp_path / dtype, dtype=dtype))
    assert exact["score_error"] == 0 < told["score_error"] < {"float16": 1e-3, "int8": 0.02}[dtype]
    for one, other in zip(answers, rounded, strict=True):
        assert 0 < np.abs(one.scores - other.scores).max() <= told["score_error"] + 1e-6


def test_damage_and_company_are_named(shapes_retriever, mbeir_path, tmp_path):
    keep = Keep(folder=tmp_path)
    ask(shapes_retriever, mbeir_path, keep, pools=["local"])
    with (
        EmbeddingCache(tmp_path / "embeddings", shapes_retriever),
        pytest.raises(UserError, match="another evaluation is"),
    ):
        EmbeddingCache(tmp_path / "embeddings", shapes_retriever)
    (file,) = (tmp_path / "embeddings").glob("mbeir_shapes_task0*/embeddings.npy")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"mbeir_shapes_task0.*: 1 of 1 shards are damaged.*--overwrite"):
        ask(shapes_retriever, mbeir_path, keep, pools=["local"])
    file.write_bytes(content)
    (file.parent / "contents.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"contents\.npy: cannot be read"):
        ask(shapes_retriever, mbeir_path, keep, pools=["local"])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_of_several_files_in_another_order(tmp_path, dtype):
    random, files, plain = np.random.default_rng(0), [], []
    for number, count in enumerate((90, 300)):
        stored, scales = encode(random.standard_normal((count, 8), np.float32), dtype)
        np.save(tmp_path / f"{number}.npy", stored)
        files.append(FileRows(tmp_path / f"{number}.npy", scales, norm=float(number)))
        plain.append(stored * (np.float32(1) if scales is None else scales[:, None]))
    order = [(1, row) for row in range(250)] + [(int(n), int(random.integers(90))) for n in random.integers(0, 2, 200)]
    index, row = (np.array(column, np.int32) for column in zip(*order, strict=True))
    rows = CachedRows(files, EmbeddingLocation(index, row))
    expected = np.array([plain[file][at] for file, at in order])
    assert rows.shape == (450, 8) and rows.norm == 1
    for start, stop in ((0, 450), (17, 300), (260, 261), (400, 999)):
        stored, scales = rows.read(start, stop)
        np.testing.assert_array_equal(stored * (1 if scales is None else scales[:, None]), expected[start:stop])
    some = random.permutation(450)[:60]
    np.testing.assert_array_equal(rows.take(some), expected[some])
    np.testing.assert_array_equal(rows[some].read(5, 50)[0], rows.read(0, 450)[0][some][5:50])


def test_images_are_read_from_the_archive(shapes_retriever, mbeir_path, tmp_path):
    path = shutil.copytree(mbeir_path, tmp_path / "data", ignore=shutil.ignore_patterns("model"))
    keep = Keep(folder=tmp_path / "out", embeddings=tmp_path / "shared")
    files, pages = [], []
    for archived in (False, True):
        if archived:
            archive_images(path, parts=3)
            shutil.rmtree(tmp_path / "shared")
        evaluation = evaluate(shapes_retriever, Mbeir(path), units=UNITS, keep=keep, progress=quiet)
        results.write_results(tmp_path / "out", evaluation.results, evaluation.answers, evaluation.pools)
        evaluation_report.write(tmp_path / "out/report.html", evaluation)
        files.append((tmp_path / "out/runs/shapes_task7.global.trec").read_bytes())
        pages.append((tmp_path / "out/report.html").read_text())
    assert files[0] == files[1] and "data:image/webp" in pages[1]
    assert pages[0].count("data:image/webp") == pages[1].count("data:image/webp")
    told = evaluation.results
    assert told["images"] == str(tmp_path / "shared/images") and (tmp_path / "shared/images/images.tar").exists()
    models = load_models({"one": [tmp_path / "out"]})
    comparison_report.write(tmp_path / "compare.html", compare(models, replicates=5), models)
    assert "data:image/webp" in (tmp_path / "compare.html").read_text()
    (mined,) = mine(shapes_retriever, Mbeir(path), tmp_path / "mined", MiningConfig(), units=UNITS[1:], progress=quiet)
    assert mined.counts["queries"] == 6 and not mined.counts["missing_image"] + mined.counts["missing_candidate_image"]
    assert mined.counts["wanted_modality"]
    edit_row(path / "query/test/mbeir_shapes_task7_test.jsonl", 2, query_img_path="mbeir_images/gone.png")
    with pytest.raises(UserError, match=r"gone\.png: no such image in .*, of query 0:\d+ \(1 of"):
        evaluate(shapes_retriever, Mbeir(path), units=UNITS, keep=keep, progress=quiet)


def test_prepared_images_of_another_size_are_not_mixed_in(shapes_retriever, mbeir_path, tmp_path):
    keep = {"folder": tmp_path / "out", "embeddings": tmp_path / "shared"}
    ask(shapes_retriever, mbeir_path, Keep(**keep), pools=["local"])
    mbeir = Mbeir(mbeir_path)
    list(prepare_dataset(mbeir, tmp_path / "small", splits=["test"], units=UNITS, short_side=16, progress=quiet))
    with pytest.raises(UserError, match=r"images in another form \(as published, not short side 16 at most\)"):
        ask(shapes_retriever, mbeir_path, Keep(**keep, images=tmp_path / "small"), pools=["local"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_without_notice(shapes_retriever, mbeir_path, tmp_path):
    run = save(shapes_retriever, tmp_path / "run")
    words = ["eval", "--checkpoint", run, "--data", mbeir_path, "--shard", "4", "--units", ",".join(UNITS)]
    whole, killed = ([str(word) for word in [*words, "--out", tmp_path / name]] for name in ("whole", "killed"))
    process = subprocess.Popen([sys.executable, "-m", "jfe_jax.cli.main", *killed], stderr=subprocess.DEVNULL)
    finished = tmp_path / "killed/embeddings"
    while process.poll() is None and len(list(finished.glob("*/shards/*.json"))) < 3:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not list(finished.glob("mbeir_union*/manifest.json"))
    assert main(killed) == 0 and main(whole) == 0
    told = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert told[0] | {"seconds": 0} == told[1] | {"seconds": 0}
    for file in (tmp_path / "whole/runs").iterdir():
        assert file.read_bytes() == (tmp_path / "killed/runs" / file.name).read_bytes()
