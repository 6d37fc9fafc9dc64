"""Reads a compiled program's memory use over time from the buffer assignment that XLA dumps.

XLA places all temporaries in a few allocations. A value occupies an address range of an allocation from the instruction
that defines it to its last use, in schedule order. A value that is updated in place shares its range with its
predecessor while both are live, so bytes are counted by address, not by value.
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
    """A value with its address range and its lifetime.

    Attributes:
      array: Dtype and shape, such as "bf16[24,512,2048]". The entry of a tuple is only its table of addresses.
      op_name: Traced name of the instruction that defines the value.
      allocation: Number of the allocation.
      offset, size: Address range within the allocation, in bytes.
      space: 0 for the main memory (HBM), 1 for the on-chip memory (VMEM).
      temporary: True for a value that is neither an argument nor a result of the program.
      first, last: Schedule positions of the first and the last instruction at which the value is live.
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
    """Holds all values of a program."""

    def __init__(self, values: list[BufferValue]):
        self.values = values

    @classmethod
    def read(cls, folder: Path) -> "BufferAssignment | None":
        """Reads the dump of one compilation, made with the options of `xla_dump_options`.

        Returns:
          The assignment, or None if the compilation did not reach buffer assignment.
        """
        assignment = next(folder.glob("*.after_optimizations-buffer-assignment.txt"), None)
        ranges = next(folder.glob("*.after_optimizations-live-range.txt"), None)
        if assignment is None or ranges is None:
            return None
        hlo = assignment.with_name(assignment.name.replace("-buffer-assignment", ""))
        texts = [file.read_text(encoding="utf-8") for file in (assignment, ranges, hlo)]
        return cls(list(_parse_values(*texts)))

    def peak(self, counts: Callable[[BufferValue], bool]) -> tuple[int, int]:
        """Returns the peak bytes of the values for which `counts` is true, and the first instruction at that peak."""
        selected = [value for value in self.values if counts(value)]
        changes = defaultdict(int)
        for value in selected:
            changes[value.first] += value.size
            changes[value.last + 1] -= value.size
        times = sorted(changes)
        total = dict(zip(times, accumulate(changes[at] for at in times), strict=True))
        # These totals are upper bounds, because values that share an address range are counted twice.
        peak_bytes, peak_at = 0, 0
        for at in sorted(times, key=lambda at: (-total[at], at)):
            if total[at] <= peak_bytes:
                break
            if (size := _count_covered_bytes(_live_values(selected, at))) > peak_bytes:
                peak_bytes, peak_at = size, at
        return peak_bytes, peak_at

    def largest(self, count: int) -> list[BufferValue]:
        """Returns the `count` largest values in main memory at its peak, one value per address."""
        _, at = self.peak(_in_main_memory)
        by_address: dict[tuple[int, int], BufferValue] = {}
        for value in _live_values([value for value in self.values if _in_main_memory(value)], at):
            address = value.allocation, value.offset
            if address not in by_address or by_address[address].size < value.size:
                by_address[address] = value
        return sorted(by_address.values(), key=lambda value: -value.size)[:count]

    def temporaries(self, scope: str, space: int = 0) -> int:
        """Returns the peak bytes of the temporaries that are defined under a named scope, such as "loss"."""
        pattern = re.compile(rf"[/(]{re.escape(scope)}[/)]")
        return self.peak(
            lambda value: value.temporary and value.space == space and bool(pattern.search(value.op_name))
        )[0]


def xla_dump_options(folder: str) -> dict[str, str | bool]:
    """Returns the compiler options that make XLA dump its buffer assignment into `folder`."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def describe_buffer(value: BufferValue) -> str:
    """Describes a buffer by size, array and origin, such as "2.25 GiB bf16[24,512,2048] (tower/up_df)"."""
    # The name of an argument is the path of a leaf: state.params[\\'tower\\'][\\'norm\\'].
    name = re.sub(r"\[\\*'([^']*?)\\*'\]", r".\1", value.op_name)
    origin = find_origin(name) if name else ""
    return f"{value.size / 2**30:.2f} GiB {value.array}" + (f" ({origin})" if origin else "")


def _in_main_memory(value: BufferValue) -> bool:
    return value.space == 0


def _live_values(values: list[BufferValue], at: int) -> list[BufferValue]:
    return [value for value in values if value.first <= at <= value.last]


def _count_covered_bytes(values: list[BufferValue]) -> int:
    total, allocation, end = 0, -1, 0
    for value in sorted(values, key=lambda value: (value.allocation, value.offset)):
        if value.allocation != allocation:
            allocation, end = value.allocation, 0
        total += max(0, value.offset + value.size - max(end, value.offset))
        end = max(end, value.offset + value.size)
    return total


def _parse_values(assignment: str, ranges: str, hlo: str) -> Iterator[BufferValue]:
    live_ranges = {
        (match[1], match[2]): (int(match[3]), int(match[4]))
        for match in map(_RANGE.match, ranges.splitlines())
        if match
    }
    names = {}
    for line in hlo.splitlines():
        if (match := _INSTRUCTION.match(line)) and (name := _OP_NAME.search(line)):
            names[match[1]] = name[1]
    allocation, space, kind = -1, 0, ""
    for line in assignment.splitlines():
        if match := _ALLOCATION.match(line):
            allocation, space, kind = int(match[1]), int(match[3] or 0), match[4]
            continue
        match = _VALUE.match(line)
        if match and (match[1], match[2] or "{}") in live_ranges and "thread-local" not in kind:
            first, last = live_ranges[match[1], match[2] or "{}"]
            array = re.sub(r"\{[^}]*\}", "", match[5])
            size, offset = int(match[3]), int(match[4])
            temporary = "parameter" not in kind and "maybe-live-out" not in kind
            yield BufferValue(array, names.get(match[1], ""), allocation, offset, size, space, temporary, first, last)
