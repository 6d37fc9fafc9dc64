"""Tests pairs in published formats, prepared and read back by the loader's own reader."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jfe_jax.cli.main import main
from jfe_jax.data.storage.prepared_dataset import CANDIDATES, IMAGES, QUERIES, VERSION, PreparedDataset, parse_query


def picture(number: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 2 * number, 3 * number)).save(out, kind)
    return out.getvalue()


def prepare(source, out, kind, *more):
    return main(
        ["data", "prepare", str(source), "--out", str(out), "--format", kind, "--name", "mine", *map(str, more)]
    )


def read_back(out, number=100):
    """Unit → (query's text and image, positives, negatives), each of these (text, image)."""
    prepared, found = PreparedDataset(out), {}

    def content(text, image_id, parts):
        return text or None, prepared.image(image_id, parts) if image_id else None

    def candidate(number):
        record = prepared.candidate(number)
        return content(record.text, record.image_id, (f"dataset{number // 10**7}",))

    for unit in prepared.units("train"):
        parts = (unit, *prepared.metadata(unit)["pools"])
        assert parts[1:] == (f"dataset{number}",)
        records = prepared.queries(unit, "train")
        for query in (parse_query(records[index]) for index in range(len(records))):
            found.setdefault(unit, []).append(
                (
                    content(query.text, query.image_id, parts),
                    [candidate(one) for one in query.positives],
                    [candidate(one) for one in query.negatives],
                )
            )
    return found


CAPTIONED = {
    "mine_task0": [
        (("A dog.", None), [(None, picture(1))], []),
        (("A brown dog.", None), [(None, picture(1))], []),
        (("A cat!", None), [(None, picture(2))], []),
    ],
    "mine_task3": [
        ((None, picture(1)), [("A dog.", None), ("A brown dog.", None)], []),
        ((None, picture(2)), [("A cat!", None)], []),
    ],
}


def test_captions_in_json_lines_next_to_images_are_imported(tmp_path):
    (tmp_path / "in/pictures").mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / f"in/pictures/{number}.png").write_bytes(picture(number))
    rows = [
        {"image": "pictures/1.png", "caption": ["a dog", "a brown dog"]},
        {"image": "pictures/2.png", "text": "a cat!"},
    ]
    (tmp_path / "in/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(tmp_path / "in", tmp_path / "out", "captions") == 0
    assert read_back(tmp_path / "out") == CAPTIONED
    # The candidate's image and the query's are stored once.
    assert {one.name for one in (tmp_path / "out" / IMAGES).iterdir()} == {"dataset100"}


def test_webdataset_shards_are_imported(tmp_path):
    (tmp_path / "in").mkdir()
    samples = [
        [("a/1.png", picture(1)), ("a/1.json", json.dumps({"caption": ["a dog", "a brown dog"]}).encode())],
        [("a/2.txt", b"a cat!"), ("a/2.png", picture(2)), ("a/3.png", picture(3))],
    ]
    for number, members in enumerate(samples):
        with tarfile.open(tmp_path / f"in/{number:05d}.tar", "w") as shard:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    assert prepare(tmp_path / "in", tmp_path / "out", "webdataset") == 0
    assert read_back(tmp_path / "out") == CAPTIONED


class Captioned(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS data set as a third party would build it."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, texts in ((1, ["a dog", "a brown dog"]), (2, ["a cat!"])):
            captions = [{"text": text, "id": index} for index, text in enumerate(texts)]
            yield number, {"image": io.BytesIO(picture(number)), "captions": captions}


def test_a_tfds_data_set_of_captions_is_imported(tmp_path):
    Captioned(data_dir=tmp_path / "in", file_format="array_record").download_and_prepare(download_dir=tmp_path / "down")
    assert prepare(tmp_path / "in", tmp_path / "out", "tfds") == 0
    assert read_back(tmp_path / "out") == CAPTIONED


def test_a_tfds_data_set_is_found_by_name(tmp_path, capsys):
    made = Captioned(data_dir=tmp_path / "in", file_format="array_record")
    made.download_and_prepare(download_dir=tmp_path / "down")
    for number, name in enumerate((made.name, f"{made.name}:1.0.0")):
        out = tmp_path / f"out{number}"
        assert prepare(name, out, "tfds", "--images", tmp_path / "in") == 0
        assert read_back(out) == CAPTIONED
    for name in (f"{made.name}:2.0.0", f"{made.name}/other", "unheard_of", "no such/name"):
        assert prepare(name, tmp_path / "none", "tfds", "--images", tmp_path / "in") == 1
        assert f"{name}: neither a directory nor a TFDS data set" in capsys.readouterr().err


TRIPLET = {"mine_task1": [(("A man eats.", None), [("He has food.", None)], [("Nobody eats.", None)])]}


@pytest.mark.parametrize(
    "names",
    [("anchor", "positive", "negative"), ("sent0", "sent1", "hard_neg"), ("premise", "entailment", "contradiction")],
)
def test_nli_triplets_are_imported_from_csv(tmp_path, names):
    with open(tmp_path / "nli.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([names, ("a man eats", "he has food", "nobody eats")])
    assert prepare(tmp_path / "nli.csv", tmp_path / "out", "triplets") == 0
    assert read_back(tmp_path / "out") == TRIPLET


def test_triplets_as_json_lines_have_any_number_of_each(tmp_path):
    row = {"query": "a man eats", "pos": ["he has food", "he eats"], "neg": ["nobody eats", "a dog"]}
    (tmp_path / "nli.jsonl").write_text(json.dumps(row))
    assert prepare(tmp_path / "nli.jsonl", tmp_path / "out", "triplets") == 0
    ((_, positives, negatives),) = read_back(tmp_path / "out")["mine_task1"]
    assert [text for text, _ in positives] == ["He has food.", "He eats."]
    assert [text for text, _ in negatives] == ["Nobody eats.", "A dog."]


def mmeb_row(**fields):
    return dict.fromkeys(("qry_image_path", "pos_image_path", "neg_image_path"), "") | {"neg_text": ""} | fields


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_mmeb_rows_are_imported(tmp_path, form):
    (tmp_path / "rows").mkdir()
    (tmp_path / "pictures").mkdir()
    for number in (1, 2):
        (tmp_path / f"pictures/{number}.png").write_bytes(picture(number))
    rows = [
        mmeb_row(qry="<|image_1|>\nWhat is it?", qry_image_path="1.png", pos_text="a dog", neg_text="a cat"),
        mmeb_row(qry="Find a cat", pos_text="<|image_1|>\n", pos_image_path="2.png"),
    ]
    if form == "jsonl":
        (tmp_path / "rows/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "rows/train.parquet"
        )
    assert prepare(tmp_path / "rows", tmp_path / "out", "mmeb", "--images", tmp_path / "pictures", "--number", 42) == 0
    assert read_back(tmp_path / "out", 42) == {
        "mine_task6": [(("What is it?", picture(1)), [("A dog.", None)], [("A cat.", None)])],
        "mine_task0": [(("Find a cat.", None), [(None, picture(2))], [])],
    }


def test_an_imported_source_is_reused_and_a_changed_one_is_read_again(tmp_path, capsys):
    source = tmp_path / "nli.jsonl"
    source.write_text(json.dumps({"query": "a", "pos": ["b"], "neg": ["c"]}))
    assert prepare(source, tmp_path / "out", "triplets") == 0
    capsys.readouterr()
    assert prepare(source, tmp_path / "out", "triplets") == 0
    assert [line.split(": ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["kept"] * 2
    source.write_text(json.dumps({"query": "a", "pos": ["bb"], "neg": ["c"]}))
    assert prepare(source, tmp_path / "out", "triplets") == 0
    assert [line.split(": ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["written"] * 2
    assert {one.name for one in (tmp_path / "out").iterdir()} == {"sources", QUERIES, CANDIDATES}
    assert (tmp_path / "out" / QUERIES / "mine_task1" / VERSION).is_dir()


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("triplets", '{"a": 1}', r"s.jsonl:1: the columns a; expected anchor"),
        ("triplets", '{"anchor": "", "positive": "b"}', r"s.jsonl:1: a pair needs a query and a positive"),
        ("triplets", "{", r"s.jsonl:1: not JSON"),
        ("triplets", "", "it contains no pairs"),
        ("captions", '{"image": "a.png"}', r"s.jsonl:1: a row is {"),
        ("captions", '{"image": "a.png", "text": "b"}', r"a.png: cannot read the image"),
        ("captions", '{"image": "/etc/passwd", "text": "b"}', "leaves the directory"),
        ("mmeb", '{"text": "b"}', r"s.jsonl:1: no qry in the row"),
        ("webdataset", "no tar", "cannot be read as a tar archive"),
        ("tfds", "", "no TFDS data set there"),
    ],
)
def test_malformed_sources_give_one_line_errors(tmp_path, capsys, kind, text, says):
    (tmp_path / "s.jsonl").write_text(text)
    assert prepare(tmp_path / "s.jsonl", tmp_path / "out", kind) == 1
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1] and err[-1].startswith("jfe data: ")


def test_names_and_numbers_are_checked(tmp_path, capsys):
    source = tmp_path / "nli.jsonl"
    source.write_text(json.dumps({"query": "a", "pos": ["b"], "neg": ["c"]}))
    words = ["data", "prepare", str(source), "--out", str(tmp_path / "out"), "--format", "triplets"]
    assert main(words) == 1
    assert "needs --name" in capsys.readouterr().err
    assert main([*words, "--name", "No_Good"]) == 1
    assert "lower-case letters" in capsys.readouterr().err
    assert main([*words, "--name", "one"]) == 0
    assert main([*words, "--name", "two"]) == 1
    assert "--number 100 is one's" in capsys.readouterr().err
    assert main([*words, "--name", "two", "--number", "999"]) == 1
    assert "from 0 to 213" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "gone"), *words[3:], "--name", "two"]) == 1
    assert "no such file" in capsys.readouterr().err


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards_of_one_file_name_in_different_folders_keep_their_own_images(tmp_path):
    for folder, number in (("a", 1), ("b", 2), ("b/c", 3)):
        members = [("000.png", picture(number)), ("000.txt", f"number {number}".encode())]
        write_tar(tmp_path / "in" / folder / "00000.tar", members)
    assert prepare(tmp_path / "in", tmp_path / "out", "webdataset") == 0
    found = {text: positives[0][1] for (text, _), positives, _ in read_back(tmp_path / "out")["mine_task0"]}
    assert found == {f"Number {number}.": picture(number) for number in (1, 2, 3)}


def test_a_member_that_is_there_twice_is_refused(tmp_path, capsys):
    members = [("0.png", picture(1)), ("0.txt", b"one"), ("1.png", picture(2)), ("1.txt", b"two")]
    write_tar(tmp_path / "in" / "x.tar", [*members, ("0.png", picture(3)), ("0.txt", b"three")])
    assert prepare(tmp_path / "in", tmp_path / "out", "webdataset") == 1
    assert "x.tar: 0.png is there twice" in capsys.readouterr().err
