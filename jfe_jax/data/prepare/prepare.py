"""Prepares an M-BEIR directory: decides which parts must be written and writes them with tfds_builder.py."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from jfe_jax.data.formats.candidate_ids import CandidateIndices
from jfe_jax.data.formats.mbeir import MODALITIES, Mbeir, Unit
from jfe_jax.data.ids import image_id, image_name
from jfe_jax.data.prepare.image_shards import ImagePart, write_image_shards
from jfe_jax.data.prepare.tfds_builder import (
    CandidatesConfig,
    ImagesConfig,
    MbeirCandidates,
    MbeirImages,
    MbeirQueries,
    QueriesConfig,
    build_part,
)
from jfe_jax.data.storage.image_source import ImageSource, find_image_source
from jfe_jax.data.storage.prepared_dataset import CANDIDATES, IMAGES, QUERIES, VERSION
from jfe_jax.errors import UserError

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class PartResult:
    """Outcome of one part: "written", "kept" (it was finished before), or "empty" (nothing to write).

    Attributes:
      missing: number of images that could not be read; `missing.txt` in the part's directory lists them.
    """

    name: str
    outcome: str
    records: int
    dropped_queries: int = 0
    dangling: int = 0
    missing: int = 0


def prepare_dataset(
    mbeir: Mbeir,
    out: Path,
    *,
    splits: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    images: ImageSource | None = None,
    short_side: int = 0,
    max_bad_share: float = 0.001,
    progress: Progress,
) -> Iterator[PartResult]:
    """Writes the parts that are missing or whose source has changed, one after the other, images last.

    The source is the text files: an image that is replaced under its old name goes unnoticed. A part that a killed run
    left unfinished resumes after its last finished shard.

    Args:
      splits: the splits to write; by default all but test splits, which training never reads, and unions of others.
      units: names of the units to write; by default all. The datasets of their candidates are written too.
      images: the image source; by default the directory's files, or its archive if it has no mbeir_images/.
      short_side: images whose shorter side exceeds this are downscaled to it; 0 disables this.
      max_bad_share: the share of a part's images that may be missing or unreadable.
      progress: (part, expected records) → a context manager that yields a function to call with the records done.

    Raises:
      UserError: a row is malformed, or more than `max_bad_share` of the images are missing or unreadable (the message
        names one).
    """
    return _DatasetPreparer(
        mbeir, out, images or find_image_source(mbeir.path), short_side, max_bad_share, progress
    ).run(_select_units(mbeir, splits, units))


def _select_units(
    mbeir: Mbeir, splits: Sequence[str] | None, units: Sequence[str] | None
) -> dict[str, dict[str, Unit]]:
    """Returns the selected units: name → split → unit."""
    if splits is None:
        splits = [split for split in mbeir.splits if not split.startswith(("test", "union"))]
    found: dict[str, dict[str, Unit]] = {}
    for split in splits:
        for unit in mbeir.units(split):
            found.setdefault(unit.name, {})[split] = unit
    unknown = sorted(set(units or ()) - found.keys())
    if unknown:
        raise UserError(f"{mbeir.path}: no unit {unknown[0]} in {', '.join(splits)}; there are {', '.join(found)}")
    if not found:
        raise UserError(f"{mbeir.path}: no queries; name the splits with --splits, there are {', '.join(mbeir.splits)}")
    return {name: by_split for name, by_split in sorted(found.items()) if not units or name in units}


class _DatasetPreparer:
    def __init__(
        self, mbeir: Mbeir, out: Path, images: ImageSource, short_side: int, max_bad_share: float, progress: Progress
    ):
        self._mbeir, self._out, self._images = mbeir, out, images
        self._short_side, self._max_bad_share, self._progress = short_side, max_bad_share, progress
        self._indices = CandidateIndices(mbeir)
        # Parts of images that must be written, and those that are finished already.
        self._pending_images: list[ImagePart] = []
        self._finished_images: list[PartResult] = []

    def run(self, chosen: dict[str, dict[str, Unit]]) -> Iterator[PartResult]:
        datasets: set[int] = set()
        for name, by_split in chosen.items():
            part, seen = self._queries(name, by_split)
            datasets |= seen
            yield part
        for dataset in sorted(datasets):
            yield self._candidates(dataset)
        yield from self._finished_images
        yield from self._write_images()

    def _queries(self, name: str, by_split: dict[str, Unit]) -> tuple[PartResult, set[int]]:
        """Writes or reuses a unit's queries. Also returns the datasets of their candidates."""
        part = f"{QUERIES}/{name}"
        unit = next(iter(by_split.values()))
        table = [
            [query, candidate, *prompts]
            for query in MODALITIES
            for candidate in MODALITIES
            if (prompts := self._mbeir.instructions(unit.dataset, query, candidate, required=False))
        ]
        source, rows = _digest_queries(self._mbeir, by_split, table)
        if not rows:
            return PartResult(part, "empty", 0), set()
        finished = self._finished(part)
        if finished:
            seen, fingerprint = set(finished.metadata.get("datasets", ())), finished.metadata["fingerprint"]
            if fingerprint == self._with_pools(source, seen):
                self._query_images(name, by_split, rows, fingerprint, seen)
                return PartResult(part, "kept", sum(split.num_examples for split in finished.splits.values())), seen
        with self._progress(part, sum(rows.values())) as tick:
            config = QueriesConfig(
                name=name,
                mbeir=self._mbeir,
                unit=unit,
                splits=list(rows),
                expected=max(rows.values()),
                indices=self._indices,
                # Candidates may be of any dataset: a change of any pool starts over.
                fingerprint=hashlib.blake2b(source + self._indices.fingerprint.encode(), digest_size=16).hexdigest(),
                staging=self._staging(part),
                final_fingerprint=lambda seen: self._with_pools(source, seen),
                metadata={"instructions": table, "max_positives": {}},
                tick=tick,
            )
            build_part(MbeirQueries, config, self._out, part)
        counts, seen = config.counts, config.datasets
        self._query_images(name, by_split, rows, self._with_pools(source, seen), seen)
        return PartResult(part, "written", counts["records"], counts["dropped"], counts["dangling"]), seen

    def _candidates(self, dataset: int) -> PartResult:
        name = f"dataset{dataset}"
        part, index = f"{CANDIDATES}/{name}", self._indices.for_dataset(dataset)
        if not len(index):
            return PartResult(part, "empty", 0)
        self._add_images(
            name,
            index.fingerprint,
            lambda: index.image_ids,
            lambda: (image_name(one.image, self._mbeir.path) for one in index.candidates() if one.image is not None),
        )
        finished = self._finished(part)
        if finished and finished.metadata["fingerprint"] == index.fingerprint:
            return PartResult(part, "kept", finished.splits["pool"].num_examples)
        with self._progress(part, len(index)) as tick:
            config = CandidatesConfig(
                name=name,
                index=index,
                fingerprint=index.fingerprint,
                staging=self._staging(part),
                expected=len(index),
                tick=tick,
            )
            build_part(MbeirCandidates, config, self._out, part)
        return PartResult(part, "written", len(index))

    def _query_images(
        self, name: str, by_split: dict[str, Unit], rows: dict[str, int], fingerprint: str, datasets: set[int]
    ) -> None:
        def images() -> Iterator[Path]:
            for split in rows:
                for query in self._mbeir.iter_queries(split, by_split[split]):
                    if query.image is not None:
                        yield query.image

        def ids() -> np.ndarray:
            own_ids = np.unique(np.fromiter((image_id(one, self._mbeir.path) for one in images()), np.int64))
            for dataset in datasets:
                own_ids = np.setdiff1d(own_ids, self._indices.for_dataset(dataset).image_ids, assume_unique=True)
            return own_ids

        self._add_images(name, fingerprint, ids, lambda: (image_name(one, self._mbeir.path) for one in images()))

    def _add_images(
        self, name: str, fingerprint: str, ids: Callable[[], np.ndarray], names: Callable[[], Iterator[str]]
    ) -> None:
        part, fingerprint = f"{IMAGES}/{name}", f"{fingerprint} {self._short_side}"
        finished = self._finished(part)
        if finished and finished.metadata["fingerprint"] == fingerprint:
            records = sum(split.num_examples for split in finished.splits.values())
            self._finished_images.append(PartResult(part, "kept", records, missing=finished.metadata["missing"]))
            return
        wanted = ids()
        if len(wanted):
            self._pending_images.append(
                ImagePart(name=part, fingerprint=fingerprint, ids=wanted, names=names, staging=self._staging(part))
            )

    def _write_images(self) -> Iterator[PartResult]:
        if not self._pending_images:
            return
        with self._progress(IMAGES, sum(len(part.ids) for part in self._pending_images)) as tick:
            write_image_shards(
                self._pending_images,
                self._images,
                short_side=self._short_side,
                max_bad_share=self._max_bad_share,
                tick=tick,
            )
        for part in self._pending_images:
            config = ImagesConfig(
                name=part.name.partition("/")[2],
                fingerprint=part.fingerprint,
                staging=part.staging,
                shards=part.writer.finished,
                ids=np.array(part.written, np.int64),
                missing=part.missing,
            )
            build_part(MbeirImages, config, self._out, part.name)
            yield PartResult(part.name, "written", len(part.written), missing=len(part.missing))

    def _with_pools(self, source: bytes, datasets: set[int]) -> str:
        pools = "".join(f"{dataset}:{self._indices.for_dataset(dataset).fingerprint};" for dataset in sorted(datasets))
        return hashlib.blake2b(source + pools.encode(), digest_size=16).hexdigest()

    def _staging(self, part: str) -> Path:
        return self._out / part / "unfinished"

    def _finished(self, part: str) -> tfds.core.DatasetInfo | None:
        """Returns TFDS's description of a part, if it is finished."""
        place = self._out / part / VERSION
        return tfds.builder_from_directory(place).info if (place / "dataset_info.json").is_file() else None


def _digest_queries(mbeir: Mbeir, by_split: dict[str, Unit], table: list[list[str]]) -> tuple[bytes, dict[str, int]]:
    """Returns a digest of a unit's query files and instructions, and the line count of each non-empty split."""
    digest, rows = hashlib.blake2b(repr(table).encode()), {}
    for split, unit in by_split.items():
        digest.update(split.encode())
        count = 0
        with open(mbeir.query_file(split, unit), "rb") as stream:
            for line in stream:
                digest.update(line)
                count += 1
        if count:
            rows[split] = count
    return digest.digest(), rows
