"""A lock on an output path, so that two commands do not write to the same place."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from jfe_jax.errors import UserError

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def output_lock(path: str | os.PathLike[str], command: str) -> Iterator[None]:
    """Holds the lock of an output path, which need not exist yet.

    The lock is the kernel's, on a hidden file next to the path, or in it where its parent is read-only. It ends with
    the process, however that ends, so a killed run leaves nothing to clean up.

    Args:
      path: The output; links are followed, so that two names of one place share a lock.
      command: The name of the holder in the other command's error, such as "jfe train".

    Raises:
      UserError: Another process holds the lock; names it, its host and its start. Or the parent of the path cannot be
        made or written to.
    """
    try:
        file = _lock_file(Path(os.path.realpath(path)))
        descriptor = _acquire(file, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}: {error.filename})") from error
    if descriptor is None:
        yield
        return
    try:
        holder = {
            "command": command,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%F %T"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        # Removed while it is held: whoever waits for this file finds that it is no longer the path's (see _acquire).
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _lock_file(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.access(target.parent, os.W_OK) or not target.is_dir():
        return target.parent / f".{target.name}.jfe-lock"
    return target / ".jfe-lock"


def _acquire(file: Path, path: str | os.PathLike[str]) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(f"{path}: in use by {holder}; wait until it has ended, or choose another output") from None
        except OSError as error:
            os.close(descriptor)
            _LOG.warning("%s: no file locks here (%s); do not run two commands on this output", path, error.strerror)
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        # The last holder has removed this file since it was opened.
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"`{holder['command']}` (process {holder['process']} on {holder['host']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process, which has just started"
