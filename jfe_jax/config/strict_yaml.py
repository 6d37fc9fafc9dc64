"""Reads and writes YAML in which text means what it looks like: YAML 1.2's scalars, and no key twice.

PyYAML reads YAML 1.1, where `010` is 8, `1e-4` is text, `no` is false and `2026-12-01` is a date, and where the second
of two equal keys silently replaces the first.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from jfe_jax.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans; refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own protocol)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, list | dict):
                raise yaml.MarkedYAMLError(
                    problem="a key has to be a word or a number", problem_mark=key_node.start_mark
                )
            if key in lines:
                raise UserError(f"key {key!r} is there twice, in lines {lines[key]} and {line}; merge the two")
            lines[key] = line
        return super().construct_mapping(node, deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse(text: str) -> Any:
    """Parses YAML text.

    Raises:
      UserError: the text is not YAML, a key is there twice, or it is nested too deeply. One line, without a file name.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError("not a config: nested too deeply") from error
    except ValueError as error:
        # A number of more digits than Python converts.
        raise UserError(f"not YAML: {error}") from error


def read(path: Path) -> Any:
    """Reads a UTF-8 file, with or without a byte-order mark.

    Raises:
      UserError: as `parse`, or the file cannot be read; names the file.
    """
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which only YAML 1.2 takes for something else, as `1e-5`."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
        for first in yaml.SafeDumper.yaml_implicit_resolvers | _Loader.yaml_implicit_resolvers
    }


def write(tree: Any) -> str:
    """Writes a tree of plain values as YAML that readers of version 1.1 and 1.2 understand alike."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
