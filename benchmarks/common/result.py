"""Results of benchmarks: tables of measured values, with the settings needed to interpret them."""

import dataclasses
import datetime
import json
import os
import platform
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jfe_jax.errors import UserError

# A list is of one value for each round; it is shown as its median and spread. None: not measured.
Cell = str | int | float | list[float] | None
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
# Options of a command line that say where, not what.
_PLACES = ("--json", "--dir")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of numbers or texts; `format` is a Python format for its numbers: ".2f", ",d", ".1%"."""

    name: str
    format: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose rows have a cell for each column."""

    columns: list[Column]
    rows: list[list[Cell]]
    title: str = ""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"{len(self.columns)} columns, but a row {wrong[0]}")


def table(formats: dict[str, str], rows: list[list[Cell]], title: str = "") -> Table:
    """Makes a table from columns given as name → format."""
    return Table(columns=[Column(name=name, format=one) for name, one in formats.items()], rows=rows, title=title)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a benchmark.

    Attributes:
      tables: Measured values.
      packages: Installed packages that were measured, whose versions are stored.
      method: How often and in which order: "medians of 5 interleaved rounds".
      checked: What was compared between the sides beforehand, as a phrase.
      notes: Sentences about what the tables do not show.
      device: Name of the GPU; "" for the CPU.
      command, machine, threads, versions, date: Set by `stamped`.
    """

    tables: list[Table]
    packages: list[str] = field(default_factory=list)
    method: str = ""
    checked: str = ""
    notes: list[str] = field(default_factory=list)
    device: str = ""
    command: str = ""
    machine: str = ""
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""


def stamped(result: Result, name: str, words: Sequence[str]) -> Result:
    """Adds this machine's settings, and the command line of benchmark `name` called with `words`."""
    return dataclasses.replace(
        result,
        command=command(name, words),
        machine=machine(),
        threads=len(os.sched_getaffinity(0)),
        versions={"Python": platform.python_version(), **{one: _version(one) for one in result.packages}},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def command(name: str, words: Sequence[str]) -> str:
    """Returns the command that repeats the measurement, without paths."""
    kept, left = [], iter(words)
    for word in left:
        if word in _PLACES:
            next(left, None)
        elif word.partition("=")[0] not in _PLACES:
            kept.append(word)
    return shlex.join(["jfe", "bench", name, *kept])


def machine() -> str:
    """Returns cores, processor and memory, from Linux."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {model or platform.machine()}, {memory:.0f} GiB"


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Returns one / other, round by round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def write(result: Result, file: Path) -> None:
    """Stores a result as JSON, atomically."""
    replace_text(file, json.dumps(dataclasses.asdict(result), indent=1, ensure_ascii=False) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Writes a text file atomically."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as part:
        part.write(text)
    os.chmod(part.name, 0o644)
    os.replace(part.name, file)


def read(file: Path) -> Result:
    """Reads a result that `write` stored.

    Raises:
      UserError: the file does not exist, or is not a result.
    """
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        tables = [
            Table(columns=[Column(**column) for column in table.pop("columns")], **table)
            for table in fields.pop("tables")
        ]
        return Result(tables=tables, **fields)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; jfe bench NAME --json {file} makes it") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a result of jfe bench NAME --json ({error})") from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
