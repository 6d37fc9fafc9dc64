"""A file of items → an index: embeddings on disk with what is needed to use them safely.

An index is a directory: `embeddings.npy` (float32 [B, E], unit rows, the order of the items), `ids.txt` (one a line)
and `manifest.json` (which checkpoint made it).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jfe_jax.data.items import Item
from jfe_jax.errors import UserError
from jfe_jax.retrieval.retriever import Retriever
from jfe_jax.retrieval.search import require_finite

_KEYS = ("id", "instruction", "text", "image")
CHUNK = 4096


@dataclass(frozen=True)
class Index:
    """An embedded pool, opened.

    Attributes:
      ids: B names.
      embeddings: float32 [B, E], a memory map.
      checkpoint, step, fingerprint: which model made it.
      source: the JSONL file of its items.
    """

    path: Path
    ids: list[str]
    embeddings: np.ndarray
    checkpoint: str
    step: int
    fingerprint: str
    source: str

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Raises UserError if `path` is no index or its parts do not belong together."""
        path = Path(path)
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            ids = (path / "ids.txt").read_text(encoding="utf-8").split("\n")[:-1]
            embeddings = np.load(path / "embeddings.npy", mmap_mode="r")
            if not len(ids) == len(embeddings) == manifest["items"]:
                raise ValueError(f"{len(ids)} ids, {len(embeddings)} embeddings, {manifest['items']} in the manifest")
            made_by = {key: manifest[key] for key in ("checkpoint", "step", "fingerprint", "source")}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: no index, or a broken one ({error}); make it with `jfe embed`") from error
        return cls(path, ids, embeddings, **made_by)

    def require_made_by(self, retriever: Retriever) -> None:
        """Raises UserError if another model made the index: its vectors would mean nothing to this one."""
        if retriever.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.path}: made by {self.checkpoint} step {self.step} ({self.fingerprint}), not by "
                f"{retriever.path} step {retriever.step} ({retriever.fingerprint}); embed it again, or give its maker "
                "as --checkpoint"
            )


def read_items(path: str | Path) -> Iterator[tuple[str, Item]]:
    """Lines `{"id", "instruction", "text", "image"}` of a JSONL file; image paths are relative to the file's folder.

    Raises:
      UserError: naming file and line: not JSON, an unknown key, no id or one seen before, neither text nor image.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parsed(line, f"{path}:{number}", path.parent, seen, number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error


def embed_items(
    retriever: Retriever,
    named: Iterable[tuple[str, Item]],
    progress: Callable[[int], None] | None = None,
) -> tuple[list[str], np.ndarray]:
    """Ids and float32 [B, E] of a stream of items, read a chunk at a time.

    Raises:
      UserError: an item cannot be read, or an embedding is not finite.
    """
    ids: list[str] = []
    parts = [np.zeros((0, retriever.width), np.float32)]
    for chunk in _chunks(named, CHUNK):
        names = [name for name, _ in chunk]
        rows = retriever.encode([item for _, item in chunk], names=names, progress=progress)
        require_finite(rows, names, str(retriever.path))
        ids += names
        parts.append(rows)
    return ids, np.concatenate(parts)


def write_index(
    out: str | Path, retriever: Retriever, ids: Sequence[str], embeddings: np.ndarray, source: str | Path
) -> None:
    """Writes an index; the manifest comes last, so that a killed run leaves nothing that opens."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    np.save(out / "embeddings.npy", embeddings)
    (out / "ids.txt").write_text("".join(f"{one}\n" for one in ids), encoding="utf-8")
    manifest = {
        "items": len(ids),
        "width": int(embeddings.shape[1]),
        "dtype": str(embeddings.dtype),
        "checkpoint": str(retriever.path.resolve()),
        "step": retriever.step,
        "fingerprint": retriever.fingerprint,
        "source": str(Path(source).resolve()),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _parsed(line: str, where: str, folder: Path, seen: dict[str, int], number: int) -> tuple[str, Item]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object with the keys {', '.join(_KEYS)} is wanted")
    for key, value in record.items():
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}; the keys are {', '.join(_KEYS)}")
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key!r} must be a string or null, not {value!r}")
    name = record.get("id")
    if not name or "\n" in name or "\r" in name:
        raise UserError(f'{where}: "id" must be a non-empty string of one line')
    if name in seen:
        raise UserError(f"{where}: id {name!r} was already used in line {seen[name]}")
    seen[name] = number
    text, image = record.get("text"), record.get("image")
    if not text and not image:
        raise UserError(f"{where}: {name!r} has neither text nor image; give it one of them")
    image_path = folder / image if image else None
    if image_path is not None and not image_path.is_file():
        raise UserError(f"{where}: no image {image_path}")
    return name, Item(text=text, image=image_path, instruction=record.get("instruction"))


def _chunks(stream: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for one in stream:
        chunk.append(one)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
