import io
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jfe_jax.data.formats.candidate_ids import CandidateIndices
from jfe_jax.data.formats.mbeir import MODALITIES, Mbeir
from jfe_jax.data.ids import IDS_PER_DATASET
from jfe_jax.data.image_transforms import decode
from jfe_jax.data.prepare.prepare import prepare_dataset
from jfe_jax.data.storage import shard_writer
from jfe_jax.errors import UserError
from tests.data.conftest import silent
from tests.support.mbeir_directory import DATASETS, archive_images, edit_row, make_mbeir


@pytest.fixture
def own(tmp_path):
    """A copy of the directory that a test may modify."""
    return make_mbeir(tmp_path / "mbeir", queries_per_task=4)


def run(own, out, **options):
    return list(prepare_dataset(Mbeir(own), out, progress=silent, **options))


def test_tfds_reads_every_query_and_candidate_back(mbeir_dir, prepared_dir):
    mbeir = Mbeir(mbeir_dir)
    pools, indices = {}, CandidateIndices(mbeir)
    for dataset in (0, 2):
        place = prepared_dir / f"mbeir_candidates/dataset{dataset}/2.0.0"
        source = tfds.builder_from_directory(place).as_data_source("pool")
        index = indices.for_dataset(dataset)
        assert len(source) == len(index) == 80
        images = stored_images(prepared_dir, f"dataset{dataset}")
        for row, (record, candidate) in enumerate(zip(source, index.candidates(), strict=True)):
            number = dataset * IDS_PER_DATASET + row
            assert [one.tolist() for one in index.find([candidate.did])] == [[number], [record["modality"]]]
            assert record["did"].decode() == candidate.did
            assert record["text"].decode() == (candidate.text or "")
            assert images.get(record["image_id"]) == (candidate.image.read_bytes() if candidate.image else None)
            pools[number] = candidate
    for unit in mbeir.units("train"):
        source = tfds.builder_from_directory(prepared_dir / f"mbeir_queries/{unit.name}/2.0.0").as_data_source("train")
        images = stored_images(prepared_dir, unit.name) | stored_images(
            prepared_dir, f"dataset{DATASETS[unit.dataset]}"
        )
        for record, query in zip(source, mbeir.queries("train", unit), strict=True):
            assert record["qid"].decode() == query.qid
            assert record["text"].decode() == (query.text or "")
            assert images.get(record["image_id"]) == (query.image.read_bytes() if query.image else None)
            assert MODALITIES[record["modality"]] == query.modality and record["task"] == unit.task
            assert tuple(pools[number].did for number in record["positives"]) == query.pos
            assert tuple(pools[number].did for number in record["negatives"]) == query.neg
            for kind in ("positive", "negative"):
                assert [MODALITIES[one] for one in record[f"{kind}_modalities"]] == [
                    pools[number].modality for number in record[f"{kind}s"]
                ]


def stored_images(out, part):
    """Image id → bytes of a part of images."""
    place = out / "mbeir_images" / part / "2.0.0"
    if not place.exists():
        return {}
    source = tfds.builder_from_directory(place).as_data_source("images")
    ids = np.load(place / "ids.npy")
    assert (np.diff(ids) > 0).all() and len(ids) == len(source)
    rows = np.load(place / "rows.npy")
    assert all(source[int(row)]["image_id"] == one for one, row in zip(ids, rows, strict=True))
    return {record["image_id"]: record["image"] for record in source}


def test_an_image_is_stored_once(mbeir_dir, prepared_dir):
    """Queries here ask with images that are candidates too."""
    assert {one.name for one in (prepared_dir / "mbeir_images").iterdir()} == {"dataset0", "dataset2"}
    stored = stored_images(prepared_dir, "dataset0")
    assert len({*stored.values()}) == len(stored) == 40


def test_finished_parts_are_reused_and_changed_ones_are_rewritten(own, tmp_path):
    out = tmp_path / "out"
    first = run(own, out)
    assert {part.outcome for part in first} == {"written"} and len(first) == 12
    again = run(own, out)
    assert {part.outcome for part in again} == {"kept"}
    assert [part.records for part in again] == [part.records for part in first]
    edit_row(own / "query/train/mbeir_shapes_task0_train.jsonl", 1, query_txt="another text")
    third = {part.name: part.outcome for part in run(own, out)}
    assert third.pop("mbeir_queries/shapes_task0") == "written" and {*third.values()} == {"kept"}
    # The pool's numbers hold for all queries of its dataset.
    edit_row(own / "cand_pool/local/mbeir_facts_task1_cand_pool.jsonl", 1, txt="another text")
    fourth = {part.name: part.outcome for part in run(own, out)}
    assert {name for name, outcome in fourth.items() if outcome == "written"} == {
        "mbeir_candidates/dataset2",
        "mbeir_images/dataset2",
        *(f"mbeir_queries/facts_task{task}" for task in (1, 2, 6, 8)),
    }


def test_a_part_killed_halfway_is_rewritten(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, units=["shapes_task0"])
    place = out / "mbeir_queries/shapes_task0"
    (place / "2.0.0/dataset_info.json").unlink()
    (place / "2.0.0.incompleteXYZ").mkdir()
    outcomes = {part.name: part.outcome for part in run(own, out, units=["shapes_task0"])}
    assert outcomes.pop("mbeir_queries/shapes_task0") == "written" and {*outcomes.values()} == {"kept"}
    assert [one.name for one in place.iterdir()] == ["2.0.0"]


def test_only_selected_units_and_splits_are_written(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, units=["facts_task1"], splits=["val"])
    assert {one.name for one in (out / "mbeir_queries").iterdir()} == {"facts_task1"}
    info = tfds.builder_from_directory(out / "mbeir_queries/facts_task1/2.0.0").info
    assert set(info.splits) == {"val"}
    assert not (out / "mbeir_candidates/dataset0").exists()
    with pytest.raises(UserError, match="no unit facts_task9 in train, val; there are facts_task1"):
        run(own, out, units=["facts_task9"])
    with pytest.raises(UserError, match="no such split"):
        run(own, out, splits=["tests"])


def test_test_queries_are_left_out_unless_asked_for(mbeir_dir, prepared_dir):
    info = tfds.builder_from_directory(prepared_dir / "mbeir_queries/facts_task1/2.0.0").info
    assert set(info.splits) == {"train", "val"}


def test_dangling_ids_are_counted_and_queries_left_without_a_positive_dropped(own, tmp_path):
    file = own / "query/train/mbeir_shapes_task3_train.jsonl"
    edit_row(file, 1, pos_cand_list=["0:999", "7:1"])
    edit_row(file, 2, neg_cand_list=["0:999"])
    parts = {part.name: part for part in run(own, tmp_path / "out", units=["shapes_task3"], splits=["train"])}
    part = parts["mbeir_queries/shapes_task3"]
    assert (part.records, part.dropped_queries, part.dangling) == (3, 1, 3)
    assert parts["mbeir_candidates/dataset7"].outcome == "empty"


def test_a_file_of_several_tasks_gets_each_rows_own(own, tmp_path):
    train = own / "query/train"
    rows = [(train / f"mbeir_shapes_task{task}_train.jsonl").read_text() for task in (0, 7)]
    shutil.rmtree(train)
    train.mkdir()
    (train / "mbeir_shapes_train.jsonl").write_text("".join(rows))
    run(own, tmp_path / "out", splits=["train"])
    source = tfds.builder_from_directory(tmp_path / "out/mbeir_queries/shapes/2.0.0").as_data_source("train")
    assert [record["task"] for record in source] == [0] * 4 + [7] * 4


def test_malformed_input_is_named_and_leaves_no_partial_part(own, tmp_path):
    row = json.loads((own / "query/train/mbeir_shapes_task7_train.jsonl").read_text().splitlines()[0])
    image = own / row["query_img_path"]
    whole = image.read_bytes()
    image.write_bytes(whole[:90])
    with pytest.raises(UserError) as caught:
        run(own, tmp_path / "out")
    assert str(caught.value).startswith(f"{image}: cannot be read as an image")
    image.unlink()
    with pytest.raises(UserError, match="cannot read the image"):
        run(own, tmp_path / "out")
    image.write_bytes(whole)
    assert {part.outcome for part in run(own, tmp_path / "out")} <= {"written", "kept"}
    edit_row(own / "query/train/mbeir_shapes_task7_train.jsonl", 1, pos_cand_list=["nameless"])
    with pytest.raises(UserError, match="candidate id 'nameless' is not dataset:number"):
        run(own, tmp_path / "out")


def test_a_dataset_number_that_int32_cannot_hold_is_refused(own, tmp_path):
    edit_row(own / "query/train/mbeir_shapes_task7_train.jsonl", 1, neg_cand_list=["214:1"])
    with pytest.raises(UserError, match="dataset id 214 is larger than 213"):
        run(own, tmp_path / "out")
    assert np.iinfo(np.int32).max >= 213 * IDS_PER_DATASET + IDS_PER_DATASET - 1


def all_images(out):
    return {one.name: stored_images(out, one.name) for one in (out / "mbeir_images").iterdir()}


def with_an_image_of_its_own(own):
    """The first query of shapes_task7 gets an image that no candidate has."""
    picture = own / "mbeir_images/new.png"
    Image.new("RGB", (60, 30), (9, 8, 7)).save(picture)
    edit_row(own / "query/train/mbeir_shapes_task7_train.jsonl", 1, query_img_path="mbeir_images/new.png")
    return picture.read_bytes()


@pytest.mark.parametrize("parts", [0, 4])
def test_images_come_out_of_the_published_archive_without_unpacking(own, tmp_path, parts):
    content = with_an_image_of_its_own(own)
    run(own, tmp_path / "files")
    wanted = all_images(tmp_path / "files")
    assert {*wanted} == {"dataset0", "dataset2", "shapes_task7"} and [*wanted["shapes_task7"].values()] == [content]
    archive_images(own, parts)
    run(own, tmp_path / "archive")
    assert all_images(tmp_path / "archive") == wanted
    assert not (own / "mbeir_images").exists()


KILLED = """
import os, signal, sys
from jfe_jax.cli.main import main
from jfe_jax.data.storage import shard_writer
shard_writer.MIN_RECORDS_PER_SHARD = 8
finish, left = shard_writer.RecordShardWriter.close, int(sys.argv.pop(1))
def close(self):
    global left
    left -= self._writer is not None
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self)
shard_writer.RecordShardWriter.close = close
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("killed_after", "parts"), [(5, 0), (14, 0), (14, 3)])
def test_a_killed_run_resumes_after_its_last_finished_shard(own, tmp_path, monkeypatch, killed_after, parts):
    monkeypatch.setattr(shard_writer, "MIN_RECORDS_PER_SHARD", 8)
    with_an_image_of_its_own(own)
    options = {"splits": ["train"], "units": ["shapes_task0", "shapes_task7"]}
    run(own, tmp_path / "whole", **options)
    if parts:
        archive_images(own, parts)
    out = tmp_path / "out"
    words = ["data", "prepare", own, "--out", out, "--splits", "train", "--units", *options["units"]]
    done = subprocess.run([sys.executable, "-c", KILLED, str(killed_after), *map(str, words)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    before = {file.name: file.stat().st_ino for file in out.rglob("*.shard")}
    moved = {file.stat().st_ino for file in out.rglob("*.array_record*")}
    assert before or moved
    run(own, out, **options)
    after = {file.stat().st_ino for file in out.rglob("*.array_record*")}
    assert {*before.values()} | moved <= after, "a finished shard was written again"
    assert not list(out.rglob("*.shard")) and not list(out.rglob("unfinished"))
    assert all_images(out) == all_images(tmp_path / "whole")
    for part in ("mbeir_queries/shapes_task7", "mbeir_candidates/dataset0"):
        one, other = (tfds.builder_from_directory(root / part / "2.0.0") for root in (out, tmp_path / "whole"))
        split = next(iter(one.info.splits))
        assert [str(row) for row in one.as_data_source(split)] == [str(row) for row in other.as_data_source(split)]


def test_a_share_of_bad_images_is_left_out_and_listed(own, tmp_path):
    broken = own / "mbeir_images/circle/red_filled.jpg"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(UserError, match=r"red_filled\.jpg: cannot be read .* 1 of the 40 images of mbeir_images/d"):
        run(own, tmp_path / "out")
    parts = {part.name: part for part in run(own, tmp_path / "out", max_bad_share=0.05)}
    assert parts["mbeir_images/dataset0"].missing == 1 and parts["mbeir_images/dataset0"].records == 39
    assert str(broken) in (tmp_path / "out/mbeir_images/dataset0/2.0.0/missing.txt").read_text()
    assert len(stored_images(tmp_path / "out", "dataset0")) == 39
    archive_images(own, 2)
    with pytest.raises(UserError, match=r"red_filled\.jpg in .*part-01: cannot be read as an image"):
        run(own, tmp_path / "archived")


def test_larger_images_are_downscaled_and_smaller_ones_are_unchanged(own, tmp_path):
    content = with_an_image_of_its_own(own)
    run(own, tmp_path / "out", short_side=16, units=["shapes_task7"], splits=["train"])
    (new,) = stored_images(tmp_path / "out", "shapes_task7").values()
    assert Image.open(io.BytesIO(new)).size == (32, 16) and new != content
    assert np.abs(np.asarray(decode(new)).astype(int) - (9, 8, 7)).max() <= 2
    run(own, tmp_path / "out", short_side=30, units=["shapes_task7"], splits=["train"])
    assert [*stored_images(tmp_path / "out", "shapes_task7").values()] == [content]
