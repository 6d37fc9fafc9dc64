"""The comparison's statistics on evaluations whose truth is known."""

import json

import numpy as np
import pytest

from jfe_jax.errors import UserError
from jfe_jax.reports import comparison_report, html, pairwise_table
from jfe_jax.reports.comparison import Comparison, compare, load_models, needs_fusion, of_unit, summary

UNITS = {"a_task7": 7, "b_task7": 7, "c_task6": 6, "d_task0": 0}


def line(unit, number, hit, *, cluster=None, rank_without=None, kind=None, edit=None, given="all"):
    rank = 1 if hit else 3
    return {
        "unit": unit,
        "task": UNITS[unit],
        "qid": f"{unit}:{number}",
        "pool": "global",
        "given": given,
        "rank": rank,
        "rank_without_source": rank if rank_without is None else rank_without,
        "source_rank": None,
        "foil_rank": None,
        "cluster": cluster or f"{unit}:{number}",
        "kind": kind,
        "edit": edit,
    }


def written(path, lines, given=("all",)):
    path.mkdir(parents=True)
    results = {"pools": ["global"], "given": list(given), "warnings": [], "units": {}}
    (path / "results.json").write_text(json.dumps(results))
    (path / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def units(hits):
    """Lines of several units, given how many of how many are hits."""
    return [line(unit, i, i < right) for unit, (right, count) in hits.items() for i in range(count)]


def test_every_unit_weighs_the_same_and_runs_are_averaged(tmp_path):
    seeds = [
        {"a_task7": (8, 10), "b_task7": (1, 2), "d_task0": (1, 2)},
        {"a_task7": (6, 10), "b_task7": (1, 2), "d_task0": (2, 2)},
    ]
    other = {"a_task7": (0, 10), "b_task7": (0, 2), "d_task0": (1, 2)}
    models = load_models(
        {
            "jfe": [written(tmp_path / f"j{i}", units(hits)) for i, hits in enumerate(seeds)],
            "late": [written(tmp_path / f"l{i}", units(other)) for i in range(2)],
        }
    )
    told = compare(models, replicates=50)["pools"]["global"]["with_source"]
    needs = told["groups"]["needs fusion"]
    assert needs["models"]["jfe"]["mean"] == pytest.approx(np.mean([0.65, 0.55]))
    assert needs["models"]["jfe"]["sd"] == pytest.approx(np.std([0.65, 0.55], ddof=1))
    assert needs["gains"]["late"]["value"] == pytest.approx(0.6)
    assert told["groups"]["does not"]["gains"]["late"]["value"] == pytest.approx(0.25)
    assert told["difference_of_gains"]["late"]["value"] == pytest.approx(0.35)
    assert told["units"]["a_task7"]["models"]["jfe"]["mean"] == pytest.approx(0.7)


def test_interval_of_independent_queries_is_the_textbook_one(tmp_path):
    random = np.random.default_rng(0)
    count = 400
    hits = random.random((2, count)) < np.array([[0.6], [0.5]])
    models = load_models(
        {
            name: [written(tmp_path / name, [line("a_task7", i, bool(one)) for i, one in enumerate(row)])]
            for name, row in zip(("jfe", "late"), hits, strict=True)
        }
    )
    gain = compare(models)["pools"]["global"]["with_source"]["units"]["a_task7"]["gains"]["late"]
    difference = hits[0].astype(float) - hits[1]
    half = 1.96 * difference.std() / np.sqrt(count)
    assert gain["low"] == pytest.approx(difference.mean() - half, abs=0.01)
    assert gain["high"] == pytest.approx(difference.mean() + half, abs=0.01)


def test_queries_of_one_cluster_are_drawn_together(tmp_path):
    def spread(clustered):
        lines = {
            name: [line("a_task7", i, hit(i // 20), cluster=str(i // 20) if clustered else None) for i in range(200)]
            for name, hit in (("jfe", lambda c: c % 2 == 0), ("late", lambda c: False))
        }
        folder = tmp_path / str(clustered)
        models = load_models({name: [written(folder / name, rows)] for name, rows in lines.items()})
        gain = compare(models)["pools"]["global"]["with_source"]["units"]["a_task7"]["gains"]["late"]
        return gain["high"] - gain["low"]

    # Twenty equal answers a cluster carry the information of one: the interval is sqrt(20) times as wide.
    assert spread(True) / spread(False) == pytest.approx(np.sqrt(20), rel=0.2)


def test_an_advantage_shared_by_both_models_cancels(tmp_path):
    # Paired over models: what is easy is easy for both, so that the difference has no spread at all.
    lines = units({"a_task7": (30, 60)})
    models = load_models({name: [written(tmp_path / name, lines)] for name in ("jfe", "late")})
    gain = compare(models, replicates=200)["pools"]["global"]["with_source"]["groups"]["needs fusion"]["gains"]["late"]
    assert gain == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_runs_may_be_folds_with_other_queries(tmp_path):
    def fold(name, number, right):
        rows = [line("a_task7", 100 * number + i, i < right, cluster=f"{number}:{i}") for i in range(10)]
        return written(tmp_path / f"{name}{number}", rows)

    models = load_models({"jfe": [fold("j", 0, 9), fold("j", 1, 7)], "late": [fold("l", 0, 4), fold("l", 1, 4)]})
    comparison = Comparison(models, "global", replicates=400)
    np.testing.assert_allclose(comparison.means(needs_fusion()), [[0.9, 0.7], [0.4, 0.4]])
    (drawn,) = comparison.replicates([needs_fusion()])
    assert drawn.shape == (400, 2) and np.isfinite(drawn).all()
    assert drawn.mean(0) == pytest.approx([0.8, 0.4], abs=0.02)


def test_the_best_other_is_the_best_where_fusion_is_needed(tmp_path):
    hits = {
        "jfe": {"a_task7": (9, 10), "d_task0": (5, 10)},
        "weak": {"a_task7": (1, 10), "d_task0": (9, 10)},
        "strong": {"a_task7": (5, 10), "d_task0": (1, 10)},
    }
    models = load_models({name: [written(tmp_path / name, units(one))] for name, one in hits.items()})
    told = compare(models, replicates=50)
    entry = told["pools"]["global"]["with_source"]
    assert entry["best_other"] == "strong"
    said = comparison_report.claim(entry)
    assert said.startswith("jfe over strong") and "+40.0" in said
    table = comparison_report.markdown(told)
    assert "| a_task7 | 10 | 90.0 | 10.0 | 50.0 |" in table


def test_every_pair_has_the_interval_that_it_would_have_alone(tmp_path):
    random = np.random.default_rng(0)
    models = {}
    for name in ("jfe", "sum", "cls"):
        rows = [line(unit, i, random.random() < 0.5) for unit in ("a_task7", "d_task0") for i in range(40)]
        models |= load_models({name: [written(tmp_path / name, rows)]})
    told = compare(models, replicates=100)
    entry = told["pools"]["global"]["with_source"]
    for one, other in (("jfe", "sum"), ("jfe", "cls"), ("sum", "cls")):
        alone = compare({name: models[name] for name in (one, other)}, replicates=100)["pools"]["global"]["with_source"]
        for family in ("groups", "units"):
            for name, row in entry[family].items():
                assert row["pairs"][one][other] == alone[family][name]["gains"][other]
        assert entry["difference_of_pairs"][one][other] == alone["difference_of_gains"][other]
    gain = entry["groups"]["needs fusion"]["pairs"]["sum"]["cls"]
    assert gain["low"] < gain["value"] < gain["high"]
    said = f"{html.points(gain['value'])} [{html.points(gain['low'])}, {html.points(gain['high'])}]"
    assert f"| sum over cls | {said} |" in comparison_report.markdown(told)
    shown = pairwise_table.matrices(told["pools"]["global"], "hit@1")
    back = f"<small>[{html.points(-gain['high'])}, {html.points(-gain['low'])}]</small>"
    assert back in shown, "the row of cls under sum"
    two = compare({name: models[name] for name in ("jfe", "sum")}, replicates=5)
    assert not pairwise_table.matrices(two["pools"]["global"], "hit@1")
    assert "other pairs" not in comparison_report.markdown(two)


def test_kinds_edits_controls_and_the_source_are_told_apart(tmp_path):
    rows = [
        line("a_task7", 0, False, rank_without=1, kind="relational", edit="darker"),
        line("a_task7", 1, True, kind="additive", edit="tone"),
        line("a_task7", 0, False, given="text"),
        line("a_task7", 1, False, given="text"),
    ]
    models = load_models({"jfe": [written(tmp_path / "j", rows, given=("all", "text"))]})
    told = compare(models, replicates=10)["pools"]["global"]
    assert told["with_source"]["kinds"]["relational"]["models"]["jfe"]["mean"] == 0
    assert told["without_source"]["kinds"]["relational"]["models"]["jfe"]["mean"] == 1
    assert told["with_source"]["edits"]["tone"]["queries"] == 1
    assert told["controls"]["text"]["units"]["a_task7"]["models"]["jfe"]["mean"] == 0
    assert told["with_source"]["best_other"] is None and "difference_of_gains" not in told["with_source"]


def test_other_metrics_prompts_and_groups(tmp_path):
    rows = {}
    for name, ndcg, ranks in (("jfe", 0.75, (1, 2)), ("late", 0.5, (8, 20))):
        rows[name] = [
            line("a_task7", 0, False) | {"prompt": prompt, "rank": rank, "metrics": {"ndcg@10": ndcg}}
            for prompt, rank in enumerate(ranks)
        ]
    models = load_models({name: [written(tmp_path / name, lines)] for name, lines in rows.items()})
    for run in [run for runs in models.values() for run in runs]:
        run.results.update(members={"conditional": ["a_task7"], "cross-modal": []}, protocol="mbeir")
        run.results["units"]["a_task7"] = {"dataset": "fashioniq"}

    def means(metric):
        told = compare(models, metric=metric, replicates=10)["pools"]["global"]
        entry = told["with_source"]["forms"]["conditional"]
        assert entry["queries"] == 1 and list(told["with_source"]["forms"]) == ["conditional"]
        return [one["mean"] for one in entry["models"].values()], sorted(told)

    assert means("hit@1") == ([0.5, 0], ["controls", "with_source", "without_source"])
    assert means("mrr@10")[0] == [0.75, 0.0625]
    assert means("headline")[0] == [1, 0.5], "hit@10 of Fashion data sets"
    assert means("ndcg@10") == ([0.75, 0.5], ["controls", "with_source"])
    with pytest.raises(UserError, match=r"does not tell recall@7.*ndcg@10"):
        means("recall@7")


def test_replicates_are_the_same_draws_for_every_slice(tmp_path):
    models = load_models({"jfe": [written(tmp_path / "j", units({"a_task7": (5, 9)}))]})
    comparison = Comparison(models, "global", replicates=30)
    np.testing.assert_array_equal(*comparison.replicates([needs_fusion(), of_unit("a_task7")]))
    assert summary(comparison)["runs"] == 1


def test_evaluations_that_do_not_belong_together_are_refused(tmp_path):
    one = written(tmp_path / "one", units({"a_task7": (5, 9)}))
    two = written(tmp_path / "two", units({"a_task7": (5, 8)}))
    with pytest.raises(UserError, match=r"not of the same queries.*a_task7:8"):
        load_models({"jfe": [one], "late": [two]})
    with pytest.raises(UserError, match="jfe has 2 evaluations and late 1"):
        load_models({"jfe": [one, one], "late": [one]})
    with pytest.raises(UserError, match="finished `jfe eval`"):
        load_models({"jfe": [tmp_path / "none"]})
    (two / "results.json").write_text("{")
    with pytest.raises(UserError, match="broken JSON"):
        load_models({"jfe": [two]})
