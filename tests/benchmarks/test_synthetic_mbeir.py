"""The directory that the data benchmarks read is what it says it is."""

import pytest

from benchmarks.data import synthetic_mbeir
from jfe_jax.data.prepare.validate import validate_mbeir
from jfe_jax.data.storage.tar_archive import find_archives


@pytest.mark.parametrize("images", ["files", "tar", "parts"])
def test_it_is_a_good_mbeir_directory_in_every_form(tmp_path, images):
    rows = synthetic_mbeir.write(tmp_path, 600, images=images, distinct=5)
    report = validate_mbeir(tmp_path, images="all")
    assert report.defects == [] and report.counts.total() == rows == pytest.approx(600, rel=0.02)
    assert report.images_opened == len({*named(tmp_path)})
    assert (tmp_path / "mbeir_images").is_dir() == (images == "files")
    assert len(list(tmp_path.glob("mbeir_images.tar.gz*"))) == {"files": 0, "tar": 1, "parts": 4}[images]


def test_small_images_are_all_different(tmp_path):
    synthetic_mbeir.write(tmp_path, 600, images="parts", small=True)
    report = validate_mbeir(tmp_path, images="all")
    assert report.defects == [] and report.images_opened == len({*named(tmp_path)}) == len(named(tmp_path))
    contents = [read() for _, read in find_archives(tmp_path)[0].files()]
    assert len({*contents}) == len(contents) == report.images_opened


def named(path):
    lines = (line for file in path.rglob("*.jsonl") for line in file.read_bytes().splitlines())
    return [line.split(b'img_path":"')[1].split(b'"')[0] for line in lines if b'img_path":"' in line]


def test_its_units_come_in_the_published_proportions(tmp_path):
    synthetic_mbeir.write(tmp_path, 20_000, images="none")
    counts = validate_mbeir(tmp_path).counts
    found = {(rows, dataset, task): n for (rows, _, dataset, task, _), n in counts.items()}
    total = sum(1000 * (unit.queries + unit.candidates) for unit in synthetic_mbeir.UNITS)
    for unit in synthetic_mbeir.UNITS:
        for rows, thousands in (("query", unit.queries), ("candidate", unit.candidates)):
            wanted = 20_000 * 1000 * thousands / total
            assert found[rows, unit.dataset, unit.task] == pytest.approx(wanted, abs=1)
