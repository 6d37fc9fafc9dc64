"""One run of many processes: how they find each other. Everything else is the mesh's business."""

import os

from jfe_jax.errors import UserError

# Set by launch/local.py and by the GKE manifest; on TPU VMs and under SLURM jax finds the rest itself.
COORDINATOR, COUNT, INDEX, DETECT = "JFE_COORDINATOR", "JFE_PROCESSES", "JFE_PROCESS", "JFE_DISTRIBUTED"


def is_first() -> bool:
    """Whether this process writes what only one of them is to write."""
    import jax

    return jax.process_index() == 0


def meet(what: str) -> None:
    """Waits for all processes; `what` has been done, and is the same in each.

    Every process calls it at the same place, or the first that gets there waits for ever.
    """
    import jax

    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(f"jfe: {what}")


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
