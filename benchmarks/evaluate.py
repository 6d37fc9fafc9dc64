"""Runs an evaluation at M-BEIR's size, killed and resumed: seconds and peak memory.

The directory is generated in M-BEIR's format and proportions, with local pools and their union as the global one. The
embeddings are generated too. An item's vector is drawn by its content, a query's is its right candidate's with noise.
Everything else is the code of `jfe eval`: it reads rows, stores embeddings in shards, searches pools from the disk and
computes metrics. Each run is a separate process, whose peak memory is VmHWM from Linux.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.common import memory
from benchmarks.common.result import Progress, Result, table
from benchmarks.data import synthetic_mbeir
from jfe_jax.data.formats.candidate_table import content_id
from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.item import Item
from jfe_jax.evaluation.eval_set import EvalSet, read_mbeir
from jfe_jax.evaluation.evaluator import EMBEDDINGS, Keep, ask

_SPLIT = "train"
_DRAWN = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the pools and the embeddings."""
    parser.add_argument("--candidates", type=int, default=5_600_000)
    parser.add_argument("--queries", type=int, default=100, help="of each of the 16 units")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--dir", type=Path, help="where to make it: 10 GB by default")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Generates the directory, kills an evaluation when half of the shards are finished, and evaluates again."""
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        data, out = Path(folder) / "mbeir", Path(folder) / "out"
        with progress("generating", 1) as made:
            candidates = _generate(data, args.candidates, args.queries)
            made(1)
        command = [sys.executable, "-m", "benchmarks.evaluate", *map(str, (data, out, args.width, args.dtype))]
        start = time.monotonic()
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shards = out / EMBEDDINGS
        while killed.poll() is None and _finished(shards) < candidates // _DRAWN // 2:
            time.sleep(0.2)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        first, kept = time.monotonic() - start, _finished(shards)
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1].split()
    seconds, busy, peak, asked, right, pools = (float(one) for one in told)
    formats = {"run": "", "s": ".0f", "s of CPU": ".0f", "peak memory, GiB": ".2f"}
    rows = [
        [f"killed, with {kept} shards of 8,192 finished", first, None, None],
        ["again, to the end", seconds, busy, peak / 2**20],
    ]
    return Result(
        tables=[table(formats, rows)],
        packages=["jax"],
        method=f"{candidates:,} candidates, each in a local pool and in the global one; 16 units, {int(asked):,} "
        f"queries; generated embeddings of width {args.width}, {args.dtype}; {int(pools)} searches",
        checked=f"{right:.1%} of the queries, whose vectors are their right candidates' with noise, find those first",
    )


def _finished(folder: Path) -> int:
    # A finished index has no list of shards any more.
    rows = sum(np.load(file, mmap_mode="r").shape[0] for file in folder.glob("mbeir*/embeddings.npy"))
    return rows // _DRAWN + sum(1 for _ in folder.glob("mbeir*/shards/*.json"))


def _generate(path: Path, candidates: int, queries: int) -> int:
    """Local pools and queries, of these only the first; their union as the global pool; empty files as images."""
    share = sum(unit.candidates for unit in synthetic_mbeir.UNITS)
    share /= sum(unit.candidates + unit.queries for unit in synthetic_mbeir.UNITS)
    synthetic_mbeir.write(path, round(candidates / share), images="none")
    for file in (path / f"query/{_SPLIT}").glob("*.jsonl"):
        with file.open("rb") as stream:
            lines = list(islice(stream, queries))
        file.write_bytes(b"".join(lines))
    mbeir, written = Mbeir(path), 0
    for unit in mbeir.units(_SPLIT):
        for query in mbeir.iter_queries(_SPLIT, unit):
            if query.image is not None:
                query.image.parent.mkdir(parents=True, exist_ok=True)
                query.image.touch()
    union = path / f"cand_pool/global/mbeir_union_{_SPLIT}_cand_pool.jsonl"
    union.parent.mkdir()
    with union.open("wb") as out:
        for file in sorted((path / "cand_pool/local").glob("*.jsonl")):
            with file.open("rb") as stream:
                for line in stream:
                    out.write(line)
                    written += 1
    return written


class _Drawn:
    """Stands in for a Retriever, with vectors drawn from the items' content."""

    path, step, fingerprint, parameters, cut_texts = Path("generated"), 0, "generated", 0, 0
    config = SimpleNamespace(model=SimpleNamespace(kind="generated"))

    def __init__(self, width: int, questions: EvalSet):
        self.width, self._root = width, questions.path
        random = np.random.default_rng(0)
        base = random.standard_normal((_DRAWN, width), np.float32)
        base /= np.linalg.norm(base, axis=1, keepdims=True)
        self._twice = np.concatenate([base, base], axis=1)
        self._right = {}
        for unit in questions.units:
            for asked in unit.asked:
                right = next(found for did in asked.relevant if (found := questions.table.find(did)) is not None)
                self._right[self._content(asked.item("all"))] = self._content(right.item())

    def encode(
        self, items: Sequence[Item], *, names: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """float32 [B, E]: a drawn row and another one turned; a query's is near its right candidate's."""
        contents = [self._content(item) for item in items]
        keys = np.array([self._right.get(content, content) for content in contents], np.int64)
        rows = np.empty((len(items), self.width), np.float32)
        drawn = (keys % _DRAWN, keys // _DRAWN % _DRAWN, keys // _DRAWN**2 % self.width)
        for place, (row, other, turn) in enumerate(zip(*drawn, strict=True)):
            rows[place] = self._twice[row, : self.width] + self._twice[other, turn : turn + self.width]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for place, content in enumerate(contents):
            if content in self._right:
                noise = np.random.default_rng(abs(content)).standard_normal(self.width, np.float32)
                rows[place] += 0.3 * noise / np.sqrt(self.width)
        if progress:
            progress(len(items))
        return rows

    def _content(self, item: Item) -> int:
        return content_id(item.instruction, item.text, item.image, self._root)


def _evaluate(data: Path, out: Path, width: int, dtype: str) -> Iterator[float]:
    from jfe_jax.utils.progress import progress_bar

    start = time.monotonic()
    questions = read_mbeir(Mbeir(data), _SPLIT, ("local", "global"), (), 0)
    told = ask(_Drawn(width, questions), questions, keep=Keep(folder=out, dtype=dtype), progress=progress_bar)
    hits = [entry["metrics"]["hit@1"] for unit in told.results["units"].values() for entry in unit["pools"].values()]
    yield from (time.monotonic() - start, time.process_time(), memory.peak())
    yield from (sum(unit.queries for unit in questions.units), float(np.mean(hits)), len(told.answers))


if __name__ == "__main__":
    print(*_evaluate(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
