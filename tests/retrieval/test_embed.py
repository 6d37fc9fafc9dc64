"""Item files and indices: what is written opens again, what is wrong is named with its line."""

import json

import numpy as np
import pytest
from PIL import Image

from jfe_jax.errors import UserError
from jfe_jax.retrieval import embed
from jfe_jax.retrieval.embed import Index, embed_items, read_items, write_index
from tests.retrieval.tiny import picture, tiny_retriever


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return tiny_retriever(tmp_path_factory.mktemp("model"))


def items_file(folder, *rows):
    file = folder / "items.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_an_index_opens_with_its_items_in_order(retriever, tmp_path, monkeypatch):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    rows = [{"id": f"t{i}", "text": f"text {i}"} for i in range(5)]
    rows.insert(2, {"id": "both", "text": "turn it", "image": "a.png", "instruction": "find it"})
    monkeypatch.setattr(embed, "CHUNK", 4)
    file = items_file(tmp_path, *rows)
    ids, embeddings = embed_items(retriever, read_items(file))
    write_index(tmp_path / "index", retriever, ids, embeddings, file)
    index = Index.open(tmp_path / "index")
    assert index.ids == [row["id"] for row in rows] and index.embeddings.dtype == np.float32
    expected = retriever.encode([item for _, item in read_items(file)])
    np.testing.assert_allclose(index.embeddings, expected, atol=1e-5)
    assert (index.step, index.fingerprint) == (0, retriever.fingerprint)
    index.require_made_by(retriever)


def test_an_index_of_another_checkpoint_is_refused(retriever, tmp_path):
    write_index(tmp_path, retriever, ["a"], np.zeros((0, 16), np.float32), "x")
    with pytest.raises(UserError, match="no index, or a broken one"):
        Index.open(tmp_path)
    write_index(tmp_path, retriever, ["a"], np.zeros((1, 16), np.float32), "x")
    with pytest.raises(UserError, match=r"made by .* step 0 .*, not by .* step 1"):
        Index.open(tmp_path).require_made_by(tiny_retriever(tmp_path, seed=1))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "an object with the keys"),
        ({"id": "b", "text": "x", "img": "a.png"}, "unknown key 'img'"),
        ({"id": "b", "text": 3}, "'text' must be a string"),
        ({"text": "x"}, '"id" must be'),
        ({"id": "a", "text": "x"}, "id 'a' was already used in line 1"),
        ({"id": "b", "instruction": "find it"}, "'b' has neither text nor image"),
        ({"id": "b", "image": "none.png"}, "no image .*none.png"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, problem):
    file = items_file(tmp_path, {"id": "a", "text": "fine"}, "", row)
    with pytest.raises(UserError, match=rf"items\.jsonl:3: {problem}"):
        list(read_items(file))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_items(tmp_path / "none.jsonl"))
