"""The lock of a verb's output, held by process 0 for all processes of a run."""

import contextlib
import os
from collections.abc import Iterator

from jfe_jax.parallel.distributed import all_or_none, is_process_zero
from jfe_jax.utils.output_lock import output_lock


@contextlib.contextmanager
def locked_output(path: str | os.PathLike[str], verb: str) -> Iterator[None]:
    """Holds the lock of an output path while a verb runs; every process of the run enters it.

    Raises:
      UserError: Another command holds it.
    """
    with contextlib.ExitStack() as stack:
        with all_or_none():
            if is_process_zero():
                stack.enter_context(output_lock(path, f"jfe {verb}"))
        yield
