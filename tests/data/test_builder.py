import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jfe_jax.data.mbeir import MODALITIES, Mbeir
from jfe_jax.data.numbering import PER_DATASET, CandidateIndex
from jfe_jax.data.prepare import prepare
from jfe_jax.errors import UserError
from tests.data.conftest import silent
from tests.data.mbeir_maker import edit_row, make_mbeir


@pytest.fixture
def own(tmp_path):
    """A directory that a test may spoil."""
    return make_mbeir(tmp_path / "mbeir", queries_per_task=4)


def run(own, out, **options):
    return list(prepare(Mbeir(own), out, progress=silent, **options))


def test_tfds_reads_every_query_and_candidate_back(mbeir_dir, prepared_dir):
    mbeir = Mbeir(mbeir_dir)
    pools = {}
    for dataset in (0, 2):
        place = prepared_dir / f"mbeir_candidates/dataset{dataset}/1.0.0"
        source = tfds.builder_from_directory(place).as_data_source("pool")
        index = CandidateIndex(mbeir, dataset)
        assert len(source) == len(index.numbers) == 80
        for row, (record, candidate) in enumerate(zip(source, index.candidates(), strict=True)):
            number = dataset * PER_DATASET + row
            assert index.numbers[candidate.did] == number
            assert record["did"].decode() == candidate.did
            assert record["text"].decode() == (candidate.text or "")
            assert record["image"] == (candidate.image.read_bytes() if candidate.image else b"")
            assert bool(record["image_id"]) == bool(candidate.image)
            pools[number] = candidate
    for unit in mbeir.units("train"):
        source = tfds.builder_from_directory(prepared_dir / f"mbeir_queries/{unit.name}/1.0.0").as_data_source("train")
        for record, query in zip(source, mbeir.queries("train", unit), strict=True):
            assert record["qid"].decode() == query.qid
            assert record["text"].decode() == (query.text or "")
            assert record["image"] == (query.image.read_bytes() if query.image else b"")
            assert MODALITIES[record["modality"]] == query.modality and record["task"] == unit.task
            assert tuple(pools[number].did for number in record["positives"]) == query.pos
            assert tuple(pools[number].did for number in record["negatives"]) == query.neg
            assert [MODALITIES[one] for one in record["positive_modalities"]] == [
                pools[number].modality for number in record["positives"]
            ]


def test_the_same_image_has_the_same_id_wherever_it_is(mbeir_dir, prepared_dir):
    def ids(name, split):
        source = tfds.builder_from_directory(prepared_dir / name / "1.0.0").as_data_source(split)
        return {record["image"]: record["image_id"] for record in source if record["image"]}

    pool, queries = ids("mbeir_candidates/dataset0", "pool"), ids("mbeir_queries/shapes_task7", "train")
    assert queries.keys() <= pool.keys()
    assert all(pool[image] == one for image, one in queries.items())
    assert len({*pool.values()}) == len(pool)


def test_finished_parts_are_kept_and_changed_ones_are_written_again(own, tmp_path):
    out = tmp_path / "out"
    first = run(own, out)
    assert {part.outcome for part in first} == {"written"} and len(first) == 10
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
        *(f"mbeir_queries/facts_task{task}" for task in (1, 2, 6, 8)),
    }


def test_a_part_that_was_killed_half_way_is_written_anew(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, units=["shapes_task0"])
    place = out / "mbeir_queries/shapes_task0"
    (place / "1.0.0/dataset_info.json").unlink()
    (place / "1.0.0.incompleteXYZ").mkdir()
    outcomes = {part.name: part.outcome for part in run(own, out, units=["shapes_task0"])}
    assert outcomes == {"mbeir_candidates/dataset0": "kept", "mbeir_queries/shapes_task0": "written"}
    assert [one.name for one in place.iterdir()] == ["1.0.0"]


def test_only_what_is_asked_for_is_written(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, units=["facts_task1"], splits=["val"])
    assert {one.name for one in (out / "mbeir_queries").iterdir()} == {"facts_task1"}
    info = tfds.builder_from_directory(out / "mbeir_queries/facts_task1/1.0.0").info
    assert set(info.splits) == {"val"}
    assert not (out / "mbeir_candidates/dataset0").exists()
    with pytest.raises(UserError, match="no unit facts_task9 in train, val; there are facts_task1"):
        run(own, out, units=["facts_task9"])
    with pytest.raises(UserError, match="no such split"):
        run(own, out, splits=["tests"])


def test_test_queries_are_left_out_unless_asked_for(mbeir_dir, prepared_dir):
    info = tfds.builder_from_directory(prepared_dir / "mbeir_queries/facts_task1/1.0.0").info
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
    source = tfds.builder_from_directory(tmp_path / "out/mbeir_queries/shapes/1.0.0").as_data_source("train")
    assert [record["task"] for record in source] == [0] * 4 + [7] * 4


def test_bad_input_is_named_and_leaves_no_half_written_part(own, tmp_path):
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
    assert np.iinfo(np.int32).max >= 213 * PER_DATASET + PER_DATASET - 1
