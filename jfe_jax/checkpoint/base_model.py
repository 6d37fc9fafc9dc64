"""References a LoRA run's frozen base model, verified by a fingerprint of its weights.

The checkpoints of such a run do not contain the base weights. `base.json` in the run directory locates and identifies
them: {"path", "relative", "fingerprint"}.
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
# Elements of a stored array that are in memory at a time.
CHUNK_ELEMENTS = 8 << 20


class BaseModelRef(NamedTuple):
    """Reference to the base model of adapters.

    Attributes:
      path: Absolute path of one checkpoint of a run, or of a Hugging Face directory.
      fingerprint: Fingerprint of its parameters.
    """

    path: Path
    fingerprint: str


def write_base_ref(run: Path, base: BaseModelRef) -> None:
    """Writes `base.json` of an existing run directory."""
    tree = {
        "path": str(base.path),
        # Still valid if both directories are moved together.
        "relative": os.path.relpath(base.path, run.absolute()),
        "fingerprint": base.fingerprint,
    }
    part = run / f"{BASE_REF_FILE}.part"
    part.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    part.replace(run / BASE_REF_FILE)


def read_base_ref(run: Path) -> BaseModelRef:
    """Reads `base.json` of a run directory.

    Raises:
      UserError: The file is missing or invalid, or the base model that it names does not exist.
    """
    file = run / BASE_REF_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        candidates = [Path(tree["path"]), Path(os.path.normpath(run.absolute() / tree["relative"]))]
        fingerprint = tree["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: cannot read the reference to the base model of this run's adapters ({error}); copy the file from "
            "the original run directory"
        ) from error
    path = next((path for path in candidates if path.is_dir()), None)
    if path is None:
        raise UserError(
            f"{candidates[0]}: base model not found; the adapters of {run} need it. Restore it, or update the path in "
            f"{file}"
        )
    return BaseModelRef(path, fingerprint)


def load_base_params(run: Path, load: Callable[[Path], tuple[LoraConfig, dict[str, Any]]]) -> dict[str, Any]:
    """Loads the base weights of the adapters of `run`, as a plain dict.

    Args:
      run: Run directory.
      load: Loads a model from a path and returns its LoRA config and its parameters, including any adapters, which are
        merged here.

    Raises:
      UserError: As `read_base_ref` and `load` raise it, or the weights do not match the fingerprint in `base.json`.
    """
    base = read_base_ref(run)
    adapters, params = load(base.path)
    check_fingerprint(base, fingerprint_params(params), run)
    return lora.merge(params, adapters)


def check_fingerprint(base: BaseModelRef, fingerprint: str, run: Path) -> None:
    """Raises UserError unless the fingerprint of the weights at `base.path` is that of the base of `run`."""
    if fingerprint != base.fingerprint:
        raise UserError(
            f"{base.path}: not the weights that the adapters of {run} were trained on (fingerprint {fingerprint}, not "
            f"{base.fingerprint}); update the path in {run / BASE_REF_FILE}"
        )


def fingerprint_params(params: Any) -> str:
    """Computes a fingerprint (16 hex digits) of the names, shapes and float32 bits of parameters.

    It does not depend on the mesh.

    Args:
      params: Plain dict of arrays, all on one mesh; narrower floats count as the float32 of the same value.
    """
    flat = dict(sorted(flatten(params).items()))
    mesh = getattr(next(iter(flat.values())).sharding, "mesh", None)
    replicated = None if mesh is None else sharding.replicated(mesh)
    checksum = jax.jit(lambda leaves: [_bit_checksum(leaf) for leaf in leaves], out_shardings=replicated)
    sums = jax.device_get(checksum(list(flat.values())))
    return _digest((name, leaf.shape, leaf_sum) for (name, leaf), leaf_sum in zip(flat.items(), sums, strict=True))


def fingerprint_stored(arrays: dict[str, StreamedArray]) -> str:
    """Computes the fingerprint of parameters on disk, by dotted path, reading them in chunks."""
    return _digest((name, array.shape, _bit_checksum_stored(array)) for name, array in sorted(arrays.items()))


def _digest(sums: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for name, shape, leaf_sum in sums:
        digest.update(f"{name} {shape} ".encode())
        digest.update(np.asarray(leaf_sum).tobytes())
    return digest.hexdigest()[:16]


def _bit_checksum_stored(array: StreamedArray) -> np.ndarray:
    """Computes `_bit_checksum` of a stored array, read in chunks along the first axis."""
    row = array.size // array.shape[0]
    rows = max(1, CHUNK_ELEMENTS // row)
    total = np.zeros(2, np.uint32)
    for start in range(0, array.shape[0], rows):
        index = (slice(start, min(start + rows, array.shape[0])), *(slice(0, size) for size in array.shape[1:]))
        bits = np.ascontiguousarray(array.read(index), np.float32).view(np.uint32).reshape(-1)
        position = np.arange(bits.size, dtype=np.uint32) + np.uint32(start * row % 2**32)
        factor = position * np.uint32(2654435761) | np.uint32(1)
        total += np.array([bits.sum(dtype=np.uint32), (bits * factor).sum(dtype=np.uint32)])
    return total


def _bit_checksum(leaf: jax.Array) -> jax.Array:
    """Computes the sum of the bits and their sum weighted by position, as uint32 [2].

    Integer sums are exact in any order, so the result does not depend on the sharding.
    """
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    # A scattered odd factor per position, so that swapping two neighbors changes the sum.
    factor = (position * np.uint32(2654435761)) | np.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * factor, dtype=jnp.uint32)])
