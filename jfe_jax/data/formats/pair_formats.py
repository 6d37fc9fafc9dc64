"""Reads pairs in published formats: MMEB, captioned images, NLI triplets.

| format | rows | images |
|---|---|---|
| mmeb | `qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path`, JSON lines or Parquet | files |
| captions | JSON lines of `image` and `caption` (one or a list; also `text`) | files next to them |
| webdataset | tar shards of `KEY.jpg` next to `KEY.txt` or `KEY.json` with `caption` | in the shards |
| tfds | a TFDS data set in ArrayRecord with an image and a text feature | in the data set |
| triplets | CSV or JSON lines of anchor, positive, negative under any of the usual names | none |
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jfe_jax.data.formats.mbeir_records import read_rows
from jfe_jax.data.formats.mbeir_writer import PairItem, TrainingPair, make_bidirectional_pairs
from jfe_jax.data.storage.image_source import FileImageSource, ImageSource, TarImageSource, member_prefix
from jfe_jax.data.storage.tar_archive import TarArchive
from jfe_jax.errors import UserError

# sentence-transformers, SimCSE's NLI file, premise and hypotheses, FlagEmbedding.
_TRIPLETS = (
    ("anchor", "positive", "negative"),
    ("sent0", "sent1", "hard_neg"),
    ("premise", "entailment", "contradiction"),
    ("query", "pos", "neg"),
)
_CAPTION_KEYS = ("caption", "captions", "text", "alt_text", "description", "title")
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# The image placeholder in MMEB's texts.
_IMAGE_MARK = re.compile(r"<\|image_\d+\|>\s*")


def read_mmeb(source: Path, images: Path | None) -> tuple[Iterable[TrainingPair], ImageSource]:
    """Reads rows in the format of MMEB-train. Image paths are relative to `images`, by default the rows' directory."""
    return _mmeb_pairs(source), FileImageSource(images or _containing_folder(source))


def read_captions(source: Path, images: Path | None) -> tuple[Iterable[TrainingPair], ImageSource]:
    """Reads rows of an image path and its captions."""
    return _caption_pairs(source), FileImageSource(images or _containing_folder(source))


def read_triplets(source: Path, images: Path | None) -> tuple[Iterable[TrainingPair], ImageSource]:
    """Reads texts with a positive and a hard negative."""
    return _triplet_pairs(source), FileImageSource(_containing_folder(source))


def read_webdataset(source: Path, images: Path | None) -> tuple[Iterable[TrainingPair], ImageSource]:
    """Reads tar shards of samples."""
    archives = [TarArchive([file]) for file in _find_files(source, "*.tar", "*.tar.gz")]
    root = _containing_folder(source)
    return _webdataset_pairs(archives, root), TarImageSource(archives, root)


def read_tfds_captions(source: Path, images: Path | None) -> tuple[Iterable[TrainingPair], ImageSource]:
    """Reads a TFDS directory: its train split, or all splits if it has none."""
    reader = _TfdsImageSource(source)
    return reader.pairs(), reader


def find_tfds_directory(name: str, data_dir: Path | None) -> Path:
    """Finds the directory of the data set of that name, in TFDS's own data_dir by default; its newest version.

    Args:
      name: NAME[/CONFIG][:VERSION].

    Raises:
      UserError: it is not found.
    """
    full_name, _, version = name.partition(":")
    dataset, _, config = full_name.partition("/")
    try:
        found = tfds.core.read_only_builder.builder_from_files(
            dataset, config=config or None, version=version or None, data_dir=data_dir
        )
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        search_directory = data_dir or "TFDS's own data_dir (give another with --images)"
        raise UserError(
            f"{name}: neither a directory nor a TFDS data set that is prepared in {search_directory}"
        ) from error
    return Path(found.data_dir)


FORMATS: dict[str, Callable[[Path, Path | None], tuple[Iterable[TrainingPair], ImageSource]]] = {
    "mmeb": read_mmeb,
    "captions": read_captions,
    "webdataset": read_webdataset,
    "tfds": read_tfds_captions,
    "triplets": read_triplets,
}


def _mmeb_pairs(source: Path) -> Iterator[TrainingPair]:
    for location, row in _iter_rows(source, "*.jsonl", "*.parquet"):
        missing = [key for key in ("qry", "pos_text") if key not in row]
        if missing:
            raise UserError(f"{location}: no {missing[0]} in the row; MMEB's training rows have qry, pos_text, …")
        query, positive, negative = (
            PairItem(_IMAGE_MARK.sub("", row.get(text) or "").strip() or None, row.get(image) or None)
            for text, image in (
                ("qry", "qry_image_path"),
                ("pos_text", "pos_image_path"),
                ("neg_text", "neg_image_path"),
            )
        )
        yield TrainingPair(location, query, [positive], [negative] if negative.modality else [])


def _caption_pairs(source: Path) -> Iterator[TrainingPair]:
    for location, row in _iter_rows(source, "*.jsonl"):
        found = _find_captions(row)
        if not isinstance(row.get("image"), str) or not found:
            raise UserError(f'{location}: a row is {{"image": path, "caption": text or list of texts}}')
        yield from make_bidirectional_pairs(location, row["image"], found)


def _triplet_pairs(source: Path) -> Iterator[TrainingPair]:
    for location, row in _iter_rows(source, "*.jsonl", "*.csv", "*.tsv"):
        names = next((names for names in _TRIPLETS if names[0] in row and names[1] in row), None)
        if names is None:
            raise UserError(
                f"{location}: the columns {', '.join(row)}; expected {' or '.join(map(', '.join, _TRIPLETS))}"
            )
        anchor, positives, negatives = ([PairItem(text=one) for one in _collect_texts(row.get(name))] for name in names)
        yield TrainingPair(location, anchor[0] if anchor else PairItem(), positives, negatives)


def _webdataset_pairs(archives: list[TarArchive], root: Path) -> Iterator[TrainingPair]:
    for archive in archives:
        prefix, members = member_prefix(archive, root), set()
        key, image, found = "", "", []
        for name, read in archive.files():
            if name in members:
                # Images are known by name: both captions would get the picture that comes first.
                raise UserError(f"{archive}: {name} is there twice; rewrite the shard with a key for each sample")
            members.add(name)
            folder, _, file = name.rpartition("/")
            stem, _, suffix = file.partition(".")
            if (this := f"{folder}/{stem}") != key:
                if image and found:
                    yield from make_bidirectional_pairs(f"{archive}: {key}", image, found)
                key, image, found = this, "", []
            if suffix.lower() in _IMAGE_SUFFIXES:
                image = f"{prefix}{name}"
            elif suffix in ("txt", "caption"):
                found = found or _collect_texts(read())
            elif suffix == "json" and not found:
                try:
                    found = _find_captions(json.loads(read()))
                except ValueError as error:
                    raise UserError(f"{archive}: {name}: not JSON ({error})") from error
        if image and found:
            yield from make_bidirectional_pairs(f"{archive}: {key}", image, found)


class _TfdsImageSource:
    """Presents a TFDS data set as pairs and as a source of images, named "SPLIT/INDEX.img"."""

    sequential_only = False

    def __init__(self, source: Path):
        directories = [source, *sorted(source.glob("*/")), *sorted(source.glob("*/*/"))]
        directory = next((one for one in directories if (one / "dataset_info.json").is_file()), None)
        if directory is None:
            raise UserError(f"{source}: no TFDS data set there (no dataset_info.json)")
        builder = tfds.builder_from_directory(directory)
        features = builder.info.features
        self._directory = directory
        self._image = next((key for key in features if isinstance(features[key], tfds.features.Image)), None)
        self._text = next((key for key in _CAPTION_KEYS if key in features), None)
        if self._image is None or self._text is None:
            raise UserError(f"{directory}: needs an image and a text feature; it has {', '.join(features)}")
        splits = ["train"] if "train" in builder.info.splits else list(builder.info.splits)
        decoders = {self._image: tfds.decode.SkipDecoding()}
        try:
            self._sources = {split: builder.as_data_source(split, decoders=decoders) for split in splits}
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{directory}: {' '.join(str(error).split())}; prepare it with file_format array_record"
            ) from error

    def __str__(self) -> str:
        return str(self._directory)

    def pairs(self) -> Iterator[TrainingPair]:
        for split, source in self._sources.items():
            for index in range(len(source)):
                found = _collect_texts(source[index][self._text])
                if found:
                    yield from make_bidirectional_pairs(
                        f"{self._directory}: {split} {index}", f"{split}/{index}.img", found
                    )

    def iter_images(self, names: Iterable[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name in names:
            split, _, index = name.removesuffix(".img").partition("/")
            yield name, lambda split=split, index=index: bytes(self._sources[split][int(index)][self._image])

    def describe_location(self, name: str) -> str:
        return f"{name} of {self._directory}"


def _iter_rows(source: Path, *patterns: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the location and row of every table in a directory, or of one file."""
    for file in _find_files(source, *patterns):
        if file.suffix == ".parquet":
            rows = _read_parquet(file)
        elif file.suffix in (".csv", ".tsv"):
            rows = _read_csv(file)
        else:
            rows = read_rows(file)
        for location, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{location}: expected an object, got {type(row).__name__}")
            yield location, row


def _read_csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(file, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, dialect="excel-tab" if file.suffix == ".tsv" else "excel")
        try:
            for row in reader:
                yield f"{file}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}:{reader.line_num}: not CSV in UTF-8 ({error})") from error


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except ArrowInvalid as error:
        raise UserError(f"{file}: not Parquet ({' '.join(str(error).split())})") from error


def _find_files(source: Path, *patterns: str) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(file for pattern in patterns for file in source.rglob(pattern))
    if not found:
        raise UserError(f"{source}: no file there that matches {' or '.join(patterns)}")
    return found


def _containing_folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _find_captions(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return []
    return next((found for key in _CAPTION_KEYS if (found := _collect_texts(row.get(key)))), [])


def _collect_texts(value: Any) -> list[str]:
    """Collects every non-blank text in a value of any nesting."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        return next((found for key in ("text", "raw", "caption") if (found := _collect_texts(value.get(key)))), [])
    if hasattr(value, "__iter__"):
        return [text for one in value for text in _collect_texts(one)]
    return []
