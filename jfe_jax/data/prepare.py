"""M-BEIR directory → prepared parts: decides which are to be written, and has builder.py write them."""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging as absl_logging

from jfe_jax.data.builder import (
    CANDIDATES,
    QUERIES,
    VERSION,
    CandidatesConfig,
    MbeirCandidates,
    MbeirQueries,
    QueriesConfig,
)
from jfe_jax.data.mbeir import MODALITIES, Mbeir, Unit
from jfe_jax.data.numbering import CandidateIndices
from jfe_jax.errors import UserError


@dataclass(frozen=True)
class Part:
    """What became of one part: "written", "kept" (it was finished before), or "empty" (nothing to write)."""

    name: str
    outcome: str
    records: int
    dropped_queries: int = 0
    dangling: int = 0


def prepare(
    mbeir: Mbeir,
    out: Path,
    *,
    splits: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    progress: Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]],
) -> Iterator[Part]:
    """Writes the parts that are missing or whose source has changed, one after the other.

    The source is the text files: an image that is replaced under its old name is not noticed.

    Args:
      splits: those to write; by default all but test ones, which training never reads.
      units: names of the units to write; by default all. The datasets they point into are written too.
      progress: (part, records expected) → a context that gives a function to call with the records done.

    Raises:
      UserError: a row is wrong, or an image is missing or cannot be read (the message names the file).
    """
    splits = [split for split in mbeir.splits if not split.startswith("test")] if splits is None else list(splits)
    found: dict[str, dict[str, Unit]] = {}
    for split in splits:
        for unit in mbeir.units(split):
            found.setdefault(unit.name, {})[split] = unit
    unknown = sorted(set(units or ()) - found.keys())
    if unknown:
        raise UserError(f"{mbeir.path}: no unit {unknown[0]} in {', '.join(splits)}; there are {', '.join(found)}")
    if not found:
        raise UserError(f"{mbeir.path}: no queries in the splits {', '.join(splits)}")
    indices = CandidateIndices(mbeir)
    datasets: set[int] = set()
    for name, by_split in sorted(found.items()):
        if not units or name in units:
            part, seen = _prepare_queries(mbeir, name, by_split, indices, out, progress)
            datasets |= seen
            yield part
    for dataset in sorted(datasets):
        yield _prepare_candidates(indices, dataset, out, progress)


def _prepare_queries(
    mbeir: Mbeir, name: str, by_split: dict[str, Unit], indices: CandidateIndices, out: Path, progress: Callable
) -> tuple[Part, set[int]]:
    """Writes or keeps a unit's queries; also says into which datasets they point."""
    part, place = f"{QUERIES}/{name}", out / QUERIES / name / VERSION
    unit = next(iter(by_split.values()))
    table = [
        [query, candidate, *prompts]
        for query in MODALITIES
        for candidate in MODALITIES
        if (prompts := mbeir.instructions(unit.dataset, query, candidate, required=False))
    ]
    source, rows = _digest(mbeir, by_split, table)
    if not rows:
        return Part(part, "empty", 0), set()
    finished = _finished(place)
    if finished:
        seen = set(finished.metadata.get("datasets", ()))
        if finished.metadata["fingerprint"] == _with_pools(source, indices, seen):
            return Part(part, "kept", sum(split.num_examples for split in finished.splits.values())), seen
    metadata = {"instructions": table, "max_positives": {}}
    with progress(part, sum(rows.values())) as tick:
        config = QueriesConfig(
            name=name,
            mbeir=mbeir,
            unit=unit,
            splits=list(rows),
            expected=max(rows.values()),
            indices=indices,
            fingerprint=lambda seen: _with_pools(source, indices, seen),
            metadata=metadata,
            tick=tick,
        )
        _build(MbeirQueries, config, out, place)
    counts = config.counts
    return Part(part, "written", counts["records"], counts["dropped"], counts["dangling"]), config.datasets


def _prepare_candidates(indices: CandidateIndices, dataset: int, out: Path, progress: Callable) -> Part:
    name = f"dataset{dataset}"
    part, place = f"{CANDIDATES}/{name}", out / CANDIDATES / name / VERSION
    finished = _finished(place)
    if finished and finished.metadata["fingerprint"] == indices.fingerprint(dataset):
        return Part(part, "kept", finished.splits["pool"].num_examples)
    index = indices.of(dataset)
    if not index.numbers:
        return Part(part, "empty", 0)
    with progress(part, len(index.numbers)) as tick:
        config = CandidatesConfig(
            name=name, index=index, fingerprint=indices.fingerprint(dataset), expected=len(index.numbers), tick=tick
        )
        _build(MbeirCandidates, config, out, place)
    return Part(part, "written", len(index.numbers))


def _digest(mbeir: Mbeir, by_split: dict[str, Unit], table: list[list[str]]) -> tuple[bytes, dict[str, int]]:
    """A digest of a unit's query files and instructions, and the number of lines of each split that has any."""
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


def _with_pools(source: bytes, indices: CandidateIndices, datasets: set[int]) -> str:
    pools = "".join(f"{dataset}:{indices.fingerprint(dataset)};" for dataset in sorted(datasets))
    return hashlib.blake2b(source + pools.encode(), digest_size=16).hexdigest()


def _finished(place: Path) -> tfds.core.DatasetInfo | None:
    """What TFDS knows of a part, if it was finished."""
    return tfds.builder_from_directory(place).info if (place / "dataset_info.json").is_file() else None


def _build(
    kind: type[tfds.core.GeneratorBasedBuilder], config: tfds.core.BuilderConfig, out: Path, place: Path
) -> None:
    # A part of another source, and what a killed run left half written beside it.
    for leftover in place.parent.glob(f"{VERSION}*"):
        shutil.rmtree(leftover)
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        # TFDS announces itself on standard output, which is the command line's.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = kind(data_dir=out, config=config, file_format="array_record")
            builder.download_and_prepare(download_dir=out / "downloads")
    finally:
        absl_logging.set_verbosity(verbosity)
        shutil.rmtree(out / "downloads", ignore_errors=True)
