import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.prepare.prepare import prepare_dataset
from jfe_jax.data.storage import shard_writer
from jfe_jax.data.storage.prepared_dataset import read_part_description
from jfe_jax.data.storage.tf_example import Example
from jfe_jax.errors import UserError
from tests.data.conftest import silent


def test_a_part_is_described_as_tfds_describes_it(mbeir_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "MIN_RECORDS_PER_SHARD", 8)
    list(prepare_dataset(Mbeir(mbeir_dir), tmp_path, splits=["train", "val"], units=["shapes_task0"], progress=silent))
    places = [file.parent for file in tmp_path.rglob("dataset_info.json")]
    assert {place.parts[-3] for place in places} == {"mbeir_queries", "mbeir_candidates", "mbeir_images"}
    for place in places:
        theirs, ours = tfds.builder_from_directory(place).info, read_part_description(place)
        assert dict(theirs.metadata) == ours.metadata
        assert set(theirs.splits) == set(ours.splits)
        for split, files in ours.splits.items():
            said = theirs.splits[split].file_instructions
            assert [tuple(file) for file in files] == [
                (one.filename, one.skip, one.take, one.examples_in_shard) for one in said
            ]
            assert len(ArrayRecordDataSource(files)) == sum(one.take for one in said)
    assert max(len(files) for place in places for files in read_part_description(place).splits.values()) > 1


def test_a_damaged_description_is_named(prepared_dir, tmp_path):
    with pytest.raises(UserError, match="nowhere: missing; run `jfe data prepare` again"):
        read_part_description(tmp_path / "nowhere")
    (tmp_path / "metadata.json").write_text("{}")
    for text in ("{", "{}", '{"name": "a", "fileFormat": "b", "splits": [{"name": "c"}]}'):
        (tmp_path / "dataset_info.json").write_text(text)
        with pytest.raises(UserError, match="description is damaged"):
            read_part_description(tmp_path)


def test_an_example_is_the_one_of_tensorflow():
    texts = []
    for kind in (Example, tf_example_pb2.Example):
        example = kind()
        feature = example.features.feature
        feature["text"].bytes_list.value.append(b"a house")
        feature["score"].float_list.value.extend([1.5, -2.0])
        feature["ids"].int64_list.value.extend([1, -1, 2**40])
        texts.append(example.SerializeToString(deterministic=True))
    assert texts[0] == texts[1]
    read = Example.FromString(texts[1]).features.feature
    assert read["ids"].int64_list.value == [1, -1, 2**40] and not read["ids"].bytes_list.value
    assert read["score"].float_list.value == [1.5, -2.0] and read["text"].bytes_list.value == [b"a house"]


def test_training_does_not_wait_for_tfds():
    code = "import sys, jfe_jax.data.pipeline.loader; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
