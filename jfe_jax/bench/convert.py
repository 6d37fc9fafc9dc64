"""`jfe convert from-hf` beside a plain copy of the same files: rate and peak memory.

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
      copy, convert: seconds.
      peak: GiB, of the conversion, the largest of the rounds.
    """

    files: float
    largest: float
    copy: float
    convert: float
    peak: float


def run(gigabytes: float, rounds: int, directory: Path | None = None) -> Result:
    """Makes a PaliGemma of about so many GB in `directory` (default: the system's); copies and converts it by turns."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        source, copied, converted = (Path(folder) / name for name in ("hf", "copy", "run"))
        size, largest = make_checkpoint(source, gigabytes)
        copies, conversions, peaks = [], [], []
        for _ in range(rounds):
            copies.append(_timed(lambda: shutil.copytree(source, copied)))
            shutil.rmtree(copied)
            command = [sys.executable, "-m", "jfe_jax.bench.convert", str(source), str(converted)]
            start = time.monotonic()
            peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
            os.sync()
            conversions.append(time.monotonic() - start)
            shutil.rmtree(converted)
    medians = map(statistics.median, (copies, conversions))
    return Result(size / 1e9, largest / 2**30, *medians, max(peaks) / 2**20)


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


if __name__ == "__main__":
    from jfe_jax.hf.convert import from_hf

    from_hf(*sys.argv[1:])
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
