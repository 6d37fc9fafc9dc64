"""Times several implementations in interleaved rounds."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def by_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int, progress: Callable[[int], None]
) -> dict[str, list[float]]:
    """Returns the seconds of each call, a list of `rounds` for each side.

    Every round calls each side once. The order is reversed from one round to the next, so that no side always runs
    after the same one. A side returns when its work is done, not when it is dispatched. `progress` is called after each
    call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
            progress(1)
    return seconds
