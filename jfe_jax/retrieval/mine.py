"""Hard negatives: for each training query, what the model ranks high and is not right.

What negatives.py chooses is written as `neg_cand_list`, where training reads it.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jfe_jax.data.mbeir import Mbeir, Unit
from jfe_jax.data.mbeir_rows import parse_query, read_rows
from jfe_jax.data.numbering import image_id
from jfe_jax.data.stored_images import open_images
from jfe_jax.errors import UserError
from jfe_jax.retrieval.duplicates import Duplicates
from jfe_jax.retrieval.mine_pool import Pool, PoolFile
from jfe_jax.retrieval.negatives import Asked, Settings, check, negatives_of
from jfe_jax.retrieval.retriever import Retriever

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]

WORK = "mining"
_QUERIES = 4096


@dataclass
class Mined:
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
    settings: Settings,
    *,
    split: str = "train",
    units: Sequence[str] = (),
    images: Path | None = None,
    overwrite: bool = False,
    progress: Progress,
) -> Iterator[Mined]:
    """Writes `out`, an M-BEIR directory like `mbeir` with mined negatives in the queries of a split.

    Everything else there is a link into the source. The pools' embeddings stay in out/mining, so that a killed run goes
    on, and another window costs only a search.

    Args:
      images: where images are read from, or copied to, if they are not unpacked; see stored_images.open_images;
        out/mining/images if not given.
      overwrite: embed the pools anew, whatever is there.

    Raises:
      UserError: settings contradict each other, `out` holds something else, a file is wrong, an embedding is not
        finite.
    """
    check(settings)
    chosen = [mbeir.unit(split, name) for name in units] if units else mbeir.units(split)
    pools = {unit.name: mbeir.pool_file(split, unit, settings.pool) for unit in chosen}
    link_all(mbeir.path, out, {mbeir.query_file(split, unit).relative_to(mbeir.path) for unit in chosen})
    summary = []
    opened = open_images(mbeir.path, images or out / WORK / "images", lambda: _wanted(mbeir, split, pools), progress)
    for path in dict.fromkeys(pools.values()):
        file = PoolFile(mbeir, path, opened)
        with progress(f"embedding {path.stem}", len(file.ids)) as tick:
            pool = Pool(retriever, file, out / WORK / path.stem, settings.dtype, overwrite, tick)
        for unit in (one for one in chosen if pools[one.name] == path):
            mined = _mine_unit(retriever, mbeir, out, settings, split, unit, pool, progress)
            mined.counts["missing_candidate_image"] = file.missing
            summary.append(mined)
            yield mined
    told = {
        "checkpoint": str(retriever.path.resolve()),
        "fingerprint": retriever.fingerprint,
        "split": split,
        "settings": asdict(settings),
        "units": {one.unit: dict(one.counts) for one in summary},
    }
    (out / WORK / "mining.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _wanted(mbeir: Mbeir, split: str, pools: dict[str, Path]) -> np.ndarray:
    """int64: image_id of all that the pools and the queries show."""
    rows = itertools.chain(
        *(mbeir.candidates(file) for file in dict.fromkeys(pools.values())),
        *(mbeir.iter_queries(split, mbeir.unit(split, name)) for name in pools),
    )
    return np.fromiter((image_id(one.image, mbeir.path) for one in rows), np.int64)


def link_all(source: Path, out: Path, written: set[Path]) -> None:
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


def _mine_unit(
    retriever: Retriever,
    mbeir: Mbeir,
    out: Path,
    settings: Settings,
    split: str,
    unit: Unit,
    pool: Pool,
    progress: Progress,
) -> Mined:
    mined, file = Mined(unit.name), mbeir.query_file(split, unit)
    right_of = mbeir.qrels(split, unit) if mbeir.qrels_file(split, unit).is_file() else {}
    target = out / file.relative_to(mbeir.path)
    part = target.with_name(f"{target.name}.part")
    lines = sum(1 for _ in read_rows(file))
    duplicates = Duplicates(settings.image_difference, pool.file.images)
    with progress(f"mining {unit.name}", lines) as tick, part.open("w", encoding="utf-8", newline="\n") as stream:
        for rows in _chunks(read_rows(file), _QUERIES):
            asked = [
                one
                for number, (where, row) in enumerate(rows)
                if (one := _asked(mbeir, where, number, row, pool, right_of, mined.counts)) is not None
            ]
            if asked:
                found = negatives_of(retriever, mbeir, settings, unit, pool, duplicates, asked, mined.counts)
                for one, negatives in found:
                    _put(rows[one.number][1], [pool.file.ids[number] for number in negatives])
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
            tick(len(rows))
    os.replace(part, target)
    return mined


def _asked(
    mbeir: Mbeir, where: str, number: int, row: Any, pool: Pool, right_of: dict, counts: Counter[str]
) -> Asked | None:
    query, problems = parse_query(row, mbeir.path)
    if query is None or problems:
        raise UserError(f"{where}: {problems[0]}")
    counts["queries"] += 1
    judged = [did for did, relevance in right_of.get(query.qid, {}).items() if relevance > 0]
    right = [pool.file.row[did] for did in dict.fromkeys([*query.pos, *judged]) if did in pool.file.row]
    if not right:
        counts["no_positive"] += 1
        return None
    if query.image is not None and pool.file.images.find(query.image) is None:
        counts["missing_image"] += 1
        return None
    return Asked(number, query, right, pool.file.candidates[right[0]].modality)


def _put(row: dict, dids: list[str]) -> None:
    """Sets the row's list, spelt as its list of right ones is."""
    objects = any(isinstance(one, dict) for one in row.get("pos_cand_list") or ())
    row["neg_cand_list"] = [{"did": did} for did in dids] if objects else dids


def _chunks(rows: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
