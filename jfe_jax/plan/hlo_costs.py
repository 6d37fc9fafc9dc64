"""FLOPs and memory traffic of a compiled program, from its HLO."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jfe_jax.plan.hlo import HloArray, HloComputation, HloInstruction, HloModule

# They move nothing, or are counted where their work begins.
_FREE_OPCODES = frozenset([
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota", "domain",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
])  # fmt: skip


@dataclass(frozen=True)
class HloCosts:
    """What a chip does in one run.

    Attributes:
      flops: of matrix products and convolutions: 2 for each multiplication that is added up.
      bytes: read from and written to main memory.
    """

    flops: float
    bytes: float


def count_hlo_costs(module: HloModule) -> HloCosts:
    """Sums over all instructions, as often as each runs. Element-wise operations are in the bytes, not in the FLOPs."""
    flops = traffic = 0.0
    for computation, times in module.runs():
        for one in computation.instructions:
            flops += times * _count_flops(module, computation, one)
            traffic += times * _count_bytes(module, computation, one)
    return HloCosts(flops, traffic)


def _count_flops(module: HloModule, computation: HloComputation, one: HloInstruction) -> float:
    if one.opcode == "fusion":
        inside = module.fused(one)
        return sum(_count_flops(module, inside, each) for each in inside.instructions)
    if one.opcode == "dot":
        return 2 * math.prod(one.arrays[0].sizes) * _contracted_size(computation, one)
    if one.opcode == "convolution":
        return _convolution_flops(computation, one)
    return 0.0


def _contracted_size(computation: HloComputation, one: HloInstruction) -> int:
    left = computation.by_name[one.operands[0]].arrays[0].sizes
    return math.prod(left[int(axis)] for axis in re.findall(r"\d+", one.attribute("lhs_contracting_dims") or ""))


def _convolution_flops(computation: HloComputation, one: HloInstruction) -> float:
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
        pairs *= _count_overlaps(sizes[0][axis], sizes[1][axis], result[axis], window, place)
    return 2 * result["b"] * result["f"] * sizes[1]["i"] * pairs


def _count_overlaps(size: int, kernel: int, out: int, window: dict[str, str], place: int) -> int:
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


def _count_bytes(module: HloModule, computation: HloComputation, one: HloInstruction) -> float:
    if one.opcode in _FREE_OPCODES or one.opcode.endswith("-done"):
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
        return _count_hbm_bytes(operands[1].arrays) * 2
    if one.opcode != "fusion":
        return _count_hbm_bytes(one.arrays) + sum(_count_hbm_bytes(operand.arrays) for operand in operands)
    inside = module.fused(one)
    read = sum(
        _count_read_bytes(inside, number, operand.arrays)
        for number, operand in enumerate(operands)
        if operand.arrays and _count_hbm_bytes(operand.arrays)
    )
    return read + _count_written_bytes(inside, one)


def _count_read_bytes(inside: HloComputation, number: int, arrays: Sequence[HloArray]) -> float:
    # Of an operand that is only sliced, the slices; of one that is updated in place, nothing.
    whole = _count_hbm_bytes(arrays)
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


def _count_written_bytes(inside: HloComputation, one: HloInstruction) -> float:
    root = inside.root
    roots = [inside.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(one.arrays):
        return _count_hbm_bytes(one.arrays)
    return sum(
        _count_updated_bytes(inside, each, array) for each, array in zip(roots, one.arrays, strict=True) if array.main
    )


def _count_updated_bytes(inside: HloComputation, root: HloInstruction, array: HloArray) -> float:
    while root.opcode in ("bitcast", "convert") and root.operands[0] in inside.by_name:
        root = inside.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return inside.by_name[root.operands[1]].arrays[0].bytes
    return array.bytes


def _count_hbm_bytes(arrays: Sequence[HloArray]) -> float:
    return sum(array.bytes for array in arrays if array.main)
