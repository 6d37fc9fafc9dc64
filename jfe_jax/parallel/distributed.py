"""Multi-process initialization and error agreement. The mesh handles everything else.

Code that can fail in a single process runs in `all_or_none` or `on_process_zero`. Otherwise the remaining processes
would wait for it forever at the next collective operation.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jfe_jax.errors import RemoteProcessError, UserError, format_error

# Set by launch/local.py and by the GKE manifest; on TPU VMs and under SLURM jax finds the rest itself.
COORDINATOR_ENV, PROCESS_COUNT_ENV, PROCESS_INDEX_ENV, AUTO_DETECT_ENV = (
    "JFE_COORDINATOR",
    "JFE_PROCESSES",
    "JFE_PROCESS",
    "JFE_DISTRIBUTED",
)


def is_process_zero() -> bool:
    """Whether this process writes what only one of them is to write."""
    import jax

    return jax.process_index() == 0


def allgather_json(own: Any) -> list[Any]:
    """What each process says, in their order; JSON. Waits for all: every process calls it at the same place."""
    import jax

    if jax.process_count() == 1:
        return [own]
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    content = np.frombuffer(json.dumps(own).encode(), np.uint8)
    sizes = process_allgather(np.array(len(content), np.int32)).tolist()
    # Few lengths, so few compilations.
    padded = np.zeros(max(64, 1 << max(sizes).bit_length()), np.uint8)
    padded[: len(content)] = content
    return [json.loads(row[:size].tobytes()) for row, size in zip(process_allgather(padded), sizes, strict=True)]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What every process does for itself: it is done in all of them, or all leave the block with one error.

    Raises:
      RemoteProcessError: another process failed, and says why (the first of those that did).
    """
    import jax

    failure = None
    try:
        yield
    except Exception as error:
        if is_synchronized(error):
            raise
        failure = error
    said = allgather_json(None if failure is None else format_error(failure))
    first = next((number for number, one in enumerate(said) if one is not None), None)
    if first is None:
        return
    if first == jax.process_index():
        failure.is_synchronized = True
        raise failure
    raise RemoteProcessError(said[first]) from failure


def is_synchronized(error: Exception) -> bool:
    """Whether the other processes, if there are any, leave with this error too."""
    if isinstance(error, RemoteProcessError) or hasattr(error, "is_synchronized") or "jax" not in sys.modules:
        return True
    import jax

    return not jax.distributed.is_initialized() or jax.process_count() == 1


def on_process_zero(do: Callable[[], Any]) -> Any:
    """What process 0 does alone while the others wait: its result, which is JSON, in all of them, or its error."""
    result = None
    with all_or_none():
        if is_process_zero():
            result = do()
    return allgather_json(result)[0]


def initialize_distributed() -> None:
    """Joins the job's other processes, if the environment names any; to be called before jax is used, or again.

    JFE_COORDINATOR (host:port of process 0), JFE_PROCESSES and JFE_PROCESS say it outright. JFE_DISTRIBUTED=1 lets jax
    ask its surroundings: a TPU slice's metadata, or SLURM's variables.

    Raises:
      UserError: some of the variables are missing or no numbers, or the others do not answer.
    """
    given = {
        name: os.environ[name]
        for name in (COORDINATOR_ENV, PROCESS_COUNT_ENV, PROCESS_INDEX_ENV)
        if os.environ.get(name)
    }
    if not given and os.environ.get(AUTO_DETECT_ENV) != "1":
        return
    if given and len(given) < 3:
        raise UserError(
            f"only {', '.join(given)} is set; set all of {COORDINATOR_ENV}, {PROCESS_COUNT_ENV} and "
            f"{PROCESS_INDEX_ENV}, or none of them"
        )
    import jax

    if jax.distributed.is_initialized():
        return
    # What processes on CPUs exchange arrays by; other platforms have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if given:
            count, index = int(given[PROCESS_COUNT_ENV]), int(given[PROCESS_INDEX_ENV])
            if not 0 <= index < count:
                raise UserError(
                    f"{PROCESS_INDEX_ENV} is {index}; it must be from 0 to {count - 1} because {PROCESS_COUNT_ENV} is "
                    f"{count}"
                )
            jax.distributed.initialize(given[COORDINATOR_ENV], count, index)
        else:
            jax.distributed.initialize()
    except ValueError as error:
        raise UserError(f"{', '.join(given) or AUTO_DETECT_ENV}: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        raise UserError(f"cannot join the other processes: {' '.join(str(error).split())[:300]}") from error
