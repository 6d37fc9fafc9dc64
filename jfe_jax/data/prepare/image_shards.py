"""Writes images into the shards of the parts that need them, in one pass over the image source."""

import io
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jfe_jax.data.ids import name_id
from jfe_jax.data.image_transforms import decode
from jfe_jax.data.storage.image_source import ImageSource
from jfe_jax.data.storage.shard_writer import RecordShardWriter
from jfe_jax.errors import UserError

_DECODE_BATCH = 64
_JPEG_QUALITY = 92


@dataclass(kw_only=True)
class ImagePart:
    """A part of images to write.

    Attributes:
      ids: int64, sorted: the images it needs.
      names: yields their names; a name may repeat.
      staging: directory of its shards.
      missing: one line for each image that could not be read.
    """

    name: str
    fingerprint: str
    ids: np.ndarray
    names: Callable[[], Iterator[str]]
    staging: Path
    missing: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Loads the finished shards of a run that was killed."""
        self.writer = RecordShardWriter(self.staging, self.fingerprint, len(self.ids))
        finished = [self._ids_file(number) for number in range(len(self.writer.finished))]
        # Eight bytes per id: there are millions.
        self.written = array("q")
        for file in finished:
            self.written.frombytes(np.load(file).tobytes())
        self._new: list[int] = []
        self.writer.before_finish = self._save_ids

    def add(self, key: int, content: bytes) -> None:
        self._new.append(key)
        self.written.append(key)
        self.writer.write({"image_id": key, "image": content})

    def fail(self, problem: str, max_bad_share: float) -> None:
        """Records an image that cannot be read.

        Raises:
          UserError: the share of such images exceeds `max_bad_share`.
        """
        self.missing.append(problem)
        if len(self.missing) > max_bad_share * len(self.ids):
            raise UserError(
                f"{problem}; {len(self.missing)} of the {len(self.ids)} images of {self.name} cannot be read, more "
                f"than the share of {max_bad_share:g} that --max-bad-share allows"
            )

    def _ids_file(self, number: int) -> Path:
        return self.staging / f"{number:05d}.ids.npy"

    def _save_ids(self, number: int) -> None:
        np.save(self._ids_file(number), np.array(self._new, np.int64))
        self._new = []


class _EncodeJob(NamedTuple):
    key: int
    name: str
    read: Callable[[], bytes]
    parts: list[int]


def write_image_shards(
    parts: list[ImagePart], source: ImageSource, *, short_side: int, max_bad_share: float, tick: Callable[[int], None]
) -> None:
    """Writes the parts' images into their staging directories. Images in finished shards are not read again.

    Args:
      short_side: an image whose shorter side exceeds this is downscaled to it and written as JPEG; 0 disables this.
      max_bad_share: the share of a part's images that may be missing or unreadable.
      tick: called with the number of images just processed.

    Raises:
      UserError: more images than `max_bad_share` allows are missing or unreadable.
    """
    for part in parts:
        part.open()
        tick(len(part.written))
    remaining = [np.setdiff1d(part.ids, np.array(part.written, np.int64)) for part in parts]
    ids = np.concatenate(remaining) if remaining else np.zeros(0, np.int64)
    owners = np.repeat(np.arange(len(parts)), [len(part_ids) for part_ids in remaining])
    order = np.argsort(ids, kind="stable")
    ids, owners, found = ids[order], owners[order], np.zeros(len(ids), bool)

    def needed_names() -> Iterator[str]:
        for part in parts:
            yield from part.names()

    def finish(jobs: list[_EncodeJob]) -> None:
        results = pool.map(lambda job: _encode_image(job, source.describe_location(job.name), short_side), jobs)
        for job, (content, problem) in zip(jobs, results, strict=True):
            for number in job.parts:
                if content is None:
                    parts[number].fail(problem, max_bad_share)
                else:
                    parts[number].add(job.key, content)
                tick(1)
        jobs.clear()

    jobs: list[_EncodeJob] = []
    # Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, read in source.iter_images(needed_names()) if len(ids) else ():
            key = name_id(name)
            start, end = np.searchsorted(ids, key), np.searchsorted(ids, key, "right")
            if start == end or found[start]:
                continue
            found[start:end] = True
            if source.sequential_only:
                content = read()
                read = lambda content=content: content  # noqa: E731
            jobs.append(_EncodeJob(key, name, read, owners[start:end].tolist()))
            if len(jobs) == _DECODE_BATCH:
                finish(jobs)
        finish(jobs)
    if not found.all():
        not_found = {int(key) for key in ids[~found]}
        for part in parts:
            for name in dict.fromkeys(name for name in part.names() if name_id(name) in not_found):
                part.fail(f"{name}: not in {source}", max_bad_share)
    for part in parts:
        part.writer.close()


def _encode_image(job: _EncodeJob, where: str, short_side: int) -> tuple[bytes | None, str]:
    try:
        content = job.read()
        image = decode(content, where)
    except UserError as error:
        return None, str(error)
    shorter_side = min(image.size)
    if not short_side or shorter_side <= short_side:
        return content, ""
    size = tuple(max(1, round(side * short_side / shorter_side)) for side in image.size)
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue(), ""
