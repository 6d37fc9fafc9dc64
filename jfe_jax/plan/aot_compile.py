"""Compiles a config's training step and embedding step for chips that are not there."""

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
from jfe_jax.plan.buffer_assignment import BufferAssignment, describe_buffer, xla_dump_options
from jfe_jax.plan.topology import Topology

_lock: Any = None
REMATERIALIZED = "nvoluntary full rematerialization"


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled program.

    Attributes:
      hlo: its optimized text.
      arguments, outputs, aliased, temporaries, code: bytes a chip; outputs that reuse arguments are in `aliased`.
      seconds, cpu_seconds: that tracing and compiling took, and of all processors together.
      warnings: what libtpu wrote of arrays copied whole to change their layout.
      buffers: what lies in memory when.
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
    buffers: BufferAssignment

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class OutOfMemory(UserError):
    """The program needs more memory than a chip has; `needed` and `available` in bytes, as the compiler says."""

    def __init__(self, message: str, needed: int, available: int, largest: tuple[str, ...]):
        super().__init__(message)
        self.needed, self.available, self.largest = needed, available, largest


def configure_libtpu(topology: Topology) -> Path:
    """Sets what libtpu reads when it is loaded; to be called once, before anything asks JAX for a device.

    Returns:
      The folder that libtpu's log files go to.

    Raises:
      UserError: libtpu is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("jfe plan needs libtpu: pip install 'jax[tpu]'")
    _wait_for_libtpu_lock()
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


def scale_batch(config: Config, factor: float) -> Config:
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


def compile_train_step(config: Config, mesh: Any, logs: Path) -> CompiledProgram:
    """The training step of `config` on `mesh`, whose devices are stand-ins.

    Raises:
      UserError: config and mesh do not fit together.
      OutOfMemory: the step does not fit into a chip's memory.
    """
    from jfe_jax.train import train_state, validate
    from jfe_jax.train.train_step import make_train_step

    validate.check(config)
    training = train_state.make_train_setup(config, mesh)
    return _compile(make_train_step(training), (training.abstract, make_abstract_batch(config, mesh)), logs)


def compile_embedding_step(config: Config, mesh: Any, logs: Path) -> CompiledProgram:
    """The forward pass of a global batch on `mesh`: what `jfe embed` would run there. Raises as `train_step`."""
    import jax
    from flax import nnx

    from jfe_jax.models.abstract_model import blueprint
    from jfe_jax.parallel import sharding

    plan = blueprint(config.model, mesh)

    def embed(params: Any, packed: Any) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return nnx.merge(plan.graphdef, params)(packed)

    one = replace(config, loss=replace(config.loss, grad_cache_chunks=1))
    step = jax.jit(embed, out_shardings=sharding.batch_sharding(mesh))
    return _compile(step, (plan.abstract, make_abstract_batch(one, mesh).packed), logs)


def make_abstract_batch(config: Config, mesh: Any) -> Any:
    """A ContrastiveBatch of the config's shapes on the mesh, without arrays.

    Raises:
      UserError: the batch does not divide among the mesh's groups.
    """
    from jfe_jax.data.pipeline.loader import MAX_POSITIVES, batch_shape
    from jfe_jax.data.pipeline.pair_batcher import empty_batch
    from jfe_jax.parallel import sharding

    chunks = config.loss.grad_cache_chunks
    shape = batch_shape(config, sharding.group_count(mesh) * chunks, 1)
    return sharding.abstract_batch(empty_batch(replace(shape, groups=1, positives=MAX_POSITIVES)), mesh, chunks)


def _compile(step: Any, arguments: tuple[Any, ...], logs: Path) -> CompiledProgram:
    import jax

    began, worked, seen = time.monotonic(), time.process_time(), _read_log_sizes(logs)
    lowered = step.lower(*arguments)
    with tempfile.TemporaryDirectory(prefix="jfe_plan_hlo_") as dumped:
        try:
            compiled = lowered.compile(compiler_options=xla_dump_options(dumped))
        except jax.errors.JaxRuntimeError as error:
            raise _explain_compile_error(str(error), BufferAssignment.read(Path(dumped))) from error
        buffers = BufferAssignment.read(Path(dumped))
    memory = compiled.memory_analysis()
    return CompiledProgram(
        compiled.as_text(),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        time.monotonic() - began,
        time.process_time() - worked,
        tuple(line for line in _read_new_lines(logs, seen) if REMATERIALIZED in line),
        buffers,
    )


def _wait_for_libtpu_lock() -> None:
    # libtpu refuses a second process on a machine, and two compilers want twice the memory. Held until this one ends.
    import fcntl

    global _lock
    _lock = (Path(tempfile.gettempdir()) / "jfe_plan.lock").open("a")
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process compiles for TPU; waiting for it", file=sys.stderr)
        fcntl.flock(_lock, fcntl.LOCK_EX)


def _explain_compile_error(text: str, buffers: BufferAssignment | None) -> UserError:
    # "… required for HLO temporaries (17.00G) exceeds available HBM (15.75G)", "Used 17.51G of 15.75G hbm"
    used = re.search(r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM|of) \(?([\d.]+)([KMGT]?)\)?", text)
    if "RESOURCE_EXHAUSTED" not in text or not used:
        first = next((line for line in text.splitlines() if line.strip()), text)
        return UserError(f"the compiler refused the step: {first[:300]}")
    needed, available = _parse_bytes(used[1], used[2]), _parse_bytes(used[3], used[4])
    largest = tuple(describe_buffer(value) for value in buffers.largest(3)) if buffers else ()
    named = f"; the largest buffers where it is fullest: {'; '.join(largest)}" if largest else ""
    return OutOfMemory(
        f"does not fit: {needed / 2**30:.2f} GiB of {available / 2**30:.2f} GiB{named}", needed, available, largest
    )


def _parse_bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit])


def _read_log_sizes(logs: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in logs.glob("tpu_driver.*") if not path.is_symlink()}


def _read_new_lines(logs: Path, seen: dict[Path, int]) -> Iterator[str]:
    for path in _read_log_sizes(logs):
        with path.open(errors="replace") as file:
            file.seek(seen.get(path, 0))
            yield from (line.strip() for line in file)
