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
from jfe_jax.data.mbeir import MODALITIES, Mbeir, Unit, dataset_id
from jfe_jax.data.numbering import CandidateIndex, CandidateIndices
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
    parts = {name: by_split for name, by_split in sorted(found.items()) if not units or name in units}
    summaries = {name: _summary(mbeir, by_split) for name, by_split in parts.items()}
    for dataset in sorted({dataset for summary in summaries.values() for dataset in summary.datasets}):
        yield _prepare_candidates(indices.of(dataset), out, progress)
    for name, by_split in parts.items():
        yield _prepare_queries(mbeir, name, by_split, summaries[name], indices, out, progress)


@dataclass(frozen=True)
class _Summary:
    """One pass over a unit's query files: how many rows, which datasets they point into, a digest of the lines."""

    rows: int
    datasets: frozenset[int]
    digest: str
    splits: tuple[str, ...]


def _summary(mbeir: Mbeir, by_split: dict[str, Unit]) -> _Summary:
    rows, datasets, splits = 0, set(), []
    digest = hashlib.blake2b(digest_size=16)
    for split, unit in by_split.items():
        before = rows
        for query in mbeir.iter_queries(split, unit):
            rows += 1
            for did in (*query.pos, *query.neg):
                try:
                    datasets.add(dataset_id(did))
                except ValueError as error:
                    raise UserError(
                        f"{mbeir.query_file(split, unit)}: query {query.qid}: candidate id {error}"
                    ) from error
            digest.update(repr((split, query)).encode())
        if rows > before:
            splits.append(split)
    return _Summary(rows, frozenset(datasets), digest.hexdigest(), tuple(splits))


def _prepare_candidates(index: CandidateIndex, out: Path, progress: Callable) -> Part:
    name = f"dataset{index.dataset}"
    place = out / CANDIDATES / name / VERSION
    if not index.numbers:
        return Part(f"{CANDIDATES}/{name}", "empty", 0)
    if _finished(place, index.fingerprint):
        return Part(f"{CANDIDATES}/{name}", "kept", len(index.numbers))
    with progress(f"{CANDIDATES}/{name}", len(index.numbers)) as tick:
        config = CandidatesConfig(name=name, index=index, expected=len(index.numbers), tick=tick)
        _build(MbeirCandidates, config, out, place)
    return Part(f"{CANDIDATES}/{name}", "written", len(index.numbers))


def _prepare_queries(
    mbeir: Mbeir,
    name: str,
    by_split: dict[str, Unit],
    summary: _Summary,
    indices: CandidateIndices,
    out: Path,
    progress: Callable,
) -> Part:
    place = out / QUERIES / name / VERSION
    unit = next(iter(by_split.values()))
    pools = {f"dataset{dataset}": indices.of(dataset).fingerprint for dataset in sorted(summary.datasets)}
    table = [
        [query, candidate, *prompts]
        for query in MODALITIES
        for candidate in MODALITIES
        if (prompts := mbeir.instructions(unit.dataset, query, candidate, required=False))
    ]
    digest = hashlib.blake2b(repr((summary.digest, pools, table)).encode(), digest_size=16).hexdigest()
    if not summary.splits:
        return Part(f"{QUERIES}/{name}", "empty", 0)
    if _finished(place, digest):
        return Part(f"{QUERIES}/{name}", "kept", summary.rows)
    with progress(f"{QUERIES}/{name}", summary.rows) as tick:
        metadata = {"fingerprint": digest, "pools": pools, "instructions": table, "max_positives": {}}
        config = QueriesConfig(
            name=name,
            mbeir=mbeir,
            unit=unit,
            splits=summary.splits,
            expected=summary.rows,
            indices=indices,
            metadata=metadata,
            tick=tick,
        )
        _build(MbeirQueries, config, out, place)
    counts = config.counts
    return Part(f"{QUERIES}/{name}", "written", counts["records"], counts["dropped"], counts["dangling"])


def _finished(place: Path, fingerprint: str) -> bool:
    if not (place / "dataset_info.json").is_file():
        return False
    return tfds.builder_from_directory(place).info.metadata.get("fingerprint") == fingerprint


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
