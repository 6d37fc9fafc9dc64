"""What lies in a chip's memory while a compiled program runs, from the buffer assignment that XLA dumps.

XLA lays all temporaries out in a few allocations; a value takes a place in one from the instruction that makes it to
the last that uses it, in the order of the schedule. Values that follow one another in place overlap there, so bytes
are counted by place, not by value.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from jfe_jax.plan.collectives import find_origin

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(?:, color (\d+))?(.*?):?$")
_VALUE = re.compile(r"^ value: <\d+ ([^\s{]+)(\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_RANGE = re.compile(r"^\s+(\S+)(\{[\d,]*\}):(\d+)-(\d+)$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class BufferValue:
    """One value.

    Attributes:
      array: "bf16[24,512,2048]"; a tuple's is only its table of addresses.
      op_name: of the instruction that makes it, as traced.
      allocation, offset, size: its place, in bytes.
      space: 0 for the main memory (HBM), 1 for the on-chip memory (VMEM).
      temporary: made by the program and gone when it ends: no argument, no result.
      first, last: numbers of the instructions between which it lives.
    """

    array: str
    op_name: str
    allocation: int
    offset: int
    size: int
    space: int
    temporary: bool
    first: int
    last: int


class BufferAssignment:
    """All values of a program."""

    def __init__(self, values: list[BufferValue]):
        self.values = values

    @classmethod
    def read(cls, folder: Path) -> "BufferAssignment | None":
        """From the folder of `options`, when one program was compiled; None if that came to no assignment."""
        assignment = next(folder.glob("*.after_optimizations-buffer-assignment.txt"), None)
        ranges = next(folder.glob("*.after_optimizations-live-range.txt"), None)
        if assignment is None or ranges is None:
            return None
        hlo = assignment.with_name(assignment.name.replace("-buffer-assignment", ""))
        texts = [file.read_text(encoding="utf-8") for file in (assignment, ranges, hlo)]
        return cls(list(_parse_values(*texts)))

    def peak(self, counts: Callable[[BufferValue], bool]) -> tuple[int, int]:
        """The most bytes that the values that count take at once, and the first instruction at which they do."""
        chosen = [value for value in self.values if counts(value)]
        changes = defaultdict(int)
        for value in chosen:
            changes[value.first] += value.size
            changes[value.last + 1] -= value.size
        times = sorted(changes)
        total = dict(zip(times, accumulate(changes[at] for at in times), strict=True))
        # No more than this: values in one place are counted twice.
        best, where = 0, 0
        for at in sorted(times, key=lambda at: (-total[at], at)):
            if total[at] <= best:
                break
            if (size := _count_covered_bytes(_live_values(chosen, at))) > best:
                best, where = size, at
        return best, where

    def largest(self, count: int) -> list[BufferValue]:
        """The largest places in main memory where it is fullest, each once: by one of the values there."""
        _, at = self.peak(_in_main_memory)
        places: dict[tuple[int, int], BufferValue] = {}
        for value in _live_values([value for value in self.values if _in_main_memory(value)], at):
            place = value.allocation, value.offset
            if place not in places or places[place].size < value.size:
                places[place] = value
        return sorted(places.values(), key=lambda value: -value.size)[:count]

    def temporaries(self, scope: str, space: int = 0) -> int:
        """The most bytes that temporaries made under a named scope ("loss") take at once."""
        mark = re.compile(rf"[/(]{re.escape(scope)}[/)]")
        return self.peak(lambda one: one.temporary and one.space == space and bool(mark.search(one.op_name)))[0]


def xla_dump_options(folder: str) -> dict[str, str | bool]:
    """What the compiler is to be told."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def describe_buffer(value: BufferValue) -> str:
    """ "2.25 GiB bf16[24,512,2048] (tower/up_df)"."""
    # An argument's name is that of a leaf: state.params[\\'tower\\'][\\'norm\\'].
    name = re.sub(r"\[\\*'([^']*?)\\*'\]", r".\1", value.op_name)
    what = find_origin(name) if name else ""
    return f"{value.size / 2**30:.2f} GiB {value.array}" + (f" ({what})" if what else "")


def _in_main_memory(value: BufferValue) -> bool:
    return value.space == 0


def _live_values(values: list[BufferValue], at: int) -> list[BufferValue]:
    return [value for value in values if value.first <= at <= value.last]


def _count_covered_bytes(values: list[BufferValue]) -> int:
    total, allocation, end = 0, -1, 0
    for value in sorted(values, key=lambda one: (one.allocation, one.offset)):
        if value.allocation != allocation:
            allocation, end = value.allocation, 0
        total += max(0, value.offset + value.size - max(end, value.offset))
        end = max(end, value.offset + value.size)
    return total


def _parse_values(assignment: str, ranges: str, hlo: str) -> Iterator[BufferValue]:
    lives = {
        (found[1], found[2]): (int(found[3]), int(found[4]))
        for found in map(_RANGE.match, ranges.splitlines())
        if found
    }
    names = {}
    for line in hlo.splitlines():
        if (found := _INSTRUCTION.match(line)) and (name := _OP_NAME.search(line)):
            names[found[1]] = name[1]
    allocation, space, kind = -1, 0, ""
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            allocation, space, kind = int(found[1]), int(found[3] or 0), found[4]
        elif (found := _VALUE.match(line)) and (found[1], found[2] or "{}") in lives and "thread-local" not in kind:
            first, last = lives[found[1], found[2] or "{}"]
            array = re.sub(r"\{[^}]*\}", "", found[5])
            size, offset = int(found[3]), int(found[4])
            temporary = "parameter" not in kind and "maybe-live-out" not in kind
            yield BufferValue(array, names.get(found[1], ""), allocation, offset, size, space, temporary, first, last)
