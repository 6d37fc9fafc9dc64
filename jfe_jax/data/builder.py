"""M-BEIR directory → TFDS data sets in ArrayRecord, without TensorFlow: what training reads.

    OUT/mbeir_candidates/dataset{id}/1.0.0/    split "pool": every candidate of a dataset, once
    OUT/mbeir_queries/{unit}/1.0.0/            one split for each split of the unit's queries

Both are ordinary TFDS directories (`tfds.builder_from_directory`), one part for each dataset or unit, so that a part
can be prepared, copied or left out alone. A candidate's number is dataset·10⁷ + its record's index, as M-BEIR hashes
ids; queries name positives and negatives by number.

Candidate record: did, text, image (the file's bytes, empty without one), image_id (equal for the same file), modality
(index into MODALITIES). Query record: qid, text, image, image_id, modality, task, positives, positive_modalities,
negatives. A query part's metadata holds its instructions as [query modality, candidate modality, prompts…].
"""

import contextlib
import dataclasses
import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from jfe_jax.data.images import decode
from jfe_jax.data.mbeir import MODALITIES, TASKS, Candidate, Mbeir, Query, Unit, dataset_id
from jfe_jax.data.mbeir_rows import parse_candidate, read_rows
from jfe_jax.errors import UserError

VERSION = "1.0.0"
CANDIDATES, QUERIES = "mbeir_candidates", "mbeir_queries"
PER_DATASET = 10_000_000
# 214·10⁷ is beyond int32, which the loss counts candidates in.
MAX_DATASET = 213


@dataclass(frozen=True)
class Part:
    """What became of one part: "written", "kept" (it was finished before), or "empty" (nothing to write)."""

    name: str
    outcome: str
    records: int
    dropped_queries: int = 0
    dangling: int = 0


class CandidateIndex:
    """Numbers the candidates of one dataset: those in local pools first, then those that only a global pool has.

    Attributes:
      numbers: candidate id → number.
      modalities: candidate id → index into MODALITIES.
      fingerprint: changes when a row does.
    """

    def __init__(self, mbeir: Mbeir, dataset: int):
        if dataset > MAX_DATASET:
            raise UserError(f"{mbeir.path}: dataset id {dataset} is larger than {MAX_DATASET}")
        self.mbeir, self.dataset = mbeir, dataset
        self.numbers: dict[str, int] = {}
        self.modalities: dict[str, int] = {}
        digest = hashlib.blake2b(digest_size=16)
        for candidate in self._rows():
            if candidate.did not in self.numbers:
                self.numbers[candidate.did] = dataset * PER_DATASET + len(self.numbers)
                self.modalities[candidate.did] = MODALITIES.index(candidate.modality)
                digest.update(repr((candidate.did, candidate.text, str(candidate.image))).encode())
        if len(self.numbers) > PER_DATASET:
            raise UserError(f"{mbeir.path}: dataset {dataset} has more than {PER_DATASET} candidates")
        self.fingerprint = digest.hexdigest()

    def candidates(self) -> Iterator[Candidate]:
        """The candidates in the order of their numbers."""
        seen = 0
        for candidate in self._rows():
            if self.numbers[candidate.did] == self.dataset * PER_DATASET + seen:
                seen += 1
                yield candidate

    def _rows(self) -> Iterator[Candidate]:
        for file in self.mbeir.pool_files():
            for where, row in read_rows(file, containing=f'"{self.dataset}:'):
                candidate, problems = parse_candidate(row, self.mbeir.path)
                if candidate is None or problems:
                    raise UserError(f"{where}: {problems[0]}")
                if candidate.did.startswith(f"{self.dataset}:"):
                    yield candidate


@dataclass(kw_only=True)
class _CandidatesConfig(tfds.core.BuilderConfig):
    index: CandidateIndex | None = None
    tick: Callable[[int], None] = lambda _: None


@dataclass(kw_only=True)
class _QueriesConfig(tfds.core.BuilderConfig):
    mbeir: Mbeir | None = None
    unit: Unit | None = None
    splits: Sequence[str] = ()
    index: "_Indices | None" = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: Counter = dataclasses.field(default_factory=Counter)
    tick: Callable[[int], None] = lambda _: None


class MbeirCandidates(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The candidates of one dataset of an M-BEIR directory."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(fingerprint=self.builder_config.index.fingerprint),
            features=tfds.features.FeaturesDict(
                {
                    "did": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "image": tfds.features.Scalar(np.object_),
                    "image_id": np.int64,
                    "modality": np.int64,
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {"pool": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for number, candidate in enumerate(config.index.candidates()):
            config.tick(1)
            yield (
                number,
                {
                    "did": candidate.did,
                    "text": candidate.text or "",
                    "modality": MODALITIES.index(candidate.modality),
                    **_image(candidate.image, config.index.mbeir.path),
                },
            )


class MbeirQueries(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The queries of one unit of an M-BEIR directory, with what is right and wrong for each."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(**self.builder_config.metadata),
            features=tfds.features.FeaturesDict(
                {
                    "qid": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "image": tfds.features.Scalar(np.object_),
                    "image_id": np.int64,
                    "modality": np.int64,
                    "task": np.int64,
                    "positives": tfds.features.Sequence(np.int64),
                    "positive_modalities": tfds.features.Sequence(np.int64),
                    "negatives": tfds.features.Sequence(np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self.builder_config.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config, number = self.builder_config, 0
        for query in config.mbeir.iter_queries(split, config.unit):
            config.tick(1)
            right = [did for did in dict.fromkeys(query.pos) if did in config.index]
            wrong = [did for did in dict.fromkeys(query.neg) if did in config.index]
            config.counts["dangling"] += len({*query.pos, *query.neg}) - len({*right, *wrong})
            if not right:
                config.counts["dropped"] += 1
                continue
            config.counts["records"] += 1
            modalities = [config.index.modality(did) for did in right]
            most = self.info.metadata["max_positives"]
            most[split] = max(most.get(split, 0), len(right))
            yield (
                number,
                {
                    "qid": query.qid,
                    "text": query.text or "",
                    "modality": MODALITIES.index(query.modality),
                    "task": _task(config.unit, query, modalities),
                    "positives": [config.index.number(did) for did in right],
                    "positive_modalities": modalities,
                    "negatives": [config.index.number(did) for did in wrong],
                    **_image(query.image, config.mbeir.path),
                },
            )
            number += 1


class _Indices:
    """The candidate indices of all datasets, each made when it is first asked for."""

    def __init__(self, mbeir: Mbeir):
        self._mbeir = mbeir
        self._known: dict[int, CandidateIndex] = {}

    def of(self, dataset: int) -> CandidateIndex:
        if dataset not in self._known:
            self._known[dataset] = CandidateIndex(self._mbeir, dataset)
        return self._known[dataset]

    def __contains__(self, did: str) -> bool:
        return did in self.of(dataset_id(did)).numbers

    def number(self, did: str) -> int:
        return self.of(dataset_id(did)).numbers[did]

    def modality(self, did: str) -> int:
        return self.of(dataset_id(did)).modalities[did]


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
    indices = _Indices(mbeir)
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
        config = _CandidatesConfig(name=name, index=index, tick=tick)
        _build(MbeirCandidates, config, out, place)
    return Part(f"{CANDIDATES}/{name}", "written", len(index.numbers))


def _prepare_queries(
    mbeir: Mbeir,
    name: str,
    by_split: dict[str, Unit],
    summary: _Summary,
    indices: _Indices,
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
        config = _QueriesConfig(
            name=name, mbeir=mbeir, unit=unit, splits=summary.splits, index=indices, metadata=metadata, tick=tick
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


def _image(file: Path | None, root: Path) -> dict[str, Any]:
    if file is None:
        return {"image": b"", "image_id": 0}
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read the image ({error.strerror})") from error
    decode(content, str(file))
    name = hashlib.blake2b(str(file.relative_to(root)).encode(), digest_size=8).digest()
    # 0 means no image.
    return {"image": content, "image_id": int.from_bytes(name, "big", signed=True) or 1}


def _task(unit: Unit, query: Query, modalities: Iterable[int]) -> int:
    if unit.task is not None:
        return unit.task
    return next((TASKS.get((query.modality, MODALITIES[modality]), -1) for modality in modalities), -1)
