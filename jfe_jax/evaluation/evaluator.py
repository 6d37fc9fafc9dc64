"""An evaluation: embed the pools once, ask every query, count.

Axes: Q queries, E embedding.
"""

import bisect
import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jfe_jax.data.formats.candidate_table import content_id
from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.ids import image_id
from jfe_jax.data.item import Item
from jfe_jax.data.storage.image_store import DirectoryImages, ImageLookup, open_images, resolve_image
from jfe_jax.embedding.embed import SHARD
from jfe_jax.embedding.embedding_cache import EmbeddingCache, EmbeddingLocation, EmbeddingRequest
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.errors import UserError
from jfe_jax.evaluation import metrics
from jfe_jax.evaluation.aggregate import add_means
from jfe_jax.evaluation.eval_set import CandidatePools, EvalQuery, EvalSet, EvalTask, first_occurrence, read_mbeir
from jfe_jax.evaluation.protocols import MBEIR
from jfe_jax.evaluation.results import RankedResults, unit_results
from jfe_jax.evaluation.search_runner import Job, SearchCache, count_scores, run_searches
from jfe_jax.parallel.distributed import all_or_none, is_process_zero

# Deep enough for others to compute hit@50 from the run files.
DEPTH = max(metrics.CUTOFFS)
# The folders in an evaluation's own directory.
EMBEDDINGS, SEARCHES, IMAGES = "embeddings", "searches", "images"

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]


@dataclass
class Evaluation:
    """What came out.

    Attributes:
      results: ready for JSON; see results.py.
      answers: everything that was asked, in the order of the units, then what was given, then pools.
      questions: what was asked.
      images: where the images are.
    """

    results: dict
    answers: list[RankedResults]
    questions: EvalSet
    images: ImageLookup

    @property
    def pools(self) -> CandidatePools:
        """The candidates."""
        return self.questions.table


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What of an evaluation is kept, so that a killed one goes on.

    Attributes:
      folder: where finished searches are; None keeps nothing.
      embeddings: where the embeddings are, which evaluations of one checkpoint can share; folder/embeddings if None.
      images: where images are read from, or copied to, if they are not unpacked; see image_store.open_images;
        `embeddings`/images if None.
      dtype: how the candidates' embeddings are stored, one of shard_store.DTYPES; the queries' are float32.
      shard: items that are embedded at a time.
      overwrite: begin anew, whatever is there.
    """

    folder: Path | None = None
    embeddings: Path | None = None
    images: Path | None = None
    dtype: str = "float32"
    shard: int = SHARD
    overwrite: bool = False


def evaluate(
    retriever: Retriever,
    mbeir: Mbeir,
    *,
    split: str = "test",
    pools: Sequence[str] = ("local", "global"),
    units: Sequence[str] = (),
    instruction: int | str | None = 0,
    given: Sequence[str] = ("all",),
    depth: int = DEPTH,
    keep: Keep = Keep(),
    progress: Progress,
) -> Evaluation:
    """Evaluates a model on the units of a split (all of them, if none is named).

    Args:
      instruction: which of the data set's prompts goes before each query: its number from 0, None for none, or
        protocol.ALL_PROMPTS to ask with each of them and take the mean.
      given: "all" is the whole query; "text" and "image" leave out the other half of the queries that have both.
      depth: how many results of each query are kept, at least 10.
      progress: (name, items) → a context that gives a function to call with the items done.

    Raises:
      UserError: a file is missing or wrong, an image cannot be read, an embedding is not finite, nothing to ask, or
        what is kept is another checkpoint's.
    """
    questions = read_mbeir(mbeir, split, pools, units, instruction)
    return ask(retriever, questions, given=given, depth=depth, keep=keep, progress=progress)


def ask(
    retriever: Retriever,
    questions: EvalSet,
    *,
    given: Sequence[str] = ("all",),
    depth: int = DEPTH,
    keep: Keep = Keep(),
    progress: Progress,
) -> Evaluation:
    """As `evaluate`, whatever the questions were read from. Every process of a job calls it, and has the same."""
    start = time.monotonic()
    with all_or_none():
        jobs = _jobs(questions, given)
    with contextlib.ExitStack() as ending:
        # Embeddings are on disk in any case: what memory an evaluation needs does not depend on it.
        folder = keep.folder or Path(ending.enter_context(tempfile.TemporaryDirectory()))
        embeddings = keep.embeddings or folder / EMBEDDINGS
        place = keep.images or embeddings / IMAGES
        images = _images(questions, jobs, place, progress)
        with all_or_none():
            _require_images(jobs, images)
        with _stores(retriever, embeddings, images, keep) as stores:
            wanted = _Candidates(questions, images), _Queries(questions, images, jobs)
            stored = [_embedded(stores, *one, progress) for one in zip(wanted, (keep.dtype, "float32"), strict=True)]
        kept = SearchCache(folder / SEARCHES, f"{retriever.fingerprint} {keep.dtype} {images.form}")
        rows = [stores.rows(one) for one in stored]
        total = count_scores(jobs, questions.pools, questions.table)
        with progress("searching, scores", total // jax.process_count()) as tick:
            answers = run_searches(
                jobs, questions, *rows, wanted[1].contents, depth=max(depth, 10), kept=kept, progress=tick
            )
        error, cut = stores.score_error(stored[0]), sum(map(stores.cut_texts, stored))
    units = questions.units
    entries = [unit_results(unit, [one for one in answers if one.unit is unit]) for unit in units]
    results = add_means(entries, questions.protocol)
    about = {
        "protocol": questions.protocol.name,
        "checkpoint": str(retriever.path),
        "step": retriever.step,
        "fingerprint": retriever.fingerprint,
        "model": retriever.config.model.kind,
        "parameters": retriever.parameters,
        "data": str(questions.path),
        "images": None if isinstance(images, DirectoryImages) else str(place),
        "split": questions.split,
        "instruction": questions.instruction,
        "given": list(given),
        "pools": list(questions.pools),
        "candidates": len(questions.table.candidates),
        "dtype": keep.dtype,
        "score_error": error if keep.dtype != "float32" else 0.0,
        "warnings": _warnings(cut, units, answers),
        "seconds": round(time.monotonic() - start, 1),
    }
    return Evaluation(about | results, answers, questions, images)


def _jobs(questions: EvalSet, given: Sequence[str]) -> list[Job]:
    jobs, first = [], 0
    for unit in questions.units:
        for mode in given:
            asked = [one for one in unit.asked if one.item(mode) is not None]
            if asked:
                jobs.append(Job(unit, mode, asked, first))
                first += len(asked)
    if not jobs:
        where = questions.path if questions.split is None else f"{questions.path}: the units of split {questions.split}"
        raise UserError(f"{where}: there is no judged query to ask (given {', '.join(given)})")
    return jobs


def _stores(retriever: Retriever, folder: Path, images: ImageLookup, keep: Keep) -> EmbeddingCache:
    return EmbeddingCache(folder, retriever, form=images.form, overwrite=keep.overwrite, shard=keep.shard)


def _embedded(stores: EmbeddingCache, wanted: EmbeddingRequest, dtype: str, progress: Progress) -> EmbeddingLocation:
    missing = len(stores.missing(wanted, dtype))
    if not missing:
        return stores.ensure(wanted, dtype)
    with progress(f"embedding {wanted.kind}", -(-missing // jax.process_count())) as tick:
        return stores.ensure(wanted, dtype, tick)


class _Candidates:
    """The candidates, as embedding_cache.EmbeddingRequest."""

    kind = "candidates"

    def __init__(self, questions: EvalSet, images: ImageLookup):
        self._images, self._known, self.path = images, questions.table.candidates, questions.path
        self.contents, self.files, self.names = self._known.contents, self._known.files, self._known.names

    def id(self, number: int) -> str:
        return self._known.did(number)

    def item(self, number: int) -> Item:
        return resolve_image(self._known[number].item(), self._images)


class _Queries:
    """All jobs' queries, as embedding_cache.EmbeddingRequest."""

    kind = "queries"

    def __init__(self, questions: EvalSet, images: ImageLookup, jobs: list[Job]):
        self._images, self._jobs, self.path = images, jobs, questions.path
        self._firsts = [job.first for job in jobs]
        root = questions.table.candidates.root
        items = (one.item(job.given) for job in jobs for one in job.asked)
        self.contents = np.array([content_id(one.instruction, one.text, one.image, root) for one in items])
        self.names = list(dict.fromkeys(f"{job.unit.unit.name}.queries" for job in jobs))
        number = [self.names.index(f"{job.unit.unit.name}.queries") for job in jobs]
        self.files = np.repeat(np.array(number, np.int16), [len(job.asked) for job in jobs])

    def id(self, number: int) -> str:
        job, asked = self._at(number)
        given = "" if job.given == "all" else f" {job.given}"
        return asked.query.qid + (f" prompt {asked.prompt}" if asked.prompt is not None else "") + given

    def item(self, number: int) -> Item:
        job, asked = self._at(number)
        return resolve_image(asked.item(job.given), self._images)

    def _at(self, number: int) -> tuple[Job, EvalQuery]:
        job = self._jobs[bisect.bisect_right(self._firsts, number) - 1]
        return job, job.asked[number - job.first]


def _images(questions: EvalSet, jobs: list[Job], place: Path, progress: Progress) -> ImageLookup:
    """Where the images are; those of the other protocols were found when their rows were read."""
    if questions.protocol is not MBEIR:
        return DirectoryImages()
    known = questions.table.candidates
    shown = {one.query.image for job in jobs for one in job.asked} - {None}

    def wanted() -> np.ndarray:
        return np.concatenate([known.images, np.array([image_id(image, known.root) for image in shown], np.int64)])

    with all_or_none():
        images = open_images(questions.path, place, wanted, progress) if is_process_zero() else None
    with all_or_none():
        return images or open_images(questions.path, place, wanted, copies=False)


def _require_images(jobs: list[Job], images: ImageLookup) -> None:
    """Before hours of embedding: the queries' images are there."""
    wanted = {one.item(job.given).image: one.query.qid for job in jobs for one in job.asked}
    wanted.pop(None, None)
    missing = [image for image in wanted if images.find(image) is None]
    if missing:
        raise UserError(
            f"{missing[0]}: no such image{images.inside}, of query {wanted[missing[0]]} ({len(missing)} of "
            f"{len(wanted)} images of queries are missing)"
        )


def _warnings(cut: int, asked: list[EvalTask], answers: list[RankedResults]) -> list[str]:
    warnings = []
    for unit in asked:
        if unit.unjudged:
            warnings.append(f"{unit.unit.name}: {unit.unjudged} queries have no right candidate in the qrels; left out")
        warnings += unit.warnings
    for one in answers:
        if one.given == "all" and one.dangling:
            lost = int((one.best[first_occurrence(one.asked)] == metrics.NOT_RETRIEVED).sum())
            warnings.append(
                f"{one.unit.unit.name}, {one.pool} pool: {one.dangling} qrels point at candidates that are not in the "
                f"pool ({lost} queries have no other); they count as misses"
            )
    if cut:
        warnings.append(f"{cut} texts were longer than tokens.max_text_tokens and were cut")
    return warnings
