"""Several ways to the same, timed by turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def by_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int, progress: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of each call, a list of `rounds` for each side.

    In every round each side is called once; the order is turned round from one to the next, so that none always runs
    in another's wake. A side returns when its work is done, not when it is dispatched. `progress` is told of each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
            progress(1)
    return seconds
