"""Reports: self-contained, well-formed, and nothing from the data becomes markup."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.evaluation import results
from jfe_jax.evaluation.evaluator import evaluate
from jfe_jax.reports import comparison_report, evaluation_report, figures, svg_charts
from jfe_jax.reports import html as page
from jfe_jax.reports.comparison import compare, load_models
from tests.support.mbeir_directory import edit_row
from tests.support.tiny_retriever import quiet

_VOID = {"meta", "img", "br", "rect", "line", "path", "link"}


class Checker(html.parser.HTMLParser):
    """Collects attributes and fails on a tag that is closed in the wrong order."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.said = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in _VOID or tag == "path":
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def checked(text):
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert all(link.startswith(("data:image/", "#")) for link in checker.links)
    assert not re.search(r"https?://|url\(|@import", text)
    return checker


@pytest.fixture(scope="module")
def nasty(mbeir_path, tmp_path_factory):
    path = shutil.copytree(mbeir_path, tmp_path_factory.mktemp("nasty") / "copy")
    for number in range(1, 7):
        edit_row(
            path / "query/test/mbeir_shapes_task7_test.jsonl",
            number,
            query_txt='<script>alert("x")</script> & more',
            query_src_content=json.dumps({"group": f"g{number}", "kind": "<b>", "edit": "'\""}),
        )
    return path


@pytest.fixture(scope="module")
def evaluations(shapes_retriever, nasty, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations")
    for name, instruction in (("one", 0), ("two", 1)):
        evaluation = evaluate(
            shapes_retriever, Mbeir(nasty), instruction=instruction, given=("all", "text", "image"), progress=quiet
        )
        results.write_results(out / name, evaluation.results, evaluation.answers, evaluation.pools)
        evaluation_report.write(out / name / "report.html", evaluation)
    return out


def test_the_evaluations_report_is_self_contained_and_escaped(evaluations):
    text = (evaluations / "one" / "report.html").read_text(encoding="utf-8")
    checker = checked(text)
    assert text.count("<script>") == 1
    said = " ".join(checker.said)
    assert '<script>alert("x")</script> & more.' in said
    for heading in ("Local pool", "Global pool", "Kinds of query", "Half of the query alone"):
        assert heading in checker.said
    assert text.count("data:image/webp;base64,") > 50
    assert 'data-outcome="miss"' in text


def test_the_headline_names_every_unit_and_pool(evaluations):
    told = json.loads((evaluations / "one" / "results.json").read_text())
    table = evaluation_report.headline(told)
    assert table.count("shapes_task7 (6)") == 2 and "needs fusion (18)" in table


def test_the_comparison_shows_both_models_answers(evaluations, tmp_path):
    models = load_models({"jfe": [evaluations / "one"], "late <i>": [evaluations / "two"]})
    told = compare(models, replicates=20)
    comparison_report.write(tmp_path / "report.html", told, models)
    checker = checked((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "late <i>" in checker.said and "both wrong" in checker.said
    assert any(link.startswith("data:image/webp") for link in checker.links)


def test_the_comparison_does_without_data_that_has_gone(evaluations, tmp_path):
    models = load_models({"jfe": [evaluations / "one"]})
    for runs in models.values():
        runs[0].results["data"] = str(tmp_path / "gone")
    comparison_report.write(tmp_path / "report.html", compare(models, replicates=5), models)
    assert "No gallery" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_picture_is_drawn(evaluations, tmp_path):
    models = load_models({"jfe": [evaluations / "one"], "late": [evaluations / "two"]})
    entry = compare(models, replicates=5)["pools"]["global"]["with_source"]
    figures.comparison(tmp_path / "a.png", entry, "hit@1, global pool")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 900 and len(set(np.asarray(picture.convert("L")).ravel())) > 20


def test_training_curves_follow_the_stages(tmp_path):
    for stage, init, start in (("one", "", 4.0), ("two", tmp_path / "one", 2.0)):
        (tmp_path / stage / "logs").mkdir(parents=True)
        (tmp_path / stage / "config.yaml").write_text(f"init: {str(init) or repr('')}\n")
        rows = [{"step": i, "loss": start / (i + 1), "accuracy": float("nan")} for i in range(600)]
        (tmp_path / stage / "logs" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = svg_charts.training_stages(tmp_path / "two" / "checkpoints" / "600")
    assert [rows[0]["loss"] for rows in stages] == [4.0, 2.0]
    drawn = svg_charts.training_charts([("jfe", 0, tmp_path / "two")])
    assert "stage 1: loss" in drawn and "stage 2: loss" in drawn and "accuracy" not in drawn
    assert drawn.count(",") < 1500
    assert svg_charts.training_charts([("jfe", 0, tmp_path / "none")]) == ""


def test_numbers_are_written_plainly():
    assert (page.percent(0.1234), page.percent(None), page.percent(float("nan"))) == ("12.3", "–", "–")
    assert (page.points(0.1), page.points(-0.1)) == ("+10.0", "−10.0")
