"""Imports a source of pairs once into the text files of an M-BEIR directory, and locates its images."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.formats.mbeir_writer import write_pairs
from jfe_jax.data.formats.pair_formats import FORMATS, find_tfds_directory
from jfe_jax.data.ids import MAX_DATASET_ID
from jfe_jax.data.storage.image_source import ImageSource
from jfe_jax.errors import UserError

SOURCES = "sources"


def import_pairs(
    source: Path, out: Path, *, kind: str, name: str, number: int, images: Path | None = None
) -> tuple[Mbeir, ImageSource]:
    """Writes OUT/sources/{name}, unless it exists and the source's files are unchanged (by name, size and time).

    Args:
      kind: one of FORMATS.
      name: name of the data set; its units are {name}_task{t}.
      number: id of the data set, from which the integer ids of its candidates are derived.
      images: directory that image paths are relative to; for a TFDS data set given by name, its data_dir.

    Raises:
      UserError: the source cannot be read, or name or number are taken or invalid.
    """
    if kind == "tfds" and not source.exists():
        source = find_tfds_directory(str(source), images)
    if not source.exists():
        raise UserError(f"{source}: no such file or directory")
    if not re.fullmatch(r"[a-z0-9]+", name):
        raise UserError(f"--name {name!r}: lower-case letters and digits only")
    if not 0 <= number <= MAX_DATASET_ID:
        raise UserError(f"--number {number}: must be from 0 to {MAX_DATASET_ID}")
    for taken in (out / SOURCES).glob("*/source.json"):
        if taken.parent.name != name and json.loads(taken.read_text(encoding="utf-8"))["number"] == number:
            raise UserError(f"--number {number} is {taken.parent.name}'s in {out}; give another")
    pairs, image_source = FORMATS[kind](source, images)
    directory, manifest = out / SOURCES / name, {"kind": kind, "number": number, "digest": _digest(source)}
    if not (directory / "source.json").is_file() or json.loads((directory / "source.json").read_text()) != manifest:
        partial = directory.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_pairs(partial, name, number, pairs)
        (partial / "source.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    return Mbeir(directory), image_source


def _digest(source: Path) -> str:
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(source.parent)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
