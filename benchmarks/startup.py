"""Times `jfe --help`, and `jfe train` to its first step: with nothing compiled, and with the compilation cache.

Every call is a separate process, timed from its start to the line with the first step's loss. Only the compilation
cache differs. The model has PaliGemma's architecture and 6 M parameters. Its layers are scanned, so that the compiled
program is about as large as that of 3 B.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.common.interleaved import by_turns
from benchmarks.common.result import Progress, Result, ratios, table
from benchmarks.data import synthetic_mbeir
from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.data.prepare.prepare import prepare_dataset
from jfe_jax.data.processor import train_tokenizer

ROWS, VOCABULARY = 1000, 4096
_FIRST = "step 1/1 "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the number of rounds."""
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Starts each in interleaved rounds; checks that the first step's loss is the same."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_run(Path(folder), progress)
        losses = set()
        cache = Path(folder) / "cache-0"

        def first_step() -> None:
            losses.add(train(config, {"JAX_COMPILATION_CACHE_DIR": str(cache)}))

        def cold() -> None:
            nonlocal cache
            cache = Path(tempfile.mkdtemp(dir=folder))
            first_step()

        # Once unmeasured, so that the libraries' files are in memory for all.
        first_step()
        seconds: dict[str, list[float]] = {"cold": [], "warm": []}
        with progress("starts", 3 * args.rounds) as done:
            help_seconds = by_turns({"help": _help}, args.rounds, done)["help"]
            for _ in range(args.rounds):
                # Warm is what a cold start left.
                for name, work in (("cold", cold), ("warm", first_step)):
                    seconds[name] += by_turns({name: work}, 1, done)[name]
    if len(losses) > 1:
        raise RuntimeError(f"the first step's loss differs from call to call: {losses}")
    rows = [
        ["`jfe --help`", help_seconds, None],
        ["`jfe train` to its first step, nothing compiled before", seconds["cold"], None],
        ["the same again", seconds["warm"], ratios(seconds["warm"], seconds["cold"])],
    ]
    return Result(
        tables=[table({"": "", "s": ".2f", "/ first": ".2f"}, rows)],
        packages=["jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain"],
        method=f"{args.rounds} interleaved rounds: median (min to max)",
        checked=f"the first step's loss, the same in all {2 * args.rounds + 1} runs",
    )


def make_run(folder: Path, progress: Progress) -> Path:
    """A prepared directory in M-BEIR's format, a tokenizer, and a config of one step on both; returns its file."""
    synthetic_mbeir.write(folder / "raw", ROWS)
    for _ in prepare_dataset(Mbeir(folder / "raw"), folder / "prepared", progress=progress):
        pass
    train_tokenizer(synthetic_mbeir.vocabulary(np.random.default_rng(0)).tolist(), VOCABULARY, folder / "tokenizer")
    vision = {"image_size": 56, "patch_size": 14, "width": 192, "depth": 4, "mlp_dim": 768, "num_heads": 3}
    text = {"width": 256, "depth": 4, "mlp_dim": 1024, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64}
    config = {
        "model": {"vision": vision, "text": text | {"vocab_size": VOCABULARY}, "image_token": VOCABULARY - 1},
        "tokens": {"tokenizer": str(folder / "tokenizer"), "max_text_tokens": 380},
        "data": {"path": str(folder / "prepared"), "pairs": 16, "rows": 8, "row_tokens": 512, "image_slots": 32},
        "optimizer": {"steps": 1, "warmup_steps": 0},
        "mesh": {"data": 1},
    }
    file = folder / "config.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def train(config: Path, env: Mapping[str, str]) -> str:
    """Starts `jfe train`; returns at the first step's line, which it gives without its rates, and ends the process."""
    with tempfile.TemporaryDirectory(dir=config.parent) as output:
        command = [sys.executable, "-m", "jfe_jax.cli.main", "train", "--config", str(config), f"--output={output}/run"]
        process = subprocess.Popen(
            command, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            told = []
            for line in process.stderr:
                told.append(line)
                if line.startswith(_FIRST):
                    return line.partition(", temperature")[0]
            raise RuntimeError("".join(told))
        finally:
            process.kill()
            process.communicate()


def _help() -> None:
    subprocess.run([sys.executable, "-m", "jfe_jax.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
