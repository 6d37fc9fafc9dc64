"""Means over units, each unit weighing the same: groups, kinds, and the headline of a protocol."""

import numpy as np

from jfe_jax.evaluation.error_analysis import MISTAKES
from jfe_jax.evaluation.protocols import Protocol


def add_means(units: list[dict], protocol: Protocol) -> dict:
    """Adds the means over units, each unit weighing the same, and the headline."""
    units = [unit for unit in units if unit["pools"]]
    pools = list(dict.fromkeys(pool for unit in units for pool in unit["pools"]))
    chosen = {name: [unit for unit in units if belongs(unit)] for name, belongs in protocol.groups.items()}
    chosen = {name: members for name, members in chosen.items() if members} | {"all units": units}
    groups, kinds, headline = {}, {}, {}
    for pool in pools:
        entries = {unit["unit"]: unit["pools"][pool] for unit in units if pool in unit["pools"]}
        groups[pool] = {
            name: _mean([entries[unit["unit"]] for unit in members if unit["unit"] in entries])
            for name, members in chosen.items()
        }
        names = sorted({kind for entry in entries.values() for kind in entry["kinds"]})
        kinds[pool] = {
            kind: _mean([entry["kinds"][kind] for entry in entries.values() if kind in entry["kinds"]])
            for kind in names
        }
        if there := [unit for unit in units if unit["unit"] in protocol.units]:
            headline[pool] = _headline(there, pool, protocol)
    return {
        "groups": groups,
        "members": {name: [unit["unit"] for unit in members] for name, members in chosen.items()},
        "headline": headline,
        "kinds": kinds,
        "units": {unit["unit"]: unit for unit in units},
    }


def _headline(units: list[dict], pool: str, protocol: Protocol) -> dict:
    missing = [name for name in protocol.units if name not in {unit["unit"] for unit in units}]
    told = {"name": protocol.headline, "units": len(units), "missing": missing, "value": None, "spread": None}
    if not missing:
        keys = [f"hit@{protocol.cutoff(unit['dataset'])}" for unit in units]
        entries = [unit["pools"][pool] for unit in units]
        told["value"] = float(np.mean([entry["metrics"][key] for entry, key in zip(entries, keys, strict=True)]))
        if prompts := _shared_prompts(entries):
            means = [
                np.mean([entry["prompts"][prompt][key] for entry, key in zip(entries, keys, strict=True)])
                for prompt in prompts
            ]
            told["spread"] = float(np.std(means, ddof=1))
    return told


def _mean(entries: list[dict]) -> dict:
    mean = {"units": len(entries), "queries": sum(entry["queries"] for entry in entries)}
    for key in ("metrics", "without_source"):
        mean[key] = {name: float(np.mean([entry[key][name] for entry in entries])) for name in entries[0][key]}
    for key in ("two_way", "two_way_foil"):
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        if values:
            mean[key] = float(np.mean(values))
    if all("mistakes" in entry for entry in entries):
        mean["mistakes"] = {name: float(np.mean([entry["mistakes"][name] for entry in entries])) for name in MISTAKES}
    if prompts := _shared_prompts(entries):
        mean["prompts"] = {
            prompt: {
                name: float(np.mean([entry["prompts"][prompt][name] for entry in entries])) for name in mean["metrics"]
            }
            for prompt in prompts
        }
        mean["spread"] = spread(list(mean["prompts"].values()))
    controls = dict.fromkeys(given for entry in entries for given in entry.get("controls", ()))
    if controls:
        mean["controls"] = {
            given: _mean([entry["controls"][given] for entry in entries if given in entry.get("controls", ())])
            for given in controls
        }
    return mean


def _shared_prompts(entries: list[dict]) -> list[str]:
    """The prompts that every unit was asked with; none if they were asked once."""
    shared = set.intersection(*(set(entry.get("prompts", ())) for entry in entries))
    return sorted(shared) if len(shared) > 1 else []


def spread(prompts: list[dict]) -> dict:
    """The standard deviation over prompts of each of their metrics."""
    return {name: float(np.std([one[name] for one in prompts], ddof=1)) for name in prompts[0]}
