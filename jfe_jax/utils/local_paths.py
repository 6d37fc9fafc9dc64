"""Checks of paths that users give, before any work is done."""

import os
import re

from jfe_jax.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+[^/]")
# Orbax lists a checkpoint's files by a pattern that it builds from the path, without escaping it: a save under `run[1]`
# would be empty, one under `run*` could take in another run's arrays. With a backslash the arrays land elsewhere.
_PATTERN = set("[]*?\\")


def require_local(path: str | os.PathLike[str], name: str) -> None:
    """Raises UserError if a path is a URL, which would become a local folder; `name` is the option's or the key's."""
    if _URL.match(os.fspath(path)):
        raise UserError(f"{name}: {path} is a URL; only local paths work; mount the bucket and give its path")


def require_checkpoint_path(path: str | os.PathLike[str], name: str) -> None:
    """Raises UserError if checkpoints cannot be written to or read from a path, or below it."""
    require_local(path, name)
    absolute = os.path.abspath(path)
    if bad := sorted(_PATTERN & set(absolute)):
        raise UserError(
            f"{name}: {absolute} contains {' and '.join(bad)}, which checkpoint storage takes for a file name pattern; "
            "choose or rename to a path without"
        )
