"""Tests that images in archives and prepared directories equal the files they were made from."""

import gzip
import shutil
import tarfile

import numpy as np
import pytest

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.ids import image_id
from jfe_jax.data.image_transforms import to_pixels
from jfe_jax.data.item import Item
from jfe_jax.data.prepare.prepare import prepare_dataset
from jfe_jax.data.storage.image_store import DirectoryImages, TarImages, open_images, resolve_image
from jfe_jax.data.storage.tar_archive import TarArchive
from jfe_jax.errors import UserError
from tests.support.mbeir_directory import archive_images, make_mbeir
from tests.support.tiny_retriever import quiet

FORMS = ("tar", "tar in parts", "gzip", "gzip in parts", "prepared")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_mbeir(tmp_path_factory.mktemp("mbeir"), queries_per_task=2)


def made(source, path, form):
    """Copies the directory with its images in another form; returns it and the location to open them from."""
    data = shutil.copytree(source, path / "data")
    if form == "prepared":
        list(prepare_dataset(Mbeir(data), path / "prepared", splits=["test"], progress=quiet))
        shutil.rmtree(data / "mbeir_images")
        return data, path / "prepared"
    archive_images(data, 3 if "parts" in form else 0)
    if form.startswith("tar"):
        files = sorted(data.glob("mbeir_images.tar.gz*"))
        content = gzip.decompress(b"".join(file.read_bytes() for file in files))
        for file in files:
            file.unlink()
        size = -(-len(content) // (3 if "parts" in form else 1))
        for part in range(3 if "parts" in form else 1):
            name = f"mbeir_images.tar.part-{part:02d}" if "parts" in form else "mbeir_images.tar"
            (data / name).write_bytes(content[part * size : (part + 1) * size])
    return data, path / "images"


def names(source):
    return sorted(file.relative_to(source) for file in (source / "mbeir_images").rglob("*.*"))


def ids(source, data):
    return np.array([image_id(data / name, data) for name in names(source)])


@pytest.mark.parametrize("form", FORMS)
def test_every_image_store_returns_the_bytes_of_the_files(source, tmp_path, form):
    data, place = made(source, tmp_path, form)
    images = open_images(data, place, lambda: ids(source, data), quiet)
    for name in np.random.default_rng(0).permutation(names(source)):
        found = images.find(data / name)
        assert found.read_bytes() == (source / name).read_bytes() and str(data / name) in str(found)
        pixels = to_pixels(images.get(data / name), 16)
        np.testing.assert_array_equal(pixels, to_pixels(source / name, 16))
    assert images.find(data / "mbeir_images/none.png") is None
    with pytest.raises(UserError, match=r"none\.png: no such image in"):
        resolve_image(Item(image=data / "mbeir_images/none.png"), images)
    assert resolve_image(Item(text="x"), images) == Item(text="x")
    assert isinstance(open_images(source, place / "none", list), DirectoryImages)


def test_only_needed_images_are_extracted_and_a_killed_pass_resumes(source, tmp_path, monkeypatch):
    data, place = made(source, tmp_path, "gzip in parts")
    every = ids(source, data)
    passes = []
    files = TarArchive.files

    def dying(self):
        passes.append(0)
        for name, read in files(self):
            if len(passes) == 1 and passes[0] == 5:
                raise KeyboardInterrupt
            passes[-1] += 1
            yield name, read

    monkeypatch.setattr(TarArchive, "files", dying)
    wanted = every[::2]
    with pytest.raises(KeyboardInterrupt):
        open_images(data, place, lambda: wanted, quiet)
    # Killed while it wrote.
    content = (place / "images.tar").read_bytes()
    (place / "images.tar").write_bytes(content[: max(0, len(content) - 1024 - 700)])
    assert open_images(data, place, lambda: wanted, quiet).ids.tolist() == sorted(wanted)
    with tarfile.open(place / "images.tar") as copies:
        assert len(copies.getnames()) == len(wanted), "an archive as any other; each image once"
    assert open_images(data, place, lambda: wanted, quiet).ids.tolist() == sorted(wanted)
    assert len(passes) == 2, "what is there is not looked for again"
    more = np.append(every, 4711)
    assert open_images(data, place, lambda: more, quiet).ids.tolist() == sorted(every)
    assert open_images(data, place, lambda: more, quiet).ids.tolist() == sorted(every)
    assert len(passes) == 3, "nor what the archive does not have"
    (data / "mbeir_images.tar.gz.part-02").write_bytes(b"")
    with pytest.raises(UserError, match="holds images of another archive"):
        open_images(data, place, lambda: more, quiet)
    with pytest.raises(UserError, match="ends too soon"):
        open_images(data, tmp_path / "other", lambda: more, quiet)


def test_truncated_archives_are_refused(source, tmp_path):
    data, _ = made(source, tmp_path, "tar in parts")
    parts = sorted(data.glob("*.part-*"))
    whole = TarImages(data, parts)
    with pytest.raises(UserError, match="is a part missing or cut short"):
        TarImages(data, parts[:2])
    last = parts[-1].read_bytes()
    first = int(whole._starts.max()) - 512 - sum(part.stat().st_size for part in parts[:2])
    for cut in (first + 100, first + 512, first + 520):
        parts[-1].write_bytes(last[:cut])
        with pytest.raises(UserError, match="is a part missing or cut short"):
            TarImages(data, parts)
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        TarImages(data, [data / "tokenizer/tokenizer.json"])


def test_images_of_two_sizes_are_not_one_form(source, tmp_path):
    data = shutil.copytree(source, tmp_path / "data")
    for units, side in (["shapes_task4"], 16), (["shapes_task4", "facts_task6"], 24):
        list(
            prepare_dataset(
                Mbeir(data), tmp_path / f"{side}", splits=["test"], units=units, short_side=side, progress=quiet
            )
        )
    assert open_images(data, tmp_path / "16", list).form == "short side 16 at most"
    shutil.copytree(tmp_path / "16/mbeir_images/dataset0", tmp_path / "24/mbeir_images/dataset9")
    with pytest.raises(UserError, match="prepared with several --short-side"):
        open_images(data, tmp_path / "24", list)
