"""Writes safetensors files tensor by tensor; the library's own writer wants all of a file in memory.

The format (github.com/huggingface/safetensors): the length of the header in 8 bytes, a JSON header with every tensor's
type, shape and place, the tensors. Order and padding are the library's, so that the same tensors make the same bytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jfe_jax.checkpoint.direct_io import DirectWriter
from jfe_jax.models.hf_json import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# As the files name them, in the order in which the library sorts a file's tensors.
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """What a file gets: `read` gives the whole, of this shape and type, when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """One file, or several of at most `shard_bytes` and their index; one tensor is in memory at a time.

    Raises:
      OSError: the disk is full, or the like.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX, index)


def tensor_starts(path: Path) -> dict[str, int]:
    """Name → the byte of a safetensors file, whose header is in order, at which the tensor's numbers begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. Raises OSError."""
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with DirectWriter(path) as file:
        file.write(np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8))
        for _, tensor in ordered:
            file.write(np.ascontiguousarray(tensor.read()))
