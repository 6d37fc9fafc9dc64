"""Compiles a config's training step and embedding step for chips that are not there."""

import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.plan.hlo import BYTES
from jfe_jax.plan.topology import Topology

_lock: Any = None
REMATERIALIZED = "nvoluntary full rematerialization"


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      hlo: its optimized text.
      arguments, outputs, aliased, temporaries, code: bytes a chip; outputs that reuse arguments are in `aliased`.
      seconds, cpu_seconds: that tracing and compiling took, and of all processors together.
      warnings: what libtpu wrote of arrays copied whole to change their layout.
    """

    hlo: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    seconds: float
    cpu_seconds: float
    warnings: tuple[str, ...]

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class DoesNotFit(UserError):
    """The program needs more memory than a chip has; `needed` and `available` in bytes, as the compiler says."""

    def __init__(self, message: str, needed: int, available: int, largest: tuple[str, ...]):
        super().__init__(message)
        self.needed, self.available, self.largest = needed, available, largest


def prepare(topology: Topology) -> Path:
    """Sets what libtpu reads when it is loaded; to be called once, before anything asks JAX for a device.

    Returns:
      The folder that libtpu's log files go to.

    Raises:
      UserError: libtpu is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("jfe plan needs libtpu: pip install 'jax[tpu]'")
    _wait_for_others()
    logs = os.environ.get("TPU_LOG_DIR")
    if not logs or logs == "disabled":
        logs = tempfile.mkdtemp(prefix="jfe_plan_")
    chips = topology.chips // topology.slices
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        # There is no TPU and no metadata server to ask about one.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": topology.chip.accelerator.format(chips * (2 if topology.chip.name == "v5p" else 1)),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": logs,
        "TPU_MIN_LOG_LEVEL": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    return Path(logs)


def scaled(config: Config, factor: float) -> Config:
    """The config with `factor` times the batch.

    Raises:
      UserError: pairs, rows or image slots do not come out whole.
    """
    data = config.data
    sizes = {name: getattr(data, name) * factor for name in ("pairs", "rows", "image_slots")}
    for name, size in sizes.items():
        if size != int(size) or size < 1:
            raise UserError(f"data.{name}: {getattr(data, name)} times {factor} is no whole number")
    return replace(config, data=replace(data, **{name: int(size) for name, size in sizes.items()}))


def train_step(config: Config, mesh: Any, logs: Path) -> Program:
    """The training step of `config` on `mesh`, whose devices are stand-ins.

    Raises:
      UserError: config and mesh do not fit together.
      DoesNotFit: the step does not fit into a chip's memory.
    """
    from jfe_jax.train import checks, state
    from jfe_jax.train.step import make_train_step

    checks.check(config)
    training = state.prepare(config, mesh)
    return _compiled(make_train_step(training), (training.abstract, abstract_batch(config, mesh)), logs)


def embedding_step(config: Config, mesh: Any, logs: Path) -> Program:
    """The forward pass of a global batch on `mesh`: what `jfe embed` would run there. Raises as `train_step`."""
    import jax
    from flax import nnx

    from jfe_jax import sharding
    from jfe_jax.blueprint import blueprint

    plan = blueprint(config.model, mesh)

    def embed(params: Any, packed: Any) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return nnx.merge(plan.graphdef, params)(packed)

    one = replace(config, loss=replace(config.loss, grad_cache_chunks=1))
    step = jax.jit(embed, out_shardings=sharding.batch_sharding(mesh))
    return _compiled(step, (plan.abstract, abstract_batch(one, mesh).packed), logs)


def loss_alone(config: Config, mesh: Any, logs: Path) -> Program:
    """The loss and its gradients from embeddings that are there: what of the step's memory is the loss's."""
    import jax
    import jax.numpy as jnp

    from jfe_jax.models import embedding_width
    from jfe_jax.train import state
    from jfe_jax.train.step import contrast

    training = state.prepare(config, mesh)
    batch = abstract_batch(config, mesh)
    valid = batch.packed.valid
    width = embedding_width(config.model)
    embeddings = jax.ShapeDtypeStruct((*valid.shape, width), jnp.float32, sharding=valid.sharding)

    def step(loss: Any, embeddings: Any, batch: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(lambda *both: contrast(training, *both, batch)[0], (0, 1))(loss, embeddings)

    # It looks at no pixels.
    pixels = jax.ShapeDtypeStruct((*valid.shape[:-1], 0), jnp.uint8, sharding=valid.sharding)
    small = batch._replace(packed=batch.packed._replace(pixels=pixels))
    return _compiled(jax.jit(step), (training.abstract.loss, embeddings, small), logs)


def abstract_batch(config: Config, mesh: Any) -> Any:
    """A ContrastiveBatch of the config's shapes on the mesh, without arrays.

    Raises:
      UserError: the batch does not divide among the mesh's groups.
    """
    import jax

    from jfe_jax import sharding
    from jfe_jax.data.contrastive import empty_batch
    from jfe_jax.data.loader import MAX_POSITIVES, batch_shape

    chunks = config.loss.grad_cache_chunks
    groups = sharding.group_count(mesh) * chunks
    shape = replace(batch_shape(config, groups, 1), groups=1, positives=MAX_POSITIVES)
    layout = sharding.batch_sharding(mesh, chunks)

    def spread(leaf: Any) -> jax.ShapeDtypeStruct:
        sizes = (groups, *leaf.shape[1:]) if chunks == 1 else (chunks, groups // chunks, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(sizes, leaf.dtype, sharding=layout)

    return jax.tree.map(spread, empty_batch(shape))


def _compiled(step: Any, arguments: tuple[Any, ...], logs: Path) -> Program:
    import jax

    began, worked, seen = time.monotonic(), time.process_time(), _log_sizes(logs)
    lowered = step.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(str(error), lowered.as_text()) from error
    memory = compiled.memory_analysis()
    return Program(
        compiled.as_text(),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        time.monotonic() - began,
        time.process_time() - worked,
        tuple(line for line in _new_lines(logs, seen) if REMATERIALIZED in line),
    )


def _wait_for_others() -> None:
    # libtpu refuses a second process on a machine, and two compilers want twice the memory. Held until this one ends.
    import fcntl

    global _lock
    _lock = (Path(tempfile.gettempdir()) / "jfe_plan.lock").open("a")
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process compiles for TPU; waiting for it", file=sys.stderr)
        fcntl.flock(_lock, fcntl.LOCK_EX)


def _explained(text: str, lowered: str) -> UserError:
    # "… required for HLO temporaries (17.00G) exceeds available HBM (15.75G)", "Used 17.51G of 15.75G hbm"
    used = re.search(r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM|of) \(?([\d.]+)([KMGT]?)\)?", text)
    if "RESOURCE_EXHAUSTED" not in text or not used:
        first = next((line for line in text.splitlines() if line.strip()), text)
        return UserError(f"the compiler refused the step: {first[:300]}")
    needed, available = _bytes(used[1], used[2]), _bytes(used[3], used[4])
    largest = largest_arrays(lowered)
    return DoesNotFit(
        f"does not fit: {needed / 2**30:.2f} GiB of {available / 2**30:.2f} GiB; the largest arrays that the step "
        f"makes: {'; '.join(largest)}",
        needed,
        available,
        largest,
    )


def largest_arrays(lowered: str, count: int = 3) -> tuple[str, ...]:
    """The largest kinds of arrays that a chip makes, as "6.75 GiB bf16[18,1,24,512,16384]", from StableHLO text.

    The compiler names no buffers of what it refuses. In the text, shapes are a chip's own where a computation is
    written for each chip, and in the functions called there; elsewhere (parameters, optimizer) they are of whole
    arrays, which are left out if there is any of the former.
    """
    own, depth, inside = [], 0, False
    for line in lowered.splitlines():
        if "func.func public" in line:
            inside = False
        elif "func.func private" in line:
            inside = True
        if "sdy.manual_computation" in line:
            depth += 1
        elif depth and line.strip().startswith("} : ("):
            depth -= 1
            continue
        if depth or inside:
            own.append(line)
    # Reshaped, an array is the same array.
    sizes: dict[tuple[str, int], str] = {}
    for dims, dtype in re.findall(r"tensor<((?:\d+x)+)([a-z]+\d+)>", "\n".join(own) if any(own) else lowered):
        dtype = dtype.replace("i", "s") if dtype.startswith("i") else dtype
        shape = [int(size) for size in dims.strip("x").split("x")]
        sizes.setdefault((dtype, math.prod(shape) * BYTES.get(dtype, 4)), f"{dtype}[{','.join(map(str, shape))}]")
    largest = sorted(sizes, key=lambda one: -one[1])[:count]
    return tuple(f"{one[1] / 2**30:.2f} GiB {sizes[one]}" for one in largest)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit])


def _log_sizes(logs: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in logs.glob("tpu_driver.*") if not path.is_symlink()}


def _new_lines(logs: Path, seen: dict[Path, int]) -> Iterator[str]:
    for path in _log_sizes(logs):
        with path.open(errors="replace") as file:
            file.seek(seen.get(path, 0))
            yield from (line.strip() for line in file)
