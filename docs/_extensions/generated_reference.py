"""Sphinx extension that fills the generated reference pages when the site is built.

Lines `<!-- generated:config -->` and `<!-- generated:cli -->` are replaced before parsing. The config reference
comes from the dataclasses and their docstrings, the CLI reference from the argparse parsers.
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from jfe_jax.cli.main import VERBS
from jfe_jax.config import Config

_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")


def config_reference() -> str:
    """Renders every section of the config as Markdown: keys, types, defaults and meanings."""
    return "\n\n".join(_section(kind, name) for name, kind in _sections(Config))


def cli_reference() -> str:
    """Renders the help of every verb and sub-verb as Markdown."""
    # argparse wraps at the width of the terminal.
    os.environ["COLUMNS"] = "100"
    parts = []
    for verb, purpose in VERBS.items():
        parser = argparse.ArgumentParser(prog=f"jfe {verb}", description=purpose)
        importlib.import_module(f"jfe_jax.cli.{verb}").add_arguments(parser)
        parts += [f"## jfe {verb}", *(f"```text\n{_help(one)}\n```" for one in _leaves(parser))]
    return "\n\n".join(parts)


def attribute_texts(kind: type) -> dict[str, str]:
    """Parses the `Attributes:` section of a docstring: name → text. Names that share an entry share its text."""
    _, _, block = inspect.getdoc(kind).partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        entry = _ENTRY.match(line.removeprefix("  "))
        if entry and line.startswith("  ") and not line.startswith("   "):
            names = entry["names"].split(", ")
            texts.update(dict.fromkeys(names, entry["text"]))
        elif not line.strip():
            break
        else:
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    return texts


def _sections(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    yield prefix, kind
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _sections(hints[field.name], f"{prefix}.{field.name}".lstrip("."))


def _section(kind: type, name: str) -> str:
    texts, hints = attribute_texts(kind), typing.get_type_hints(kind)
    summary = inspect.getdoc(kind).partition("Attributes:")[0].strip()
    lines = [
        f"## {name or 'Top level'}",
        "",
        _escaped(summary),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        key = f"{name}.{field.name}".lstrip(".")
        cells = [
            f"`{key}`",
            f"`{_type_name(hints[field.name])}`",
            f"`{default!r}`",
            _escaped(texts.get(field.name, "")),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)


def _escaped(text: str) -> str:
    """Protects what Markdown would read as markup outside of code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([<>*_{}$\\])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    if parser._subparsers is None:
        yield parser
        return
    for action in parser._subparsers._group_actions:
        for child in action.choices.values():
            # A benchmark adds its arguments only when it runs.
            yield from _leaves(_benchmark_parser(child) or child)


def _benchmark_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser | None:
    from benchmarks import BENCHMARKS

    benchmark = BENCHMARKS.get(parser.prog.removeprefix("jfe bench "))
    if benchmark is None or not parser.prog.startswith("jfe bench "):
        return None
    filled = argparse.ArgumentParser(prog=parser.prog, description=benchmark.purpose)
    importlib.import_module(benchmark.module).add_arguments(filled)
    filled.add_argument("--json", metavar="FILE", help="store the result, as docs/bench/NAME.json")
    return filled


def _help(parser: argparse.ArgumentParser) -> str:
    return parser.format_help().strip()


def _fill(app: Any, docname: str, source: list[str]) -> None:
    for name, render in (("config", config_reference), ("cli", cli_reference)):
        marker = f"<!-- generated:{name} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, render())


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}
