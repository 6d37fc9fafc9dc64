"""What a run with adapters stands on: weights that its checkpoints do not hold, and how to be sure of them.

`base.json` in the run directory says where they are and what they are: {"path", "relative", "fingerprint"}.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfe_jax.checkpoint.streaming import StreamedArray
from jfe_jax.config import LoraConfig
from jfe_jax.errors import UserError
from jfe_jax.models import lora
from jfe_jax.parallel import sharding
from jfe_jax.utils.pytrees import flatten

BASE_REF_FILE = "base.json"
# Numbers of a stored array that are in memory at a time.
CHUNK_ELEMENTS = 8 << 20


class BaseModelRef(NamedTuple):
    """Weights that others refer to.

    Attributes:
      path: absolute; one checkpoint of a run, or a Hugging Face directory.
      fingerprint: of its parameters.
    """

    path: Path
    fingerprint: str


def write_base_ref(run: Path, base: BaseModelRef) -> None:
    """Writes `base.json` of an existing run directory."""
    tree = {
        "path": str(base.path),
        # Both directories may be moved together.
        "relative": os.path.relpath(base.path, run.absolute()),
        "fingerprint": base.fingerprint,
    }
    part = run / f"{BASE_REF_FILE}.part"
    part.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    part.replace(run / BASE_REF_FILE)


def read_base_ref(run: Path) -> BaseModelRef:
    """Reads `base.json` of a run directory.

    Raises:
      UserError: it is missing or no such file, or what it names is not there.
    """
    file = run / BASE_REF_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        places = [Path(tree["path"]), Path(os.path.normpath(run.absolute() / tree["relative"]))]
        fingerprint = tree["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: cannot read what the adapters of this run stand on ({error}); copy it from where the run was made"
        ) from error
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise UserError(
            f"{places[0]}: not there; the adapters of {run} stand on it. Put it back, or write its place into {file}"
        )
    return BaseModelRef(found, fingerprint)


def load_base_params(run: Path, load: Callable[[Path], tuple[LoraConfig, dict[str, Any]]]) -> dict[str, Any]:
    """The weights that the adapters of `run` stand on, as a plain dict.

    Args:
      load: opens a path: the settings of its adapters, and its parameters, adapters included.

    Raises:
      UserError: as `read_base_ref`; the weights are not those that `base.json` was written for; what `load` raises.
    """
    base = read_base_ref(run)
    adapters, params = load(base.path)
    check_fingerprint(base, fingerprint_params(params), run)
    return lora.merge(params, adapters)


def check_fingerprint(base: BaseModelRef, found: str, run: Path) -> None:
    """Raises UserError unless the fingerprint of what lies at `base.path` is what the adapters of `run` stand on."""
    if found != base.fingerprint:
        raise UserError(
            f"{base.path}: not the weights that the adapters of {run} were trained on (fingerprint {found}, not "
            f"{base.fingerprint}); write the right place into {run / BASE_REF_FILE}"
        )


def fingerprint_params(params: Any) -> str:
    """16 hex digits of every bit of float32 parameters, their names and shapes; the same on every mesh.

    Args:
      params: plain dict of arrays, all on one mesh; narrower floats count as the float32 of the same value.
    """
    flat = dict(sorted(flatten(params).items()))
    mesh = getattr(next(iter(flat.values())).sharding, "mesh", None)
    whole = None if mesh is None else sharding.replicated(mesh)
    sums = jax.jit(lambda leaves: [_bit_checksum(leaf) for leaf in leaves], out_shardings=whole)(list(flat.values()))
    return _digest(
        (name, leaf.shape, own) for (name, leaf), own in zip(flat.items(), jax.device_get(sums), strict=True)
    )


def fingerprint_stored(arrays: dict[str, StreamedArray]) -> str:
    """The `fingerprint` of parameters by dotted path that lie on the disk; they are read in parts."""
    return _digest((name, array.shape, _bit_checksum_stored(array)) for name, array in sorted(arrays.items()))


def _digest(sums: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for name, shape, own in sums:
        digest.update(f"{name} {shape} ".encode())
        digest.update(np.asarray(own).tobytes())
    return digest.hexdigest()[:16]


def _bit_checksum_stored(array: StreamedArray) -> np.ndarray:
    """As `_sum`, read along the first axis."""
    row = array.size // array.shape[0]
    rows = max(1, CHUNK_ELEMENTS // row)
    total = np.zeros(2, np.uint32)
    for start in range(0, array.shape[0], rows):
        index = (slice(start, min(start + rows, array.shape[0])), *(slice(0, size) for size in array.shape[1:]))
        bits = np.ascontiguousarray(array.read(index), np.float32).view(np.uint32).reshape(-1)
        place = np.arange(bits.size, dtype=np.uint32) + np.uint32(start * row % 2**32)
        factor = place * np.uint32(2654435761) | np.uint32(1)
        total += np.array([bits.sum(dtype=np.uint32), (bits * factor).sum(dtype=np.uint32)])
    return total


def _bit_checksum(leaf: jax.Array) -> jax.Array:
    """uint32 [2]: sums of the bits, plain and weighted by place. Whole numbers add up the same in any order."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    # An odd factor for every place, scattered: neighbours that change places change the sum.
    factor = (place * np.uint32(2654435761)) | np.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * factor, dtype=jnp.uint32)])
