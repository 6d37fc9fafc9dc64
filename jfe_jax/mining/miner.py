"""Hard negatives: for each training query, what the model ranks high and is not right.

What negatives.py chooses is written as `neg_cand_list`, where training reads it.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.ids import image_id
from jfe_jax.data.storage.image_store import open_images
from jfe_jax.embedding.embed import SHARD, embed
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.embedding.row_source import RowSource
from jfe_jax.embedding.shard_store import write_json
from jfe_jax.errors import UserError
from jfe_jax.mining.candidate_pool import EmbeddedPool, PoolFile
from jfe_jax.mining.near_duplicates import Duplicates
from jfe_jax.mining.query_file import QueryFile
from jfe_jax.mining.select_negatives import MiningConfig, MiningQuery, Searched, check, choose, search
from jfe_jax.parallel.distributed import all_or_none, allgather_json, is_process_zero

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]

WORK = "mining"
_QUERIES = 4096
# Queries, their embeddings [Q, E], and what was found.
_Found = tuple[list[MiningQuery], np.ndarray, list[Searched]]


@dataclass
class MiningSummary:
    """What came out for a unit.

    Attributes:
      counts: "queries"; negatives of the "wanted_modality" and of a "wrong_modality"; queries left as they were, as
        they have "no_positive" in the pool or a "missing_image"; queries with fewer negatives than asked for ("short");
        and candidates left out because they are the "same" as a right one, "near" to one, or within the "margin".
    """

    unit: str
    counts: Counter[str] = field(default_factory=Counter)


def mine(
    retriever: Retriever,
    mbeir: Mbeir,
    out: Path,
    settings: MiningConfig,
    *,
    split: str = "train",
    units: Sequence[str] = (),
    images: Path | None = None,
    shard: int = SHARD,
    overwrite: bool = False,
    progress: Progress,
) -> Iterator[MiningSummary]:
    """Writes `out`, an M-BEIR directory like `mbeir` with mined negatives in the queries of a split.

    Everything else there is a link into the source. The embeddings of pools and queries stay in out/mining, so that a
    killed run goes on, and another window costs only a search. Every process of a job calls it: they share the
    embedding, the search and the choice; what is written is the same.

    Args:
      images: where images are read from, or copied to, if they are not unpacked; see image_store.open_images;
        out/mining/images if not given.
      shard: items that are embedded at a time.
      overwrite: embed anew, whatever is there.

    Raises:
      UserError: settings contradict each other, `out` holds something else, a file is wrong, an embedding is not
        finite; all that files say of themselves before anything is embedded.
    """
    with all_or_none():
        check(settings)
        chosen = [mbeir.unit(split, name) for name in units] if units else mbeir.units(split)
        pools = {unit.name: mbeir.pool_file(split, unit, settings.pool) for unit in chosen}
        if is_process_zero():
            mirror_with_links(
                mbeir.path, out, {mbeir.query_file(split, unit).relative_to(mbeir.path) for unit in chosen}
            )
    summary = []
    place = images or out / WORK / "images"

    def wanted() -> np.ndarray:
        return _wanted(mbeir, split, pools)

    with all_or_none():
        found = open_images(mbeir.path, place, wanted, progress) if is_process_zero() else None
    with all_or_none():
        found = found or open_images(mbeir.path, place, wanted, copies=False)
    for path in dict.fromkeys(pools.values()):
        with all_or_none():
            file = PoolFile(mbeir, path, found)
            asked = {
                unit: QueryFile(mbeir, split, unit, file, settings.instruction)
                for unit in chosen
                if pools[unit.name] == path
            }
        with progress(f"embedding {path.stem}", -(-len(file.ids) // jax.process_count())) as tick:
            pool = EmbeddedPool(retriever, file, out / WORK / path.stem, settings.dtype, shard, overwrite, tick)
        for unit, queries in asked.items():
            embeddings = _embedded(retriever, queries, out / WORK / "queries", unit.name, shard, overwrite, progress)
            target = out / queries.path.relative_to(mbeir.path)
            with progress(f"mining {unit.name}", queries.rows) as tick:
                counts = _Miner(settings, pool, queries, embeddings, min(shard, _QUERIES)).write(
                    target, out / WORK / unit.name, tick
                )
            counts["missing_candidate_image"] = file.missing
            summary.append(MiningSummary(unit.name, counts))
            yield summary[-1]
    told = {
        "checkpoint": str(retriever.path.resolve()),
        "fingerprint": retriever.fingerprint,
        "split": split,
        "settings": asdict(settings),
        "units": {one.unit: dict(one.counts) for one in summary},
    }
    with all_or_none():
        if is_process_zero():
            write_json(out / WORK / "mining.json", told)


def _wanted(mbeir: Mbeir, split: str, pools: dict[str, Path]) -> np.ndarray:
    """int64: image_id of all that the pools and the queries show."""
    rows = itertools.chain(
        *(mbeir.candidates(file) for file in dict.fromkeys(pools.values())),
        *(mbeir.iter_queries(split, mbeir.unit(split, name)) for name in pools),
    )
    return np.fromiter((image_id(one.image, mbeir.path) for one in rows), np.int64)


def mirror_with_links(source: Path, out: Path, written: set[Path]) -> None:
    """Makes `out` a copy of the directory `source` by links, but for the files `written`, and their folders.

    Raises:
      UserError: something else is in the way.
    """
    folders = {parent for file in written for parent in file.parents}
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the source itself; choose another --out")
    for folder in sorted(folders, key=lambda one: len(one.parts)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for entry in sorted((source / folder).iterdir()):
            inside = folder / entry.name
            link = out / inside
            if inside in folders or inside in written or inside.name == WORK:
                if link.is_symlink():
                    # Of a run that mined other units.
                    link.unlink()
                continue
            if link.is_symlink() and link.resolve() == entry.resolve():
                continue
            if link.is_symlink() or (link.exists() and not inside.is_relative_to("query")):
                raise UserError(f"{link}: is in the way; choose another --out")
            if not link.exists():
                link.symlink_to(entry.resolve(), target_is_directory=entry.is_dir())


def _embedded(
    retriever: Retriever,
    queries: QueryFile,
    folder: Path,
    name: str,
    shard: int,
    overwrite: bool,
    progress: Progress,
) -> RowSource | None:
    """Embeddings of what is asked, if anything is."""
    if not len(queries.numbers):
        return None
    place = folder / f"{name}.{queries.digest[:12]}"
    with progress(f"embedding {name}'s queries", -(-len(queries.numbers) // jax.process_count())) as tick:
        return embed(retriever, queries, place, shard=shard, overwrite=overwrite, progress=tick).index.rows


class _Miner:
    """Mines for one unit, so many rows of its file at a time: all processes search for them, one chooses."""

    def __init__(
        self, settings: MiningConfig, pool: EmbeddedPool, queries: QueryFile, embeddings: RowSource | None, rows: int
    ):
        self._settings, self._pool, self._queries, self._embeddings = settings, pool, queries, embeddings
        self._duplicates = Duplicates(settings.image_difference, pool.file.images)
        self._counts: Counter[str] = Counter()
        self._bounds = [(start, min(start + rows, queries.rows)) for start in range(0, queries.rows, rows)]

    def write(self, target: Path, parts: Path, progress: Callable[[int], None]) -> Counter[str]:
        """Writes the file, of which processes write parts first, and tells what all of them counted."""
        count, own = jax.process_count(), jax.process_index()
        for first in range(0, len(self._bounds), count):
            several = self._bounds[first : first + count]
            searched = [self._search(*bounds, keep=number == own) for number, bounds in enumerate(several)]
            with all_or_none():
                if own < len(several):
                    self._write_part(Path(f"{parts}.{first + own}.part"), *several[own], searched[own])
            progress(several[-1][1] - several[0][0])
        with all_or_none():
            if is_process_zero():
                _join([Path(f"{parts}.{number}.part") for number in range(len(self._bounds))], target)
        return sum((Counter(counts) for counts in allgather_json(self._counts)), Counter(self._queries.counts))

    def _search(self, start: int, stop: int, keep: bool) -> _Found | None:
        first, last = np.searchsorted(self._queries.numbers, [start, stop]).tolist()
        if first == last:
            return None
        asked = self._queries.asked(first, last)
        embeddings = self._embeddings.read(first, last)[0]
        found = search(self._settings, self._pool, asked, embeddings)
        return (asked, embeddings, found) if keep else None

    def _write_part(self, part: Path, start: int, stop: int, searched: _Found | None) -> None:
        rows = self._queries.decoded(start, stop)
        if searched is not None:
            chosen = choose(self._settings, self._pool, self._duplicates, *searched, self._counts)
            for one, negatives in chosen:
                _put(rows[one.number - start], [self._pool.file.ids[position] for position in negatives])
        with part.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _join(parts: list[Path], target: Path) -> None:
    whole = target.with_name(f"{target.name}.part")
    with whole.open("wb") as stream:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, stream)
    os.replace(whole, target)
    for part in parts:
        part.unlink()


def _put(row: dict, dids: list[str]) -> None:
    """Sets the row's list, spelt as its list of right ones is."""
    objects = any(isinstance(one, dict) for one in row.get("pos_cand_list") or ())
    row["neg_cand_list"] = [{"did": did} for did in dids] if objects else dids
