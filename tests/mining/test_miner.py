"""Mined negatives against a plain ranking of all candidates, and what is left out of them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jfe_jax.data.formats.mbeir import Candidate, Mbeir
from jfe_jax.data.image_transforms import decode
from jfe_jax.data.prepare.validate import validate_mbeir
from jfe_jax.errors import UserError
from jfe_jax.mining.miner import mine
from jfe_jax.mining.near_duplicates import Duplicates
from jfe_jax.mining.select_negatives import MiningConfig
from tests.support.mbeir_directory import edit_row, make_mbeir
from tests.support.tiny_retriever import quiet


@pytest.fixture
def data(mbeir_path, tmp_path):
    """A directory of its own, to plant things in."""
    return shutil.copytree(mbeir_path, tmp_path / "data", ignore=shutil.ignore_patterns("model"))


def mined(retriever, data, out, *, units, **settings):
    settings = MiningConfig(dtype="float32", **settings)
    done = list(mine(retriever, Mbeir(data), out, settings, units=units, progress=quiet))
    by_unit = {one.unit: one.counts for one in done}
    return by_unit, {unit: Mbeir(out).queries("train", Mbeir(out).unit("train", unit)) for unit in by_unit}


def ranking(retriever, data, unit, kind, wanted=None):
    """Query id → candidates that are not right, best first; and candidate id → embedding."""
    mbeir = Mbeir(data)
    unit = mbeir.unit("train", unit)
    pool = [one for one in mbeir.pool("train", unit, kind) if wanted is None or one.modality in wanted]
    rows = retriever.encode([one.item() for one in pool]).astype(np.float64)
    order = {}
    for query in mbeir.queries("train", unit):
        modality = next(one.modality for one in mbeir.pool("train", unit, "local") if one.did == query.pos[0])
        prompt = mbeir.instructions(unit.dataset, query.modality, modality)[0]
        scores = rows @ retriever.encode([query.item(prompt)])[0].astype(np.float64)
        best = sorted(range(len(pool)), key=lambda at: (-np.float32(scores[at]), pool[at].did))
        order[query.qid] = [pool[at].did for at in best if pool[at].did not in query.pos]
    return order


@pytest.mark.parametrize("pick, ranks", [("top", (1, 100)), ("top", (4, 6)), ("random", (3, 12))])
def test_negatives_are_those_of_a_plain_ranking(shapes_retriever, data, tmp_path, pick, ranks):
    settings = {"negatives": 5, "first_rank": ranks[0], "last_rank": ranks[1], "pick": pick, "near": 0.0}
    counts, queries = mined(
        shapes_retriever, data, tmp_path / "out", units=["shapes_task7"], image_difference=-1, **settings
    )
    expected = ranking(shapes_retriever, data, "shapes_task7", "local")
    assert len(queries["shapes_task7"]) == counts["shapes_task7"]["queries"] == 6
    drawn = set()
    for query in queries["shapes_task7"]:
        window = expected[query.qid][ranks[0] - 1 : ranks[1]]
        if pick == "top":
            assert list(query.neg) == window[:5]
        else:
            assert set(query.neg) <= set(window) and len(set(query.neg)) == 5
            drawn.add(tuple(window.index(did) for did in query.neg))
    assert pick == "top" or len(drawn) > 1
    again = mined(shapes_retriever, data, tmp_path / "again", units=["shapes_task7"], image_difference=-1, **settings)
    assert [one.neg for one in again[1]["shapes_task7"]] == [one.neg for one in queries["shapes_task7"]]


def test_wrong_modality_are_the_best_of_the_others(shapes_retriever, data, tmp_path):
    settings = {"pool": "global", "negatives": 5, "wrong_modality": 2, "near": 0.0, "image_difference": -1}
    counts, queries = mined(shapes_retriever, data, tmp_path / "out", units=["shapes_task7"], **settings)
    wanted, others = (
        ranking(shapes_retriever, data, "shapes_task7", "global", names)
        for names in (("image",), ("text", "image,text"))
    )
    for query in queries["shapes_task7"]:
        assert list(query.neg) == wanted[query.qid][:3] + others[query.qid][:2]
    assert counts["shapes_task7"]["wanted_modality"] == 18 and counts["shapes_task7"]["wrong_modality"] == 12


def test_the_output_is_a_whole_directory_in_the_sources_spelling(shapes_retriever, tmp_path):
    data = make_mbeir(tmp_path / "data", queries_per_task=2, spelling="card")
    mined(shapes_retriever, data, tmp_path / "out", units=["facts_task8"])
    report = validate_mbeir(tmp_path / "out")
    assert report.errors == 0 and report.as_dict()["counts"] == validate_mbeir(data).as_dict()["counts"]
    name = "query/train/mbeir_facts_task8_train.jsonl"
    (old, new) = (
        [json.loads(line) for line in (root / name).read_text().splitlines()] for root in (data, tmp_path / "out")
    )
    assert [row | {"neg_cand_list": None} for row in old] == [row | {"neg_cand_list": None} for row in new]
    assert all(set(one) == {"did"} for row in new for one in row["neg_cand_list"]) and new[0]["neg_cand_list"]
    told = json.loads((tmp_path / "out" / "mining" / "mining.json").read_text())
    assert told["units"]["facts_task8"]["queries"] == 2 and told["fingerprint"] == shapes_retriever.fingerprint
    # Another run over the same directory, of another unit.
    mined(shapes_retriever, data, tmp_path / "out", units=["facts_task6"], negatives=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
    assert rows == new
    assert old == [json.loads(line) for line in (data / name).read_text().splitlines()], "the source is as it was"


def test_duplicates_of_a_right_one_are_no_negatives(shapes_retriever, data, tmp_path):
    query = Mbeir(data).queries("train", Mbeir(data).unit("train", "shapes_task0"))[1]
    pool = data / "cand_pool/local/mbeir_shapes_task0_cand_pool.jsonl"
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    right = next(row for row in rows if row["did"] == query.pos[0])
    # The same picture under another name, and in another size and encoding.
    picture = decode(data / right["img_path"])
    picture.save(data / "mbeir_images/again.png")
    picture.resize((64, 64), Image.Resampling.BOX).save(data / "mbeir_images/larger.jpg", quality=90)
    copies = [
        right | {"did": f"0:90{n}", "img_path": f"mbeir_images/{name}"}
        for n, name in enumerate(("again.png", "larger.jpg"))
    ]
    with pool.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in copies)
    planted = {row["did"] for row in copies}

    def negatives(name, **settings):
        counts, queries = mined(
            shapes_retriever, data, tmp_path / name, units=["shapes_task0"], negatives=50, **settings
        )
        return counts["shapes_task0"], set(next(one for one in queries["shapes_task0"] if one.qid == query.qid).neg)

    counts, found = negatives("none", near=0.0, image_difference=-1)
    assert planted <= found and not counts["same"]
    counts, found = negatives("images", near=0.0)
    assert not planted & found and counts["same"] >= 2 and not counts["near"]
    counts, found = negatives("near", near=0.05, image_difference=-1)
    assert not planted & found and counts["near"] >= 2
    counts, found = negatives("margin", near=0.0, image_difference=-1, margin=-2.0)
    assert planted <= found and not counts["margin"]
    counts, found = negatives("all", near=0.0, image_difference=-1, margin=2.0)
    assert not found and counts["margin"] and counts["short"] == 6


def test_texts_and_images_are_compared(tmp_path):
    same = Duplicates(2.0).same
    one = Candidate("1", "A red circle.", None, "text")
    assert same(one, Candidate("2", "a red  circle", None, "text"))
    assert not same(one, Candidate("3", "A red square.", None, "text"))
    Image.new("RGB", (20, 20), (200, 40, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40), (201, 40, 40)).save(tmp_path / "b.png")
    Image.new("RGB", (20, 20), (40, 200, 40)).save(tmp_path / "c.png")
    a, b, c = (Candidate(name, None, tmp_path / f"{name}.png", "image") for name in "abc")
    assert same(a, b) and not same(a, c), "colour alone tells pictures apart"
    assert not same(a, one)


def test_what_cannot_be_mined_is_counted(shapes_retriever, data, tmp_path):
    file = data / "query/train/mbeir_shapes_task7_train.jsonl"
    queries = Mbeir(data).queries("train", Mbeir(data).unit("train", "shapes_task7"))
    edit_row(file, 1, query_img_path="mbeir_images/none.jpg")
    edit_row(file, 2, pos_cand_list=["0:999"])
    edit_row(data / "cand_pool/local/mbeir_shapes_task7_cand_pool.jsonl", 3, img_path="mbeir_images/gone.jpg")
    qrels = data / "qrels/train/mbeir_shapes_task7_train_qrels.txt"
    qrels.write_text(
        "".join(line for line in qrels.read_text().splitlines(True) if not line.startswith(f"{queries[1].qid} "))
    )
    counts, found = mined(shapes_retriever, data, tmp_path / "out", units=["shapes_task7"])
    counts = counts["shapes_task7"]
    assert (counts["missing_image"], counts["no_positive"], counts["missing_candidate_image"]) == (1, 1, 1)
    assert [one.neg for one in found["shapes_task7"][:2]] == [one.neg for one in queries[:2]]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"negatives": 0}, "at least one"),
        ({"negatives": 2, "wrong_modality": 3}, "0 to 2"),
        ({"first_rank": 5, "last_rank": 4}, "they rise"),
        ({"pick": "best"}, "top or random"),
        ({"near": 1.5}, "near 1.5: from 0"),
        ({"margin": float("nan")}, "margin nan: a number"),
        ({"instruction": 9}, "no instruction 9"),
    ],
)
def test_settings_that_cannot_be(shapes_retriever, data, tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        mined(shapes_retriever, data, tmp_path / "out", units=["shapes_task7"], **settings)


def test_the_source_and_what_is_in_the_way_are_left_alone(shapes_retriever, data, tmp_path):
    with pytest.raises(UserError, match="is the source itself"):
        mined(shapes_retriever, data, data, units=["shapes_task7"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "qrels").write_text("mine")
    with pytest.raises(UserError, match="qrels: is in the way"):
        mined(shapes_retriever, data, tmp_path / "out", units=["shapes_task7"])
    edit_row(data / "query/train/mbeir_shapes_task7_train.jsonl", 2, qid=None)
    with pytest.raises(UserError, match=r"task7_train\.jsonl:2: qid"):
        mined(shapes_retriever, data, tmp_path / "other", units=["shapes_task7"])
