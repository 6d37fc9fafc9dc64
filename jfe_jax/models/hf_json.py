"""Hugging Face's JSON files, read with care and written alike."""

import json
from pathlib import Path
from typing import Any

from jfe_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError if there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}); give a directory of a Hugging Face model"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: an object is wanted, not a {type(tree).__name__}")
    return tree


def section(tree: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The object under `name`, {} if there is none; `path` names the file in errors."""
    found = tree.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name} is an object, not {found!r}")
    return found


def refuse(path: Path, settings: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Raises UserError, with all of them listed, if settings (name → value, those allowed) have other values."""
    bad = [f"{key} = {value!r}" for key, (value, allowed) in settings.items() if value not in allowed]
    if bad:
        raise UserError(f"{path}: not implemented here: {'; '.join(bad)}")


def write_json(path: Path, tree: dict[str, Any] | list[Any]) -> None:
    """Raises OSError."""
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
