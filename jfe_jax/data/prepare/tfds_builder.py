"""Converts an M-BEIR directory to TFDS data sets in ArrayRecord, which training reads without TensorFlow.

    OUT/mbeir_queries/{unit}/2.0.0/            a split for each split of the unit's queries
    OUT/mbeir_candidates/dataset{id}/2.0.0/    split "pool": every candidate of a dataset, once
    OUT/mbeir_images/dataset{id}/2.0.0/        split "images": the images of the dataset's candidates, once each
    OUT/mbeir_images/{unit}/2.0.0/             the images of the unit's queries that are not in a dataset's part

All are ordinary TFDS directories (`tfds.builder_from_directory`). There is a part for each dataset or unit, so that
each can be prepared, copied or omitted independently. A candidate's integer id is dataset·10⁷ + its record's index, as
M-BEIR hashes ids. Queries refer to positives and negatives by integer id. Queries and candidates refer to images by
`image_id` (0 without one). The images of a part come with `ids.npy`, their ids in ascending order, and `rows.npy`, the
indices of their records.

Candidate record: did, text, image_id, modality (index into MODALITIES). Query record: qid, text, image_id, modality,
task, positives, positive_modalities, negatives, negative_modalities. Image record: image_id, image (encoded bytes). A
query part's metadata holds its instructions as [query modality, candidate modality, prompts…].
"""

import contextlib
import dataclasses
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from jfe_jax.data.formats.candidate_ids import CandidateIndex, CandidateIndices
from jfe_jax.data.formats.mbeir import MODALITIES, TASKS, Mbeir, Query, Unit, parse_dataset_id
from jfe_jax.data.ids import image_id
from jfe_jax.data.storage.prepared_dataset import VERSION
from jfe_jax.data.storage.shard_writer import Record, RecordShard, RecordShardWriter, write_remaining
from jfe_jax.errors import UserError

_ITEM_FEATURES = {"text": tfds.features.Text(), "image_id": np.int64, "modality": np.int64}


@dataclass(kw_only=True)
class _PartConfig(tfds.core.BuilderConfig):
    """Settings common to all parts.

    Attributes:
      fingerprint: fingerprint of the part's source.
      staging: directory for its shards until all are finished.
      expected: maximum number of records in a split.
      tick: called with the number of records just processed.
    """

    fingerprint: str = ""
    staging: Path = Path()
    expected: int = 0
    tick: Callable[[int], None] = lambda _: None


class _ShardedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Moves finished shards to their final location. Finished shards survive a kill.

    TFDS's own writer takes ten times as long per record, writes a second copy, and starts over after a kill.
    """

    VERSION = tfds.core.Version(VERSION)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        splits = []
        for split, shards in self._split_generators(dl_manager).items():
            template = self._get_filename_template(split_name=split)
            for index, shard in enumerate(shards):
                # A shard's final name contains the number of shards.
                os.replace(shard.file, template.sharded_filepath(shard_index=index, num_shards=len(shards)))
            if shards:
                size = sum(shard.size for shard in shards)
                splits.append(tfds.core.SplitInfo(split, [shard.records for shard in shards], size, template))
        self.info.set_splits(tfds.core.splits.SplitDict(splits))

    def _write(self, split: str, records: Iterable[Record]) -> list[RecordShard]:
        config = self.builder_config
        writer = RecordShardWriter(config.staging / split, config.fingerprint, config.expected)
        write_remaining(writer, records)
        return writer.finished


@dataclass(kw_only=True)
class CandidatesConfig(_PartConfig):
    """Selects the candidates of a part."""

    index: CandidateIndex | None = None


class MbeirCandidates(_ShardedBuilder, skip_registration=True):
    """The candidates of one dataset of an M-BEIR directory."""

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        metadata = tfds.core.MetadataDict(
            fingerprint=config.fingerprint, images=len(config.index.image_ids) if config.index else 0
        )
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            metadata=metadata,
            features=tfds.features.FeaturesDict({"did": tfds.features.Text(), **_ITEM_FEATURES}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, list[RecordShard]]:
        return {"pool": self._write("pool", self._generate_examples())}

    def _generate_examples(self) -> Iterator[Record]:
        config = self.builder_config
        for candidate in config.index.candidates():
            config.tick(1)
            yield {
                "did": candidate.did,
                "text": candidate.text or "",
                "modality": MODALITIES.index(candidate.modality),
                "image_id": image_id(candidate.image, config.index.mbeir.path),
            }


@dataclass(kw_only=True)
class QueriesConfig(_PartConfig):
    """Selects the queries of a part and the indices of their candidates.

    After the build, `counts` holds "records", "dropped" and "dangling", and `datasets` the datasets of the candidates.
    `final_fingerprint` computes the part's fingerprint from the latter.
    """

    mbeir: Mbeir | None = None
    unit: Unit | None = None
    splits: Sequence[str] = ()
    indices: CandidateIndices | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    datasets: set[int] = dataclasses.field(default_factory=set)
    final_fingerprint: Callable[[set[int]], str] = lambda _: ""


class MbeirQueries(_ShardedBuilder, skip_registration=True):
    """The queries of one unit of an M-BEIR directory, with their positives and hard negatives."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(**self.builder_config.metadata),
            features=tfds.features.FeaturesDict(
                {
                    "qid": tfds.features.Text(),
                    **_ITEM_FEATURES,
                    "task": np.int64,
                    "positives": tfds.features.Sequence(np.int64),
                    "positive_modalities": tfds.features.Sequence(np.int64),
                    "negatives": tfds.features.Sequence(np.int64),
                    "negative_modalities": tfds.features.Sequence(np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, list[RecordShard]]:
        return {split: self._write(split, self._generate_examples(split)) for split in self.builder_config.splits}

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        config = self.builder_config
        pools = {dataset: config.indices.for_dataset(dataset).fingerprint for dataset in sorted(config.datasets)}
        self.info.metadata.update(
            fingerprint=config.final_fingerprint(config.datasets),
            datasets=list(pools),
            # The loader needs only these: ids that are in no pool may be of datasets without candidates.
            pools={
                f"dataset{dataset}": pools[dataset] for dataset in pools if len(config.indices.for_dataset(dataset))
            },
        )

    def _generate_examples(self, split: str) -> Iterator[Record]:
        config = self.builder_config
        max_positives = self.info.metadata["max_positives"]
        for query in config.mbeir.iter_queries(split, config.unit):
            config.tick(1)
            dids = list(dict.fromkeys((*query.pos, *query.neg)))
            try:
                config.datasets.update(map(parse_dataset_id, dids))
                found = dict(zip(dids, zip(*config.indices.find(dids), strict=True), strict=True)) if dids else {}
            except ValueError as error:
                file = config.mbeir.query_file(split, config.unit)
                raise UserError(f"{file}: query {query.qid}: candidate id {error}") from error
            positives, negatives = (
                {found[did][0]: found[did][1] for did in ids if found[did][0] >= 0} for ids in (query.pos, query.neg)
            )
            config.counts["dangling"] += sum(number < 0 for number, _ in found.values())
            if not positives:
                config.counts["dropped"] += 1
                continue
            config.counts["records"] += 1
            max_positives[split] = max(max_positives.get(split, 0), len(positives))
            yield {
                "qid": query.qid,
                "text": query.text or "",
                "modality": MODALITIES.index(query.modality),
                "task": _task(config.unit, query, positives.values()),
                "positives": list(positives),
                "positive_modalities": list(positives.values()),
                "negatives": list(negatives),
                "negative_modalities": list(negatives.values()),
                "image_id": image_id(query.image, config.mbeir.path),
            }


@dataclass(kw_only=True)
class ImagesConfig(_PartConfig):
    """Images in finished shards, with the id of each. Those in `missing` could not be read."""

    shards: list[RecordShard] = dataclasses.field(default_factory=list)
    ids: np.ndarray | None = None
    missing: list[str] = dataclasses.field(default_factory=list)


class MbeirImages(_ShardedBuilder, skip_registration=True):
    """The images of one part, encoded."""

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(fingerprint=config.fingerprint, missing=len(config.missing)),
            features=tfds.features.FeaturesDict({"image_id": np.int64, "image": tfds.features.Scalar(np.object_)}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, list[RecordShard]]:
        config = self.builder_config
        order = np.argsort(config.ids)
        place = Path(os.fspath(self.data_path))
        np.save(place / "ids.npy", config.ids[order])
        np.save(place / "rows.npy", order.astype(np.int32))
        (place / "missing.txt").write_text("".join(f"{one}\n" for one in config.missing), encoding="utf-8")
        return {"images": config.shards}

    def _generate_examples(self) -> Iterator[Record]:
        raise NotImplementedError("the shards are written before the builder runs")


def build_part(kind: type[_ShardedBuilder], config: _PartConfig, out: Path, part: str) -> None:
    """Writes the part OUT/{part}/{VERSION}, replacing one of any other source or version."""
    # This also removes the leftovers of a run that was killed while moving shards.
    for leftover in (out / part).glob("[0-9]*"):
        shutil.rmtree(leftover)
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        # TFDS prints to standard output, which is reserved for the command's own output.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = kind(data_dir=out, config=config, file_format="array_record")
            builder.download_and_prepare(download_dir=out / "downloads")
    finally:
        absl_logging.set_verbosity(verbosity)
        shutil.rmtree(out / "downloads", ignore_errors=True)
    shutil.rmtree(config.staging, ignore_errors=True)


def _task(unit: Unit, query: Query, modalities: Iterable[int]) -> int:
    if unit.task is not None:
        return unit.task
    return next((TASKS.get((query.modality, MODALITIES[modality]), -1) for modality in modalities), -1)
