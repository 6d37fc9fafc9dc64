"""Benchmarks that are not M-BEIR's: three files of one's own, and MMEB's rows with their own candidates."""

import json

import ir_measures
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jfe_jax.data.item import Item
from jfe_jax.errors import UserError
from jfe_jax.evaluation import results
from jfe_jax.evaluation.aggregate import add_means
from jfe_jax.evaluation.evaluator import ask
from jfe_jax.evaluation.load import read_questions
from jfe_jax.evaluation.protocols import MMEB
from jfe_jax.reports import comparison_gallery, evaluation_report
from jfe_jax.reports.comparison import compare, load_models
from tests.support.tiny_retriever import picture, quiet

WORDS = [f"a thing of kind {number}" for number in range(30)]


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path):
    """Queries and candidates of every modality, graded judgements, one dangling, one of a query that is not there."""
    path = tmp_path / "shop"
    (path / "pictures").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(picture(number)).save(path / f"pictures/{number}.png")
    rows = [{"id": f"c{number}", "text": word} for number, word in enumerate(WORDS)]
    rows += [{"id": f"i{number}", "image": f"pictures/{number}.png"} for number in range(6)]
    write_rows(path / "candidates.jsonl", rows)
    queries = [{"id": f"q{number}", "text": f"Kind {number}", "instruction": "Find it."} for number in range(8)]
    queries += [{"id": "q8", "image": "pictures/3.png", "text": "turned"}, {"id": "q9", "image": "pictures/2.png"}]
    write_rows(path / "queries.jsonl", queries)
    lines = [f"q{number} 0 c{number} {1 + number % 3}" for number in range(8)] + ["q0 0 c9 1", "q1 0 c8 0"]
    (path / "qrels.txt").write_text("\n".join([*lines, "q8 0 i3 1", "q8 0 gone 1", "stranger 0 c1 1"]) + "\n")
    return path


def test_own_files_give_trec_evals_figures(shapes_retriever, own, tmp_path):
    evaluation = ask(shapes_retriever, read_questions(own), depth=100, progress=quiet)
    told = evaluation.results
    unit, entry = told["units"]["shop"], told["units"]["shop"]["pools"]["local"]
    assert (unit["queries"], unit["unjudged"], entry["size"], entry["dangling"]) == (9, 1, 36, 1)
    said = "\n".join(told["warnings"])
    assert "1 queries have no right" in said and "1 queries that are not asked, such as stranger" in said
    results.write_results(tmp_path / "out", told, evaluation.answers, evaluation.pools)
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "out/qrels/shop.qrels")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "out/runs/shop.local.trec")))
    theirs = ir_measures.calc_aggregate([ir_measures.nDCG @ 10, ir_measures.AP, ir_measures.R @ 20], qrels, run)
    ours = entry["metrics"]
    assert [ours["ndcg@10"], ours["map"], ours["recall@20"]] == pytest.approx(
        [theirs[ir_measures.nDCG @ 10], theirs[ir_measures.AP], theirs[ir_measures.R @ 20]], abs=1e-6
    )
    assert evaluation.answers[0].asked[0].instruction == "Find it."
    plain = read_questions(own, instruction=None)
    assert plain.units[0].asked[0].instruction is None
    evaluation_report.write(tmp_path / "out/report.html", evaluation)
    models = load_models({"one": [tmp_path / "out"], "two": [tmp_path / "out"]})
    assert compare(models, replicates=5, metric="ndcg@10")["pools"]["local"]["with_source"]["units"]["shop"]
    cards, note = comparison_gallery.cards(models, "local", "two")
    assert not note and {card.asked.query.qid for card in cards} <= {f"q{number}" for number in range(9)}
    assert all(card.right is not None and card.rankings[0].found for card in cards)


def test_beirs_qrels_are_the_same_judgements(own):
    first = read_questions(own).units[0].asked
    lines = (own / "qrels.txt").read_text().splitlines()
    rows = ["query-id\tcorpus-id\tscore", *("\t".join(np.array(line.split())[[0, 2, 3]]) for line in lines)]
    (own / "qrels.txt").unlink()
    (own / "qrels.tsv").write_text("\n".join(rows) + "\n")
    assert [one.relevant for one in read_questions(own).units[0].asked] == [one.relevant for one in first]


@pytest.mark.parametrize("suffix", [".0", ".00", ""])
@pytest.mark.parametrize("headings", ["query-id\tcorpus-id\tscore\n", ""])
def test_the_first_judgement_of_a_file_without_headings_counts(own, headings, suffix):
    first = read_questions(own).units[0].asked
    lines = (own / "qrels.txt").read_text().splitlines()
    rows = ["\t".join(np.array(line.split())[[0, 2, 3]]) + suffix for line in lines]
    (own / "qrels.txt").unlink()
    (own / "qrels.tsv").write_text(headings + "\n".join(rows) + "\n")
    assert [one.relevant for one in read_questions(own).units[0].asked] == [one.relevant for one in first]


@pytest.mark.parametrize(
    "lines, says",
    [
        ("q1 i1 0.5\nq2 i2 1", r"qrels\.tsv:1: a line is"),
        ("q1 0 i1 1\nq2 0 i2 1", r"qrels\.tsv:1: a line is"),
        ("query corpus score\nquery corpus score", r"qrels\.tsv:2: a line is"),
        ("q1 i1 1\nq1 i1 1\nq1 i1 2", r"qrels\.tsv:3: candidate i1 of query q1 is judged twice, 1 and 2"),
    ],
)
def test_judgements_that_cannot_be_meant_are_named(own, lines, says):
    (own / "qrels.txt").unlink()
    (own / "qrels.tsv").write_text(lines + "\n")
    with pytest.raises(UserError, match=says):
        read_questions(own)


@pytest.mark.parametrize(
    "file, line, says",
    [
        ("queries.jsonl", {"id": "q3", "text": "x"}, r"queries\.jsonl:11: id 'q3' was already used"),
        ("queries.jsonl", {"id": "a b", "text": "x"}, "'a b' holds blanks"),
        ("queries.jsonl", {"id": "z", "image": "none.png"}, r"queries\.jsonl:11: no image"),
        ("candidates.jsonl", {"id": "z"}, r"candidates\.jsonl:37: 'z' has neither"),
        ("candidates.jsonl", {"id": "z", "text": "x", "instruction": "y"}, "candidate z has an instruction"),
        ("qrels.txt", "q1 c1 1", r"qrels\.txt:14: a line is `query 0 candidate relevance`"),
        ("qrels.txt", "q1 0 c1 high", r"qrels\.txt:14"),
    ],
)
def test_bad_lines_of_ones_own_are_named(own, file, line, says):
    with (own / file).open("a") as stream:
        stream.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(UserError, match=says):
        read_questions(own)


def test_bad_files_of_ones_own_are_named(own):
    qrels = (own / "qrels.txt").read_text()
    (own / "qrels.txt").write_text("q1 0 C1 1\n")
    with pytest.raises(UserError, match=r"none of the 1 right candidates .*C1, is in candidates\.jsonl"):
        read_questions(own)
    (own / "qrels.txt").write_text("")
    with pytest.raises(UserError, match="no judgements"):
        read_questions(own)
    (own / "qrels.tsv").write_text(qrels)
    with pytest.raises(UserError, match="there is both of qrels"):
        read_questions(own)
    for name in ("qrels.txt", "qrels.tsv"):
        (own / name).unlink()
    with pytest.raises(UserError, match="there is neither of qrels"):
        read_questions(own)
    (own / "candidates.jsonl").write_text("")
    with pytest.raises(UserError, match=r"candidates\.jsonl: the pool of candidates is empty"):
        read_questions(own)
    (own / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"no M-BEIR directory .*none of MMEB's .*and no queries\.jsonl"):
        read_questions(own)


def test_options_that_do_not_belong_are_refused(own):
    for options, says in (
        ({"split": "val"}, "--split"),
        ({"pools": ("global",)}, "--pool"),
        ({"units": ("shop",)}, "--units"),
        ({"instruction": 2}, "--instruction 2"),
    ):
        with pytest.raises(UserError, match=says):
            read_questions(own, **options)


@pytest.fixture
def mmeb(tmp_path):
    """Two tasks of the published 36, one in Parquet and one in JSONL."""
    path = tmp_path / "mmeb"
    (path / "eval_images/N").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(picture(number)).save(path / f"eval_images/N/{number}.png")
    rows = []
    for number in range(6):
        others = [WORDS[(number + step) % 6] for step in range(6)]
        rows.append(
            {
                "qry_text": "<|image_1|>\nWhich kind is it?\n",
                "qry_img_path": f"N/{number}.png",
                # Of other lengths, with the truth once more at the end.
                "tgt_text": [*others[: 3 + number % 3], others[0]],
                "tgt_img_path": [""] * (4 + number % 3),
            }
        )
    (path / "VOC2007").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "VOC2007/test-00000-of-00001.parquet")
    swapped = [
        {
            "qry_text": WORDS[number],
            "qry_img_path": "",
            "tgt_text": ["<|image_1|>\nRepresent it."] * 6,
            "tgt_img_path": [f"N/{(number + step) % 6}.png" for step in range(6)],
        }
        for number in range(4)
    ]
    write_rows(path / "NIGHTS/test.jsonl", swapped)
    return path


def test_mmeb_ranks_each_query_among_its_own(shapes_retriever, mmeb, tmp_path):
    evaluation = ask(shapes_retriever, read_questions(mmeb), progress=quiet)
    told = evaluation.results
    assert list(told["units"]) == ["VOC2007", "NIGHTS"], "in the benchmark's order"
    assert told["members"]["Classification"] == ["VOC2007"] and told["members"]["IND"] == ["VOC2007", "NIGHTS"]
    headline = told["headline"]["per-query"]
    assert headline["value"] is None and len(headline["missing"]) == 34
    hits = []
    for number in range(6):
        image = mmeb / f"eval_images/N/{number}.png"
        query = shapes_retriever.encode([Item(text="Which kind is it?", image=image)])[0]
        among = [WORDS[(number + step) % 6] for step in range(3 + number % 3)]
        scores = shapes_retriever.encode([Item(text=word) for word in among]) @ query
        hits.append(scores[0] > scores[1:].max())
    entry = told["units"]["VOC2007"]["pools"]["per-query"]
    assert entry["metrics"]["hit@1"] == np.mean(hits) and 0 < np.mean(hits) < 1
    answers = evaluation.answers[0]
    assert (answers.rows >= 0).sum(1).tolist() == [3, 4, 5] * 2, "doubles are one candidate"
    results.write_results(tmp_path / "out", told, evaluation.answers, evaluation.pools)
    assert len((tmp_path / "out/runs/VOC2007.per-query.trec").read_text().splitlines()) == 24
    evaluation_report.write(tmp_path / "out/report.html", evaluation)
    page = (tmp_path / "out/report.html").read_text()
    assert "VLM2Vec (Phi-3.5-V, LoRA)" in page and "34 units are missing" in page


def test_a_tie_counts_against_the_truth(shapes_retriever, tmp_path, monkeypatch):
    row = {"qry_text": "x", "qry_img_path": "", "tgt_text": ["y", "z"], "tgt_img_path": ["", ""]}
    write_rows(tmp_path / "GQA/test.jsonl", [row, row | {"tgt_text": ["y", "y"]}])
    width = shapes_retriever.width
    monkeypatch.setattr(
        type(shapes_retriever),
        "encode",
        lambda self, items, **_: np.tile(np.eye(1, width, dtype=np.float32), (len(items), 1)),
    )
    evaluation = ask(shapes_retriever, read_questions(tmp_path), progress=quiet)
    assert evaluation.answers[0].ranks.tolist() == [[2], [1]]


def test_mmebs_36_tasks_and_their_means():
    assert len(MMEB.units) == len(set(MMEB.units)) == 36
    sizes = {group: MMEB.size(group) for group in MMEB.groups}
    assert sizes == {"Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4, "IND": 20, "OOD": 16}

    def unit(name, hit):
        entry = {"queries": 1, "metrics": {"hit@1": hit}, "without_source": {"hit@1": hit}, "kinds": {}}
        return {"unit": name, "dataset": name, "task": -1, "pools": {"per-query": entry}}

    told = add_means([unit(name, number / 36) for number, name in enumerate(MMEB.units)], MMEB)
    assert told["headline"]["per-query"]["value"] == pytest.approx(np.arange(36).mean() / 36)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tgt_img_path": [""]}, r"test\.jsonl:1: tgt_text and tgt_img_path must be non-empty lists of equal length"),
        ({"tgt_text": [], "tgt_img_path": []}, "non-empty lists"),
        ({"qry_text": "<|image_1|>\n"}, r"test\.jsonl:1: the query has neither"),
        ({"qry_img_path": "../x.png"}, "leaves the directory"),
        ({"tgt_img_path": ["N/none.png"] * 6}, r"none\.png: no such image \(1 of 7"),
        ({"qry_img_path": 3}, "strings or null"),
    ],
)
def test_bad_rows_of_mmeb_are_named(mmeb, change, says):
    file = mmeb / "NIGHTS/test.jsonl"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | change), *others]) + "\n")
    with pytest.raises(UserError, match=says):
        read_questions(mmeb, units=["NIGHTS"] if "none" not in says else [])


def test_bad_files_of_mmeb_are_named(mmeb):
    with pytest.raises(UserError, match="no task CIRR; there are NIGHTS, VOC2007"):
        read_questions(mmeb, units=["CIRR"])
    (mmeb / "NIGHTS/test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"test\.jsonl: no rows"):
        read_questions(mmeb)
    (mmeb / "VOC2007/test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as Parquet"):
        read_questions(mmeb, units=["VOC2007"])
