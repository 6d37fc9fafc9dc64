"""Reads prepared data: records by index, directly from ArrayRecord.

TFDS's own decoding takes ten times as long as the rest of reading a record, opening a part with it takes 3 ms, and its
import takes longer still. Descriptions and records are therefore parsed here.
"""

import difflib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source

from jfe_jax.data.ids import IDS_PER_DATASET
from jfe_jax.data.storage.tf_example import Example
from jfe_jax.errors import UserError

VERSION = "2.0.0"
CANDIDATES, QUERIES, IMAGES = "mbeir_candidates", "mbeir_queries", "mbeir_images"


class QueryRecord(NamedTuple):
    """A query; candidates are integer ids, modalities are indices into MODALITIES."""

    qid: str
    text: str
    image_id: int
    modality: int
    positives: tuple[int, ...]
    positive_modalities: tuple[int, ...]
    negatives: tuple[int, ...]
    negative_modalities: tuple[int, ...]


class CandidateRecord(NamedTuple):
    """A candidate."""

    did: str
    text: str
    image_id: int


class PreparedDataset:
    """A directory written by `jfe data prepare`. Picklable: each process opens the files it reads.

    Raises:
      UserError: the path is no such directory.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not path or not (self.path / QUERIES).is_dir():
            raise UserError(f"data.path: {path or 'not set'}: no prepared data there; make it with `jfe data prepare`")
        self._parts: dict[str, PartDescription] = {}
        self._pools: dict[int, Any] = {}
        self._images: dict[str, ImageStore] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_parts": {}, "_pools": self._pools, "_images": self._images}

    def units(self, split: str) -> list[str]:
        """Returns the names of the units that have that split."""
        names = sorted(place.parent.name for place in (self.path / QUERIES).glob(f"*/{VERSION}"))
        found = [name for name in names if split in self._part(f"{QUERIES}/{name}").splits]
        if not found:
            splits = sorted({one for name in names for one in self._part(f"{QUERIES}/{name}").splits})
            near = difflib.get_close_matches(split, splits, 1, 0.0)
            raise UserError(f"{self.path}: no unit has a split {split!r}; did you mean {near[0] if near else 'none'}?")
        return found

    def metadata(self, unit: str) -> dict[str, Any]:
        """Returns the metadata that tfds_builder.py stored with the unit's records.

        Raises:
          UserError: the candidates it refers to, or their images, are missing, or differ from those it was made with.
        """
        metadata = self._part(f"{QUERIES}/{unit}").metadata
        self._store(unit)
        for dataset, fingerprint in metadata["pools"].items():
            candidates = self._part(f"{CANDIDATES}/{dataset}").metadata
            if candidates["images"]:
                self._part(f"{IMAGES}/{dataset}")
            # Opened here, so that workers need not search again.
            self._pool(int(dataset.removeprefix("dataset")))
            self._store(dataset)
            if candidates["fingerprint"] != fingerprint:
                raise UserError(
                    f"{self.path / QUERIES / unit}: made with other candidates than {CANDIDATES}/{dataset} holds; "
                    "run `jfe data prepare` again"
                )
        return metadata

    def queries(self, unit: str, split: str) -> "RawRecords":
        """Returns the unit's serialized query records (see `parse_query`)."""
        return RawRecords(self.path / QUERIES / unit / VERSION, split)

    def candidate(self, number: int) -> CandidateRecord:
        """Returns the candidate with that integer id."""
        dataset, row = divmod(number, IDS_PER_DATASET)
        feature = Example.FromString(self._pool(dataset)[row]).features.feature
        return CandidateRecord(
            feature["did"].bytes_list.value[0].decode(),
            feature["text"].bytes_list.value[0].decode(),
            feature["image_id"].int64_list.value[0],
        )

    def image(self, image_id: int, parts: Sequence[str]) -> bytes:
        """Returns the encoded image from the first of the image parts that has it.

        Raises:
          UserError: none of the parts has it.
        """
        for part in parts:
            content = self._store(part).find(image_id)
            if content is not None:
                return content
        raise UserError(f"not among the images of {' and '.join(parts)} in {self.path / IMAGES}")

    def _pool(self, dataset: int) -> "RawRecords":
        pool = self._pools.get(dataset)
        if pool is None:
            place = self.path / CANDIDATES / f"dataset{dataset}" / VERSION
            pool = self._pools[dataset] = RawRecords(place, "pool")
        return pool

    def _store(self, part: str) -> "ImageStore":
        store = self._images.get(part)
        if store is None:
            store = self._images[part] = ImageStore(self.path / IMAGES / part / VERSION)
        return store

    def _part(self, name: str) -> "PartDescription":
        if name not in self._parts:
            self._parts[name] = read_part_description(self.path / name / VERSION)
        return self._parts[name]


class ImageStore:
    """Reads one part of images by id. The index is memory-mapped; a part without images has none."""

    def __init__(self, place: Path):
        self._place = place
        self._records = RawRecords(place, "images") if (place / "ids.npy").is_file() else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_place": self._place, "_records": self._records}

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        return np.load(self._place / "ids.npy", mmap_mode="r"), np.load(self._place / "rows.npy", mmap_mode="r")

    def has(self, image_id: int) -> bool:
        return self._row(image_id) is not None

    def find(self, image_id: int) -> bytes | None:
        row = self._row(image_id)
        if row is None:
            return None
        example = Example.FromString(self._records[row])
        return example.features.feature["image"].bytes_list.value[0]

    def _row(self, image_id: int) -> int | None:
        if self._records is None:
            return None
        ids, rows = self._index
        at = int(np.searchsorted(ids, image_id))
        return int(rows[at]) if at < len(ids) and ids[at] == image_id else None


class ShardFile(NamedTuple):
    """A shard, described with the fields that `array_record_data_source` expects."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class PartDescription(NamedTuple):
    """TFDS's description of a directory: the shards of each split, and the metadata of tfds_builder.py."""

    splits: dict[str, list[ShardFile]]
    metadata: dict[str, Any]


def read_part_description(place: Path) -> PartDescription:
    """Reads the description of a part's directory.

    Raises:
      UserError: it is missing, or is no such description.
    """
    try:
        info, metadata = (
            json.loads((place / name).read_text(encoding="utf-8")) for name in ("dataset_info.json", "metadata.json")
        )
        return PartDescription({split["name"]: _files(place, info, split) for split in info["splits"]}, metadata)
    except FileNotFoundError as error:
        raise UserError(f"{place}: missing; run `jfe data prepare` again") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{place}: its description is damaged ({error!r}); run `jfe data prepare` again") from error


def _files(place: Path, info: dict[str, Any], split: dict[str, Any]) -> list[ShardFile]:
    lengths = [int(length) for length in split["shardLengths"]]
    names = (
        split["filepathTemplate"].format(
            DATASET=info["name"],
            SPLIT=split["name"],
            FILEFORMAT=info["fileFormat"],
            SHARD_X_OF_Y=f"{index:05d}-of-{len(lengths):05d}",
        )
        for index in range(len(lengths))
    )
    return [ShardFile(str(place / name), 0, length, length) for name, length in zip(names, lengths, strict=True)]


class RawRecords:
    """A split's serialized records by index. Files are opened at the first read, in the process that reads."""

    def __init__(self, place: Path, split: str):
        self.place, self.split = place, split
        self._files = read_part_description(place).splits[split]

    def __len__(self) -> int:
        return sum(file.take for file in self._files)

    def __getitem__(self, index: int) -> bytes:
        return self._source[index]

    def __repr__(self) -> str:
        return f"RawRecords({str(self.place)!r}, {self.split!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "split": self.split, "_files": self._files}

    @functools.cached_property
    def _source(self) -> Any:
        return array_record_data_source.ArrayRecordDataSource(self._files)


def parse_query(record: bytes) -> QueryRecord:
    """Parses a serialized query record."""
    feature = Example.FromString(record).features.feature
    return QueryRecord(
        feature["qid"].bytes_list.value[0].decode(),
        feature["text"].bytes_list.value[0].decode(),
        feature["image_id"].int64_list.value[0],
        feature["modality"].int64_list.value[0],
        tuple(feature["positives"].int64_list.value),
        tuple(feature["positive_modalities"].int64_list.value),
        tuple(feature["negatives"].int64_list.value),
        tuple(feature["negative_modalities"].int64_list.value),
    )
