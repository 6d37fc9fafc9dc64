"""The protocol against plain NumPy and against trec_eval on the files it writes; what is wrong in the data is told."""

import json
import shutil

import jax
import numpy as np
import pytest
import pytrec_eval

from jfe_jax.data.mbeir import Mbeir
from jfe_jax.errors import UserError
from jfe_jax.retrieval import results
from jfe_jax.retrieval.evaluate import evaluate
from jfe_jax.retrieval.retriever import Retriever
from tests.data.mbeir_maker import edit_line, edit_row
from tests.retrieval.tiny import quiet


@pytest.fixture(scope="module")
def evaluation(shapes_retriever, mbeir_path):
    return evaluate(shapes_retriever, Mbeir(mbeir_path), given=("all", "text", "image"), depth=1000, progress=quiet)


@pytest.fixture(scope="module")
def written(evaluation, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    results.write(out, evaluation.results, evaluation.answers, evaluation.pools)
    return out


def copied(mbeir_path, tmp_path):
    return shutil.copytree(mbeir_path, tmp_path / "copy")


def ask(retriever, path, **options):
    return evaluate(retriever, Mbeir(path), progress=quiet, **options)


def lines_of(written):
    return [json.loads(line) for line in (written / "queries.jsonl").read_text().splitlines()]


def test_run_files_give_our_figures_in_trec_eval(evaluation, written):
    for name, unit in evaluation.results["units"].items():
        with (written / "qrels" / f"{name}.qrels").open() as file:
            qrels = pytrec_eval.parse_qrel(file)
        for pool, entry in unit["pools"].items():
            with (written / "runs" / f"{name}.{pool}.trec").open() as file:
                run = pytrec_eval.parse_run(file)
            wanted = {"success.1,5,10", "recall.1,5,10", "ndcg_cut.10", "map"}
            theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
            mean = {key: np.mean([row[key] for row in theirs.values()]) for key in next(iter(theirs.values()))}
            for k in (1, 5, 10):
                assert entry["metrics"][f"hit@{k}"] == pytest.approx(mean[f"success_{k}"], abs=1e-6)
                assert entry["metrics"][f"recall@{k}"] == pytest.approx(mean[f"recall_{k}"], abs=1e-6)
            assert entry["metrics"]["ndcg@10"] == pytest.approx(mean["ndcg_cut_10"], abs=1e-6)
            assert entry["metrics"]["map"] == pytest.approx(mean["map"], abs=1e-6)


@pytest.mark.parametrize("pool", ["local", "global"])
@pytest.mark.parametrize("name", ["shapes_task7", "shapes_task4", "facts_task8"])
def test_ranks_equal_a_plain_sort_with_and_without_the_source(shapes_retriever, mbeir_path, written, name, pool):
    mbeir = Mbeir(mbeir_path)
    unit = mbeir.unit("test", name)
    candidates = sorted(mbeir.pool("test", unit, pool), key=lambda one: one.did, reverse=True)
    queries = mbeir.queries("test", unit)
    prompt = mbeir.instructions(
        unit.dataset,
        queries[0].modality,
        candidates[0].modality
        if pool == "local"
        else {"shapes_task7": "image", "shapes_task4": "image", "facts_task8": "image,text"}[name],
    )[0]
    scores = (
        shapes_retriever.encode([query.item(prompt) for query in queries])
        @ shapes_retriever.encode([one.item() for one in candidates]).T
    )
    told = {
        line["qid"]: line
        for line in lines_of(written)
        if (line["unit"], line["pool"]) == (name, pool) and line["given"] == "all"
    }
    removed = 0
    for query, row in zip(queries, scores, strict=True):
        order = sorted(range(len(candidates)), key=lambda i: (-row[i], i))
        right = set(mbeir.qrels("test", unit)[query.qid])
        kept = [i for i in order if candidates[i].image != query.image or candidates[i].did in right]
        removed += len(kept) < len(order)
        for key, ranking in (("rank", order), ("rank_without_source", kept)):
            place = next(place for place, i in enumerate(ranking, 1) if candidates[i].did in right)
            # Packing moves scores by rounding; near-ties may swap.
            assert abs(told[query.qid][key] - place) <= 1
    assert removed


def test_groups_are_means_over_units(evaluation):
    units, groups = evaluation.results["units"], evaluation.results["groups"]["global"]
    needs = [unit["pools"]["global"]["metrics"]["hit@5"] for unit in units.values() if unit["task"] in (6, 7, 8)]
    assert len(needs) == 3 and groups["needs fusion"]["metrics"]["hit@5"] == pytest.approx(np.mean(needs))
    assert groups["does not"]["units"] == 4 and groups["all units"]["units"] == 8


def test_controls_leave_out_half_of_the_composed_queries_only(evaluation):
    pools = {name: unit["pools"]["local"] for name, unit in evaluation.results["units"].items()}
    assert {name for name, pool in pools.items() if "controls" in pool} == {
        "facts_task6",
        "shapes_task7",
        "facts_task8",
    }
    asked = {
        one.given: one for one in evaluation.answers if (one.unit.unit.name, one.pool) == ("shapes_task7", "local")
    }
    assert asked["text"].asked[0].item("text").image is None
    assert asked["image"].asked[0].item("image").text is None
    assert asked["image"].asked[0].item("image").instruction
    assert not np.allclose(asked["all"].scores, asked["text"].scores)


def test_local_pools_are_smaller_and_nothing_is_embedded_twice(shapes_retriever, mbeir_path):
    done = []

    def counting(name, total):
        done.append((name, total))
        return quiet(name, total)

    evaluation = evaluate(shapes_retriever, Mbeir(mbeir_path), units=["shapes_task0"], progress=counting)
    pools = evaluation.results["units"]["shapes_task0"]["pools"]
    assert pools["local"]["size"] == 40 and pools["global"]["size"] == evaluation.results["candidates"]
    different = {(one.text, one.image) for one in evaluation.pools.candidates}
    assert done[0][1] <= len(different) + 6


def test_prompts_are_chosen_by_number(shapes_retriever, mbeir_path):
    by_number = [
        ask(shapes_retriever, mbeir_path, units=["shapes_task0"], pools=["local"], instruction=number).answers[0]
        for number in (0, 1, None)
    ]
    assert by_number[0].asked[0].instruction == "Find by text what is meant."
    assert by_number[1].asked[0].instruction == "Retrieve the match."
    assert by_number[2].asked[0].instruction is None
    with pytest.raises(UserError, match="no instruction 9; there are 4"):
        ask(shapes_retriever, mbeir_path, units=["shapes_task0"], pools=["local"], instruction=9)


def test_what_the_source_content_says_is_kept(shapes_retriever, mbeir_path, tmp_path):
    path = copied(mbeir_path, tmp_path)
    about = json.dumps({"group": "red", "kind": "additive", "edit": "colour"})
    edit_row(path / "query/test/mbeir_shapes_task7_test.jsonl", 1, query_src_content=about)
    edit_row(path / "query/test/mbeir_shapes_task7_test.jsonl", 2, query_src_content="free text")
    evaluation = ask(shapes_retriever, path, units=["shapes_task7"], pools=["local"])
    first, second, *_ = results.query_lines(evaluation.answers)
    assert (first["cluster"], first["kind"], first["edit"]) == ("red", "additive", "colour")
    assert (second["cluster"], second["kind"]) == (second["qid"], None)
    assert evaluation.results["kinds"]["local"]["additive"]["queries"] == 1


def test_dangling_qrels_are_counted_and_miss(shapes_retriever, mbeir_path, tmp_path):
    path = copied(mbeir_path, tmp_path)
    file = path / "qrels/test/mbeir_shapes_task0_test_qrels.txt"
    lines = file.read_text().splitlines()
    lines[-1] = lines[-1].replace(lines[-1].split()[2], "0:999999")
    file.write_text("\n".join(lines[2:]) + "\n")
    evaluation = ask(shapes_retriever, path, units=["shapes_task0"], pools=["local"])
    unit = evaluation.results["units"]["shapes_task0"]
    assert unit["unjudged"] == 1 and unit["pools"]["local"]["dangling"] == 1
    told = "\n".join(evaluation.results["warnings"])
    assert (
        "1 queries have no right candidate" in told and "1 qrels point at candidates that are not in the pool" in told
    )
    assert list(results.query_lines(evaluation.answers))[-1]["rank"] is None


def test_bad_data_is_named(shapes_retriever, mbeir_path, tmp_path):
    path = copied(mbeir_path, tmp_path)
    pool = path / "cand_pool/local/mbeir_shapes_task0_cand_pool.jsonl"
    whole = pool.read_text()
    pool.write_text("")
    with pytest.raises(UserError, match=r"shapes_task0_cand_pool\.jsonl: the pool of candidates is empty"):
        ask(shapes_retriever, path, units=["shapes_task0"])
    pool.write_text(whole)
    edit_row(pool, 1, img_path="mbeir_images/none.png")
    with pytest.raises(UserError, match="is another one than in a pool read before"):
        ask(shapes_retriever, path, units=["shapes_task0"])
    with pytest.raises(UserError, match=r"none\.png"):
        ask(shapes_retriever, path, units=["shapes_task0"], pools=["local"])
    edit_line(pool, 1, lambda line: line[:-3])
    with pytest.raises(UserError, match=r"shapes_task0_cand_pool\.jsonl:1"):
        ask(shapes_retriever, path, units=["shapes_task0"], pools=["local"])
    with pytest.raises(UserError, match="no unit cirr_task7"):
        ask(shapes_retriever, path, units=["cirr_task7"])
    with pytest.raises(UserError, match="no such split"):
        ask(shapes_retriever, path, split="dev")


def test_a_diverged_model_is_refused(shapes_retriever, mbeir_path):
    params = jax.tree.map(lambda leaf: leaf * np.nan, shapes_retriever._params)
    broken = Retriever(shapes_retriever.config, shapes_retriever._graphdef, params, path=mbeir_path / "broken")
    with pytest.raises(UserError, match="is not finite"):
        ask(broken, mbeir_path, units=["shapes_task0"], pools=["local"])
