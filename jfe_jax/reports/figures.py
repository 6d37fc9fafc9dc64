"""The comparison as a picture for a README."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#2563c9", "#d96c1a", "#7d55c7", "#0f8f81", "#b8376f", "#7a7a1c", "#4a5f7a", "#a0522d")


def comparison(path: Path, entry: dict, title: str, labels: dict[str, str] | None = None) -> None:
    """Grouped bars by unit with the groups' means on the left, whiskers of one standard deviation over the runs.

    Args:
      entry: as compare.summary gives it.
      labels: what to write for a unit instead of its name.
    """
    names = entry["models"]
    rows = [*entry["groups"].items(), *entry["units"].items()]
    # A gap between the means and the units.
    at = np.arange(len(rows)) + 0.6 * (np.arange(len(rows)) >= len(entry["groups"]))
    width = 0.8 / len(names)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "jfe"}):
        figure = Figure(
            figsize=(max(6.4, 1.6 + 0.62 * len(rows) * max(1, len(names) / 2)), 3.8), dpi=160, layout="constrained"
        )
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            means = [100 * row["models"][name]["mean"] for _, row in rows]
            spread = [100 * (row["models"][name]["sd"] or 0) for _, row in rows]
            axes.bar(
                at + (i - (len(names) - 1) / 2) * width,
                means,
                width * 0.92,
                yerr=spread if any(spread) else None,
                color=COLOURS[i % len(COLOURS)],
                label=name,
                error_kw={"elinewidth": 0.9, "capsize": 1.8, "ecolor": "#333333"},
            )
        axes.set_xticks(at, [_wrapped((labels or {}).get(name, name)) for name, _ in rows])
        for label in axes.get_xticklabels()[: len(entry["groups"])]:
            label.set_fontweight("bold")
        axes.set_ylabel("%")
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, ncols=len(names), loc="upper right")
        axes.margins(x=0.01)
        low, high = axes.get_ylim()
        # Room for the legend above the bars.
        axes.set_ylim(max(low, 0), min(high * 1.14, 108))
        figure.savefig(path)


def _wrapped(name: str) -> str:
    dataset, task, number = name.partition("_task")
    return f"{dataset}\ntask {number}" if task else name.replace(" ", "\n")
