"""The data iterator's place in a checkpoint, read by as many processes as wrote it, by fewer or by more."""

import asyncio
import json
from pathlib import Path

import jax
import pytest

from jfe_jax.checkpoint.manager import _IteratorState


def load(directory: Path):
    state = _IteratorState()

    async def run():
        await (await state.load(directory))

    asyncio.run(run())
    return state.state


@pytest.fixture
def written(tmp_path):
    """By three processes; the pairs 4 and 7 of the stream wait, and the second process has taken one less."""
    states = [([], 4), ([4, 7], 3), ([], 4)]
    for index, (waiting, count) in enumerate(states):
        state = {"base": 0, "next": count, "waiting": waiting, "taken": count, "bad": {"a_task0": 1} if index else {}}
        (tmp_path / f"process_{index}-of-3.json").write_text(json.dumps(state))
    return tmp_path


def as_process(monkeypatch, index, count):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


def test_as_many_processes_read_their_own(written, monkeypatch):
    as_process(monkeypatch, 1, 3)
    assert load(written) == json.loads((written / "process_1-of-3.json").read_text())


def test_fewer_or_more_share_what_was_left(written, monkeypatch):
    for count in (1, 2, 5):
        states = []
        for index in range(count):
            as_process(monkeypatch, index, count)
            states.append(load(written))
        # The stream was taken up to pair 12; of those, 4, 7 and 10 are left.
        assert {state["base"] for state in states} == {12} and {state["next"] for state in states} == {0}
        assert sorted(number for state in states for number in state["waiting"]) == [4, 7, 10]
        assert sum(state["taken"] for state in states) == 11
        assert sum(state["bad"].get("a_task0", 0) for state in states) == 2


def test_the_state_of_a_process_that_is_not_there_is_an_error(written, monkeypatch):
    (written / "process_1-of-3.json").unlink()
    as_process(monkeypatch, 0, 2)
    with pytest.raises(FileNotFoundError, match="the states of some processes are missing"):
        load(written)
