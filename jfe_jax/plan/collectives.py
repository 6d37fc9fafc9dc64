"""The collectives of a compiled program: which, how often, how large, between which chips."""

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

# Parts of an operation's name that say how it was traced, not what it is.
_UNINFORMATIVE = frozenset(
    ("", "step", "shard_map", "while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "vmap")
)


@dataclass(frozen=True)
class Collective:
    """Equal collectives of one run.

    Attributes:
      kind: one of KINDS.
      array: what is moved, "f32[2048,16384]", whole: gathered, or before it is reduced and scattered.
      what: where in the model it comes from, "tower/up_df, backward".
      count: how often it runs.
      bytes: of the whole array, for all runs.
      group: the chips of one group, by their number on the mesh.
      sent: bytes that each chip sends for all runs, on rings.
    """

    kind: str
    array: str
    what: str
    count: float
    bytes: float
    group: tuple[int, ...]
    sent: float


def find_collectives(module: HloModule) -> list[Collective]:
    """All of them, as often as each runs, equal ones together, the largest first.

    An asynchronous pair counts once. A fusion is looked into: an all-reduce of which each chip keeps only its part is a
    reduce-scatter, and one all-gather that is spread over several fusions (they share a `chain_id`) is one.
    """
    found: dict[tuple, Collective] = {}
    for computation, times in module.runs():
        chains: set[str] = set()
        for one in computation.instructions:
            inside = module.fused(one)
            candidates = inside.instructions if inside else [one]
            for each in candidates:
                kind = each.opcode.removesuffix("-start")
                if kind not in COLLECTIVE_KINDS:
                    continue
                chain = re.search(r'chain_id="(\d+)"', each.text)
                if chain and chain[1] in chains:
                    continue
                if chain:
                    chains.add(chain[1])
                if inside and kind == "all-reduce" and _keeps_shard(inside, each):
                    kind = "reduce-scatter"
                for item in _read_collective(inside or computation, each, kind, times):
                    key = (item.kind, item.array, item.what, item.group)
                    before = found.get(key)
                    found[key] = (
                        item
                        if before is None
                        else replace(
                            item,
                            count=before.count + item.count,
                            bytes=before.bytes + item.bytes,
                            sent=before.sent + item.sent,
                        )
                    )
    return sorted(found.values(), key=lambda item: -item.bytes)


def _read_collective(computation: HloComputation, one: HloInstruction, kind: str, times: float) -> list[Collective]:
    group = _replica_group(one)
    n = len(group)
    if n < 2:
        return []
    operands = [computation.by_name[name].arrays[0] for name in one.operands]
    scale = n if kind == "all-gather" else 1
    what = find_origin(one.op_name)
    if len(operands) > 1 and kind != "all-to-all":
        # A combined one has the name of one of its parts; an all-to-all may have an operand for each chip.
        what = f"combined with {what}"
    items = []
    for array in operands:
        sizes = list(array.sizes)
        if kind == "all-gather":
            axis = int(re.findall(r"\d+", one.attribute("dimensions") or "0")[0])
            sizes[axis] *= n
        size = array.bytes * scale
        items.append(
            Collective(
                kind, f"{array.dtype}[{','.join(map(str, sizes))}]", what, times, size * times, group,
                times * size * ring_traffic(kind, n),
            )
        )  # fmt: skip
    return items


def _keeps_shard(inside: HloComputation, one: HloInstruction) -> bool:
    users, names = [], [one.name]
    while names:
        for user in inside.users(names.pop()):
            (names.append(user.name) if user.opcode in ("bitcast", "copy") else users.append(user))
    return bool(users) and all(user.opcode in ("dynamic-slice", "slice") for user in users)


def _replica_group(one: HloInstruction) -> tuple[int, ...]:
    pairs = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", one.text)
    if pairs:
        return tuple(int(number) for number in re.findall(r"\d+", pairs[1])[:2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", one.text)
    if listed:
        return tuple(int(number) for number in listed[1].split(",") if number)
    # mesh['a'=2,'b'=4] {'b'}: the numbers 0… in an array of those sizes; a group goes along the axes that are named.
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", one.text)
    if named:
        axes = [(axis, int(size)) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])]
        along = re.findall(r"'(\w+)'", named[2])
        if ":" in named[2] or not set(along) <= dict(axes).keys():
            raise ValueError(f"{one.name}: replica groups {named[0]} are not understood")
        order = [place for place, (axis, _) in enumerate(axes) if axis not in along]
        order += [place for axis in along for place, (other, _) in enumerate(axes) if other == axis]
        size = math.prod(size for axis, size in axes if axis in along)
        return tuple(_transposed_position(place, [size for _, size in axes], order) for place in range(size))
    # [groups,size]<=[dims]T(permutation): the numbers 0… in an array of `dims`, transposed, cut into groups.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.text)
    if iota is None:
        return ()
    size = int(iota[2])
    dims = [int(dim) for dim in iota[3].split(",")]
    order = [int(axis) for axis in iota[4].split(",")] if iota[4] else list(range(len(dims)))
    return tuple(_transposed_position(place, dims, order) for place in range(size))


def _transposed_position(place: int, dims: Sequence[int], order: Sequence[int]) -> int:
    index = [0] * len(dims)
    for axis in reversed(order):
        place, index[axis] = divmod(place, dims[axis])
    return sum(at * math.prod(dims[axis + 1 :]) for axis, at in enumerate(index))


def find_origin(op_name: str) -> str:
    """Where in the model an instruction comes from, by its name as traced.

    "jit(step)/transpose(jvp(shard_map))/tower/while/body/up_df/reduce_scatter" → "tower/up_df, backward"
    """
    backward = "transpose(" in op_name
    parts = re.sub(r"[\w.]+\(|\)", "", op_name).split("/")
    # Made of several, with their names between colons.
    kept = [part for part in parts[:-1] if part not in _UNINFORMATIVE] if ":" not in op_name else ["several"]
    return ("/".join(dict.fromkeys(kept)) or parts[-1]) + (", backward" if backward else "")
