"""Reads a config: YAML files, `base` files, command-line overrides, strict types.

A YAML file holds the values that differ from the defaults; `--key.sub=value` on the command line overrides it. Every
checkpoint carries the resolved tree, so that it opens without its YAML.
"""

import dataclasses
import difflib
import functools
import typing
from pathlib import Path
from typing import Any, Literal

import dacite
import yaml

from jfe_jax.config.schema import Config
from jfe_jax.errors import UserError

# YAML has lists; anything else is left for dacite to refuse.
_TUPLES = dict.fromkeys(
    (tuple[str, ...], tuple[float, ...]), lambda value: tuple(value) if isinstance(value, list | tuple) else value
)
# A mixture, or a list of widths, is one value: adding to the base's would not be what was written.
_WHOLE = ("mixture", "upsample", "matryoshka", "bins")


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.sub=value` overrides (leading dashes allowed).

    A `base: other.yaml` key, or a list of such, names files beside this one that are read first, in order; what the
    file itself says comes last.

    Raises:
      UserError: the file is missing or no YAML, a key is unknown (the nearest is named), a value has the wrong type.
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
            node[last] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: {_one_line(error)}") from error
    return from_dict(tree, str(path))


def from_dict(tree: dict[str, Any], origin: str = "config", kind: type = Config) -> Any:
    """A plain tree as a `kind` (Config or one of its sections); `origin` names the source in errors."""
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
    """The resolved tree, every key written out, in the order of the dataclasses."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def differing_keys(one: Any, other: Any) -> list[str]:
    """Dotted names of the values that differ, as "model.text.width: 64 != 128"."""
    left, right = (dict(_flatten(dataclasses.asdict(tree))) for tree in (one, other))
    return [
        f"{key}: {left.get(key)} != {right.get(key)}" for key in sorted(left | right) if left.get(key) != right.get(key)
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a tree of keys and values, not a {type(tree).__name__}")
    bases = tree.pop("base", [])
    trees = [_read(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases)]
    return functools.reduce(_merge, [*trees, tree], {})


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        whole = key in _WHOLE or not isinstance(value, dict) or not isinstance(merged.get(key), dict)
        merged[key] = value if whole else _merge(merged[key], value)
    return merged


def _checked(kind: type, tree: Any, origin: str, prefix: str = "") -> dict[str, Any]:
    """The tree with its numbers as floats where floats are wanted; refuses unknown keys and values for sections."""
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
    if hint == tuple[float, ...] and isinstance(value, list | tuple):
        return [_to_float(one, name) for one in value]
    if hint in (dict[int, float], dict[int, int]) and isinstance(value, dict):
        # JSON, in which checkpoints keep their config, knows text as keys only.
        if not all(str(key).isdecimal() for key in value):
            raise UserError(f"{name} is {value!r}; its keys have to be whole numbers")
        own = typing.get_args(hint)[1]
        return {int(key): _to_float(one, f"{name}.{key}") if own is float else one for key, one in value.items()}
    return value


def _to_float(value: Any, name: str) -> float:
    # YAML 1.1 reads 1e-4 as text.
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} is {value!r}; it has to be a number")


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
