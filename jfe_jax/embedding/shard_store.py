"""Embeddings in a file that is written a shard at a time, by several processes at once, and taken up again.

    embeddings.npy.part    [B, E] in its final size from the start; each shard's rows are written at their place
    scales.npy.part        float32 [B], for int8 only
    plan.json              what it is made of: another plan is never mixed in
    shards/{number}.json   a finished shard: its checksum, and what its rows are

Once all shards are there the parts get their names.

Axes: B items, E embedding.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfe_jax.errors import UserError

DTYPES = ("float32", "float16", "int8")
EMBEDDINGS, SCALES, PLAN, SHARDS = "embeddings.npy", "scales.npy", "plan.json", "shards"


class Shard(NamedTuple):
    """A finished shard.

    Attributes:
      start, stop: its rows.
      sha256: of the rows as stored, and of their scales.
      norm: the length of its longest row as stored.
      error: the longest difference between a row and what is stored of it: so much can its score with a query of
        length 1 be off.
      cut: how many of its texts were cut.
    """

    start: int
    stop: int
    sha256: str
    norm: float
    error: float
    cut: int = 0


def encode(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 [n, E] → as stored, and the scale of each row for int8: its largest component is 127 there."""
    if dtype != "int8":
        return rows.astype(dtype), None
    scales = (np.abs(rows).max(1) / 127).astype(np.float32)
    # A row of zeros is what it is with any scale.
    return np.rint(rows / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8), scales


def decode(stored: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """What is stored → float32 [n, E]."""
    rows = stored.astype(np.float32)
    return rows if scales is None else rows * scales[:, None]


class ShardStore:
    """The file being written.

    Args:
      folder: where; is made.
      plan: JSON with "items" = B, "width" = E, "dtype" and "shard" = rows of a shard, and whatever else must be the
        same for the shards to belong together.

    Raises:
      UserError: another plan was begun in `folder`.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]):
        self.folder, self.plan = folder, plan
        shape = (plan["items"], plan["width"])
        self._dtype = np.dtype(plan["dtype"])
        self._paths = {EMBEDDINGS: (shape, self._dtype)}
        if plan["dtype"] == "int8":
            self._paths[SCALES] = (shape[:1], np.dtype(np.float32))

    def begin(self) -> None:
        """Makes the files, or finds those of the same plan; one process calls it, before any other does anything."""
        file = self.folder / PLAN
        try:
            same = not file.exists() or json.loads(file.read_text(encoding="utf-8")) == self.plan
        except ValueError as error:
            raise UserError(f"{file}: damaged ({error}); begin anew with --overwrite") from error
        if not same:
            raise UserError(
                f"{self.folder}: holds the unfinished embeddings of another checkpoint, other items or other settings; "
                "take another --out, or begin anew with --overwrite"
            )
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        for name, (shape, dtype) in self._paths.items():
            part = self.folder / f"{name}.part"
            if file.exists() and not part.exists() and (self.folder / name).exists():
                # Killed while it gave the files their names.
                os.replace(self.folder / name, part)
            if file.exists() and part.exists():
                continue
            with open(part, "wb") as stream:
                np.lib.format.write_array_header_1_0(
                    stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                )
                stream.truncate(stream.tell() + int(np.prod(shape)) * dtype.itemsize)
        write_json(file, self.plan)

    @property
    def count(self) -> int:
        """Shards in all."""
        return -(-self.plan["items"] // self.plan["shard"])

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        start = number * self.plan["shard"]
        return start, min(start + self.plan["shard"], self.plan["items"])

    def finished(self, number: int) -> Shard | None:
        """The shard, if it is there and its rows are as they were written."""
        file = self.folder / SHARDS / f"{number}.json"
        try:
            shard = Shard(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        same = (shard.start, shard.stop) == self.bounds(number) and self._checksum(shard, ".part") == shard.sha256
        return shard if same else None

    def write(self, number: int, rows: np.ndarray, cut: int = 0) -> Shard:
        """Writes a shard's rows, float32 [n, E]; `cut` as Shard has it."""
        start, stop = self.bounds(number)
        stored, scales = encode(rows, self.plan["dtype"])
        decoded = decode(stored, scales)
        for name, part in ((EMBEDDINGS, stored), (SCALES, scales)):
            if part is not None:
                self._at(name, start, part)
        norm, error = (float(np.linalg.norm(one, axis=1).max()) for one in (decoded, decoded - rows))
        digest = hashlib.sha256(np.ascontiguousarray(stored))
        if scales is not None:
            digest.update(scales)
        shard = Shard(start, stop, digest.hexdigest(), norm, error, cut)
        write_json(self.folder / SHARDS / f"{number}.json", shard._asdict())
        return shard

    def finish(self) -> list[Shard]:
        """Gives the files their names once all shards are there; one process calls it, after all others are done.

        Raises:
          UserError: a shard is missing.
        """
        shards = []
        for number in range(self.count):
            file = self.folder / SHARDS / f"{number}.json"
            if not file.exists():
                raise UserError(f"{self.folder}: shard {number} is missing; run the same command again")
            shards.append(Shard(**json.loads(file.read_text(encoding="utf-8"))))
        for name in self._paths:
            os.replace(self.folder / f"{name}.part", self.folder / name)
        return shards

    def damaged(self, shards: list[Shard]) -> list[Shard]:
        """Those shards of a finished file that are not as they were written."""
        return [shard for shard in shards if self._checksum(shard, "") != shard.sha256]

    def _at(self, name: str, start: int, rows: np.ndarray) -> None:
        path = self.folder / f"{name}.part"
        left = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        at = self._offset(path) + start * (rows.nbytes // len(rows))
        file = os.open(path, os.O_WRONLY)
        try:
            while left:
                done = os.pwrite(file, left, at)
                left, at = left[done:], at + done
            os.fsync(file)
        finally:
            os.close(file)

    def _checksum(self, shard: Shard, suffix: str) -> str | None:
        digest = hashlib.sha256()
        for name, (shape, dtype) in self._paths.items():
            row = dtype.itemsize * int(np.prod(shape[1:]))
            try:
                with open(self.folder / f"{name}{suffix}", "rb") as stream:
                    stream.seek(self._offset(stream.name) + shard.start * row)
                    digest.update(stream.read((shard.stop - shard.start) * row))
            except (OSError, ValueError):
                return None
        return digest.hexdigest()

    def _offset(self, path: str | Path) -> int:
        return np.load(path, mmap_mode="r").offset


def remove(folder: Path) -> None:
    """Takes away what a ShardStore wrote."""
    for name in (EMBEDDINGS, SCALES):
        for suffix in ("", ".part"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    clear(folder)


def clear(folder: Path) -> None:
    """Removes the files that only unfinished embeddings need, and nobody else's.

    The plan goes first, so that what is left is not taken for unfinished embeddings.
    """
    (folder / PLAN).unlink(missing_ok=True)
    for file in (folder / SHARDS).glob("*.json*"):
        if file.name.partition(".")[0].isdecimal():
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / SHARDS).rmdir()


def write_json(file: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)
