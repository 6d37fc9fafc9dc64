"""Validates the images that rows refer to: checks that they exist and can be decoded."""

import os
import random
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from jfe_jax.data.image_transforms import decode
from jfe_jax.data.prepare.validation_report import DefectKind, ValidationReport
from jfe_jax.data.storage.tar_archive import find_archives
from jfe_jax.errors import UserError

ImageMode = Literal["none", "sample", "all"]
# Number of images decoded as the sample of one file of rows.
SAMPLE_SIZE = 200
_DECODE_BATCH = 256


class ImageValidator:
    """Checks that the images of rows exist while the rows are read, and decodes some or all of them.

    Args:
      root: M-BEIR directory. If it has no mbeir_images/ but the archive of that name, images are searched in the
        archive. That takes a pass over all of it, and is done only if `mode` is not "none".
      mode: "none" decodes no image, "sample" at most SAMPLE_SIZE per file of rows, "all" every one.
    """

    def __init__(self, root: Path, mode: ImageMode, report: ValidationReport):
        self._root, self._mode, self._report = root, mode, report
        self._archive = None if (root / "mbeir_images").is_dir() else next(iter(find_archives(root)), None)
        self._seen: set[int] = set()
        self._jobs: list[_ImageJob] = []
        self._pool = ThreadPoolExecutor(os.cpu_count())
        # The sample of each file of rows, and the number of images it was drawn from.
        self._sample: dict[Path, list[_ImageJob]] = {}
        self._drawn_from: Counter[Path] = Counter()
        # Images expected in the archive: hash of the path, index of the file of rows, line.
        self._wanted, self._files, self._lines = array("q"), array("h"), array("q")
        self._file_numbers: dict[Path, int] = {}

    def add(self, file: Path, line: int, image: Path | None) -> None:
        """Registers `image`, which the row on `line` of `file` refers to."""
        if image is None or (self._archive and self._mode == "none"):
            return
        path = os.fspath(image)
        if not self._archive and not os.path.isfile(path):
            self._report.add("error", "missing_image", file, line, f"no image {path}")
            return
        key = hash(path)
        if self._mode == "none" or key in self._seen:
            return
        self._seen.add(key)
        if self._archive:
            self._wanted.append(key)
            self._files.append(self._file_numbers.setdefault(file, len(self._file_numbers)))
            self._lines.append(line)
        job = _ImageJob(file, line, path, Path(path))
        if self._mode == "sample":
            self._sample_image(job)
        elif not self._archive:
            self._enqueue(job)

    def finish(self) -> None:
        """Decodes the remaining images, and notes in the report what was done."""
        sample = [job for jobs in self._sample.values() for job in jobs]
        if self._archive and self._mode != "none":
            self._read_archive({hash(job.name) for job in sample})
        else:
            for job in sample:
                self._enqueue(job)
        self._decode_pending()
        self._pool.shutdown()
        if self._archive and self._mode == "none":
            self._report.images = f"images are in {self._archive} and were not looked for (--images does)"
        else:
            self._report.images = f"{self._report.images_opened} images opened"

    def _sample_image(self, job: "_ImageJob") -> None:
        # Reservoir sampling, seeded by file and row, so that the same directory gives the same sample.
        chosen = self._sample.setdefault(job.file, [])
        self._drawn_from[job.file] += 1
        if len(chosen) < SAMPLE_SIZE:
            chosen.append(job)
            return
        slot = random.Random(f"{job.file.name}:{job.line}").randrange(self._drawn_from[job.file])
        if slot < SAMPLE_SIZE:
            chosen[slot] = job

    def _enqueue(self, job: "_ImageJob") -> None:
        self._jobs.append(job)
        if len(self._jobs) == _DECODE_BATCH:
            self._decode_pending()

    def _decode_pending(self) -> None:
        # Pillow releases the GIL while it decodes.
        for job, problem in zip(self._jobs, self._pool.map(_find_image_defect, self._jobs), strict=True):
            self._report.images_opened += 1
            if problem:
                kind, message = problem
                self._report.add("error", kind, job.file, job.line, message)
        self._jobs.clear()

    def _read_archive(self, sample: set[int]) -> None:
        files, archive = list(self._file_numbers), self._archive
        wanted = np.array(self._wanted)
        order = np.argsort(wanted)
        wanted, found = wanted[order], np.zeros(len(order), bool)
        try:
            for name, read in archive.files():
                key = hash(os.path.join(self._root, name))
                at = int(np.searchsorted(wanted, key))
                if at == len(wanted) or wanted[at] != key or found[at]:
                    continue
                found[at] = True
                if self._mode == "all" or key in sample:
                    file, line = files[self._files[order[at]]], self._lines[order[at]]
                    self._enqueue(_ImageJob(file, line, f"{name} in {archive}", read()))
        except UserError as error:
            self._report.add("error", "unreadable_image", archive, 0, str(error).removeprefix(f"{archive}: "))
        for index in np.sort(order[~found]):
            message = f"the image that this row names is not in {archive}"
            self._report.add("error", "missing_image", files[self._files[index]], self._lines[index], message)


class _ImageJob(NamedTuple):
    """An image to decode: the row that refers to it, its name in errors, its file or bytes."""

    file: Path
    line: int
    name: str
    image: Path | bytes


def _find_image_defect(job: _ImageJob) -> tuple[DefectKind, str] | None:
    try:
        decode(job.image, job.name)
    except UserError as error:
        bomb = isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning)
        return "huge_image" if bomb else "unreadable_image", str(error)
    return None
