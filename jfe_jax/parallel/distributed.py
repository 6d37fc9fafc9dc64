"""One run of many processes: how they find each other, and agree. Everything else is the mesh's business.

What can fail in one of them alone is done in `together` or `by_first`: else the others would wait for it at the next
place where all meet, for ever.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jfe_jax.errors import SaidElsewhere, UserError, one_line

# Set by launch/local.py and by the GKE manifest; on TPU VMs and under SLURM jax finds the rest itself.
COORDINATOR, COUNT, INDEX, DETECT = "JFE_COORDINATOR", "JFE_PROCESSES", "JFE_PROCESS", "JFE_DISTRIBUTED"


def is_first() -> bool:
    """Whether this process writes what only one of them is to write."""
    import jax

    return jax.process_index() == 0


def exchange(own: Any) -> list[Any]:
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
def together() -> Iterator[None]:
    """What every process does for itself: it is done in all of them, or all leave the block with one error.

    Raises:
      SaidElsewhere: another process failed, and says why (the first of those that did).
    """
    import jax

    failure = None
    try:
        yield
    except Exception as error:
        if known_to_all(error):
            raise
        failure = error
    said = exchange(None if failure is None else one_line(failure))
    first = next((number for number, one in enumerate(said) if one is not None), None)
    if first is None:
        return
    if first == jax.process_index():
        failure.known_to_all = True
        raise failure
    raise SaidElsewhere(said[first]) from failure


def known_to_all(error: Exception) -> bool:
    """Whether the other processes, if there are any, leave with this error too."""
    if isinstance(error, SaidElsewhere) or hasattr(error, "known_to_all") or "jax" not in sys.modules:
        return True
    import jax

    return not jax.distributed.is_initialized() or jax.process_count() == 1


def by_first(do: Callable[[], Any]) -> Any:
    """What process 0 does alone while the others wait: its result, which is JSON, in all of them, or its error."""
    result = None
    with together():
        if is_first():
            result = do()
    return exchange(result)[0]


def join() -> None:
    """Joins the job's other processes, if the environment names any; to be called before jax is used, or again.

    JFE_COORDINATOR (host:port of process 0), JFE_PROCESSES and JFE_PROCESS say it outright. JFE_DISTRIBUTED=1 lets jax
    ask its surroundings: a TPU slice's metadata, or SLURM's variables.

    Raises:
      UserError: some of the variables are missing or no numbers, or the others do not answer.
    """
    given = {name: os.environ[name] for name in (COORDINATOR, COUNT, INDEX) if os.environ.get(name)}
    if not given and os.environ.get(DETECT) != "1":
        return
    if given and len(given) < 3:
        raise UserError(f"{', '.join(given)} is set; set {COORDINATOR}, {COUNT} and {INDEX}, or none of them")
    import jax

    if jax.distributed.is_initialized():
        return
    # What processes on CPUs exchange arrays by; other platforms have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if given:
            count, index = int(given[COUNT]), int(given[INDEX])
            if not 0 <= index < count:
                raise UserError(f"{INDEX} is {index}; it has to be from 0 to {count - 1}, {COUNT} is {count}")
            jax.distributed.initialize(given[COORDINATOR], count, index)
        else:
            jax.distributed.initialize()
    except ValueError as error:
        raise UserError(f"{', '.join(given) or DETECT}: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        raise UserError(f"cannot join the other processes: {' '.join(str(error).split())[:300]}") from error
