"""Images → the shards of the parts that want them, in one pass over where they come from."""

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

_AT_ONCE = 64
_JPEG_QUALITY = 92


@dataclass(kw_only=True)
class ImagePart:
    """A part that wants images.

    Attributes:
      ids: int64, sorted: those it wants.
      names: gives their names, any number of times each.
      staging: directory of its shards.
      missing: what could not be had, as a line for each.
    """

    name: str
    fingerprint: str
    ids: np.ndarray
    names: Callable[[], Iterator[str]]
    staging: Path
    missing: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Finds out what is there from a run that was killed."""
        self.writer = RecordShardWriter(self.staging, self.fingerprint, len(self.ids))
        finished = [self._ids_file(number) for number in range(len(self.writer.finished))]
        # Numbers of eight bytes: there are millions.
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
        """Notes what cannot be had.

        Raises:
          UserError: that is more than the share `max_bad_share` of all.
        """
        self.missing.append(problem)
        if len(self.missing) > max_bad_share * len(self.ids):
            raise UserError(
                f"{problem}; {len(self.missing)} of the {len(self.ids)} images of {self.name} cannot be had, more than "
                f"the share of {max_bad_share:g} that --max-bad-share allows"
            )

    def _ids_file(self, number: int) -> Path:
        return self.staging / f"{number:05d}.ids.npy"

    def _save_ids(self, number: int) -> None:
        np.save(self._ids_file(number), np.array(self._new, np.int64))
        self._new = []


class _Job(NamedTuple):
    key: int
    name: str
    read: Callable[[], bytes]
    parts: list[int]


def write_image_shards(
    parts: list[ImagePart], source: ImageSource, *, short_side: int, max_bad_share: float, tick: Callable[[int], None]
) -> None:
    """Writes what the parts want into their staging directories; what is in finished shards is not read again.

    Args:
      short_side: an image whose shorter side is longer is made so small and written as JPEG; 0 leaves all as they are.
      max_bad_share: the share of a part's images that may be missing or unreadable.
      tick: called with the number of images just done.

    Raises:
      UserError: more than that cannot be had.
    """
    for part in parts:
        part.open()
        tick(len(part.written))
    left = [np.setdiff1d(part.ids, np.array(part.written, np.int64)) for part in parts]
    ids = np.concatenate(left) if left else np.zeros(0, np.int64)
    owners = np.repeat(np.arange(len(parts)), [len(one) for one in left])
    order = np.argsort(ids, kind="stable")
    ids, owners, found = ids[order], owners[order], np.zeros(len(ids), bool)

    def wanted() -> Iterator[str]:
        for part in parts:
            yield from part.names()

    def finish(jobs: list[_Job]) -> None:
        results = pool.map(lambda job: _encode_image(job, source.describe_location(job.name), short_side), jobs)
        for job, (content, problem) in zip(jobs, results, strict=True):
            for number in job.parts:
                if content is None:
                    parts[number].fail(problem, max_bad_share)
                else:
                    parts[number].add(job.key, content)
                tick(1)
        jobs.clear()

    jobs: list[_Job] = []
    # Pillow releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, read in source.iter_images(wanted()) if len(ids) else ():
            key = name_id(name)
            start, end = np.searchsorted(ids, key), np.searchsorted(ids, key, "right")
            if start == end or found[start]:
                continue
            found[start:end] = True
            if source.sequential_only:
                content = read()
                read = lambda content=content: content  # noqa: E731
            jobs.append(_Job(key, name, read, owners[start:end].tolist()))
            if len(jobs) == _AT_ONCE:
                finish(jobs)
        finish(jobs)
    if not found.all():
        gone = {int(key) for key in ids[~found]}
        for part in parts:
            for name in dict.fromkeys(name for name in part.names() if name_id(name) in gone):
                part.fail(f"{name}: not in {source}", max_bad_share)
    for part in parts:
        part.writer.close()


def _encode_image(job: _Job, where: str, short_side: int) -> tuple[bytes | None, str]:
    try:
        content = job.read()
        image = decode(content, where)
    except UserError as error:
        return None, str(error)
    least = min(image.size)
    if not short_side or least <= short_side:
        return content, ""
    size = tuple(max(1, round(side * short_side / least)) for side in image.size)
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue(), ""
