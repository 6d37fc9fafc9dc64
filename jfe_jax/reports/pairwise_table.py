"""The difference of every two models of a comparison: matrices for the page, a table for the terminal."""

import itertools

from jfe_jax.reports import html
from jfe_jax.reports.html import points, text

_SHOWN = {"groups": "by group", "forms": "by form", "units": "by unit", "kinds": "by kind of query"}


def matrices(settings: dict, metric: str) -> str:
    """A matrix for each slice: row minus column, with its interval; empty unless there are three models or more."""
    entry = settings["with_source"]
    names = entry["models"]
    if len(names) < 3:
        return ""
    blocks = []
    for family, heading in _SHOWN.items():
        tables = [_matrix(f"{name} ({row['queries']})", row["pairs"], names) for name, row in entry[family].items()]
        if family == "groups" and "difference_of_pairs" in entry:
            tables.append(_matrix("difference of the gains", entry["difference_of_pairs"], names))
        blocks.append(html.folded(heading, "".join(tables), shown=family == "groups"))
    note = (
        f"{text(metric)}: the row's model minus the column's, in points, with a 95 % interval from the same draws as "
        "above; in bold where the interval leaves out 0. No correction for the number of pairs: with 20 of them, one "
        "such interval is to be expected by chance."
    )
    return f'<p class="note">{note}</p>{"".join(blocks)}'


def markdown(entry: dict) -> list[str]:
    """The lines of a table of those pairs that the first model is not in; empty if there are none."""
    names = entry["models"]
    slices = entry["groups"] | entry["forms"]
    others = list(itertools.combinations(names[1:], 2))
    if not others or not slices:
        return []
    lines = ["", f"| the other pairs | {' | '.join(slices)} |", "|---|" + "---:|" * len(slices)]
    for one, other in others:
        cells = [_said(row["pairs"][one][other]) for row in slices.values()]
        lines.append(f"| {one} over {other} | {' | '.join(cells)} |")
    return lines


def _matrix(heading: str, pairs: dict, names: list[str]) -> str:
    rows = [[text(one), *(_cell(one, other, pairs) for other in names)] for one in names]
    return html.table([text(heading), *map(text, names)], rows)


def _cell(one: str, other: str, pairs: dict) -> str:
    if one == other:
        return ""
    gain = pairs.get(one, {}).get(other)
    if gain is None:
        # The same pair the other way round.
        gain = pairs[other][one]
        gain = {"value": -gain["value"], "low": -gain["high"], "high": -gain["low"]}
    shown = points(gain["value"])
    shown = f"<b>{shown}</b>" if gain["low"] > 0 or gain["high"] < 0 else shown
    return f"{shown} <small>[{points(gain['low'])}, {points(gain['high'])}]</small>"


def _said(gain: dict) -> str:
    return f"{points(gain['value'])} [{points(gain['low'])}, {points(gain['high'])}]"
