"""TPU slices: what a chip can do, which chips are there, and which links a group of them has between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jfe_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
      flops: bfloat16 operations a second.
      hbm_bytes: its memory; the compiler keeps a little of it for itself.
      hbm_bandwidth: bytes a second.
      link: bytes a second of one link to a neighbour, in one direction.
      dcn: bytes a second out of the slice, a chip's share of its host's network.
      dimensions: of the torus.
      ring: an axis of the slice closes to a ring if its length is a multiple of this.
      accelerator: how Cloud TPU names slices of it, before the number of chips (v5p counts two cores a chip).
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
# (bytes/s a link one way; wraparound on a full axis of 16 for v5e and v6e, on multiples of 4 for v5p; DCN egress).
CHIPS = {
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 4.5e10, 3.125e9, 2, 16, "v5litepod-{}"),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 9e10, 6.25e9, 3, 4, "v5p-{}"),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1640e9, 9e10, 12.5e9, 2, 16, "v6e-{}"),
}


@dataclass(frozen=True)
class Topology:
    """One or several equal slices.

    Attributes:
      chip: of all of them.
      shape: chips along each axis of a slice's torus.
      slices: how many, joined by the data-centre network.
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
        """From "v5e:16x16".

        Raises:
          UserError: an unknown chip, or no such shape.
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
            raise UserError(f"--topology {text}: a {kind} slice has {chip.dimensions} dimensions, as {example}")
        if slices < 1:
            raise UserError(f"--slices {slices}: it has to be 1 or more")
        return cls(chip, shape, slices)

    def devices(self) -> list[Any]:
        """Stand-ins for the chips, to compile for. `aot_compile.configure_libtpu` comes first.

        Raises:
          UserError: libtpu is missing or knows no such slice.
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
    """What carries the traffic of a group of chips.

    Attributes:
      bandwidth: bytes a second in and out of each chip within its slice, over all links that the group can use at once.
      axes: what they lie along, for people: "x", "x+y", "y+dcn".
      slices: how many slices the group extends over.
      dcn: bytes a second out of each chip to the other slices.
    """

    bandwidth: float
    axes: str
    slices: int = 1
    dcn: float = math.inf

    def seconds(self, kind: str, bytes: float, chips: int) -> float:
        """How long a collective over a group takes, rings in each slice, and what must cross to other slices after.

        Over several slices each chip exchanges its part of the array with its counterparts, so that the slow network
        carries every part once (as XLA's and NCCL's hierarchical collectives do).

        Args:
          kind: as in `collectives.KINDS`.
          bytes: of the whole array.
          chips: of the group.
        """
        near = chips // self.slices
        within = bytes * ring_traffic(kind, near) / self.bandwidth if near > 1 else 0.0
        return within + bytes / near * ring_traffic(kind, self.slices) / self.dcn


def ring_traffic(kind: str, n: int) -> float:
    """Bytes that each of n chips on a ring sends for each byte of the whole array."""
    return {
        "all-gather": (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        # Each chip's array goes, on average, a quarter of the way round.
        "all-to-all": n / 4,
        "ragged-all-to-all": n / 4,
        "collective-permute": 1.0,
    }[kind] * (n > 1)


def find_links(topology: Topology, places: Sequence[tuple[int, Sequence[int]]]) -> GroupLinks:
    """The links between chips at `places` (slice number, coordinates).

    A chip has two links along an axis on which the group goes all the way round a ring, and one along any other axis
    that the group extends over.
    """
    chip = topology.chip
    slices = {number for number, _ in places}
    bandwidth, axes = 0.0, []
    for axis, size in enumerate(topology.shape):
        extent = {place[axis] for _, place in places}
        if len(extent) > 1:
            closed = len(extent) == size and size % chip.ring == 0
            bandwidth += chip.link * (2 if closed else 1)
            axes.append("xyz"[axis])
    if len(slices) > 1:
        axes.append("dcn")
    return GroupLinks(
        bandwidth or math.inf, "+".join(axes) or "none", len(slices), chip.dcn if len(slices) > 1 else math.inf
    )
