"""What a person sees of a run while it goes on, and what stays of it: progress, JSON lines, TensorBoard events."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from jfe_jax.utils.tensorboard import EventWriter

METRICS = "metrics.jsonl"
# Plain lines come at most this often.
LINE_SECONDS = 10.0


class MetricsLog:
    """`metrics.jsonl`, one object per line with "step" and its values, and TensorBoard events, in one directory.

    Validation values are named "val_…". Continuing from a step drops what was written of later ones.
    """

    def __init__(self, directory: Path, step: int):
        """Continues the log in `directory` after `step`; 0 begins anew."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step] if step else []
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")
        if not step:
            for events in directory.glob("events.out.tfevents.*"):
                events.unlink()
        self._events = EventWriter(directory, purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line and the same values as TensorBoard scalars; on disk when it returns.

        JSON has no word for what is not finite: null stands for it.
        """
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **told}) + "\n")
        self._file.flush()
        for name, value in values.items():
            place = f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"
            self._events.scalar(place, value, step)
        self._events.flush()

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._events.close()


class Progress:
    """A bar on a terminal; elsewhere plain lines, at most one every ten seconds."""

    def __init__(self, steps: int, start: int, say: Callable[[str], None]):
        self._steps, self._say = steps, say
        # From when the first step is done: it waits for the compiler.
        self._first: tuple[int, float] | None = None
        self._spoke = float("-inf")
        terminal = sys.stderr.isatty()
        form = "{percentage:3.0f}%|{bar:10}| {n}/{total}{postfix}, {remaining} left"
        self._bar = tqdm(total=steps, initial=start, bar_format=form, dynamic_ncols=True) if terminal else None

    def update(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """`step` steps are done; `values` are metrics to show, if there are new ones."""
        self._first = self._first or (step, time.monotonic())
        if self._bar is not None:
            if values:
                self._bar.set_postfix_str(_short(values), refresh=False)
            self._bar.update(step - self._bar.n)
        elif values and (step == self._steps or time.monotonic() - self._spoke >= LINE_SECONDS):
            self._spoke = time.monotonic()
            first, since = self._first
            left = (self._spoke - since) / (step - first) * (self._steps - step) if step > first else None
            tail = "" if left is None else f", {_clock(left)} left"
            self._say(f"step {step}/{self._steps} {_shown(values)}{tail}")

    def say(self, line: str) -> None:
        """A line that does not break the bar."""
        if self._bar is None:
            self._say(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _shown(values: Mapping[str, float]) -> str:
    return (
        f"loss {values['loss']:.4f}, in-batch accuracy {values['accuracy']:.1%}, temperature "
        f"{values['temperature']:.4f}, learning rate {values['learning_rate']:.2e}, {values['items_per_second']:.0f} "
        f"items/s, data wait {values['data_wait']:.0%}"
    )


def _short(values: Mapping[str, float]) -> str:
    # The same, for a bar on a line of a hundred columns.
    return (
        f"loss {values['loss']:.3f}, acc {values['accuracy']:.0%}, temp {values['temperature']:.3f}, lr "
        f"{values['learning_rate']:.1e}, {values['items_per_second']:.0f} items/s, wait {values['data_wait']:.0%}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _lines(path: Path) -> list[str]:
    # A killed process may have left a last line without its end.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
