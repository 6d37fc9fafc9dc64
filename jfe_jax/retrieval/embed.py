"""Items → an index, a shard at a time, by all processes at once; what a killed run finished is not done again.

Each process embeds every P-th shard on its own devices, into one file that all of them can write (for several hosts, on
a shared file system).

Axes: B items, E embedding.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax

from jfe_jax.data.items import Item
from jfe_jax.errors import UserError
from jfe_jax.processes import is_first, meet
from jfe_jax.retrieval.index import IDS, MANIFEST, Index, Manifest
from jfe_jax.retrieval.retriever import Retriever
from jfe_jax.retrieval.search import require_finite
from jfe_jax.retrieval.storage import DTYPES, Storage, clear, remove

SHARD = 8192


class Source(Protocol):
    """What is to be embedded, as items_file.ItemsFile.

    Attributes:
      path: for people.
      ids: B names.
      digest: changes with the items.
    """

    path: Path
    ids: Sequence[str]
    digest: str

    def items(self, start: int, stop: int) -> list[Item]:
        """Items number start … stop - 1."""


class Embedded(NamedTuple):
    """What was done.

    Attributes:
      index: opened.
      shards: how many it has.
      kept: how many of them this process found finished.
    """

    index: Index
    shards: int
    kept: int


def embed(
    retriever: Retriever,
    source: Source,
    out: str | Path,
    *,
    dtype: str = "float32",
    shard: int = SHARD,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Writes the index `out`, or completes it, or finds that it is there.

    Finished shards, and a finished index, are kept if their checksums are right. Of the items, their text and the names
    of their images count, not the images' content.

    Args:
      dtype: one of storage.DTYPES: how the rows are stored.
      shard: items of a shard.
      overwrite: begin anew whatever is there.
      progress: called with the number of items done, or found done, since its last call.

    Raises:
      UserError: `out` holds something else (another checkpoint's embeddings, say), a finished index there is damaged,
        an item cannot be read, or an embedding is not finite.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: it is {', '.join(DTYPES)}")
    plan = {
        "items": len(source.ids),
        "width": retriever.width,
        "dtype": dtype,
        "shard": shard,
        "fingerprint": retriever.fingerprint,
        "source_digest": source.digest,
    }
    storage, first = Storage(out, plan), is_first()
    if overwrite and first:
        (out / MANIFEST).unlink(missing_ok=True)
        remove(out)
    meet("overwritten")
    if (out / MANIFEST).exists():
        return Embedded(_finished(out, plan, progress), storage.count, storage.count)
    if first:
        storage.begin()
    meet("begun")
    kept = 0
    for number in range(jax.process_index(), storage.count, jax.process_count()):
        start, stop = storage.bounds(number)
        if storage.finished(number):
            kept += 1
            if progress:
                progress(stop - start)
            continue
        names = source.ids[start:stop]
        rows = retriever.encode(source.items(start, stop), names=names, progress=progress)
        require_finite(rows, names, str(retriever.path))
        storage.write(number, rows)
    meet("embedded")
    if first:
        _finish(storage, retriever, source)
    meet("finished")
    return Embedded(Index.open(out), storage.count, kept)


def _finished(out: Path, plan: dict, progress: Callable[[int], None] | None) -> Index:
    index = Index.open(out)
    other = [name for name in plan if getattr(index.manifest, name) != plan[name]]
    if other:
        raise UserError(
            f"{out}: holds an index of another {' and '.join(other)} (made by {index.manifest.checkpoint} step "
            f"{index.manifest.step}); take another --out, or replace it with --overwrite"
        )
    index.require_undamaged()
    if progress:
        progress(plan["items"])
    return index


def _finish(storage: Storage, retriever: Retriever, source: Source) -> None:
    shards = storage.finish()
    part, digest = storage.folder / f"{IDS}.part", hashlib.sha256()
    with part.open("wb") as stream:
        for start in range(0, len(source.ids), SHARD):
            names = "".join(f"{one}\n" for one in source.ids[start : start + SHARD]).encode()
            digest.update(names)
            stream.write(names)
    os.replace(part, storage.folder / IDS)
    # Last: what has no manifest does not open.
    Manifest(
        **storage.plan,
        checkpoint=str(retriever.path.resolve()),
        step=retriever.step,
        source=str(source.path.resolve()),
        ids_digest=digest.hexdigest(),
        norm=max(shard.norm for shard in shards),
        score_error=max(shard.error for shard in shards),
        shards=shards,
    ).write(storage.folder)
    clear(storage.folder)
