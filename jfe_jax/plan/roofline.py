"""The shortest time that a program can take on its chips, and the share of their peak that this allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jfe_jax.plan.collectives import Collective
from jfe_jax.plan.hlo_costs import HloCosts
from jfe_jax.plan.topology import GroupLinks, Topology

ASSUMPTIONS = (
    "Compute: every matrix product of the compiled program, recomputed ones too, at the chip's bfloat16 peak.",
    "HBM: operands and results of every instruction outside the on-chip memory, once each, at full bandwidth.",
    "Interconnect: every collective alone on its links, at their full bandwidth, on rings; latency is left out. A "
    "group uses two links of an axis of the torus on which it closes a ring, one of any other that it extends over.",
    "Between slices: each chip exchanges its part of an array with its counterparts, over its share of a host's NIC.",
    "Overlapped: the longest of the three. Serial: the longer of compute and HBM, then the interconnect.",
    "MFU: model FLOPs by formula (nothing recomputed; attention in both directions, over whole rows, padding included) "
    "over time and peak.",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one run, all chips doing the same.

    Attributes:
      compute, hbm, interconnect: what each would take alone.
      bound: the longest of them.
      overlapped, serial: shortest times if interconnect runs beside the rest, and if it does not.
      mfu_overlapped, mfu_serial: model FLOPs over peak in these times.
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
    work: HloCosts,
    moved: Sequence[Collective],
    links_of: Callable[[tuple[int, ...]], GroupLinks],
    model_flops: float,
) -> Roofline:
    """Args: the slices; what a chip does and moves; links of a group of chips; model FLOPs of all chips together."""
    chip = topology.chip
    times = {
        "compute": work.flops / chip.flops,
        "HBM": work.bytes / chip.hbm_bandwidth,
        "interconnect": sum(links_of(one.group).seconds(one.kind, one.bytes, len(one.group)) for one in moved),
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
