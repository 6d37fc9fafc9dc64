"""ArrayRecord shards that are written one after the other and survive a kill: the finished ones are kept."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python import array_record_module

from jfe_jax.data.storage.tf_example import Example

# Reading a record takes time in proportion to the records of its shard (5 µs + 3 µs for each thousand), so shards are
# small, as long as that does not make them too many to hold open.
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
      directory: made if it is missing; what it holds of another `source` is removed.
      source: fingerprint of what the records are made of.
      expected: about how many there will be.

    Attributes:
      finished: the shards there are, those of an earlier run first.
      before_finish: called before a shard counts as finished, with its number.
    """

    def __init__(self, directory: Path, source: str, expected: int):
        self.directory = directory
        self.per_shard = max(MIN_RECORDS_PER_SHARD, -(-expected // MAX_SHARDS))
        mark, text = directory / "source", f"{source} {self.per_shard}"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != text:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            mark.write_text(text, encoding="utf-8")
        self.finished = _finished(directory)
        self.before_finish: Callable[[int], None] = lambda _: None
        self._writer: Any = None
        self._count = self._size = 0

    @property
    def records(self) -> int:
        """In finished shards."""
        return sum(shard.records for shard in self.finished)

    def write(self, record: Record) -> bool:
        """Adds a record; True if it was the last of its shard, which is then finished."""
        if self._writer is None:
            # One record a group: a random read reads nothing else. Images are compressed as they are.
            self._writer = array_record_module.ArrayRecordWriter(str(self._partial), "group_size:1,uncompressed")
        content = serialize(record)
        self._writer.write(content)
        self._count += 1
        self._size += len(content)
        if self._count == self.per_shard:
            self.close()
            return True
        return False

    def close(self) -> None:
        """Finishes the shard in hand."""
        if self._writer is None:
            return
        self._writer.close()
        self.before_finish(len(self.finished))
        file = self.directory / f"{len(self.finished):05d}-{self._count}-{self._size}.shard"
        # Its name says that it is whole.
        os.replace(self._partial, file)
        self.finished.append(RecordShard(file, self._count, self._size))
        self._writer, self._count, self._size = None, 0, 0

    @property
    def _partial(self) -> Path:
        return self.directory / "partial"


def write_remaining(writer: RecordShardWriter, records: Iterable[Record]) -> None:
    """Writes those of the records that are not in finished shards yet."""
    done = writer.records
    for number, record in enumerate(records):
        if number >= done:
            writer.write(record)
    writer.close()


def serialize(record: Record) -> bytes:
    """A record as a tf.train.Example, as TFDS lays one out."""
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


def _finished(directory: Path) -> list[RecordShard]:
    shards = []
    for file in sorted(directory.glob("*.shard")):
        number, records, size = map(int, re.fullmatch(r"(\d+)-(\d+)-(\d+)\.shard", file.name).groups())
        if number != len(shards):
            break
        shards.append(RecordShard(file, records, size))
    return shards
