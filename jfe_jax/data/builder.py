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

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from jfe_jax.data.images import decode
from jfe_jax.data.mbeir import MODALITIES, TASKS, Mbeir, Query, Unit, dataset_id
from jfe_jax.data.numbering import CandidateIndex, CandidateIndices
from jfe_jax.errors import UserError

VERSION = "1.0.0"
CANDIDATES, QUERIES = "mbeir_candidates", "mbeir_queries"
# Reading a record takes time in proportion to the records of its shard (5 µs + 3 µs for each thousand), so shards are
# small, as long as that does not make them too many to hold open.
SHARD_RECORDS, MOST_SHARDS = 4096, 128

Record = dict[str, str | bytes | int | list[int]]
_ITEM_FEATURES = {
    "text": tfds.features.Text(),
    "image": tfds.features.Scalar(np.object_),
    "image_id": np.int64,
    "modality": np.int64,
}


class _StreamingBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes shards as records come. TFDS's own writer needs ten times as long for a record, and a second copy."""

    VERSION = tfds.core.Version(VERSION)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        splits = []
        for split, records in self._split_generators(dl_manager).items():
            template = self._get_filename_template(split_name=split)
            per_shard = max(SHARD_RECORDS, -(-self.builder_config.expected // MOST_SHARDS))
            lengths, size = _write_shards(records, template, per_shard)
            if not lengths:
                continue
            splits.append(tfds.core.SplitInfo(split, lengths, size, template))
        self.info.set_splits(tfds.core.splits.SplitDict(splits))


@dataclass(kw_only=True)
class CandidatesConfig(tfds.core.BuilderConfig):
    """Which candidates; `tick` is called with the number of records done, of `expected`."""

    index: CandidateIndex | None = None
    fingerprint: str = ""
    expected: int = 0
    tick: Callable[[int], None] = lambda _: None


class MbeirCandidates(_StreamingBuilder, skip_registration=True):
    """The candidates of one dataset of an M-BEIR directory."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(fingerprint=self.builder_config.fingerprint),
            features=tfds.features.FeaturesDict({"did": tfds.features.Text(), **_ITEM_FEATURES}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Record]]:
        return {"pool": self._generate_examples()}

    def _generate_examples(self) -> Iterator[Record]:
        config = self.builder_config
        for candidate in config.index.candidates():
            config.tick(1)
            yield {
                "did": candidate.did,
                "text": candidate.text or "",
                "modality": MODALITIES.index(candidate.modality),
                **_image(candidate.image, config.index.mbeir.path),
            }


@dataclass(kw_only=True)
class QueriesConfig(tfds.core.BuilderConfig):
    """Which queries, numbered by which indices, at most `expected` in a split.

    Afterwards `counts` tells "records", "dropped" and "dangling", and `datasets` into which datasets they point;
    `fingerprint` makes the part's fingerprint of these.
    """

    mbeir: Mbeir | None = None
    unit: Unit | None = None
    splits: Sequence[str] = ()
    expected: int = 0
    indices: CandidateIndices | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    datasets: set[int] = dataclasses.field(default_factory=set)
    fingerprint: Callable[[set[int]], str] = lambda _: ""
    tick: Callable[[int], None] = lambda _: None


class MbeirQueries(_StreamingBuilder, skip_registration=True):
    """The queries of one unit of an M-BEIR directory, with what is right and wrong for each."""

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
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Record]]:
        return {split: self._generate_examples(split) for split in self.builder_config.splits}

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        config = self.builder_config
        pools = {dataset: config.indices.fingerprint(dataset) for dataset in sorted(config.datasets)}
        self.info.metadata.update(
            fingerprint=config.fingerprint(config.datasets),
            datasets=list(pools),
            # What the loader needs: ids that are in no pool may name datasets that have none.
            pools={f"dataset{dataset}": pools[dataset] for dataset in pools if config.indices.of(dataset).numbers},
        )

    def _generate_examples(self, split: str) -> Iterator[Record]:
        config = self.builder_config
        most = self.info.metadata["max_positives"]
        for query in config.mbeir.iter_queries(split, config.unit):
            config.tick(1)
            try:
                right, wrong = self._numbers(query.pos), self._numbers(query.neg)
            except ValueError as error:
                file = config.mbeir.query_file(split, config.unit)
                raise UserError(f"{file}: query {query.qid}: candidate id {error}") from error
            config.counts["dangling"] += len({*query.pos, *query.neg} - right.keys() - wrong.keys())
            if not right:
                config.counts["dropped"] += 1
                continue
            config.counts["records"] += 1
            most[split] = max(most.get(split, 0), len(right))
            modalities = [config.indices.modality(did) for did in right]
            yield {
                "qid": query.qid,
                "text": query.text or "",
                "modality": MODALITIES.index(query.modality),
                "task": _task(config.unit, query, modalities),
                "positives": list(right.values()),
                "positive_modalities": modalities,
                "negatives": list(wrong.values()),
                **_image(query.image, config.mbeir.path),
            }

    def _numbers(self, dids: Iterable[str]) -> dict[str, int]:
        """Candidate id → number, of those that are in a pool."""
        config, numbers = self.builder_config, {}
        for did in dids:
            config.datasets.add(dataset_id(did))
            number = config.indices.number(did)
            if number is not None:
                numbers[did] = number
        return numbers


def serialize(record: Record) -> bytes:
    """A record as a tf.train.Example, as TFDS lays one out."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name, value in record.items():
        if isinstance(value, str):
            feature[name].bytes_list.value.append(value.encode())
        elif isinstance(value, bytes):
            feature[name].bytes_list.value.append(value)
        elif isinstance(value, int):
            feature[name].int64_list.value.append(value)
        else:
            feature[name].int64_list.value.extend(value)
    return example.SerializeToString(deterministic=True)


def _write_shards(records: Iterable[Record], template: Any, per_shard: int) -> tuple[list[int], int]:
    """Writes shards; returns how many records each has, and their bytes in all."""
    unnamed, lengths, total, writer = [], [], 0, None
    for record in records:
        if writer is None or lengths[-1] == per_shard:
            if writer is not None:
                writer.close()
            unnamed.append(template.data_dir / f"{template.split}-{len(unnamed)}.unnamed")
            lengths.append(0)
            # One record a group: a random read reads nothing else. Images are compressed as they are.
            writer = array_record_module.ArrayRecordWriter(os.fspath(unnamed[-1]), "group_size:1,uncompressed")
        serialized = serialize(record)
        writer.write(serialized)
        lengths[-1] += 1
        total += len(serialized)
    if writer is not None:
        writer.close()
    # A shard's name tells how many there are.
    for index, file in enumerate(unnamed):
        os.replace(file, template.sharded_filepath(shard_index=index, num_shards=len(unnamed)))
    return lengths, total


def _image(file: Path | None, root: Path) -> dict[str, Any]:
    return {"image": b"", "image_id": 0} if file is None else _read_image(str(file), str(root))


# Many queries ask with the same few images: each is read and looked at once.
@functools.lru_cache(maxsize=1024)
def _read_image(file: str, root: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise UserError(f"{file}: cannot read the image ({error.strerror})") from error
    decode(content, file)
    name = hashlib.blake2b(os.path.relpath(file, root).encode(), digest_size=8).digest()
    # 0 means no image.
    return {"image": content, "image_id": int.from_bytes(name, "big", signed=True) or 1}


def _task(unit: Unit, query: Query, modalities: Iterable[int]) -> int:
    if unit.task is not None:
        return unit.task
    return next((TASKS.get((query.modality, MODALITIES[modality]), -1) for modality in modalities), -1)
