"""Describes TPU slices: chip specifications, topologies, and the links that a group of chips can use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jfe_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Specification of a TPU chip.

    Attributes:
      name: Name in `--topology`, such as "v5e".
      flops: bfloat16 FLOP/s.
      hbm_bytes: Memory in bytes, of which the compiler reserves a little.
      hbm_bandwidth: Memory bandwidth in bytes/s.
      link: Bandwidth of one link to a neighbor in bytes/s, in one direction.
      dcn: Bandwidth out of the slice in bytes/s, as a chip's share of its host's network.
      dimensions: Number of axes of the torus.
      ring: An axis of the slice closes to a ring if its length is a multiple of this.
      accelerator: Format of Cloud TPU's accelerator type, given the number of chips (v5p counts two cores per chip).
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link: float
    dcn: float
    dimensions: int
    ring: int
    accelerator: str


# FLOP/s, HBM and its bandwidth: Google Cloud's "TPU v5e", "TPU v5p" and "TPU v6e" pages (peak compute per chip, HBM
# capacity and bandwidth per chip). Links, rings and DCN: Austin et al., "How to Scale Your Model" (2025), "TPU specs"
# (bytes/s per link one way; wraparound on a full axis of 16 for v5e and v6e, on multiples of 4 for v5p; DCN egress).
CHIPS = {
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 4.5e10, 3.125e9, 2, 16, "v5litepod-{}"),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 9e10, 6.25e9, 3, 4, "v5p-{}"),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1640e9, 9e10, 12.5e9, 2, 16, "v6e-{}"),
}


@dataclass(frozen=True)
class Topology:
    """One or several identical slices.

    Attributes:
      chip: Chip type of all slices.
      shape: Chips along each axis of a slice's torus.
      slices: Number of slices, connected by the data center network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> "Topology":
        """Parses a topology such as "v5e:16x16".

        Raises:
          UserError: The chip is unknown or the shape is invalid.
        """
        kind, _, dims = text.partition(":")
        if kind not in CHIPS:
            raise UserError(f"--topology {text}: unknown chip {kind!r}; known: {', '.join(CHIPS)}")
        chip = CHIPS[kind]
        example = f"{kind}:{'x'.join(['4'] * chip.dimensions)}"
        try:
            shape = tuple(int(size) for size in dims.split("x"))
        except ValueError:
            shape = ()
        if len(shape) != chip.dimensions or min(shape) < 1:
            raise UserError(f"--topology {text}: a {kind} slice has {chip.dimensions} dimensions, such as {example}")
        if slices < 1:
            raise UserError(f"--slices must be at least 1, got {slices}")
        return cls(chip, shape, slices)

    def devices(self) -> list[Any]:
        """Returns descriptions of the chips to compile for. Call `aot_compile.configure_libtpu` first.

        Raises:
          UserError: libtpu is missing or does not support this slice.
        """
        from jax.experimental import topologies

        per_host = (min(2, self.shape[0]), min(2, self.shape[1]), 1)
        try:
            described = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.chip.name}:{'x'.join(map(str, self.shape))}",
                chips_per_host_bounds=per_host,
                num_slices=self.slices,
            )
        except Exception as error:
            raise UserError(f"{self}: libtpu cannot compile for it ({' '.join(str(error).split())[:200]})") from error
        return list(described.devices)


@dataclass(frozen=True)
class GroupLinks:
    """The links that carry the traffic of a group of chips.

    Attributes:
      bandwidth: Bytes/s in and out of each chip within its slice, over all links that the group can use at once.
      axes: Axes of the links, for display: "x", "x+y", "y+dcn".
      slices: Number of slices that the group spans.
      dcn: Bytes/s out of each chip to the other slices.
    """

    bandwidth: float
    axes: str
    slices: int = 1
    dcn: float = math.inf

    def seconds(self, kind: str, bytes: float, chips: int) -> float:
        """Returns the seconds of a collective over the group: first on rings within each slice, then between slices.

        Over several slices each chip exchanges its shard of the array with its counterparts, so that the slow network
        carries every shard once (as XLA's and NCCL's hierarchical collectives do).

        Args:
          kind: One of `collectives.COLLECTIVE_KINDS`.
          bytes: Bytes of the full array.
          chips: Number of chips in the group.
        """
        per_slice = chips // self.slices
        within_slice = bytes * ring_traffic(kind, per_slice) / self.bandwidth if per_slice > 1 else 0.0
        return within_slice + bytes / per_slice * ring_traffic(kind, self.slices) / self.dcn


def ring_traffic(kind: str, n: int) -> float:
    """Returns the bytes that each of n chips on a ring sends per byte of the full array."""
    return {
        "all-gather": (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        # Each chip's array travels, on average, a quarter of the way around the ring.
        "all-to-all": n / 4,
        "ragged-all-to-all": n / 4,
        "collective-permute": 1.0,
    }[kind] * (n > 1)


def find_links(topology: Topology, positions: Sequence[tuple[int, Sequence[int]]]) -> GroupLinks:
    """Finds the links between chips at `positions` (slice number, coordinates).

    A chip has two links along an axis on which the group goes all the way around a ring, and one along any other axis
    that the group spans.
    """
    chip = topology.chip
    slices = {number for number, _ in positions}
    bandwidth, axes = 0.0, []
    for axis, size in enumerate(topology.shape):
        extent = {coordinates[axis] for _, coordinates in positions}
        if len(extent) > 1:
            closed = len(extent) == size and size % chip.ring == 0
            bandwidth += chip.link * (2 if closed else 1)
            axes.append("xyz"[axis])
    if len(slices) > 1:
        axes.append("dcn")
    return GroupLinks(
        bandwidth or math.inf, "+".join(axes) or "none", len(slices), chip.dcn if len(slices) > 1 else math.inf
    )
