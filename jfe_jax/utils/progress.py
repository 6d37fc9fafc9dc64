"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

# Seconds between two plain lines.
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows `name` on standard error until the block ends; call what it gives with the number of items just done."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=name, unit="", unit_scale=True, dynamic_ncols=True) as shown:
            yield shown.update
        return
    start = last = time.monotonic()
    done = 0

    def update(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate
            print(f"{name}: {done}/{total}, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

    yield update
    print(f"{name}: {done} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
