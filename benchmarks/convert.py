"""Compares `jfe convert from-hf` with a plain copy of the same files, and with PyTorch's way to its own format.

Each conversion runs in its own process, as a user would run it. Its peak memory is VmHWM from Linux: every page that it
had in memory, including pages of files.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.result import Progress, Result, ratios, table
from jfe_jax.config import ModelConfig, TextConfig, VisionConfig
from jfe_jax.data.processor import train_tokenizer
from jfe_jax.hf import mapping
from jfe_jax.hf.load import parameter_shapes
from jfe_jax.hf.safetensors_io import Tensor, write_weights
from jfe_jax.models.paligemma.hf_config import paligemma_config_json

SHARD_BYTES = 1 << 30


# Process → what it does with a source and a target.
_OURS = """
from jfe_jax.cli.main import main
sys.argv[1:1] = ["convert", "from-hf"]
main()
"""
_TORCH = """
import torch
from pathlib import Path
from safetensors.torch import load_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
for file in sorted(source.glob("*.safetensors")):
    torch.save(load_file(file), target / f"{file.stem}.pt")
"""
_PEAK = "from benchmarks import memory; print(memory.peak())"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares size, rounds and directory."""
    parser.add_argument("--gigabytes", type=float, default=4.5, help="size of the generated checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to make it; needs three times the size")


def run(args: argparse.Namespace, progress: Progress) -> Result:
    """Makes a PaliGemma of about the given size in GB; copies and converts it in interleaved rounds."""
    times: dict[str, list[float]] = {"copy": [], "convert": [], "torch": []}
    peaks: dict[str, list[int]] = {"convert": [], "torch": []}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, progress("conversions", args.rounds) as done:
        source, target = Path(folder) / "hf", Path(folder) / "target"
        size, largest = make_checkpoint(source, args.gigabytes)
        # It went past the page cache: the first to read it would read the disk, all others memory.
        shutil.copytree(source, target)
        shutil.rmtree(target)
        for _ in range(args.rounds):
            times["copy"].append(_timed(lambda: shutil.copytree(source, target)))
            shutil.rmtree(target)
            for name, program in (("convert", _OURS), ("torch", _TORCH)):
                command = [sys.executable, "-c", f"import sys\n{program}\n{_PEAK}", str(source), str(target)]

                def convert(name: str = name, command: list[str] = command) -> None:
                    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    peaks[name].append(int(told.split()[-1]))

                times[name].append(_timed(convert))
                shutil.rmtree(target)
            done(1)
    return _result(size, largest, times, peaks, args.rounds)


def _result(size: int, largest: int, times: dict[str, list[float]], peaks: dict[str, list[int]], rounds: int) -> Result:
    sides = {
        "copy": "copy of the files",
        "convert": "`jfe convert from-hf`",
        "torch": "safetensors to `torch.save`",
    }
    rows = [
        [
            sides[name],
            seconds,
            [size / 1e9 / one for one in seconds],
            ratios(times["copy"], seconds),
            max(peaks[name]) / 2**20 if name in peaks else None,
        ]
        for name, seconds in times.items()
    ]
    formats = {"": "", "s": ".1f", "GB/s": ".2f", "of a copy's rate": ".2f", "peak memory, GiB": ".2f"}
    return Result(
        tables=[table(formats, rows)],
        packages=["jax", "orbax-checkpoint", "safetensors", "torch"],
        method=f"{rounds} interleaved rounds, each written through to the disk: median (min to max); largest peak",
        notes=[
            f"{size / 1e9:.2f} GB of weights, the largest tensor {largest / 2**30:.2f} GiB: 1.3 times that and 1 GiB "
            f"are {1.3 * largest / 2**30 + 1:.2f} GiB."
        ],
    )


def make_checkpoint(out: Path, gigabytes: float) -> tuple[int, int]:
    """A random model with PaliGemma 3B's layers, as many as make up `gigabytes`, in shards of 1 GiB, float32.

    Returns:
      Bytes of all tensors and of the largest.
    """

    def shapes(depth: int) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
        # A small vocabulary: the largest tensor, and with it the bound on memory, is a layer's.
        text = TextConfig(vocab_size=4096, depth=depth)
        model = ModelConfig(text=text, vision=VisionConfig(depth=2), image_token=4095)
        return model, parameter_shapes(model)

    one, two = (sum(4 * int(np.prod(shape)) for shape in shapes(depth)[1].values()) for depth in (1, 2))
    model, wanted = shapes(max(1, 1 + round((gigabytes * 1e9 - one) / (two - one))))
    out.mkdir(parents=True)
    train_tokenizer(["a red house"], model.text.vocab_size, out)
    (out / "config.json").write_text(json.dumps(paligemma_config_json(model, {"pad": 0, "eos": 1, "bos": 2})))
    theirs = {name: piece.entry.their_shape(piece.shape) for name, piece in mapping.pieces(wanted).items()}
    rng = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, np.dtype(np.float32), lambda: rng.random(shape, np.float32))

    tensors = {name: tensor(shape) for name, shape in theirs.items()}
    write_weights(out, tensors, SHARD_BYTES)
    sizes = [one.nbytes for one in tensors.values()]
    return sum(sizes), max(sizes)


def _timed(work: Callable[[], Any]) -> float:
    start = time.monotonic()
    work()
    # A copy that is still in the kernel's memory is not done.
    os.sync()
    return time.monotonic() - start
