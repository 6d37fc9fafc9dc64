"""The protocol against plain NumPy and against trec_eval on the files it writes; what is wrong in the data is told."""

import json
import shutil
from pathlib import Path

import ir_measures
import jax
import numpy as np
import pytest
import pytrec_eval

from jfe_jax.data.formats.candidate_table import CandidateTable
from jfe_jax.data.formats.mbeir import Candidate, Mbeir, Query
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.errors import UserError
from jfe_jax.evaluation import results
from jfe_jax.evaluation.aggregate import add_means
from jfe_jax.evaluation.error_analysis import MISTAKES, classify_mistakes
from jfe_jax.evaluation.eval_set import CandidatePools, EvalQuery
from jfe_jax.evaluation.evaluator import evaluate
from jfe_jax.evaluation.metrics import CUTOFFS
from jfe_jax.evaluation.protocols import FORMS, MBEIR, MBEIR_UNITS
from jfe_jax.reports import published_results
from tests.support.mbeir_directory import edit_line, edit_row
from tests.support.tiny_retriever import quiet


@pytest.fixture(scope="module")
def evaluation(shapes_retriever, mbeir_path):
    return evaluate(shapes_retriever, Mbeir(mbeir_path), given=("all", "text", "image"), depth=1000, progress=quiet)


@pytest.fixture(scope="module")
def written(evaluation, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    results.write_results(out, evaluation.results, evaluation.answers, evaluation.pools)
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
    forms = {name: units for name, units in evaluation.results["members"].items() if name in FORMS}
    assert sorted(unit for members in forms.values() for unit in members) == sorted(units), "each in one form"
    assert forms["conditional"] == ["shapes_task7"] and forms["multi-modal"] == ["facts_task6", "facts_task8"]
    assert evaluation.results["headline"] == {}, "no unit of M-BEIR's"


def test_ir_measures_reads_the_files_and_finds_our_figures(evaluation, written):
    at = {f"hit@{k}": ir_measures.Success @ k for k in CUTOFFS} | {f"recall@{k}": ir_measures.R @ k for k in CUTOFFS}
    at |= {"ndcg@10": ir_measures.nDCG @ 10, "map": ir_measures.AP}
    for name, unit in evaluation.results["units"].items():
        qrels = list(ir_measures.read_trec_qrels(str(written / "qrels" / f"{name}.qrels")))
        for pool, entry in unit["pools"].items():
            run = list(ir_measures.read_trec_run(str(written / "runs" / f"{name}.{pool}.trec")))
            theirs = ir_measures.calc_aggregate(at.values(), qrels, run)
            # Its RR@10 orders ties the other way round than trec_eval, so RR of the first ten.
            queries = {one.query_id: [] for one in run}
            for one in run:
                queries[one.query_id].append(one)
            ten = [one for found in queries.values() for one in found[:10]]
            mrr = ir_measures.calc_aggregate([ir_measures.RR], qrels, ten)[ir_measures.RR]
            expected = {key: theirs[one] for key, one in at.items()} | {"mrr@10": mrr}
            assert entry["metrics"] == pytest.approx(expected, abs=1e-6)


def test_the_headline_wants_every_unit_in_the_published_order():
    def unit(name):
        dataset, _, task = name.partition("_task")
        at_10 = dataset in ("fashion200k", "fashioniq")
        metrics = {"hit@5": 0.0 if at_10 else 0.5, "hit@10": 1.0 if at_10 else 0.0}
        entry = {"queries": 1, "metrics": metrics, "without_source": metrics, "kinds": {}}
        return {"unit": name, "dataset": dataset, "task": int(task), "pools": {"local": entry}}

    told = add_means([unit(name) for name in MBEIR_UNITS], MBEIR)
    assert told["headline"]["local"]["value"] == pytest.approx((3 * 1.0 + 13 * 0.5) / 16)
    assert sum(len(told["members"][form]) for form in FORMS) == 16
    part = add_means([unit(name) for name in MBEIR_UNITS[1:]], MBEIR)["headline"]["local"]
    assert part["value"] is None and part["missing"] == ["visualnews_task0"]
    assert sorted(reversed(MBEIR_UNITS), key=lambda name: MBEIR.order(name, 0)) == list(MBEIR_UNITS)


def test_published_rows_have_the_published_means():
    rows = [row for row in published_results.MBEIR if row.values]
    assert {(row.model, row.pool) for row in rows} == {("CLIP_SF", "global"), ("BLIP_FF", "global")}
    for row in rows:
        assert list(row.values) == list(MBEIR_UNITS)
        assert np.mean(list(row.values.values())) == pytest.approx(row.mean, abs=0.05)


def test_mistakes_tell_a_wrong_modality_from_a_wrong_item():
    def query(text, image, modality):
        return Query("0:0", text, image, modality, None, (), ())

    shown, other = Path("x/a.png"), Path("x/b.png")
    candidates = [
        Candidate("0:4", None, shown, "image"),
        Candidate("0:3", "A dog.", None, "text"),
        Candidate("0:2", "A cat.", None, "text"),
        Candidate("0:1", "A cat.", shown, "image,text"),
        Candidate("0:0", None, other, "image"),
    ]
    pools = CandidatePools(CandidateTable.from_candidates(candidates, Path("x")), {})
    asked = EvalQuery(query("a  cat.", None, "text"), {"0:4": 1}, None, "0:0", None, None, wanted="image")
    assert classify_mistakes([asked] * 5, np.arange(5), pools).tolist() == [0, 2, 1, 1, 3]
    lost = EvalQuery(query(None, shown, "image"), {"0:9": 1}, None, "0:0", None, None, wanted="text")
    assert classify_mistakes([lost] * 3, np.array([0, 1, 4]), pools).tolist() == [1, 3, 2]


def test_mistakes_and_hits_are_all_there_is(evaluation):
    for unit in evaluation.results["units"].values():
        for entry in unit["pools"].values():
            assert entry["metrics"]["hit@1"] + sum(entry["mistakes"].values()) == pytest.approx(1)
    assert evaluation.results["groups"]["local"]["all units"]["mistakes"][MISTAKES[2]] > 0


def test_all_prompts_are_asked_and_averaged(shapes_retriever, mbeir_path, tmp_path):
    options = {"units": ["shapes_task0", "shapes_task7"], "pools": ["global"]}
    alone = [ask(shapes_retriever, mbeir_path, instruction=number, **options).results for number in range(4)]
    whole = ask(shapes_retriever, mbeir_path, instruction="all", **options)
    for name, unit in whole.results["units"].items():
        entry = unit["pools"]["global"]
        assert unit["queries"] == entry["queries"] == 6
        for metric in ("hit@1", "map"):
            each = [one["units"][name]["pools"]["global"]["metrics"][metric] for one in alone]
            assert entry["metrics"][metric] == pytest.approx(np.mean(each))
            assert entry["spread"][metric] == pytest.approx(np.std(each, ddof=1))
            assert [one[metric] for one in entry["prompts"].values()] == pytest.approx(each)
    group = whole.results["groups"]["global"]["all units"]
    assert group["spread"]["map"] == pytest.approx(
        np.std([one["groups"]["global"]["all units"]["metrics"]["map"] for one in alone], ddof=1)
    )
    results.write_results(tmp_path, whole.results, whole.answers, whole.pools)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        f"{unit}.global.prompt{number}.trec" for unit in options["units"] for number in range(4)
    }
    assert len((tmp_path / "qrels/shapes_task0.qrels").read_text().splitlines()) == 7


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
    assert dict(done)["embedding candidates"] == len(different) and dict(done)["embedding queries"] == 6


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
    file.write_text("\n".join([*lines[2:], "0:4711 0 0:1 1 0"]) + "\n")
    evaluation = ask(shapes_retriever, path, units=["shapes_task0"], pools=["local"])
    unit = evaluation.results["units"]["shapes_task0"]
    assert unit["unjudged"] == 1 and unit["pools"]["local"]["dangling"] == 1
    told = "\n".join(evaluation.results["warnings"])
    assert (
        "1 queries have no right candidate" in told and "1 qrels point at candidates that are not in the pool" in told
    )
    assert "the qrels judge 1 queries that are not asked, such as 0:4711" in told
    assert list(results.query_lines(evaluation.answers))[-1]["rank"] is None


def test_a_query_without_its_image_is_named_before_anything_is_embedded(shapes_retriever, mbeir_path, tmp_path):
    path = copied(mbeir_path, tmp_path)
    edit_row(path / "query/test/mbeir_shapes_task7_test.jsonl", 2, query_img_path="mbeir_images/gone.png")
    with pytest.raises(UserError, match=r"gone\.png: no such image, of query 0:\d+ \(1 of \d images of queries"):
        evaluate(shapes_retriever, Mbeir(path), units=["shapes_task7"], progress=None)
    told = ask(shapes_retriever, path, units=["shapes_task7"], pools=["local"], given=["text"]).results
    assert told["units"]["shapes_task7"]["queries"] == 6, "the image is not asked for"


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
