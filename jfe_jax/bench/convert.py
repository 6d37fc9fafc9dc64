"""`jfe convert from-hf` beside a plain copy of the same files, and beside PyTorch's way to a format of its own.

Each conversion is a process of its own, as a user runs it, and its peak is what Linux says (VmHWM): every page it had
in memory, of files too.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfe_jax.config import ModelConfig, TextConfig, VisionConfig
from jfe_jax.data.tokens import train_tokenizer
from jfe_jax.hf import mapping
from jfe_jax.hf.files import Tensor, write_weights
from jfe_jax.hf.load import parameter_shapes
from jfe_jax.hf.settings import config_json

SHARD_BYTES = 1 << 30


class Result(NamedTuple):
    """Medians over the rounds.

    Attributes:
      files: GB (10^9 bytes) of weights.
      largest: GiB of the largest tensor.
      seconds: of "copy", "convert" (ours) and "torch" (`safetensors.torch.load_file`, then `torch.save`).
      peak: GiB of the two conversions, the largest of the rounds.
    """

    files: float
    largest: float
    seconds: dict[str, float]
    peak: dict[str, float]


# Process → what it does with a source and a target.
_OURS = "from jfe_jax.hf.convert import from_hf; from_hf(*sys.argv[1:])"
_TORCH = """
import torch
from pathlib import Path
from safetensors.torch import load_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
for file in sorted(source.glob("*.safetensors")):
    torch.save(load_file(file), target / f"{file.stem}.pt")
"""
_PEAK = "from jfe_jax.bench import memory; print(memory.peak())"


def run(gigabytes: float, rounds: int, directory: Path | None = None) -> Result:
    """Makes a PaliGemma of about so many GB in `directory` (default: the system's); copies and converts it by turns."""
    times: dict[str, list[float]] = {"copy": [], "convert": [], "torch": []}
    peaks: dict[str, list[int]] = {"convert": [], "torch": []}
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        source, target = Path(folder) / "hf", Path(folder) / "target"
        size, largest = make_checkpoint(source, gigabytes)
        for _ in range(rounds):
            times["copy"].append(_timed(lambda: shutil.copytree(source, target)))
            shutil.rmtree(target)
            for name, program in (("convert", _OURS), ("torch", _TORCH)):
                command = [sys.executable, "-c", f"import sys\n{program}\n{_PEAK}", str(source), str(target)]

                def convert(name: str = name, command: list[str] = command) -> None:
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    peaks[name].append(int(done.stdout.split()[-1]))

                times[name].append(_timed(convert))
                shutil.rmtree(target)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return Result(size / 1e9, largest / 2**30, medians, {name: max(found) / 2**20 for name, found in peaks.items()})


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
    (out / "config.json").write_text(json.dumps(config_json(model, {"pad": 0, "eos": 1, "bos": 2})))
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
