"""Counts the FLOPs and the memory traffic of a compiled program from its HLO."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jfe_jax.plan.hlo import HloArray, HloComputation, HloInstruction, HloModule

# These move no data, or are counted at the instruction that starts the work.
_FREE_OPCODES = frozenset([
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota", "domain",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
])  # fmt: skip


@dataclass(frozen=True)
class HloCosts:
    """Work of one chip in one execution of the program.

    Attributes:
      flops: FLOPs of matrix products and convolutions, 2 per multiply-add.
      bytes: Bytes read from and written to main memory.
    """

    flops: float
    bytes: float


def count_hlo_costs(module: HloModule) -> HloCosts:
    """Sums the costs of all instructions, weighted by their number of runs.

    Element-wise operations are counted in the bytes, not in the FLOPs.
    """
    flops = traffic = 0.0
    for computation, times in module.runs():
        for instruction in computation.instructions:
            flops += times * _count_flops(module, computation, instruction)
            traffic += times * _count_bytes(module, computation, instruction)
    return HloCosts(flops, traffic)


def _count_flops(module: HloModule, computation: HloComputation, instruction: HloInstruction) -> float:
    if instruction.opcode == "fusion":
        fusion = module.fused(instruction)
        return sum(_count_flops(module, fusion, inner) for inner in fusion.instructions)
    if instruction.opcode == "dot":
        return 2 * math.prod(instruction.arrays[0].sizes) * _contracted_size(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0.0


def _contracted_size(computation: HloComputation, instruction: HloInstruction) -> int:
    left = computation.by_name[instruction.operands[0]].arrays[0].sizes
    return math.prod(
        left[int(axis)] for axis in re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
    )


def _convolution_flops(computation: HloComputation, instruction: HloInstruction) -> float:
    # On TPU a matrix product is a convolution whose batch axes are spatial axes, with a window that overlaps one
    # position each. So count the pairs of output position and window position that fall on a real input, not on
    # padding.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    left, kernel, out = labels.groups()
    operands = [computation.by_name[name].arrays[0].sizes for name in instruction.operands]
    sizes = [dict(zip(label, shape, strict=True)) for label, shape in zip((left, kernel), operands, strict=True)]
    result = dict(zip(out, instruction.arrays[0].sizes, strict=True))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.text) or [0, ""])[1]))
    pairs = 1
    for index, axis in enumerate(sorted(label for label in left if label.isdigit())):
        pairs *= _count_overlaps(sizes[0][axis], sizes[1][axis], result[axis], window, index)
    return 2 * result["b"] * result["f"] * sizes[1]["i"] * pairs


def _count_overlaps(size: int, kernel: int, out: int, window: dict[str, str], axis: int) -> int:
    def value(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    stride = int(value("stride", "1"))
    input_dilation, kernel_dilation = int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1"))
    padding = int(value("pad", "0_0").split("_")[0])
    dilated_size = (size - 1) * input_dilation + 1
    return sum(
        0 <= at < dilated_size and at % input_dilation == 0
        for first in range(out)
        for at in (first * stride + k * kernel_dilation - padding for k in range(kernel))
    )


def _count_bytes(module: HloModule, computation: HloComputation, instruction: HloInstruction) -> float:
    if instruction.opcode in _FREE_OPCODES or instruction.opcode.endswith("-done"):
        return 0.0
    operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
    if instruction.opcode.endswith("-start"):
        # The shape of a start instruction repeats the operand; the copy, slice or gathered array comes second.
        copied = instruction.arrays[1] if len(instruction.arrays) > 1 else instruction.arrays[0]
        source = operands[0].arrays[0]
        return copied.bytes * (source.main + copied.main)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return instruction.arrays[0].bytes * (operands[0].arrays[0].main + instruction.arrays[0].main)
    if instruction.opcode == "dynamic-update-slice":
        return _count_hbm_bytes(operands[1].arrays) * 2
    if instruction.opcode != "fusion":
        return _count_hbm_bytes(instruction.arrays) + sum(_count_hbm_bytes(operand.arrays) for operand in operands)
    fusion = module.fused(instruction)
    read = sum(
        _count_read_bytes(fusion, number, operand.arrays)
        for number, operand in enumerate(operands)
        if operand.arrays and _count_hbm_bytes(operand.arrays)
    )
    return read + _count_written_bytes(fusion, instruction)


def _count_read_bytes(fusion: HloComputation, number: int, arrays: Sequence[HloArray]) -> float:
    # An operand that is only sliced counts as its slices; an operand that is updated in place counts as nothing.
    full = _count_hbm_bytes(arrays)
    total, names = 0.0, [fusion.parameter(number).name]
    while names:
        name = names.pop()
        for user in fusion.users(name):
            if user.opcode in ("bitcast", "copy") and user.arrays[0].bytes == arrays[0].bytes:
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.arrays[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            else:
                return full
    return min(total, full)


def _count_written_bytes(fusion: HloComputation, instruction: HloInstruction) -> float:
    root = fusion.root
    roots = [fusion.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(instruction.arrays):
        return _count_hbm_bytes(instruction.arrays)
    return sum(
        _count_updated_bytes(fusion, value, array)
        for value, array in zip(roots, instruction.arrays, strict=True)
        if array.main
    )


def _count_updated_bytes(fusion: HloComputation, root: HloInstruction, array: HloArray) -> float:
    while root.opcode in ("bitcast", "convert") and root.operands[0] in fusion.by_name:
        root = fusion.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return fusion.by_name[root.operands[1]].arrays[0].bytes
    return array.bytes


def _count_hbm_bytes(arrays: Sequence[HloArray]) -> float:
    return sum(array.bytes for array in arrays if array.main)
