"""Finds the collectives of a compiled program, with their counts, sizes and groups of chips."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jfe_jax.plan.hlo import HloComputation, HloInstruction, HloModule
from jfe_jax.plan.topology import ring_traffic

COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

# Parts of an operation's name that come from how it was traced, not from the model.
_UNINFORMATIVE = frozenset(
    ("", "step", "shard_map", "while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "vmap")
)


@dataclass(frozen=True)
class Collective:
    """Identical collectives of one execution of the program, summed.

    Attributes:
      kind: One of `COLLECTIVE_KINDS`.
      array: Full array, such as "f32[2048,16384]": after an all-gather, before a reduce-scatter.
      what: Origin in the model, such as "tower/up_df, backward".
      count: Number of runs.
      bytes: Bytes of the full array, summed over all runs.
      group: Mesh indices of the chips of one group.
      sent: Bytes that each chip sends on a ring, summed over all runs.
    """

    kind: str
    array: str
    what: str
    count: float
    bytes: float
    group: tuple[int, ...]
    sent: float


def find_collectives(module: HloModule) -> list[Collective]:
    """Finds all collectives, counts each by its number of runs, merges identical ones, and sorts the largest first.

    An asynchronous start/done pair counts once. Collectives inside a fusion count too: an all-reduce of which each chip
    uses only its own shard is a reduce-scatter, and an all-gather that is spread over several fusions, which share a
    `chain_id`, counts once.
    """
    merged: dict[tuple, Collective] = {}
    for computation, times in module.runs():
        chains: set[str] = set()
        for instruction in computation.instructions:
            fusion = module.fused(instruction)
            for candidate in fusion.instructions if fusion else [instruction]:
                kind = candidate.opcode.removesuffix("-start")
                if kind not in COLLECTIVE_KINDS:
                    continue
                chain = re.search(r'chain_id="(\d+)"', candidate.text)
                if chain and chain[1] in chains:
                    continue
                if chain:
                    chains.add(chain[1])
                if fusion and kind == "all-reduce" and _keeps_shard(fusion, candidate):
                    kind = "reduce-scatter"
                for item in _read_collective(fusion or computation, candidate, kind, times):
                    key = (item.kind, item.array, item.what, item.group)
                    before = merged.get(key)
                    merged[key] = (
                        item
                        if before is None
                        else replace(
                            item,
                            count=before.count + item.count,
                            bytes=before.bytes + item.bytes,
                            sent=before.sent + item.sent,
                        )
                    )
    return sorted(merged.values(), key=lambda item: -item.bytes)


def _read_collective(
    computation: HloComputation, instruction: HloInstruction, kind: str, times: float
) -> list[Collective]:
    group = _replica_group(instruction)
    n = len(group)
    if n < 2:
        return []
    operands = [computation.by_name[name].arrays[0] for name in instruction.operands]
    scale = n if kind == "all-gather" else 1
    what = find_origin(instruction.op_name)
    if len(operands) > 1 and kind != "all-to-all":
        # A combined collective has the name of one of its parts. All-to-all is excluded: it may have one operand per
        # chip.
        what = f"combined with {what}"
    items = []
    for array in operands:
        sizes = list(array.sizes)
        if kind == "all-gather":
            axis = int(re.findall(r"\d+", instruction.attribute("dimensions") or "0")[0])
            sizes[axis] *= n
        size = array.bytes * scale
        items.append(
            Collective(
                kind, f"{array.dtype}[{','.join(map(str, sizes))}]", what, times, size * times, group,
                times * size * ring_traffic(kind, n),
            )
        )  # fmt: skip
    return items


def _keeps_shard(fusion: HloComputation, all_reduce: HloInstruction) -> bool:
    users, names = [], [all_reduce.name]
    while names:
        for user in fusion.users(names.pop()):
            (names.append(user.name) if user.opcode in ("bitcast", "copy") else users.append(user))
    return bool(users) and all(user.opcode in ("dynamic-slice", "slice") for user in users)


def _replica_group(instruction: HloInstruction) -> tuple[int, ...]:
    pairs = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", instruction.text)
    if pairs:
        return tuple(int(number) for number in re.findall(r"\d+", pairs[1])[:2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.text)
    if listed:
        return tuple(int(number) for number in listed[1].split(",") if number)
    # mesh['a'=2,'b'=4] {'b'}: chips 0… in row-major order on that mesh; a group extends along the named axes.
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction.text)
    if named:
        axes = [(axis, int(size)) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])]
        along = re.findall(r"'(\w+)'", named[2])
        if ":" in named[2] or not set(along) <= dict(axes).keys():
            raise ValueError(f"{instruction.name}: unsupported replica groups {named[0]}")
        order = [index for index, (axis, _) in enumerate(axes) if axis not in along]
        order += [index for axis in along for index, (other, _) in enumerate(axes) if other == axis]
        size = math.prod(size for axis, size in axes if axis in along)
        return tuple(_transposed_position(position, [size for _, size in axes], order) for position in range(size))
    # [groups,size]<=[dims]T(permutation): an iota of shape `dims`, transposed and split into groups.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.text)
    if iota is None:
        return ()
    size = int(iota[2])
    dims = [int(dim) for dim in iota[3].split(",")]
    order = [int(axis) for axis in iota[4].split(",")] if iota[4] else list(range(len(dims)))
    return tuple(_transposed_position(position, dims, order) for position in range(size))


def _transposed_position(position: int, dims: Sequence[int], order: Sequence[int]) -> int:
    index = [0] * len(dims)
    for axis in reversed(order):
        position, index[axis] = divmod(position, dims[axis])
    return sum(at * math.prod(dims[axis + 1 :]) for axis, at in enumerate(index))


def find_origin(op_name: str) -> str:
    """Derives an instruction's origin in the model from its traced name.

    "jit(step)/transpose(jvp(shard_map))/tower/while/body/up_df/reduce_scatter" → "tower/up_df, backward"
    """
    backward = "transpose(" in op_name
    parts = re.sub(r"[\w.]+\(|\)", "", op_name).split("/")
    # The name of a merged instruction lists the names of its sources, separated by colons.
    scopes = [part for part in parts[:-1] if part not in _UNINFORMATIVE] if ":" not in op_name else ["several"]
    return ("/".join(dict.fromkeys(scopes)) or parts[-1]) + (", backward" if backward else "")
