"""The table of published figures beside an evaluation's own."""

from jfe_jax.evaluation.protocols import PROTOCOLS
from jfe_jax.reports import html
from jfe_jax.reports.html import percent, text
from jfe_jax.reports.published_results import BY_PROTOCOL, Published


def published_table(results: dict) -> str:
    """Published rows beside ours, with pool and source; empty for data that nothing was published on."""
    published = BY_PROTOCOL.get(results["protocol"], ())
    told = results["headline"]
    if not told or not published:
        return ""
    rows, ours = [], []
    for pool, one in told.items():
        ours.append(len(rows))
        value = percent(one["value"]) if not one["missing"] else f"– ({len(one['missing'])} units missing)"
        rows.append([f"this checkpoint, {text(pool)} pool", value, "this report"])
    rows += [
        [f"{text(row.model)}, {text(row.pool)} pool", f"{row.mean:.1f}", text(row.source)]
        for row in sorted(published, key=lambda row: -row.mean)
    ]
    protocol = PROTOCOLS[results["protocol"]]
    note = f'<p class="note">{text(f"{protocol.headline}: {protocol.note}")}, in %.</p>'
    return (
        html.table(["", text(protocol.headline), "source"], rows, ours)
        + note
        + html.folded("by group and unit", _beside_parts(results, [row for row in published if row.values]))
    )


def _beside_parts(results: dict, published: list[Published]) -> str:
    protocol = PROTOCOLS[results["protocol"]]
    rows = []
    for name in dict.fromkeys([*protocol.units, *(name for row in published for name in row.values)]):
        cells = []
        for pool in results["pools"]:
            if name in results["units"]:
                unit = results["units"][name]
                key = f"hit@{protocol.cutoff(unit['dataset'])}"
                cells.append(percent(unit["pools"][pool]["metrics"][key]))
            else:
                # A mean over part of a group is not the group's.
                whole = results["groups"][pool].get(name) if name in protocol.groups else None
                complete = whole is not None and whole["units"] == protocol.size(name)
                cells.append(percent(whole["metrics"]["hit@1"]) if complete else "–")
        rows.append(
            [text(name), *cells, *(f"{row.values[name]:.1f}" if name in row.values else "–" for row in published)]
        )
    head = ["", *(f"this checkpoint,<br>{text(pool)}" for pool in results["pools"])]
    return html.table([*head, *(f"{text(row.model)},<br>{text(row.pool)}" for row in published)], rows)
