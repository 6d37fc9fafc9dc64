"""A query id that is there twice counts once, or is refused where the two are different queries."""

import json
import shutil

import pytest

from jfe_jax.errors import UserError
from jfe_jax.evaluation.load import read_questions


def read(path):
    return read_questions(path, split="test", pools=["local"], units=["shapes_task0"], instruction=0).units[0]


@pytest.fixture
def queries(mbeir_path, tmp_path):
    path = shutil.copytree(mbeir_path, tmp_path / "copy")
    return path, path / "query/test/mbeir_shapes_task0_test.jsonl"


def test_an_equal_row_counts_once_and_is_reported(queries):
    path, file = queries
    before = read(path)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0], lines[2], lines[0]]) + "\n")
    after = read(path)
    assert after.asked == before.asked
    assert after.warnings == [
        "shapes_task0: 3 rows repeat a query that is there already; each query counts once",
        *before.warnings,
    ]


@pytest.mark.parametrize("change", [{"query_txt": "another text"}, {"query_img_path": None}])
def test_two_queries_under_one_id_are_refused(queries, change):
    path, file = queries
    lines = file.read_text().splitlines()
    other = json.loads(lines[0]) | change
    if other == json.loads(lines[0]):
        other["query_txt"] = "a third text"
    file.write_text("\n".join([*lines, json.dumps(other)]) + "\n")
    with pytest.raises(UserError, match=rf"{file.name}: query {other['qid']} is there twice, with different contents"):
        read(path)
