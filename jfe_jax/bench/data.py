"""The data path at scale: check and prepare a generated M-BEIR directory, a kill and its restart, a resume, memory.

Each part is a process of its own, as a user runs it; its peak is what Linux says (VmHWM).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jfe_jax.bench import mbeir_like, memory
from jfe_jax.config import Config, from_dict
from jfe_jax.data import builder
from jfe_jax.data.loader import training_batches
from jfe_jax.data.mbeir import Candidate
from jfe_jax.data.numbering import PER_DATASET
from jfe_jax.data.prepared import Prepared
from jfe_jax.data.shards import SHARD_RECORDS
from jfe_jax.data.tokens import train_tokenizer

# Runs a command line in this process and says what it took, to the last line of standard error.
_MEASURED = """
import sys, time
from jfe_jax.bench import memory
from jfe_jax.cli.main import main
start = time.monotonic()
status = main(sys.argv[1:])
seconds = time.monotonic() - start
print(f"\\n{status} {seconds} {time.process_time()} {memory.peak()}", file=sys.stderr)
"""
VOCABULARY = 4096


def run(rows: int, distinct: int, steps: int, candidates: int, directory: Path | None) -> Iterator[str]:
    """Lines that say what each part took.

    Args:
      rows: queries and candidates of the generated directory.
      distinct: different images in it, which rows share.
      steps: after so many steps an iterator is saved and restored.
      candidates: of the data that the loader's memory is measured on; 0 leaves that out.
      directory: where to make it all.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        raw, out = Path(folder) / "mbeir", Path(folder) / "prepared"
        count = mbeir_like.write(raw, rows, distinct=distinct)
        yield f"check of {count} rows: {_measure('data', 'check', raw)}"
        yield _killed(raw, out, max(10, count // SHARD_RECORDS // 3))
        kept = {file.stat().st_ino for file in out.rglob("*") if file.suffix == ".shard" or "array_record" in file.name}
        took = _measure("data", "prepare", raw, "--out", out)
        there = {file.stat().st_ino for file in out.rglob("*.array_record*")}
        yield (
            f"restart, to the end: {took}; {len(kept & there)} of the {len(kept)} "
            f"finished shards were kept, {len(there - kept)} written"
        )
        yield _resumed(out, Path(folder) / "tokenizer", steps)
        if candidates:
            yield _memory(Path(folder) / "many", candidates)


def _measure(*words: Any) -> str:
    command = [sys.executable, "-c", _MEASURED, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status, seconds, busy, peak = done.stderr.splitlines()[-1].split()
    if status != "0":
        raise RuntimeError(done.stderr)
    return f"{float(seconds):.1f} s ({float(busy):.1f} s of CPU), peak memory {int(peak) / 2**20:.2f} GiB"


def _killed(raw: Path, out: Path, wanted: int) -> str:
    """Prepares until half of the shards that candidates will have are there, and kills it."""
    command = [sys.executable, "-m", "jfe_jax.cli.main", "data", "prepare", str(raw), "--out", str(out)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and sum(1 for _ in (out / builder.CANDIDATES).rglob("*-*")) < wanted:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sum(1 for _ in out.rglob("*.shard")) + sum(1 for _ in out.rglob("*.array_record*"))
    return f"prepare, killed after {time.monotonic() - start:.1f} s with {whole} finished shards"


def _config(prepared: Path, tokenizer: Path) -> Config:
    train_tokenizer(mbeir_like.vocabulary(np.random.default_rng(0)).tolist(), VOCABULARY, tokenizer)
    return from_dict(
        {
            "model": {"image_token": VOCABULARY - 1, "text": {"vocab_size": VOCABULARY}},
            "tokens": {"tokenizer": str(tokenizer), "max_text_tokens": 380},
            # Texts alone, for the steps to go by quickly; a tight layout, for pairs to wait.
            "data": {
                "path": str(prepared),
                "mixture": {"webqa_task1": 1.0},
                "pairs": 8,
                "rows": 1,
                "row_tokens": 640,
                "image_slots": 0,
            },
        }
    )


def _resumed(prepared: Path, tokenizer: Path, steps: int) -> str:
    cfg = _config(prepared, tokenizer)
    iterator = training_batches(cfg, groups=1, split="train")
    for _ in range(steps):
        next(iterator)
    state = json.dumps(iterator.get_state())
    wanted = [next(iterator) for _ in range(3)]
    iterator.close()
    fresh = training_batches(cfg, groups=1, split="train")
    start = time.monotonic()
    fresh.set_state(json.loads(state))
    got = [next(fresh)]
    seconds = time.monotonic() - start
    got += [next(fresh) for _ in range(2)]
    fresh.close()
    same = all(
        np.array_equal(one, other)
        for left, right in zip(wanted, got, strict=True)
        for one, other in zip((*left.packed, *left[1:]), (*right.packed, *right[1:]), strict=True)
    )
    return (
        f"resumed at step {steps}: state of {len(state)} bytes, restored and first batch after {seconds:.3f} s; the "
        f"next 3 batches are {'equal' if same else 'NOT EQUAL'} bit for bit"
    )


class _Drawn:
    """Drawn texts in place of a `CandidateIndex`."""

    fingerprint, image_ids = "drawn", np.zeros(0, np.int64)

    def __init__(self, dataset: int, count: int):
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count

    def candidates(self) -> Iterator[Candidate]:
        for number in range(self.count):
            yield Candidate(f"{self.dataset}:{number}", f"What is said of {number}.", None, "text")

    class mbeir:
        path = Path()


def _memory(out: Path, candidates: int) -> str:
    datasets = 10
    for dataset in range(datasets):
        part = f"{builder.CANDIDATES}/dataset{dataset}"
        config = builder.CandidatesConfig(
            name=f"dataset{dataset}",
            index=_Drawn(dataset, candidates // datasets),
            fingerprint="drawn",
            staging=out / part / "unfinished",
            expected=candidates // datasets,
        )
        builder.build(builder.MbeirCandidates, config, out, part)
    (out / builder.QUERIES).mkdir()
    code = f"from jfe_jax.bench.data import read_some; read_some({str(out)!r}, {datasets}, {candidates // datasets})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, peak, seconds = map(float, done.stdout.split())
    return (
        f"50000 of {candidates} candidates read at random: peak memory {peak / 2**20:.2f} GiB "
        f"({before / 2**20:.2f} before the first), {seconds * 1e6:.0f} µs each"
    )


def read_some(out: str, datasets: int, count: int) -> None:
    """Reads candidates at random; prints peak memory before and after in KiB, and seconds each."""
    before = memory.peak()
    prepared, rng = Prepared(out), np.random.default_rng(0)
    numbers = rng.integers(0, datasets, 50_000) * PER_DATASET + rng.integers(0, count, 50_000)
    start = time.monotonic()
    for number in numbers.tolist():
        prepared.candidate(number)
    print(before, memory.peak(), (time.monotonic() - start) / len(numbers))


def machine() -> str:
    """What a result has to be read with."""
    return f"{len(os.sched_getaffinity(0))} cores, Python {'.'.join(map(str, sys.version_info[:3]))}"
