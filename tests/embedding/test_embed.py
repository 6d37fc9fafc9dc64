"""Item files and indices: what is written opens again, what was done is kept, what is wrong is named."""

import json

import numpy as np
import pytest
from PIL import Image

from jfe_jax.embedding.embed import embed
from jfe_jax.embedding.index import Index
from jfe_jax.embedding.items_jsonl import ItemsFile, read_items
from jfe_jax.embedding.string_table import StringTableBuilder
from jfe_jax.errors import UserError
from jfe_jax.search.exact import search
from tests.support.tiny_retriever import picture, tiny_retriever


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return tiny_retriever(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    Image.fromarray(picture(0)).save(folder / "a.png")
    rows = [{"id": f"t{i}", "text": f"text {i} " + "word " * (i % 5)} for i in range(10)]
    rows.insert(2, {"id": "both", "text": "turn it", "image": "a.png", "instruction": "find it"})
    return ItemsFile(items_file(folder, *rows[:5], "", *rows[5:]))


@pytest.fixture(scope="module")
def expected(retriever, source):
    return retriever.encode(source.items(0, len(source)))


def items_file(folder, *rows):
    file = folder / "items.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def kill_after(retriever, monkeypatch, calls):
    """The retriever dies on the call after so many."""
    encode, left = retriever.encode, [calls]

    def dying(items, **others):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return encode(items, **others)

    monkeypatch.setattr(retriever, "encode", dying)


def counted(retriever, monkeypatch):
    encode, done = retriever.encode, []
    monkeypatch.setattr(retriever, "encode", lambda items, **more: done.append(len(items)) or encode(items, **more))
    return done


def test_an_index_opens_with_its_items_in_order(retriever, source, expected, tmp_path):
    assert [item for _, item in read_items(source.path)] == source.items(0, 11)
    done = embed(retriever, source, tmp_path / "index", shard=4)
    index = Index.open(tmp_path / "index")
    assert list(index.ids) == list(source.ids) and index.ids[2] == "both" and index.embeddings.dtype == np.float32
    np.testing.assert_allclose(index.embeddings, expected, atol=1e-5)
    assert (done.shards, done.kept, index.manifest.step) == (3, 0, 0)
    assert index.manifest.fingerprint == retriever.fingerprint
    index.require_made_by(retriever)
    left = {file.name for file in (tmp_path / "index").iterdir()}
    assert left == {"embeddings.npy", "ids.txt", "manifest.json"}


def test_a_killed_run_goes_on_and_finished_shards_are_verified(retriever, source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(retriever, patch, 2)
        with pytest.raises(KeyboardInterrupt):
            embed(retriever, source, tmp_path, shard=3)
    with pytest.raises(UserError, match="no index, or a broken one"):
        Index.open(tmp_path)
    # A flipped bit in the first of the two finished shards.
    with open(tmp_path / "embeddings.npy.part", "r+b") as stream:
        stream.seek(200)
        byte = stream.read(1)[0]
        stream.seek(200)
        stream.write(bytes([byte ^ 1]))
    done = counted(retriever, monkeypatch)
    assert embed(retriever, source, tmp_path, shard=3).kept == 1
    assert done == [3, 3, 2], "the damaged shard and those that were missing"
    np.testing.assert_allclose(Index.open(tmp_path).embeddings, expected, atol=1e-5)
    # Once finished, nothing is done again.
    done.clear()
    assert embed(retriever, source, tmp_path, shard=3).kept == 4 and not done


def test_cut_texts_of_a_killed_run_are_counted_too(retriever, tmp_path, monkeypatch):
    long = {"text": "word " * 100}
    source = ItemsFile(
        items_file(tmp_path, *({"id": str(n)} | (long if n in (0, 2, 7) else {"text": "x"}) for n in range(8)))
    )
    with monkeypatch.context() as patch:
        kill_after(retriever, patch, 1)
        with pytest.raises(KeyboardInterrupt):
            embed(retriever, source, tmp_path / "out", shard=4)
    manifest = embed(retriever, source, tmp_path / "out", shard=4).index.manifest
    assert manifest.cut_texts == 3 and [shard.cut for shard in manifest.shards] == [2, 1]
    # As written before they were counted.
    told = json.loads((tmp_path / "out/manifest.json").read_text())
    told["shards"] = [shard[:5] for shard in told["shards"]]
    (tmp_path / "out/manifest.json").write_text(json.dumps(told))
    assert Index.open(tmp_path / "out").manifest.cut_texts == 0


def test_killed_between_the_last_row_and_the_manifest(retriever, source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("jfe_jax.embedding.index.Manifest.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            embed(retriever, source, tmp_path, dtype="int8", shard=4)
    done = counted(retriever, monkeypatch)
    assert embed(retriever, source, tmp_path, dtype="int8", shard=4).kept == 3 and not done
    np.testing.assert_allclose(Index.open(tmp_path).rows.take(np.arange(11)), expected, atol=5e-3)


def test_embeddings_of_two_checkpoints_are_never_mixed(retriever, source, tmp_path, monkeypatch):
    other = tiny_retriever(tmp_path, seed=1)
    with monkeypatch.context() as patch:
        kill_after(retriever, patch, 1)
        with pytest.raises(KeyboardInterrupt):
            embed(retriever, source, tmp_path / "index", shard=4)
    with pytest.raises(UserError, match="unfinished embeddings of another checkpoint"):
        embed(other, source, tmp_path / "index", shard=4)
    plan = (tmp_path / "index/plan.json").read_text()
    (tmp_path / "index/plan.json").write_text(plan[:20])
    with pytest.raises(UserError, match=r"plan\.json: damaged .*begin anew with --overwrite"):
        embed(retriever, source, tmp_path / "index", shard=4)
    (tmp_path / "index/plan.json").write_text(plan)
    embed(retriever, source, tmp_path / "index", shard=4)
    with pytest.raises(UserError, match="holds an index of another fingerprint"):
        embed(other, source, tmp_path / "index", shard=4)
    with pytest.raises(UserError, match=r"made by .* step 0 .*, not by .* step 1"):
        Index.open(tmp_path / "index").require_made_by(other)
    embed(other, source, tmp_path / "index", shard=4, overwrite=True)
    Index.open(tmp_path / "index").require_made_by(other)


@pytest.mark.parametrize("dtype, bytes_each", [("float16", 2), ("int8", 1)])
def test_smaller_types_keep_scores_within_what_the_manifest_says(
    retriever, source, expected, tmp_path, dtype, bytes_each
):
    told = embed(retriever, source, tmp_path, dtype=dtype, shard=4).index
    assert told.embeddings.nbytes == bytes_each * expected.size
    off = np.linalg.norm(told.rows.take(np.arange(11)) - expected, axis=1).max()
    assert (
        0 < off < told.manifest.score_error + 1e-5
        and told.manifest.score_error < {"float16": 1e-3, "int8": 0.02}[dtype]
    )
    found = search(expected, told.rows, 11)
    plain = expected @ told.rows.take(np.arange(11)).T
    np.testing.assert_allclose(found.scores, -np.sort(-plain, axis=1), atol=1e-5)
    exact = np.take_along_axis(expected @ expected.T, found.rows, 1)
    assert np.abs(found.scores - exact).max() <= told.manifest.score_error + 1e-5


def test_a_damaged_index_is_refused(retriever, source, tmp_path):
    embed(retriever, source, tmp_path, shard=4)
    whole = (tmp_path / "embeddings.npy").read_bytes()
    (tmp_path / "embeddings.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="1 of 3 shards are damaged, the first is rows 8 to 10"):
        embed(retriever, source, tmp_path, shard=4)
    (tmp_path / "embeddings.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="no index, or a broken one"):
        Index.open(tmp_path)
    (tmp_path / "embeddings.npy").write_bytes(whole)
    (tmp_path / "ids.txt").write_text("a\n" * 11)
    with pytest.raises(UserError, match=r"ids\.txt is not the one"):
        Index.open(tmp_path)


def test_a_diverged_model_writes_nothing_more(retriever, source, tmp_path, monkeypatch):
    encode = retriever.encode
    monkeypatch.setattr(retriever, "encode", lambda items, **more: encode(items, **more) * np.float32(np.nan))
    with pytest.raises(UserError, match="embedding of t0 is not finite"):
        embed(retriever, source, tmp_path)
    assert not list((tmp_path / "shards").iterdir())


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
        ('{"id": "b\\ud800", "text": "x"}', "'id' holds half a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, problem):
    file = items_file(tmp_path, {"id": "a", "text": "fine"}, "", row)
    for read in (ItemsFile, lambda file: list(read_items(file))):
        with pytest.raises(UserError, match=rf"items\.jsonl:3: {problem}"):
            read(file)


def test_names_with_one_hash_are_compared(monkeypatch):
    monkeypatch.setattr("jfe_jax.embedding.string_table.hash", lambda name: 7, raising=False)
    read = StringTableBuilder()
    for name in ("a", "ü", "", "b", "ü", "a"):
        read.add(name)
    names = read.finish()
    assert list(names) == ["a", "ü", "", "b", "ü", "a"] and names[1:3] == ["ü", ""] and names[-1] == "a"
    assert read.first_duplicate(names) == (4, 1)


def test_no_file_and_no_items(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_items(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"items\.jsonl: no items"):
        ItemsFile(items_file(tmp_path, ""))
    (tmp_path / "items.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"items\.jsonl:1: not UTF-8"):
        ItemsFile(tmp_path / "items.jsonl")


@pytest.mark.parametrize("name", ["embeddings.npy", "ids.txt", "scales.npy", "manifest.json", "plan.json"])
def test_files_of_other_programs_are_not_overwritten(retriever, source, tmp_path, name):
    (tmp_path / name).write_bytes(b"somebody else's")
    with pytest.raises(UserError, match=str(tmp_path)):
        embed(retriever, source, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {name: b"somebody else's"}
    embed(retriever, source, tmp_path, overwrite=True)
    assert len(Index.open(tmp_path).ids) == len(source)


def test_folders_of_other_programs_stay(retriever, source, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000.tar").write_bytes(b"data")
    for overwrite in (False, True):
        embed(retriever, source, tmp_path, overwrite=overwrite)
    assert [file.name for file in (tmp_path / "shards").iterdir()] == ["00000.tar"]
