"""Nothing is replicated by accident: work and memory of each device fall as one over the number of devices."""

import pytest

from benchmarks import scaling
from jfe_jax.parallel import sharding


@pytest.fixture(scope="module")
def one():
    return scaling.measure(scaling.config(), (1, 1, 1))


@pytest.mark.parametrize(
    "mesh",
    [(1, 8, 1), (8, 1, 1), (2, 4, 1), *(pytest.param((1, n, 1), marks=pytest.mark.slow) for n in (2, 4))],
)
def test_work_and_state_fall_with_the_devices(mesh, one):
    share = scaling.measure(scaling.config(), mesh)
    data, fsdp, _ = mesh
    assert share.flops * data * fsdp == pytest.approx(one.flops, rel=0.05)
    # Along `data` every device has its own copy of what `fsdp` left it.
    assert share.state * fsdp == pytest.approx(one.state, rel=0.05)
    assert one.sent == 0
    if data == 1:
        assert share.sent > 0
    elif fsdp == 1:
        # The gradients are summed on a ring; two moments lie beside each parameter.
        assert share.sent == pytest.approx(2 * (data - 1) / data * one.state / 3, rel=0.05)


def test_work_that_every_device_repeats_shows(one):
    # `tensor` cannot split Gemma's single k and v head, nor the vision tower's patches.
    share = scaling.measure(scaling.config(), (1, 1, 2))
    assert 1.05 * one.flops < 2 * share.flops < 1.2 * one.flops
    assert one.state < 2 * share.state < 1.2 * one.state
    assert share.sent > 0


def test_state_that_stays_whole_shows(one, monkeypatch):
    # The moments no longer lie as their parameters.
    monkeypatch.setattr(sharding, "_divides", lambda *_: False)
    share = scaling.measure(scaling.config(), (1, 2, 1))
    assert share.state * 2 > 1.5 * one.state
