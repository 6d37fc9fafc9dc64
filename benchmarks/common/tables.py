"""Results as text for a terminal, and as Markdown between a file's markers, so that no figure is written by hand.

<!-- bench:NAME -->
what is written here
<!-- /bench:NAME -->
"""

import re
import statistics
from collections.abc import Callable

from benchmarks.common import summary
from benchmarks.common.result import Cell, Column, Result, Table
from jfe_jax.errors import UserError

_SECTION = re.compile(r"^<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)^<!-- /bench:(?P=name) -->$", re.M | re.S)
_MARKER = re.compile(r"^<!-- /?bench:.*$", re.M)


def as_text(result: Result) -> str:
    """For a terminal."""
    parts = [_settings(result, "")]
    for table in result.tables:
        cells = [[column.name for column in table.columns], *_cells(table)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [_is_number(table, place) for place in range(len(table.columns))]
        lines = ["  ".join(_pad(*cell) for cell in zip(row, widths, right, strict=True)).rstrip() for row in cells]
        parts.append("\n".join([*([table.title] if table.title else ()), *lines]))
    parts += [" ".join(result.notes)] if result.notes else []
    return "\n\n".join(parts) + "\n"


def as_markdown(result: Result) -> str:
    """Renders a result for a documentation page."""
    parts = [_settings(result, "`")]
    for table in result.tables:
        rule = ["---:" if _is_number(table, place) else "---" for place in range(len(table.columns))]
        rows = [[column.name for column in table.columns], *_cells(table)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts += [f"{table.title}:"] if table.title else []
        parts.append("\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]]))
    parts += [" ".join(result.notes)] if result.notes else []
    return "\n\n".join(parts) + "\n"


def names(text: str) -> list[str]:
    """Of the sections that have markers, in order.

    Raises:
      UserError: a marker without its other end.
    """
    found = [match["name"] for match in _SECTION.finditer(text)]
    if len(_MARKER.findall(text)) != 2 * len(found):
        raise UserError("a line <!-- bench:NAME --> has no <!-- /bench:NAME --> after it, or the other way round")
    return found


def filled(text: str, result: Callable[[str], Result]) -> str:
    """Regenerates each section of the text from `result(name)`; the section "summary" takes figures from several.

    Raises:
      UserError: as `names` and `result` do.
    """
    names(text)

    def section(match: re.Match) -> str:
        name = match["name"]
        body = summary.as_markdown(result, shown) if name == summary.NAME else as_markdown(result(name))
        return f"<!-- bench:{name} -->\n\n{body}\n<!-- /bench:{name} -->"

    return _SECTION.sub(section, text)


def shown(cell: Cell, column: Column) -> str:
    """A value as its column shows it: of several, the median, the least and the most."""
    if isinstance(cell, str):
        return cell
    if cell is None or cell == []:
        return "–"
    if not isinstance(cell, list):
        return format(cell, column.format)
    middle, least, most = (format(one, column.format) for one in (statistics.median(cell), min(cell), max(cell)))
    return f"{middle} ({least} to {most})" if len(cell) > 1 else middle


def _settings(result: Result, quote: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    where = [result.machine, f"{result.threads} threads", versions, result.date]
    lines = [f"{quote}{result.command}{quote} ({'; '.join([result.device, *where] if result.device else where)})."]
    lines += [f"Compared first: {result.checked}."] if result.checked else []
    lines += [f"{result.method[0].upper()}{result.method[1:]}."] if result.method else []
    return " ".join(lines)


def _cells(table: Table) -> list[list[str]]:
    return [[shown(*both) for both in zip(row, table.columns, strict=True)] for row in table.rows]


def _is_number(table: Table, place: int) -> bool:
    return not any(isinstance(row[place], str) for row in table.rows)


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)
