"""Charts as inline SVG that follow the page's width and colours, and the logs that the curves are drawn from."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from jfe_jax.reports.html import SERIES_COLOURS, percent, text

_BAR, _GAP = 14, 4
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 220, 40, 22
_POINTS = 240


@dataclass(frozen=True)
class Curve:
    """One line of a chart: (step, value) points; `series` numbers the model that it belongs to."""

    name: str
    series: int
    points: list[tuple[float, float]]


def legend(names: Sequence[str]) -> str:
    """The colours of the series."""
    keys = "".join(
        f'<span><i class="key" style="background:{_colour(i)}"></i>{text(name)}</span>' for i, name in enumerate(names)
    )
    return f'<div class="legend">{keys}</div>'


def bar_chart(rows: Sequence[tuple[str, Sequence[tuple[float, float | None]]]]) -> str:
    """Horizontal bars of fractions: for each row its label, then (value, half length of the whisker) of each series."""
    tops = [value + (spread or 0) for _, values in rows for value, spread in values if value == value]
    if not tops:
        return ""
    # Room for the number behind the longest bar.
    scale = 86 / max(*tops, 0.05)
    drawn = []
    for label, values in rows:
        shapes = []
        for i, (value, spread) in enumerate(values):
            if value != value:
                continue
            y = i * (_BAR + _GAP)
            length, middle = value * scale, y + _BAR / 2
            shapes.append(f'<rect x="0" y="{y}" width="{length:.2f}%" height="{_BAR}" rx="2" fill="{_colour(i)}"/>')
            end = length
            if spread:
                low, end = max(0, (value - spread) * scale), (value + spread) * scale
                shapes.append(
                    f'<line class="whisker" x1="{low:.2f}%" x2="{end:.2f}%" y1="{middle}" y2="{middle}"/>'
                    + "".join(
                        f'<line class="whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="{middle - 3}" y2="{middle + 3}"/>'
                        for x in (low, end)
                    )
                )
            shapes.append(f'<text x="{end:.2f}%" dx="6" y="{y + _BAR - 3}">{percent(value)}</text>')
        height = len(values) * (_BAR + _GAP)
        drawn.append(f'<div class="label">{text(label)}</div><svg height="{height}" role="img">{"".join(shapes)}</svg>')
    return f'<div class="bars card">{"".join(drawn)}</div>'


def line_chart(title: str, lines: Sequence[Curve]) -> str:
    """Line chart of one quantity over steps; empty without points."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    every = [point for line in lines for point in line.points]
    right = max(x for x, _ in every) or 1
    low, high = _range([y for _, y in every])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - 8) * x / right,
            8 + (_HEIGHT - _BOTTOM - 8) * (1 - (y - low) / (high - low)),
        )

    shapes = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = at(0, value)
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{y + 3:.1f}" text-anchor="end">{value:.3g}</text>')
    for i in range(5):
        x, _ = at(right * i / 4, low)
        anchor = "end" if i == 4 else "middle"
        shapes.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{right * i / 4:.0f}</text>')
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        shapes.append(f'<path d="M{path}" stroke="{_colour(line.series)}"><title>{text(line.name)}</title></path>')
    return (
        f'<div class="curve card"><h3>{text(title)}</h3>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(shapes)}</svg></div>'
    )


def training_charts(runs: Sequence[tuple[str, int, Path]]) -> str:
    """Loss and in-batch accuracy of each stage, from the logs of (name, series, checkpoint); empty without logs."""
    charts: dict[str, list[Curve]] = {}
    for name, series, checkpoint in runs:
        stages = training_stages(checkpoint)
        for number, rows in enumerate(stages, 1):
            stage = f"stage {number}" if len(stages) > 1 else "training"
            for key, title in (
                ("loss", "loss"),
                ("accuracy", "in-batch accuracy"),
                ("val_loss", "validation loss"),
                ("val_accuracy", "validation accuracy"),
            ):
                points = _thinned([(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))])
                charts.setdefault(f"{stage}: {title}", []).append(Curve(name, series, points))
    drawn = "".join(line_chart(title, lines) for title, lines in charts.items())
    return f'<div class="curves">{drawn}</div>' if drawn else ""


def training_stages(checkpoint: Path) -> list[list[dict]]:
    """The logged rows of the run that made a checkpoint and of those it started from, the first stage first."""
    stages: list[list[dict]] = []
    seen = set()
    run: Path | None = checkpoint
    while run is not None and run not in seen:
        seen.add(run)
        if run.name.isdecimal() and run.parent.name == "checkpoints":
            run = run.parent.parent
        try:
            lines = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            stages.insert(0, [json.loads(line) for line in lines])
            before = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("init")
        except (OSError, ValueError, yaml.YAMLError, AttributeError):
            # No log is no error: a converted checkpoint has none.
            break
        run = Path(before) if before else None
    return stages


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that the page stays small."""
    size = -(-len(points) // _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < high / 2 or high == low >= 0 else low
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _colour(series: int) -> str:
    return f"var(--s{series % SERIES_COLOURS})"
