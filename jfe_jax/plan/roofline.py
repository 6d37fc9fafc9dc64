"""Computes a roofline: a lower bound on a program's run time, and the MFU at that bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jfe_jax.plan.collectives import Collective
from jfe_jax.plan.hlo_costs import HloCosts
from jfe_jax.plan.topology import GroupLinks, Topology

ASSUMPTIONS = (
    "Compute: all matrix products of the compiled program, including recomputation, at the chip's bfloat16 peak.",
    "HBM: the operands and results of every instruction, unless in on-chip memory, once each, at full bandwidth.",
    "Interconnect: every collective runs alone on its links, at their full bandwidth, on rings, without latency. A "
    "group uses two links of each torus axis on which it closes a ring, and one of each other axis that it spans.",
    "Between slices: each chip exchanges its shard of an array with its counterparts, over its share of a host's NIC.",
    "Overlapped: the longest of the three. Serial: the longer of compute and HBM, plus the interconnect.",
    "MFU: model FLOPs by formula (no recomputation; bidirectional attention over full rows, including padding) divided "
    "by time and peak FLOP/s.",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one execution, in which all chips do the same work.

    Attributes:
      compute, hbm, interconnect: Time that each would take alone.
      bound: Name of the longest of them.
      overlapped, serial: Lower bounds if the interconnect fully overlaps with the rest, and if it does not overlap.
      mfu_overlapped, mfu_serial: Model FLOPs utilization at these times.
    """

    compute: float
    hbm: float
    interconnect: float
    bound: str
    overlapped: float
    serial: float
    mfu_overlapped: float
    mfu_serial: float


def compute_roofline(
    topology: Topology,
    costs: HloCosts,
    collectives: Sequence[Collective],
    links_of: Callable[[tuple[int, ...]], GroupLinks],
    model_flops: float,
) -> Roofline:
    """Computes the roofline of one program.

    Args:
      topology: The TPU slices that the program runs on.
      costs: FLOPs and memory traffic of one chip.
      collectives: Collectives of the program.
      links_of: Returns the links of a group of chips.
      model_flops: Model FLOPs of all chips together.
    """
    chip = topology.chip
    times = {
        "compute": costs.flops / chip.flops,
        "HBM": costs.bytes / chip.hbm_bandwidth,
        "interconnect": sum(
            links_of(item.group).seconds(item.kind, item.bytes, len(item.group)) for item in collectives
        ),
    }
    overlapped = max(times.values())
    serial = max(times["compute"], times["HBM"]) + times["interconnect"]
    ideal = model_flops / topology.chips / chip.flops
    return Roofline(
        times["compute"],
        times["HBM"],
        times["interconnect"],
        max(times, key=times.__getitem__),
        overlapped,
        serial,
        ideal / overlapped,
        ideal / serial,
    )
