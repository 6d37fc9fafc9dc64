"""Compiles a config's training step and embedding step ahead of time, for TPU chips that need not be attached."""

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
      hlo: Optimized HLO text.
      arguments, outputs, aliased, temporaries, code: Bytes per chip. Outputs that reuse the memory of arguments are
        counted in `aliased`.
      seconds, cpu_seconds: Wall-clock time of tracing and compiling, and their CPU time summed over all cores.
      warnings: Lines that libtpu logged about arrays it fully rematerializes to change their layout.
      buffers: Buffer assignment, with the lifetime of each buffer.
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
    """The program needs more memory than a chip has.

    Attributes:
      needed, available: Bytes, as the compiler reports them.
      largest: Descriptions of the largest buffers at peak memory use.
    """

    def __init__(self, message: str, needed: int, available: int, largest: tuple[str, ...]):
        super().__init__(message)
        self.needed, self.available, self.largest = needed, available, largest


def configure_libtpu(topology: Topology) -> Path:
    """Sets the environment variables that libtpu reads when it is loaded.

    Call it once, before anything asks JAX for a device.

    Returns:
      The directory of libtpu's log files.

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
        # No TPU is attached, so there is no metadata server to query.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": topology.chip.accelerator.format(chips * (2 if topology.chip.name == "v5p" else 1)),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": logs,
        "TPU_MIN_LOG_LEVEL": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    return Path(logs)


def scale_batch(config: Config, factor: float) -> Config:
    """Returns the config with its batch scaled by `factor`.

    Raises:
      UserError: A scaled size of the batch is not a positive integer.
    """
    data = config.data
    sizes = {name: getattr(data, name) * factor for name in ("pairs", "rows", "image_slots")}
    for name, size in sizes.items():
        if size != int(size) or size < 1:
            raise UserError(f"data.{name}: {getattr(data, name)} times {factor} is not a positive integer")
    return replace(config, data=replace(data, **{name: int(size) for name, size in sizes.items()}))


def compile_train_step(config: Config, mesh: Any, logs: Path) -> CompiledProgram:
    """Compiles the training step of `config` for `mesh`, whose devices are topology descriptions.

    Raises:
      UserError: The config and the mesh are incompatible.
      OutOfMemory: The step does not fit into a chip's memory.
    """
    from jfe_jax.train import train_state, validate
    from jfe_jax.train.train_step import make_train_step

    validate.check(config)
    training = train_state.make_train_setup(config, mesh)
    return _compile(make_train_step(training), (training.abstract, make_abstract_batch(config, mesh)), logs)


def compile_embedding_step(config: Config, mesh: Any, logs: Path) -> CompiledProgram:
    """Compiles the forward pass of a global batch on `mesh`, which is what `jfe embed` would run there.

    Raises:
      UserError: The config and the mesh are incompatible.
      OutOfMemory: The step does not fit into a chip's memory.
    """
    import jax
    from flax import nnx

    from jfe_jax.models.abstract_model import blueprint
    from jfe_jax.parallel import sharding

    plan = blueprint(config.model, mesh)

    def embed(params: Any, packed: Any) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return nnx.merge(plan.graphdef, params)(packed)

    unchunked = replace(config, loss=replace(config.loss, grad_cache_chunks=1))
    step = jax.jit(embed, out_shardings=sharding.batch_sharding(mesh))
    return _compile(step, (plan.abstract, make_abstract_batch(unchunked, mesh).packed), logs)


def make_abstract_batch(config: Config, mesh: Any) -> Any:
    """Makes an abstract `ContrastiveBatch` (shapes, dtypes and shardings only) of the config's shapes on the mesh.

    Raises:
      UserError: The batch is not divisible by the number of groups of the mesh.
    """
    from jfe_jax.data.pipeline.loader import MAX_POSITIVES, batch_shape
    from jfe_jax.data.pipeline.pair_batcher import empty_batch
    from jfe_jax.parallel import sharding

    chunks = config.loss.grad_cache_chunks
    shape = batch_shape(config, sharding.group_count(mesh) * chunks, 1)
    return sharding.abstract_batch(empty_batch(replace(shape, groups=1, positives=MAX_POSITIVES)), mesh, chunks)


def _compile(step: Any, arguments: tuple[Any, ...], logs: Path) -> CompiledProgram:
    import jax

    wall_start, cpu_start, log_sizes = time.monotonic(), time.process_time(), _read_log_sizes(logs)
    lowered = step.lower(*arguments)
    with tempfile.TemporaryDirectory(prefix="jfe_plan_hlo_") as dump_dir:
        try:
            compiled = lowered.compile(compiler_options=xla_dump_options(dump_dir))
        except jax.errors.JaxRuntimeError as error:
            raise _explain_compile_error(str(error), BufferAssignment.read(Path(dump_dir))) from error
        buffers = BufferAssignment.read(Path(dump_dir))
    memory = compiled.memory_analysis()
    return CompiledProgram(
        compiled.as_text(),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        time.monotonic() - wall_start,
        time.process_time() - cpu_start,
        tuple(line for line in _read_new_lines(logs, log_sizes) if REMATERIALIZED in line),
        buffers,
    )


def _wait_for_libtpu_lock() -> None:
    # libtpu allows only one process per machine, and two concurrent compilations need twice the memory. The lock is
    # held until this process exits.
    import fcntl

    global _lock
    _lock = (Path(tempfile.gettempdir()) / "jfe_plan.lock").open("a")
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process is compiling for TPU; waiting for it to finish", file=sys.stderr)
        fcntl.flock(_lock, fcntl.LOCK_EX)


def _explain_compile_error(text: str, buffers: BufferAssignment | None) -> UserError:
    # "… required for HLO temporaries (17.00G) exceeds available HBM (15.75G)", "Used 17.51G of 15.75G hbm"
    match = re.search(r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM|of) \(?([\d.]+)([KMGT]?)\)?", text)
    if "RESOURCE_EXHAUSTED" not in text or not match:
        first_line = next((line for line in text.splitlines() if line.strip()), text)
        return UserError(f"the compiler failed on the step: {first_line[:300]}")
    needed, available = _parse_bytes(match[1], match[2]), _parse_bytes(match[3], match[4])
    largest = tuple(describe_buffer(value) for value in buffers.largest(3)) if buffers else ()
    details = f"; the largest buffers at the memory peak: {'; '.join(largest)}" if largest else ""
    return OutOfMemory(
        f"does not fit: {needed / 2**30:.2f} GiB of {available / 2**30:.2f} GiB{details}", needed, available, largest
    )


def _parse_bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit])


def _read_log_sizes(logs: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in logs.glob("tpu_driver.*") if not path.is_symlink()}


def _read_new_lines(logs: Path, offsets: dict[Path, int]) -> Iterator[str]:
    for path in _read_log_sizes(logs):
        with path.open(errors="replace") as file:
            file.seek(offsets.get(path, 0))
            yield from (line.strip() for line in file)
