"""MMEB's protocol on its 36 image tasks: each query against its own candidates, hit@1.

Where a wrong candidate has exactly the right one's score, the published code counts a hit and this one a miss; the
right one's doubles among a query's candidates are not wrong ones.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jfe_jax.data.formats.candidate_table import CandidateTable
from jfe_jax.data.formats.mbeir import TASKS, Candidate, Query, Unit
from jfe_jax.data.formats.mmeb import MmebContent, find_image_folder, find_task_files, read_task
from jfe_jax.errors import UserError
from jfe_jax.evaluation.eval_set import CandidatePools, EvalQuery, EvalSet, EvalTask
from jfe_jax.evaluation.protocols import MMEB

POOL = "per-query"


def read_mmeb(path: Path, units: Sequence[str] = ()) -> EvalSet:
    """The tasks of a directory (all, if none is named), in the benchmark's order.

    Raises:
      UserError: there is no such task, a row is wrong, a task has no rows, or an image is missing.
    """
    files = find_task_files(path)
    if unknown := [name for name in units if name not in files]:
        raise UserError(f"{path}: no task {unknown[0]}; there are {', '.join(sorted(files))}")
    names = sorted(units or files, key=lambda name: MMEB.order(name, None))
    images = find_image_folder(path)
    # The same text and image are one candidate in all tasks: embedded once.
    dids: dict[MmebContent, str] = {}
    members: dict[str, set[str]] = {}
    read: list[EvalTask] = []
    for name in names:
        asked = []
        members[name] = set()
        for number, row in enumerate(read_task(files[name], images)):
            among = [dids.setdefault(target, f"{len(dids):09d}") for target in row.targets]
            members[name].update(among)
            modality, wanted = _modality(row.query), _modality(row.targets[0])
            query = Query(f"{name}:{number}", *row.query, modality, None, (), ())
            asked.append(
                EvalQuery(query, {among[0]: 1}, None, query.qid, None, None, wanted=wanted, among=tuple(among))
            )
        if not asked:
            raise UserError(f"{files[name][0]}: no rows")
        tasks = {TASKS.get((one.query.modality, one.wanted), -1) for one in asked}
        read.append(EvalTask(Unit(name, name, None), tasks.pop() if len(tasks) == 1 else -1, asked, 0))
    candidates = [Candidate(did, *content, _modality(content)) for content, did in dids.items()]
    _require_images(candidates, images)
    table = CandidateTable.from_candidates(candidates, images)
    rows = {
        (POOL, name): np.unique(np.array([table.row(did) for did in own], np.int32)) for name, own in members.items()
    }
    return EvalSet(MMEB, path, "test", "own", (POOL,), CandidatePools(table, rows), read)


def _modality(content: MmebContent) -> str:
    return ",".join(name for name, value in zip(("image", "text"), reversed(content), strict=True) if value)


def _require_images(candidates: list[Candidate], images: Path) -> None:
    wanted = list(dict.fromkeys(one.image for one in candidates if one.image is not None))
    missing = [image for image in wanted if not image.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such image ({len(missing)} of {len(wanted)} of the candidates are missing): image paths "
            f"are relative to {images}"
        )
