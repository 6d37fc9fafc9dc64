"""Measures the data path at scale: check, prepare, kill and restart, resume, and memory.

The directory is generated in M-BEIR's format. Each part runs in its own process, as a user would run it. Its peak
memory is VmHWM from Linux.
"""

import argparse
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

from benchmarks.common import memory
from benchmarks.common.result import Progress, Result, table
from benchmarks.data import synthetic_mbeir
from jfe_jax.config import Config, from_dict
from jfe_jax.data.formats.mbeir import Candidate
from jfe_jax.data.ids import IDS_PER_DATASET
from jfe_jax.data.pipeline.loader import training_batches
from jfe_jax.data.prepare import tfds_builder
from jfe_jax.data.processor import train_tokenizer
from jfe_jax.data.storage.prepared_dataset import CANDIDATES, IMAGES, QUERIES, PreparedDataset
from jfe_jax.data.storage.shard_writer import MIN_RECORDS_PER_SHARD

# Runs a command line in this process and says what it took, to the last line of standard error.
_MEASURED = """
import sys, time
from benchmarks.common import memory
from jfe_jax.cli.main import main
start = time.monotonic()
status = main(sys.argv[1:])
seconds = time.monotonic() - start
print(f"\\n{status} {seconds} {time.process_time()} {memory.peak()}", file=sys.stderr)
"""
VOCABULARY = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares sizes and directory."""
    parser.add_argument("--rows", type=int, default=1_000_000, help="queries and candidates")
    parser.add_argument(
        "--distinct",
        type=int,
        default=2000,
        help="images that a data set's queries or candidates share, as files; 0: another small one for every row that "
        "has one, in an archive in parts as published",
    )
    parser.add_argument("--steps", type=int, default=10_000, help="before the iterator is saved and restored")
    parser.add_argument(
        "--candidates", type=int, default=5_600_000, help="of the data that memory is measured on; 0: none"
    )
    parser.add_argument("--dir", type=Path, help="where to make it: 3 GB")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Runs all parts."""
    rows: list[list[Any]] = []
    own = not args.distinct
    with (
        tempfile.TemporaryDirectory(dir=args.dir) as folder,
        progress("parts", 4 + own + bool(args.candidates)) as done,
    ):

        def part(name: str, *cells: Any) -> None:
            rows.append([name, *cells])
            done(1)

        raw, out = Path(folder) / "mbeir", Path(folder) / "prepared"
        images = "parts" if own else "files"
        count = synthetic_mbeir.write(raw, args.rows, images=images, distinct=args.distinct, small=own)
        part("check", *_measure("data", "check", raw), "")
        if own:
            part("check --images all", *_measure("data", "check", raw, "--images", "all"), "")
        # Among the candidates, or among their images, which then are what takes long.
        seconds, whole = _killed(raw, out, IMAGES if own else CANDIDATES, max(10, count // MIN_RECORDS_PER_SHARD // 3))
        part("prepare, killed", seconds, None, None, f"{whole} finished shards")
        kept = {file.stat().st_ino for file in out.rglob("*") if file.suffix == ".shard" or "array_record" in file.name}
        took = _measure("data", "prepare", raw, "--out", out)
        there = {file.stat().st_ino for file in out.rglob("*.array_record*")}
        told = f"{len(kept & there)} of {len(kept)} finished shards reused, {len(there - kept)} written"
        part("restarted, to the end", *took, told)
        seconds, told = _resumed(out, Path(folder) / "tokenizer", args.steps)
        part(f"iterator restored at step {args.steps:,}, first batch", seconds, None, None, told)
        if args.candidates:
            seconds, peak, told = _memory(Path(folder) / "many", args.candidates)
            part(f"50,000 of {args.candidates:,} candidates read at random", seconds, None, peak, told)
    formats = {"": "", "s": ".2f", "of CPU": ".1f", "peak memory, GiB": ".2f", " ": ""}
    return Result(
        tables=[table(formats, rows)],
        packages=["grain", "array-record", "tensorflow-datasets"],
        method="each part once, in its own process",
        notes=[
            f"A generated directory of {count:,} rows in M-BEIR's proportions, "
            + (
                "each image different, of a kilobyte, in mbeir_images.tar.gz in four parts."
                if own
                else f"{args.distinct:,} images a data set."
            )
        ],
    )


def _measure(*words: Any) -> tuple[float, float, float]:
    """Seconds, of CPU, and the peak memory in GiB."""
    command = [sys.executable, "-c", _MEASURED, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status, seconds, busy, peak = done.stderr.splitlines()[-1].split()
    if status != "0":
        raise RuntimeError(done.stderr)
    return float(seconds), float(busy), int(peak) / 2**20


def _killed(raw: Path, out: Path, kind: str, wanted: int) -> tuple[float, int]:
    """Runs prepare until `wanted` shards of a kind are finished, then kills it; returns seconds and finished shards."""
    command = [sys.executable, "-m", "jfe_jax.cli.main", "data", "prepare", str(raw), "--out", str(out)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and _shards(out / kind) < wanted:
        time.sleep(0.05)
    seconds = time.monotonic() - start
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sum(1 for _ in out.rglob("*.shard")) + sum(1 for _ in out.rglob("*.array_record*"))
    return seconds, whole


def _shards(folder: Path) -> int:
    # os.walk passes over folders that go meanwhile.
    return sum("-" in name for _, _, files in os.walk(folder) for name in files)


def _config(prepared: Path, tokenizer: Path) -> Config:
    train_tokenizer(synthetic_mbeir.vocabulary(np.random.default_rng(0)).tolist(), VOCABULARY, tokenizer)
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


def _resumed(prepared: Path, tokenizer: Path, steps: int) -> tuple[float, str]:
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
        seconds,
        f"state of {len(state)} bytes; the next 3 batches are {'equal' if same else 'NOT EQUAL'} bit for bit",
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


def _memory(out: Path, candidates: int) -> tuple[float, float, str]:
    datasets = 10
    for dataset in range(datasets):
        part = f"{CANDIDATES}/dataset{dataset}"
        config = tfds_builder.CandidatesConfig(
            name=f"dataset{dataset}",
            index=_Drawn(dataset, candidates // datasets),
            fingerprint="drawn",
            staging=out / part / "unfinished",
            expected=candidates // datasets,
        )
        tfds_builder.build_part(tfds_builder.MbeirCandidates, config, out, part)
    (out / QUERIES).mkdir()
    code = f"from benchmarks.data.data import read_some; read_some({str(out)!r}, {datasets}, {candidates // datasets})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, peak, seconds = map(float, done.stdout.split())
    return 50_000 * seconds, peak / 2**20, f"{before / 2**20:.2f} GiB before the first"


def read_some(out: str, datasets: int, count: int) -> None:
    """Reads candidates at random; prints peak memory before and after in KiB, and seconds each."""
    before = memory.peak()
    prepared, rng = PreparedDataset(out), np.random.default_rng(0)
    numbers = rng.integers(0, datasets, 50_000) * IDS_PER_DATASET + rng.integers(0, count, 50_000)
    start = time.monotonic()
    for number in numbers.tolist():
        prepared.candidate(number)
    print(before, memory.peak(), (time.monotonic() - start) / len(numbers))
