"""FLOPs and memory traffic of a compiled program, from its HLO."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jfe_jax.plan.hlo import Array, Computation, Instruction, Module

# They move nothing, or are counted where their work begins.
_FREE = frozenset([
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota", "domain",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
])  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a chip does in one run.

    Attributes:
      flops: of matrix products and convolutions: 2 for each multiplication that is added up.
      bytes: read from and written to main memory.
    """

    flops: float
    bytes: float


def work(module: Module) -> Work:
    """Sums over all instructions, as often as each runs. Element-wise operations are in the bytes, not in the FLOPs."""
    flops = traffic = 0.0
    for computation, times in module.runs():
        for one in computation.instructions:
            flops += times * _flops(module, computation, one)
            traffic += times * _bytes(module, computation, one)
    return Work(flops, traffic)


def _flops(module: Module, computation: Computation, one: Instruction) -> float:
    if one.opcode == "fusion":
        inside = module.fused(one)
        return sum(_flops(module, inside, each) for each in inside.instructions)
    if one.opcode == "dot":
        return 2 * math.prod(one.arrays[0].sizes) * _contracted(computation, one)
    if one.opcode == "convolution":
        return _convolution(computation, one)
    return 0.0


def _contracted(computation: Computation, one: Instruction) -> int:
    left = computation.by_name[one.operands[0]].arrays[0].sizes
    return math.prod(left[int(axis)] for axis in re.findall(r"\d+", one.attribute("lhs_contracting_dims") or ""))


def _convolution(computation: Computation, one: Instruction) -> float:
    # TPU's matrix products are convolutions, batch axes being space with a window that meets one place each: what
    # counts is how many pairs of output place and window place fall on a real input.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    left, kernel, out = labels.groups()
    operands = [computation.by_name[name].arrays[0].sizes for name in one.operands]
    sizes = [dict(zip(label, shape, strict=True)) for label, shape in zip((left, kernel), operands, strict=True)]
    result = dict(zip(out, one.arrays[0].sizes, strict=True))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", one.text) or [0, ""])[1]))
    pairs = 1
    for place, axis in enumerate(sorted(label for label in left if label.isdigit())):
        pairs *= _pairs(sizes[0][axis], sizes[1][axis], result[axis], window, place)
    return 2 * result["b"] * result["f"] * sizes[1]["i"] * pairs


def _pairs(size: int, kernel: int, out: int, window: dict[str, str], place: int) -> int:
    def value(name: str, default: str) -> str:
        return window[name].split("x")[place] if name in window else default

    stride, dilated, spread = int(value("stride", "1")), int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1"))
    low = int(value("pad", "0_0").split("_")[0])
    reach = (size - 1) * dilated + 1
    return sum(
        0 <= at < reach and at % dilated == 0
        for first in range(out)
        for at in (first * stride + k * spread - low for k in range(kernel))
    )


def _bytes(module: Module, computation: Computation, one: Instruction) -> float:
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0.0
    operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
    if one.opcode.endswith("-start"):
        # Its shape repeats the operand; the copy, slice or gathered array comes second.
        copied = one.arrays[1] if len(one.arrays) > 1 else one.arrays[0]
        source = operands[0].arrays[0]
        return copied.bytes * (source.main + copied.main)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return one.arrays[0].bytes * (operands[0].arrays[0].main + one.arrays[0].main)
    if one.opcode == "dynamic-update-slice":
        return _main(operands[1].arrays) * 2
    if one.opcode != "fusion":
        return _main(one.arrays) + sum(_main(operand.arrays) for operand in operands)
    inside = module.fused(one)
    read = sum(
        _read(inside, number, operand.arrays)
        for number, operand in enumerate(operands)
        if operand.arrays and _main(operand.arrays)
    )
    return read + _written(inside, one)


def _read(inside: Computation, number: int, arrays: Sequence[Array]) -> float:
    # Of an operand that is only sliced, the slices; of one that is updated in place, nothing.
    whole = _main(arrays)
    total, names = 0.0, [inside.parameter(number).name]
    while names:
        name = names.pop()
        for user in inside.users(name):
            if user.opcode in ("bitcast", "copy") and user.arrays[0].bytes == arrays[0].bytes:
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.arrays[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            else:
                return whole
    return min(total, whole)


def _written(inside: Computation, one: Instruction) -> float:
    root = inside.root
    roots = [inside.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(one.arrays):
        return _main(one.arrays)
    return sum(_updated(inside, each, array) for each, array in zip(roots, one.arrays, strict=True) if array.main)


def _updated(inside: Computation, root: Instruction, array: Array) -> float:
    while root.opcode in ("bitcast", "convert") and root.operands[0] in inside.by_name:
        root = inside.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return inside.by_name[root.operands[1]].arrays[0].bytes
    return array.bytes


def _main(arrays: Sequence[Array]) -> float:
    return sum(array.bytes for array in arrays if array.main)
