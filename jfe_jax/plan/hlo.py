"""Reads what a compiled program does from its optimized HLO text: matrix products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as it runs: a loop's body
as often as its trip count, read from its annotation or from its condition.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class HloArray:
    """One array of a shape: element type, sizes, and whether it lies in the main memory (HBM on TPU)."""

    dtype: str
    sizes: tuple[int, ...]
    main: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * DTYPE_BYTES.get(self.dtype, 0)


@dataclass
class HloInstruction:
    """A line of HLO."""

    name: str
    arrays: list[HloArray]
    opcode: str
    operands: list[str]
    text: str
    root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"[,\s]{name}=([^\s,{{]+|\{{[^}}]*\}})", self.text)
        return found and found[1]

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def called(self) -> dict[str, list[str]]:
        """Computations by the role that they play for it."""
        return {role: re.findall(r"[\w.\-]+", names) for role, names in _CALLED.findall(self.text)}


@dataclass
class HloComputation:
    """A list of instructions, also by name."""

    name: str
    entry: bool
    instructions: list[HloInstruction] = field(default_factory=list)
    by_name: dict[str, HloInstruction] = field(default_factory=dict)

    @property
    def root(self) -> HloInstruction:
        return next(one for one in self.instructions if one.root)

    def parameter(self, number: int) -> HloInstruction:
        return next(one for one in self.instructions if one.opcode == "parameter" and one.operands == [str(number)])

    def users(self, name: str) -> list[HloInstruction]:
        return [one for one in self.instructions if name in one.operands]


class HloModule:
    """A whole program: computations by name."""

    def __init__(self, text: str):
        self.computations: dict[str, HloComputation] = {}
        current = None
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header and " = " not in line.split("(", 1)[0]:
                current = HloComputation(header[2], bool(header[1]))
                self.computations[current.name] = current
            elif current is not None and (found := _INSTRUCTION.match(line)):
                one = _parse_instruction(line, found)
                current.instructions.append(one)
                current.by_name[one.name] = one
        self.entry = next(one for one in self.computations.values() if one.entry)

    def runs(self) -> Iterator[tuple[HloComputation, float]]:
        """Every computation that is no fusion's, with how often it runs; branches of a conditional each count."""
        yield from self._runs(self.entry, 1.0)

    def _runs(self, computation: HloComputation, times: float) -> Iterator[tuple[HloComputation, float]]:
        yield computation, times
        for one in computation.instructions:
            called = one.called()
            if one.opcode == "while":
                body = self.computations[called["body"][0]]
                yield from self._runs(body, times * self.trip_count(computation, one))
            elif one.opcode in ("call", "conditional", "async-start"):
                for names in called.values():
                    for name in names:
                        if name in self.computations:
                            yield from self._runs(self.computations[name], times)

    def trip_count(self, computation: HloComputation, loop: HloInstruction) -> int:
        """How often a `while` runs its body.

        Raises:
          ValueError: it is neither written beside the loop nor a comparison of a counter with a constant.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
        if known:
            return int(known[1])
        called = loop.called()
        condition, body = (self.computations[called[role][0]] for role in ("condition", "body"))
        test = condition.root
        sides = test.operands
        if test.opcode == "fusion":
            # compare(parameter, parameter) in a computation of its own, its operands outside.
            inner = self.computations[test.called()["calls"][0]]
            sides = [test.operands[int(inner.by_name[side].operands[0])] for side in inner.root.operands]
            test = inner.root
        if test.opcode != "compare" or test.attribute("direction") not in ("LT", "GT", "NE"):
            raise ValueError(f"loop {loop.name}: its condition is {test.opcode}, no comparison")
        counter, limit = (condition.by_name[side] for side in sides)
        if counter.opcode == "constant":
            counter, limit = limit, counter
        index = int(counter.attribute("index") or 0)
        end = self._constant(condition, limit)
        start = self._constant(computation, self._element(computation, loop.operands[0], index))
        step = self._step(body, index)
        return max(0, -(-(end - start) // step))

    def _element(self, computation: HloComputation, name: str, index: int) -> HloInstruction:
        init = computation.by_name[name]
        return computation.by_name[init.operands[index]] if init.opcode == "tuple" else init

    def _constant(self, computation: HloComputation, one: HloInstruction) -> int:
        while one.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            one = computation.by_name[one.operands[0]]
        value = re.search(r"constant\((-?\d+)\)", one.text)
        if value is None:
            raise ValueError(f"{one.name}: a loop's bound is {one.opcode}, no constant")
        return int(value[1])

    def _step(self, body: HloComputation, index: int) -> int:
        one = self._element(body, body.root.name, index)
        while one.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            one = body.by_name[one.operands[0]]
        where = body
        if one.opcode == "fusion":
            where = self.computations[one.called()["calls"][0]]
            one = where.root
        for operand in one.operands:
            value = where.by_name.get(operand)
            if one.opcode == "add" and value is not None and value.opcode == "constant":
                return self._constant(where, value)
        return 1

    def fused(self, one: HloInstruction) -> HloComputation | None:
        """The computation of a fusion."""
        return self.computations[one.called()["calls"][0]] if one.opcode == "fusion" else None


def _parse_instruction(line: str, found: re.Match) -> HloInstruction:
    rest = line[found.end() :]
    # The shape ends where the opcode begins; a tuple's shape has parentheses of its own.
    end = _find_closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, after = rest[end + 1 :].partition("(")
    inside = after[: _find_closing("(" + after, 0) - 1]
    operands = [part.strip().split(" ")[-1].lstrip("%") for part in _split_operands(re.sub(r"/\*.*?\*/", "", inside))]
    return HloInstruction(found[2], _parse_arrays(rest[:end]), opcode.strip(), operands, line, bool(found[1]))


def _parse_arrays(shape: str) -> list[HloArray]:
    # A memory space S(n) other than 0 is on the chip: VMEM, scalar memory, semaphores.
    return [
        HloArray(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(" not in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
        if dtype in DTYPE_BYTES
    ]


def _find_closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "({[":
            depth += 1
        elif text[place] in ")}]":
            depth -= 1
            if not depth:
                return place
    return len(text)


def _split_operands(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def parse_backend_config(one: HloInstruction) -> dict:
    """The backend's annotations of an instruction, {} if there are none that can be read."""
    found = one.text.find("backend_config=")
    if found < 0:
        return {}
    start = found + len("backend_config=")
    try:
        return json.loads(one.text[start : _find_closing(one.text, start) + 1])
    except ValueError:
        return {}
