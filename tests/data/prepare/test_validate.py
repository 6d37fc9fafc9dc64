import json
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jfe_jax.data.prepare import validate_images, validation_report
from jfe_jax.data.prepare.validate import validate_mbeir
from jfe_jax.errors import UserError
from tests.support.mbeir_directory import SPLITS, UNITS, archive_images, edit_line, edit_row, make_mbeir

QUERIES = "query/val/mbeir_shapes_task7_val.jsonl"
POOL = "cand_pool/local/mbeir_shapes_task7_cand_pool.jsonl"
QRELS = "qrels/val/mbeir_shapes_task7_val_qrels.txt"
TABLE = "instructions/query_instructions.tsv"


@pytest.fixture
def own(tmp_path):
    """A copy of the directory that a test may modify."""
    return make_mbeir(tmp_path, queries_per_task=4)


def copy_of(line: int):
    def plant(file):
        text = file.read_text().splitlines()[line - 1]
        return edit_line(file, line + 1, lambda _: text)

    return plant


def remove_image(file):
    row = json.loads(file.read_text().splitlines()[1])
    (file.parents[2] / (row.get("query_img_path") or row["img_path"])).unlink()
    return file, 2


ERRORS = [
    (QUERIES, lambda file: edit_line(file, 3, lambda text: text[:-3]), "malformed"),
    (POOL, lambda file: edit_line(file, 3, lambda text: "7"), "malformed"),
    (QUERIES, lambda file: edit_row(file, 3, query_txt="\udc00"), "malformed"),
    (QUERIES, copy_of(2), "duplicate_id"),
    (POOL, copy_of(2), "duplicate_id"),
    (QUERIES, lambda file: edit_row(file, 2, query_modality="video"), "unknown_modality"),
    (POOL, lambda file: edit_row(file, 2, modality=None), "unknown_modality"),
    (QUERIES, lambda file: edit_row(file, 2, query_txt=None), "modality_contradicts"),
    (POOL, lambda file: edit_row(file, 2, img_path="a/../../b.png"), "leaves_directory"),
    (QUERIES, remove_image, "missing_image"),
    (POOL, remove_image, "missing_image"),
    (QRELS, lambda file: edit_line(file, 2, lambda text: "0:1 0"), "malformed"),
    (TABLE, lambda file: edit_line(file, 1, lambda text: "a\tb"), "malformed"),
    (TABLE, lambda file: edit_line(file, 2, lambda text: f"sound{text}"), "malformed"),
]
WARNINGS = [
    (QUERIES, lambda file: edit_row(file, 3, pos_cand_list=["0:999"]), "dangling_candidate"),
    (QUERIES, lambda file: edit_row(file, 3, neg_cand_list=[{"did": "0:999"}]), "dangling_candidate"),
    (QRELS, lambda file: edit_line(file, 3, lambda text: text.rsplit(" ", 3)[0] + " 0:999 1 7"), "dangling_candidate"),
    (QRELS, lambda file: edit_line(file, 3, lambda text: f"9{text}"), "unknown_query"),
    (QUERIES, lambda file: edit_row(file, 3, pos_cand_list=[]), "no_positive"),
]


def test_a_good_directory_has_no_defects_and_every_row_is_counted(own):
    report = validate_mbeir(own, images="all")
    assert report.defects == []
    for split in SPLITS:
        for task, dataset in UNITS.items():
            found = [n for key, n in report.counts.items() if key[:4] == ("query", split, dataset, task)]
            assert found == [4]
    assert sum(n for key, n in report.counts.items() if key[:2] == ("candidate", "local")) == 8 * 40
    assert sum(n for key, n in report.counts.items() if key[:2] == ("candidate", "global")) == 3 * 160


@pytest.mark.parametrize(("name", "plant", "kind"), ERRORS)
def test_an_error_is_found_where_it_is(own, name, plant, kind):
    file, line = plant(own / name)
    report = validate_mbeir(own)
    found = [(defect.file, defect.line) for defect in report.defects if defect.kind == kind]
    assert (str(file), line) in found
    assert report.errors > 0
    json.dumps(report.as_dict())
    assert f"error: {file}:{line}: " in report.as_text()


@pytest.mark.parametrize(("name", "plant", "kind"), WARNINGS)
def test_a_warning_is_counted_and_no_error(own, name, plant, kind):
    file, line = plant(own / name)
    report = validate_mbeir(own)
    assert [(defect.file, defect.line, defect.kind) for defect in report.defects] == [(str(file), line, kind)]
    assert report.errors == 0
    if kind == "dangling_candidate":
        assert sum(report.dangling.values()) == 1


def test_missing_instructions_are_counted(own):
    table = own / TABLE
    table.write_text("\n".join(line for line in table.read_text().splitlines() if "image,text\timage\t" not in line))
    report = validate_mbeir(own)
    assert {(defect.kind, defect.line) for defect in report.defects} == {("missing_instructions", 1)}
    assert len(report.defects) == len(SPLITS) and report.errors == 0


def test_a_broken_image_is_only_found_when_images_are_opened(own):
    row = json.loads((own / POOL).read_text().splitlines()[4])
    image = own / row["img_path"]
    image.write_bytes(image.read_bytes()[:100])
    assert validate_mbeir(own).errors == 0
    report = validate_mbeir(own, images="all")
    (defect,) = report.defects
    assert defect.kind == "unreadable_image" and str(image) in defect.message


def test_a_sample_opens_some_of_each_file_and_every_image_is_looked_for(own, monkeypatch):
    monkeypatch.setattr(validate_images, "SAMPLE_SIZE", 3)
    report = validate_mbeir(own, images="sample")
    files = [file for file in own.rglob("*.jsonl") if '"mbeir_images' in file.read_text()]
    # An image is in the sample of the file that names it first.
    assert (
        report.images_opened <= 3 * len(files)
        and report.images_opened < validate_mbeir(own, images="all").images_opened
    )
    assert report.images_opened == validate_mbeir(own, images="sample").images_opened and report.errors == 0


def test_a_decompression_bomb_is_a_huge_image(own, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    report = validate_mbeir(own, images="all")
    assert {defect.kind for defect in report.defects} == {"huge_image"}
    assert report.errors == report.images_opened > 0


@pytest.mark.parametrize("parts", [0, 3])
def test_images_in_archives_are_found_and_opened_where_they_are(own, parts):
    names = [json.loads(line)["img_path"] for line in (own / POOL).read_text().splitlines()[:2]]
    (own / names[0]).unlink()
    (own / names[1]).write_bytes(b"no image")
    archive_images(own, parts)
    report = validate_mbeir(own)
    assert report.errors == 0 and "not looked for" in report.as_text()
    report = validate_mbeir(own, images="all")
    found = {(defect.kind, defect.message.split(" in ")[0]) for defect in report.defects}
    assert found == {
        ("missing_image", "the image that this row names is not"),
        ("unreadable_image", names[1]),
    }
    assert all(defect.line for defect in report.defects)


def test_an_archive_without_its_last_part_is_named(own):
    archive_images(own, 3)
    (own / "mbeir_images.tar.gz.part-02").unlink()
    report = validate_mbeir(own, images="all")
    broken = next(defect for defect in report.defects if defect.kind == "unreadable_image")
    assert "part-01" in broken.file and "ends too soon; is a part missing" in broken.message
    (own / "mbeir_images.tar.gz.part-02").write_bytes(b"")
    (own / "mbeir_images.tar.gz.part-01").unlink()
    with pytest.raises(UserError, match=r"part 01 of mbeir_images\.tar\.gz is missing"):
        validate_mbeir(own)


def test_many_defects_are_counted_and_the_first_listed(own, monkeypatch):
    monkeypatch.setattr(validation_report, "MAX_LISTED_DEFECTS", 5)
    shutil.rmtree(own / "mbeir_images")
    report = validate_mbeir(own)
    pool = [defect for defect in report.defects if defect.file == str(own / POOL)]
    assert len(pool) == 5 and report.totals["error", "missing_image", str(own / POOL)] == 40
    assert f"error: {own / POOL}: 35 more of missing_image" in report.as_text()
    assert report.errors == sum(one["count"] for one in report.as_dict()["totals"])


def test_a_directory_without_queries_is_refused(tmp_path):
    with pytest.raises(UserError, match="no M-BEIR directory"):
        validate_mbeir(tmp_path)


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mangled_files_never_break_the_check(fuzzed, rng: random.Random):
    """Bytes are changed, lines are cut and swapped in any file: the check ends with a report."""
    names = [QUERIES, POOL, QRELS, TABLE]
    whole = {name: (fuzzed / name).read_bytes() for name in names}
    name = rng.choice(names)
    content = bytearray(whole[name])
    for _ in range(rng.randint(1, 8)):
        at, end = sorted(rng.randrange(len(content)) for _ in range(2))
        match rng.randrange(4):
            case 0:
                content[at] = rng.randrange(256)
            case 1:
                del content[at : min(end, at + 40)]
            case 2:
                content[at:at] = rng.choice([b"\n", b'"', b"{", b"\x00", b"\xff\xfe", b"null", b"9" * 5000, b"\t"])
            case 3:
                content[at:at] = content[at:end]
        content = content or bytearray(b"\n")
    (fuzzed / name).write_bytes(bytes(content))
    try:
        report = validate_mbeir(fuzzed)
        json.dumps(report.as_dict()).encode()
        report.as_text().encode()
    finally:
        (fuzzed / name).write_bytes(whole[name])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return make_mbeir(tmp_path_factory.mktemp("fuzzed"), queries_per_task=4)
