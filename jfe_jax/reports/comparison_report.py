"""What a comparison says: a Markdown table, the self-contained page, and what goes into both."""

from collections.abc import Sequence
from pathlib import Path

from jfe_jax.reports import html, pairwise_table, svg_charts
from jfe_jax.reports.comparison import Run
from jfe_jax.reports.comparison_gallery import cards, images, outcomes
from jfe_jax.reports.gallery import gallery
from jfe_jax.reports.html import percent, points, text

SETTINGS = {"with_source": "", "without_source": ", without source"}


def markdown(told: dict) -> str:
    """The tables of every pool: units, groups and kinds, and the first model's gains with their intervals."""
    blocks = []
    for pool, settings in told["pools"].items():
        for setting, suffix in _settings(settings):
            entry = settings[setting]
            names = entry["models"]
            lines = [
                f"**{told['metric']}, {pool} pool{suffix}** (mean ± sd of {entry['runs']} runs; gains of {names[0]} "
                "with their 95 % intervals)",
                "",
                f"| | queries | {' | '.join(names)} | {' | '.join(f'gain over {name}' for name in names[1:])} |",
                "|---|---:|" + "---:|" * (2 * len(names) - 1),
            ]
            for family in ("units", "kinds", "forms", "groups"):
                for name, row in entry[family].items():
                    shown = f"**{name}**" if family in ("forms", "groups") else name
                    cells = [_mean(row["models"][model], "±") for model in names]
                    cells += [_gain(row["gains"][model]) for model in names[1:]]
                    lines.append(f"| {shown} | {row['queries']} | {' | '.join(cells)} |")
            if "difference_of_gains" in entry:
                cells = [""] * len(names) + [_gain(entry["difference_of_gains"][model]) for model in names[1:]]
                lines.append(f"| **difference of the gains** | | {' | '.join(cells)} |")
            lines += pairwise_table.markdown(entry)
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def claim(entry: dict) -> str:
    """The first model's gains over the best other, in words; empty if there is no other or one group is missing."""
    if "difference_of_gains" not in entry:
        return ""
    first, best = entry["models"][0], entry["best_other"]
    gains = [entry["groups"][group]["gains"][best] for group in ("needs fusion", "does not")]
    return (
        f"{first} over {best}, the best of the others where fusion is needed: {_gain(gains[0])} points where it is, "
        f"{_gain(gains[1])} where it is not, difference {_gain(entry['difference_of_gains'][best])}."
    )


def write(path: Path, told: dict, models: dict[str, list[Run]]) -> None:
    """Writes the self-contained page."""
    pools = list(told["pools"])
    main = pools[-1]
    names = list(models)
    best = told["pools"][main]["with_source"]["best_other"]
    chosen, note = cards(models, main, best)
    shown = gallery(chosen, outcomes(names[0], best), images(models))
    runs = [(name, i, Path(run.results["checkpoint"])) for i, name in enumerate(names) for run in models[name]]
    training = svg_charts.training_charts(runs)
    sections = [
        ("claim", "Where fusion is needed, and where not", _claims(told)),
        ("bars", f"{told['metric']} by group and unit, {main} pool", _bars(told["pools"][main]["with_source"], names)),
        *(
            (
                f"pool-{pool}",
                f"{pool.capitalize()} pool",
                "".join(_tables(told, pool, setting) for setting, _ in _settings(told["pools"][pool])),
            )
            for pool in pools
        ),
        ("pairs", f"Every pair, {main} pool", pairwise_table.matrices(told["pools"][main], told["metric"])),
        ("kinds", f"Kinds of query, {main} pool", _kinds(told, main)),
        ("controls", "Half of the query alone", _controls(told)),
        ("twoway", "Two-way choices", _two_way(models, pools)),
        ("training", "Training", svg_charts.legend(names) + training if training else ""),
        ("gallery", f"Queries and what was found, {main} pool", note + shown),
        ("runs", "Evaluations compared", _runs(models)),
    ]
    path.write_text(html.page(f"{' against '.join(names)}", sections, _lead(told)), encoding="utf-8")


def _settings(settings: dict) -> list[tuple[str, str]]:
    """The settings there are, each with what is written behind the pool's name."""
    return [(name, suffix) for name, suffix in SETTINGS.items() if name in settings]


def _lead(told: dict) -> str:
    lines = []
    for pool, settings in list(told["pools"].items())[-1:]:
        for setting, suffix in _settings(settings):
            if said := claim(settings[setting]):
                lines.append(f"<p><b>{text(pool)} pool{suffix}:</b> {text(said)}</p>")
    return "".join(lines)


def _claims(told: dict) -> str:
    blocks = []
    first = next(iter(told["pools"].values()))["with_source"]
    names = first["models"]
    # The largest pool first: it is what the claim is about.
    for pool, settings in reversed(told["pools"].items()):
        for setting, suffix in _settings(settings):
            entry = settings[setting]
            rows = [[text(name), *_cells(row, names)] for name, row in entry["groups"].items()]
            sums = []
            if "difference_of_gains" in entry:
                sums.append(len(rows))
                cells = [_gain_cell(entry["difference_of_gains"][name]) for name in names[1:]]
                rows.append(["difference of the gains", *[""] * len(names), *cells])
            table = html.table([f"{told['metric']}", *_heads(names)], rows, sums)
            blocks.append(f"<h3>{text(pool.capitalize())} pool{suffix}</h3>{table}" if rows else "")
    note = (
        f"{told['metric']} in %, mean over units (each weighs the same) and runs, ± standard deviation over "
        f"{first['runs']} runs. Gain: {text(names[0])} minus the other, in points, with a 95 % interval from "
        f"{told['replicates']} bootstrap replicates that draw clusters of queries about the same thing, and runs, "
        "alike for all models. Needs fusion: tasks 6, 7, 8; does not: 0, 1, 3, 4. Without source: the query's own "
        "image is taken out of the pool."
    )
    return "".join(blocks) + f'<p class="note">{note}</p>'


def _pool(told: dict, pool: str) -> str:
    return "".join(_tables(told, pool, setting) for setting, _ in _settings(told["pools"][pool]))


def _tables(told: dict, pool: str, setting: str) -> str:
    entry = told["pools"][pool][setting]
    names = entry["models"]
    rows = [[text(name), *_cells(row, names), str(row["queries"])] for name, row in entry["units"].items()]
    groups = [*entry["forms"].items(), *entry["groups"].items()]
    sums = [len(rows) + i for i in range(len(groups))]
    rows += [[text(name), *_cells(row, names), str(row["queries"])] for name, row in groups]
    heading = f"<h3>{'without source' if setting == 'without_source' else 'all candidates'}</h3>"
    return heading + html.table([f"{told['metric']}", *_heads(names), "queries"], rows, sums)


def _kinds(told: dict, pool: str) -> str:
    blocks = []
    for setting, _ in _settings(told["pools"][pool]):
        entry = told["pools"][pool][setting]
        names = entry["models"]
        for family in ("kinds", "edits"):
            rows = [[text(name), *_cells(row, names), str(row["queries"])] for name, row in entry[family].items()]
            heading = f"{family}, {'without source' if setting == 'without_source' else 'all candidates'}"
            table = html.table([family[:-1], *_heads(names), "queries"], rows)
            blocks.append(
                html.folded(heading, table) if family == "edits" else f"<h3>{heading}</h3>{table}" if rows else ""
            )
    return "".join(blocks)


def _controls(told: dict) -> str:
    blocks = []
    for pool, settings in reversed(told["pools"].items()):
        for given, entry in settings["controls"].items():
            names = entry["models"]
            rows = [
                [text(name), *_cells(row, names)]
                for family in ("units", "groups")
                for name, row in entry[family].items()
            ]
            sums = range(len(entry["units"]), len(rows))
            table = html.table([f"{told['metric']}", *_heads(names)], rows, sums)
            blocks.append(html.folded(f"{given} only, {pool} pool", table, shown=pool == list(told["pools"])[-1]))
    return "".join(blocks)


def _two_way(models: dict[str, list[Run]], pools: Sequence[str]) -> str:
    blocks = []
    units = next(iter(models.values()))[0].results["units"]
    for pool in reversed(pools):
        for key, other in (("two_way", "own image"), ("two_way_foil", "foil")):
            rows = []
            for unit, about in units.items():
                if about["pools"][pool][key] is not None:
                    values = [
                        [run.results["units"][unit]["pools"][pool][key] for run in runs] for runs in models.values()
                    ]
                    rows.append([text(unit), *(percent(sum(row) / len(row)) for row in values)])
            table = html.table([f"against the {other}", *map(text, models)], rows)
            blocks.append(html.folded(f"{other}, {pool} pool", table, shown=pool == pools[-1]))
    note = (
        "How often the best right candidate stands before the query's own image, and before the query's foil (a wrong "
        "candidate that the data set names for it), in %; mean over runs."
    )
    return f'<p class="note">{note}</p>{"".join(blocks)}' if any(blocks) else ""


def _bars(entry: dict, names: Sequence[str]) -> str:
    rows = [
        (name, [(row["models"][model]["mean"], row["models"][model]["sd"]) for model in names])
        for family in ("groups", "forms", "units")
        for name, row in entry[family].items()
    ]
    note = f'<p class="note">Whiskers: standard deviation over {entry["runs"]} runs.</p>' if entry["runs"] > 1 else ""
    return svg_charts.legend(names) + svg_charts.bar_chart(rows) + note


def _runs(models: dict[str, list[Run]]) -> str:
    rows = [
        [
            text(name),
            text(run.path),
            text(run.results["checkpoint"]),
            str(run.results["step"]),
            f"{run.results['parameters']:,}",
            text(", ".join(filter(None, (run.results["data"], run.results["split"])))),
        ]
        for name, runs in models.items()
        for run in runs
    ]
    every = [f"{name}: {line}" for name, runs in models.items() for run in runs for line in run.results["warnings"]]
    return html.table(["model", "evaluation", "checkpoint", "step", "parameters", "data"], rows) + html.warnings(every)


def _heads(names: Sequence[str]) -> list[str]:
    return [*map(text, names), *(f"gain over<br>{text(name)}" for name in names[1:])]


def _cells(row: dict, names: Sequence[str]) -> list[str]:
    best = max(row["models"][name]["mean"] for name in names)
    cells = []
    for name in names:
        shown = _mean(row["models"][name], " <small>± ") + ("</small>" if row["models"][name]["sd"] is not None else "")
        leads = row["models"][name]["mean"] == best and any(row["models"][other]["mean"] != best for other in names)
        cells.append(f"<b>{shown}</b>" if leads else shown)
    return cells + [_gain_cell(row["gains"][name]) for name in names[1:]]


def _gain_cell(gain: dict) -> str:
    return f"{points(gain['value'])} <small>[{points(gain['low'])}, {points(gain['high'])}]</small>"


def _gain(gain: dict) -> str:
    return f"{points(gain['value'])} [{points(gain['low'])}, {points(gain['high'])}]"


def _mean(row: dict, sign: str) -> str:
    sign = f" {sign} " if sign == "±" else sign
    return percent(row["mean"]) + (f"{sign}{percent(row['sd'])}" if row["sd"] is not None else "")
