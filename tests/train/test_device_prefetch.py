"""How long the devices waited for a batch, which is not how long the host did."""

import threading

import pytest

from jfe_jax.train import device_prefetch


class Gated:
    """Gives batches once the gate is open."""

    def __init__(self):
        self.gate = threading.Event()

    def __iter__(self):
        # A test that goes wrong is to fail, not to hang.
        self.gate.wait(20)
        yield "batch"
        raise RuntimeError("broken")

    def get_state(self):
        return "state"

    def close(self):
        pass


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setattr(device_prefetch, "put_batch", lambda batch, mesh, chunks: batch)
    gated = Gated()
    source = device_prefetch.Prefetcher(gated, None)
    source.gate = gated.gate
    yield source
    gated.gate.set()
    source.close()


@pytest.mark.parametrize("done_first", [True, False])
def test_only_time_after_the_last_step_is_done_counts(source, done_first):
    asked = []

    def busy():
        asked.append(len(asked))
        if len(asked) == 3:
            # The batch comes after the step is done, or while it computes.
            threading.Timer(0.02 if done_first else 0.0, source.gate.set).start()
            return not done_first
        return True

    batch, state, idle = source.take(busy)
    assert (batch, state) == ("batch", "state")
    assert (idle > 0) == done_first
    if done_first:
        assert len(asked) == 3


def test_what_the_iterator_raised_is_raised_in_its_turn(source):
    source.gate.set()
    source.take(lambda: False)
    with pytest.raises(RuntimeError, match="broken"):
        source.take(lambda: True)
