"""Reads MMEB's evaluation files: a directory per task, a row per query with its own candidates.

    {task}/test-*.parquet       as published; or {task}/test*.jsonl with the same fields
    eval_images/ or images/     base directory of the rows' image paths; else the directory itself

A row is `qry_text`, `qry_img_path`, and the lists `tgt_text` and `tgt_img_path`. The first
target is the positive. `<|image_1|>`, the published model's image placeholder, is removed from the texts. "" means no
text or no image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jfe_jax.data.formats.mbeir_records import read_rows
from jfe_jax.errors import UserError

_IMAGE = "<|image_1|>"
_FIELDS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")

MmebContent = tuple[str | None, Path | None]


class MmebRow(NamedTuple):
    """A query and its candidates as (text, image), the positive first. `where` is its file and row number."""

    where: str
    query: MmebContent
    targets: list[MmebContent]


def find_task_files(path: Path) -> dict[str, list[Path]]:
    """Returns the tasks of a directory and their files; empty if it is no such directory."""
    found: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*/test*.parquet"), *path.glob("*/test*.jsonl")]):
        found.setdefault(file.parent.name, []).append(file)
    return found


def find_image_folder(path: Path) -> Path:
    """Returns the directory that image paths are relative to."""
    return next((path / name for name in ("eval_images", "images") if (path / name).is_dir()), path)


def read_task(files: list[Path], images: Path) -> Iterator[MmebRow]:
    """Yields the rows of a task.

    Raises:
      UserError: naming file and row: unreadable file, a missing field or one of the wrong type, no candidates, an item
        with neither text nor image, or a path that leaves the directory.
    """
    for file in files:
        for where, row in _read_parquet(file) if file.suffix == ".parquet" else read_rows(file):
            yield _parse_row(where, row, images)


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        # Closed explicitly: its memory map and threads would outlive a reader that stops early.
        with pyarrow.parquet.ParquetFile(file) as parquet:
            missing = set(_FIELDS) - set(parquet.schema_arrow.names)
            if missing:
                raise UserError(f"{file}: no column {', '.join(sorted(missing))}")
            number = 0
            for batch in parquet.iter_batches(256, columns=list(_FIELDS), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: not readable as Parquet ({str(error).splitlines()[0]})") from error


def _parse_row(where: str, row: Any, images: Path) -> MmebRow:
    if not isinstance(row, dict) or any(field not in row for field in _FIELDS):
        raise UserError(f"{where}: a row needs the fields {', '.join(_FIELDS)}")
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    if not (isinstance(texts, list) and isinstance(paths, list) and len(texts) == len(paths) and texts):
        raise UserError(f"{where}: tgt_text and tgt_img_path must be non-empty lists of equal length, the candidates")
    query = _parse_content(where, "the query", row["qry_text"], row["qry_img_path"], images)
    pairs = enumerate(zip(texts, paths, strict=True))
    return MmebRow(
        where, query, [_parse_content(where, f"candidate {number}", *pair, images) for number, pair in pairs]
    )


def _parse_content(where: str, name: str, text: Any, image: Any, images: Path) -> MmebContent:
    if not (isinstance(text, str | None) and isinstance(image, str | None)):
        raise UserError(f"{where}: text and image path of {name} must be strings or null")
    text = (text or "").replace(_IMAGE, "").strip() or None
    if not text and not image:
        raise UserError(f"{where}: {name} has neither text nor image")
    if image and (image.startswith(("/", "\\")) or ".." in image.replace("\\", "/").split("/")):
        raise UserError(f"{where}: the image path {image!r} of {name} leaves the directory")
    return text, images / image if image else None
