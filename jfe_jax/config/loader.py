"""Reads a config: YAML files, `base` files, command-line overrides, strict types.

A YAML file holds the values that differ from the defaults; `--key.sub=value` on the command line overrides it. Every
checkpoint carries the resolved tree, so that it opens without its YAML.
"""

import dataclasses
import difflib
import functools
import math
import typing
from pathlib import Path
from typing import Any, Literal

import dacite

from jfe_jax.config import strict_yaml
from jfe_jax.config.schema import Config
from jfe_jax.errors import UserError
from jfe_jax.utils.local_paths import require_local

# YAML has lists only; dacite rejects anything else.
_TUPLES = dict.fromkeys(
    (tuple[str, ...], tuple[float, ...]), lambda value: tuple(value) if isinstance(value, list | tuple) else value
)
# Dictionaries that are one value: an entry replaces the base's dictionary instead of being merged into it.
_REPLACED = ("mixture", "upsample", "matryoshka", "bins")


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.sub=value` overrides (leading dashes allowed).

    A `base: other.yaml` key, or a list of paths relative to the file, names configs that are read first, in order. The
    file's own values come last. An override of a text field is taken to the letter; others are read as YAML.

    Raises:
      UserError: the file is missing or not YAML, a key is there twice or unknown (the nearest is named), a value has
        the wrong type.
    """
    tree = _read(Path(path))
    for override in overrides:
        key, equals, value = override.lstrip("-").partition("=")
        if not equals:
            raise UserError(f"override {override!r}: write --key.sub=value")
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override {override!r}: {parent!r} is a value, not a section")
        try:
            node[last] = value if not value or _is_text(key) else strict_yaml.parse(value)
        except UserError as error:
            raise UserError(f"override {override!r}: {error}") from error
    config = from_dict(tree, str(path))
    for name, given in (
        ("output", config.output),
        ("init", config.init),
        ("data.path", config.data.path),
        ("tokens.tokenizer", config.tokens.tokenizer),
    ):
        require_local(given, name)
    return config


def from_dict(tree: dict[str, Any], origin: str = "config", kind: type = Config) -> Any:
    """Builds a `kind` (Config or one of its sections) from a plain tree; `origin` names the source in errors."""
    tree = _checked(kind, tree, origin)
    try:
        return dacite.from_dict(kind, tree, dacite.Config(type_hooks=_TUPLES, strict=True))
    except dacite.WrongTypeError as error:
        wanted = error.field_type
        choices = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()
        what = f"one of {', '.join(map(str, choices))}" if choices else getattr(wanted, "__name__", wanted)
        raise UserError(f"{origin}: {error.field_path} is {error.value!r}; it has to be {what}") from error
    except dacite.DaciteError as error:
        raise UserError(f"{origin}: {_one_line(error)}") from error


def to_yaml(config: Any) -> str:
    """Writes the resolved config as YAML: every key, in the order of the dataclasses."""
    return strict_yaml.write(_plain(dataclasses.asdict(config)))


def differing_keys(one: Any, other: Any) -> list[str]:
    """Lists the values that differ by dotted name, as "model.text.width: 64 != 128"."""
    left, right = (dict(_flatten(dataclasses.asdict(tree))) for tree in (one, other))
    return [
        f"{key}: {left.get(key)} != {right.get(key)}" for key in sorted(left | right) if left.get(key) != right.get(key)
    ]


def _is_text(key: str) -> bool:
    """True if the dotted key is a field of text, whose override is taken to the letter."""
    hint: Any = Config
    for name in key.split("."):
        hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return hint is str or (bool(choices) and all(isinstance(choice, str) for choice in choices))


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise UserError(f"{path}: is its own base, by way of {' and '.join(map(str, above))}")
    tree = strict_yaml.read(path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a tree of keys and values, not a {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base is {bases!r}; it has to be a file's path, or a list of them")
    trees = [_read(path.parent / base, (*above, path.resolve())) for base in bases]
    return functools.reduce(_merge, [*trees, tree], {})


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        replaces = key in _REPLACED or not isinstance(value, dict) or not isinstance(merged.get(key), dict)
        merged[key] = value if replaces else _merge(merged[key], value)
    return merged


def _checked(kind: type, tree: Any, origin: str, prefix: str = "") -> dict[str, Any]:
    """Converts numbers to the types of the fields; rejects unknown keys, and values in place of sections."""
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: {prefix.rstrip('.')} is a section; give it keys, not {tree!r}")
    hints = typing.get_type_hints(kind)
    checked = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(name, list(_names(Config)), 1, 0.5)
            near = near or difflib.get_close_matches(str(key), list(hints), 1, 0.0)
            raise UserError(f"{origin}: unknown key {name}; did you mean {near[0]}?")
        if dataclasses.is_dataclass(hints[key]):
            checked[key] = _checked(hints[key], value, origin, f"{name}.")
        else:
            checked[key] = _as(hints[key], value, f"{origin}: {name}")
    return checked


def _names(kind: type, prefix: str = "") -> typing.Iterator[str]:
    for key, hint in typing.get_type_hints(kind).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            yield from _names(typing.cast(type, hint), f"{prefix}{key}.")


def _as(hint: Any, value: Any, name: str) -> Any:
    if hint is float:
        return _to_float(value, name)
    if hint is int:
        return _to_int(value, name)
    if hint is str and not isinstance(value, str):
        raise UserError(f"{name} is {value!r}; it has to be text: write it in quotes")
    if hint == tuple[float, ...] and isinstance(value, list | tuple):
        return [_to_float(number, name) for number in value]
    if hint in (dict[int, float], dict[int, int]) and isinstance(value, dict):
        # JSON, in which checkpoints keep their config, knows text as keys only.
        if not all(str(key).isdecimal() for key in value):
            raise UserError(f"{name} is {value!r}; its keys have to be whole numbers")
        convert = _to_float if typing.get_args(hint)[1] is float else _to_int
        return {int(key): convert(number, f"{name}.{key}") for key, number in value.items()}
    return value


def _to_float(value: Any, name: str) -> float:
    # "1e-4" comes as text from configs that another program wrote.
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} is {value!r}; it has to be a number")
    return number


def _to_int(value: Any, name: str) -> int:
    # A bool is an int to Python, and to dacite.
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} is {value!r}; it has to be int, a whole number")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _flatten(tree: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
