"""Writes ArrayRecord shards one after the other. Finished shards survive a kill and are reused."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python import array_record_module

from jfe_jax.data.storage.tf_example import Example

# The time to read a record grows with the number of records in its shard (5 µs + 3 µs per thousand). Shards are
# therefore small, as long as there are not too many of them to hold open.
MIN_RECORDS_PER_SHARD, MAX_SHARDS = 4096, 128

Record = dict[str, str | bytes | int | list[int]]


class RecordShard(NamedTuple):
    """A finished shard."""

    file: Path
    records: int
    size: int


class RecordShardWriter:
    """Writes records into a directory.

    Args:
      directory: created if it is missing; shards of another `source` are removed from it.
      source: fingerprint of the data that the records are made from.
      expected: approximate number of records.

    Attributes:
      finished: the finished shards, those of an earlier run first.
      before_finish: called with a shard's number before it counts as finished.
    """

    def __init__(self, directory: Path, source: str, expected: int):
        self.directory = directory
        self.records_per_shard = max(MIN_RECORDS_PER_SHARD, -(-expected // MAX_SHARDS))
        source_file, text = directory / "source", f"{source} {self.records_per_shard}"
        if not source_file.is_file() or source_file.read_text(encoding="utf-8") != text:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            source_file.write_text(text, encoding="utf-8")
        self.finished = _find_finished_shards(directory)
        self.before_finish: Callable[[int], None] = lambda _: None
        self._writer: Any = None
        self._count = self._size = 0

    @property
    def records(self) -> int:
        """Number of records in finished shards."""
        return sum(shard.records for shard in self.finished)

    def write(self, record: Record) -> bool:
        """Adds a record. Returns True if it completed its shard, which is then finished."""
        if self._writer is None:
            # One record per group, so that a random read reads nothing else. Images are already compressed.
            self._writer = array_record_module.ArrayRecordWriter(str(self._partial), "group_size:1,uncompressed")
        content = serialize(record)
        self._writer.write(content)
        self._count += 1
        self._size += len(content)
        if self._count == self.records_per_shard:
            self.close()
            return True
        return False

    def close(self) -> None:
        """Finishes the current shard."""
        if self._writer is None:
            return
        self._writer.close()
        self.before_finish(len(self.finished))
        file = self.directory / f"{len(self.finished):05d}-{self._count}-{self._size}.shard"
        # Renaming is atomic: a shard with its final name is complete.
        os.replace(self._partial, file)
        self.finished.append(RecordShard(file, self._count, self._size))
        self._writer, self._count, self._size = None, 0, 0

    @property
    def _partial(self) -> Path:
        return self.directory / "partial"


def write_remaining(writer: RecordShardWriter, records: Iterable[Record]) -> None:
    """Writes the records that are not in finished shards yet."""
    done = writer.records
    for number, record in enumerate(records):
        if number >= done:
            writer.write(record)
    writer.close()


def serialize(record: Record) -> bytes:
    """Serializes a record as a tf.train.Example with TFDS's layout."""
    example = Example()
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


def _find_finished_shards(directory: Path) -> list[RecordShard]:
    shards = []
    for file in sorted(directory.glob("*.shard")):
        number, records, size = map(int, re.fullmatch(r"(\d+)-(\d+)-(\d+)\.shard", file.name).groups())
        if number != len(shards):
            break
        shards.append(RecordShard(file, records, size))
    return shards
