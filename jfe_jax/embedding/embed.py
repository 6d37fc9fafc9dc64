"""Items → an index, a shard at a time, by all processes at once; what a killed run finished is not done again.

Each process embeds every P-th shard on its own devices, into one file that all of them can write (for several hosts, on
a shared file system).

Axes: B items, E embedding.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax

from jfe_jax.data.item import Item
from jfe_jax.embedding.index import IDS, MANIFEST, Index, Manifest
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.embedding.row_source import require_finite
from jfe_jax.embedding.shard_store import DTYPES, EMBEDDINGS, PLAN, SCALES, ShardStore, clear, remove
from jfe_jax.errors import UserError
from jfe_jax.parallel.distributed import all_or_none, is_process_zero, on_process_zero

SHARD = 8192
# Names that people give to files of their own, too.
_OWN_FILES = (EMBEDDINGS, SCALES, IDS)
# A process that fails leaves this file, so that the others do not go on for hours.
_FAILED = "failed"


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
      dtype: one of shard_store.DTYPES: how the rows are stored.
      shard: items of a shard.
      overwrite: begin anew whatever is there.
      progress: called with the number of items done, or found done, since its last call.

    Raises:
      UserError: `out` holds something else (another checkpoint's embeddings, say), a finished index there is damaged,
        an item cannot be read, or an embedding is not finite; if only one process meets it, in all of them.
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
    _require_same(plan, f"{retriever.path} and {source.path}")
    store = ShardStore(out, plan)
    finished, kept = on_process_zero(lambda: _begin(store, overwrite)), store.count
    if finished:
        if progress:
            progress(len(source.ids))
    else:
        with all_or_none():
            kept = _embed_share(retriever, source, store, progress)
        with all_or_none():
            if is_process_zero():
                _finish(store, retriever, source)
    with all_or_none():
        index = Index.open(out)
    return Embedded(index, store.count, kept)


def _require_same(plan: dict, what: str) -> None:
    """All processes are to do the same."""
    firsts = on_process_zero(lambda: plan)
    with all_or_none():
        if other := [name for name in plan if plan[name] != firsts[name]]:
            raise UserError(
                f"{what}: process {jax.process_index()} finds another {' and '.join(other)} there than process 0; is "
                "it the same on all hosts?"
            )


def _begin(store: ShardStore, overwrite: bool) -> bool:
    """Whether there is nothing left to do."""
    out = store.folder
    if overwrite:
        (out / MANIFEST).unlink(missing_ok=True)
        remove(out)
        (out / IDS).unlink(missing_ok=True)
    if (out / MANIFEST).exists():
        _require_finished(out, store.plan)
        return True
    if not (out / PLAN).exists() and (foreign := [name for name in _OWN_FILES if (out / name).exists()]):
        raise UserError(
            f"{out}: holds {' and '.join(foreign)} but no {MANIFEST}, so `jfe embed` did not write it; choose another "
            "--out, or replace it with --overwrite"
        )
    store.begin()
    (out / _FAILED).unlink(missing_ok=True)
    return False


def _embed_share(
    retriever: Retriever, source: Source, store: ShardStore, progress: Callable[[int], None] | None
) -> int:
    """This process's shards; how many of them were there."""
    kept, failed, several = 0, store.folder / _FAILED, jax.process_count() > 1
    try:
        for number in range(jax.process_index(), store.count, jax.process_count()):
            start, stop = store.bounds(number)
            if store.finished(number):
                kept += 1
                if progress:
                    progress(stop - start)
                continue
            if several and failed.exists():
                break
            names = source.ids[start:stop]
            before = retriever.cut_texts
            rows = retriever.encode(source.items(start, stop), names=names, progress=progress)
            require_finite(rows, names, str(retriever.path))
            store.write(number, rows, retriever.cut_texts - before)
    except Exception:
        with contextlib.suppress(OSError):
            if several:
                failed.touch()
        raise
    return kept


def _require_finished(out: Path, plan: dict) -> None:
    index = Index.open(out)
    other = [name for name in plan if getattr(index.manifest, name) != plan[name]]
    if other:
        raise UserError(
            f"{out}: holds an index of another {' and '.join(other)} (made by {index.manifest.checkpoint} step "
            f"{index.manifest.step}); take another --out, or replace it with --overwrite"
        )
    index.require_undamaged()


def _finish(store: ShardStore, retriever: Retriever, source: Source) -> None:
    shards = store.finish()
    part, digest = store.folder / f"{IDS}.part", hashlib.sha256()
    with part.open("wb") as stream:
        for start in range(0, len(source.ids), SHARD):
            names = "".join(f"{one}\n" for one in source.ids[start : start + SHARD]).encode()
            digest.update(names)
            stream.write(names)
    os.replace(part, store.folder / IDS)
    # Last: what has no manifest does not open.
    Manifest(
        **store.plan,
        checkpoint=str(retriever.path.resolve()),
        step=retriever.step,
        source=str(source.path.resolve()),
        ids_digest=digest.hexdigest(),
        norm=max(shard.norm for shard in shards),
        score_error=max(shard.error for shard in shards),
        shards=shards,
    ).write(store.folder)
    clear(store.folder)
