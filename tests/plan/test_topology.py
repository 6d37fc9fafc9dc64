"""Which links a group of chips has between them."""

import math

import pytest

from jfe_jax.errors import UserError
from jfe_jax.plan.topology import Topology, find_links

LINK = 4.5e10


def row(length, x=0):
    return [(0, (x, y, 0)) for y in range(length)]


def test_names_are_read():
    topology = Topology.parse("v5e:16x16", 2)
    assert (topology.chips, topology.shape, str(topology)) == (512, (16, 16), "2 x v5e:16x16")
    assert Topology.parse("v5p:4x4x8").chips == 128


@pytest.mark.parametrize(
    "text, slices, says",
    [
        ("v9:4x4", 1, "unknown chip 'v9'; known: v5e, v5p, v6e"),
        ("v5e:4x4x4", 1, "2 dimensions, such as v5e:4x4"),
        ("v5p:4x4", 1, "3 dimensions, such as v5p:4x4x4"),
        ("v5e:axb", 1, "2 dimensions"),
        ("v5e", 1, "2 dimensions"),
        ("v5e:4x4", 0, "--slices must be at least 1, got 0"),
    ],
)
def test_what_is_no_topology_is_said(text, slices, says):
    with pytest.raises(UserError, match=says):
        Topology.parse(text, slices)


@pytest.mark.parametrize(
    "name, places, bandwidth, axes",
    [
        ("v5e:16x16", row(16), 2 * LINK, "y"),
        # A part of the axis, and a slice too small to close, are lines.
        ("v5e:16x16", row(8), LINK, "y"),
        ("v5e:8x8", row(8), LINK, "y"),
        ("v5e:16x16", [*row(16), *row(16, 1)], 3 * LINK, "x+y"),
        ("v5e:8x8", [*row(8), *row(8, 1)], 2 * LINK, "x+y"),
        ("v5p:4x4x4", row(4), 4 * LINK, "y"),
        ("v5e:4x4", row(1), math.inf, "none"),
    ],
)
def test_rings_have_two_links_and_lines_one(name, places, bandwidth, axes):
    found = find_links(Topology.parse(name), places)
    assert (found.bandwidth, found.axes, found.slices) == (bandwidth, axes, 1)


@pytest.mark.parametrize("kind, times", [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_a_collective_takes_its_ring_and_what_crosses_between_slices(kind, times):
    topology = Topology.parse("v5e:16x16", 2)
    ring = find_links(topology, row(16))
    assert ring.seconds(kind, 16e9, 16) == pytest.approx(times * 15e9 / (2 * LINK))
    both = find_links(topology, [*row(16), *((1, place) for _, place in row(16))])
    assert (both.axes, both.slices) == ("y+dcn", 2)
    # Of 16 GB each chip has 1 GB to exchange with its counterpart, half of it a byte's way.
    crossing = times * 0.5e9 / 3.125e9
    assert both.seconds(kind, 16e9, 32) == pytest.approx(times * 15e9 / (2 * LINK) + crossing)
    pair = find_links(topology, [(0, (0, 0, 0)), (1, (0, 0, 0))])
    assert pair.seconds(kind, 1e9, 2) == pytest.approx(times * 0.5e9 / 3.125e9)
