"""Parses the optimized HLO text of a compiled program, to count its matrix products, memory traffic and collectives.

XLA's own cost analysis counts the body of a loop once. Here every instruction is counted by its number of runs: a
loop's body is multiplied by its trip count, which is read from its annotation or from its condition.
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
    """An array of an HLO shape: element type, sizes, and whether it is in main memory (HBM on TPU)."""

    dtype: str
    sizes: tuple[int, ...]
    main: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * DTYPE_BYTES.get(self.dtype, 0)


@dataclass
class HloInstruction:
    """An HLO instruction, which is one line of the text."""

    name: str
    arrays: list[HloArray]
    opcode: str
    operands: list[str]
    text: str
    root: bool

    def attribute(self, name: str) -> str | None:
        match = re.search(rf"[,\s]{name}=([^\s,{{]+|\{{[^}}]*\}})", self.text)
        return match and match[1]

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    def called(self) -> dict[str, list[str]]:
        """Returns the names of the computations that the instruction calls, by role, such as "body" or "condition"."""
        return {role: re.findall(r"[\w.\-]+", names) for role, names in _CALLED.findall(self.text)}


@dataclass
class HloComputation:
    """An HLO computation: its instructions in order, and by name."""

    name: str
    entry: bool
    instructions: list[HloInstruction] = field(default_factory=list)
    by_name: dict[str, HloInstruction] = field(default_factory=dict)

    @property
    def root(self) -> HloInstruction:
        return next(instruction for instruction in self.instructions if instruction.root)

    def parameter(self, number: int) -> HloInstruction:
        return next(
            instruction
            for instruction in self.instructions
            if instruction.opcode == "parameter" and instruction.operands == [str(number)]
        )

    def users(self, name: str) -> list[HloInstruction]:
        return [instruction for instruction in self.instructions if name in instruction.operands]


class HloModule:
    """An HLO program: its computations by name."""

    def __init__(self, text: str):
        self.computations: dict[str, HloComputation] = {}
        current = None
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header and " = " not in line.split("(", 1)[0]:
                current = HloComputation(header[2], bool(header[1]))
                self.computations[current.name] = current
            elif current is not None and (match := _INSTRUCTION.match(line)):
                instruction = _parse_instruction(line, match)
                current.instructions.append(instruction)
                current.by_name[instruction.name] = instruction
        self.entry = next(computation for computation in self.computations.values() if computation.entry)

    def runs(self) -> Iterator[tuple[HloComputation, float]]:
        """Yields each computation outside fusions with its number of runs; all branches of a conditional count."""
        yield from self._runs(self.entry, 1.0)

    def _runs(self, computation: HloComputation, times: float) -> Iterator[tuple[HloComputation, float]]:
        yield computation, times
        for instruction in computation.instructions:
            called = instruction.called()
            if instruction.opcode == "while":
                body = self.computations[called["body"][0]]
                yield from self._runs(body, times * self.trip_count(computation, instruction))
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for names in called.values():
                    for name in names:
                        if name in self.computations:
                            yield from self._runs(self.computations[name], times)

    def trip_count(self, computation: HloComputation, loop: HloInstruction) -> int:
        """Returns the trip count of a `while` instruction.

        Raises:
          ValueError: The loop has no annotation of its trip count, and its condition does not compare a counter with a
            constant.
        """
        annotation = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
        if annotation:
            return int(annotation[1])
        called = loop.called()
        condition, body = (self.computations[called[role][0]] for role in ("condition", "body"))
        test = condition.root
        sides = test.operands
        if test.opcode == "fusion":
            # compare(parameter, parameter) in a fused computation; the operands are those of the fusion.
            inner = self.computations[test.called()["calls"][0]]
            sides = [test.operands[int(inner.by_name[side].operands[0])] for side in inner.root.operands]
            test = inner.root
        if test.opcode != "compare" or test.attribute("direction") not in ("LT", "GT", "NE"):
            raise ValueError(f"loop {loop.name}: its condition is {test.opcode}, not a supported comparison")
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

    def _constant(self, computation: HloComputation, instruction: HloInstruction) -> int:
        while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            instruction = computation.by_name[instruction.operands[0]]
        value = re.search(r"constant\((-?\d+)\)", instruction.text)
        if value is None:
            raise ValueError(f"{instruction.name}: a loop's bound is {instruction.opcode}, not a constant")
        return int(value[1])

    def _step(self, body: HloComputation, index: int) -> int:
        update = self._element(body, body.root.name, index)
        while update.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            update = body.by_name[update.operands[0]]
        computation = body
        if update.opcode == "fusion":
            computation = self.computations[update.called()["calls"][0]]
            update = computation.root
        for operand in update.operands:
            value = computation.by_name.get(operand)
            if update.opcode == "add" and value is not None and value.opcode == "constant":
                return self._constant(computation, value)
        return 1

    def fused(self, instruction: HloInstruction) -> HloComputation | None:
        """Returns the computation of a fusion; None for any other instruction."""
        return self.computations[instruction.called()["calls"][0]] if instruction.opcode == "fusion" else None


def _parse_instruction(line: str, match: re.Match) -> HloInstruction:
    rest = line[match.end() :]
    # The shape ends where the opcode begins; a tuple's shape is itself in parentheses.
    end = _find_closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, after = rest[end + 1 :].partition("(")
    inside = after[: _find_closing("(" + after, 0) - 1]
    operands = [part.strip().split(" ")[-1].lstrip("%") for part in _split_operands(re.sub(r"/\*.*?\*/", "", inside))]
    return HloInstruction(match[2], _parse_arrays(rest[:end]), opcode.strip(), operands, line, bool(match[1]))


def _parse_arrays(shape: str) -> list[HloArray]:
    # A memory space S(n) other than 0 is on the chip: VMEM, scalar memory, semaphores.
    return [
        HloArray(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(" not in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
        if dtype in DTYPE_BYTES
    ]


def _find_closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        if text[position] in "({[":
            depth += 1
        elif text[position] in ")}]":
            depth -= 1
            if not depth:
                return position
    return len(text)


def _split_operands(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth:
            parts.append(text[start:position])
            start = position + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def parse_backend_config(instruction: HloInstruction) -> dict:
    """Parses the backend config of an instruction; returns {} if it is missing or not valid JSON."""
    text = instruction.text
    position = text.find("backend_config=")
    if position < 0:
        return {}
    start = position + len("backend_config=")
    try:
        return json.loads(text[start : _find_closing(text, start) + 1])
    except ValueError:
        return {}
